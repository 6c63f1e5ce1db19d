"""Generates the pages' tables from the JSON files in results/, so that no figure is typed by hand.

`python experiments.py report` rewrites the text between a marker, such as `<!-- results:h100/dev -->`, and the next
`<!-- end -->`, in README.md, tiny_flux/README.md and docs/*.md.
"""

import json
import re
import statistics
from datetime import datetime
from pathlib import Path

from bench.report.records import RESULTS, ROOT, attempts, beside, current, newest

MARKERS = re.compile(r"(<!-- (\w+):(\S+) -->\n).*?(<!-- end -->)", re.DOTALL)

NAMES = {
    "1_eager": "bf16, eager (diffusers)",
    "2_compile": "+ compile, CUDA graphs, GPU postprocess",
    "3_projections": "+ fused projections",
    "4_channels_last": "+ channels_last",
    "5_fa3": "+ FA3, fp8 scaled",
    "6_float8": "+ float8, per-row scales",
    "7_flags": "+ inductor flags",
    "8_fused": "float8 as above, + fused VAE, fused kernels (default)",
    "memory_24gib": "24 GiB cap: float8, T5 in int8",
    "memory_16gib": "16 GiB cap: float8, T5 in int8, T5 streamed from CPU memory, tiled VAE",
    "memory_8gib": "8 GiB cap: bf16, not compiled, every layer streamed, tiled VAE",
    "memory_4gib": "4 GiB cap: float8, T5 in int8, not compiled, every layer streamed, tiled VAE",
    "memory_24gib_unfused": "24 GiB cap: float8, T5 in int8, without the Hopper kernels",
    "memory_16gib_unfused": "16 GiB cap: float8, T5 in int8, T5 streamed from CPU memory, tiled VAE, without the "
                            "Hopper kernels",
}

CACHES = {f"cache_{name}": f"step cache, {name}" for name in ("safe", "balanced", "fast", "extreme")}
TAYLORSEER = {interval: f"TaylorSeer, every {which} step computed"
              for interval, which in ((2, "second"), (3, "third"), (4, "fourth"))}

# Rows outside the ladder. The first row of each group is the baseline of its ratios.
FULL = {"8_fused": "default"}
GROUPS = {
    "ladder": NAMES,
    "without": FULL | {
        "without_compile": "without compile",
        "without_cudagraphs": "without CUDA graphs",
        "without_gpu_postprocess": "without GPU postprocess",
        "without_channels_last": "without channels_last and fused VAE",
        "without_fused_vae": "without fused VAE",
        "without_projections": "without fused projections and fused kernels",
        "without_fa3": "without fp8 attention and fused kernels",
        "without_quant": "without float8 and fused kernels",
        "without_fused_kernels": "without fused kernels",
    },
    "caches": FULL | {"cache_default": "step cache F12B12"} | CACHES | {
        "cache_taylorseer_2": TAYLORSEER[2], "cache_taylorseer": TAYLORSEER[3], "cache_taylorseer_4": TAYLORSEER[4],
        "gpus_2_balanced": "step cache, balanced, two GPUs", "gpus_4_balanced": "step cache, balanced, four GPUs",
        "gpus_2_taylorseer": "TaylorSeer, two GPUs", "gpus_4_taylorseer": "TaylorSeer, four GPUs"},
    "gears": FULL | {"quality_high": "`--quality high`: int8, attention in bf16",
                     "quality_exact": "`--quality exact`: nothing lossy"},
    "float8": {"float8_row": "per-row scales", "float8_tensor": "per-tensor scales"},
    "attention": {"backend_fa3": "FA3, fp8 scaled", "backend_fa3_bf16": "FA3, bf16",
                  "backend_native_cudnn": "cuDNN, bf16", "backend_native": "PyTorch's default, bf16"},
    "batch": FULL | {f"batch_{n}": f"batch {n}" for n in (2, 4, 8)} | {
        f"eager_batch_{n}": f"batch {n}, bf16, eager" for n in (2, 4, 8)},
    "gpus": FULL | {"gpus_2_ulysses": "two GPUs, Ulysses", "gpus_2_ring": "two GPUs, ring",
                    "gpus_4_ulysses": "four GPUs, Ulysses"},
    "sizes": FULL | {f"size_{size}": size.replace("x", "×") for size in ("512x512", "768x768", "1536x1024")},
}

