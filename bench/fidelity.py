"""Fidelity report: compares the pictures of each lossy technique with the pictures of bf16 eager.

    python -m bench.fidelity --ckpt black-forest-labs/FLUX.1-dev --output-dir fidelity/dev
    python -m bench.fidelity --ckpt tiny-flux-dev --output-dir /tmp/f --prompts 4 --rows int8 default -- --device cpu

All rows draw the same prompts with the same seeds. gen_image.py draws each row in its own process; flags after `--` go
to all rows. Run the command again after an interruption: it draws only the missing pictures. A row that this machine
cannot run is skipped with gen_image.py's reason.

The report is three files in --output-dir: fidelity.json, fidelity.md (the table) and sheet.png (thumbnails of the first
prompts, a line for each row). The last line of stdout is the path of fidelity.json.

Where the fused kernels run, the report also names the blocks whose e4m3 values most often leave e4m3's precise range:
see bench/block_shares.py. --block-shares measures a tiny model's blocks on a CPU.
"""

import argparse
import hashlib
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import textwrap
import traceback
from pathlib import Path
from typing import NamedTuple

import PIL.Image
import torch
from PIL import ImageDraw, ImageFont

from bench.environment import SCHEMA_VERSION, environment
from bench.fp8_error import as_fused
from bench.quality import capture_step, perceptual, picture_drift
from experiments import CHANNELS, COMPILED, EAGER, FA3, FUSED, OFF, QUANT
from tiny_flux import judge, pictures
from utils import lora_files, single_file, tiny_presets, weight_files
from utils.benchmark_utils import DEFAULT_CKPT, check_args, choose_device, create_parser
from utils.checkpoint import read_configs
from utils.common import RecipeError, run_cli
from utils.hardware import detect
from utils.images import numbered_path, read_parameters
from utils.output_checks import check_output
from utils.outputs import atomic_write, is_record, manifest_path, write_json
from utils.pipeline_utils import call_kwargs, fuse_projections, load_pipeline, set_attention
from utils.plan import describe, make_plan
from utils.prompts_file import Prompt, read_prompts
from utils.reference_image import load_reference

ROOT = Path(__file__).parent.parent
PROMPTS = Path(__file__).with_name("prompts.txt")
REFERENCE = "reference"
SHOWN, SIDE, LABEL_WIDTH, LINE_HEIGHT, GAP = 8, 160, 160, 16, 4  # the contact sheet: columns, then pixels
CRASHED = "crashed"
TENSORS = {"hidden": "GELU's result", "v": "v", "attention": "attention's result"}  # of bench/block_shares.py
WORST = 5  # blocks that the report names for each tensor
CHUNK = 10  # pictures in one call of LPIPS and CLIP: about 1 GB of activations at 1024x1024


class Row(NamedTuple):
    """A recipe: gen_image.py's flags, and one line for readers."""
    flags: list[str]
    meaning: str


