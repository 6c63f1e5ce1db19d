"""Runs the ablation, one fresh process for each row, and generates the report.

    python experiments.py run h100                     # writes results/h100/<date>_<commit>/<suite>/<row>.json
    python experiments.py run h100 --suite schnell --rows '1_eager' 'without_*' --dry-run
    python experiments.py report                       # writes the pages' tables and the pictures in docs/images

Each result names its commit, so that `run` refuses uncommitted changes. If a row fails, its result has the reason, the
exit code and the end of the output, and the other rows continue.
"""

import argparse
import contextlib
import json
import os
import platform
import shlex
import signal
import subprocess
import sys
import tempfile
import time
from fnmatch import fnmatchcase
from pathlib import Path
from typing import NamedTuple

from bench.environment import SCHEMA_VERSION, current_commit
from bench.report import records
from utils.common import finite_float
from utils.outputs import write_json

ROOT = Path(__file__).parent

# Each of these flags turns one technique off.
FUSED = "--disable_fused_projections"
CHANNELS = "--disable_channels_last"
FA3 = "--disable_fa3"
QUANT = "--disable_quant"
VAE = "--disable_fused_vae"
OFF = [FUSED, CHANNELS, FA3, QUANT]
UNFUSED = ["--disable_fused_kernels", VAE]

NOT_COMPILED = ["--compile_export_mode", "disabled"]
EAGER = [*NOT_COMPILED, "--disable_cudagraphs", "--disable_gpu_postprocess", VAE]
# The scripts use packages by default. The rows use torch.compile, unless their flags say export_aoti.
COMPILE = ["--compile_export_mode", "compile"]
QUICK = ["--disable_inductor_tuning_flags", *COMPILE]
ATTENTION = ["--random_weights", "4+8", "--runs", "1", "--warmup", "0", "--disable_quant", "--attention_backend"]

CKPTS = {name: f"black-forest-labs/FLUX.1-{full}" for name, full in
         (("schnell", "schnell"), ("dev", "dev"), ("kontext", "Kontext-dev"))}
RUNS = {"schnell": "10", "dev": "5", "kontext": "5"}

# Each row adds one technique to the row before, from diffusers' own pipeline to the default.
LADDER = {
    "1_eager": [*EAGER, *OFF],
    "2_compile": [*QUICK, *OFF],
    "3_projections": [*QUICK, CHANNELS, FA3, QUANT],
    "4_channels_last": [*QUICK, FA3, QUANT, VAE],
    "5_fa3": [*QUICK, QUANT, VAE],
    "6_float8": [*QUICK, *UNFUSED],
    "7_flags": [*COMPILE, *UNFUSED],
    # The default recipe, except for the tuning flags: they only affect compiled blocks.
    "8_fused": QUICK,
}
ENDS = {row: LADDER[row] for row in ("1_eager", "5_fa3", "6_float8", "8_fused")}

# 8_fused without one technique, and without the techniques that need it.
WITHOUT = {
    "without_compile": [*QUICK, *NOT_COMPILED],
    "without_cudagraphs": [*QUICK, "--disable_cudagraphs"],
    "without_gpu_postprocess": [*QUICK, "--disable_gpu_postprocess"],
    "without_channels_last": [*QUICK, CHANNELS],
    "without_fused_vae": [*QUICK, VAE],
    "without_projections": [*QUICK, FUSED],
    "without_fused_kernels": [*QUICK, "--disable_fused_kernels"],
    "without_quant": [*QUICK, QUANT],
    "without_fa3": [*QUICK, FA3],
}
# The default is --quality fast.
GEARS = {f"quality_{name}": [*QUICK, "--quality", name] for name in ("high", "exact")}
PRESETS = ("safe", "balanced", "fast", "extreme")
# With random weights residuals are meaningless, so that these rows skip every step that the mask allows.
CACHES = {"cache_default": [*QUICK, "--force_cache", "--step_cache", "f12b12"]} | {
    f"cache_{name}": [*QUICK, "--force_cache", "--step_cache", name] for name in PRESETS} | {
    "cache_taylorseer": [*QUICK, "--step_cache", "taylorseer"]} | {
    f"cache_taylorseer_{interval}": [*QUICK, "--step_cache", f"taylorseer:{interval}"]
    for interval in "24"}