STARTS = {"start_compile": "compile, first start", "start_compile_again": "compile, cached kernels",
          "start_export": "export, first start", "start_packages": "export, cached packages"}


def table(where: str) -> str:
    """Returns the markdown table of a ladder, with speed-ups over its eager row, if any.

    Args:
        where: <gpu>/<folder>/<suite>, without results/.
    """
    found = _rows(where, NAMES)
    eager = newest(RESULTS / where, "1_eager")
    joules = [(record.get("energy_j") or {}).get("image") for _, record in found]
    has_energy = any(joules)  # records before December 2026 lack it
    head = ["", "seconds (min–max)", "×", "encode", "step", "decode", "step error", "GiB", *["J"] * has_energy]
    lines = [f"| {' | '.join(head)} |".replace("|  |", "| |"), "|---" * len(head) + "|"]
    for (link, record), used in zip(found, joules, strict=True):
        stages, error = record["stages_ms"], record["step_relative_error"]
        lines.append("| " + " | ".join([
            link, _seconds(record), _ratio(eager and eager[1], record),
            *(f"{stages[name]:.1f}" for name in ("prompt_encoding", "denoising_step", "decoding")),
            "–" if error is None else f"{error * 100:.2f} %", _gib(record),
            *[f"{used:.0f}" if used else "–"] * has_energy]) + " |")
    return "\n".join(lines) + "\n"


# For the summary table: each suite's title and its rows.
GLANCE = {
    "schnell": ("schnell, 4 steps", {"8_fused": "every step"}),
    "dev": ("dev, 28 steps", {"8_fused": "every step", "gpus_2_ulysses": "on two GPUs",
                              "gpus_4_ulysses": "on four GPUs", "cache_balanced": "step cache `balanced`",
                              "cache_taylorseer": "step cache `taylorseer`", "cache_fast": "step cache `fast`"}),
    "kontext": ("Kontext, 28 steps", {"8_fused": "every step", "gpus_2_ulysses": "on two GPUs",
                                      "gpus_4_ulysses": "on four GPUs", "cache_balanced": "step cache `balanced`",
                                      "cache_taylorseer": "step cache `taylorseer`"}),
}


def glance_table(gpu: str) -> str:
    """Returns the markdown table of the main results, against diffusers' own pipeline in bf16.

    Args:
        gpu: <gpu>/<folder>, without results/.
    """
    lines = ["| FLUX.1 | diffusers, bf16 | here | × |", "|---" * 4 + "|"]
    for suite, (title, names) in GLANCE.items():
        eager_path, eager = newest(RESULTS / gpu / suite, "1_eager")
        before = f"{title} | [{eager['seconds']['median']:.3f}](results/{gpu}/{suite}/{eager_path.name})"
        found = finished(RESULTS / gpu / suite, {"1_eager": "", **names})
        for row, name in names.items():
            if row in found:
                path, record = found[row]
                lines.append(f"| {before} | [**{record['seconds']['median']:.3f}**](results/{gpu}/{suite}/{path.name}) "
                             f"{name} | {_ratio(eager, record)} |")
                before = " | "
    return "\n".join(lines) + "\n"


# --quality, with the row of the suites and the row of the suite tiny.
GEARS = {
    "diffusers, bf16": ("1_eager", "eager"),
    "`fast`: float8, fp8 attention (default)": ("8_fused", "all_defaults"),
    "`high`: int8, bf16 attention": ("quality_high", "quality_high"),
    "`exact`: bf16": ("quality_exact", "quality_exact"),
}


