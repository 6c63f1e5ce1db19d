"""Measures the README's tables: one fresh process a row, rows that are already there are left alone.

    python results/ladder.py h100                  # results/h100/<suite>/<row>.json, about 20 minutes on an H100
    python results/ladder.py h100 kontext --print  # only the commands

A row that fails prints the end of its output, and the others go on.
"""

import argparse
import shlex
import subprocess
import sys
import tempfile
from pathlib import Path

import PIL.Image

ROOT = Path(__file__).parent.parent

OFF = ["--disable_fused_projections", "--disable_channels_last", "--disable_fa3", "--disable_quant"]
EAGER = ["--compile_export_mode", "disabled", "--disable_cudagraphs", "--disable_gpu_postprocess"]
QUICK = ["--disable_inductor_tuning_flags"]
UNFUSED = ["--disable_fused_kernels"]
ATTENTION = ["--random_weights", "4+8", "--runs", "1", "--warmup", "0", "--disable_quant", "--attention_backend"]

# The float32 reference needs the unquantised model on the GPU.
WITHOUT_STEP_ERROR = ("memory_24gib",)

CKPTS = {name: f"black-forest-labs/FLUX.1-{full}" for name, full in
         (("schnell", "schnell"), ("dev", "dev"), ("kontext", "Kontext-dev"))}
RUNS = {"schnell": "10", "dev": "5", "kontext": "3"}

# From the plain pipeline upwards, each row with one technique more; then rows of their own.
ROWS = {
    "schnell": {
        "1_eager": EAGER + OFF,
        "2_compile": QUICK + OFF,
        "3_projections": QUICK + OFF[1:],
        "4_channels_last": QUICK + OFF[2:],
        "5_fa3": QUICK + OFF[3:],
        "6_float8": QUICK + UNFUSED,
        "7_flags": UNFUSED,
        "8_fused": [*QUICK, "--kernels"],
        "kernels_unfused": [*QUICK, *UNFUSED, "--kernels", "--runs", "1"],
        "attention_scaled": [*EAGER, *ATTENTION, "fa3"],
        "attention_unscaled": [*EAGER, *ATTENTION, "fa3_unscaled"],
        "memory_24gib": [*QUICK, "--text_encoder_quant", "--gpu_memory_limit", "24"],
    },
    "dev": {"1_eager": EAGER + OFF, "6_float8": QUICK + UNFUSED, "8_fused": QUICK},
    "kontext": {"1_eager": EAGER + OFF, "6_float8": QUICK + UNFUSED, "8_fused": QUICK},
}


def command(suite: str, row: str, output: Path, scratch: Path) -> list[str]:
    """The command line of one row, from the repository's root: results record it. Later flags win, so that a row may
    override what comes before its own."""
    flags = ["--ckpt", CKPTS[suite], "--random_weights", "--warmup", "1", "--runs", RUNS[suite],
             "--output-json", str(output), "--output-file", str(scratch / "image.png")]
    if row not in WITHOUT_STEP_ERROR:
        flags.append("--step_error")
    if suite == "kontext":
        flags += ["--image", str(scratch / "reference.png")]
    return [sys.executable, "run_benchmark.py", *flags, *ROWS[suite][row]]


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("gpu", help="name of the folder below results/, such as h100")
    parser.add_argument("suites", nargs="*", help=f"some of {', '.join(ROWS)}; all without")
    parser.add_argument("--print", action="store_true", help="print the commands and run nothing")
    args = parser.parse_args()
    if unknown := set(args.suites) - set(ROWS):
        parser.error(f"unknown suite {', '.join(sorted(unknown))}: choose from {', '.join(ROWS)}")

    failed = []
    with tempfile.TemporaryDirectory() as scratch:
        PIL.Image.effect_noise((1024, 1024), 100).convert("RGB").save(Path(scratch) / "reference.png")
        for suite in args.suites or ROWS:
            for row in ROWS[suite]:
                output = Path("results") / args.gpu / suite / f"{row}.json"
                if (ROOT / output).exists():
                    continue
                line = command(suite, row, output, Path(scratch))
                print(f"{suite}/{row}: {shlex.join(line[1:])}", flush=True)
                if not args.print and (done := subprocess.run(line, cwd=ROOT, capture_output=True,
                                                              text=True)).returncode:
                    failed.append(f"{suite}/{row}")
                    print("\n".join((done.stdout + done.stderr).splitlines()[-15:]), file=sys.stderr)
    if failed:
        sys.exit(f"failed: {', '.join(failed)}")


if __name__ == "__main__":
    main()
