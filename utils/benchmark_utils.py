"""What both scripts share: the command line, how they end, and what a measurement records. Nothing here touches a
model."""

import argparse
import atexit
import gc
import math
import os
import platform
import re
import statistics
import subprocess
import sys
import time
import traceback
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path

import torch

from utils import start

SCHEMA_VERSION = 1
DEFAULT_CACHE_DIR = str(start.default_cache_dir())
DEFAULT_CKPT = "black-forest-labs/FLUX.1-schnell"
IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")
STEP_CACHES = ("safe", "balanced", "fast", "extreme", "taylorseer", "f12b12")  # --step_cache's names


class RecipeError(Exception):
    """Something the user can put right. The scripts print its text as one paragraph and exit with `exit_code`."""

    exit_code = 2


class BrokenResult(RecipeError):
    """The pipeline ran, but its result is not a picture: NaN, or a single colour."""

    exit_code = 3


@contextmanager
def reading(what: str, cure: str):
    """The one boundary around code that reads somebody's file: whatever a library raises there becomes one paragraph.

    Args:
        what: the flag and the file, such as "--ckpt me/model: transformer/config.json".
        cure: a sentence that says what to do about it.

    Raises:
        RecipeError: in the place of every exception but another RecipeError and a lack of GPU memory.
    """
    try:
        yield
    except (RecipeError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        raise RecipeError(f"{what}: {reason_of(error)}. {cure}") from error


def reason_of(error: BaseException) -> str:
    """An exception in one line: its text, or its text behind its class where the text alone says nothing."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [""]
    # torch's and transformers' first line is often a heading, which ends in a colon.
    text = " ".join(lines[:2] if lines[0].endswith(":") else lines[:1]).rstrip(".")
    if isinstance(error, (KeyError, IndexError, AttributeError, TypeError, AssertionError)) or " " not in text:
        text = f"{type(error).__name__} {text}".strip()
    return text[:300]


def finite_float(text: str) -> float:
    """A number for argparse. Python's own `float` also takes nan and inf.

    Raises:
        argparse.ArgumentTypeError: the text is no number, or not a finite one.
    """
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise argparse.ArgumentTypeError(f"'{text}' is not a finite number")
    return value


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
        "channels_last, compile, CUDA graphs, GPU postprocess. Lossy: float8 and int8 quantisation, fp8 attention, "
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
    recipe.add_argument("--disable_quant", action="store_true", help="no quantisation of the transformer (lossy)")
    recipe.add_argument("--quant_dtype", choices=["auto", "float8", "int8"], default="auto",
                        help="dynamic quantisation: float8 from compute capability 8.9 and on MI300, else int8")
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
                        help="skip the check at the start, which compares two quantised steps with bf16's")
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


def exit_with_reason(main):
    """Runs a script's main. Whatever goes wrong becomes one paragraph and an exit code: 2 for what the user can put
    right, 3 for a broken result, 130 for Ctrl-C, 1 for a fault of this program. Tracebacks are for --debug."""
    code = 2
    try:
        start.hand_over()
        try:
            main()
        except SystemExit:  # argparse's, of --help
            sys.stdout.flush()
            raise
        sys.stdout.flush()  # here, where it may fail
        code = 0
    except RecipeError as error:
        _explain(error, str(error))
        code = error.exit_code
    except torch.OutOfMemoryError as error:
        _explain(error, f"out of GPU memory ({reason_of(error)}). What helps, in this order: "
                 "--text_encoder_quant, --vae_tiling, a smaller --batch_size or --num_images_per_prompt, a smaller "
                 "--height and --width, --offload text, --offload group.")
    except KeyboardInterrupt:
        start.take_back()
        print("interrupted", file=sys.stderr)
        code = 130
    except Exception as error:
        if isinstance(error, BrokenPipeError) and start.reader_has_gone():
            os._exit(141)  # of `| head`: as a program that SIGPIPE ends
        frame = traceback.extract_tb(error.__traceback__)[-1]
        _explain(error, f"{type(error).__name__}: {reason_of(error)} ({Path(frame.filename).name}:{frame.lineno}). "
                 "This is a fault of the program: --debug prints the traceback, which belongs into a report.")
        code = 1
    if torch.distributed.is_initialized():
        _end_among_others(code)
    if code:
        sys.exit(code)


def _explain(error: Exception, text: str) -> None:
    if "--debug" in sys.argv:
        traceback.print_exception(error)
    print(f"error: {text}", file=sys.stderr)


def _end_among_others(code: int) -> None:
    """Ends this process of several. Not the usual way, which waits: for the CUDA graphs that hold NCCL's communicator,
    and, after an error, for processes that wait for this one. torchrun sees the code and ends them."""
    if code == 0:
        torch.distributed.barrier()  # what others still read from this GPU stays until then
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def spare_the_garbage_collector() -> None:
    """Takes everything that exists by now out of Python's garbage collection, for processes that keep their pipeline.

    Half a million objects of modules and compilers never become garbage, and one full look at them takes 0.25 s.
    Python's share of a 1024x1024 image, all models replaced by stubs, fell from 14.7 to 9.6 ms (median, one CPU core).
    """
    gc.collect()
    gc.freeze()
    atexit.register(gc.unfreeze)  # or Triton 3.9 takes its own types for leaked, and says so at the end


class StageLog:
    """One line per stage with its seconds, on stderr; the seconds go into the JSON as well."""

    def __init__(self, quiet: bool = False):
        self.quiet = quiet
        self.seconds: dict[str, float] = {}

    @contextmanager
    def stage(self, name: str):
        start = time.perf_counter()
        yield
        self.seconds[name] = time.perf_counter() - start
        self.line(f"{name:<12} {self.seconds[name]:8.2f} s")

    def line(self, text: str) -> None:
        if not self.quiet:
            print(text, file=sys.stderr, flush=True)


def summarize(seconds: list[float]) -> dict:
    """Mean, variance (of the sample), median, min, max and the raw list, in seconds."""
    return {
        "mean": statistics.fmean(seconds),
        "variance": statistics.variance(seconds) if len(seconds) > 1 else 0.0,
        "median": statistics.median(seconds),
        "min": min(seconds),
        "max": max(seconds),
        "raw": seconds,
    }


def environment(device: str) -> dict:
    """Machine, driver, package versions, commit and command line: what a figure of `device` must be read with."""
    packages = ("torch", "triton", "diffusers", "transformers", "torchao", "cache-dit", "accelerate", "fa3-fwd",
                "flash-attn-3", "amd-aiter")
    found = {}
    for name in packages:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    processes = torch.distributed.get_world_size() if torch.distributed.is_initialized() else 1
    record = {"python": platform.python_version(), "platform": platform.platform(), "packages": found,
              "cuda": torch.version.cuda, "hip": torch.version.hip, "cpu_threads": torch.get_num_threads(),
              "commit": current_commit(),
              "processes": processes, "argv": list(map(_without_folder, sys.argv[1:])),
              "date": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())}
    if device == "cuda":
        properties = torch.cuda.get_device_properties(torch.cuda.current_device())
        # By its UUID: nvidia-smi counts all GPUs, PyTorch those of CUDA_VISIBLE_DEVICES.
        uuid = str(getattr(properties, "uuid", ""))
        smi = _output_of("nvidia-smi", f"--id=GPU-{uuid}",
                         "--query-gpu=driver_version,power.limit", "--format=csv,noheader")
        driver, _, power = (smi or "").partition(", ")
        record |= {"gpu": properties.name, "gpu_uuid": uuid or None, "gpu_memory_gib": properties.total_memory / 2**30,
                   "compute_capability": f"{properties.major}.{properties.minor}",
                   "driver": driver or None, "power_limit": power or None}
    return record


def _without_folder(arg: str) -> str:
    """An absolute path, or --flag=PATH, by its file's name: folders are of one machine."""
    return re.sub(r"^([^/]*=)?/.*/", r"\1", arg)


def current_commit() -> str | None:
    """$GIT_COMMIT, or git's, with "-dirty" where files differ from it, but for what measurements and reports write
    below results/."""
    if given := os.environ.get("GIT_COMMIT"):
        return given
    git, written = ("git", "-C", str(Path(__file__).parent.parent)), (":!results/*/*",)
    commit = _output_of(*git, "describe", "--always")
    changed = _output_of(*git, "status", "--porcelain", "--untracked-files=no", "--", ".", *written)
    return f"{commit}-dirty" if commit and changed else commit


def _output_of(*command: str) -> str | None:
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout.strip() or None
    except (OSError, subprocess.SubprocessError):
        return None


class PeakMemory:
    """Peak GPU memory in GiB of each phase: what tensors took, and what the allocator held for them."""

    def __init__(self):
        self.phases: dict[str, dict[str, float]] = {}
        self._reset()

    @staticmethod
    def _reset():
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()

    def end_of(self, phase: str) -> None:
        """Records the peak since the last phase ended."""
        if torch.cuda.is_available():
            self.phases[phase] = {"allocated_gib": torch.cuda.max_memory_allocated() / 2**30,
                                  "reserved_gib": torch.cuda.max_memory_reserved() / 2**30}
            self._reset()
