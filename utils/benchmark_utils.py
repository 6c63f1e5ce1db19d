"""The command line: flags, and the arguments that they alone show to be wrong."""

import argparse
import sys
from pathlib import Path

import torch

from utils import start
from utils.common import RecipeError, finite_float
from utils.machine import world_size
from utils.reference_image import scheme_of

DEFAULT_CACHE_DIR = str(start.default_cache_dir())
DEFAULT_CKPT = "black-forest-labs/FLUX.1-schnell"
IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")
STEP_CACHES = ("safe", "balanced", "fast", "extreme", "taylorseer", "f12b12")  # --step_cache's names


class FlagParser(argparse.ArgumentParser):
    """Takes every long flag with dashes or underscores, since the predecessors mixed the two, and finds a prompt."""

    def parse_known_args(self, args=None, namespace=None):
        args = sys.argv[1:] if args is None else args
        namespace, rest = super().parse_known_args([self._as_registered(a) for a in args], namespace)
        if namespace.prompt is None:
            namespace.prompt = default_prompt(namespace.ckpt)
        namespace.step_cache = one_step_cache(namespace.step_cache)
        return namespace, rest

    def _as_registered(self, arg: str) -> str:
        name, equals, value = arg.partition("=")
        for spelling in (name, "--" + name[2:].replace("-", "_"), "--" + name[2:].replace("_", "-")):
            if name.startswith("--") and spelling in self._option_string_actions:
                return spelling + equals + value
        return arg


class DefaultsFormatter(argparse.ArgumentDefaultsHelpFormatter):
    """Says each default but None: what that stands for is in the flag's own text."""

    def _get_help_string(self, action):
        return action.help if action.default is None else super()._get_help_string(action)


def default_prompt(ckpt: str) -> str:
    """What is drawn without --prompt."""
    return {"tiny-flux": "3d avocado on a teal background", "tiny-flux-dev": "3d avocado on a teal background",
            "tiny-kontext": "make the background green"}.get(ckpt, "A cat playing with a ball of yarn")


def one_step_cache(chosen: list[str] | None) -> str | None:
    """The cache that --step_cache and its aliases choose.

    Raises:
        RecipeError: they choose two.
    """
    names = list(dict.fromkeys(chosen or [None]))
    if len(names) > 1:
        raise RecipeError(f"--step_cache takes one step cache, and the flags choose {' and '.join(names)}: drop one. "
                          "--enable_cache_dit stands for --step_cache f12b12; --cache_preset and --cache_dit_config "
                          "are other names of --step_cache.")
    return names[0]


