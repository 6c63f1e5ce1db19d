"""Decides which techniques are on, before any weights load: from the flags, the checkpoint's configs and the hardware.

Each technique has one line: on and how, or off and why. A technique that a flag asks for and that cannot run is an
error with its cure. A technique that is on by default is switched off where it cannot run, unless --strict.
"""

import argparse
from dataclasses import dataclass, field
from importlib.util import find_spec
from typing import NamedTuple

import torch
from diffusers import FluxTransformer2DModel
from diffusers import attention_backend as diffusers_backend
from diffusers.models.attention_dispatch import AttentionBackendName

from utils import attention, context_parallel, machine
from utils.benchmark_utils import offloads_transformer, packages_asked_for, t5_on_gpu, unpackaged_by_flag
from utils.cache import dbcache
from utils.cache.taylorseer import TaylorSeer
from utils.checkpoint import ImageSettings, image_settings
from utils.common import RecipeError

OFFLOADS = {"none": "--offload not given", "text": "T5, layer by layer", "model": "one model at a time on the GPU",
            "group": "every layer by itself"}
ORDER = ("bf16", "fused projections", "channels_last", "fused VAE", "attention", "quantization", "fused kernels",
         "text encoder quant", "offload", "compile", "inductor flags", "step cache", "context parallel", "CUDA graphs",
         "GPU postprocess")  # of the recipe, and of the README's table
CPU_BACKENDS = ("native", "_native_math", "_native_flash", "flex")  # of diffusers' dispatcher, tried on torch 2.13


class Decision(NamedTuple):
    on: bool
    how: str  # how it is on, or why it is off


@dataclass(frozen=True)
class Hardware:
    """The machine that the decisions depend on, from `detect` or described by a test."""
    device: str
    capability: tuple[int, int] = (0, 0)
    is_rocm: bool = False
    name: str = "CPU"
    free_bytes: int = 0

    @property
    def has_float8(self) -> bool:
        if self.device != "cuda":
            return False
        return "MI3" in self.name if self.is_rocm else self.capability >= (8, 9)


@dataclass
class Plan:
    """The recipe's choices for `optimize`; `decisions` says them to people."""
    settings: ImageSettings
    dtype: torch.dtype
    attention_backend: str = "native"
    quant: tuple[str, str] | None = None  # (float8 | int8, row | tensor)
    cache: dbcache.CacheOptions | None = None
    extrapolation: TaylorSeer | None = None
    context_parallel: str | None = None  # ulysses | ring
    compile_mode: str = "disabled"  # export_aoti | compile | disabled
    float8_modulations: bool = False  # of the fused blocks: where bf16's 3 GiB more do not fit
    decisions: dict[str, Decision] = field(default_factory=dict)

    def is_on(self, name: str) -> bool:
        return self.decisions[name].on


def detect(device: str, memory_limit_gib: float | None = None) -> Hardware:
    """The machine's `Hardware`; `memory_limit_gib` caps what counts as free."""
    if device == "cpu":
        return Hardware("cpu")
    free, _ = torch.cuda.mem_get_info()
    if memory_limit_gib:
        free = min(free, int(memory_limit_gib * 2**30))
    return Hardware("cuda", torch.cuda.get_device_capability(), torch.version.hip is not None,
                    torch.cuda.get_device_name(), free)