# The first row of each group repeats 6_float8: it shows the noise between two processes of one recipe.
FLOAT8 = {f"float8_{kind}": [*QUICK, *UNFUSED, "--quant_granularity", kind] for kind in ("row", "tensor")}
BACKENDS = {f"backend_{name.strip('_')}": [*QUICK, *UNFUSED, "--attention_backend", name]
            for name in ("fa3", "fa3_bf16", "_native_cudnn", "native")}
# Batch 1 at 1024x1024 is 8_fused, and 1_eager for diffusers' own pipeline.
BATCHES = {f"batch_{n}": [*QUICK, "--num_images_per_prompt", str(n)] for n in (2, 4, 8)} | {
    f"eager_batch_{n}": [*EAGER, *OFF, "--num_images_per_prompt", str(n), "--runs", "3"] for n in (2, 4, 8)}
SIZES = {f"size_{width}x{height}": [*QUICK, "--width", str(width), "--height", str(height)]
         for width, height in ((512, 512), (768, 768), (1536, 1024))}

# A cap on PyTorch's allocator stands for a smaller card.
CAP_24 = [*QUICK, "--text_encoder_quant", "--gpu_memory_limit", "24"]
CAP_16 = [*QUICK, "--text_encoder_quant", "--offload", "text", "--vae_tiling", "--gpu_memory_limit", "16"]
NO_HOPPER = ["--disable_fused_kernels", FA3]  # the recipe of cards with float8 other than Hopper
MEMORY = {
    "memory_24gib": CAP_24,
    "memory_16gib": CAP_16,
    "memory_8gib": [*QUICK, "--disable_quant", "--offload", "group", "--vae_tiling", "--gpu_memory_limit", "8",
                    "--runs", "3"],
    "memory_4gib": [*QUICK, "--text_encoder_quant", "--offload", "group", "--vae_tiling", "--gpu_memory_limit", "4",
                    "--runs", "3"],
    "memory_24gib_unfused": [*CAP_24, *NO_HOPPER],
    "memory_16gib_unfused": [*CAP_16, *NO_HOPPER],
}

# Cold starts: from process start to first image, with a cache folder for each row. Triton caches the fused kernels
# outside this folder.
OWN_CACHE = [*QUICK, "--cache-dir", "{scratch}/cache"]
PACKAGES = [*OWN_CACHE, "--compile_export_mode", "export_aoti"]
STARTS = {
    "start_compile": OWN_CACHE,
    "start_compile_again": OWN_CACHE,
    "start_export": PACKAGES,
    "start_packages": [*PACKAGES, "--use-cached-model"],
}
# The row that fills the cache folder first.
AFTER = {"start_compile_again": "start_compile", "start_packages": "start_export"}
# One image on several GPUs, under torchrun.
GPUS = {f"gpus_{kind}": [*QUICK, "--context_parallel", kind.partition("_")[2]]
        for kind in ("2_ulysses", "2_ring", "4_ulysses")}
CACHED_GPUS = {f"gpus_{count}_{name}": [*QUICK, "--context_parallel", "auto", *flags] for name, flags in (
    ("balanced", ["--force_cache", "--step_cache", "balanced"]), ("taylorseer", ["--step_cache", "taylorseer"]))
    for count in (2, 4)}

