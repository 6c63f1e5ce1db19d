"""Measures how flags changes tiny-flux's pictures. `experiments.py run GPU --suite tiny` runs it for each row.

    python -m tiny_flux.pictures --keep eager.safetensors -- --disable_bf16
    python -m tiny_flux.pictures --reference eager.safetensors --output-json row.json -- --text_encoder_quant

The flags after `--` are gen_image.py's. All rows take 28 steps, with the same prompts and seeds. Half of the prompts
name style and background. The other half leave them open, so that a small error can change the whole picture. A small
model shows whether a technique engages and whether it breaks something. It does not show which method is better on
FLUX.1's 12 B parameters.
"""

import argparse
import json
import random
import statistics
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import PIL.Image
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from bench.environment import SCHEMA_VERSION, environment
from bench.quality import broken_share, latent_drift, latent_recorder, picture_drift
from tiny_flux import judge
from tiny_flux.training.data import caption
from utils import plan, tiny_presets, weight_files
from utils.benchmark_utils import check_args, choose_device, create_parser
from utils.cache import dbcache
from utils.common import RecipeError, run_cli
from utils.outputs import atomic_write, write_json
from utils.pipeline_utils import call_kwargs, load_pipeline, optimize

SHOWN, SIDE = 4, 80  # pictures on a sheet, and their pixels


@dataclass
class Drawn:
    """The pictures of all prompts, and their latents and origin."""
    images: list[PIL.Image.Image]
    latents: Tensor  # (N, steps, S, C)
    made: dict  # from `origin`


