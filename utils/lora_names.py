"""Which weights of a FLUX.1 the keys of a LoRA file mean, in the spellings of its trainers."""

import re
from typing import NamedTuple


class Rows(NamedTuple):
    """Rows of the weight, and entries of the bias, of one module."""
    module: str
    start: int
    stop: int


QKV, ADDED_QKV = ("attn.to_q", "attn.to_k", "attn.to_v"), ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj")
# Black Forest Labs' names, behind "double_blocks.N." and "single_blocks.N.", and the modules of diffusers' block whose
# rows they stack: https://github.com/black-forest-labs/flux, src/flux/modules/layers.py. "processor" is x-flux's.
DOUBLE = {
    "img_attn.qkv": QKV, "img_attn.proj": ("attn.to_out.0",), "img_mlp.0": ("ff.net.0.proj",),
    "img_mlp.2": ("ff.net.2",), "img_mod.lin": ("norm1.linear",), "img_attn.norm.query_norm": ("attn.norm_q",),
    "img_attn.norm.key_norm": ("attn.norm_k",), "processor.qkv_lora1": QKV, "processor.proj_lora1": ("attn.to_out.0",),
    "txt_attn.qkv": ADDED_QKV, "txt_attn.proj": ("attn.to_add_out",), "txt_mlp.0": ("ff_context.net.0.proj",),
    "txt_mlp.2": ("ff_context.net.2",), "txt_mod.lin": ("norm1_context.linear",),
    "txt_attn.norm.query_norm": ("attn.norm_added_q",), "txt_attn.norm.key_norm": ("attn.norm_added_k",),
    "processor.qkv_lora2": ADDED_QKV, "processor.proj_lora2": ("attn.to_add_out",),
}
SINGLE = {
    "linear1": (*QKV, "proj_mlp"), "linear2": ("proj_out",), "modulation.lin": ("norm.linear",),
    "norm.query_norm": ("attn.norm_q",), "norm.key_norm": ("attn.norm_k",),
    "processor.qkv_lora": QKV, "processor.proj_lora": ("proj_out",),
}
OUTSIDE = {
    "img_in": "x_embedder", "txt_in": "context_embedder", "final_layer.linear": "proj_out",
    "time_in.in_layer": "time_text_embed.timestep_embedder.linear_1",
    "time_in.out_layer": "time_text_embed.timestep_embedder.linear_2",
    "vector_in.in_layer": "time_text_embed.text_embedder.linear_1",
    "vector_in.out_layer": "time_text_embed.text_embedder.linear_2",
    "guidance_in.in_layer": "time_text_embed.guidance_embedder.linear_1",
    "guidance_in.out_layer": "time_text_embed.guidance_embedder.linear_2",
}
# Longest first: "" takes what no other does. T5 is lora_te3 in kohya's sd-scripts and lora_te2 in OneTrainer.
PREFIXES = [(prefix, component) for component, prefixes in {
    "text_encoder": ("text_encoders.clip_l.transformer.", "text_encoder.", "lora_te1_", "lora_te_"),
    "text_encoder_2": ("text_encoders.t5xxl.transformer.", "text_encoder_2.", "lora_te2_", "lora_te3_"),
    "transformer": ("model.diffusion_model.", "diffusion_model.", "transformer.", "unet.", "lora_unet_",
                    "lora_transformer_", "lycoris_", ""),
}.items() for prefix in prefixes]

OTHER_MODELS = [
    (r"joint_blocks|context_block", "Stable Diffusion 3"),
    (r"input_blocks|middle_block|output_blocks|(down|up)_blocks|mid_block|lora_te2_text_model", "Stable Diffusion"),
    (r"(^|[._])blocks[._]\d+[._](self|cross)_attn", "Wan"),
    (r"blocks\.\d+\.(img|txt)_(attn_qkv|mod\.linear|mlp\.fc)", "HunyuanVideo"),
    (r"double_stream_modulation|to_qkv_mlp_proj", "FLUX.2"),
    (r"distilled_guidance_layer", "Chroma"),
    (r"transformer_blocks\.\d+\.(img|txt)_m", "Qwen-Image"),
    (r"layers[._]\d+[._](attention|feed_forward)", "Lumina or Z-Image"),
]


def spellings(component: str, shapes: dict[str, tuple]) -> dict[str, tuple[Rows, ...]]:
    """Every name of every module of a component, dotted and with underscores, and the rows that it stands for.

    Args:
        shapes: of its parameters, by diffusers' or transformers' name.
    """
    rows = {name.removesuffix(".weight"): shape[0] for name, shape in shapes.items() if name.endswith(".weight")}
    known = {module: (module,) for module in rows}
    if component == "text_encoder":  # transformers 5 dropped the level that older files name
        known |= {f"text_model.{module}": (module,) for module in rows}
        known |= {module.removeprefix("text_model."): (module,) for module in rows}
    elif component == "transformer":
        known |= {alias: (module,) for alias, module in OUTSIDE.items()}
        for ours, theirs, names in (("transformer_blocks", "double_blocks", DOUBLE),
                                    ("single_transformer_blocks", "single_blocks", SINGLE)):
            for n in {module.split(".")[1] for module in rows if module.startswith(f"{ours}.")}:
                known |= {f"{theirs}.{n}.{alias}": tuple(f"{ours}.{n}.{module}" for module in modules)
                          for alias, modules in names.items()}
        for module in rows:  # diffusers' oldest LoRAs: attn.processor.to_q_lora
            block, inside, leaf = module.partition(".attn.")
            if inside:
                known[f"{block}.attn.processor.{leaf.removesuffix('.0')}_lora"] = (module,)
    stacked = {alias: tuple(Rows(module, 0, rows[module]) for module in modules)
               for alias, modules in known.items() if all(module in rows for module in modules)}
    if component == "transformer" and "norm_out.linear" in rows:
        half = rows["norm_out.linear"] // 2  # shift, then scale; diffusers has them the other way around
        stacked["final_layer.adaLN_modulation.1"] = (Rows("norm_out.linear", half, 2 * half),
                                                     Rows("norm_out.linear", 0, half))
    return {alias.replace(".", "_"): where for alias, where in stacked.items()} | stacked


def find(name: str, known: dict[str, dict[str, tuple[Rows, ...]]]) -> tuple[str, str, tuple[Rows, ...]] | None:
    """What a key means without its suffix: the component, the name in it, and the rows; None if nothing here.

    Args:
        known: `spellings` of each component.
    """
    name = name.removeprefix("base_model.model.")
    for prefix, component in PREFIXES:
        if name.startswith(prefix):
            inside = name.removeprefix(prefix)
            rows = known.get(component, {}).get(inside)
            return (component, inside, rows) if rows else None
    return None


def looks_like(names, metadata: dict[str, str]) -> str:
    """Half a sentence on the model that a LoRA seems to be of, or nothing."""
    said = metadata.get("modelspec.architecture") or metadata.get("ss_base_model_version") or ""
    if said and "flux" not in said.lower():
        return f", its header says {said[:60]!r}"
    found = next((model for pattern, model in OTHER_MODELS if any(re.search(pattern, name) for name in names)), None)
    return f", it looks like one for {found}" if found else ""
