"""The command line: flags, their help, and the combinations that are refused.

Nothing here imports torch before the flags are checked: --help and a typo take a fraction of a second.
"""

import argparse
import os
import re
import sys
from pathlib import Path

from utils import start
from utils.common import RecipeError, finite_float
from utils.launchers import world_size

DEFAULT_CACHE_DIR = str(start.default_cache_dir())
DEFAULT_CKPT = "black-forest-labs/FLUX.1-schnell"
IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")
STEP_CACHES = ("safe", "balanced", "fast", "extreme", "taylorseer", "f12b12")  # --step_cache's names


class FlagParser(argparse.ArgumentParser):
    """Takes every long flag with dashes or underscores, since the predecessors mixed the two. Fills in --prompt."""

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
    """Says each default but None and False: the flag's own text explains None, and a switch is off by itself."""

    def _get_help_string(self, action):
        return action.help if action.default in (None, False) else super()._get_help_string(action)


def default_prompt(ckpt: str) -> str:
    """The prompt of a command without --prompt."""
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


def taylorseer_options(step_cache: str) -> dict[str, int] | None:
    """The interval and the order in a --step_cache such as taylorseer, taylorseer:4 or taylorseer:4:2.

    Returns:
        The given ones of "interval" and "order"; None for another step cache.

    Raises:
        RecipeError: a number is missing, too small, or one too many.
    """
    name, *numbers = step_cache.split(":")
    if name != "taylorseer":
        return None
    least = {"interval": 2, "order": 0}
    if len(numbers) > 2 or not all(each.isdecimal() for each in numbers) or any(
            int(each) < bound for each, bound in zip(numbers, least.values(), strict=False)):
        raise RecipeError(f"--step_cache {step_cache}: write taylorseer, taylorseer:N or taylorseer:N:ORDER, with an N "
                          "of 2 or more (every N-th step is computed) and an ORDER of 0 or more.")
    return dict(zip(least, map(int, numbers), strict=False))


def redux_parts(given: str) -> tuple[str, float]:
    """The path or URL and the weight in --redux PATH_OR_URL[:WEIGHT].

    Raises:
        RecipeError: the weight is not above 0 and at most 2.
    """
    path, _, number = given.rpartition(":")
    try:
        weight = finite_float(number)
    except argparse.ArgumentTypeError:
        return given, 1.0
    if not path or os.path.exists(given):
        return given, 1.0
    _refuse(not 0 < weight <= 2,
            f"--redux {given}: the weight must be above 0 and at most 2; 1 is Redux as it was trained.")
    return path, weight


def create_parser(measure: bool = False) -> argparse.ArgumentParser:
    """The flags of gen_image.py. `--a_b` and `--a-b` are the same flag.

    Args:
        measure: the flags of run_benchmark.py as well. Without them the namespace holds their defaults.
    """
    parser = FlagParser(
        formatter_class=DefaultsFormatter,
        allow_abbrev=False,
        epilog="Techniques are on by default where they run. bf16, fused projections, channels_last, the fused VAE, "
        "compilation, CUDA graphs and GPU postprocess change the image by rounding at most. Lossy are float8, int8, "
        "fp8 attention, the fused kernels, step caches and --text_encoder_quant. Exit codes: 0, the result is there; "
        "2, something for you to put right, in one paragraph; 3, the result is broken (NaN, one colour) and kept under "
        "another name; 130, interrupted; 141, nobody reads the output; 1, a fault of this program.",
    )
    _add_model_flags(parser)
    _add_image_flags(parser)
    _add_technique_flags(parser)
    _add_compilation_flags(parser)
    output = parser.add_argument_group("output")
    output.add_argument("--quiet", action="store_true", help="no progress bar, no stage lines")
    output.add_argument("--debug", action="store_true", help="print the traceback of an error as well")
    if measure:
        _add_measurement_flags(parser)
    else:
        parser.set_defaults(step_error=False, force_cache=False, compile_scope="blocks", kernels=False,
                            output_json=None, trace_file=None)
    return parser