# tiny-flux's pictures, compared with `eager`. `float32` shows a harmless difference, and `other_seed` shows pictures
# that have only the prompt in common.
COMPILED = [*QUICK, FUSED, CHANNELS]
TINY = {
    "eager": [*EAGER, *OFF],
    "float32": [*EAGER, *OFF, "--disable_bf16"],
    "compile": [*COMPILED, FA3, QUANT],
    "export": [*COMPILED, FA3, QUANT, "--compile_export_mode", "export_aoti"],
    "projections": [*EAGER, CHANNELS, FA3, QUANT],
    "channels_last": [*EAGER, FUSED, FA3, QUANT],
    "fused_vae": [*NOT_COMPILED, "--disable_cudagraphs", "--disable_gpu_postprocess", FUSED, FA3, QUANT],
    "cudagraphs": [*NOT_COMPILED, *OFF],
    "int8": [*COMPILED, FA3, "--quant_dtype", "int8"],
    "float8_row": [*COMPILED, FA3, "--quant_dtype", "float8", "--quant_granularity", "row"],
    "float8_tensor": [*COMPILED, FA3, "--quant_dtype", "float8", "--quant_granularity", "tensor"],
    "fa3_bf16": [*EAGER, FUSED, CHANNELS, QUANT, "--attention_backend", "fa3_bf16"],
    "fa3_fp8": [*EAGER, FUSED, CHANNELS, QUANT, "--attention_backend", "fa3"],
    "fa3_fp8_unscaled": [*EAGER, FUSED, CHANNELS, QUANT, "--attention_backend", "fa3_unscaled"],
    "unfused": [*EAGER, CHANNELS, "--disable_fused_kernels", "--quant_dtype", "float8"],
    "fused": [*EAGER, CHANNELS, "--quant_dtype", "float8"],
    "text_encoder_quant": [*EAGER, *OFF, "--text_encoder_quant"],
    "cache": [*EAGER, *OFF, "--step_cache", "f12b12"],
    "cache_yaml": [*EAGER, *OFF, "--step_cache", "cache_config.yaml"],
} | {f"cache_{name}": [*EAGER, *OFF, "--step_cache", name] for name in PRESETS} | {
    f"taylorseer_{interval}": [*EAGER, *OFF, "--step_cache", f"taylorseer:{interval}"]
    for interval in "234"} | {
    # 24, 20, 16 and 13 steps compute about as many blocks of this model as the presets do.
    f"steps_{count}": [*EAGER, *OFF, "--num_inference_steps", str(count)] for count in (24, 20, 16, 14, 13)} | {
    "all_defaults": QUICK,
    **GEARS,
    "cache_defaults": [*QUICK, "--step_cache", "f12b12"],
    "other_seed": [*EAGER, *OFF, "--seed", "1000"],
}
# The row of the same recipe without its step cache, unless that row is the reference.
TWINS = {"cache_defaults": "all_defaults"}

ROWS = {
    "schnell": LADDER | {
        "8_fused": [*QUICK, "--kernels"],
        "kernels_unfused": [*QUICK, *UNFUSED, "--kernels", "--runs", "1"],
        "attention_scaled": [*EAGER, *ATTENTION, "fa3"],
        "attention_unscaled": [*EAGER, *ATTENTION, "fa3_unscaled"],
    } | GEARS | MEMORY | WITHOUT | FLOAT8 | BACKENDS | BATCHES | SIZES | STARTS | GPUS,
    "dev": LADDER | GEARS | MEMORY | WITHOUT | CACHES | FLOAT8 | GPUS | CACHED_GPUS,
    "kontext": ENDS | GEARS | WITHOUT | CACHES | GPUS | CACHED_GPUS,
    "tiny": TINY,
}

# Rows without --step_error: its float32 reference needs the unquantized model on the GPU and a step that computes every
# block, and it lengthens a cold start.
WITHOUT_STEP_ERROR = ("memory_", "cache_", "batch_", "eager_batch_", "start_")


