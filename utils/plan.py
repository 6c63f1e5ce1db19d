"""Decides which techniques are on, before any weights load: from the flags, the checkpoint's configs and the hardware.

`make_plan` depends on its arguments alone (and on a --step_cache FILE), and changes nothing. A technique that a flag
asks for and that cannot run is an error with its cure. A technique that is on by default is switched off where it
cannot run, unless --strict. `describe` renders each decision as the line that people read; no code reads the line.

To add a technique: its flag goes into utils/benchmark_utils.py, its row into `TECHNIQUES` and `Plan`, its decision into
`make_plan` and its line into `_parameters`. What it needs of the machine goes into utils/hardware.py, its step into
`optimize` (utils/pipeline_utils.py), its row into the README's table and into experiments.py. A technique that changes
the exported graph belongs to `graph_switches`, a lossy one to `lossy` and to `CURES` of utils/fp8_check.py.
"""

import argparse
from dataclasses import asdict, dataclass, fields, replace

import torch

from utils import attention, context_parallel, tasks, tiny_presets
from utils.benchmark_utils import (
    images_per_call,
    offloads_transformer,
    packages_asked_for,
    t5_on_gpu,
    taylorseer_options,
    unpackaged_by_flag,
)
from utils.cache import dbcache
from utils.cache.dbcache import CacheOptions
from utils.cache.taylorseer import TaylorSeer
from utils.checkpoint import ImageSettings, image_settings, most_text_tokens
from utils.common import RecipeError
from utils.hardware import CPU_BACKENDS, DISPATCHER, Hardware

# {dtype of the quantization: attention backend} on the fused kernels.
FUSED_ATTENTION = {"float8": "fa3", "int8": "fa3_bf16"}


@dataclass
class Technique:
    """A decision about one technique.

    Attributes:
        on: whether `optimize` applies the technique.
        why: why it is off; "" if it is on.
        note: a detail for `describe`, often from applying the technique, such as the number of replaced layers.
    """
    on: bool = True
    why: str = ""
    note: str = ""


@dataclass
class Attention(Technique):
    backend: str = "native"  # a key of attention.BACKENDS, or a name of diffusers' dispatcher
    source: str = ""  # the module in which the library was found

    @property
    def library(self) -> str | None:
        """"fa3" or "aiter"; None for diffusers' dispatcher."""
        return attention.BACKENDS[self.backend][0] if self.backend in attention.BACKENDS else None

    @property
    def precision(self) -> str:
        """"fp8" (scaled), "fp8_unscaled" or "bf16"."""
        if self.backend == "aiter":
            return "fp8"  # AITER quantizes its inputs itself
        return attention.BACKENDS[self.backend][1] if self.backend in attention.BACKENDS else "bf16"


@dataclass
class Quantization(Technique):
    dtype: str = "float8"  # float8 | int8
    granularity: str = "row"  # row | tensor: what shares a scale


@dataclass
class FusedKernels(Technique):
    float8_modulations: bool = False  # where bf16's 3 GiB more do not fit


@dataclass
class KeptWeights(Technique):
    loaded: bool = False  # this start read the quantized weights of an earlier one


@dataclass
class Offload(Technique):
    mode: str = "none"  # none | text | model | group


@dataclass
class Compile(Technique):
    mode: str = "disabled"  # export_aoti (AOTInductor packages) | compile (torch.compile) | disabled
    scope: str = "blocks"  # of the transformer: blocks | whole | none, for blocks that are Triton kernels
    with_vae: bool = True
    with_t5: bool = False
    no_packages: str = ""  # why torch.compile takes the place of packages


@dataclass
class StepCache(Technique):
    name: str = ""
    dbcache: CacheOptions | None = None
    taylorseer: TaylorSeer | None = None
    mask: str = ""  # of taylorseer: 1 for each computed step
    separate_cfg: bool = False  # two calls of the transformer a step, each with a cache of its own


@dataclass
class ContextParallel(Technique):
    kind: str = ""  # ulysses | ring
    processes: int = 1
    peer_memory: bool = False  # fused blocks exchange q, k and v through symmetric memory


@dataclass
class CUDAGraphs(Technique):
    with_t5: bool = False
    segments: int = 1  # of the step; a step cache decides between segments


@dataclass
class Check(Technique):
    difference: float | None = None  # of a step from the unquantized model's, relative; None before the check


