"""What one set of switches does to tiny-flux's pictures: `experiments.py run GPU --suite tiny` calls this once a row.

    python -m tiny_flux.pictures --keep eager.safetensors -- --disable_bf16
    python -m tiny_flux.pictures --reference eager.safetensors --output-json row.json -- --text_encoder_quant

What follows `--` are flags of gen_image.py. 28 steps, the same prompts and seeds for all. Half of the prompts name
style and background, half leave them open, where small errors can tip a picture over. Such a small model shows whether
a switch engages and whether it breaks something; it does not show which method is better on FLUX.1's 12 B.
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
from utils import tiny_presets, weight_files
from utils.benchmark_utils import check_args, create_parser
from utils.cache import dbcache
from utils.common import RecipeError, run_cli
from utils.outputs import atomic_write, write_json
from utils.pipeline_utils import call_kwargs, load_pipeline, optimize

SHOWN, SIDE = 4, 80  # pictures on a sheet, and their pixels


@dataclass
class Drawn:
    """The pictures of all prompts, the latents (N, steps, S, C) that led to them, and what made them."""
    images: list[PIL.Image.Image]
    latents: Tensor
    made: dict


def prompts(count: int) -> tuple[list[str], list[judge.Wanted]]:
    """The first half with style and background, the second half names alone."""
    names, wanted = [one["name"] for one in judge.read_captions()], judge.training_captions(count)
    random.Random(2).shuffle(wanted)
    texts = [caption(names[one.emoji], one.style, one.colour) for one in wanted[:count // 2]]
    return texts + [names[one.emoji] for one in wanted[count // 2:]], wanted


def draw(args, texts: list[str]) -> tuple[Drawn, dict]:
    """One picture a prompt, as gen_image.py makes them, and what the record says of it."""
    pipeline = optimize(load_pipeline(args), args)
    images, latents, cached, compared, computed = [], [], [], [], []
    start = time.perf_counter()
    for i, text in enumerate(texts):
        steps = []
        kwargs = call_kwargs(pipeline, args, prompt=text, seed=args.seed + i)
        images += pipeline(**kwargs, latents=noise(pipeline, kwargs),
                           callback_on_step_end=latent_recorder(steps)).images
        latents.append(torch.cat(steps))
        if pipeline.techniques["step cache"].on:
            cached.append(dbcache.cached_steps(pipeline))
            compared.append(dbcache.residual_diffs(pipeline))
            computed.append(dbcache.last_image_steps(pipeline, len(steps)))
    seconds = time.perf_counter() - start
    facts = {"seconds": seconds, "cached_steps": sum(map(len, cached)) / len(cached) if cached else None,
             "computed_steps": sum(computed) / len(computed) if computed else None,
             **per_step(cached, compared, len(steps)),
             "techniques": {key: decision._asdict() for key, decision in pipeline.techniques.items()}}
    return Drawn(images, torch.stack(latents), {}), facts


def per_step(cached: list[list[int]], compared: list[dict[int, float]], steps: int) -> dict:
    """Of a step cache: the share of pictures in which each step was cached, and the median of each step's residual
    differences over the pictures in which one was taken."""
    if not cached:
        return {"cached_share": None, "residual_diffs": None}
    taken = {step: [one[step] for one in compared if step in one] for step in range(steps)}
    return {"cached_share": [sum(step in one for one in cached) / len(cached) for step in range(steps)],
            "residual_diffs": {step: statistics.median(values) for step, values in taken.items() if values}}


def noise(pipeline, kwargs: dict) -> Tensor:
    """What the pipeline would start from in bf16, in any dtype: up to torch 2.11 a seed's numbers depend on it."""
    latents, *_ = pipeline.prepare_latents(1, pipeline.transformer.config.in_channels // 4, kwargs["height"],
                                           kwargs["width"], torch.bfloat16, pipeline._execution_device,
                                           kwargs["generator"])
    return latents


def origin(argv: list[str], count: int, device: str) -> dict:
    """What pictures must have in common to be compared, and the flags that made them."""
    found = environment(device)
    return {"argv": argv, "prompts": count, "gpu": found.get("gpu"), "packages": found["packages"],
            "weights": weight_files.identity(tiny_presets.CHECKPOINT)}