def gears_table(folder: str) -> str:
    """Returns the markdown table of --quality: seconds of each model, a step's error, the PSNR of tiny-flux-dev.

    Args:
        folder: <gpu>/<folder>, without results/.
    """
    lines = ["| `--quality` | schnell, s | dev, s | Kontext, s | error of a step | pictures of tiny-flux-dev |",
             "|---" * 6 + "|"]
    for name, (row, tiny) in GEARS.items():
        found = {suite: newest(RESULTS / folder / suite, row) for suite in ("schnell", "dev", "kontext")}
        cells = [f"[**{one[1]['seconds']['median']:.3f}**](results/{folder}/{suite}/{one[0].name})" if one else "–"
                 for suite, one in found.items()]
        error = found["schnell"] and found["schnell"][1]["step_relative_error"]
        path, record = newest(RESULTS / folder / "tiny", tiny) or (None, None)
        cells.append(f"{error * 100:.2f} %" if error else "–")
        cells.append(f"[{record['given']['psnr_mean']:.1f} dB](results/{folder}/tiny/{path.name})"
                     if path and record["given"]["identical"] < 1 else "–")
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def beside_table(where: str) -> str:
    """Returns the markdown table of a group of rows outside the ladder.

    The speed-ups compare with eager and with the group's first row, in the measurement nearest to each row. Columns
    that are empty below the first row are left out.

    Args:
        where: <gpu>/<folder>/<suite>/<group>, without results/.
    """
    where, _, group = where.rpartition("/")
    found, eager = _rows(where, GROUPS[group]), newest(RESULTS / where, "1_eager")
    first = next(iter(GROUPS[group]))
    head, rows = ["", "seconds (min–max)", "× eager", "× first row", "step", "steps cached", "step error", "GiB"], []
    for link, record in found:
        cached, error = record["cached_steps"], record["step_relative_error"]
        base = beside(RESULTS / where, first, [record])
        rows.append([
            link, _seconds(record), _ratio(eager and eager[1], record),
            _ratio(base and base[1], record),
            "–" if cached else f"{record['stages_ms']['denoising_step']:.1f}",
            f"{len(cached)} of {record['settings']['num_inference_steps']}" if cached else "–",
            "–" if error is None else f"{error * 100:.2f} %", _gib(record)])
    # A figure that only the first row has compares with nothing.
    kept = [i for i in range(len(head)) if i < 2 or any(row[i] != "–" for row in rows[1:])]
    lines = ["| " + " | ".join(row[i] for i in kept) + " |" for row in [head, *rows]]
    return "\n".join([lines[0].replace("|  |", "| |"), "|---" * len(kept) + "|", *lines[1:]]) + "\n"


# By batch size: the rows of diffusers' own pipeline and of the full recipe.
BATCHES = {1: ("1_eager", "8_fused")} | {n: (f"eager_batch_{n}", f"batch_{n}") for n in (2, 4, 8)}


def images_a_minute_table(where: str) -> str:
    """Returns the markdown table of images per minute by batch size.

    Args:
        where: <gpu>/<folder>/<suite>, without results/.
    """
    lines = ["| batch | bf16, eager: images/min | GiB | full recipe: images/min | GiB | × |",
             "|---" * 6 + "|"]
    batches = [found[1] for _, row in BATCHES.values() if row not in FULL and (found := newest(RESULTS / where, row))]
    for batch, rows in BATCHES.items():
        eager, full = (beside(RESULTS / where, row, batches) if row in FULL else newest(RESULTS / where, row)
                       for row in rows)
        cells = [cell for row, found in zip(rows, (eager, full), strict=True)
                 for cell in _images_a_minute(where, row, found)]
        lines.append(f"| {batch} | {' | '.join(cells)} | {_ratio(eager and eager[1], full[1]) if full else '–'} |")
    return "\n".join(lines) + "\n"


def _images_a_minute(where: str, row: str, found: tuple[Path, dict] | None) -> tuple[str, str]:
    """Returns the cells for images per minute and GiB: "out of memory" if the row did not fit, "–" if unmeasured."""
    if found:
        path, record = found
        images = 60 * record["settings"]["num_images_per_prompt"] / record["seconds"]["median"]
        return f"[{images:.1f}](results/{where}/{path.name})", _gib(record)
    for path in attempts(RESULTS / where, row)[-1:]:
        if json.loads(path.read_text())["error"] == "out of memory":
            return f"[out of memory](results/{where}/{path.name})", "–"
    return "–", "–"


def _rows(where: str, names: dict[str, str]) -> list[tuple[str, dict]]:
    """Returns (a link with the row's name, the record) for each successful row."""
    return [(f"[{names[row]}](results/{where}/{path.name})", record)
            for row, (path, record) in finished(RESULTS / where, names).items()]


def finished(folder: Path, names: dict[str, str]) -> dict[str, tuple[Path, dict]]:
    """Returns the file and the record of each successful row.

    They are the newest, except for the default's row: it is the measurement that `beside` picks for the eager row, or
    for the other rows if there is no eager row.
    """
    found = {row: one for row in names if (one := newest(folder, row))}
    if found.keys() >= FULL.keys():
        others = [found["1_eager"]] if "1_eager" in found else [one for row, one in found.items() if row not in FULL]
        found |= {row: beside(folder, row, [record for _, record in others]) for row in FULL}
    return found