# For rows that rely on defaults: without --strict gen_image.py would fall back to another recipe. --strict also refuses
# the tuning flags if nothing is compiled.
STRICT = ["--strict", "--disable_inductor_tuning_flags"]
ROWS = {
    REFERENCE: Row([*EAGER, *OFF], "bf16 eager with every technique off"),
    "compile": Row([*COMPILED, FA3, QUANT], "torch.compile alone, which only changes rounding"),
    "fp8_attention": Row([*EAGER, FUSED, CHANNELS, QUANT, *STRICT], "fp8 attention alone"),
    "float8_row": Row([*EAGER, FUSED, CHANNELS, FA3, "--quant_dtype", "float8", "--quant_granularity", "row"],
                      "float8 with per-row scales alone, without the fused kernels"),
    "float8_tensor": Row([*EAGER, FUSED, CHANNELS, FA3, "--quant_dtype", "float8", "--quant_granularity", "tensor"],
                         "float8 with per-tensor scales alone"),
    "int8": Row([*COMPILED, FA3, "--quant_dtype", "int8"], "int8 alone, compiled"),
    "text_encoder_quant": Row([*EAGER, *OFF, "--text_encoder_quant"], "T5 in int8 alone"),
    "fused": Row([*EAGER, CHANNELS, "--quant_dtype", "float8", *STRICT],
                 "the fused kernels with float8 and fp8 attention, not compiled"),
    "default": Row([], "the default recipe"),
    "default_safe": Row(["--step_cache", "safe"], "the default recipe with --step_cache safe"),
    "default_balanced": Row(["--step_cache", "balanced"], "the default recipe with --step_cache balanced"),
    "default_fast": Row(["--step_cache", "fast"], "the default recipe with --step_cache fast"),
    "default_extreme": Row(["--step_cache", "extreme"], "the default recipe with --step_cache extreme"),
    "default_taylorseer": Row(["--step_cache", "taylorseer"], "the default recipe with --step_cache taylorseer"),
}
COLUMNS = {"PSNR mean": ("psnr_mean", ".1f"), "PSNR min": ("psnr_min", ".1f"), "SSIM": ("ssim", ".3f"),
           "LPIPS": ("lpips", ".4f"), "CLIP": ("clip_score", ".2f"), "s/image": ("seconds_per_image", ".2f")}


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ckpt", default=DEFAULT_CKPT, help=f"checkpoint, as for gen_image.py ({DEFAULT_CKPT})")
    parser.add_argument("--image", metavar="PATH_OR_URL", help="reference image (Kontext)")
    parser.add_argument("--output-dir", type=Path, metavar="DIR",
                        help="folder of the report and its pictures; required, except with --list")
    parser.add_argument("--prompts", type=int, metavar="N", help="draw the first N prompts (all)")
    parser.add_argument("--prompts-file", metavar="FILE", help="prompts in gen_image.py's format (50 built-in ones)")
    parser.add_argument("--rows", nargs="+", metavar="NAME",
                        help="draw these rows and the reference (all; --list names them)")
    parser.add_argument("--list", action="store_true", help="print the rows with their flags, and draw nothing")
    parser.add_argument("--download-metrics", action="store_true", help="fetch the weights of LPIPS and CLIP score")
    parser.add_argument("--block-shares", "--block_shares", action="store_true",
                        help="measure a tiny model's e4m3 values by block on a CPU; GPUs with fused kernels always do")
    parser.add_argument("flags", nargs="*", help="after --: flags of gen_image.py for all rows")
    return parser.parse_args()


def choose_rows(names: list[str] | None) -> list[str]:
    """Returns the rows to draw, with the reference, in the table's order.

    Raises:
        RecipeError: an unknown name.
    """
    if unknown := [name for name in names or [] if name not in ROWS]:
        raise RecipeError(f"--rows {' '.join(unknown)}: unknown. Choose from {', '.join(ROWS)}.")
    return [name for name in ROWS if not names or name in names or name == REFERENCE]


def built_in_prompts(ckpt: str, edits: bool) -> list[str]:
    """Returns fifty prompts.

    Args:
        ckpt: tiny-flux gets its own captions, since it knows nothing else.
        edits: whether to return instructions, for Kontext.
    """
    if ckpt.startswith("tiny-"):
        if edits:
            return judge.edits_of(judge.training_captions(50))[0]
        texts, _ = pictures.prompts(50)  # 25 with style and background, then 25 without
        return [text for pair in zip(texts[:25], texts[25:], strict=True) for text in pair]
    texts = PROMPTS.read_text().splitlines()
    return [f"Put the main subject of the picture into this scene: {text}" for text in texts] if edits else texts


def choose_prompts(args, seed: int) -> list[dict]:
    """Returns [{"prompt", "seed"}, ...]. A prompt without a seed gets `seed` plus its index.

    Raises:
        RecipeError: the file is unreadable, or --prompts is out of range.
    """
    if args.prompts_file:
        try:
            available, complaints = read_prompts(args.prompts_file)
        except OSError as error:
            raise RecipeError(f"--prompts-file {args.prompts_file}: the file cannot be read ({error.strerror}). Give a "
                              "text file with one prompt per line.") from error
        for complaint in complaints:
            print(complaint, file=sys.stderr)
    else:
        available = [Prompt(i + 1, i, text) for i, text in enumerate(built_in_prompts(args.ckpt, bool(args.image)))]
    if args.prompts is not None and not 1 <= args.prompts <= len(available):
        raise RecipeError(f"--prompts {args.prompts}: choose from 1 to {len(available)}, or add --prompts-file.")
    return [{"prompt": prompt.text, "seed": seed + i if prompt.seed is None else prompt.seed}
            for i, prompt in enumerate(available[:args.prompts])]


