"""Times every kernel of the fused step at FLUX.1's shapes, and cuBLAS' GEMMs. Writes results/NAME/kernels.json.

    python -m bench.kernels h100    # on a Hopper GPU, about three minutes

Each row has the median milliseconds, the least FLOPs and bytes of the work, the rates that follow, and the relative
error against float32. `alternative` rows are cuBLAS' GEMMs with the same operands, without the fused kernels' other
work. utils/kernels/fused_blocks.py chose its kernels by this table. schnell's GEMMs and attention also have `sustained`
times: they run back to back for a second, with the GPU's clock and power.
"""

import argparse
import time
from pathlib import Path

import torch

from bench.environment import environment, monitor_gpu
from utils import attention
from utils.fp8_check import relative_error
from utils.kernels import casts, gemm, int8_gemm, layer_norm
from utils.kernels.formats import E4M3_MAX, quantize_rows, use_torch_memory
from utils.outputs import write_json

ROOT = Path(__file__).parent.parent
WIDTH, HEADS, MLP = 3072, 24, 12288
REFERENCES = vars(layer_norm) | vars(casts) | vars(gemm) | vars(int8_gemm)
TOKENS = {"schnell": (256, 4096), "dev": (512, 4096), "kontext": (512, 8192)}  # text, image, at 1024x1024