def _seconds(record: dict) -> str:
    seconds = record["seconds"]
    return f"**{seconds['median']:.3f}** ({seconds['min']:.3f}–{seconds['max']:.3f})"


def _ratio(base: dict | None, record: dict) -> str:
    return f"{ratio:.2f}" if base and (ratio := speed_up(base, record)) else "–"


def _gib(record: dict) -> str:
    return f"{record['peak_memory']['image']['reserved_gib']:.1f}"


def speed_up(eager: dict, record: dict) -> float | None:
    """Returns the images per second relative to eager's; None if the images differ in size."""
    if any(eager["settings"][name] != record["settings"][name] for name in ("height", "width")):
        return None
    images = record["settings"]["num_images_per_prompt"] / eager["settings"]["num_images_per_prompt"]
    return images * eager["seconds"]["median"] / record["seconds"]["median"]


QUALITY = {
    "float32": "float32",
    "compile": "compile",
    "export": "exported packages",
    "projections": "fused projections",
    "channels_last": "channels_last",
    "fused_vae": "channels_last and fused VAE",
    "cudagraphs": "CUDA graphs",
    "int8": "int8, compiled",
    "float8_row": "float8, per-row scales, compiled",
    "float8_tensor": "float8, per-tensor scales, compiled",
    "fa3_bf16": "FA3, bf16",
    "fa3_fp8": "FA3, fp8 scaled",
    "fa3_fp8_unscaled": "FA3, fp8 unscaled",
    "text_encoder_quant": "T5 in int8",
    "cache": "step cache, F2B2",
    "cache_defaults": "all defaults and a step cache",
    "cache_yaml": "step cache from cache_config.yaml",
    "cache_safe": CACHES["cache_safe"],
    "steps_24": "24 steps",
    "cache_balanced": CACHES["cache_balanced"],
    "steps_20": "20 steps",
    "cache_fast": CACHES["cache_fast"],
    "steps_16": "16 steps",
    "steps_14": "14 steps",
    "cache_extreme": CACHES["cache_extreme"],
    "steps_13": "13 steps",
    "taylorseer_2": TAYLORSEER[2],
    "taylorseer_3": TAYLORSEER[3],
    "taylorseer_4": TAYLORSEER[4],
    "unfused": "float8, per-row scales, and FA3, fp8 scaled",
    "fused": "the same with the fused kernels",
    "all_defaults": "all defaults",
    "quality_high": "`--quality high`",
    "quality_exact": "`--quality exact`",
    "other_seed": "another seed: the floor",
}


def quality_table(machine: str) -> str:
    """Returns the markdown table of results/<machine>/tiny/*.json, in the order of `QUALITY`."""
    lines = ["| against eager bf16 | steps | PSNR, all words given (min) | PSNR, words left open (min) | SSIM | "
             "judge, top 5 |", "|---" * 6 + "|"]
    for stem, name in QUALITY.items():
        if not (result := newest(RESULTS / machine / "tiny", stem)):
            continue
        path, record = result
        given, left_open = record["given"], record["open"]
        lines.append("| " + " | ".join([
            f"[{name}](results/{machine}/tiny/{path.name})", computed_steps(record),
            *("the same" if part["identical"] == 1 else f"{part['psnr_mean']:.1f} ({part['psnr_min']:.1f})"
              for part in (given, left_open)),
            f"{(given['ssim'] + left_open['ssim']) / 2:.3f}", f"{record['judge']['top5'] * 100:.0f} %"]) + " |")
    return "\n".join(lines) + "\n"


def computed_steps(record: dict) -> str:
    """Returns the blocks computed for a picture of tiny-flux-dev, in units of full steps."""
    if record.get("computed_steps") is not None:
        return f"{record['computed_steps']:.1f}"
    if record.get("cached_steps") is not None:
        return "–"  # records of older commits lack it
    argv = record["argv"]
    return argv[argv.index("--num_inference_steps") + 1] if "--num_inference_steps" in argv else "28"


def judge_table(machine: str) -> str:
    """Returns the markdown table of results/<machine>/tiny/judge.json."""
    verdicts = json.loads((RESULTS / machine / "tiny" / "judge.json").read_text())["verdicts"]
    names = {"top1": "emoji, top 1", "top5": "emoji, top 5", "style": "style",
             "background": "background"}
    lines = ["| | pictures | " + " | ".join(names.values()) + " |", "|---" * 6 + "|"]
    lines += [f"| {what} | {one['pictures']} | " + " | ".join(f"{one[name] * 100:.1f} %" for name in names) + " |"
              for what, one in verdicts.items()]
    return "\n".join(lines) + "\n"