def create_parser(measure: bool = False) -> argparse.ArgumentParser:
    """The flags of gen_image.py. `--a_b` and `--a-b` are the same flag.

    Args:
        measure: the flags of run_benchmark.py as well. Without them the namespace holds their defaults.
    """
    parser = FlagParser(
        formatter_class=DefaultsFormatter,
        allow_abbrev=False,
        epilog="Techniques are on by default where they run. Lossless but for rounding: bf16, fused projections, "
        "channels_last, compile, CUDA graphs, GPU postprocess. Lossy: float8 and int8 quantization, fp8 attention, "
        "cache-dit, --text_encoder_quant. Exit codes: 0, the result is there; 2, something to put right, said in one "
        "paragraph; 3, the result is broken (NaN, one colour) and kept under another name; 130, interrupted; 141, "
        "nobody reads the output any more; 1, a fault of this program.",
    )

    model = parser.add_argument_group("model")
    model.add_argument("--ckpt", default=DEFAULT_CKPT, metavar="CKPT",
                       help="Hub id, local diffusers folder, or tiny-flux | tiny-flux-dev | tiny-kontext")
    model.add_argument("--revision", help="branch, tag or commit of a Hub checkpoint")
    model.add_argument("--random_weights", nargs="?", const="full", metavar="DOUBLE+SINGLE",
                       help="FLUX.1 of --ckpt's name at full size with random weights, nothing downloaded: real speed "
                       "and memory, meaningless pixels. 2+4 builds only 2 double and 4 single blocks")
    model.add_argument("--lora", metavar="PATH[:SCALE]", action="append",
                       help="LoRA file, folder, Hub id or REPO/FILE.safetensors, added to the weights before all "
                       "else; give the flag once for each LoRA")
    model.add_argument("--lora_partial", action="store_true",
                       help="add the part of a LoRA that fits this model; without the flag that is an error")
    model.add_argument("--device", choices=["cuda", "cpu"], default="cuda" if torch.cuda.is_available() else "cpu",
                       help="cuda is also AMD's ROCm")
    model.add_argument("--offload", choices=["none", "text", "model", "group"], default="none",
                       help="keep weights in CPU memory and copy them to the GPU where they are used: T5's, layer by "
                       "layer (text: all else stays fast); whole models (model: slow, no CUDA graphs); every layer "
                       "(group: least memory, nothing compiled)")
    model.add_argument("--vae_tiling", action="store_true", help="decode in tiles: less memory, faint seams possible")
    model.add_argument("--gpu_memory_limit", type=finite_float, metavar="GIB",
                       help="take at most this much GPU memory: to share a card, or to see whether a smaller one does")

    image = parser.add_argument_group("image")
    image.add_argument("--prompt", help="text prompt; without, one that the model can draw")
    image.add_argument("--prompts-file", metavar="FILE",
                       help="one prompt a line, JSON (lines or a list) or a table (.csv, .tsv), the last two with a "
                       "seed each if wanted; images are named by index and seed; those there are not made again")
    image.add_argument("--batch_size", type=int, metavar="B",
                       help="prompts of --prompts-file in one call: 1; more images a minute, more memory")
    image.add_argument("--negative_prompt", help="needs --true_cfg_scale above 1")
    image.add_argument("--true_cfg_scale", type=finite_float, default=1.0,
                       help="classifier-free guidance with the negative prompt: twice the work a step")
    image.add_argument("--guidance_scale", type=finite_float,
                       help="distilled guidance; default by model: 3.5 dev, 2.5 Kontext, unused by schnell")
    image.add_argument("--image", metavar="PATH_OR_URL", help="reference image (Kontext)")
    image.add_argument("--height", type=int, help="pixels, a multiple of 16; default: what the model was trained for")
    image.add_argument("--width", type=int, help="pixels, a multiple of 16; default: what the model was trained for")
    image.add_argument("--num_inference_steps", type=int,
                       help="denoising steps; default by model: 4 schnell, 28 dev, 28 Kontext")
    image.add_argument("--num_images_per_prompt", type=int, default=1, help="image i has seed + i")
    image.add_argument("--seed", type=int, default=42, help="of the first image, drawn on the CPU: the same anywhere")
    image.add_argument("--output-file", default="output.png", help=f"image path, {', '.join(IMAGE_SUFFIXES)}")

    recipe = parser.add_argument_group("techniques, in the order of the recipe")
    recipe.add_argument("--disable_bf16", action="store_true", help="compute in float32")
    recipe.add_argument("--disable_fused_projections", action="store_true", help="three GEMMs for q, k, v, not one")
    recipe.add_argument("--disable_channels_last", action="store_true", help="NCHW convolutions in the VAE")
    recipe.add_argument("--disable_fused_vae", action="store_true",
                        help="no Triton kernels for the VAE's norms, and its attention through PyTorch")
    recipe.add_argument("--attention_backend", metavar="NAME",
                        help="fa3 (default on Hopper: fp8, scaled), fa3_bf16, fa3_unscaled (the predecessors' cast, to "
                        "compare), aiter (default on ROCm: fp8), or a name of diffusers' dispatcher (native, "
                        "_native_cudnn, sage, ...; the *_hub ones download a binary)")
    recipe.add_argument("--disable_fa3", action="store_true", help="PyTorch's scaled_dot_product_attention")
    recipe.add_argument("--disable_quant", action="store_true", help="no quantization of the transformer (lossy)")
    recipe.add_argument("--quant_dtype", choices=["auto", "float8", "int8"], default="auto",
                        help="dynamic quantization: float8 from compute capability 8.9 and on MI300, else int8")
    recipe.add_argument("--quant_granularity", choices=["row", "tensor"],
                        help="one float8 scale a row (better numerics; the default) or a tensor")
    recipe.add_argument("--disable_fused_kernels", action="store_true",
                        help="blocks as diffusers and torchao make them, not on this recipe's Triton kernels (Hopper)")
    recipe.add_argument("--text_encoder_quant", action="store_true",
                        help="T5 in int8, weights only: 9.5 -> 4.9 GB (lossy; off by default)")
    recipe.add_argument("--step_cache", "--cache_preset", "--cache_dit_config", metavar="NAME|FILE", action="append",
                        help="skip blocks in steps that change little (lossy). safe, balanced, fast and extreme "
                        "compute at least 69, 54, 40 and 30 %% of the blocks of 28 steps, f12b12 83 %%. taylorseer "
                        "extrapolates whole steps. FILE is a yaml file, such as cache_config.yaml")
    recipe.add_argument("--enable_cache_dit", action="append_const", const="f12b12", dest="step_cache",
                        help="the same as --step_cache f12b12")
    recipe.add_argument("--taylorseer_interval", type=int, metavar="N",
                        help="compute every N-th step: 3 (--step_cache taylorseer)")
    recipe.add_argument("--taylorseer_order", type=int, metavar="N",
                        help="extrapolate by a polynomial of this order: 2 (--step_cache taylorseer)")
    recipe.add_argument("--context_parallel", choices=["auto", "ulysses", "ring"],
                        help="one image on all GPUs that torchrun starts a process for: its tokens are shared out, and "
                        "attention exchanges them for heads (ulysses) or passes keys and values on (ring); auto is "
                        "ulysses where heads can be divided")
    recipe.add_argument("--disable_inductor_tuning_flags", action="store_true",
                        help="inductor's own settings for the blocks, which are tuned for minutes otherwise. Where the "
                        "fused kernels are on there is nothing to tune")
    recipe.add_argument("--compile_export_mode", choices=["compile", "export_aoti", "disabled"],
                        help="torch.compile; torch.export + AOTInductor, whose packages later starts load; or neither. "
                        "Default: export_aoti; compile where that cannot be, and on GPUs without the fused kernels")
    recipe.add_argument("--compile_scope", choices=["blocks", "whole"], default="blocks",
                        help="compile each kind of block once (seconds) or the whole transformer (many minutes)")
    recipe.add_argument("--disable_cudagraphs", action="store_true", help="launch kernels one by one")
    recipe.add_argument("--disable_gpu_postprocess", action="store_true",
                        help="convert pixels to 8 bits on the CPU, as diffusers does")
    recipe.add_argument("--cache-dir", default=DEFAULT_CACHE_DIR,
                        help="exported packages; compiled kernels, unless TORCHINDUCTOR_CACHE_DIR or TRITON_CACHE_DIR "
                        "says where")
    recipe.add_argument("--use-cached-model", action="store_true",
                        help="load exported packages, never make them: what is missing is an error")
    recipe.add_argument("--re-export", action="store_true", help="make the packages anew, whatever is there")
    recipe.add_argument("--package-from", metavar="REPO@REVISION:SHA256",
                        help="download missing packages: native code that runs as you, from someone you trust")
    recipe.add_argument("--skip_fp8_check", action="store_true",
                        help="skip the check at the start, which compares two quantized steps with bf16's")
    recipe.add_argument("--strict", action="store_true",
                        help="fail if a default technique cannot run here, or if the fp8 check fails")

    report = parser.add_argument_group("output")
    report.add_argument("--quiet", action="store_true", help="no progress bar, no stage lines")
    report.add_argument("--debug", action="store_true", help="print the traceback of an error as well")
    if measure:
        _add_measurement_flags(parser)
    else:
        parser.set_defaults(step_error=False, force_cache=False, kernels=False, output_json=None, trace_file=None)
    return parser


