"""Measures a GPU's peak rates at FLUX.1's shapes: GEMMs and attention in TFLOP/s, copies in TB/s; medians.

    python -m bench.ceilings results/h100/2026-11/ceilings.json

The last line on stdout is the record as one JSON object.
"""

import argparse
import json

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from bench.environment import SCHEMA_VERSION, environment
from utils.attention import find_library
from utils.common import RecipeError, run_cli
from utils.hardware import gpu
from utils.output_checks import check_output
from utils.outputs import is_record, write_json, write_or_rescue

TOKENS, WIDTH, HEADS, HEAD_DIM = 4096 + 512, 3072, 24, 128  # a 1024x1024 image of FLUX.1-dev

# Input and output channels of the Linears that take most of a step's time.
SHAPES = {
    "q, k, v": (WIDTH, 3 * WIDTH), "MLP up": (WIDTH, 4 * WIDTH), "MLP down": (4 * WIDTH, WIDTH),
    "attention out": (WIDTH, WIDTH), "single block in": (WIDTH, 7 * WIDTH), "single block out": (5 * WIDTH, WIDTH),
}
COPY_BYTES = 2**30


def measure() -> dict:
    """Returns the record for results/<gpu>/ceilings.json. A rate is None if this GPU or installation cannot run it.

    Raises:
        RecipeError: there is no NVIDIA GPU, or Triton is missing.
    """
    if not torch.cuda.is_available() or torch.version.hip:
        raise RecipeError("bench.ceilings needs an NVIDIA GPU and a CUDA build of PyTorch.")
    try:
        from triton.testing import do_bench
    except ImportError as error:
        raise RecipeError("bench.ceilings needs Triton's timer: pip install triton") from error

    def rate(work: float, function) -> float | None:
        """Returns the rate in 10^12 units of `work` per second; None if the function fails here."""
        try:
            return work / do_bench(function, warmup=50, rep=300, return_mode="median") / 1e9
        except RuntimeError:
            return None

    found = {"matmul": {name: products(rate, TOKENS, k, n) for name, (k, n) in SHAPES.items()}
             | {"square, 8192": products(rate, 8192, 8192, 8192)}, "attention": attention(rate)}
    source = torch.empty(COPY_BYTES, dtype=torch.int8, device="cuda").random_()
    target = torch.empty_like(source)
    return {"schema_version": SCHEMA_VERSION, **found, "copy_tb_s": rate(2 * COPY_BYTES, lambda: target.copy_(source)),
            "environment": environment("cuda")}


def products(rate, m: int, k: int, n: int) -> dict[str, float | None]:
    """Returns the rates of a GEMM, (m, k) times (k, n): in bf16, and in e4m3 with per-tensor and per-row scales.

    Args:
        rate: `measure`'s timer, (work, function) -> rate.
    """
    a = torch.randn(m, k, device="cuda", dtype=torch.bfloat16)
    weight = torch.randn(n, k, device="cuda", dtype=torch.bfloat16) * 0.02
    work = 2.0 * m * k * n
    rates = {"bf16": rate(work, lambda: F.linear(a, weight)), "float8_tensor": None, "float8_row": None}
    if gpu().has_float8:
        a8, weight8 = a.to(torch.float8_e4m3fn), weight.to(torch.float8_e4m3fn)

        def scaled(*scales):
            return rate(work, lambda: torch._scaled_mm(a8, weight8.t(), *scales, out_dtype=torch.bfloat16,
                                                       use_fast_accum=True))

        rates["float8_tensor"] = scaled(*(torch.ones((), device="cuda") for _ in range(2)))
        rates["float8_row"] = scaled(torch.ones(m, 1, device="cuda"), torch.ones(1, n, device="cuda"))
    return rates


def attention(rate) -> dict[str, float | None]:
    """Returns the rate of attention over all heads of a 1024x1024 image, by backend.

    Args:
        rate: `measure`'s timer, (work, function) -> rate.
    """
    q, k, v = (torch.randn(1, HEADS, TOKENS, HEAD_DIM, device="cuda", dtype=torch.bfloat16) for _ in range(3))
    work, rates = 4.0 * HEADS * TOKENS**2 * HEAD_DIM, {}
    for name, backend in (("sdpa_flash", SDPBackend.FLASH_ATTENTION), ("sdpa_cudnn", SDPBackend.CUDNN_ATTENTION)):
        with sdpa_kernel(backend):
            rates[name] = rate(work, lambda: F.scaled_dot_product_attention(q, k, v))
    function, _ = find_library("fa3")
    parts = [x.transpose(1, 2).contiguous() for x in (q, k, v)]
    for name, dtype in (("fa3_bf16", torch.bfloat16), ("fa3_fp8", torch.float8_e4m3fn)):
        inputs = [x.to(dtype) for x in parts]
        rates[name] = rate(work, lambda inputs=inputs: function(*inputs)) if function else None
    return rates


def lines(record: dict) -> list[str]:
    """Returns the record as lines for people."""
    shown = [f"{name:<18}" + "".join(f"  {kind} {value:7.1f}" for kind, value in rates.items() if value)
             for name, rates in record["matmul"].items()]
    shown += [f"{name:<18}  {value:7.1f}" for name, value in record["attention"].items() if value]
    return ["TFLOP/s", *shown, f"copy {record['copy_tb_s']:.2f} TB/s"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("output_json", metavar="OUT.json", help="file for the record")
    parser.add_argument("--debug", action="store_true", help="also print an error's traceback")
    path = parser.parse_args().output_json
    check_output(path, "OUT.json", is_record)
    record = measure()
    error = write_or_rescue(lambda path: write_json(path, record, is_record), path, "record")
    print("\n".join([*lines(record), json.dumps(record)]))
    if error:
        raise error


if __name__ == "__main__":
    run_cli(main)