# {field of `Plan`: (name for people, the flag that switches the technique off)}, in the order of the recipe and of the
# README's table. Techniques without such a flag are off by default.
TECHNIQUES = {
    "bf16": ("bf16", "--disable_bf16"),
    "fused_projections": ("fused projections", "--disable_fused_projections"),
    "channels_last": ("channels_last", "--disable_channels_last"),
    "fused_vae": ("fused VAE", "--disable_fused_vae"),
    "attention": ("attention", "--disable_fa3"),
    "quantization": ("quantization", "--disable_quant"),
    "fused_kernels": ("fused kernels", "--disable_fused_kernels"),
    "kept_weights": ("kept weights", None),
    "text_encoder_quant": ("text encoder quant", None),
    "offload": ("offload", None),
    "compile": ("compile", "--compile_export_mode disabled"),
    "inductor_flags": ("inductor flags", "--disable_inductor_tuning_flags"),
    "step_cache": ("step cache", None),
    "context_parallel": ("context parallel", None),
    "cuda_graphs": ("CUDA graphs", "--disable_cudagraphs"),
    "gpu_postprocess": ("GPU postprocess", "--disable_gpu_postprocess"),
    "fp8_check": ("fp8 check", "--skip_fp8_check"),
}


@dataclass
class Plan:
    """All decisions for `optimize`. Each field of `TECHNIQUES` is a `Technique`."""
    settings: ImageSettings
    vae_tiling: bool
    bf16: Technique
    fused_projections: Technique
    channels_last: Technique
    fused_vae: Technique
    attention: Attention
    quantization: Quantization
    fused_kernels: FusedKernels
    kept_weights: KeptWeights
    text_encoder_quant: Technique
    offload: Offload
    compile: Compile
    inductor_flags: Technique
    step_cache: StepCache
    context_parallel: ContextParallel
    cuda_graphs: CUDAGraphs
    gpu_postprocess: Technique
    fp8_check: Check
    load_device: str = "cpu"  # where the unquantized weights are loaded, from `utils.memory.fit`

    @property
    def dtype(self) -> torch.dtype:
        """Of the weights and the activations before quantization."""
        return torch.bfloat16 if self.bf16.on else torch.float32

    @property
    def compiles_vae_once(self) -> bool:
        """Whether the VAE runs uncompiled at sizes other than the start's; see `utils.compilation.CompiledOnce`."""
        made_once = self.compile.mode == "export_aoti" or (self.fused_vae.on and not self.vae_tiling)
        return self.compile.on and self.compile.with_vae and made_once

    def techniques(self) -> dict[str, Technique]:
        """{name for people: technique}, in the order of the recipe."""
        return {name: getattr(self, attribute) for attribute, (name, _) in TECHNIQUES.items()}

    def parameters(self) -> dict[str, dict]:
        """{name: parameters} of the techniques that are on, for the metadata of an image."""
        common = {each.name for each in fields(Technique)}
        return {name: {key: value for key, value in asdict(technique).items() if key not in common}
                for name, technique in self.techniques().items() if technique.on}

    def graph_switches(self) -> dict:
        """What changes the exported graph of a block, the VAE or T5, as JSON values: a part of a package's key."""
        quantized = self.quantization
        return {"dtype": str(self.dtype), "attention": self.attention.backend,
                "quantization": [quantized.dtype, quantized.granularity] if quantized.on else None} | {
            TECHNIQUES[attribute][0]: getattr(self, attribute).on for attribute in (
                "fused_projections", "channels_last", "fused_vae", "fused_kernels", "text_encoder_quant",
                "inductor_flags")}

    def lossy(self) -> set[str]:
        """The lossy techniques for which `utils.fp8_check.CURES` has a flag, as its keys."""
        fp8_attention = self.attention.on and self.attention.precision != "bf16"
        float8 = self.quantization.on and self.quantization.dtype == "float8"
        # torchao's int8 is refused uncompiled.
        on = {"fp8": float8 or fp8_attention, "fused": self.fused_kernels.on and (float8 or self.compile.on),
              "fp8 attention": fp8_attention and self.attention.library == "fa3"}
        return {name for name, is_on in on.items() if is_on}


# --- decisions ---