def _add_model_flags(parser: argparse.ArgumentParser) -> None:
    model = parser.add_argument_group("model")
    model.add_argument("--ckpt", default=DEFAULT_CKPT, metavar="CKPT",
                       help="Hub id, local diffusers folder, or tiny-flux | tiny-flux-dev | tiny-kontext")
    model.add_argument("--revision", help="branch, tag or commit of a Hub checkpoint")
    model.add_argument("--transformer", metavar="FILE",
                       help="take the transformer from one .safetensors or .gguf file, or OWNER/REPO/FILE[@REVISION] "
                       "on the Hub, with the names of Black Forest Labs, ComfyUI or diffusers. All else is --ckpt's")
    model.add_argument("--random_weights", nargs="?", const="full", metavar="DOUBLE+SINGLE",
                       help="FLUX.1 of --ckpt's name with random weights at full size, without a download: real speed "
                       "and memory, meaningless pixels. 2+4 builds 2 double and 4 single blocks")
    model.add_argument("--lora", metavar="PATH[@REVISION][:SCALE]", action="append",
                       help="LoRA file, folder, or OWNER/REPO[/FILE.safetensors] on the Hub, added to the weights. "
                       "Repeat the flag for several LoRAs")
    model.add_argument("--lora_partial", action="store_true",
                       help="add the part of a LoRA that fits this model. Without the flag a LoRA that fits in part is "
                       "an error")
    model.add_argument("--device", choices=["cuda", "cpu"], help="default: cuda if PyTorch sees a GPU. "
                       "cuda is also AMD's ROCm")
    model.add_argument("--offload", choices=["none", "text", "model", "group"], default="none",
                       help="keep weights in CPU memory until the GPU needs them. text: T5 layer by layer, all else "
                       "stays fast. model: one model at a time, slow, no CUDA graphs. group: every layer, least "
                       "memory, nothing compiled")
    model.add_argument("--vae_tiling", action="store_true", help="decode in tiles: less memory, faint seams possible")
    model.add_argument("--gpu_memory_limit", type=finite_float, metavar="GIB",
                       help="limit GPU memory, to share a GPU or to try a smaller one")


