"""results/<gpu>/report.html: everything that was measured on one GPU on one page, and beside it the ladders' charts."""

import base64
import hashlib
import json
from pathlib import Path
from urllib.parse import quote

import jinja2
import PIL.Image
from markupsafe import Markup

from report import charts, records, tables
from utils.roofline import roofline_of, share_of_ceiling

SUITES = {"schnell": "FLUX.1-schnell", "dev": "FLUX.1-dev", "kontext": "FLUX.1-Kontext-dev"}
TITLES = {"ladder": "From the plain pipeline upwards", "without": "One technique less", "caches": "Step caches",
          "float8": "Scales of float8", "attention": "Attention backends", "batch": "Batches", "sizes": "Sizes",
          "gpus": "Several GPUs"}


def write(gpu: str) -> list[Path]:
    """Writes the page of results/<gpu>/, which holds all pictures, and of these beside it the ladders, for READMEs to
    show; the paths, the page's first."""
    folder = records.RESULTS / gpu
    ladders, sections = [], []
    for suite, title in SUITES.items():
        if (folder / suite).is_dir():
            sections.append(speed_section(folder, suite, title, ladders))
    if (folder / "tiny").is_dir():
        sections.append(quality_section(folder / "tiny"))
    for path in {*folder.glob("*.svg"), *folder.glob("*.webp")} - set(ladders):
        path.unlink()
    page = environment().get_template("page.html").render(
        gpu=gpu, sections=[one for one in sections if one], machines=machines(folder), fingerprint=fingerprint(folder))
    (folder / "report.html").write_text(page)
    return [folder / "report.html", *ladders]


def environment() -> jinja2.Environment:
    return jinja2.Environment(loader=jinja2.FileSystemLoader(Path(__file__).parent), autoescape=True,
                              undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True)


def fingerprint(folder: Path) -> str:
    """A hash of all results of a GPU: a page that carries it is up to date."""
    found = hashlib.sha256()
    for path in sorted(folder.rglob("*.json")):
        found.update(path.relative_to(folder).as_posix().encode() + path.read_bytes())
    return found.hexdigest()[:16]


def machines(folder: Path) -> list[str]:
    """One line for each machine and set of versions that results were measured with."""
    lines = []
    for path in sorted(folder.rglob("*.json")):
        found = json.loads(path.read_text()).get("environment", {})
        if "packages" not in found:
            continue
        gpu = [f"{found['gpu']}, {found['gpu_memory_gib']:.0f} GiB", f"power limit {found['power_limit']}",
               f"driver {found['driver']}"] if found.get("gpu") else [f"CPU, {found['cpu_threads']} threads"]
        packages = [f"{name} {found['packages'][name]}" for name in
                    ("torch", "triton", "diffusers", "torchao", "fa3-fwd", "cache-dit") if name in found["packages"]]
        lines.append(", ".join([*gpu, *packages]))
    return list(dict.fromkeys(lines))


def drawn(text: str, alt: str) -> dict:
    """What the page needs to show an SVG; as quoted text, which is smaller than base64."""
    return inlined("data:image/svg+xml," + quote(text, safe=" ='/:;,.()@+{}"), alt)


def inlined(uri: str, alt: str) -> dict:
    return {"uri": Markup(uri), "alt": alt}  # neither kind holds a character that HTML would need escaped


def read(folder: Path, names: dict[str, str]) -> list[tuple[str, str, dict]]:
    """Name, file and record of each row of `names` that is finished."""
    return [(names[row], path.name, record) for row, (path, record) in tables.finished(folder, names).items()]


def failed(folder: Path, names: dict[str, str]) -> list[dict]:
    return [{"name": names.get(row, row), "error": record["error"], "last": (record["output_end"] or ["-"])[-1]}
            for row, record in records.failures(folder).items() if "error" in record]


# --- speed, with random weights ---