def commands(gpu: str, suite: str, row: str, scratch: Path) -> list[list[str]]:
    """Returns the command lines of one row, in order, for the repository's root.

    The last command measures, and the result records it. Earlier commands draw the pictures that it compares with,
    unless they exist, or fill the cache that it starts from. Later flags override earlier ones.

    Args:
        gpu: the folder below results/.
        scratch: a folder for the commands' outputs.
    """
    output = scratch / "result.json"
    if suite == "tiny":
        def pictures(*flags: str, row: str) -> list[str]:
            return [sys.executable, "-m", "tiny_flux.pictures", *flags, "--", *TINY[row]]

        kept = {name: f"results/{gpu}/tiny/.reference/{name}.safetensors"
                for name in ("eager", TWINS.get(row)) if name}
        flags = ["--reference", kept["eager"], "--output-json", str(output), "--sheet", str(scratch / "sheet.webp")]
        if row in TWINS:
            flags += ["--twin", kept[TWINS[row]]]
        return [*(pictures("--keep", path, row=name) for name, path in kept.items()), pictures(*flags, row=row)]
    flags = ["--ckpt", CKPTS[suite], "--random_weights", "--warmup", "1", "--runs", RUNS[suite],
             "--output-json", str(output), "--output-file", str(scratch / "image.png")]
    if not row.startswith(WITHOUT_STEP_ERROR) and row not in CACHED_GPUS:
        flags.append("--step_error")
    if suite == "kontext":
        flags += ["--image", str(scratch / "reference.png")]
    launcher = (["-m", "torch.distributed.run", "--nproc_per_node", row.split("_")[1]] if row.startswith("gpus_")
                else [])
    return [[sys.executable, *launcher, "run_benchmark.py", *flags,
             *(flag.format(scratch=scratch) for flag in ROWS[suite][one])] for one in (AFTER.get(row), row) if one]


def choose(suites: list[str] | None, patterns: list[str] | None) -> list[tuple[str, str]]:
    """Returns the rows to measure, (suite, row), in the tables' order.

    Args:
        suites: names of `ROWS`; None for all.
        patterns: names or fnmatch patterns of rows; None for all.

    Raises:
        ValueError: a suite or a row does not exist. The message lists the choices.
    """
    if unknown := [name for name in suites or [] if name not in ROWS]:
        raise ValueError(f"--suite {', '.join(unknown)}: unknown suite. Choose from {', '.join(ROWS)}")
    rows = [(suite, row) for suite in ROWS if not suites or suite in suites for row in ROWS[suite]]
    for pattern in patterns or []:
        if not any(fnmatchcase(row, pattern) for _, row in rows):
            raise ValueError(f"--rows {pattern}: unknown row. Choose from "
                             f"{', '.join(dict.fromkeys(row for _, row in rows))}")
    return [(suite, row) for suite, row in rows if not patterns or any(fnmatchcase(row, one) for one in patterns)]


class Job(NamedTuple):
    """One row to measure. `path` is the file for its result."""
    name: str
    suite: str
    row: str
    path: Path


GRACE_S = 40.0  # torchrun waits 30 s for its workers


def execute(command: list[str], timeout: float) -> tuple[int | None, str]:
    """Runs a command in the repository's root. A timeout or Ctrl-C ends the command's children as well.

    Args:
        timeout: in seconds.

    Returns:
        The exit code, None after a timeout, and the output.
    """
    with tempfile.TemporaryFile() as output:
        process = subprocess.Popen(command, cwd=ROOT, stdin=subprocess.DEVNULL, stdout=output,
                                   stderr=subprocess.STDOUT, start_new_session=True)
        try:
            code = process.wait(timeout)
        except subprocess.TimeoutExpired:
            code = None
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGTERM)  # torchrun then ends its workers; after SIGKILL they would live
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(GRACE_S)
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
                process.wait()
        output.seek(0)
        return code, output.read().decode(errors="replace")


def reason(code: int | None, output: str) -> str:
    """Returns why a process failed, in a few words.

    Args:
        code: the exit code; None after a timeout.
        output: of stdout and stderr.
    """
    if not code:
        return "timeout" if code is None else "no result"
    if "out of GPU memory" in output or "OutOfMemoryError" in output:
        return "out of memory"
    if code < 0:
        return f"killed by {signal.Signals(-code).name}"
    return "refused" if code == 2 and "error: " in output else "crash"


def outcome(line: list[str], code: int | None, output: str, scratch: Path, timeout: float, seconds: float) -> dict:
    """Returns a row's result: the record that its last command `line` wrote, or a record of the failure.

    Args:
        code: the command's exit code; None after a timeout.
        scratch: the folder with result.json.
        timeout: in seconds.
        seconds: the wall time of all commands.
    """
    result = scratch / "result.json"
    if code != 0 or not result.exists():
        return {"schema_version": SCHEMA_VERSION, "error": reason(code, output), "exit_code": code,
                "timeout_s": timeout, "wall_s": seconds,
                "output_end": output.replace(str(ROOT), ".").splitlines()[-15:],
                "environment": {"argv": line[1:], "platform": platform.platform(),
                                "date": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())}}
    return json.loads(result.read_text()) | {"wall_s": seconds}