def prompts(count: int) -> tuple[list[str], list[judge.Wanted]]:
    """Returns the prompts and the requested contents.

    The first half of the prompts name style and background. The second half only name the emoji.
    """
    names, wanted = [one["name"] for one in judge.read_captions()], judge.training_captions(count)
    random.Random(2).shuffle(wanted)
    texts = [caption(names[one.emoji], one.style, one.colour) for one in wanted[:count // 2]]
    return texts + [names[one.emoji] for one in wanted[count // 2:]], wanted


def draw(args, texts: list[str]) -> tuple[Drawn, dict]:
    """Draws one picture for each prompt, as gen_image.py does. Returns the pictures, and facts for the record.

    Args:
        args: of gen_image.py.
    """
    pipeline = optimize(load_pipeline(args), args)
    images, latents, cached, compared, computed = [], [], [], [], []
    start = time.perf_counter()
    for i, text in enumerate(texts):
        steps = []
        kwargs = call_kwargs(pipeline, args, prompt=text, seed=args.seed + i)
        images += pipeline(**kwargs, latents=noise(pipeline, kwargs),
                           callback_on_step_end=latent_recorder(steps)).images
        latents.append(torch.cat(steps))
        if pipeline.plan.step_cache.on:
            cached.append(dbcache.cached_steps(pipeline))
            compared.append(dbcache.residual_diffs(pipeline))
            computed.append(dbcache.last_image_steps(pipeline, len(steps)))
    seconds = time.perf_counter() - start
    facts = {"seconds": seconds, "cached_steps": sum(map(len, cached)) / len(cached) if cached else None,
             "computed_steps": sum(computed) / len(computed) if computed else None,
             **per_step(cached, compared, len(steps)),
             "techniques": plan.record(pipeline.plan)}
    return Drawn(images, torch.stack(latents), {}), facts


def per_step(cached: list[list[int]], compared: list[dict[int, float]], steps: int) -> dict:
    """Returns a step cache's statistics by step.

    Args:
        cached: the cached steps of each picture; [] without a step cache.
        compared: the residual differences of each picture, by step.
        steps: the number of steps.

    Returns:
        "cached_share": the share of pictures in which each step was cached. "residual_diffs": each step's median
        residual difference over the pictures that have one. Both are None without a step cache.
    """
    if not cached:
        return {"cached_share": None, "residual_diffs": None}
    taken = {step: [one[step] for one in compared if step in one] for step in range(steps)}
    return {"cached_share": [sum(step in one for one in cached) / len(cached) for step in range(steps)],
            "residual_diffs": {step: statistics.median(values) for step, values in taken.items() if values}}


def noise(pipeline, kwargs: dict) -> Tensor:
    """Returns the initial latents in bf16, whatever the pipeline's dtype: up to torch 2.11 the noise depends on it.

    Args:
        kwargs: of the pipeline's call.
    """
    latents, *_ = pipeline.prepare_latents(1, pipeline.transformer.config.in_channels // 4, kwargs["height"],
                                           kwargs["width"], torch.bfloat16, pipeline._execution_device,
                                           kwargs["generator"])
    return latents


def origin(argv: list[str], count: int, device: str) -> dict:
    """Returns the flags that drew the pictures, and the facts that comparable pictures share.

    Args:
        argv: gen_image.py's flags.
        count: of prompts.
    """
    machine = environment(device)
    return {"argv": argv, "prompts": count, "gpu": machine.get("gpu"), "packages": machine["packages"],
            "weights": weight_files.identity(tiny_presets.CHECKPOINT)}


def keep(drawn: Drawn, path: Path) -> None:
    """Writes the pictures and latents to a safetensors file, atomically."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = torch.from_numpy(np.stack([np.array(image.convert("RGB")) for image in drawn.images]))
    with atomic_write(path) as temporary:
        save_file({"pixels": pixels, "latents": drawn.latents}, temporary, metadata={"made": json.dumps(drawn.made)})


def read_origin(path: Path) -> dict | None:
    """Returns the `origin` of the pictures in a file; None without the file."""
    if not path.exists():
        return None
    with safe_open(path, "pt") as file:
        return json.loads(file.metadata()["made"])


def read(path: Path, like: dict) -> Drawn:
    """Reads pictures from a file.

    Args:
        like: the `origin` of the pictures to compare with.

    Raises:
        RecipeError: the file is missing, or its prompts, GPU, versions or weights differ from `like`.
    """
    stored = read_origin(path)
    if stored is None or any(stored.get(key) != like[key] for key in ("prompts", "gpu", "packages", "weights")):
        raise RecipeError(f"{path} holds no pictures of {like['prompts']} prompts by this machine's versions. Draw "
                          "them with --keep.")
    with safe_open(path, "pt") as file:
        images = [PIL.Image.fromarray(pixels) for pixels in file.get_tensor("pixels").numpy()]
        return Drawn(images, file.get_tensor("latents"), stored)


def compare(drawn: Drawn, reference: Drawn) -> dict:
    """Compares pictures and latents with the reference's.

    Returns:
        `picture_drift` of the prompts with all words ("given") and of the others ("open"), and `latent_drift`.
    """
    half = len(drawn.images) // 2
    return {"given": picture_drift(drawn.images[:half], reference.images[:half]),
            "open": picture_drift(drawn.images[half:], reference.images[half:]),
            "latents": latent_drift(drawn.latents, reference.latents)}


def judged(images: list[PIL.Image.Image], wanted: list[judge.Wanted]) -> dict[str, float]:
    """Returns the judge's "top1" and "top5". For a prompt without a background, the drawn background counts.

    Args:
        images: the first half from prompts with style and background.
        wanted: the requested contents, from `prompts`.
    """
    half = len(images) // 2
    asked = wanted[:half] + [judge.Wanted(one.emoji, one.style, judge.background(image))
                             for one, image in zip(wanted[half:], images[half:], strict=True)]
    verdicts = judge.Judge().verdicts(images, asked)
    return {key: verdicts[key] for key in ("top1", "top5")}


def shown(count: int) -> list[int]:
    """Returns the indices of the sheet's pictures, evenly from all prompts."""
    return [i * count // SHOWN for i in range(SHOWN)]


def write_sheet(images: list[PIL.Image.Image], path: Path) -> None:
    """Writes a row of small pictures as a WebP of about 3 kB."""
    sheet = PIL.Image.new("RGB", (SIDE * len(images), SIDE))
    for i, image in enumerate(images):
        sheet.paste(image.convert("RGB").resize((SIDE, SIDE), PIL.Image.Resampling.LANCZOS), (SIDE * i, 0))
    sheet.save(path, "webp", quality=70, method=6)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--keep", type=Path, metavar="FILE", help="only draw, and save the pictures as a reference")
    parser.add_argument("--reference", type=Path, metavar="FILE", help="compare with these pictures, from --keep")
    parser.add_argument("--twin", type=Path, metavar="FILE",
                        help="also compare with these pictures, of the same recipe without its step cache")
    parser.add_argument("--output-json", type=Path, metavar="FILE")
    parser.add_argument("--sheet", type=Path, metavar="FILE", help="write a few of the pictures side by side")
    parser.add_argument("--prompts", type=int, default=100)
    parser.add_argument("recipe", nargs="*", help="after --: flags of gen_image.py")
    options = parser.parse_args()
    if bool(options.keep) == bool(options.reference):
        parser.error("give either --keep FILE or --reference FILE")

    args = create_parser().parse_args(["--ckpt", "tiny-flux-dev", "--quiet", *options.recipe])
    check_args(args)
    choose_device(args)
    drawn_by = origin(options.recipe, options.prompts, args.device)
    if options.keep and read_origin(options.keep) == drawn_by:
        return
    reference = read(options.reference, drawn_by) if options.reference else None
    twin = read(options.twin, drawn_by) if options.twin else None
    texts, wanted = prompts(options.prompts)
    drawn, facts = draw(args, texts)
    if options.keep:
        drawn.made = drawn_by
        keep(drawn, options.keep)
        return

    which = shown(options.prompts)
    pictures = [drawn.images[i] for i in which]
    record = {"schema_version": SCHEMA_VERSION, "argv": options.recipe, "prompts": options.prompts, **facts,
              **compare(drawn, reference), "broken": broken_share(drawn.images, drawn.latents[:, -1]),
              "judge": judged(drawn.images, wanted),
              "twin": {"argv": twin.made["argv"], **compare(drawn, twin)} if twin else None,
              "shown": [{"prompt": texts[i], **picture_drift([image], [reference.images[i]])}
                        for i, image in zip(which, pictures, strict=True)],
              "environment": environment(args.device)}
    if options.sheet:
        write_sheet(pictures, options.sheet)
    if options.output_json:
        write_json(str(options.output_json), record)


if __name__ == "__main__":
    run_cli(main)
