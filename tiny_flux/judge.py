"""Judges which emoji a picture of tiny-flux shows, in which style and on which background.

    python -m tiny_flux.judge --output-json results/tiny/judge.json      # two cores, 2 minutes

The judge is independent of the model. It finds the nearest of all 1,094 emoji in both styles and 19 poses, as 16x16
pixels on the requested background. It recognizes 99 of 100 training pictures in random poses.
"""

import argparse
import json
import random
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import PIL.Image
import torch
import torch.nn.functional as F
from diffusers import DiffusionPipeline

from bench.environment import environment
from tiny_flux.training.data import COLOUR_NAMES, COLOURS, STYLES, caption, held_out, instruction, load_pictures
from utils.outputs import write_json
from utils.tiny_presets import CHECKPOINT, TRAINED_LENGTH, as_preset

HERE = Path(__file__).parent
CAPTIONS, REFERENCES = HERE / "captions.json", HERE / "references.webp"
SIDE, COLUMNS = 16, 47
PALETTE = torch.tensor(list(COLOURS.values())) / 255
POSES = [(1.0, 0, 0), *((scale, x, y) for scale in (0.93, 0.85) for x in (-1, 0, 1) for y in (-1, 0, 1))]


@dataclass(frozen=True)
class Wanted:
    """A picture's requested content: an index into `read_captions`, a style and a background colour."""
    emoji: int
    style: str
    colour: str


def read_captions() -> list[dict]:
    """Returns the slug, name, keywords and category of every emoji, in the order of the references."""
    return json.loads(CAPTIONS.read_text())["emoji"]


