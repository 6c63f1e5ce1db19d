"""Compares the header of a single file with FLUX.1's transformer, under the names of any of the usual tools.

ComfyUI's conventions for scaled float8 (comfy/ops.py; convert_old_quants in comfy/utils.py; QUANTIZATION.md):
LAYER.scale_weight or LAYER.weight_scale is the scale of LAYER.weight, LAYER.scale_input or LAYER.input_scale is for
activations, the tensor scaled_fp8 marks the file, and LAYER.comfy_quant or the file's metadata names a layer's format.
"""

import json
import re
from pathlib import Path

from safetensors import safe_open

from utils import gguf_file
from utils.common import RecipeError
from utils.lora_names import OTHER_MODELS, Rows, spellings
from utils.safetensors_header import Tensor

BLOCK = r"((?:double|single)_blocks|(?:single_)?transformer_blocks)\.(\d+)\."
PREFIXES = ("model.diffusion_model.", "diffusion_model.", "transformer.", "")  # ComfyUI's, trainers', none
OTHER_PARTS = re.compile(r"(vae|first_stage_model|text_encoders?|text_encoder_2|cond_stage_model|conditioner)\.")
GUIDANCE = re.compile(r"guidance_in\.|time_text_embed\.guidance_embedder\.")
# Nunchaku's names include lora_down, so that quantized files are recognized before LoRAs.
QUANTISED = {"bitsandbytes": r"\.(nested_)?(absmax|quant_map)$|\.quant_state\.|\.SCB$", "GPTQ or AWQ": r"\.qzeros$",
             "SVDQuant, for nunchaku": r"\.(qweight|wscales|wtscale|smooth_factor)$", "torchao": r"\._weight_\w+$",
             "quanto": r"\.weight\._(data|scale|shift)$", "NVFP4": r"\.weight_scale_2$"}
LORA = re.compile(r"lora_[AB]\b|lora_(up|down)|\.lora\.|lokr_|hada_|dora_scale|\.alpha$|\.diff(_b)?$")
OTHER_KINDS = {"a ControlNet": r"controlnet_|input_hint_block",
               "a VAE": r"(vae\.|first_stage_model\.)?(encoder|decoder)\.(conv_in|down|up|mid)",
               "a text encoder": r"(text_encoders?\..*|.*text_model\.|encoder\.block\.|shared\.weight|enc\.blk\.)"}
FLOATS = ("F64", "F32", "F16", "BF16")
IGNORED = re.compile(r"scaled_fp8|.+\.(scale_input|input_scale|comfy_quant)")
FORMATS = ("float8_e4m3fn", "float8_e5m2")  # of ComfyUI's LAYER.comfy_quant
CHANNELS = {384: ", as FLUX.1-Fill does", 128: ", as FLUX.1-Depth and -Canny do"}
FLOAT8 = ("F8_E4M3", "F8_E5M2")
BF16 = "Give the model in bf16, fp16 or float8 as .safetensors: this recipe quantizes the model itself."


def refuse_other_files(here: str, path: Path, names: list[str]) -> None:
    """Refuses a LoRA, a part of a model, and formats that the names show.

    Args:
        here: the flag and its value, here and below.

    Raises:
        RecipeError: names the kind and the way out.
    """
    for kind, pattern in QUANTISED.items():
        if named := [name for name in names if re.search(pattern, name)]:
            raise RecipeError(f"{here} is quantized by {kind}: {len(named)} tensors such as {named[0]}. {BF16}")
    if lora := next(filter(LORA.search, names), None):
        raise RecipeError(f"{here} is a LoRA: it holds {lora}. Give it with --lora.")
    if re.search(r"-\d{5}-of-\d{5}\.", path.name):
        raise RecipeError(f"{here} is one of several files of a model. Give the whole model in one file, or its "
                          "diffusers folder as --ckpt.")


def refuse_other_formats(here: str, path: Path, names: list[str], metadata: dict[str, str]) -> None:
    """Refuses ComfyUI's formats whose weights are more than value times scale, such as rotated int8.

    The file's metadata or a tensor of bytes of each layer has the format in JSON.

    Raises:
        RecipeError: names the layer and the format.
    """
    layers = json.loads(metadata.get("_quantization_metadata", "{}")).get("layers", {})
    layers = {name: layer for name, layer in layers.items() if not OTHER_PARTS.match(name)}
    with safe_open(path, "pt") as opened:
        layers |= {name: json.loads(bytes(opened.get_tensor(name).tolist())) for name in names
                   if name.endswith(".comfy_quant")}
    for name, layer in layers.items():
        layer = layer if isinstance(layer, dict) else {"format": layer}
        if layer.get("format") not in FORMATS or layer.keys() - {"format", "full_precision_matrix_mult"}:
            raise RecipeError(f"{here} is quantized: {name} has the format {json.dumps(layer)}, and this recipe reads "
                              f"{' and '.join(FORMATS)}. {BF16}")


def guess(names) -> str:
    """A clause that guesses what a file that is no FLUX.1 transformer holds, or ""."""
    kinds = OTHER_KINDS | {model: rf".*({pattern})" for pattern, model in OTHER_MODELS}
    kind = next((kind for kind, pattern in kinds.items() if any(re.match(pattern, name) for name in names)), None)
    return f"; it looks like {kind}" if kind else ""