def make_plan(args: argparse.Namespace, configs: dict, hardware: Hardware) -> Plan:
    """Every choice of the recipe, made from arguments alone.

    Args:
        configs: from `utils.checkpoint.read_configs`.
        hardware: from `utils.hardware.detect`.

    Raises:
        RecipeError: a wish that this checkpoint or this machine cannot fulfil, or, with --strict, a default.
    """
    settings = _settings(args, configs)
    no_gpu = "no GPU" if hardware.device == "cpu" else None

    def default(attribute: str, technique: Technique, obstacle: str | None = None, against: str | None = None):
        """`technique`, off if its own flag or another (`against`) is against it, or, without --strict, an obstacle."""
        name, flag = TECHNIQUES[attribute]
        against = flag if _is_given(args, flag) else against
        if obstacle and not against and args.strict:
            raise RecipeError(f"--strict: {name} is on by default but cannot run here: {obstacle}. "
                              f"Switch it off with {flag}, or drop --strict.")
        off = against or obstacle
        return replace(technique, on=False, why=off) if off else technique

    def on_request(technique: Technique, asked, flag: str) -> Technique:
        return technique if asked else replace(technique, on=False, why=f"{flag} not given")

    old_gpu = hardware.device == "cuda" and not hardware.is_rocm and hardware.capability < (8, 0)
    bf16 = default("bf16", Technique(note="weights and activations"),
                   f"{hardware.name} has no bf16 units" if old_gpu else None)
    fused_vae = default("fused_vae", Technique(note="GroupNorm with SiLU; attention as two products"),
                        no_gpu or ("not tried on ROCm" if hardware.is_rocm else hardware.missing.get("triton")),
                        "not with --disable_channels_last" if args.disable_channels_last else None)
    dtype = _quant_dtype(args, hardware)
    attends = _attention(args, hardware, dtype)
    only_fp8 = attends.library == "aiter" and args.quality != "fast" and not args.attention_backend
    attends = default("attention", attends, _attention_obstacle(args, hardware, configs, attends),
                      f"--quality {args.quality}" if only_fp8 else None)
    if not attends.on:
        attends.backend = "native"  # PyTorch's SDPA
    fused = default("fused_kernels", FusedKernels(
        note=f"LayerNorm, modulation, QK-norm, RoPE, GELU and casts to {'int8' if dtype == 'int8' else 'e4m3'}; the "
        "modulations of all steps"),
        _fusion_obstacle(hardware, attends, configs), _flag_against_fusion(args, dtype))
    compiles = _compile(args, hardware, fused.on, default)
    quantized = _quantization(args, hardware, dtype, bf16.on, fused.on, compiles, default)
    cache = _step_cache(args, configs, settings, hardware.missing.get("cache-dit"))
    parallel = ContextParallel(processes=hardware.processes)
    if args.context_parallel:
        parallel.kind = context_parallel.choose(args.context_parallel, configs["transformer"], attends.backend,
                                                hardware.processes)
    segments = (5 if cache.dbcache.Bn_compute_blocks else 4) if cache.dbcache else 1
    graphs = default("cuda_graphs", CUDAGraphs(with_t5=t5_on_gpu(args), segments=segments), no_gpu,
                     f"--offload {args.offload} moves weights" if offloads_transformer(args) else None)
    return Plan(
        settings=settings,
        vae_tiling=args.vae_tiling,
        bf16=bf16,
        fused_projections=default("fused_projections",
                                  Technique(note="one GEMM for q, k, v; the separate copies freed")),
        channels_last=default("channels_last", Technique(note="VAE")),
        fused_vae=fused_vae,
        attention=attends,
        quantization=quantized,
        fused_kernels=fused,
        kept_weights=_kept_weights(args, fused.on),
        text_encoder_quant=on_request(Technique(note="T5 int8, weights only"), args.text_encoder_quant,
                                      "--text_encoder_quant"),
        offload=on_request(Offload(mode=args.offload), args.offload != "none", "--offload"),
        compile=compiles,
        inductor_flags=default(
            "inductor_flags", Technique(note="coordinate descent, no epilogue fusion in the blocks"), no_gpu,
            None if compiles.on and not fused.on else
            "the blocks are Triton kernels" if fused.on else "nothing is compiled"),
        step_cache=cache,
        context_parallel=on_request(parallel, args.context_parallel, "--context_parallel"),
        cuda_graphs=graphs,
        gpu_postprocess=default("gpu_postprocess", Technique(note="8-bit pixels made on the GPU"), no_gpu),
        fp8_check=_fp8_check(args, hardware, attends, quantized, cache, compiles.on or graphs.on))