def write_references(data: Path) -> None:
    """Writes the judge's files and their notices, which are in the repository, from the folder that data.py wrote."""
    for name in ("captions.json", "NOTICE"):
        (HERE / name).write_bytes((data / name).read_bytes())
    pictures = torch.from_numpy(load_pictures(data, [one["slug"] for one in read_captions()])).flatten(0, 1)
    tiles = F.interpolate(pictures.float(), size=(SIDE, SIDE), mode="area").round().byte()
    rows = -(-len(tiles) // COLUMNS)
    sheet = np.zeros((rows, SIDE, COLUMNS, SIDE, 4), np.uint8)
    for i, tile in enumerate(tiles):
        sheet[i // COLUMNS, :, i % COLUMNS] = tile.permute(1, 2, 0)
    image = PIL.Image.fromarray(sheet.reshape(rows * SIDE, COLUMNS * SIDE, 4), "RGBa").convert("RGBA")
    image.save(REFERENCES, "webp", quality=85, method=6)


class Judge:
    """Compares pictures with every emoji in every style and pose."""

    def __init__(self):
        self.count = len(read_captions())
        with PIL.Image.open(REFERENCES) as sheet:
            pixels = torch.from_numpy(np.array(sheet.convert("RGBA").convert("RGBa")))
        tiles = pixels.unflatten(0, (-1, SIDE)).unflatten(2, (COLUMNS, SIDE)).permute(0, 2, 4, 1, 3).flatten(0, 1)
        tiles = tiles[:len(STYLES) * self.count].float() / 255
        placed = []
        for scale, right, down in POSES:
            room = (1 - scale) / scale
            affine = torch.tensor([[1 / scale, 0, -right * room], [0, 1 / scale, -down * room]])
            grid = F.affine_grid(affine.expand(len(tiles), 2, 3), list(tiles.shape), align_corners=False)
            placed.append(F.grid_sample(tiles, grid, align_corners=False))
        self.references = torch.stack(placed, 1).flatten(0, 1)  # (style, emoji, pose), alpha premultiplied

    def distances(self, images: list[PIL.Image.Image], colours: list[str]) -> torch.Tensor:
        """Returns the distance of each picture to each emoji's nearest pose, (pictures, styles, emoji).

        Args:
            colours: the requested background of each picture.
        """
        pixels, found = torch.stack([shrink(image) for image in images]), {}
        for name in set(colours):
            colour = PALETTE[COLOUR_NAMES.index(name)][:, None, None]
            shown = self.references[:, :3] + (1 - self.references[:, 3:]) * colour
            asked = [i for i, other in enumerate(colours) if other == name]
            far = torch.cdist(pixels[asked].flatten(1), shown.flatten(1)).view(len(asked), len(STYLES), self.count, -1)
            found |= dict(zip(asked, far.amin(-1), strict=True))
        return torch.stack([found[i] for i in range(len(images))])

    def verdicts(self, images: list[PIL.Image.Image], wanted: list[Wanted]) -> dict[str, float]:
        """Returns the number of "pictures", and the shares of pictures that pass each test.

        "top1": the requested emoji is the nearest. "top5": it is among the nearest five. "style" and "background": they
        match the request.
        """
        far = self.distances(images, [one.colour for one in wanted])
        emoji = torch.tensor([one.emoji for one in wanted])
        nearest = far.amin(1)
        rank = (nearest < nearest.gather(1, emoji[:, None])).sum(1)
        styles = far[torch.arange(len(wanted)), :, emoji].argmin(1)
        return {"pictures": len(images), "top1": share(rank < 1), "top5": share(rank < 5),
                "style": share(styles == torch.tensor([STYLES.index(one.style) for one in wanted])),
                "background": share(torch.tensor([background(image) == one.colour
                                                  for image, one in zip(images, wanted, strict=True)]))}


def share(right: torch.Tensor) -> float:
    """Returns the share of true values."""
    return right.float().mean().item()


def shrink(image: PIL.Image.Image) -> torch.Tensor:
    """Returns the picture at 16x16 pixels, (3, 16, 16) from 0 to 1, by averaging."""
    return torch.from_numpy(np.array(image.convert("RGB").resize((SIDE, SIDE), PIL.Image.Resampling.BOX))
                            ).permute(2, 0, 1).float() / 255


def background(image: PIL.Image.Image) -> str:
    """Returns the name of the colour nearest to the median of the picture's four corners.

    A corner's side is an eighth of the picture's.
    """
    pixels = torch.from_numpy(np.array(image.convert("RGB"))).float() / 255
    side = pixels.shape[0] // 8
    corners = [pixels[y, x] for y in (slice(side), slice(-side, None)) for x in (slice(side), slice(-side, None))]
    colour = torch.cat([corner.reshape(-1, 3) for corner in corners]).median(0).values
    return COLOUR_NAMES[(PALETTE - colour).norm(dim=1).argmin()]


# --- requests ---

def training_captions(count: int) -> list[Wanted]:
    """Returns `count` requests that training may have shown, without held-out combinations.

    The emoji come from all categories, the styles alternate, and the backgrounds are random with a fixed seed.
    """
    emoji = read_captions()
    unseen = set(held_out([one["slug"] for one in emoji]))
    draw, found = random.Random(0), []
    for i in range(count):
        which = i * len(emoji) // count
        colours = [colour for colour in COLOUR_NAMES if (emoji[which]["slug"], colour) not in unseen]
        found.append(Wanted(which, STYLES[i % 2], draw.choice(colours)))
    return found


def held_out_captions() -> list[Wanted]:
    """Returns every combination of emoji and background that training held out."""
    slugs = [one["slug"] for one in read_captions()]
    return [Wanted(slugs.index(slug), STYLES[i % 2], colour) for i, (slug, colour) in enumerate(held_out(slugs))]


def edits_of(pictures: list[Wanted]) -> tuple[list[str], list[Wanted]]:
    """Returns an instruction for each picture, and the requested content after the edit.

    The instructions change in turn the background, the style, and both.
    """
    draw, texts, found = random.Random(1), [], []
    for i, one in enumerate(pictures):
        colour = draw.choice([name for name in COLOUR_NAMES if name != one.colour]) if i % 3 != 1 else None
        style = STYLES[1 - STYLES.index(one.style)] if i % 3 != 0 else None
        texts.append(instruction(style, colour))
        found.append(Wanted(one.emoji, style or one.style, colour or one.colour))
    return texts, found


def draw_pictures(pipeline, texts: list[str], steps: int, images=None, at_once: int = 25) -> list[PIL.Image.Image]:
    """Draws one 128x128 picture for each text. The index of a text is its seed.

    Args:
        images: pictures to edit; None for text to image.
        at_once: texts in one call of the pipeline.
    """
    found = []
    for start in range(0, len(texts), at_once):
        part = slice(start, start + at_once)
        edit = {} if images is None else dict(image=images[part], max_area=128**2, _auto_resize=False)
        found += pipeline(
            prompt=texts[part], height=128, width=128, num_inference_steps=steps, guidance_scale=3.5,
            max_sequence_length=TRAINED_LENGTH,
            generator=[torch.Generator().manual_seed(i) for i in range(start, start + len(texts[part]))],
            **edit).images
    return found


def evaluate(device: str, checkpoint: Path) -> tuple[dict, dict]:
    """Draws and judges the checkpoint's pictures. Returns the verdicts and the pictures, both by the test's name."""
    judge, dev = Judge(), DiffusionPipeline.from_pretrained(checkpoint, dtype=torch.bfloat16).to(device)
    dev.set_progress_bar_config(disable=True)
    names = [one["name"] for one in read_captions()]
    wanted, unseen = training_captions(200), held_out_captions()
    pictures, verdicts = {}, {}

    def ask(what: str, form: str, steps: int, wanted: list[Wanted], texts: list[str] | None = None, images=None):
        pipeline = as_preset(dev, form)
        pipeline.set_progress_bar_config(disable=True)
        texts = texts or [caption(names[one.emoji], one.style, one.colour) for one in wanted]
        pictures[what] = draw_pictures(pipeline, texts, steps, images=images)
        verdicts[what] = judge.verdicts(pictures[what], wanted)
        print(f"{what}: {verdicts[what]}", flush=True)

    ask("28 steps", "tiny-flux-dev", 28, wanted)
    ask("4 steps", "tiny-flux", 4, wanted)
    ask("held-out combinations, 28 steps", "tiny-flux-dev", 28, unseen)
    texts, edited = edits_of(wanted[:100])
    ask("edits, 28 steps", "tiny-kontext", 28, edited, texts, pictures["28 steps"][:100])
    return verdicts, pictures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--references", type=Path, metavar="DATA",
                        help="only write the judge's files, from data.py's folder DATA")
    parser.add_argument("--checkpoint", type=Path, default=CHECKPOINT)
    parser.add_argument("--output-json", type=Path)
    parser.add_argument("--sheet", type=Path, help="also write 100 of the 28-step pictures as one image")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
    if args.references:
        return write_references(args.references)
    verdicts, pictures = evaluate(args.device, args.checkpoint)
    if args.sheet:
        sheet = PIL.Image.new("RGB", (20 * 96, 5 * 96))
        for i, image in enumerate(pictures["28 steps"][:200:2]):
            sheet.paste(image.resize((96, 96)), (i % 20 * 96, i // 20 * 96))
        sheet.save(args.sheet)
    if args.output_json:
        args.output_json.parent.mkdir(parents=True, exist_ok=True)
        write_json(args.output_json, {"verdicts": verdicts, "environment": environment(args.device)})


if __name__ == "__main__":
    main()