# Parts of kernel names, by kind.
KINDS = {"GEMMs": ("nvjet", "_gemm_kernel", "_product_kernel"), "attention": ("flash::",)}


def kernel_table(where: str) -> str:
    """Returns the markdown table of one step's kernels, without and with the fused kernels.

    Args:
        where: <gpu>/<folder>/<suite>, without results/.
    """
    unfused = newest(RESULTS / where, "kernels_unfused")
    files = {"unfused": unfused, "fused": beside(RESULTS / where, "8_fused", [unfused[1]])}
    rows = {kind: [] for kind in [*KINDS, "everything else", "all"]}
    for _, record in files.values():
        kernels = record["step_kernels"]
        for kind, column in rows.items():
            own = [kernel for kernel in kernels if kind in ("all", _kind(kernel["name"]))]
            column.append(f"{sum(kernel['ms'] for kernel in own):.1f} ({sum(kernel['launches'] for kernel in own)})")
    heads = [f"[{name}](results/{where}/{path.name})" for name, (path, _) in files.items()]
    lines = ["| ms (launches) | " + " | ".join(heads) + " |", "|---" * 3 + "|"]
    return "\n".join(lines + [f"| {kind} | " + " | ".join(column) + " |" for kind, column in rows.items()]) + "\n"


def _kind(name: str) -> str:
    return next((kind for kind, marks in KINDS.items() if any(mark in name for mark in marks)), "everything else")


# By fused kernel: the GEMM of the same shape in bench/kernels.py's `alternative` rows. Older records say "product".
GEMMS = {"qkv_gemm": "qkv", "gelu_gemm": "up", "fp8_gemm, out": "single out",
         "fp8_gemm, attention's out": "attention's out", "fp8_gemm, MLP's down": "down"}
GEMMS |= {name.replace("fp8_gemm", "products").replace("_gemm", "_product"): shape for name, shape in GEMMS.items()}


def roofline_table(where: str) -> str:
    """Returns the markdown table of kernels.json for one model: each fused kernel, and cuBLAS' GEMM of the same shape.

    Args:
        where: <gpu>/<folder>/<model>, without results/.
    """
    gpu, _, model = where.rpartition("/")
    rows = json.loads((RESULTS / gpu / "kernels.json").read_text())["kernels"][model]
    cublas = {row["kernel"].removeprefix("cuBLAS by ").replace(", ", ":", 1): row for row in rows
              if row["block"] == "alternative"}
    lines = ["| kernel | block | ms | TFLOP/s | TB/s | error | under load: ms | MHz | cuBLAS per tensor, per row: ms | "
             "under load: ms |", "|---" * 10 + "|"]
    for row in rows:
        if row["block"] == "alternative":
            continue
        work = f"{row['tflops_per_s']:.0f}" if row["flops"] else "–"
        load = row.get("sustained")
        loaded = f"{load['ms']:.3f} | {load['sm_clock_mhz']:.0f}" if load else "– | –"
        gemm = GEMMS.get(row["kernel"])
        others = [cublas[f"{kind}:{gemm}"] for kind in ("tensor", "row")] if gemm else []
        other, other_loaded = (", ".join(f"{one['ms']:.3f}" for one in found) or "–" for found in (
            others, [one["sustained"] for one in others if "sustained" in one]))
        lines.append(f"| {row['kernel']} | {row['block']} | {row['ms']:.3f} | {work} | {row['tbytes_per_s']:.2f} | "
                     f"{row['error'] * 100:.2f} % | {loaded} | {other} | {other_loaded} |")
    return "\n".join(lines) + "\n"


def last_block_table(gpu: str) -> str:
    """Returns the markdown table of last_block.json: a double and the last single block, with and without pruning.

    Pruning drops the tokens whose output the pipeline never reads.

    Args:
        gpu: <gpu>/<folder>, without results/.
    """
    record = json.loads((RESULTS / gpu / "last_block.json").read_text())
    lines = ["| text, image tokens | all tokens, ms | unused tokens pruned, ms | saved, ms | error |",
             "|---" * 5 + "|"]
    for model, found in record["models"].items():
        every, read = ([one["ms"] for one in found[name]] for name in ("all", "read"))
        text, image = record["tokens"][model]
        shown = [", ".join(f"{ms:.3f}" for ms in part) for part in (every, read)]
        lines.append(f"| {text}, {image} ({model}) | {' | '.join(shown)} | "
                     f"{statistics.mean(every) - statistics.mean(read):.2f} | "
                     + (f"{found['error'] * 100:.2f} % |" if found["error"] else "none |"))
    return "\n".join(lines) + "\n"