def step_cache_of_line(args: argparse.Namespace, configs: dict) -> StepCache:
    """The only technique that a line of --prompts-file changes: its number of steps decides the step cache's mask.

    Args:
        args: the command line with the line's settings.
        configs: from `utils.checkpoint.read_configs`.

    Raises:
        RecipeError: the checkpoint or the step cache does not take the settings.
    """
    return _step_cache(args, configs, _settings(args, configs))


def _is_given(args, flag: str) -> bool:
    """Whether a flag without a value (--disable_fa3), or with this value (--compile_export_mode disabled), is given."""
    name, _, value = flag.removeprefix("--").partition(" ")
    return str(getattr(args, name)) == (value or "True")


def _settings(args, configs: dict) -> ImageSettings:
    settings = image_settings(args, configs)
    tasks.check(settings.task, settings.model.tasks, args)
    if args.guidance_scale is not None and not configs["transformer"]["guidance_embeds"]:
        raise RecipeError(f"--guidance_scale {args.guidance_scale}: {args.ckpt} has no guidance embedding (schnell is "
                          "distilled without one): drop it, or use --negative_prompt with --true_cfg_scale.")
    if settings.max_sequence_length > most_text_tokens(configs):
        raise RecipeError(f"--max_sequence_length {args.max_sequence_length}: {args.ckpt} was trained with "
                          f"{most_text_tokens(configs)} text tokens. Give that many or fewer.")
    return settings


def _quant_dtype(args, hardware: Hardware) -> str | None:
    """"float8", "int8", or None if the flags leave quantization out. --quality decides what no other flag does."""
    if args.disable_quant or (args.quality == "exact" and args.quant_dtype == "auto" and not args.quant_granularity):
        return None
    if args.quant_dtype != "auto":
        return args.quant_dtype
    # int8 has no per-tensor scales.
    in_int8 = args.quality == "high" and args.quant_granularity != "tensor"
    return "float8" if hardware.has_float8 and not in_int8 else "int8"


def _attention(args, hardware: Hardware, dtype: str | None) -> Attention:
    wanted, known = args.attention_backend, [*attention.BACKENDS, *DISPATCHER]
    if wanted and wanted not in known:
        raise RecipeError(f"--attention_backend {wanted}: unknown. Choose from {', '.join(known)}.")
    # Who asks for int8 where float8 runs asks for accuracy.
    in_fp8 = args.quality == "fast" and dtype != "int8"
    return Attention(backend=wanted or ("aiter" if hardware.is_rocm else "fa3" if in_fp8 else "fa3_bf16"),
                     source=hardware.attention_source)


def _attention_obstacle(args, hardware: Hardware, configs: dict, chosen: Attention) -> str | None:
    """Why the chosen attention cannot run here. A backend that a flag names is refused."""
    wanted = args.attention_backend
    head_dim, missing = configs["transformer"]["attention_head_dim"], hardware.missing.get("attention")
    if chosen.library is None:
        if hardware.device == "cpu" and chosen.backend not in CPU_BACKENDS:
            raise RecipeError(f"--attention_backend {wanted} needs a GPU. On a CPU: {', '.join(CPU_BACKENDS)}.")
        if missing:
            raise RecipeError(f"--attention_backend {wanted}: {missing}")
        return None
    obstacle = (f"no GPU ({chosen.library} is a GPU library)" if hardware.device == "cpu" else
                f"FlashAttention-3 is written for Hopper (sm_90), this is {hardware.name}"
                if chosen.library == "fa3" and not hardware.is_hopper else
                f"AITER is for AMD GPUs, this is {hardware.name}"
                if chosen.library == "aiter" and not hardware.is_rocm else
                missing or (None if head_dim in (64, 128, 256) else
                            f"head dimension {head_dim} is not 64, 128 or 256"))
    if wanted and obstacle:
        raise RecipeError(f"--attention_backend {wanted}: {obstacle}. Use --attention_backend native.")
    return obstacle


