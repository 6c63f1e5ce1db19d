"""Times every kernel of the fused step at FLUX.1's shapes, and what else could do the same: results/NAME/kernels.json.

    python results/kernels.py h100    # on a Hopper GPU, about two minutes

For each: median milliseconds, the FLOPs and bytes that the work takes at least, what that makes a second, and the
relative error against float32. `alternative` rows are cuBLAS' products with the same factors, without what the fused
ones do besides: the choice between them in utils/fused_blocks.py was made from such a table. schnell's products and
attention also `sustained`: one after the other for a second, with the clock and the power meanwhile.
"""

import argparse
import sys
import time
from pathlib import Path

import torch

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

from utils import attention, fused_kernels  # noqa: E402
from utils.benchmark_utils import environment, write_json  # noqa: E402
from utils.gpu_load import watching_load  # noqa: E402
from utils.quality import relative_error  # noqa: E402

WIDTH, HEADS, MLP = 3072, 24, 12288
TOKENS = {"schnell": (256, 4096), "dev": (512, 4096), "kontext": (512, 8192)}  # text, image, at 1024x1024


def random_inputs(text: int, image: int, width: int, heads: int, mlp: int, device: str) -> dict:
    """What the kernels of one block are given, batch 1, of normal values: never zeros, which take less power."""
    generator = torch.Generator(device).manual_seed(0)

    def normal(*shape):
        return torch.randn(shape, generator=generator, device=device)

    def weight(rows, columns):
        return *fused_kernels.quantize_rows(0.02 * normal(rows, columns)), (0.1 * normal(rows)).bfloat16()

    def by_tensor(rows, columns):
        value = 0.02 * normal(rows, columns)
        scale = value.abs().amax() / fused_kernels.E4M3_MAX
        return (value / scale).to(fused_kernels.E4M3), scale, (0.1 * normal(rows)).bfloat16()

    tokens = text + image
    x, x_scale = fused_kernels.quantize_rows(normal(1, tokens, width))
    angle = 6 * normal(tokens, width // heads // 2)
    table = (0.3 * normal(1, 12 * width + 16)).bfloat16()  # 16: as aligned as the real one
    table[:, 12 * width:] = 100
    return {
        "text": normal(1, text, width).bfloat16(), "image": normal(1, image, width).bfloat16(),
        "y": normal(1, tokens, width).bfloat16(), "table": table,
        "offsets": torch.tensor([0, 6 * width, 12 * width, 12 * width + 2], device=device),
        "gates": torch.tensor([2 * width, 8 * width], device=device),
        "bounds": torch.full((2, 2 + 2 * heads), 1.1, device=device),
        "qk_scale": torch.tensor([0.03, 0.03], device=device),
        "x": x, "x_scale": x_scale, "cos": angle.cos().half(), "sin": angle.sin().half(),
        "norms": torch.ones(2, 3, width // heads, device=device),
        "descale": torch.full((1, 3, heads), 0.03, device=device),
        "scales": torch.full((3, 4), 0.02, device=device),
        "qkv": [weight(3 * width, width) for _ in range(2)], "up": [weight(mlp, width) for _ in range(2)],
        "out": [by_tensor(width, width) for _ in range(2)], "down": [by_tensor(width, mlp) for _ in range(2)],
        "single out": by_tensor(width, width + mlp),
        "hidden": fused_kernels.quantize_rows(normal(1, tokens, mlp))[0],
        "wide": fused_kernels.quantize_rows(normal(1, tokens, width + mlp))[0],
        "q": fused_kernels.quantize_rows(normal(3, 1, tokens, heads, width // heads))[0],
    }


def calls(given: dict) -> list[dict]:
    """Every kernel: its name, the block that it is of, the call, FLOPs and least bytes, and its reference's call."""
    k, text, image, x = fused_kernels, given["text"], given["image"], given["x"]
    tokens, width, mlp = x.shape[1], x.shape[2], given["hidden"].shape[2]
    t = text.shape[1]
    common = given["table"], given["offsets"], given["bounds"], given["qk_scale"]
    rope = given["cos"], given["sin"], given["descale"]

    def stacked(name, streams):
        return [torch.cat(parts) for parts in zip(*given[name][-streams:], strict=True)]

    def lists(name, streams):
        return [list(parts) for parts in zip(*given[name][-streams:], strict=True)]

    found = []

    def add(name, block, op, args, flops, size, room=0):
        found.append({"kernel": name, "block": block, "call": lambda: shown(op(*args), room), "flops": flops,
                      "bytes": size, "reference": lambda: shown(getattr(k, f"{op._name}_reference")(*args), room)})

    def shown(result, room):
        return result[..., room:] if room else result

    plane = tokens * width
    for block, streams in (("single", 1), ("double", 2)):
        joint = streams == 1
        if joint:
            add("residual_adaln", block, k.residual_adaln,
                (text, image, given["y"], given["gates"], *common, 0, 1, 0, joint), 0, 7 * plane)
        else:
            add("adaln", block, k.adaln, (text, image, *common, 0, 1, 0, joint), 0, 3 * plane)
        qkv = stacked("qkv", streams)
        add("qkv_product", block, k.qkv_product,
            (x, given["x_scale"], *qkv, given["norms"][-streams:], *rope, t, streams),
            6 * plane * width, 4 * plane + qkv[0].numel())
        up = stacked("up", streams)
        if joint:
            add("gelu_product", block, k.gelu_product, (x, given["x_scale"], *up, given["scales"], 0, 1, width),
                2 * plane * mlp, plane + tokens * mlp + up[0].numel(), room=width)
            out = [[part] for part in given["single out"]]
            add("products, out", block, k.products, (given["wide"], given["scales"], [0], *out, 0),
                2 * plane * (width + mlp), 3 * plane + tokens * mlp + out[0][0].numel())
        else:
            add("cast_attention", block, k.cast_attention, (given["y"], given["scales"]), 0, 3 * plane)
            add("products, attention's out", block, k.products,
                (x, given["scales"], [0, 0], *lists("out", 2), t), 2 * plane * width, 3 * plane + 2 * width**2)
            add("residual_adaln", block, k.residual_adaln,
                (text, image, given["y"], given["gates"], *common, 3, 4, 1, joint), 0, 7 * plane)
            add("gelu_product", block, k.gelu_product, (x, given["x_scale"], *up, given["scales"], t, 2, 0),
                2 * plane * mlp, plane + tokens * mlp + up[0].numel())
            add("products, MLP's down", block, k.products,
                (given["hidden"], given["scales"], [1, 2], *lists("down", 2), t), 2 * plane * mlp,
                2 * plane + tokens * mlp + 2 * width * mlp)
        add("gated_residual", block, k.gated_residual, (text, image, given["y"], given["gates"], given["table"]), 0,
            6 * plane)
    attended, hidden = (given["y"], given["scales"]), [torch.zeros_like(given["wide"]) for _ in range(2)]
    found.append({"kernel": "place_attention", "block": "single", "flops": 0, "bytes": 3 * plane,
                  "call": lambda: k.place_attention(*attended, hidden[0]) or hidden[0],
                  "reference": lambda: k.place_attention_reference(*attended, hidden[1]) or hidden[1]})
    q, key, v = given["q"]
    descale = given["descale"].unbind(1)
    found.append({"kernel": "attention", "block": "both", "flops": 4 * tokens * plane, "bytes": 5 * plane,
                  "call": lambda: attention.attention(q, key, v, *descale, "fa3"),
                  "reference": lambda: attention.reference_attention(q, key, v, *descale)})
    return found


def alternatives(given: dict) -> list[dict]:
    """cuBLAS' products of the same shapes, by row and by tensor, with bf16 results and nothing besides."""
    rows, one = given["x"].shape[1], torch.ones((), device=given["x"].device)
    shapes = {"qkv": ("x", given["qkv"][0]), "up": ("x", given["up"][0]), "down": ("hidden", given["down"][0]),
              "attention's out": ("x", given["out"][0]), "single out": ("wide", given["single out"])}
    found = []

    def add(name, kind, x, w, scales, bias):
        found.append({
            "kernel": f"cuBLAS by {kind}, {name}", "block": "alternative", "flops": 2 * rows * w.numel(),
            "bytes": x.numel() + w.numel() + 2 * rows * len(w), "reference": None,
            "call": lambda: torch._scaled_mm(x, w.t(), *scales, bias=bias, out_dtype=torch.bfloat16,
                                             use_fast_accum=True)})

    for name, (x, (w, _, bias)) in shapes.items():
        x = given[x].flatten(0, 1)
        add(name, "tensor", x, w, (one, one), bias)
        add(name, "row", x, w, (one.expand(rows, 1).contiguous(), one.expand(1, len(w)).contiguous()), bias)
    return found


def error_of(call: dict) -> float | None:
    """The largest relative error of any of a kernel's results against the reference's, in float32."""
    if call["reference"] is None:
        return None
    found, expected = ([x[:, :1] if x.shape == (3, 4) else x for x in (part if isinstance(part, tuple) else (part,))]
                       for part in (call["call"](), call["reference"]()))
    return max(relative_error(a.float(), b.float()) for a, b in zip(found, expected, strict=True))


def under_load(call, calls: int = 20) -> dict:
    """Milliseconds of one of many calls in a row, for 0.7 s after half a second of them; clock and power meanwhile."""
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
    with watching_load("cuda") as load:
        replayed(0.1)  # after nvidia-smi's start
        start = time.perf_counter()
        count = replayed(0.7)
        took = time.perf_counter() - start
    return {"ms": took / count / calls * 1e3} | load


def measure(call: dict, milliseconds, loaded: bool = False) -> dict:
    """The row of one kernel; `milliseconds` times a function. `loaded`: under load as well."""
    row = {name: call[name] for name in ("kernel", "block", "flops", "bytes")} | {"error": error_of(call)}
    row["ms"] = milliseconds(call["call"])
    if loaded and call["flops"]:
        row["sustained"] = under_load(call["call"])
    return row | {"tflops_per_s": row["flops"] / row["ms"] / 1e9, "tbytes_per_s": row["bytes"] / row["ms"] / 1e9}


def folder_of_arguments(doc: str) -> Path:
    """The folder below results/ that the command line names; ends the program where the fused kernels cannot run."""
    parser = argparse.ArgumentParser(description=doc.splitlines()[0])
    parser.add_argument("gpu", help="name of the folder below results/, such as h100")
    args = parser.parse_args()
    function, where = attention.find_library("fa3")
    if not torch.cuda.is_available() or torch.cuda.get_device_capability()[0] != 9 or function is None:
        parser.error(f"needs a Hopper GPU and FlashAttention-3 ({where or 'PyTorch sees no GPU'}).")
    attention.register_library("fa3", function)
    folder = ROOT / "results" / args.gpu
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def main():
    folder = folder_of_arguments(__doc__)
    fused_kernels.use_torch_memory(torch.device("cuda"))
    # In a CUDA graph, as in the step: launched one by one the small ones would take as long as Python takes.
    from triton.testing import do_bench_cudagraph

    models = {}
    for model, (text, image) in TOKENS.items():
        given = random_inputs(text, image, WIDTH, HEADS, MLP, "cuda")
        models[model] = []
        for call in calls(given) + alternatives(given):
            row = measure(call, lambda function: do_bench_cudagraph(function, rep=100, return_mode="median"),
                          loaded=model == "schnell")
            models[model].append(row)
            print(f"{model:8} {row['block']:12} {row['kernel']:32} {row['ms']:.4f} ms "
                  f"{row['tflops_per_s']:7.0f} TFLOP/s {row['tbytes_per_s']:5.2f} TB/s error {row['error']} "
                  f"{row.get('sustained', '')}", flush=True)
    write_json(str(folder / "kernels.json"), {"tokens": TOKENS, "kernels": models, "environment": environment("cuda")})


if __name__ == "__main__":
    main()