def make_plan(args: argparse.Namespace, configs: dict, hardware: Hardware) -> Plan:
    """Every choice of the recipe, made from arguments alone.

    Raises:
        RecipeError: a wish that this checkpoint or this machine cannot fulfil, or, with --strict, a default.
    """
    settings = image_settings(args, configs)
    model = settings.model
    if model.needs_image and not args.image:
        raise RecipeError(f"{args.ckpt} edits an image: give one with --image PATH_OR_URL.")
    if args.guidance_scale is not None and not configs["transformer"]["guidance_embeds"]:
        raise RecipeError(f"--guidance_scale {args.guidance_scale}: {args.ckpt} has no guidance embedding (schnell is "
                          "distilled without one): drop it, or use --negative_prompt with --true_cfg_scale.")
    if args.image and not model.needs_image:
        raise RecipeError(f"--image is for Kontext; {args.ckpt} draws from text alone. Drop it, or use "
                          "--ckpt black-forest-labs/FLUX.1-Kontext-dev (or tiny-kontext).")
    chosen = Plan(settings, torch.float32 if args.disable_bf16 else torch.bfloat16)
    on = chosen.decisions

    def default_on(name: str, disabled: bool, flag: str, obstacle: str | None, how: str) -> bool:
        if obstacle and not disabled and args.strict:
            raise RecipeError(f"--strict: {name} is on by default but cannot run here: {obstacle}. "
                              f"Switch it off with {flag}, or drop --strict.")
        on[name] = Decision(not disabled and not obstacle, flag if disabled else obstacle or how)
        return on[name].on

    old_gpu = hardware.device == "cuda" and not hardware.is_rocm and hardware.capability < (8, 0)
    if not default_on("bf16", args.disable_bf16, "--disable_bf16",
                      f"{hardware.name} has no bf16 units" if old_gpu else None, "weights and activations"):
        chosen.dtype = torch.float32
    default_on("fused projections", args.disable_fused_projections, "--disable_fused_projections", None,
               "one GEMM for q, k, v; the separate copies freed")
    default_on("channels_last", args.disable_channels_last, "--disable_channels_last", None, "VAE")

    unwanted = "not with --disable_channels_last" if args.disable_channels_last else "--disable_fused_vae"
    obstacle = ("no GPU" if hardware.device == "cpu" else "not tried on ROCm" if hardware.is_rocm else
                None if find_spec("triton") else "Triton is not installed")
    default_on("fused VAE", args.disable_fused_vae or args.disable_channels_last, unwanted, obstacle,
               "GroupNorm with SiLU; attention as two products")

    _choose_attention(args, hardware, chosen, default_on, configs)
    unwanted = "--disable_fused_kernels" if args.disable_fused_kernels else _unfused_by_choice(args)
    fused = default_on("fused kernels", bool(unwanted), unwanted or "--disable_fused_kernels",
                       _fusion_obstacle(hardware, chosen, configs),
                       "LayerNorm, modulation, QK-norm, RoPE, GELU and casts to e4m3; the modulations of all steps")
    _choose_compile_mode(args, hardware, chosen, default_on, fused)
    compiles = chosen.compile_mode != "disabled"
    _choose_quant(args, hardware, chosen, default_on, compiles)
    if fused:
        on["quantization"] = Decision(True, "float8, per-row scales")
    on["text encoder quant"] = Decision(args.text_encoder_quant, "T5 int8, weights only" if args.text_encoder_quant
                                        else "--text_encoder_quant not given")
    _choose_cache(args, configs, chosen)
    unwanted = ("--disable_inductor_tuning_flags" if args.disable_inductor_tuning_flags else
                "the blocks are Triton kernels" if fused else None)
    default_on("inductor flags", bool(unwanted), unwanted or "--disable_inductor_tuning_flags",
               "no GPU" if hardware.device == "cpu" else None if compiles else "nothing is compiled",
               "coordinate descent, no epilogue fusion in the blocks")
    if args.context_parallel:
        chosen.context_parallel = context_parallel.choose(args.context_parallel, configs["transformer"],
                                                  chosen.attention_backend)
    on["context parallel"] = Decision(bool(args.context_parallel),
                                      f"{chosen.context_parallel}, {context_parallel.world_size()} processes"
                                      if args.context_parallel else "--context_parallel not given")
    obstacle = ("no GPU" if hardware.device == "cpu" else
                f"--offload {args.offload} moves weights" if offloads_transformer(args) else None)
    default_on("CUDA graphs", args.disable_cudagraphs, "--disable_cudagraphs", obstacle,
               ("text encoders" if t5_on_gpu(args) else "CLIP") + ", VAE decoder, step" + (
                   f" in {5 if chosen.cache.Bn_compute_blocks else 4} segments, between which the cache decides"
                   if chosen.cache else ""))
    default_on("GPU postprocess", args.disable_gpu_postprocess, "--disable_gpu_postprocess",
               "no GPU" if hardware.device == "cpu" else None, "8-bit pixels made on the GPU")
    on["offload"] = Decision(args.offload != "none", OFFLOADS[args.offload])
    chosen.decisions = {name: on[name] for name in ORDER}
    return chosen