def _flag_against_fusion(args, dtype: str | None) -> str | None:
    """The flag that takes away what the fused kernels are made for."""
    backend = args.attention_backend
    given = {"--disable_quant": args.disable_quant,
             f"--quant_granularity {args.quant_granularity}": args.quant_granularity,
             "--disable_fa3": args.disable_fa3,
             f"--quality {args.quality}": args.quality != "fast" and (
                 dtype is None or (dtype == "float8" and not backend)),  # float8 with attention in bf16
             f"--attention_backend {backend}": backend and backend != FUSED_ATTENTION.get(dtype),
             "--disable_bf16": args.disable_bf16, "--disable_fused_projections": args.disable_fused_projections,
             f"--offload {args.offload}": offloads_transformer(args),
             "--compile_scope whole": args.compile_scope == "whole"}
    return next((f"not with {flag}" for flag, is_given in given.items() if is_given), None)


def _fusion_obstacle(hardware: Hardware, attends: Attention, configs: dict) -> str | None:
    """Why the blocks cannot run on the fused kernels here."""
    head_dim = configs["transformer"]["attention_head_dim"]
    return ("no GPU" if hardware.device == "cpu" else
            f"written for Hopper (sm_90), this is {hardware.name}" if not hardware.is_hopper else
            "they need FlashAttention-3" if attends.library != "fa3" else
            f"head dimension {head_dim} is not 64 or 128" if head_dim not in (64, 128) else
            hardware.missing.get("triton"))


def _compile(args, hardware: Hardware, fused: bool, default) -> Compile:
    """Exported packages, or torch.compile where something stands against them and no flag asks for them."""
    asked, by_flag = packages_asked_for(args), " ".join(unpackaged_by_flag(args) or ())
    on_gpu, prebuilt = hardware.device == "cuda", args.use_cached_model or args.package_from
    missing = hardware.missing
    no_compiler = None if prebuilt else missing.get("compiler") or missing.get("code")
    mode, instead = args.compile_export_mode or "export_aoti", ""
    if mode == "export_aoti":
        # flux-fast found that torch.export does not work on AMD.
        of_machine = ("torch.export does not work on AMD" if hardware.is_rocm else missing.get("packages") or
                      (None if prebuilt else no_compiler or missing.get("libstdc++")))
        if asked and (by_flag or of_machine):
            raise RecipeError(f"{asked}: {by_flag or of_machine}. Without the flag, torch.compile compiles the blocks "
                              "where it can.")
        untested = ("packages without the fused kernels are untested on GPUs" if on_gpu and not fused else
                    "packages with an int8 T5 are untested on GPUs" if on_gpu and args.text_encoder_quant else None)
        # Without a compiler nothing is compiled, which --strict refuses below.
        if args.strict and of_machine and not (asked or by_flag or no_compiler or hardware.is_rocm or untested
                                               or args.vae_tiling):
            raise RecipeError(f"--strict: exported packages are on by default but cannot be made here: {of_machine}. "
                              "Use --compile_export_mode compile, or drop --strict.")
        if not asked:
            forced = untested and f"{untested}; --compile_export_mode export_aoti forces them"
            # Tiles come in several sizes, so packages would leave the VAE uncompiled.
            instead = by_flag or of_machine or ("--vae_tiling" if args.vae_tiling else forced) or ""
        mode = "compile" if instead else mode
    by_request = asked or args.compile_export_mode or args.compile_scope == "whole" or args.quant_dtype == "int8"
    if not (on_gpu or by_request):
        # tiny-flux on two cores: an export takes 44 s and more, and saves 0.04 s of each picture's 0.12.
        return Compile(False, "a CPU draws sooner than it compiles; --compile_export_mode export_aoti asks for it")
    by_offload = "--offload group hooks into every layer" if args.offload == "group" else None
    if mode == "compile":
        no_compiler = no_compiler or missing.get("headers")
        if args.compile_export_mode and (by_offload or no_compiler):
            raise RecipeError(f"--compile_export_mode compile: {by_offload or no_compiler}. Without the flag nothing "
                              "is compiled.")
    chosen = Compile(mode=mode, scope="none" if fused else args.compile_scope, no_packages=instead,
                     with_vae=not (mode == "export_aoti" and args.vae_tiling), with_t5=on_gpu and t5_on_gpu(args))
    if mode == "export_aoti" and chosen.scope == "none" and not (chosen.with_vae or chosen.with_t5):
        raise RecipeError(f"{asked}: nothing is left to package: the blocks are Triton kernels, --vae_tiling decodes "
                          f"in several sizes, and --offload {args.offload} streams T5. Drop one of the flags.")
    chosen = default("compile", chosen, no_compiler, by_offload)
    return chosen if chosen.on else replace(chosen, mode="disabled")