def keep(drawn: Drawn, path: Path) -> None:
    """Writes the pictures whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = torch.from_numpy(np.stack([np.array(image.convert("RGB")) for image in drawn.images]))
    with atomic_write(path) as temporary:
        save_file({"pixels": pixels, "latents": drawn.latents}, temporary, metadata={"made": json.dumps(drawn.made)})


def read_origin(path: Path) -> dict | None:
    """What made the pictures of `path`; None without such a file."""
    if not path.exists():
        return None
    with safe_open(path, "pt") as file:
        return json.loads(file.metadata()["made"])


def read(path: Path, like: dict) -> Drawn:
    """The pictures of `path`, made on the same machine by the same versions as `like` says.

    Raises:
        RecipeError: there are none.
    """
    made = read_origin(path)
    if made is None or any(made.get(key) != like[key] for key in ("prompts", "gpu", "packages", "weights")):
        raise RecipeError(f"{path} holds no pictures of {like['prompts']} prompts by this machine's versions: make it "
                          "with --keep.")
    with safe_open(path, "pt") as file:
        images = [PIL.Image.fromarray(pixels) for pixels in file.get_tensor("pixels").numpy()]
        return Drawn(images, file.get_tensor("latents"), made)


def compare(drawn: Drawn, reference: Drawn) -> dict:
    """How far the pictures and their latents are from the reference's; prompts with all words given and open ones
    apart."""
    half = len(drawn.images) // 2
    return {"given": picture_drift(drawn.images[:half], reference.images[:half]),
            "open": picture_drift(drawn.images[half:], reference.images[half:]),
            "latents": latent_drift(drawn.latents, reference.latents)}


def judged(images: list[PIL.Image.Image], wanted: list[judge.Wanted]) -> dict[str, float]:
    """Shares of pictures of what was asked for. Where no background was, the emoji is looked for on the one drawn."""
    half = len(images) // 2
    asked = wanted[:half] + [judge.Wanted(one.emoji, one.style, judge.background(image))
                             for one, image in zip(wanted[half:], images[half:], strict=True)]
    verdicts = judge.Judge().verdicts(images, asked)
    return {key: verdicts[key] for key in ("top1", "top5")}


def shown(count: int) -> list[int]:
    """Which pictures are on the sheets: from both halves, evenly."""
    return [i * count // SHOWN for i in range(SHOWN)]


def write_sheet(images: list[PIL.Image.Image], path: Path) -> None:
    """A row of small pictures, 3 kB."""
    sheet = PIL.Image.new("RGB", (SIDE * len(images), SIDE))
    for i, image in enumerate(images):
        sheet.paste(image.convert("RGB").resize((SIDE, SIDE), PIL.Image.Resampling.LANCZOS), (SIDE * i, 0))
    sheet.save(path, "webp", quality=70, method=6)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--keep", type=Path, metavar="FILE", help="draw and keep: what other rows are compared with")
    parser.add_argument("--reference", type=Path, metavar="FILE", help="the kept pictures to compare with")
    parser.add_argument("--twin", type=Path, metavar="FILE", help="also with these, of the same recipe without a cache")
    parser.add_argument("--output-json", type=Path, metavar="FILE")
    parser.add_argument("--sheet", type=Path, metavar="FILE", help="a few of the pictures side by side")
    parser.add_argument("--prompts", type=int, default=100)
    parser.add_argument("recipe", nargs="*", help="after --: flags of gen_image.py")
    own = parser.parse_args()
    if bool(own.keep) == bool(own.reference):
        parser.error("give either --keep or --reference")

    args = create_parser().parse_args(["--ckpt", "tiny-flux-dev", "--quiet", *own.recipe])
    check_args(args)
    made = origin(own.recipe, own.prompts, args.device)
    if own.keep and read_origin(own.keep) == made:
        return
    reference = read(own.reference, made) if own.reference else None
    twin = read(own.twin, made) if own.twin else None
    texts, wanted = prompts(own.prompts)
    drawn, facts = draw(args, texts)
    if own.keep:
        drawn.made = made
        keep(drawn, own.keep)
        return

    which = shown(own.prompts)
    pictures = [drawn.images[i] for i in which]
    record = {"schema_version": SCHEMA_VERSION, "argv": own.recipe, "prompts": own.prompts, **facts,
              **compare(drawn, reference), "broken": broken_share(drawn.images, drawn.latents[:, -1]),
              "judge": judged(drawn.images, wanted),
              "twin": {"argv": twin.made["argv"], **compare(drawn, twin)} if twin else None,
              "shown": [{"prompt": texts[i], **picture_drift([image], [reference.images[i]])}
                        for i, image in zip(which, pictures, strict=True)],
              "environment": environment(args.device)}
    if own.sheet:
        write_sheet(pictures, own.sheet)
    if own.output_json:
        write_json(str(own.output_json), record)


if __name__ == "__main__":
    run_cli(main)