def read_previous(path: Path, record: dict) -> dict:
    """Returns the folder's earlier report, or an empty one.

    One of the two prompt lists must begin with the other.

    Args:
        path: of fidelity.json.
        record: the new report, with settings and prompts.

    Raises:
        RecipeError: the earlier report has another model, flags, machine, versions, prompts or seeds.
    """
    if not path.exists():
        return {"rows": {}, "skipped": {}}
    try:
        previous = json.loads(path.read_text())
        settings, prompts, _, _ = (previous[key] for key in ("settings", "prompts", "rows", "skipped"))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise RecipeError(f"{path} is not a fidelity report. Choose another --output-dir, or delete the file."
                          ) from error
    for name, value in record["settings"].items():
        if settings.get(name) != value:
            raise RecipeError(f"--output-dir {path.parent} holds pictures with other {name}: {settings.get(name)!r}, "
                              f"now {value!r}. Choose another folder, or delete this folder.")
    if any(old != new for old, new in zip(prompts, record["prompts"], strict=False)):
        raise RecipeError(f"--output-dir {path.parent} holds pictures of other prompts or seeds. Choose another "
                          "folder, or delete this folder.")
    return previous


def draw(name: str, command: list[str]) -> str | None:
    """Runs gen_image.py for one row and copies its output to stderr.

    Args:
        name: of `ROWS`.
        command: gen_image.py's flags.

    Returns:
        None on success, else one line: gen_image.py's reason if it refused the row, or `CRASHED` and its last line.
    """
    print(f"\n{name}: {ROWS[name].meaning}", file=sys.stderr, flush=True)
    end = ""
    with subprocess.Popen([sys.executable, str(ROOT / "gen_image.py"), *command], stdin=subprocess.DEVNULL,
                          stdout=subprocess.PIPE, stderr=subprocess.STDOUT) as child:
        # Read chunks instead of lines: a progress bar does not end its line.
        while piece := os.read(child.stdout.fileno(), 65536):
            text = piece.decode(errors="replace")
            print(text, end="", file=sys.stderr, flush=True)
            end = (end + text)[-10_000:]
    if child.returncode == 0:
        return None
    refusals = re.split(r"^(?:\S+: )?error: ", end, flags=re.MULTILINE)
    if child.returncode == 2 and len(refusals) > 1:
        return " ".join(refusals[-1].split())
    return f"{CRASHED} (exit code {child.returncode}): {(end.strip().splitlines() or ['no output'])[-1]}"


def hashes(files: list[Path]) -> list[str | None]:
    """Returns the SHA-256 of each file; None for a missing file."""
    return [hashlib.sha256(file.read_bytes()).hexdigest() if file.is_file() else None for file in files]


def seconds_per_image(manifest: Path, files: list[Path]) -> float | None:
    """Returns the median of the pictures' seconds in the manifest; None if it has none of them."""
    lines = map(json.loads, manifest.read_text().splitlines()) if manifest.exists() else []
    seconds = {line["file"]: line["seconds"] for line in lines}  # the last line of a file counts
    known = [seconds[file.name] for file in files if file.name in seconds]
    return statistics.median(known) if known else None


def open_all(files: list[Path]) -> list[PIL.Image.Image]:
    """Opens pictures in RGB."""
    return [PIL.Image.open(file).convert("RGB") for file in files]


