"""LoRA files in every trainer's spelling, for a small FLUX.1: the shapes of their tensors, and alpha by value."""

import torch

D, R = 32, 2  # width of the transformer, rank of the LoRAs
Q, K = (f"transformer.transformer_blocks.0.attn.to_{name}" for name in "qk")


def drawn(file: dict) -> dict[str, torch.Tensor]:
    """The tensors of a file: random ones of its shapes, and its numbers."""
    return {key: 0.3 * torch.randn(value) if isinstance(value, tuple) else torch.tensor(value)
            for key, value in file.items()}


def pair(key, rows=D, columns=D, down="lora_A", up="lora_B", **more) -> dict:
    """The two factors of one LoRA, and `more` of it (alpha=1.0)."""
    return {f"{key}.{down}.weight": (R, columns), f"{key}.{up}.weight": (rows, R)} | named(key, more)


def pairs(prefix, table: dict, **spelling) -> dict:
    """Several LoRAs in one file: (rows, columns) by key."""
    return {name: shape for key, sides in table.items()
            for name, shape in pair(prefix + key, *sides, **spelling).items()}


def named(key, parts: dict) -> dict:
    return {f"{key}.{name}": value for name, value in parts.items()}


KOHYA = dict(down="lora_down", up="lora_up", alpha=1.0)
OLDEST = dict(down="down", up="up")
PEFT = dict(down="lora_A.default", up="lora_B.default")
SQUARE, WIDE, LONG = (D, D), (4 * D, D), (D, 4 * D)
LOKR, LOHA = "lycoris_single_transformer_blocks_0_attn_to_k", "lycoris_transformer_blocks_1_attn_to_add_out"
FORMATS = {
    **{f"prefix {prefix!r}": pair(f"{prefix}transformer_blocks.0.attn.to_k") for prefix in (
        "", "transformer.", "unet.", "base_model.model.", "base_model.model.transformer.", "diffusion_model.",
        "model.diffusion_model.")},
    **{f"prefix {prefix!r}": pair(f"{prefix}transformer_blocks_0_attn_to_k", **KOHYA) for prefix in (
        "lora_unet_", "lora_transformer_", "lycoris_")},
    **{f"suffix {down}": pair(K, down=down, up=up) for down, up in (
        ("lora_A.default", "lora_B.default"), ("lora_A.default_0", "lora_B.default_0"),
        ("lora_A.my-style", "lora_B.my-style"), ("lora_down", "lora_up"), ("lora.down", "lora.up"),
        ("lora_linear_layer.down", "lora_linear_layer.up"))},
    "oldest": pairs("transformer_blocks.0.attn.processor.", {"to_k_lora": SQUARE, "to_out_lora": SQUARE}, **OLDEST),
    "alpha": pair(K, alpha=0.7),
    "integer alpha": pair(K, alpha=1),
    "convolution of one pixel": {key: (*shape, 1, 1) for key, shape in pair(K).items()},
    "mixed prefixes": pair(K) | pair("transformer_blocks.1.attn.to_k"),
    "kohya, double": pairs("lora_unet_double_blocks_0_", {
        "img_attn_qkv": (3 * D, D), "txt_attn_qkv": (3 * D, D), "img_attn_proj": SQUARE, "txt_attn_proj": SQUARE,
        "img_mlp_0": WIDE, "img_mlp_2": LONG, "txt_mlp_0": WIDE, "txt_mlp_2": LONG, "img_mod_lin": (6 * D, D),
        "txt_mod_lin": (6 * D, D)}, **KOHYA),
    "BFL, single": pairs("diffusion_model.single_blocks.0.", {
        "linear1": (7 * D, D), "linear2": (D, 5 * D), "modulation.lin": (3 * D, D)}),
    "BFL, outside": pairs("", {
        "img_in": (D, 16), "txt_in": (D, 24), "final_layer.linear": (16, D), "time_in.in_layer": (D, 256),
        "time_in.out_layer": SQUARE, "vector_in.in_layer": (D, 20), "vector_in.out_layer": SQUARE,
        "guidance_in.in_layer": (D, 256), "guidance_in.out_layer": SQUARE}),
    "BFL, swapped halves": pair("diffusion_model.final_layer.adaLN_modulation.1", 2 * D),
    "x-flux": pairs("", {
        "double_blocks.0.processor.qkv_lora1": (3 * D, D), "double_blocks.0.processor.qkv_lora2": (3 * D, D),
        "double_blocks.0.processor.proj_lora1": SQUARE, "double_blocks.0.processor.proj_lora2": SQUARE,
        "single_blocks.0.processor.qkv_lora": (3 * D, D), "single_blocks.0.processor.proj_lora": (D, 5 * D)}, **OLDEST),
    **{f"CLIP {key}": pair(key, 40, 20, **spelling) for key, spelling in (
        ("text_encoder.encoder.layers.0.mlp.fc1", {}), ("text_encoder.text_model.encoder.layers.0.mlp.fc1", {}),
        ("lora_te1_text_model_encoder_layers_0_mlp_fc1", KOHYA),
        ("lora_te_text_model_encoder_layers_0_mlp_fc1", KOHYA),
        ("text_encoders.clip_l.transformer.text_model.encoder.layers.0.mlp.fc1", KOHYA))},
    **{f"T5 {key}": pair(key, 16, 24, **spelling) for key, spelling in (
        ("text_encoder_2.encoder.block.0.layer.0.SelfAttention.q", {}),
        ("lora_te3_encoder_block_0_layer_0_SelfAttention_q", KOHYA),
        ("lora_te2_encoder_block_0_layer_0_SelfAttention_q", KOHYA),
        ("text_encoders.t5xxl.transformer.encoder.block.0.layer.0.SelfAttention.q", KOHYA))},
    "bias": pair("transformer.proj_out", 16, alpha=1.0) | {"transformer.proj_out.lora_B.bias": (16,)},
    "bias of stacked rows": pair("single_blocks.1.linear1", 7 * D) | {"single_blocks.1.linear1.lora_B.bias": (7 * D,)},
    "DoRA, kohya": pair("lora_unet_transformer_blocks_0_attn_to_q", **KOHYA, dora_scale=(D, 1)),
    "DoRA, LyCORIS": pair(Q, dora_scale=(1, D)),
    **{f"DoRA, peft {name}": pair(Q, **(PEFT if "default" in name else {}), **{f"lora_magnitude_vector{name}": (D,)})
       for name in ("", ".weight", ".default", ".default.weight")},
    "DoRA of stacked rows": pair("lora_unet_double_blocks_1_img_attn_qkv", 3 * D, **KOHYA, dora_scale=(1, D)),
    # LyCORIS writes an alpha that means nothing beside two whole factors.
    "LoKr": named(LOKR, dict(lokr_w1=(4, 2), lokr_w2=(8, 16), alpha=1e10)),
    "LoKr, one factored": named(LOKR, dict(lokr_w1=(4, 2), lokr_w2_a=(8, R), lokr_w2_b=(R, 16), alpha=1.0)),
    "LoKr, the other": named(LOKR, dict(lokr_w1_a=(4, R), lokr_w1_b=(R, 2), lokr_w2=(8, 16), alpha=3.0)),
    "LoKr, both": named(LOKR, dict(lokr_w1_a=(4, R), lokr_w1_b=(R, 2), lokr_w2_a=(8, R), lokr_w2_b=(R, 16), alpha=1.0)),
    "LoKr of stacked rows": named("diffusion_model.double_blocks.0.txt_attn.qkv",
                                  dict(lokr_w1=(2, 4), lokr_w2=(48, 8))),
    "LoHa": named(LOHA, dict(hada_w1_a=(D, R), hada_w1_b=(R, D), hada_w2_a=(D, R), hada_w2_b=(R, D), alpha=0.5)),
    "differences": {
        "diffusion_model.img_in.diff": (D, 16), "diffusion_model.img_in.diff_b": (D,),
        "diffusion_model.single_blocks.0.norm.query_norm.diff": (16,),
        "lora_te1_text_model_final_layer_norm.w_norm": (20,), "lora_te1_text_model_final_layer_norm.b_norm": (20,)},
    "norms": pair(Q) | {
        "transformer.transformer_blocks.0.attn.norm_q.weight": (16,),
        "double_blocks.0.txt_attn.norm.query_norm.scale": (16,), "double_blocks.0.txt_attn.norm.key_norm.scale": (16,),
        "single_blocks.1.norm.key_norm.scale": (16,)},
}