def starts_table(where: str) -> str:
    """Returns the markdown table of the seconds from process start to first image, by stage.

    Args:
        where: <gpu>/<folder>/<suite>, without results/.
    """
    lines = ["| | imports | load weights | quantize | packages | compile, record | start to first image | step | GiB |",
             "|---" * 9 + "|"]
    for row, name in STARTS.items():
        if found := newest(RESULTS / where, row):
            path, record = found
            spent = record["cold_start_s"] or {}  # null: prepared beside other rows
            if "quantise" in spent:  # the spelling in older records
                spent = spent | {"quantize": spent["quantise"]}
            cells = [f"{spent[stage]:.1f}" if stage in spent else "–"
                     for stage in ("imports", "load", "quantize", "packages")]
            compiled = f"{spent.get('compile', 0) + spent.get('record', 0):.1f}" if spent else "–"
            first = f"**{spent['process start to first image']:.1f}**" if spent else "–"
            lines.append(f"| [{name}](results/{where}/{path.name}) | {' | '.join([*cells, compiled, first])} | "
                         f"{record['stages_ms']['denoising_step']:.1f} | "
                         f"{record['peak_memory']['image']['reserved_gib']:.1f} |")
    return "\n".join(lines) + "\n"


LOADED = {("schnell", "kernels_unfused"): "schnell, without the fused kernels", ("schnell", "8_fused"): "schnell",
          ("dev", "8_fused"): "dev", ("kontext", "8_fused"): "Kontext"}


def load_table(gpu: str) -> str:
    """Returns the markdown table of step times within an image, with the GPU's clock and power.

    Args:
        gpu: <gpu>/<folder>, without results/.
    """
    lines = ["| | first step, ms | median step, ms | longest step, ms | clock, MHz | power, W | power limit, W |",
             "|---" * 7 + "|"]
    for (suite, row), name in LOADED.items():
        path, record = newest(RESULTS / gpu / suite, row)
        steps, load = record["steps_ms"], record["gpu_load"]
        lines.append(f"| [{name}](results/{gpu}/{suite}/{path.name}) | {steps[0]:.1f} | "
                     f"{statistics.median(steps):.1f} | {max(steps):.1f} | {load['sm_clock_mhz']:.0f} | "
                     f"{load['power_w']:.0f} | {float(record['environment']['power_limit'].split()[0]):.0f} |")
    return "\n".join(lines) + "\n"


def expected_table(where: str) -> str:
    """Returns the markdown table of the expected and measured step on several GPUs with Ulysses.

    The expectation follows from the step on one GPU and from the measured links in gpus_<N>_link.json. If N GPUs have
    no such file, the file for the next smaller number counts.

    Args:
        where: <gpu>/<folder>/<suite>, without results/.
    """
    from bench.link import bytes_sent, expected_step  # needs torch
    from utils.random_weights import architecture

    gpu = where.rpartition("/")[0]
    links = {n: json.loads(path.read_text()) for n in (2, 4, 8)
             if (path := RESULTS / gpu / f"gpus_{n}_link.json").exists()}
    measured = {gpus: newest(RESULTS / where, f"gpus_{gpus}_ulysses") for gpus in (2, 4, 8)}
    _, one = beside(RESULTS / where, "8_fused", [record for _, record in filter(None, measured.values())])
    step, work = one["stages_ms"]["denoising_step"] / 1e3, one["roofline"]
    config = architecture(one["model"].rpartition("/")[2])["transformer"]
    singles, blocks = config["num_single_layers"], config["num_layers"] + config["num_single_layers"]
    lines = ["| GPUs | sent per GPU and step | step, expected | step, measured |", "|---" * 4 + "|",
             f"| 1 | – | – | {step * 1e3:.1f} ms |"]
    for gpus, found in measured.items():
        ways = links[max(n for n in links if n <= gpus)]
        through_memory = "peer memory" in ways
        link = ways["peer memory" if through_memory else "nccl"]
        # Both all-to-alls have the same rate. The second one has another latency, since it needs no copy engine.
        latency = link["nothing"]["ms"] / 1e3
        rate = link["qkv"]["bytes"] / (link["qkv"]["ms"] / 1e3 - latency)
        latency_back = link["back"]["ms"] / 1e3 - link["back"]["bytes"] / rate
        # Through peer memory, a single block sends q, k and v (three of its four bytes) during a GEMM. The step's
        # output is one more exchange.
        hidden = singles if through_memory else 0
        latencies = (blocks - hidden + 1) * latency + blocks * latency_back
        sent = bytes_sent("ulysses", config, work["image_tokens"], work["text_tokens"], gpus)
        every = sum(sent.values())
        waited_for = every - sent["attention"] * hidden / blocks * 3 / 4
        expected = expected_step({"shared": step, "fixed": 0}, waited_for, gpus, rate, latencies)
        lines.append(f"| {gpus} | {every / 1e6:.0f} MB | {expected * 1e3:.1f} ms | "
                     + (f"{found[1]['stages_ms']['denoising_step']:.1f} ms |" if found else "– |"))
    return "\n".join(lines) + "\n"