def speed_section(folder: Path, suite: str, title: str, ladders: list[Path]) -> dict:
    """The part of the page on one model. Writes its ladder, and puts that file's path into `ladders`."""
    folder, charted = folder / suite, {}
    ceilings = folder.parent / "ceilings.json"
    ceilings = json.loads(ceilings.read_text()) if ceilings.exists() else None
    eager = records.newest(folder, "1_eager")
    groups = []
    for group, names in tables.GROUPS.items():
        rows = read(folder, names)
        if group == "ladder" or (len(rows) > 1 and records.newest(folder, next(iter(names)))):
            groups.append(filled(TITLES[group], SPEED_HEAD,
                                 [speed_cells(suite, *row, eager and eager[1], ceilings) for row in rows]))
            charted |= {file: (name.partition(", and so")[0], record) for name, file, record in rows
                        if group in ("ladder", "without", "caches") and name not in tables.FULL.values()}
    images, rows = [], read(folder, {row: name for row, name in tables.NAMES.items() if not row.startswith("memory_")})
    if len(rows) > 1:
        names, seconds = [name for name, _, _ in rows], [record["seconds"]["median"] for _, _, record in rows]
        ratios = [eager and tables.speed_up(eager[1], record) for _, _, record in rows]
        ladder = charts.ladder(names, seconds, ratios)
        ladders.append(folder.parent / f"{suite}_ladder.svg")
        ladders[-1].write_text(ladder)
        images.append(drawn(ladder, f"{title}: seconds of each row, with the speed-up over eager"))
        images.append(drawn(
            charts.stages(names, [record["stages_ms"] for _, _, record in rows],
                          [record["settings"]["num_inference_steps"] for _, _, record in rows]),
            f"{title}: milliseconds of each stage"))
    known = {name: record for name, record in charted.values() if record["step_relative_error"] is not None}
    if len(known) > 2:
        images.append(drawn(
            charts.speed_against_quality(
                list(known), [record["seconds"]["median"] for record in known.values()],
                [record["step_relative_error"] * 100 for record in known.values()], "seconds an image",
                "step error, %", higher_is_better=False),
            f"{title}: seconds against the error of a step; the Pareto front is joined"))
    cached = [(name, [float(i in record["cached_steps"]) for i in range(record["settings"]["num_inference_steps"])],
               record.get("residual_diffs") or {})
              for name, _, record in read(folder, tables.GROUPS["caches"]) if record["cached_steps"]]
    if cached:
        images.append(drawn(charts.caches(*map(list, zip(*cached, strict=True))), f"{title}: {CACHES_ALT}"))
    note = ("Random weights at full size: speed and memory are the model's, pixels mean nothing. Step error: relative "
            "error of one transformer step against float32 on the same weights. TFLOP/s: the products of a step over "
            "its time" + ("; ceiling: the time that they take at this GPU's measured rates, over the time that they "
                          "took." if ceilings else "."))
    return {"title": title, "note": note, "groups": groups, "images": images, "failed": failed(folder, tables.NAMES)}


CACHES_ALT = ("residual differences of the steps in which they decide, and below the steps that were cached, the "
              "darker the more often")
SPEED_HEAD = ["", "seconds (min–max)", "×", "encode ms", "step ms", "decode ms", "TFLOP/s", "of ceiling", "step error",
              "GiB", "first image s"]


def speed_cells(suite: str, name: str, file: str, record: dict, eager: dict | None, ceilings: dict | None) -> list:
    seconds, stages, error = record["seconds"], record["stages_ms"], record["step_relative_error"]
    work, ratio = roofline_of(record), eager and tables.speed_up(eager, record)
    share = share_of_ceiling(record, ceilings) if ceilings else None
    first = (record["cold_start_s"] or {}).get("process start to first image")
    return [{"text": name, "link": f"{suite}/{file}"},
            f"{seconds['median']:.3f} ({seconds['min']:.3f}–{seconds['max']:.3f})", optional(ratio, "{:.2f}"),
            f"{stages['prompt_encoding']:.1f}",
            # The median of steps some of which were skipped is one of either kind.
            optional(None if record["cached_steps"] else stages["denoising_step"], "{:.1f}"),
            f"{stages['decoding']:.1f}", optional(work and work["tflops"], "{:.0f}"), optional(share, "{:.0%}"),
            optional(error, "{:.2%}"),
            optional(record["peak_memory"].get("image", {}).get("reserved_gib"), "{:.1f}"), optional(first, "{:.0f}")]


def filled(title: str, head: list[str], rows: list[list]) -> dict:
    """A table without the columns in which nothing stands."""
    kept = [i for i in range(len(head)) if any(row[i] != "–" for row in rows)]
    return {"title": title, "head": [head[i] for i in kept], "rows": [[row[i] for i in kept] for row in rows]}


def optional(value: float | None, form: str) -> str:
    return "–" if value is None else form.format(value)


# --- pictures of the small trained model ---

QUALITY_HEAD = ["", "steps", "PSNR, all words given (min)", "PSNR, words left open (min)", "SSIM",
                "latents, median (max)", "black, not finite", "LPIPS", "CLIP score", "judge, top 5", "seconds"]