def measure(lines: list[list[str]], scratch: Path, timeout: float) -> dict:
    """Runs a row's commands in order until one fails, and returns the row's result.

    Args:
        scratch: the folder with result.json.
        timeout: of all commands together, in seconds.
    """
    start = time.monotonic()
    for line in lines:
        (scratch / "result.json").unlink(missing_ok=True)  # an earlier command's result does not count
        code, output = execute(line, max(1.0, timeout - (time.monotonic() - start)))
        if code != 0:
            break
    return outcome(line, code, output, scratch, timeout, time.monotonic() - start)


def where(folder: Path, row: str, resume: bool) -> Path | None:
    """Returns the path for the row's result; None if `resume` and the row has succeeded.

    With `resume` a failed result is overwritten. Otherwise no result is ever overwritten.

    Args:
        folder: of this commit and suite.
    """
    if resume and records.newest(folder, row):
        return None
    before = records.attempts(folder, row)
    failed = before and "error" in json.loads(before[-1].read_text())
    return before[-1] if resume and failed else records.next_path(folder, row)


def folder_of(gpu: str, commit: str | None, resume: bool) -> Path:
    """Returns today's folder results/<gpu>/<date>_<commit>/; with `resume` the newest folder of this commit, if any."""
    before = sorted((records.RESULTS / gpu).glob(f"*_{commit}"))
    today = records.RESULTS / gpu / f"{time.strftime('%Y-%m-%d', time.gmtime())}_{commit}"
    return before[-1] if resume and before else today


def lines_of(job: Job, gpu: str, scratch: Path) -> list[list[str]]:
    """Returns the commands of a row, and writes their inputs into the scratch folder."""
    scratch.mkdir(exist_ok=True)
    if job.suite == "kontext":
        import numpy as np
        import PIL.Image

        noise = np.random.default_rng(0).integers(0, 256, (1024, 1024, 3), np.uint8)
        PIL.Image.fromarray(noise).save(scratch / "reference.png")
    return commands(gpu, job.suite, job.row, scratch)


def run(args) -> int:
    """Measures the rows of `args.chosen`. Ctrl-C and SIGTERM end the current row's processes.

    Returns:
        The exit code: 0, 1 if a row failed, 130 after Ctrl-C or SIGTERM.
    """
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    folder = folder_of(args.gpu, current_commit(), args.resume)
    todo = [(suite, row, path) for suite, row in args.chosen if (path := where(folder / suite, row, args.resume))]
    jobs = [Job(f"[{number}/{len(todo)}] {suite}/{row}", suite, row, path)
            for number, (suite, row, path) in enumerate(todo, 1)]
    print(f"{len(jobs)} of {len(args.chosen)} rows to measure", flush=True)
    if args.dry_run:
        return show(jobs, args.gpu)
    failed, done, start = [], 0, time.monotonic()
    try:
        with tempfile.TemporaryDirectory() as folder:
            scratch = left_by = None
            for done, job in enumerate(jobs):
                # A row of AFTER uses the cache of the row just measured, if that is the row it needs.
                goes_on = left_by == (job.suite, AFTER.get(job.row))
                scratch = scratch if goes_on else Path(folder, str(done))
                lines = lines_of(job, args.gpu, scratch)
                record = measure(lines[-1:] if goes_on else lines, scratch, args.timeout)
                save(job, record, scratch)
                left_by = None if "error" in record else (job.suite, job.row)
                left = len(jobs) - done - 1
                print(f"{job.name}: {summary(record)}, {record['wall_s']:.0f} s; {left} left, about "
                      f"{left * (time.monotonic() - start) / (done + 1) / 60:.0f} min", flush=True)
                if "error" in record:
                    failed.append(f"{job.suite}/{job.row}")
                    print("\n".join(f"    {line}" for line in record["output_end"]), file=sys.stderr)
    except KeyboardInterrupt:
        print(f"interrupted after {done} rows, whose results are saved; --resume measures the rest", file=sys.stderr)
        return 130
    if failed:
        print(f"failed: {', '.join(failed)}", file=sys.stderr)
    return 1 if failed else 0