def drift_of(files: list[Path], reference: list[Path]) -> dict:
    """Returns PSNR (dB) and SSIM against the reference, for each picture and over all pictures."""
    # One picture at a time, because the SSIM of one 1024x1024 picture in float64 takes about 0.4 GB.
    drifts = [picture_drift(open_all([file]), open_all([other])) for file, other in zip(files, reference, strict=True)]
    means = {name: statistics.fmean(drift[name] for drift in drifts) for name in ("psnr_mean", "ssim", "identical")}
    return means | {"psnr_min": min(drift["psnr_min"] for drift in drifts), "pictures": [
        {"file": file.name, "sha256": sha256, "psnr": drift["psnr_mean"], "ssim": drift["ssim"]}
        for file, sha256, drift in zip(files, hashes(files), drifts, strict=True)]}


def perceptual_scores(files: list[Path], reference: list[Path], prompts: list[str], download: bool) -> dict:
    """Returns the mean LPIPS and CLIP score.

    A metric without weights is None, and "not_available" has the reason.

    Args:
        download: whether to fetch missing weights.
    """
    total = {"lpips": 0.0, "clip_score": 0.0}
    for start in range(0, len(files), CHUNK):
        part = slice(start, start + CHUNK)
        scores = perceptual(open_all(files[part]), open_all(reference[part]), prompts[part], download)
        for name in total:
            known = total[name] is not None and scores[name] is not None
            total[name] = total[name] + scores[name] * len(files[part]) / len(files) if known else None
        if scores["not_available"]:
            break
    return total | {"not_available": scores["not_available"]}


def is_drawn(row: dict, name: str, files: list[Path]) -> bool:
    """Returns whether a recorded row has the current flags, and all its pictures exist unchanged."""
    return row["flags"] == ROWS[name].flags and [one["sha256"] for one in row["pictures"]] == hashes(files)


def measure(row: dict, files: list[Path], reference: list[Path], prompts: list[str], download: bool) -> dict:
    """Returns `row` with its metrics. Existing metrics stay unless the reference's pictures have changed."""
    against = hashlib.sha256("".join(map(str, hashes(reference))).encode()).hexdigest()
    is_new = row.get("against") != against
    if is_new:
        row = row | drift_of(files, reference) | {"against": against}
    if is_new or row["not_available"]:
        row = row | perceptual_scores(files, reference, prompts, download)
    return row


def new_row(name: str, files: list[Path], commit: str | None) -> dict:
    """Returns the record of a new row without metrics. "techniques" maps each technique that was on to its details."""
    seconds = seconds_per_image(manifest_path(files[0].with_name("image.png")), files)
    return {**ROWS[name]._asdict(), "commit": commit, "techniques": read_parameters(files[0])["techniques"],
            "seconds_per_image": seconds}


def make_rows(record: dict, previous: dict, names: list[str], args, common: list[str]) -> None:
    """Draws and measures rows into `record`, and writes fidelity.json after each row.

    Rows of an earlier run stay.

    Args:
        previous: from `read_previous`.
        names: the rows to draw, with the reference.
        common: gen_image.py's flags for all rows.

    Raises:
        RecipeError: the reference cannot be drawn.
    """
    folder, prompts = args.output_dir, [one["prompt"] for one in record["prompts"]]
    files = {name: [numbered_path(str(folder / name / "image.png"), i, one["seed"])
                    for i, one in enumerate(record["prompts"])] for name in ROWS}
    rows = {name: row for name, row in previous["rows"].items() if name in ROWS and is_drawn(row, name, files[name])}
    record["skipped"] = {name: why for name, why in previous["skipped"].items() if name not in names}
    for name in ROWS:
        if name not in rows:
            if name not in names:
                continue
            # The row's flags come last, so that shared flags cannot override them.
            output = ["--output-file", str(folder / name / "image.png")]
            if why := draw(name, [*common, *output, *ROWS[name].flags]):
                if name == REFERENCE:
                    raise RecipeError(f"the reference cannot be drawn: {why}")
                record["skipped"][name] = why
                continue
            rows[name] = new_row(name, files[name], record["environment"]["commit"])
        rows[name] = measure(rows[name], files[name], files[REFERENCE], prompts, args.download_metrics)
        record["rows"] = {row: rows[row] for row in ROWS if row in rows}
        write_json(str(folder / "fidelity.json"), record)