def quality_section(folder: Path) -> dict | None:
    names = {"eager": "eager bf16: the reference"} | tables.QUALITY
    rows = read(folder, names)
    if not rows:
        return None
    images = []
    charted = [row for row in rows if row[0] not in (names["eager"], names["other_seed"])]
    if len(charted) > 1:
        images.append(drawn(
            charts.speed_against_quality(
                [name for name, _, _ in charted], [record["seconds"] for _, _, record in charted],
                [mean_psnr(record) for _, _, record in charted],
                f"seconds of {charted[0][2]['prompts']} pictures", "PSNR, dB (identical: 100)", higher_is_better=True),
            "seconds against PSNR; the Pareto front is joined"))
    curves = [(name, record["latents"]["by_step"]) for name, _, record in charted
              if "latents" in record and record["latents"]["by_step"] and record["latents"]["median"]]
    if curves:
        images.append(drawn(charts.drift(*map(list, zip(*curves, strict=True))),
                            "error of the latents after each step against eager bf16"))
    cached = [(name, record["cached_share"], record["residual_diffs"]) for name, _, record in rows
              if record.get("cached_share")]
    if cached:
        images.append(drawn(charts.caches(*map(list, zip(*cached, strict=True))), CACHES_ALT))
    if sheet := contact_sheet(folder, rows):
        images.append(inlined("data:image/webp;base64," + base64.b64encode(sheet).decode(),
                              "pictures of each row, PSNR against eager below each"))
    groups = [filled("Against eager bf16, same prompts and seeds", QUALITY_HEAD,
                     [quality_cells(*row) for row in rows])]
    twins = [(f"{name}, against {' '.join(record['twin']['argv'])}", file, record | record["twin"])
             for name, file, record in rows if record.get("twin")]
    if twins:
        groups.append(filled("Caches against the same recipe without", QUALITY_HEAD,
                             [quality_cells(*row) for row in twins]))
    missing = {why for _, _, record in rows for why in record.get("perceptual", {}).get("not_available", {}).values()}
    note = (f"{rows[0][2]['prompts']} pictures of tiny-flux-dev, 28 steps, half of the prompts with style and "
            "background, half without. PSNR is of drift, not of quality; the judge says whether a picture is of what "
            "was asked for. The model has 10 M parameters: what it shows is whether a switch engages and whether it "
            "breaks something. " + " ".join(sorted(f"{why}." for why in missing)))
    return {"title": "tiny-flux: pictures", "note": note, "groups": groups, "images": images,
            "failed": failed(folder, names)}


def mean_psnr(record: dict) -> float:
    return (record["given"]["psnr_mean"] + record["open"]["psnr_mean"]) / 2


def psnr_text(part: dict) -> str:
    return "the same" if part["identical"] == 1 else f"{part['psnr_mean']:.1f} ({part['psnr_min']:.1f})"


def quality_cells(name: str, file: str, record: dict) -> list:
    latents, broken, scores = (record.get(key) for key in ("latents", "broken", "perceptual"))
    return [{"text": name, "link": f"tiny/{file}"}, tables.computed_steps(record),
            psnr_text(record["given"]), psnr_text(record["open"]),
            f"{(record['given']['ssim'] + record['open']['ssim']) / 2:.3f}",
            f"{latents['median']:.2%} ({latents['max']:.2%})" if latents else "–",
            f"{broken['black']:.0%}, {broken['not_finite']:.0%}" if broken else "–",
            optional(scores and scores["lpips"], "{:.4f}"), optional(scores and scores["clip_score"], "{:.1f}"),
            f"{record['judge']['top5']:.0%}", f"{record['seconds']:.0f}"]


def contact_sheet(folder: Path, rows: list[tuple[str, str, dict]]) -> bytes | None:
    """A WebP of the strips that lie beside the rows' files, if any. Of rows that were measured with other prompts than
    the first there is nothing to put into its columns."""
    strips = [(name, strip, record["shown"]) for name, file, record in rows
              if (strip := (folder / file).with_suffix(".webp")).exists()]
    asked = [[one["prompt"] for one in shown] for _, _, shown in strips]
    found = [(name, PIL.Image.open(strip), shown) for (name, strip, shown), prompts in zip(strips, asked, strict=True)
             if prompts == asked[0]]
    if not found:
        return None
    sheet = charts.contact_sheet(
        [name for name, _, _ in found], [strip for _, strip, _ in found],
        [["the same" if one["identical"] == 1 else f"{one['psnr_mean']:.1f} dB" for one in shown]
         for _, _, shown in found], [one["prompt"] for one in found[0][2]])
    for _, strip, _ in found:
        strip.close()
    return sheet