def random_inputs(text: int, image: int, width: int, heads: int, mlp: int, device: str, int8: bool = False) -> dict:
    """Returns the inputs of one block's kernels at batch 1, with normal values: zeros would take less power.

    Args:
        text, image: tokens.
        width: channels D.
        mlp: neurons of the MLP.
        int8: whether the operands of GEMMs are int8, or else e4m3.
    """
    generator = torch.Generator(device).manual_seed(0)

    def normal(*shape):
        return torch.randn(shape, generator=generator, device=device)

    def weights(rows, columns):
        return *quantize_rows(0.02 * normal(rows, columns), int8=int8), (0.1 * normal(rows)).bfloat16()

    tokens = text + image
    x, x_scale = quantize_rows(normal(1, tokens, width), int8=int8)
    lengths = x_scale * x.float().norm(dim=-1)
    angle = 6 * normal(tokens, width // heads // 2)
    table = 0.3 * normal(1, 12 * width)
    for scale in (1, 4, 7, 10):
        table[:, scale * width:(scale + 1) * width] += 1
    return {
        "text": normal(1, text, width).bfloat16(), "image": normal(1, image, width).bfloat16(),
        "y": normal(1, tokens, width).bfloat16(), "y_scale": 1 + 0.1 * normal(1, tokens),
        "bias": normal(2, width).bfloat16(), "table": table.bfloat16(),
        "offsets": torch.tensor([0, 6 * width], device=device),
        "gates": torch.tensor([2 * width, 8 * width], device=device),
        # The norm of a random weight row, so that the scales are realistic.
        "bounds": torch.full((2, 2 + 2 * heads), 0.02 * width**0.5, device=device),
        "qk_scale": torch.tensor([0.03, 0.03], device=device),
        "x": x, "x_scale": x_scale, "lengths": lengths, "cos": angle.cos().half(), "sin": angle.sin().half(),
        "scale": 0.02 * width**0.5 * (1 + lengths) / E4M3_MAX,
        "columns": torch.exp2(0.5 * normal(2 * mlp)), "one": torch.ones((), device=device),
        "norms": torch.ones(2, 3, width // heads, device=device),
        "descale": torch.full((1, 3, heads), 0.03, device=device),
        "qkv": weights(6 * width, width), "up": weights(2 * mlp, width), "attention's out": weights(2 * width, width),
        "down": weights(2 * width, mlp), "single out": weights(width, width + mlp),
        "hidden": quantize_rows(normal(1, tokens, mlp), int8=int8)[0],
        "wide": quantize_rows(normal(1, tokens, width + mlp), int8=int8)[0],
        "q": normal(3, 1, tokens, heads, width // heads).bfloat16(),
    }


def kernel_call(name: str, block: str, op, args: tuple, flops: int, size: int, **named) -> dict:
    """Returns a kernel's name, block, call, FLOPs, least bytes, and its reference's call.

    A call returns the list of its results, with `hidden` if the kernel writes into it.

    Args:
        size: the least bytes.
        args, named: arguments of the op.
    """
    def results(function, named):
        outputs = function(*args, **named)
        outputs = outputs if isinstance(outputs, tuple) else () if outputs is None else (outputs,)
        return [*outputs, *(named[name] for name in named if name == "hidden")]

    if "hidden" in named:
        named["hidden"] = torch.zeros_like(named["hidden"])
    reference = REFERENCES[f"{op._name}_reference"]
    again = {name: x.clone() if name == "hidden" else x for name, x in named.items()}
    return {"kernel": name, "block": block, "flops": flops, "bytes": size, "call": lambda: results(op, named),
            "reference": lambda: results(reference, again)}


def calls(given: dict) -> list[dict]:
    """Returns the `kernel_call` of every kernel of the e4m3 blocks.

    Args:
        given: from `random_inputs`.
    """
    x, hidden, wide = given["x"], given["hidden"], given["wide"]
    both, rope = (given["text"], given["image"]), (given["cos"], given["sin"], given["qk_scale"])
    modulation = given["table"], given["offsets"], given["bounds"]
    t, width, mlp, plane = given["text"].shape[1], x.shape[2], hidden.shape[2], x.numel()
    found = []

    def add(*args, **named):
        found.append(kernel_call(*args, **named))

    def product(name, block, x, w, streams):
        add(f"fp8_gemm, {name}", block, gemm.fp8_gemm, (x, w, given["one"], t, streams), 2 * plane * x.shape[2],
            x.numel() + 2 * plane + w.numel())

    for block, streams in (("single", 1), ("double", 2)):
        qkv, up = ([part[-streams * rows:] for part in given[name]] for name, rows in (("qkv", 3 * width), ("up", mlp)))
        deferred = given["y"], given["y_scale"], given["bias"][:streams].expand(2, -1), given["gates"]
        if block == "single":
            add("residual_adaln", block, layer_norm.residual_adaln, (*both, *deferred, *modulation, 0, 1), 0, 7 * plane)
        else:
            add("adaln", block, layer_norm.adaln, (*both, *modulation, 0, 1), 0, 3 * plane)
        add("qkv_gemm", block, gemm.qkv_gemm,
            (x, given["x_scale"], *qkv, given["norms"][-streams:], *rope, given["lengths"], modulation[2], t, streams),
            6 * plane * width, 4 * plane + qkv[0].numel())
        if block == "single":
            add("place_attention", block, casts.place_attention, (given["y"], given["scale"]), 0, 3 * plane,
                hidden=wide)
        else:
            add("cast_attention", block, casts.cast_attention, (given["y"],), 0, 3 * plane)
            product("attention's out", block, x, given["attention's out"][0], 2)
            add("residual_adaln", block, layer_norm.residual_adaln, (*both, *deferred, *modulation, 3, 4), 0, 7 * plane)
        add("gelu_gemm", block, gemm.gelu_gemm,
            (x, given["x_scale"], *up, given["columns"][-streams * mlp:], given["scale"]), 2 * plane * mlp,
            plane + hidden.numel() + up[0].numel(), hidden=wide if block == "single" else hidden, text_tokens=t,
            streams=streams)
        if block == "single":
            product("out", block, wide, given["single out"][0], 1)
        else:
            product("MLP's down", block, hidden, given["down"][0], 2)
        add("gated_residual", block, layer_norm.gated_residual, (*both, *deferred, given["table"]), 0, 6 * plane)
    q, key, v = quantize_rows(given["q"])[0]
    descale = given["descale"].unbind(1)
    found.append({"kernel": "attention", "block": "both", "flops": 4 * x.shape[1] * plane, "bytes": 5 * plane,
                  "call": lambda: [attention.attention(q, key, v, *descale, "fa3")],
                  "reference": lambda: [attention.reference_attention(q, key, v, *descale)]})
    return found


def int8_calls(given: dict) -> list[dict]:
    """Returns the `kernel_call` of every kernel that the e4m3 blocks lack.

    Args:
        given: from `random_inputs`, in int8.
    """
    x, hidden, wide, y = given["x"], given["hidden"], given["wide"], given["y"]
    t, width, mlp, plane = given["text"].shape[1], x.shape[2], hidden.shape[2], x.numel()
    zero_point, activated = torch.full_like(given["x_scale"], -100), hidden.bfloat16()
    found = []

    def add(*args):
        found.append(kernel_call(*args))

    def cast(name, block, *parts):
        add(name, block, casts.cast_int8, parts, 0, 3 * sum(part.numel() for part in parts if part is not None))

    def product(name, block, x, weights, streams):
        w, scale, _ = weights
        add(f"int8_gemm, {name}", block, int8_gemm.int8_gemm,
            (x, zero_point, w, scale, w.sum(1, dtype=torch.float32), t, streams), 2 * plane * x.shape[2],
            x.numel() + 2 * plane + w.numel())

    for block, streams in (("single int8", 1), ("double int8", 2)):
        qkv, up = ([part[-streams * rows:] for part in given[name]] for name, rows in (("qkv", 3 * width), ("up", mlp)))
        add("int8_qkv_gemm", block, int8_gemm.int8_qkv_gemm,
            (x, given["x_scale"], *qkv, given["norms"][-streams:], given["cos"], given["sin"], t, streams),
            6 * plane * width, 7 * plane + qkv[0].numel())
        add("int8_gelu_gemm", block, int8_gemm.int8_gelu_gemm,
            (x, given["x_scale"], *up, given["columns"][-streams * mlp:], t, streams), 2 * plane * mlp,
            plane + 2 * hidden.numel() + up[0].numel())
        if block == "single int8":
            cast("cast_int8", block, y, activated)
            product("out", block, wide, given["single out"], 1)
        else:
            cast("cast_int8, attention", block, y, None)
            product("attention's out", block, x, given["attention's out"], 2)
            cast("cast_int8, MLP", block, None, activated)
            product("MLP's down", block, hidden, given["down"], 2)
    qkv = *given["q"], None, None, None
    found.append({"kernel": "attention, bf16", "block": "both int8", "flops": 4 * x.shape[1] * plane,
                  "bytes": 8 * plane, "call": lambda: [attention.attention(*qkv, "fa3")],
                  "reference": lambda: [attention.reference_attention(*qkv)]})
    return found


def alternatives(given: dict) -> list[dict]:
    """Returns cuBLAS' GEMMs of the same shapes, with per-row and per-tensor scales, a bias and bf16 results.

    Args:
        given: from `random_inputs`.
    """
    rows, one = given["x"].shape[1], given["one"]
    shapes = {"qkv": "x", "up": "x", "down": "hidden", "attention's out": "x", "single out": "wide"}
    found = []

    def add(name, kind, x, w, scales, bias):
        found.append({
            "kernel": f"cuBLAS by {kind}, {name}", "block": "alternative", "flops": 2 * rows * w.numel(),
            "bytes": x.numel() + w.numel() + 2 * rows * len(w), "reference": None,
            "call": lambda: torch._scaled_mm(x, w.t(), *scales, bias=bias, out_dtype=torch.bfloat16,
                                             use_fast_accum=True)})

    for name, x in shapes.items():
        x, (w, _, bias) = given[x].flatten(0, 1), given[name]
        if name != "single out":
            w, bias = w.chunk(2)[1], bias.chunk(2)[1]  # of the image stream
        add(name, "tensor", x, w, (one, one), bias)
        add(name, "row", x, w, (one.expand(rows, 1).contiguous(), one.expand(1, len(w)).contiguous()), bias)
    return found


def error_of(call: dict) -> float | None:
    """Returns the largest relative error of a kernel's results against its reference, in float32; None without one."""
    if call["reference"] is None:
        return None
    return max(relative_error(a.float(), b.float()) for a, b in zip(call["call"](), call["reference"](), strict=True))


def under_load(call, calls: int = 20) -> dict:
    """Times back-to-back calls for 0.7 s, after half a second of warm-up.

    Args:
        call: the function to time.
        calls: calls in one CUDA graph.

    Returns:
        "ms" of one call, and the GPU's clock and power from `monitor_gpu`.
    """
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(calls):
            call()

    def replayed(seconds: float) -> int:
        count, end = 0, time.perf_counter() + seconds
        while time.perf_counter() < end:
            for _ in range(4):
                graph.replay()
            count += 4
            torch.cuda.synchronize()
        return count

    replayed(0.5)
    with monitor_gpu("cuda") as load:
        replayed(0.1)  # the GPU was idle while nvidia-smi started
        start = time.perf_counter()
        count = replayed(0.7)
        took = time.perf_counter() - start
    return {"ms": took / count / calls * 1e3} | load


def measure(call: dict, milliseconds, loaded: bool = False) -> dict:
    """Returns the row of one kernel.

    Args:
        call: of `calls` or `alternatives`.
        milliseconds: times a function.
        loaded: whether to time it under load as well.
    """
    row = {name: call[name] for name in ("kernel", "block", "flops", "bytes")} | {"error": error_of(call)}
    row["ms"] = milliseconds(call["call"])
    if loaded and call["flops"]:
        row["sustained"] = under_load(call["call"])
    return row | {"tflops_per_s": row["flops"] / row["ms"] / 1e9, "tbytes_per_s": row["bytes"] / row["ms"] / 1e9}


def folder_of_arguments(doc: str) -> Path:
    """Returns the folder below results/ that the command line names. Exits if the fused kernels cannot run here.

    Args:
        doc: the module's docstring.
    """
    parser = argparse.ArgumentParser(description=doc.splitlines()[0])
    parser.add_argument("gpu", help="name of the folder below results/, such as h100")
    args = parser.parse_args()
    function, where = attention.find_library("fa3")
    if not torch.cuda.is_available() or torch.cuda.get_device_capability()[0] != 9 or function is None:
        parser.error(f"the fused kernels need a Hopper GPU and FlashAttention-3 ({where or 'PyTorch sees no GPU'}).")
    attention.register_library("fa3", function)
    folder = ROOT / "results" / args.gpu
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def main():
    folder = folder_of_arguments(__doc__)
    use_torch_memory(torch.device("cuda"))
    # A CUDA graph, as in the step: without it small kernels would take as long as Python takes to launch them.
    from triton.testing import do_bench_cudagraph

    models = {}
    for model, (text, image) in TOKENS.items():
        given, in_int8 = (random_inputs(text, image, WIDTH, HEADS, MLP, "cuda", int8) for int8 in (False, True))
        models[model] = []
        for call in calls(given) + int8_calls(in_int8) + alternatives(given):
            row = measure(call, lambda function: do_bench_cudagraph(function, rep=100, return_mode="median"),
                          loaded=model == "schnell")
            models[model].append(row)
            print(f"{model:8} {row['block']:12} {row['kernel']:32} {row['ms']:.4f} ms "
                  f"{row['tflops_per_s']:7.0f} TFLOP/s {row['tbytes_per_s']:5.2f} TB/s error {row['error']} "
                  f"{row.get('sustained', '')}", flush=True)
    write_json(str(folder / "kernels.json"), {"tokens": TOKENS, "kernels": models, "environment": environment("cuda")})


if __name__ == "__main__":
    main()
