"""Counts parameters, estimates the GPU memory needed, and chooses the device on which weights are loaded."""

import argparse

import torch

from utils.benchmark_utils import images_per_call
from utils.checkpoint import meta_models
from utils.common import RecipeError
from utils.hardware import Hardware
from utils.machine import available_memory
from utils.plan import Check, Plan

GIB = 2**30
SWAP = 4 * GIB  # of a swap of LoRAs (utils/lora_swap.py): one block's weights several times, in float32 as well


def weight_counts(configs: dict) -> dict[str, int]:
    """Returns the parameter count of each component, from the configs.

    "blocks" counts the Linears in the transformer's blocks, which float8 and the fused kernels quantize. "modulation"
    counts the blocks' modulation Linears, which torchao's int8 leaves in bf16.
    """
    modules = meta_models(configs)
    counts = {name: sum(p.numel() for p in module.parameters()) for name, module in modules.items()}
    in_blocks = {name: part.weight.numel() for name, part in modules["transformer"].named_modules()
                 if isinstance(part, torch.nn.Linear) and "transformer_blocks." in name}
    counts["blocks"] = sum(in_blocks.values())
    counts["modulation"] = sum(size for name, size in in_blocks.items() if ".norm" in name)
    return counts


def fit(plan: Plan, args: argparse.Namespace, configs: dict, hardware: Hardware) -> None:
    """Completes `plan` with what depends on free memory: where weights are loaded, and what follows from that.

    Raises:
        RecipeError: the finished recipe does not fit, or a flag needs the unquantized model on the GPU.
    """
    plan.load_device = choose_load_device(args, configs, hardware, plan)
    if plan.load_device == "cpu" and not plan.kept_weights.on:  # kept weights never are in CPU memory as a whole
        check_cpu_memory(configs, plan.dtype)
    if plan.load_device == args.device:
        return
    # Weights that are loaded onto the GPU leave room for 3 GiB more than float8 modulations take.
    plan.fused_kernels.float8_modulations = not bf16_modulations_fit(args, configs, hardware, plan)
    if args.step_error:
        raise RecipeError("--step_error needs the unquantized model on the GPU, and it does not fit there: drop "
                          "--step_error, or measure on a GPU with more memory.")
    if plan.fp8_check.on:
        plan.fp8_check = Check(False, "the unquantized model does not fit on this GPU")


def bf16_modulations_fit(args: argparse.Namespace, configs: dict, hardware: Hardware, plan: Plan) -> bool:
    """Returns whether the GPU has room for the blocks' modulations in bf16, which take 3 GiB more than in float8."""
    _, resident, working = _memory_needed(args, configs, plan)
    more = weight_counts(configs)["modulation"] * (plan.dtype.itemsize - 1)
    return resident + working + more <= hardware.free_bytes


def room_for_copies(args: argparse.Namespace, configs: dict, hardware: Hardware, plan: Plan) -> float:
    """Returns the bytes of GPU memory that LoRAs and the weights under them may take, for swaps. May be negative."""
    _, resident, working = _memory_needed(args, configs, plan)
    if plan.load_device != "cpu":  # the start holds the unquantized weights
        count = weight_counts(configs)
        resident = max(resident, plan.dtype.itemsize * sum(
            count[name] for name in ("transformer", "text_encoder", "text_encoder_2", "vae")))
    return hardware.free_bytes - resident - working - SWAP