def _add_image_flags(parser: argparse.ArgumentParser) -> None:
    image = parser.add_argument_group("image")
    image.add_argument("--prompt", help="text prompt; the default is one that the model can draw")
    image.add_argument("--prompts-file", metavar="FILE",
                       help="many prompts: one a line, JSON (lines or a list) or a table (.csv, .tsv); JSON and tables "
                       "may hold seeds, sizes, LoRAs and other settings of a prompt. Images that are there already "
                       "are skipped")
    image.add_argument("--interactive", action="store_true",
                       help="draw a prompt from each line of standard input, and take commands such as :size 1360x768 "
                       "and :lora style.safetensors:0.8; :help lists them")
    image.add_argument("--batch_size", type=int, metavar="B",
                       help="prompts of --prompts-file in one call; default: 1")
    image.add_argument("--negative_prompt", help="needs --true_cfg_scale above 1")
    image.add_argument("--true_cfg_scale", type=finite_float, default=1.0,
                       help="classifier-free guidance with the negative prompt; doubles the work of a step")
    image.add_argument("--max_sequence_length", type=int, metavar="TOKENS",
                       help="text tokens that T5 makes of a prompt; default by model: 256 schnell, 512 dev, 512 "
                       "Kontext. Fewer tokens are faster, change the image and cut longer prompts. Multiples of "
                       "128 fill the kernels' tiles. The image's metadata has it")
    image.add_argument("--guidance_scale", type=finite_float,
                       help="distilled guidance; default by model: 3.5 dev, 4.5 Krea, 2.5 Kontext, 30 Fill and Canny, "
                       "10 Depth; schnell has none")
    image.add_argument("--image", metavar="PATH_OR_URL",
                       help="picture to redraw (schnell, dev), to edit (Kontext) or to fill (Fill). A redrawn picture "
                       "gives the output its shape, unless --height and --width are given")
    image.add_argument("--mask_image", metavar="PATH_OR_URL",
                       help="mask of --image: white is repainted, black stays (schnell, dev, Kontext, Fill)")
    image.add_argument("--control_image", metavar="PATH_OR_URL",
                       help="depth map (FLUX.1-Depth-dev) or edges (FLUX.1-Canny-dev) that the picture follows")
    image.add_argument("--redux", metavar="PATH_OR_URL[:WEIGHT]",
                       help="picture beside the prompt, by FLUX.1-Redux-dev (dev, schnell). The weight multiplies its "
                       "tokens: below 1 the prompt counts for more")
    image.add_argument("--redux_ckpt", default="black-forest-labs/FLUX.1-Redux-dev", metavar="CKPT",
                       help="Hub id or local folder of Redux")
    image.add_argument("--strength", type=finite_float,
                       help="how far --image is left behind: the share of the steps that is computed, from 0.01 to 1; "
                       "default: 0.6, and 1 with Kontext or Fill")
    image.add_argument("--height", type=int,
                       help="pixels, a multiple of 16; default: the size that the model was trained for")
    image.add_argument("--width", type=int,
                       help="pixels, a multiple of 16; default: the size that the model was trained for")
    image.add_argument("--num_inference_steps", type=int,
                       help="denoising steps; default by model: 4 schnell, 28 dev and Kontext, 50 Fill and Canny, 30 "
                       "Depth. --strength skips the first of them")
    image.add_argument("--num_images_per_prompt", type=int, default=1, help="image i has the seed --seed + i")
    image.add_argument("--seed", type=int, default=42,
                       help="seed of the first image, drawn on the CPU: the same noise on every machine")
    image.add_argument("--output-file", default="output.png", help=f"image path, {', '.join(IMAGE_SUFFIXES)}")


def _add_technique_flags(parser: argparse.ArgumentParser) -> None:
    recipe = parser.add_argument_group("techniques, in the order of the recipe")
    recipe.add_argument("--disable_bf16", action="store_true", help="compute in float32")
    recipe.add_argument("--disable_fused_projections", action="store_true",
                        help="three GEMMs for q, k and v instead of one")
    recipe.add_argument("--disable_channels_last", action="store_true",
                        help="NCHW convolutions in the VAE; switches the fused VAE off as well")
    recipe.add_argument("--disable_fused_vae", action="store_true",
                        help="no Triton kernels in the VAE")
    recipe.add_argument("--attention_backend", metavar="NAME",
                        help="fa3 (lossy: scaled fp8; the default on Hopper), fa3_bf16 (the default on Hopper with "
                        "int8 and with --quality high or exact), fa3_unscaled (lossy: flux-fast's cast), aiter (lossy: "
                        "fp8; the default on ROCm), or a name of diffusers' dispatcher (native, _native_cudnn, sage, "
                        "...). Names with _hub download a binary")
    recipe.add_argument("--disable_fa3", action="store_true",
                        help="PyTorch's scaled_dot_product_attention in bf16 instead of fp8 attention")
    recipe.add_argument("--quality", choices=["fast", "high", "exact"], default="fast",
                        help="what is lossy by default. fast: float8 and fp8 attention, or int8 on older GPUs. high: "
                        "int8 on GPUs, and attention in bf16. exact: nothing. A flag for quantization, attention or "
                        "the fused kernels wins over this flag")
    recipe.add_argument("--disable_quant", action="store_true", help="no quantization of the transformer")
    recipe.add_argument("--quant_dtype", choices=["auto", "float8", "int8"], default="auto",
                        help="dynamic quantization of the transformer (lossy). auto goes by --quality, and fast means "
                        "float8 from compute capability 8.9 and on MI300, else int8")
    recipe.add_argument("--quant_granularity", choices=["row", "tensor"],
                        help="float8 scales per row (the default, more precise) or per tensor")
    recipe.add_argument("--disable_fused_kernels", action="store_true",
                        help="diffusers' blocks and torchao's quantization instead of this project's Triton kernels "
                        "(Hopper)")
    recipe.add_argument("--keep_quantized", action="store_true",
                        help="keep the fused kernels' quantized weights in --cache-dir (12 to 15 GB); later starts "
                        "with this flag load them")
    recipe.add_argument("--text_encoder_quant", action="store_true",
                        help="T5 in int8, weights only: 4.9 instead of 9.5 GB (lossy)")
    recipe.add_argument("--step_cache", "--cache_preset", "--cache_dit_config", metavar="NAME|FILE", action="append",
                        help="skip blocks in steps that change little (lossy). safe, balanced, fast and extreme "
                        "compute at least 69, 54, 40 and 30 %% of the blocks of 28 steps, f12b12 83 %%. "
                        "taylorseer[:N[:ORDER]] computes every N-th step (3) and extrapolates the others by a "
                        "polynomial (2). FILE is a yaml file, such as cache_config.yaml")
    recipe.add_argument("--enable_cache_dit", action="append_const", const="f12b12", dest="step_cache",
                        help="the same as --step_cache f12b12")
    recipe.add_argument("--context_parallel", choices=["auto", "ulysses", "ring"],
                        help="split one image's tokens over the GPUs of torchrun. ulysses exchanges tokens for heads, "
                        "ring passes keys and values on; auto is ulysses where the heads can be divided")
    recipe.add_argument("--disable_cudagraphs", action="store_true", help="launch kernels one by one")
    recipe.add_argument("--disable_gpu_postprocess", action="store_true",
                        help="convert pixels to 8 bits on the CPU, as diffusers does")
    recipe.add_argument("--skip_fp8_check", action="store_true",
                        help="skip the check at the start, which compares two quantized steps with bf16")
    recipe.add_argument("--strict", action="store_true",
                        help="fail if a default technique cannot run here, or if the fp8 check fails")