def _quantization(args, hardware: Hardware, dtype: str | None, bf16: bool, fused: bool, compiles: Compile, default
                  ) -> Quantization:
    if dtype is None:
        return default("quantization", Quantization(), against=f"--quality {args.quality}")
    if dtype == "float8" and not hardware.has_float8:
        raise RecipeError(f"--quant_dtype float8 needs an NVIDIA GPU of compute capability 8.9 or more, or an MI300; "
                          f"this is {hardware.name}. Use --quant_dtype int8 or --disable_quant.")
    if dtype == "int8" and args.quant_granularity == "tensor":
        raise RecipeError(f"--quant_granularity tensor is for float8, and {hardware.name} quantizes to int8, which "
                          "goes per row: drop the flag.")
    if dtype == "float8" and args.quant_granularity == "row" and not bf16:
        raise RecipeError("--quant_granularity row needs bf16 weights (torchao's row-scaled kernel takes no other): "
                          "drop --disable_bf16 or use --quant_granularity tensor.")
    obstacle = by_choice = None
    if dtype == "int8" and not (compiles.on or fused):
        obstacle = f"int8 pays only when compiled, and nothing is: {compiles.why}"
        by_choice = obstacle if args.compile_export_mode == "disabled" or args.offload == "group" else None
    if hardware.device == "cpu" and args.quant_dtype == "auto":
        # tiny-flux on two cores, with packages: 0.097 s a picture in int8, 0.085 in bf16.
        obstacle = by_choice = "int8 is slower than bf16 on a CPU; --quant_dtype int8 asks for it"
    if obstacle and (args.quant_dtype != "auto" or args.quant_granularity):
        given = "--quant_dtype int8" if args.quant_dtype != "auto" else f"--quant_granularity {args.quant_granularity}"
        raise RecipeError(f"{given} has no effect here: {obstacle}. Drop one of the flags, or add "
                          "--compile_export_mode compile.")
    granularity = args.quant_granularity or ("row" if dtype == "int8" or bf16 else "tensor")
    return default("quantization", Quantization(dtype=dtype, granularity=granularity), obstacle, by_choice)


def _kept_weights(args, fused: bool) -> KeptWeights:
    if not args.keep_quantized:
        return KeptWeights(False, "--keep_quantized not given")
    obstacle = ("the weights of the fused kernels alone are kept" if not fused else
                "--random_weights are not kept" if args.random_weights else
                f"{args.ckpt} is quantized in no time" if args.ckpt in tiny_presets.NAMES else
                "--step_error measures the unquantized model" if args.step_error else "")
    if obstacle:
        raise RecipeError(f"--keep_quantized: {obstacle}. Drop the flag.")
    return KeptWeights()


def _step_cache(args, configs: dict, settings: ImageSettings, without_cache_dit: str | None = None) -> StepCache:
    name, steps = args.step_cache, settings.steps
    if name is None:
        return StepCache(on=False, why="--step_cache not given")
    if (given := taylorseer_options(name)) is not None:
        taylorseer = TaylorSeer(**given)
        taylorseer.check(steps)
        return StepCache(name=name, taylorseer=taylorseer, mask=taylorseer.mask(steps))
    if without_cache_dit:
        raise RecipeError(without_cache_dit)
    blocks = configs["transformer"]["num_layers"] + configs["transformer"]["num_single_layers"]
    known = dbcache.PRESETS | {"f12b12": dbcache.DEFAULT}
    options = (dbcache.preset(name, steps, blocks) if name in dbcache.PRESETS else
               dbcache.scaled(dbcache.DEFAULT, blocks) if name in known else dbcache.from_yaml(name))
    dbcache.check(options, steps, blocks)
    notes = [f"at least {dbcache.computed_share(options, blocks):.0%} computed"] if name in dbcache.PRESETS else []
    computed = [(of.Fn_compute_blocks, of.Bn_compute_blocks) for of in (known.get(name, options), options)]
    if computed[0] != computed[1]:
        notes.append("F{}B{} in proportion to {} blocks".format(*computed[0], blocks))
    return StepCache(name=name if name in known else "",
                     dbcache=dbcache.forced(options, steps) if args.force_cache else options,
                     separate_cfg=args.true_cfg_scale > 1, note="; ".join(notes))