def names_of(own: list[str], notes: list[str]) -> dict[str, str]:
    """Strips the prefix of the names, and numbers the blocks of a pruned model without gaps.

    Args:
        own: the names of a file without those of other parts.
        notes: gets a sentence if block numbers are absent.

    Returns:
        {name in the file: name}; empty if there is no block of a transformer.
    """
    prefix = next((one for one in PREFIXES if any(re.match(re.escape(one) + BLOCK, name) for name in own)), None)
    if prefix is None:
        return {}
    names = {stored: stored.removeprefix(prefix) for stored in own}
    for kind, start in (("double", "double_blocks|transformer_blocks"), ("single", "single_(?:transformer_)?blocks")):
        pattern = re.compile(rf"({start})\.(\d+)\.")
        numbers = sorted({int(found[2]) for name in names.values() if (found := pattern.match(name))})
        if numbers and numbers[-1] >= len(numbers):
            new = {old: i for i, old in enumerate(numbers)}
            names = {stored: pattern.sub(lambda found, new=new: f"{found[1]}.{new[int(found[2])]}.", name, count=1)
                     if pattern.match(name) else name for stored, name in names.items()}
            notes.append(f"of its {kind} blocks only {', '.join(map(str, numbers))} are there; they follow each other")
    return names


def config_of(here: str, names: dict[str, str], header: dict[str, Tensor], base: dict, notes: list[str]) -> dict:
    """The transformer's config: depth and guidance of the file, all else of --ckpt's transformer, `base`.

    Raises:
        RecipeError: there are no blocks of a kind, or the pipeline has other input channels.
    """
    blocks = {found.groups() for name in names.values() if (found := re.match(BLOCK, name))}
    double, single = (len({number for kind, number in blocks if kind.startswith("single") == is_single})
                      for is_single in (False, True))
    if not (double and single):
        raise RecipeError(f"{here} has {double} double and {single} single blocks, and FLUX.1 has both"
                          f"{guess(names)}. Give a FLUX.1 transformer.")
    for stored, name in names.items():
        shape = header[stored].shape
        if name in ("img_in.weight", "x_embedder.weight") and len(shape) == 2 and shape[1] != base["in_channels"]:
            raise RecipeError(f"{here} takes {shape[1]} channels{CHANNELS.get(shape[1], '')}, and the pipeline of "
                              f"--ckpt gives {base['in_channels']}. Give a transformer of --ckpt's kind, or the --ckpt "
                              "that this transformer was made from.")
    guidance = any(GUIDANCE.match(name) for name in names.values())
    if guidance != base["guidance_embeds"]:
        notes.append(f"it has {'a' if guidance else 'no'} guidance embedding, unlike --ckpt's transformer: steps, "
                     f"guidance and text length default to {'dev' if guidance else 'schnell'}'s, and the scheduler "
                     "stays --ckpt's")
    return base | {"num_layers": double, "num_single_layers": single, "guidance_embeds": guidance}


def places_of(here: str, names: dict[str, str], header: dict[str, Tensor], shapes: dict[str, tuple[int, ...]]
            ) -> tuple[dict[str, tuple[Rows, ...]], dict[str, str]]:
    """Finds the place of every tensor in the model.

    Args:
        names: from `names_of`.
        shapes: of the model's parameters.

    Returns:
        `tensors` and `scales` of `utils.single_file.SingleFile`.

    Raises:
        RecipeError: a tensor is missing, unknown, given twice, or of another shape or format.
    """
    known = {alias: rows for alias, rows in spellings("transformer", shapes).items() if "processor" not in alias}
    weights = {name: stored for stored, name in names.items() if name.endswith(".weight")}
    tensors, scales, filled, faults = {}, {}, set(), {}
    for stored, name in names.items():
        tensor, (module, _, leaf) = header[stored], name.rpartition(".")
        if IGNORED.fullmatch(name):
            continue
        if leaf in ("scale_weight", "weight_scale"):
            weight = weights.get(f"{module}.weight")
            if weight is None or weight in scales:
                faults.setdefault("scales without a weight of their own", []).append(stored)
            elif tensor.shape not in ((), (1,), (1, 1), (header[weight].shape[0], 1)) or tensor.dtype not in FLOATS:
                faults.setdefault("scales that are neither one a tensor nor one a row", []).append(
                    f"{stored} {tensor.dtype} {list(tensor.shape)}")
            else:
                scales[weight] = stored
            continue
        leaf = "weight" if leaf == "scale" and module.endswith("_norm") else leaf  # RMSNorm's weight has two names
        places = tuple(Rows(f"{row.module}.{leaf}", row.start, row.stop) for row in known.get(module, ()))
        parameters = {place.module for place in places}
        if not places or not parameters <= shapes.keys():
            faults.setdefault("unknown to FLUX.1", []).append(stored)
            continue
        if filled & parameters:
            faults.setdefault("given twice, under two names", []).append(stored)
        filled |= parameters
        tensors[stored] = places
        wanted = (sum(place.stop - place.start for place in places), *shapes[places[0].module][1:])
        if tensor.shape != wanted:
            faults.setdefault("of another shape", []).append(f"{stored} {list(tensor.shape)} instead of {list(wanted)}")
        elif tensor.dtype not in (*FLOATS, *FLOAT8, *gguf_file.TYPES):
            faults.setdefault("in a format that is not read here", []).append(f"{stored} in {tensor.dtype}")
    if missing := [name for name in shapes if name not in filled]:
        faults["missing"] = missing
    if faults:
        found = "; ".join(f"{len(named)} {fault} ({', '.join(named[:3])}{', ...' if len(named) > 3 else ''})"
                          for fault, named in faults.items())
        raise RecipeError(f"{here} does not fit --ckpt's transformer{guess(header)}. Tensors: {found}. Give a whole "
                          "FLUX.1 transformer, and the --ckpt that it was made from.")
    return tensors, scales