def _add_compilation_flags(parser: argparse.ArgumentParser) -> None:
    packages = parser.add_argument_group("compilation")
    packages.add_argument("--disable_inductor_tuning_flags", action="store_true",
                          help="inductor's default settings for compiled blocks, instead of minutes of tuning")
    packages.add_argument("--compile_export_mode", choices=["compile", "export_aoti", "disabled"],
                          help="torch.compile, or AOTInductor packages that later starts load, or neither; default: "
                          "export_aoti, and compile where packages cannot be made")
    packages.add_argument("--cache-dir", default=DEFAULT_CACHE_DIR,
                          help="folder of exported packages, and of compiled kernels unless TORCHINDUCTOR_CACHE_DIR or "
                          "TRITON_CACHE_DIR is set")
    packages.add_argument("--use-cached-model", action="store_true",
                          help="load exported packages and never export; a missing package is an error")
    packages.add_argument("--re-export", action="store_true", help="export the packages again, even if they are there")
    packages.add_argument("--package-from", metavar="REPO@REVISION:SHA256",
                          help="download missing packages. They are native code that runs as you: name someone you "
                          "trust")


def _add_measurement_flags(parser: argparse.ArgumentParser) -> None:
    measurement = parser.add_argument_group("measurement")
    measurement.add_argument("--warmup", type=int, default=3, help="untimed images before the timed ones")
    measurement.add_argument("--runs", type=int, default=10, help="timed images")
    measurement.add_argument("--step_error", action="store_true",
                        help="also measure one step's relative error against float32")
    measurement.add_argument("--force_cache", action="store_true",
                        help="skip every step that the mask allows, ignoring residuals (to time a preset with "
                        "--random_weights)")
    measurement.add_argument("--compile_scope", choices=["blocks", "whole"], default="blocks",
                        help="compile each kind of block once (seconds), or the whole transformer (many minutes), to "
                        "compare")
    measurement.add_argument("--kernels", action="store_true", help="also list the GPU kernels of one denoising step")
    measurement.add_argument("--trace-file", metavar="FILE", help="PyTorch profiler trace, .json or .json.gz")
    measurement.add_argument("--output-json", metavar="FILE", help="where to write the result as JSON")


