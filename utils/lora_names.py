"""Maps the keys of a LoRA file, in the spelling of any trainer, to FLUX.1's weights."""

import re
from typing import NamedTuple


class Rows(NamedTuple):
    """Rows `start` to `stop` of a module's weight, and the same entries of its bias."""
    module: str
    start: int
    stop: int


QKV, ADDED_QKV = ("attn.to_q", "attn.to_k", "attn.to_v"), ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj")
# Black Forest Labs' names after "double_blocks.N." and "single_blocks.N.", and the modules of diffusers' block whose
# rows they stack (https://github.com/black-forest-labs/flux, src/flux/modules/layers.py). x-flux uses "processor".
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
# Longest first: "" matches every remaining name. T5 is lora_te3 in kohya's sd-scripts and lora_te2 in OneTrainer.
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
    """Returns every spelling of every module of a component, and the rows that it names.

    Each spelling occurs with dots and with underscores.

    Args:
        component: "transformer", "text_encoder" or "text_encoder_2".
        shapes: the shape of each of the component's parameters, by diffusers' or transformers' name.
    """
    rows = {name.removesuffix(".weight"): shape[0] for name, shape in shapes.items() if name.endswith(".weight")}
    known = {module: (module,) for module in rows}
    if component == "text_encoder":  # transformers 5 dropped the level "text_model", which older files have
        known |= {f"text_model.{module}": (module,) for module in rows}
        known |= {module.removeprefix("text_model."): (module,) for module in rows}
    elif component == "transformer":
        known |= {alias: (module,) for alias, module in OUTSIDE.items()}
        for ours, theirs, names in (("transformer_blocks", "double_blocks", DOUBLE),
                                    ("single_transformer_blocks", "single_blocks", SINGLE)):
            for n in {module.split(".")[1] for module in rows if module.startswith(f"{ours}.")}:
                known |= {f"{theirs}.{n}.{alias}": tuple(f"{ours}.{n}.{module}" for module in modules)
                          for alias, modules in names.items()}
        for module in rows:  # diffusers' oldest LoRAs have names such as attn.processor.to_q_lora
            block, inside, leaf = module.partition(".attn.")
            if inside:
                known[f"{block}.attn.processor.{leaf.removesuffix('.0')}_lora"] = (module,)
    stacked = {alias: tuple(Rows(module, 0, rows[module]) for module in modules)
               for alias, modules in known.items() if all(module in rows for module in modules)}
    if component == "transformer" and "norm_out.linear" in rows:
        half = rows["norm_out.linear"] // 2  # shift, then scale; diffusers has the scale first
        stacked["final_layer.adaLN_modulation.1"] = (Rows("norm_out.linear", half, 2 * half),
                                                     Rows("norm_out.linear", 0, half))
    return {alias.replace(".", "_"): where for alias, where in stacked.items()} | stacked


def find(name: str, known: dict[str, dict[str, tuple[Rows, ...]]]) -> tuple[str, str, tuple[Rows, ...]] | None:
    """Finds the module that a key of a LoRA file names.

    Args:
        name: the key without its suffix.
        known: `spellings` of each component.

    Returns:
        The component, the module's name in it and its rows; None for an unknown name.
    """
    name = name.removeprefix("base_model.model.")
    for prefix, component in PREFIXES:
        if name.startswith(prefix):
            inside = name.removeprefix(prefix)
            rows = known.get(component, {}).get(inside)
            return (component, inside, rows) if rows else None
    return None


def looks_like(names, metadata: dict[str, str]) -> str:
    """Returns a clause that guesses the model of a foreign LoRA, or "".

    Args:
        names: the file's keys.
        metadata: of the file's header.
    """
    base_model = metadata.get("modelspec.architecture") or metadata.get("ss_base_model_version") or ""
    if base_model and "flux" not in base_model.lower():
        return f"; its header names {base_model[:60]!r}"
    model_name = next((model for pattern, model in OTHER_MODELS if any(re.search(pattern, name) for name in names)),
                      None)
    return f"; it looks like a LoRA for {model_name}" if model_name else ""