def _add_measurement_flags(parser: argparse.ArgumentParser) -> None:
    report = parser.add_argument_group("measurement")
    report.add_argument("--warmup", type=int, default=3, help="untimed images before the timed ones")
    report.add_argument("--runs", type=int, default=10, help="timed images")
    report.add_argument("--step_error", action="store_true",
                        help="also measure one step's relative error against float32")
    report.add_argument("--force_cache", action="store_true",
                        help="skip every step that the mask allows, ignoring residuals (to time a preset with "
                        "--random_weights)")
    report.add_argument("--kernels", action="store_true", help="also list the GPU kernels of one denoising step")
    report.add_argument("--trace-file", metavar="FILE", help="PyTorch profiler trace, .json or .json.gz")
    report.add_argument("--output-json", metavar="FILE", help="where to write the result as JSON")


def check_args(args: argparse.Namespace) -> None:
    """Refuses what the arguments alone show to be wrong, but for the files that a run writes: see `check_outputs`.

    Raises:
        RecipeError: names the value, the choices and the way out.
    """
    def refuse(wrong, text):
        if wrong:
            raise RecipeError(text)

    for name in ("height", "width"):
        size = getattr(args, name)
        refuse(size is not None and (size <= 0 or size % 16),
               f"--{name} {size} is not a positive multiple of 16 (8 pixels a latent, 2 latents a token). "
               f"The nearest that works: {max(16, round((size or 0) / 16) * 16)}.")
    for name, least in (("num_inference_steps", 1), ("num_images_per_prompt", 1), ("batch_size", 1),
                        ("taylorseer_interval", 2), ("taylorseer_order", 0)):
        value = getattr(args, name)
        refuse(value is not None and value < least, f"--{name} {value}: it must be at least {least}.")
    refuse(not 0 <= args.seed < 2**63, f"--seed {args.seed}: it must be from 0 to 2^63 - 1.")
    refuse(args.true_cfg_scale < 1, f"--true_cfg_scale {args.true_cfg_scale}: it must be 1 (off) or more.")

    refuse(args.device == "cuda" and not torch.cuda.is_available(),
           "--device cuda, but PyTorch sees no GPU here. Use --device cpu, or install a CUDA or ROCm build of torch.")
    refuse(args.device == "cpu" and args.offload != "none",
           f"--offload {args.offload} moves weights between CPU and GPU; with --device cpu there is nothing to move.")
    refuse(args.gpu_memory_limit is not None and (args.device == "cpu" or args.gpu_memory_limit <= 0),
           "--gpu_memory_limit takes a positive number of GiB and needs --device cuda.")

    refuse(args.negative_prompt is not None and args.true_cfg_scale <= 1,
           "--negative_prompt has no effect without true classifier-free guidance: add --true_cfg_scale, e.g. 4.0.")
    refuse(args.true_cfg_scale > 1 and args.negative_prompt is None,
           f"--true_cfg_scale {args.true_cfg_scale} needs --negative_prompt ('' will do).")
    refuse(args.batch_size is not None and not args.prompts_file,
           f"--batch_size {args.batch_size} is how many prompts of a file go into one call: add --prompts-file. "
           "Several images of one prompt: --num_images_per_prompt.")

    refuse(args.disable_quant and (args.quant_dtype != "auto" or args.quant_granularity),
           "--disable_quant contradicts --quant_dtype and --quant_granularity: drop one or the other.")
    refuse(args.quant_dtype == "int8" and args.quant_granularity == "tensor",
           "--quant_granularity tensor is for float8; int8 is quantized per row. Drop one of the two flags.")
    refuse(args.quant_granularity == "row" and args.disable_bf16,
           "--quant_granularity row needs bf16 weights (torchao's row-scaled kernel takes no other): "
           "drop --disable_bf16 or use --quant_granularity tensor.")
    refuse(args.disable_fa3 and args.attention_backend and args.attention_backend.startswith("fa3"),
           f"--disable_fa3 contradicts --attention_backend {args.attention_backend}: drop one of the two.")
    asked, unpackaged = packages_asked_for(args), unpackaged_by_flag(args)
    refuse(asked and args.compile_export_mode in ("compile", "disabled"),
           f"{asked} is about exported packages, which --compile_export_mode {args.compile_export_mode} neither makes "
           "nor loads: drop one of the two.")
    refuse(args.re_export and (args.use_cached_model or args.package_from),
           "--use-cached-model and --package-from never export, --re-export always does.")
    refuse(asked and unpackaged, f"{asked} does not go with {' '.join(unpackaged or ())}: drop one of the two.")
    refuse(args.compile_scope == "whole" and args.compile_export_mode == "disabled",
           "--compile_scope whole contradicts --compile_export_mode disabled: nothing is compiled.")
    refuse(args.compile_scope == "whole" and offloads_transformer(args),
           f"--offload {args.offload} hooks into the transformer, which then cannot be compiled as one whole: use "
           "--compile_scope blocks.")
    cache, decides = args.step_cache, args.step_cache not in (None, "taylorseer")
    refuse(decides and cache not in STEP_CACHES and not Path(cache).expanduser().is_file(),
           f"--step_cache {cache}: there is no such file. Give a yaml file, or one of {', '.join(STEP_CACHES)}.")
    refuse(cache != "taylorseer" and (args.taylorseer_interval is not None or args.taylorseer_order is not None),
           "--taylorseer_interval and --taylorseer_order are about --step_cache taylorseer: add it.")
    refuse(args.force_cache and not decides,
           "--force_cache ignores residuals, by which the caches but taylorseer decide: add --step_cache fast, say.")
    refuse(args.offload == "model" and cache,
           "--offload model takes its hooks off after each image, and the step cache with them: use --offload text or "
           "--offload group.")
    refuse(args.compile_scope == "whole" and decides,
           "a step cache decides in Python between blocks, so the transformer cannot be compiled as one whole: "
           f"use --compile_scope blocks with --step_cache {cache}.")
    not_on_hub = args.random_weights or args.ckpt.startswith("tiny-") or Path(args.ckpt).expanduser().is_dir()
    refuse(args.revision and not_on_hub,
           f"--revision {args.revision} is of a checkpoint on the Hub: drop it, or give a Hub id as --ckpt.")
    refuse(args.random_weights and args.lora,
           "--lora changes pixels, and pixels of --random_weights mean nothing: drop one of the two.")

    processes = world_size()
    refuse(processes > 1 and not (args.prompts_file or args.context_parallel),
           f"{processes} processes for one prompt: give many with --prompts-file, let them share one image with "
           "--context_parallel auto, or start one process, without accelerate launch and torchrun.")
    if args.context_parallel:
        parallel = f"--context_parallel {args.context_parallel}"
        refuse(args.prompts_file, f"{parallel} shares one image among GPUs, --prompts-file gives each GPU images of "
               "its own: drop one of the two.")
        refuse(processes == 1, f"{parallel} needs a process for each GPU: torchrun --nproc_per_node=2 "
               f"{Path(sys.argv[0]).name} {parallel} ...")
        for flag, given in ((f"--offload {args.offload}", args.offload != "none"),
                            ("--compile_scope whole", args.compile_scope == "whole")):
            refuse(given, f"{flag} does not go with {parallel}: drop one of the two.")

    refuse(args.prompts_file and not Path(args.prompts_file).expanduser().is_file(),
           f"--prompts_file {args.prompts_file}: there is no such file.")
    is_path = args.image and not scheme_of(args.image)
    refuse(is_path and not Path(args.image).expanduser().is_file(), f"--image {args.image}: there is no such file.")