def check_args(args: argparse.Namespace) -> None:
    """Refuses arguments that contradict each other or this machine, before anything loads.

    What can be wrong with a command is refused in this order: types and choices by argparse; contradictions of flags
    here; lines of a prompts file by `utils.prompts_file.read_prompts`; files that could not be written by
    `utils.output_checks.check_outputs`; what depends on the checkpoint's configs, the GPU or installed libraries by
    `utils.many_prompts.usable_prompts` and `utils.plan.make_plan`; what does not fit by `utils.memory.fit`; LoRAs and
    weights when their files are read.

    Raises:
        RecipeError: names the value, the choices and the way out.
    """
    check_image(args)
    if args.device:
        _check_device(args)
    _check_techniques(args)
    _check_step_cache(args)
    _check_processes(args)
    _check_inputs(args)


def choose_device(args: argparse.Namespace) -> None:
    """Sets `args.device` where no flag did, and checks what depends on it. Imports torch.

    Raises:
        RecipeError: --device cuda without a GPU, or a flag that needs another device.
    """
    import torch

    available = torch.cuda.is_available()
    _refuse(args.device == "cuda" and not available,
            "--device cuda: PyTorch sees no GPU here. Use --device cpu, or install a CUDA or ROCm build of torch.")
    args.device = args.device or ("cuda" if available else "cpu")
    _check_device(args)


def scheme_of(image: str) -> str:
    """The scheme of a URL in lower case, such as "https", or "" for a path."""
    match = re.match(r"(data):|([a-z][a-z0-9+.-]*)://", image, re.IGNORECASE)
    return (match[1] or match[2]).lower() if match else ""


def _refuse(wrong, text: str) -> None:
    if wrong:
        raise RecipeError(text)


def check_image(args: argparse.Namespace) -> None:
    """Refuses flags about the image that are out of range or contradict each other.

    A line of --prompts-file with settings of its own is checked as the command line with these settings.

    Raises:
        RecipeError: names the value and the way out.
    """
    for name in ("height", "width"):
        size = getattr(args, name)
        _refuse(size is not None and (size <= 0 or size % 16),
                f"--{name} {size} is not a positive multiple of 16 (8 pixels a latent, 2 latents a token). "
                f"The nearest is {max(16, ((size or 0) + 8) // 16 * 16)}.")
    for name, least in (("num_inference_steps", 1), ("num_images_per_prompt", 1), ("batch_size", 1),
                        ("max_sequence_length", 1)):
        _refuse_below(args, name, least)
    _refuse(not 0 <= args.seed < 2**63, f"--seed {args.seed}: it must be from 0 to 2^63 - 1.")
    _refuse(args.true_cfg_scale < 1, f"--true_cfg_scale {args.true_cfg_scale}: it must be 1 (off) or more.")
    _refuse(args.negative_prompt is not None and args.true_cfg_scale <= 1,
            "--negative_prompt has no effect without classifier-free guidance: add --true_cfg_scale, such as 4.0.")
    _refuse(args.true_cfg_scale > 1 and args.negative_prompt is None,
            f"--true_cfg_scale {args.true_cfg_scale} needs --negative_prompt ('' will do).")
    _refuse(args.batch_size is not None and not args.prompts_file,
            f"--batch_size {args.batch_size} is the number of prompts in one call: add --prompts-file. For several "
            "images of one prompt use --num_images_per_prompt.")
    _refuse(args.mask_image and not args.image,
            f"--mask_image {args.mask_image} says which part of a picture is repainted: add --image.")
    _refuse(args.strength is not None and not 0.01 <= args.strength <= 1,
            f"--strength {args.strength}: it must be from 0.01 (almost --image) to 1 (every step is computed).")
    for name in ("image", "mask_image", "control_image"):
        path = getattr(args, name)
        _refuse_missing(f"--{name}", None if path and scheme_of(path) else path)
    if args.redux and not scheme_of(args.redux):
        _refuse_missing("--redux", redux_parts(args.redux)[0])


