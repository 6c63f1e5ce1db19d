"""What fits where: parameter counts, GPU memory needed, and the device that weights are loaded on."""

import argparse

import torch

from utils.benchmark_utils import images_per_call
from utils.checkpoint import meta_models
from utils.common import RecipeError
from utils.machine import available_memory
from utils.plan import Hardware, Plan

GIB = 2**30


def weight_counts(configs: dict) -> dict[str, int]:
    """Parameters of each component; of the Linears in the transformer's blocks ("blocks"), which float8 quantizes; and
    of those among them that int8 leaves alone ("modulation"). Counted from the configs.
    """
    modules = meta_models(configs)
    counts = {name: sum(p.numel() for p in module.parameters()) for name, module in modules.items()}
    in_blocks = {name: part.weight.numel() for name, part in modules["transformer"].named_modules()
                 if isinstance(part, torch.nn.Linear) and "transformer_blocks." in name}
    counts["blocks"] = sum(in_blocks.values())
    counts["modulation"] = sum(size for name, size in in_blocks.items() if ".norm" in name)
    return counts


def bf16_modulations_fit(args: argparse.Namespace, configs: dict, hardware: Hardware, chosen: Plan) -> bool:
    """Whether the GPU has room for the blocks' modulations in bf16, 3 GiB more than in float8."""
    _, resident, working = _memory_needed(args, configs, chosen)
    more = weight_counts(configs)["modulation"] * (chosen.dtype.itemsize - 1)
    return resident + working + more <= hardware.free_bytes


def _memory_needed(args: argparse.Namespace, configs: dict, chosen: Plan) -> tuple[dict[str, float], float, float]:
    """Bytes of the finished recipe: of each part's weights, of the weights on the GPU at once, and beyond them.

    The working set is what an H100 reserved beyond the weights for a 1024x1024 image, CUDA graphs on: 26.6 - 20.4 GiB
    (results/h100/2026-11/schnell/6_float8.json). Its largest part is the VAE decoder's activations; with tiling it is a
    guess.
    """
    count = weight_counts(configs)
    plain = chosen.dtype.itemsize
    in_t5 = 1 if args.text_encoder_quant else plain
    quantized = count["blocks"] if chosen.quant else 0
    if chosen.quant and chosen.quant[0] == "int8":
        quantized -= count["modulation"]
    needs = {
        "transformer": quantized + (count["transformer"] - quantized) * plain,
        "text encoders": count["text_encoder_2"] * in_t5 + count["text_encoder"] * plain,
        "VAE": count["vae"] * plain,
    }
    megapixels = chosen.settings.height * chosen.settings.width / 2**20 * images_per_call(args)
    working = (1.5 if args.vae_tiling else 5.2) * GIB * max(megapixels, 0.1) * plain / 2 + GIB
    # Of T5 two layers at a time are on the GPU; the largest is its embedding, of 0.25 GiB.
    in_turn = needs["transformer"] + needs["VAE"] + count["text_encoder"] * plain + GIB // 2
    resident = {"none": sum(needs.values()), "text": in_turn, "model": max(needs.values()), "group": 0}[args.offload]
    return needs, resident, working


def choose_load_device(args: argparse.Namespace, configs: dict, hardware: Hardware, chosen: Plan) -> str:
    """The device to put unquantized weights on: the CPU if they fit on the GPU only once they are quantized.

    Raises:
        RecipeError: even the finished recipe does not fit into the GPU's free memory; says by how much and what helps.
    """
    if hardware.device == "cpu":
        return "cpu"
    needs, resident, working = _memory_needed(args, configs, chosen)
    if args.offload != "none":
        build_on = "cpu"
    else:
        count = weight_counts(configs)
        unquantized = sum(count[name] for name in ("transformer", "text_encoder", "text_encoder_2", "vae"))
        build_on = "cpu" if unquantized * chosen.dtype.itemsize + working > hardware.free_bytes else "cuda"
    if resident + working > hardware.free_bytes:
        parts = ", ".join(f"{name} {size / GIB:.1f}" for name, size in needs.items())
        helps = [flag for flag, given in (("--text_encoder_quant", args.text_encoder_quant),
                                          ("--vae_tiling", args.vae_tiling),
                                          ("--offload text", args.offload != "none"),
                                          ("--offload group", args.offload == "group")) if not given]
        if args.disable_quant:
            helps.insert(0, "quantization (drop --disable_quant)")
        raise RecipeError(
            f"not enough GPU memory: about {(resident + working) / GIB:.1f} GiB are needed ({parts}, working set "
            f"{working / GIB:.1f}), {hardware.free_bytes / GIB:.1f} GiB are free on {hardware.name}. What helps: "
            f"{', '.join([*helps, 'a smaller --height and --width'])}.")
    return build_on


def check_cpu_memory(configs: dict, dtype: torch.dtype) -> None:
    """Refuses a model whose weights do not fit into CPU memory, before any is read: the system would kill this process.
    Weights alone are counted, so that nothing is refused that might fit.

    Raises:
        RecipeError: with both numbers and what helps.
    """
    count = weight_counts(configs)
    parts = {name: count[name] * dtype.itemsize for name in ("transformer", "text_encoder_2", "text_encoder", "vae")}
    needed, available = sum(parts.values()), available_memory()
    if needed > available:
        of_each = ", ".join(f"{name} {size / GIB:.1f}" for name, size in parts.items())
        half = " without --disable_bf16 half as much," if dtype == torch.float32 else ""
        raise RecipeError(f"not enough CPU memory: the weights take {needed / GIB:.1f} GiB ({of_each}), and "
                          f"{available / GIB:.1f} GiB are available. What helps:{half} a machine with more memory, a "
                          "GPU that holds the model, --ckpt tiny-flux to try things out. Quantization does not help, "
                          "since it comes after loading.")