def offloads_transformer(args: argparse.Namespace) -> bool:
    """Whether the transformer's weights move between CPU and GPU, and not T5's alone."""
    return args.offload in ("model", "group")


def t5_on_gpu(args: argparse.Namespace) -> bool:
    """Whether T5's weights stay on the GPU, where they can be compiled, exported and recorded."""
    return args.offload == "none"


def packages_asked_for(args: argparse.Namespace) -> str | None:
    """The flag that asks for exported packages by name. Without it they are the default where they can be."""
    given = {"--compile_export_mode export_aoti": args.compile_export_mode == "export_aoti",
             "--use-cached-model": args.use_cached_model, "--re-export": args.re_export,
             "--package-from": args.package_from}
    return next((flag for flag, is_given in given.items() if is_given), None)


def unpackaged_by_flag(args: argparse.Namespace) -> tuple[str, str] | None:
    """The flag that exported packages do not go with, and why."""
    backend = args.attention_backend or "native"
    given = {("--compile_scope whole", "(a package is of one kind of block)"): args.compile_scope == "whole",
             (f"--offload {args.offload}", "(it moves weights, whose addresses exported code holds)"):
                 offloads_transformer(args),
             (f"--context_parallel {args.context_parallel}", "(its exchanges are not exported)"): args.context_parallel,
             # Exported with _native_math on torch 2.13, a package called the flash kernel.
             (f"--attention_backend {backend}", "(torch.export forgets which of PyTorch's kernels was chosen)"):
                 backend != "native" and not backend.startswith(("fa3", "aiter"))}
    return next((flag for flag, is_given in given.items() if is_given), None)


def images_per_call(args: argparse.Namespace) -> int:
    """The batch of one pipeline call."""
    return (args.batch_size or 1) * args.num_images_per_prompt