def _refuse_below(args: argparse.Namespace, name: str, least: int) -> None:
    value = getattr(args, name)
    _refuse(value is not None and value < least, f"--{name} {value}: it must be at least {least}.")


def _refuse_missing(flag: str, path: str | None) -> None:
    _refuse(path and not os.path.isfile(os.path.expanduser(path)), f"{flag} {path}: there is no such file.")


def _check_device(args: argparse.Namespace) -> None:
    _refuse(args.device == "cpu" and args.offload != "none",
            f"--offload {args.offload} moves weights between CPU and GPU: drop it, or drop --device cpu.")
    _refuse(args.gpu_memory_limit is not None and (args.device == "cpu" or args.gpu_memory_limit <= 0),
            f"--gpu_memory_limit {args.gpu_memory_limit}: it takes a positive number of GiB and needs --device cuda. "
            "Drop it on a CPU.")


def _check_techniques(args: argparse.Namespace) -> None:
    _refuse(args.disable_quant and (args.quant_dtype != "auto" or args.quant_granularity),
            "--disable_quant contradicts --quant_dtype and --quant_granularity: drop one or the other.")
    _refuse(args.quant_dtype == "int8" and args.quant_granularity == "tensor",
            "--quant_granularity tensor is for float8, and int8 is quantized per row. Drop one of the two flags.")
    _refuse(args.disable_fa3 and args.attention_backend,
            "--disable_fa3 stands for PyTorch's attention, and "
            f"--attention_backend {args.attention_backend} chooses one as well: drop one of the two.")
    asked, unpackaged = packages_asked_for(args), unpackaged_by_flag(args)
    _refuse(asked and args.compile_export_mode in ("compile", "disabled"),
            f"{asked} needs exported packages, which --compile_export_mode {args.compile_export_mode} neither exports "
            "nor loads: drop one of the two.")
    _refuse(args.re_export and (args.use_cached_model or args.package_from),
            "--use-cached-model and --package-from never export, and --re-export always does: drop one.")
    _refuse(asked and unpackaged, f"{asked} does not go with {' '.join(unpackaged or ())}: drop one of the two.")
    whole = args.compile_scope == "whole"
    _refuse(whole and args.compile_export_mode == "disabled",
            "--compile_scope whole contradicts --compile_export_mode disabled: nothing is compiled.")
    _refuse(whole and offloads_transformer(args),
            f"--offload {args.offload} hooks into the transformer, which then cannot be compiled as a whole: use "
            "--compile_scope blocks.")


def _check_step_cache(args: argparse.Namespace) -> None:
    cache = args.step_cache
    by_residuals = cache is not None and taylorseer_options(cache) is None
    _refuse(by_residuals and cache not in STEP_CACHES and not Path(cache).expanduser().is_file(),
            f"--step_cache {cache}: there is no such file. Give a yaml file, or one of {', '.join(STEP_CACHES)}.")
    _refuse(args.force_cache and not by_residuals,
            "--force_cache ignores the residuals of a step cache: add a cache that reads them, such as "
            "--step_cache fast.")
    _refuse(args.offload == "model" and cache,
            "--offload model removes its hooks after each image, and the step cache with them: use --offload text or "
            "--offload group.")
    _refuse(args.compile_scope == "whole" and by_residuals,
            f"--step_cache {cache} decides in Python between blocks, and --compile_scope whole compiles them as one: "
            "use --compile_scope blocks.")