def _choose_compile_mode(args, hardware: Hardware, chosen: Plan, default_on, fused: bool) -> None:
    """Exported packages, or torch.compile where something stands against them and no flag asks for them."""
    asked, by_flag = packages_asked_for(args), " ".join(unpackaged_by_flag(args) or ())
    on_gpu, prebuilt = hardware.device == "cuda", args.use_cached_model or args.package_from
    no_compiler = None if prebuilt else _compiler_obstacle(hardware) or machine.code_obstacle(args.cache_dir)
    mode, instead = args.compile_export_mode or "export_aoti", ""
    if mode == "export_aoti":
        # flux-fast found that torch.export does not work on AMD.
        of_machine = ("torch.export does not work on AMD" if hardware.is_rocm else
                      machine.package_obstacle() or
                      (None if prebuilt else no_compiler or machine.libstdcxx_obstacle()))
        if asked and (by_flag or of_machine):
            raise RecipeError(f"{asked}: {by_flag or of_machine}. Without the flag, torch.compile compiles the blocks "
                              "where it can.")
        untested = ("packages without the fused kernels are untested on GPUs" if on_gpu and not fused else
                    "packages with an int8 T5 are untested on GPUs" if on_gpu and args.text_encoder_quant else None)
        # Without a compiler nothing is compiled, which --strict refuses below.
        if args.strict and of_machine and not (asked or by_flag or no_compiler or hardware.is_rocm or untested):
            raise RecipeError(f"--strict: exported packages are on by default but cannot be made here: {of_machine}. "
                              "Use --compile_export_mode compile, or drop --strict.")
        if not asked:
            forced = untested and f"{untested}; --compile_export_mode export_aoti forces them"
            # Tiles come in several sizes, so packages would leave the VAE uncompiled.
            instead = by_flag or of_machine or ("--vae_tiling" if args.vae_tiling else forced) or ""
        mode = "compile" if instead else mode
    if mode == "compile":
        no_compiler = no_compiler or machine.header_obstacle()
        if args.compile_export_mode and no_compiler:
            raise RecipeError(f"--compile_export_mode compile: {no_compiler}. Without the flag nothing is compiled.")
    units = [*([] if fused else [args.compile_scope]), "VAE", *(["T5"] if on_gpu and t5_on_gpu(args) else [])]
    how = ", ".join(units)
    if mode == "compile":
        how += " by torch.compile" + (f" ({instead})" if instead else "")
    if default_on("compile", mode == "disabled", "--compile_export_mode disabled",
                  "--offload group hooks into every layer" if args.offload == "group" else no_compiler, how):
        chosen.compile_mode = mode


def _compiler_obstacle(hardware: Hardware) -> str | None:
    if hardware.device == "cuda":
        try:
            import triton  # noqa: F401
        except ImportError:
            return "Triton is not installed"
        if obstacle := machine.header_obstacle():  # Triton's launchers include it, packaged or not
            return obstacle
    return None if machine.cpp_compiler() else "no C++ compiler (Debian, Ubuntu: apt install g++)"


def _choose_attention(args, hardware: Hardware, chosen: Plan, default_on, configs: dict) -> None:
    wanted = args.attention_backend
    known = [*attention.BACKENDS, *(name.value for name in AttentionBackendName)]
    if wanted and wanted not in known:
        raise RecipeError(f"--attention_backend {wanted}: unknown. Choose from {', '.join(known)}.")
    if wanted and wanted not in attention.BACKENDS:
        if hardware.device == "cpu" and wanted not in CPU_BACKENDS:
            raise RecipeError(f"--attention_backend {wanted} needs a GPU. On a CPU: {', '.join(CPU_BACKENDS)}.")
        try:
            # diffusers checks for the package when a backend is set: try it on a model that costs nothing. Setting
            # one also changes a default of the whole process; the context puts it back.
            with torch.device("meta"), diffusers_backend("native"):
                FluxTransformer2DModel(num_layers=1, num_single_layers=1).set_attention_backend(wanted)
        except (RuntimeError, ImportError, ValueError) as error:
            raise RecipeError(f"--attention_backend {wanted}: {error}") from error
        chosen.attention_backend = wanted
        chosen.decisions["attention"] = Decision(True, f"{wanted} (diffusers' dispatcher)")
        return

    backend = wanted or ("aiter" if hardware.is_rocm else "fa3")
    library, precision = attention.BACKENDS[backend]
    function, found = attention.find_library(library) if hardware.device == "cuda" else (None, "")
    if hardware.device == "cpu":
        obstacle = f"no GPU ({backend} is a GPU library)"
    elif library == "fa3" and (hardware.is_rocm or hardware.capability[0] != 9):
        obstacle = f"FlashAttention-3 is written for Hopper (sm_90), this is {hardware.name}"
    elif library == "aiter" and not hardware.is_rocm:
        obstacle = f"AITER is for AMD GPUs, this is {hardware.name}"
    elif function is None:
        obstacle = found
    elif configs["transformer"]["attention_head_dim"] not in (64, 128, 256):
        obstacle = f"head dimension {configs['transformer']['attention_head_dim']} is not 64, 128 or 256"
    else:
        obstacle = None
    if wanted and obstacle:
        raise RecipeError(f"--attention_backend {wanted}: {obstacle}. Use --attention_backend native.")
    how = {"fp8": "fp8, scaled", "fp8_unscaled": "fp8, unscaled", "bf16": "bf16"}[precision]
    if library == "aiter":
        how = "fp8, quantized by AITER"
    if default_on("attention", args.disable_fa3 and not wanted, "SDPA (--disable_fa3)",
                  f"SDPA: {obstacle}" if obstacle else None, f"{backend} ({how}) from {found}"):
        chosen.attention_backend = backend
        attention.register_library(library, function)