# The cases of bench/fp8_error.py in the table.
FP8_CASES = {
    "plain": "random weights",
    "heavy_rows=0.4": "long-tailed weight rows",
    "spread=0.9": "AdaLN scales spread over the channels",
    "gates=8": "gates 8 times larger again",
    "neuron=3000": "one strong neuron in each MLP",
    "head=3000": "one strong head in each attention",
    "massive=500,spread=0.5,neuron=300": "massive channels, spread scales, strong neurons",
    "massive=2000,spread=0.9,neuron=3000,head=300": "the same, stronger, and strong heads",
}
FP8_RECIPES = {"bf16": "bf16", "float8_row": "float8 per row", "flux_fast": "flux-fast's", "fused": "fused (default)",
               "fused_int8": "`--quality high`"}


def fp8_error_table(where: str) -> str:
    """Returns the markdown table of fp8_error/<name>.json: each recipe's error of a step in `FP8_CASES`.

    Args:
        where: <gpu>/<folder>/<name>, without results/.
    """
    gpu, _, name = where.rpartition("/")
    rows = {row["case"]: row["errors"] for row in
            json.loads((RESULTS / gpu / "fp8_error" / f"{name}.json").read_text())["rows"]}
    recipes = {recipe: title for recipe, title in FP8_RECIPES.items() if recipe in rows["plain"]}
    lines = [f"| weights | {' | '.join(recipes.values())} |", "|---" * (1 + len(recipes)) + "|"]
    lines += [f"| {meaning}: `{case}` | " + " | ".join(f"{rows[case][recipe] * 100:.2f} %" for recipe in recipes)
              + " |" for case, meaning in FP8_CASES.items()]
    return "\n".join(lines) + "\n"


def tried_table(gpu: str) -> str:
    """Returns the markdown table of tried.json: the changes that were tried and rejected.

    Args:
        gpu: <gpu>/<folder>, without results/.
    """
    def shown(values):
        return ", ".join(f"{value:#.3g}" for value in values)

    lines = ["| tried and rejected | of | with it, ms | without it, ms |", "|---" * 4 + "|"]
    lines += [f"| {one['what']} | {one['of']} | {shown(one['ms'])} | {shown(one['without_ms'])} |"
              for one in json.loads((RESULTS / gpu / "tried.json").read_text())["tried"]]
    return "\n".join(lines) + "\n"


# What multiplies GELU's and attention's results in a single block: the launches of int8_alternatives.json, and the name
# of the errors there.
INT8_WAYS = {
    "one pass over the rows with zero points, int8 GEMM (kept)": (
        ("the pass over the rows", "int8, scales per row"), "pass, zero point"),
    "the same without zero points": (("the pass over the rows", "int8, scales per row"), "pass, symmetric"),
    "scales per row and 256 channels, applied inside the GEMM": (
        ("int8, scales per row and 256 channels, inside the GEMM",), "groups of 256, symmetric"),
    "e4m3 by cuBLAS, without the pass that casts": (("e4m3 by cuBLAS, no scales",), "e4m3 there"),
    "`torch._int_mm` after the same pass": (
        ("the pass over the rows", "torch._int_mm (cuBLASLt), no scales"), "pass, zero point"),
}
ATTENTIONS = {"FlashAttention-3, bf16 (kept)": "FlashAttention-3 in bf16",
              "FlashAttention-3, fp8": "FlashAttention-3 in fp8",
              "SageAttention 1.0.6, int8 scores": "SageAttention 1.0.6"}