def _check_processes(args: argparse.Namespace) -> None:
    processes = world_size()
    _refuse(args.interactive and (args.prompts_file or processes > 1),
            "--interactive reads its prompts from standard input, in one process: drop --prompts-file, accelerate "
            "launch and torchrun.")
    _refuse(processes > 1 and not (args.prompts_file or args.context_parallel),
            f"{processes} processes for one prompt: give many prompts with --prompts-file, split one image with "
            "--context_parallel auto, or start one process, without accelerate launch and torchrun.")
    if not args.context_parallel:
        return
    flag = f"--context_parallel {args.context_parallel}"
    _refuse(args.prompts_file, f"{flag} splits one image over the GPUs, and --prompts-file gives each GPU images of "
            "its own: drop one of the two.")
    _refuse(processes == 1, f"{flag} needs a process for each GPU: torchrun --nproc_per_node=2 "
            f"{Path(sys.argv[0]).name} {flag} ...")
    for other, is_given in ((f"--offload {args.offload}", args.offload != "none"),
                            ("--compile_scope whole", args.compile_scope == "whole")):
        _refuse(is_given, f"{other} does not go with {flag}: drop one of the two.")


def _check_inputs(args: argparse.Namespace) -> None:
    not_on_hub = args.random_weights or args.ckpt.startswith("tiny-") or Path(args.ckpt).expanduser().is_dir()
    _refuse(args.revision and not_on_hub,
            f"--revision {args.revision} names a revision on the Hub: drop it, or give a Hub id as --ckpt.")
    _refuse(args.random_weights and args.transformer,
            f"--transformer {args.transformer} gives weights, and --random_weights replaces them: drop one of the two.")
    _refuse_missing("--prompts-file", args.prompts_file)


def offloads_transformer(args: argparse.Namespace) -> bool:
    """Whether the transformer's weights move between CPU and GPU."""
    return args.offload in ("model", "group")


def t5_on_gpu(args: argparse.Namespace) -> bool:
    """Whether T5's weights stay on the GPU: only there can T5 be compiled, exported and recorded."""
    return args.offload == "none"


def packages_asked_for(args: argparse.Namespace) -> str | None:
    """The flag that asks for exported packages. Without a flag they are the default where they can be made."""
    given = {"--compile_export_mode export_aoti": args.compile_export_mode == "export_aoti",
             "--use-cached-model": args.use_cached_model, "--re-export": args.re_export,
             "--package-from": args.package_from}
    return next((flag for flag, is_given in given.items() if is_given), None)


def unpackaged_by_flag(args: argparse.Namespace) -> tuple[str, str] | None:
    """The flag that exported packages do not go with, and why."""
    backend = args.attention_backend or "native"
    given = {("--compile_scope whole", "(a package holds one kind of block)"): args.compile_scope == "whole",
             (f"--offload {args.offload}", "(it moves weights, whose addresses exported code holds)"):
                 offloads_transformer(args),
             (f"--context_parallel {args.context_parallel}", "(collectives are not exported)"): args.context_parallel,
             # Exported with _native_math on torch 2.13, a package called the flash kernel.
             (f"--attention_backend {backend}", "(torch.export forgets which of PyTorch's kernels was chosen)"):
                 backend != "native" and not backend.startswith(("fa3", "aiter"))}
    return next((flag for flag, is_given in given.items() if is_given), None)


def flags_over_quality(args: argparse.Namespace) -> list[str]:
    """The given flags that choose 8-bit formats, or may choose them, and so win over --quality."""
    return [f"--{name} {value}" for name in ("quant_dtype", "quant_granularity", "attention_backend")
            if (value := getattr(args, name)) not in (None, "auto")]


def computed_steps(steps: int, strength: float | None) -> int:
    """The number of denoising steps that are computed, with the rounding of diffusers' `get_timesteps`."""
    return steps if strength is None else steps - int(max(steps - min(steps * strength, steps), 0))


def steps_that_compute_two(strength: float | None) -> int:
    """The smallest --num_inference_steps of which two are computed."""
    return int(1 / (strength or 1)) + 1


def images_per_call(args: argparse.Namespace) -> int:
    """The batch of one pipeline call."""
    return (args.batch_size or 1) * args.num_images_per_prompt