def show(jobs: list[Job], gpu: str) -> int:
    """Prints the command that measures each row. Returns the exit code 0."""
    with tempfile.TemporaryDirectory() as folder:
        for job in jobs:
            line = lines_of(job, gpu, Path(folder))[-1]
            print(f"{job.name} -> {job.path.relative_to(records.RESULTS.parent)}: {shlex.join(line[1:])}")
    return 0


def save(job: Job, record: dict, scratch: Path) -> None:
    """Writes a row's result, and its strip of pictures, if any, as <row>.webp in the same folder."""
    job.path.parent.mkdir(parents=True, exist_ok=True)
    write_json(str(job.path), {"suite": job.suite, "row": job.row} | record)
    if (scratch / "sheet.webp").exists() and "error" not in record:
        job.path.with_suffix(".webp").write_bytes((scratch / "sheet.webp").read_bytes())


def summary(record: dict) -> str:
    """Returns the main figure of a result for the progress line."""
    if "error" in record:
        return record["error"]
    if "given" in record:
        return f"PSNR {record['given']['psnr_mean']:.1f} and {record['open']['psnr_mean']:.1f} dB"
    return f"median {record['seconds']['median']:.3f} s an image"


def report(args) -> int:
    """Writes the pages' tables and pictures.

    Returns:
        The exit code: 0, or 1 if --check finds a page or a picture out of date.
    """
    from bench.report import charts, tables
    stale = tables.stale() | charts.stale()
    if args.check:
        for path in stale:
            print(f"{path.relative_to(ROOT)} does not match results/: run python experiments.py report",
                  file=sys.stderr)
        return 1 if stale else 0
    for path, content in (stale | charts.contact_sheets()).items():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
        print(f"wrote {path.relative_to(ROOT)}, {len(content) / 1000:.0f} kB")
    return 0


def refuse_unknown_code(parser: argparse.ArgumentParser) -> None:
    """Exits with an error unless the working tree matches a known commit."""
    commit = current_commit()
    if commit is None:
        parser.error("the commit is unknown, and every result must name its commit. Run this in a git clone, or set "
                     "GIT_COMMIT. --dry-run only shows the commands.")
    if commit.endswith("-dirty"):
        parser.error(f"files differ from the commit ({commit}), so that no commit would have the measured code. Commit "
                     "first. --dry-run only shows the commands.")


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    actions = parser.add_subparsers(required=True)

    runs = actions.add_parser("run", help="measure rows, one fresh process for each")
    runs.add_argument("gpu", help="name of the folder below results/, such as h100")
    runs.add_argument("--suite", nargs="+", help=f"suites to measure: {', '.join(ROWS)} (all)")
    runs.add_argument("--rows", nargs="+", metavar="ROW",
                      help="rows to measure, by name or pattern, such as 'without_*' (all)")
    runs.add_argument("--dry-run", action="store_true", help="print the commands and run nothing")
    runs.add_argument("--resume", action="store_true",
                      help="skip rows that this commit has finished, and repeat failed rows; without this flag a "
                      "finished row is measured again and saved as ROW.2.json")
    runs.add_argument("--timeout", type=finite_float, default=1800, metavar="S",
                      help="time limit of a row in seconds (1800)")
    runs.set_defaults(action=run)

    reports = actions.add_parser("report", help="write the pages' tables and pictures from results/")
    reports.add_argument("--check", action="store_true",
                         help="write nothing; exit with code 1 if a page or a picture is out of date")
    reports.set_defaults(action=report)

    args = parser.parse_args(argv)
    if args.action is run:
        try:
            args.chosen = choose(args.suite, args.rows)
        except ValueError as error:
            runs.error(str(error))
        if not args.dry_run:
            refuse_unknown_code(runs)
    return args.action(args)


if __name__ == "__main__":
    sys.exit(main())