def _fp8_check(args, hardware: Hardware, attends: Attention, quantized: Quantization, cache: StepCache, warms_up: bool
               ) -> Check:
    """int8 is checked as well, but not on a CPU, where a bf16 step takes longer than the picture's steps.

    On several GPUs only the finished recipe shards the tokens, so that the warm-up's step is checked alone. A step
    cache and a batch give that step other inputs than the reference's.
    """
    lossy = (attends.on and attends.precision != "bf16") or (
        quantized.on and (quantized.dtype == "float8" or hardware.device == "cuda"))
    off = ("nothing is in fp8" if not lossy else "--skip_fp8_check" if args.skip_fp8_check else
           f"--offload {args.offload} keeps the unquantized model off the GPU" if args.offload != "none" else
           "several GPUs check the warm-up's step, which has other inputs here" if args.context_parallel and (
               cache.on or images_per_call(args) > 1 or not warms_up) else "")
    steps = "one quantized step is" if args.context_parallel else "two quantized steps are"
    return Check(not off, off, "" if off else f"{steps} compared with the unquantized model's")


# --- what people read ---

OFFLOADS = {"text": "T5, layer by layer", "model": "one model at a time on the GPU", "group": "every layer by itself"}
PRECISIONS = {"fp8": "fp8, scaled", "fp8_unscaled": "fp8, unscaled", "bf16": "bf16"}


def describe(technique: Technique) -> str:
    """One line: how a technique is on, or why it is off."""
    if not technique.on:
        return f"SDPA: {technique.why}" if isinstance(technique, Attention) else technique.why
    return "; ".join(filter(None, (_parameters(technique), technique.note)))


def _parameters(technique: Technique) -> str:
    match technique:
        case Attention(library=None):
            return f"{technique.backend} (diffusers' dispatcher)"
        case Attention():
            return f"{technique.backend} ({PRECISIONS[technique.precision]}) from {technique.source}"
        case Quantization():
            return f"{technique.dtype}, per-{technique.granularity} scales"
        case KeptWeights():
            return "loaded" if technique.loaded else "for the next start"
        case Offload():
            return OFFLOADS[technique.mode]
        case Compile():
            blocks = {"none": "", "blocks": "blocks", "whole": "whole transformer"}[technique.scope]
            units = filter(None, (blocks, technique.with_vae and "VAE", technique.with_t5 and "T5"))
            reason = f" (no packages: {technique.no_packages})" if technique.no_packages else ""
            return f"{', '.join(units)} by {'torch.compile' if technique.mode == 'compile' else 'AOTInductor'}{reason}"
        case StepCache(taylorseer=TaylorSeer() as taylorseer):
            mask, order = technique.mask, taylorseer.order
            return f"TaylorSeer over whole steps, order {order}, {mask.count('1')} of {len(mask)} computed: {mask}"
        case StepCache():
            return f"{technique.name}: {technique.dbcache}" if technique.name else str(technique.dbcache)
        case ContextParallel():
            how = ", through each other's memory" if technique.peer_memory else ""
            return f"{technique.kind}, {technique.processes} processes{how}"
        case CUDAGraphs():
            segments = f" in {technique.segments} segments, between which the cache decides"
            return f"{'text encoders' if technique.with_t5 else 'CLIP'}, VAE decoder, step" + (
                segments if technique.segments > 1 else "")
        case Check(difference=float() as difference):
            return f"a step differs from the unquantized model's by {100 * difference:.1f} %"
    return ""


def lines(plan: Plan) -> str:
    """The table of techniques that the scripts print."""
    width = max(len(name) for name, _ in TECHNIQUES.values())
    return "\n".join(f"  {name:<{width}}  {'on ' if technique.on else 'off'}  {describe(technique)}"
                     for name, technique in plan.techniques().items())


def record(plan: Plan) -> dict[str, dict]:
    """{name: {"on", "how", and the technique's parameters}}, for a benchmark's JSON."""
    parameters = plan.parameters()
    return {name: {"on": technique.on, "how": describe(technique)} | parameters.get(name, {})
            for name, technique in plan.techniques().items()}