def _choose_quant(args, hardware: Hardware, chosen: Plan, default_on, compiles: bool) -> None:
    kind = args.quant_dtype
    if kind == "float8" and not hardware.has_float8:
        raise RecipeError(f"--quant_dtype float8 needs an NVIDIA GPU of compute capability 8.9 or more, or an MI300; "
                          f"this is {hardware.name}. Use --quant_dtype int8 or --disable_quant.")
    if kind == "auto":
        kind = "float8" if hardware.has_float8 else "int8"
    if kind == "int8" and args.quant_granularity == "tensor":
        raise RecipeError(f"--quant_granularity tensor is for float8, and {hardware.name} quantizes to int8, which "
                          "goes per row: drop the flag.")
    granularity = args.quant_granularity or ("row" if kind == "int8" or chosen.dtype == torch.bfloat16 else "tensor")
    obstacle = None
    if kind == "int8" and not compiles:
        obstacle = "int8 pays only when compiled"
        if args.offload == "group":
            obstacle += ", which --offload group rules out (--offload text does not)"
    if obstacle and (args.quant_dtype != "auto" or args.quant_granularity):
        raise RecipeError(f"--quant_dtype and --quant_granularity have no effect here: {obstacle}.")
    if default_on("quantization", args.disable_quant, "--disable_quant", obstacle,
                  f"{kind}, dynamic per-{granularity} scales"):
        chosen.quant = (kind, granularity)


def _unfused_by_choice(args) -> str | None:
    """The flag that takes away what the fused kernels are made for."""
    given = {"--disable_quant": args.disable_quant, "--quant_dtype int8": args.quant_dtype == "int8",
             f"--quant_granularity {args.quant_granularity}": args.quant_granularity,
             "--disable_fa3": args.disable_fa3,
             f"--attention_backend {args.attention_backend}": args.attention_backend not in (None, "fa3"),
             "--disable_bf16": args.disable_bf16, "--disable_fused_projections": args.disable_fused_projections,
             f"--offload {args.offload}": offloads_transformer(args),
             "--compile_scope whole": args.compile_scope == "whole"}
    return next((f"not with {flag}" for flag, is_given in given.items() if is_given), None)


def _fusion_obstacle(hardware: Hardware, chosen: Plan, configs: dict) -> str | None:
    """Why the blocks cannot run on the fused kernels here."""
    if hardware.device == "cpu":
        return "no GPU"
    if hardware.is_rocm or hardware.capability[0] != 9:
        return f"written for Hopper (sm_90), this is {hardware.name}"
    if chosen.attention_backend != "fa3":
        return "they need FlashAttention-3"
    if configs["transformer"]["attention_head_dim"] not in (64, 128):
        return f"head dimension {configs['transformer']['attention_head_dim']} is not 64 or 128"
    return None if find_spec("triton") else "Triton is not installed"


def _choose_cache(args, configs: dict, chosen: Plan) -> None:
    name, steps = args.step_cache, chosen.settings.num_inference_steps
    if name is None:
        chosen.decisions["step cache"] = Decision(False, "no --step_cache given")
        return
    if name == "taylorseer":
        given = {"interval": args.taylorseer_interval, "order": args.taylorseer_order}
        chosen.extrapolation = TaylorSeer(**{name: value for name, value in given.items() if value is not None})
        chosen.extrapolation.check(steps)
        mask = chosen.extrapolation.mask(steps)
        chosen.decisions["step cache"] = Decision(
            True, f"TaylorSeer over whole steps, order {chosen.extrapolation.order}, {mask.count('1')} of {steps} "
            f"computed: {mask}")
        return
    if find_spec("cache_dit") is None:
        raise RecipeError("the step cache needs cache-dit: pip install cache-dit==1.5.3")
    blocks = configs["transformer"]["num_layers"] + configs["transformer"]["num_single_layers"]
    preset, of_large = "", None
    if name in dbcache.PRESETS:
        options, of_large = dbcache.preset(name, steps, blocks), dbcache.PRESETS[name]
        preset = f"{name}, at least {dbcache.computed_share(options, blocks):.0%} computed: "
    elif name == "f12b12":
        options, of_large = dbcache.scaled(dbcache.DEFAULT, blocks), dbcache.DEFAULT
    else:
        options = dbcache.from_yaml(name)
    dbcache.check(options, steps, blocks)
    chosen.cache = dbcache.forced(options, steps) if args.force_cache else options
    counts = of_large and (of_large.Fn_compute_blocks, of_large.Bn_compute_blocks)
    small = counts and counts != (options.Fn_compute_blocks, options.Bn_compute_blocks)
    chosen.decisions["step cache"] = Decision(True, f"{preset}{chosen.cache}" + (
        " (F{}B{} in proportion to {} blocks)".format(*counts, blocks) if small else ""))