def int8_table(folder: str) -> str:
    """Returns the markdown table of int8_alternatives.json: time and energy of ways to multiply in int8, and errors.

    Args:
        folder: <gpu>/<folder>, without results/.
    """
    record = json.loads((RESULTS / folder / "int8_alternatives.json").read_text())
    launches, errors = record["launches"], {row["case"]: row["errors"] for row in record["errors"]}
    lines = ["| behind GELU and attention | ms | mJ | error, `plain` | `gates=8` | `heavy_rows=0.4` |",
             "|---" * 6 + "|"]
    for title, (names, way) in INT8_WAYS.items():
        ms, energy = (sum(launches[name][unit] for name in names) for unit in ("ms", "mJ"))
        cells = [f"{ms:.3f}", f"{energy:.0f}"]
        cells += [f"{errors[case][way] * 100:.2f} %" for case in ("plain", "gates=8", "heavy_rows=0.4")]
        lines.append(f"| {title} | " + " | ".join(cells) + " |")
    lines += ["", "| attention of 4,352 tokens | ms | mJ | error of its result |", "|---" * 4 + "|"]
    for title, name in ATTENTIONS.items():
        one = launches[f"attention, {name}"]
        lines.append(f"| {title} | {one['ms']:.3f} | {one['mJ']:.0f} | {one['error'] * 100:.2f} % |")
    return "\n".join(lines) + "\n"


MAKERS = {"glance": glance_table, "gears": gears_table, "results": table, "beside": beside_table,
          "quality": quality_table, "judge": judge_table, "kernels": kernel_table, "roofline": roofline_table,
          "starts": starts_table, "load": load_table, "last_block": last_block_table, "expected": expected_table,
          "tried": tried_table, "int8": int8_table, "images_a_minute": images_a_minute_table,
          "fp8_error": fp8_error_table}


def pages() -> list[Path]:
    """Returns the pages with generated tables."""
    return [path for path in (ROOT / "README.md", ROOT / "tiny_flux" / "README.md",
                              *sorted((ROOT / "docs").glob("*.md"))) if path.exists()]


def with_tables(page: Path, text: str | None = None) -> str:
    """Returns a page's text with every marked part generated again. The links are relative to the page.

    Args:
        page: its path.
        text: its text; None to read the file.
    """
    to_root = "../" * len(page.relative_to(ROOT).parts[:-1])

    def made(part: re.Match) -> str:
        content = MAKERS[part[2]](current(part[3]))
        content += caption(re.findall(r"\]\((results/[^)]+\.json)\)", content))
        return part[1] + content.replace("](results/", f"]({to_root}results/") + part[4]

    return MARKERS.sub(made, page.read_text() if text is None else text)


def caption(links: list[str]) -> str:
    """Returns the GPU, the versions, the commits and the days of the records that a table links to.

    It is "" if no record has a date.

    Args:
        links: paths that begin with results/.
    """
    paths = [RESULTS / link.removeprefix("results/") for link in dict.fromkeys(links)]
    environments = [json.loads(path.read_text()).get("environment", {}) for path in paths]
    found = [one for one in environments if one.get("date")]
    if not found:
        return ""

    def several(values, plural: str) -> str:
        names = sorted({str(value) for value in values if value})
        return ", ".join(names) if len(names) < 3 else f"{len(names)} {plural}"

    cards = {one.get("gpu_uuid") for one in found} - {None}
    first, last = (datetime.fromisoformat(pick(one["date"] for one in found)) for pick in (min, max))
    days = [f"{first:%-d %B}" if (first.month, first.day) != (last.month, last.day) else "", f"{last:%-d %B %Y}"]
    parts = [several((one.get("gpu", "CPU") for one in found), "GPUs") + (f" ({len(cards)} cards)" * (len(cards) > 1)),
             several((one.get("power_limit", "").removesuffix(".00 W") + " W" for one in found
                      if one.get("power_limit")), "power limits"),
             "torch " + several((one["packages"]["torch"] for one in found), "versions"),
             several((one.get("commit") for one in found), "commits"), " to ".join(filter(None, days))]
    return f"\n{', '.join(filter(None, parts))}.\n"


def stale() -> dict[Path, bytes]:
    """Returns the pages that differ from results/, with their correct content."""
    return {page: text.encode() for page in pages() if (text := with_tables(page)) != page.read_text()}