def _memory_needed(args: argparse.Namespace, configs: dict, plan: Plan) -> tuple[dict[str, float], float, float]:
    """Estimates the bytes that the finished recipe needs.

    The working set is the memory that an H100 reserved beyond the weights for a 1024x1024 image with CUDA graphs:
    26.6 - 20.4 GiB (results/h100/2026-11/schnell/6_float8.json). The VAE decoder's activations are its largest part.
    With VAE tiling the working set is a guess. A VAE that encodes adds what Kontext reserved more than dev: 25.8 - 24.1
    GiB (results/h100/2026-11/kontext/8_fused.13.json, dev/8_fused.14.json). It encodes one picture at a time.

    Returns:
        The weights of each part, the weights on the GPU at once, and the working set, in bytes.
    """
    count = weight_counts(configs)
    plain = plan.dtype.itemsize
    in_t5 = 1 if plan.text_encoder_quant.on else plain
    quantized = count["blocks"] if plan.quantization.on else 0
    if plan.quantization.on and plan.quantization.dtype == "int8" and not plan.fused_kernels.on:
        quantized -= count["modulation"]
    needs = {
        "transformer": quantized + (count["transformer"] - quantized) * plain,
        "text encoders": count["text_encoder_2"] * in_t5 + count["text_encoder"] * plain,
        "VAE": count["vae"] * plain,
    }
    megapixels = plan.settings.height * plan.settings.width / 2**20
    activations = max(megapixels * images_per_call(args), 0.1) * (1.5 if plan.vae_tiling else 5.2)
    if plan.settings.is_encoded:
        activations += max(megapixels, 0.1) * (0.5 if plan.vae_tiling else 1.7)
    working = activations * GIB * plain / 2 + GIB
    # Two of T5's layers are on the GPU at a time. The largest layer is the embedding, with 0.25 GiB.
    in_turn = needs["transformer"] + needs["VAE"] + count["text_encoder"] * plain + GIB // 2
    at_once = {"none": sum(needs.values()), "text": in_turn, "model": max(needs.values()), "group": 0}
    return needs, at_once[plan.offload.mode], working


def choose_load_device(args: argparse.Namespace, configs: dict, hardware: Hardware, plan: Plan) -> str:
    """Returns the device for the unquantized weights: "cpu" if only the quantized weights fit on the GPU.

    Raises:
        RecipeError: see `check_gpu_memory`.
    """
    if hardware.device == "cpu":
        return "cpu"
    check_gpu_memory(args, configs, hardware, plan)
    if plan.offload.on:
        build_on = "cpu"
    else:
        count, (_, _, working) = weight_counts(configs), _memory_needed(args, configs, plan)
        unquantized = sum(count[name] for name in ("transformer", "text_encoder", "text_encoder_2", "vae"))
        build_on = "cpu" if unquantized * plan.dtype.itemsize + working > hardware.free_bytes else "cuda"
    return build_on


def check_gpu_memory(args: argparse.Namespace, configs: dict, hardware: Hardware, plan: Plan) -> None:
    """Refuses a recipe, or a size of `plan.settings`, that needs more than the GPU's memory.

    Raises:
        RecipeError: the finished recipe does not fit into `hardware.free_bytes`. The message has the sizes and the
            flags that help.
    """
    needs, resident, working = _memory_needed(args, configs, plan)
    if resident + working > hardware.free_bytes:
        parts = ", ".join(f"{name} {size / GIB:.1f}" for name, size in needs.items())
        helps = [flag for flag, given in (("--text_encoder_quant", args.text_encoder_quant),
                                          ("--vae_tiling", args.vae_tiling),
                                          ("--offload text", args.offload != "none" or args.context_parallel),
                                          ("--offload group", args.offload == "group" or args.context_parallel))
                 if not given]
        if args.disable_quant or (args.quality == "exact" and not plan.quantization.on):
            flag = "--disable_quant" if args.disable_quant else "--quality exact"
            helps.insert(0, f"quantization (drop {flag})")
        raise RecipeError(
            f"not enough GPU memory: about {(resident + working) / GIB:.1f} GiB are needed ({parts}, working set "
            f"{working / GIB:.1f}), and {hardware.free_bytes / GIB:.1f} GiB are free on {hardware.name}. Try: "
            f"{', '.join([*helps, 'a smaller --height and --width'])}.")


def check_cpu_memory(configs: dict, dtype: torch.dtype) -> None:
    """Refuses a model whose weights exceed CPU memory, before they are read: the system would kill this process.

    The estimate counts weights only, so that it never refuses a model that might fit.

    Raises:
        RecipeError: the weights do not fit. The message has both sizes and the ways out.
    """
    count = weight_counts(configs)
    parts = {name: count[name] * dtype.itemsize for name in ("transformer", "text_encoder_2", "text_encoder", "vae")}
    needed, available = sum(parts.values()), available_memory()
    if needed > available:
        of_each = ", ".join(f"{name} {size / GIB:.1f}" for name, size in parts.items())
        half = " dropping --disable_bf16 (half the memory)," if dtype == torch.float32 else ""
        raise RecipeError(f"not enough CPU memory: the weights take {needed / GIB:.1f} GiB ({of_each}), and "
                          f"{available / GIB:.1f} GiB are available. Try:{half} a machine with more memory, a GPU that "
                          "holds the model, or --ckpt tiny-flux for a test. Quantization does not help, because it "
                          "comes after loading.")