def measure_blocks(recipe: argparse.Namespace, prompt: dict, on_cpu: bool) -> dict:
    """Measures the e4m3 values of each block in the first step of a prompt.

    Args:
        recipe: gen_image.py's arguments of the default row.
        prompt: {"prompt", "seed"}.
        on_cpu: whether to measure on a CPU, with the kernels' references.

    Returns:
        {"shares": the result of `block_shares`}, or {"not_measured": the reason in one line}.
    """
    print("\nblocks: shares of their e4m3 values", file=sys.stderr, flush=True)
    try:
        configs = read_configs(recipe.ckpt, recipe.revision, recipe.random_weights)
        chosen = make_plan(recipe, single_file.find(recipe.transformer, configs)[0], detect(recipe))
        if not chosen.fused_kernels.on and not on_cpu:
            return {"not_measured": f"fused kernels are off: {describe(chosen.fused_kernels)}"}
        if chosen.fused_kernels.on and chosen.quantization.dtype == "int8":
            return {"not_measured": "the fused kernels are in int8"}
        from bench.block_shares import block_shares  # Triton, which CPU builds of torch lack

        pipeline = load_pipeline(recipe)
        if pipeline.transformer.device.type != recipe.device:
            return {"not_measured": "the unquantized model does not fit on this GPU"}
        inputs = capture_step(pipeline, call_kwargs(pipeline, recipe, [prompt["prompt"]], [prompt["seed"]]))
        transformer = pipeline.transformer
        del pipeline
        set_attention(chosen, transformer)
        fuse_projections(transformer)
        as_fused(transformer, torch.device(recipe.device))
        return {"shares": block_shares(transformer, inputs)}
    except RecipeError as error:
        return {"not_measured": " ".join(str(error).split())}
    except Exception as error:  # any error, such as out of memory, must not cost the report
        traceback.print_exc()
        return {"not_measured": f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"}


def block_lines(blocks: dict) -> list[str]:
    """Returns the report's section on blocks: for each tensor the median block and the worst blocks."""
    lines = ["", "## e4m3 values by block", ""]
    if "shares" not in blocks:
        return [*lines, f"Not measured: {blocks['not_measured']}"]
    lines += ["Share of values below 2^-6, where e4m3 keeps fewer bits, plus share at 448, where it saturates. "
              "GELU's negative values are always small. Attention's result in double blocks has a 448 in each row. "
              f"First step of prompt 1; commit {blocks['commit']}.", ""]
    for name, meaning in TENSORS.items():
        ranked = sorted(blocks["shares"], key=lambda row: row[name]["below"] + row[name]["saturated"], reverse=True)
        median, *worst = (f"{row['block']} {100 * row[name]['below']:.2f} + {100 * row[name]['saturated']:.2f} %"
                          for row in (ranked[len(ranked) // 2], *ranked[:WORST]))
        lines.append(f"- {meaning}: median {median}; worst {', '.join(worst)}")
    return lines


def table(record: dict) -> str:
    """Returns the report in Markdown."""
    settings, rows = record["settings"], record["rows"]
    commits = ", ".join(sorted({str(row["commit"]) for row in rows.values()}))
    lines = [f"# Fidelity of {settings['model']}", "",
             f"{len(record['prompts'])} prompts, one seed each; flags of all rows: {settings['flags'] or 'none'}.",
             "", f"| row | {' | '.join(COLUMNS)} | recipe |", f"|---|{'---:|' * len(COLUMNS)}---|"]
    for name, row in rows.items():
        cells = ["–" if row[key] is None else format(row[key], form) for key, form in COLUMNS.values()]
        lines.append(f"| {name} | {' | '.join(cells)} | {row['meaning']} |")
    lines += ["", "PSNR (dB), SSIM and LPIPS compare with the reference's pictures; 100 dB means identical. CLIP "
              f"compares with the prompts. {settings['gpu'] or 'CPU'}; {settings['packages']}; commit {commits}; "
              f"{record['environment']['date']}.", ""]
    if "default" in rows:
        how = rows["default"]["techniques"]
        lines.append("- default on this machine: " + "; ".join(
            f"{name}: {_in_words(how, name)}" for name in ("attention", "quantization", "fused kernels")))
    lines += [f"- {name} skipped: {why}" for name, why in record["skipped"].items()]
    lines += [f"- {name} missing: {why}" for name, why in rows[REFERENCE]["not_available"].items()]
    lines += block_lines(record["blocks"])
    return "\n".join(lines) + "\n"


def _in_words(techniques: dict, name: str) -> str:
    """A technique of a picture's metadata, such as "fa3, fa3_fwd_interface", or "off"."""
    how = techniques.get(name)
    if isinstance(how, str):  # pictures of before November 29th
        return how
    return "off" if how is None else ", ".join(map(str, how.values())) or "on"


def make_sheet(rows: dict[str, list[PIL.Image.Image]], labels: dict[str, str], prompts: list[str]) -> PIL.Image.Image:
    """Returns a sheet of thumbnails: a line for each row, and a column for each prompt.

    Args:
        rows: the pictures of each row, one for each prompt, all of one size.
        labels: the text to the left of each row, three lines at most.
        prompts: the text above each column.
    """
    font, first = ImageFont.load_default(12), next(iter(rows.values()))[0]
    height, head = round(SIDE * first.height / first.width), 3 * LINE_HEIGHT + GAP
    size = LABEL_WIDTH + len(prompts) * (SIDE + GAP), head + len(rows) * (height + GAP)
    sheet = PIL.Image.new("RGB", size, "white")
    pen = ImageDraw.Draw(sheet)
    for column, prompt in enumerate(prompts):
        text = textwrap.fill(f"{column + 1}. {prompt}", 25, max_lines=3, placeholder=" …")
        pen.multiline_text((LABEL_WIDTH + column * (SIDE + GAP), GAP), text, "black", font)
    for line, (name, images) in enumerate(rows.items()):
        top = head + line * (height + GAP)
        pen.multiline_text((GAP, top), labels[name], "black", font)
        for column, image in enumerate(images):
            sheet.paste(image.convert("RGB").resize((SIDE, height), PIL.Image.Resampling.LANCZOS),
                        (LABEL_WIDTH + column * (SIDE + GAP), top))
    return sheet


def write_report(record: dict, folder: Path) -> str:
    """Writes the table and the contact sheet; returns the table."""
    text, count = table(record), min(SHOWN, len(record["prompts"]))
    with atomic_write(folder / "fidelity.md") as temporary:
        temporary.write_text(text)
    pictures_of = {name: open_all([folder / name / one["file"] for one in row["pictures"][:count]])
                   for name, row in record["rows"].items()}
    labels = {name: f"{name}\nPSNR {row['psnr_mean']:.1f} dB\nSSIM {row['ssim']:.3f}"
              for name, row in record["rows"].items()} | {REFERENCE: REFERENCE}
    sheet = make_sheet(pictures_of, labels, [one["prompt"] for one in record["prompts"][:count]])
    with atomic_write(folder / "sheet.png") as temporary:
        sheet.save(temporary)
    return text


def shared_flags(args) -> tuple[list[str], argparse.Namespace]:
    """Returns gen_image.py's flags for all rows, and the reference's parsed arguments.

    Raises:
        RecipeError: a flag after `--` is one that the report sets.
    """
    common = ["--ckpt", args.ckpt, *(["--image", args.image] if args.image else []), *args.flags]
    parser = create_parser()
    recipe = parser.parse_args([*common, *ROWS[REFERENCE].flags])
    fixed = {name: parser.get_default(name) for name in ("output_file", "prompts_file", "num_images_per_prompt")}
    for name, value in (fixed | {"ckpt": args.ckpt, "image": args.image}).items():
        if getattr(recipe, name) != value:
            raise RecipeError(f"--{name} after --: the report sets this flag for each row. Drop the flag.")
    choose_device(recipe)
    return common, recipe


def contents_of(recipe: argparse.Namespace) -> dict:
    """Returns hashes of the files of --ckpt, --transformer and --lora. Downloads a checkpoint on the Hub first.

    Raises:
        RecipeError: a file is missing or damaged.
    """
    if recipe.random_weights:
        return {}
    folder = tiny_presets.CHECKPOINT if recipe.ckpt in tiny_presets.NAMES else Path(recipe.ckpt).expanduser()
    configs = read_configs(str(folder) if folder.is_dir() else recipe.ckpt, recipe.revision, None)
    transformer = single_file.locate(recipe.transformer) if recipe.transformer else None
    found = weight_files.find_checkpoint(recipe.ckpt, folder, recipe.revision, configs,
                                         {"transformer"} if transformer else set())
    weights = weight_files.identity(found.folder, transformer)
    files = [lora_files.locate(lora_files.split(lora)[0]) for lora in recipe.lora or []]
    return {"weights": weights, "lora": list(map(lora_files.contents, files))}


def settings_of(args, recipe: argparse.Namespace, machine: dict) -> dict:
    """Returns the settings that all pictures of a folder must share.

    Args:
        recipe: the reference's arguments.
        machine: from `bench.environment.environment`.
    """
    image = hashlib.sha256(load_reference(args.image).tobytes()).hexdigest() if args.image else None
    versions = ", ".join(f"{name} {version}" for name, version in machine["packages"].items())
    return {"model": args.ckpt, "flags": " ".join(args.flags), "contents": contents_of(recipe),
            "image_sha256": image, "gpu": machine.get("gpu"), "packages": versions}


def main():
    args = parse()
    if args.list:
        for name, row in ROWS.items():
            print(f"{name:<20}{row.meaning}\n{'':<20}{' '.join(row.flags) or '(no flags)'}")
        return
    if args.output_dir is None:
        raise RecipeError("--output-dir is missing. Give the folder for the report and its pictures.")
    args.output_dir = args.output_dir.expanduser()
    path, names, (common, recipe) = args.output_dir / "fidelity.json", choose_rows(args.rows), shared_flags(args)
    on_cpu = args.block_shares and recipe.device == "cpu"
    if on_cpu and not args.ckpt.startswith("tiny-"):
        raise RecipeError(f"--block-shares: --ckpt {args.ckpt} is too large for a CPU. Use a tiny model, such as "
                          "--ckpt tiny-flux-dev, or drop --block-shares.")
    prompts = choose_prompts(args, recipe.seed)
    check_output(path, "--output-dir", is_record)
    for other in ("fidelity.md", "sheet.png"):
        if not path.exists() and (args.output_dir / other).exists():
            raise RecipeError(f"--output-dir {args.output_dir} holds a {other} without a fidelity.json. Choose another "
                              f"folder, or remove {other}.")
    with tempfile.TemporaryDirectory() as scratch:
        prompts_file = Path(scratch, "prompts.jsonl")
        prompts_file.write_text("".join(json.dumps(prompt) + "\n" for prompt in prompts))
        recipe.prompts_file, recipe.output_file = str(prompts_file), str(args.output_dir / REFERENCE / "image.png")
        check_args(recipe)
        machine = environment(recipe.device)
        record = {"schema_version": SCHEMA_VERSION, "settings": settings_of(args, recipe, machine), "prompts": prompts,
                  "rows": {}, "skipped": {}, "blocks": {}, "environment": machine}
        previous = read_previous(path, record)
        record["blocks"] = previous.get("blocks", {})
        make_rows(record, previous, names, args, [*common, "--prompts-file", str(prompts_file)])
    if "shares" not in record["blocks"]:
        default_recipe = create_parser().parse_args([*common, *ROWS["default"].flags, "--quiet"])
        choose_device(default_recipe)
        record["blocks"] = measure_blocks(default_recipe, prompts[0], on_cpu) | {"commit": machine["commit"]}
    write_json(str(path), record)
    print(write_report(record, args.output_dir))
    print(path)
    if crashed := [name for name, why in record["skipped"].items() if why.startswith(CRASHED)]:
        raise RecipeError(f"{', '.join(crashed)} crashed: see the output above. Run the command again to retry.")


if __name__ == "__main__":
    run_cli(main)
