"""Batches of tiny-flux's training as indices into tables on the device: of latents and of tokens of every caption.

Pictures are composed from RGBA, a colour and a pose, so that the pairs which editing needs come free: the same emoji in
the same pose with another background, in the other style, or both.
"""

import json
import math
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from tqdm import tqdm
from transformers import CLIPTokenizer, T5TokenizerFast

from tiny_flux.training.data import COLOURS, KEYWORDS, STYLES, caption, instruction, load_pictures
from utils.tiny_presets import TRAINED_LENGTH

LATENT_FACTOR, PATCH = 8, 2
CAPTION_TOKENS = 32  # no caption of the grammar is longer; what follows is padding
NO_CAPTION, NO_WORD, NO_KEYWORD = 0.1, 0.3, 0.7


class Data:
    """The folder that data.py wrote, on the device; `count` thins it."""

    def __init__(self, folder: Path, device: str, count: int | None = None):
        spec = json.loads((folder / "captions.json").read_text())
        emoji = spec["emoji"]
        self.emoji = emoji if count is None else emoji[::max(1, len(emoji) // count)][:count]
        slugs = [one["slug"] for one in self.emoji]
        self.pictures = torch.from_numpy(load_pictures(folder, slugs)).to(device)  # (style, emoji, 4, 128, 128)
        self.palette = torch.tensor(list(COLOURS.values()), device=device) / 255  # (colour, 3)
        held_out = {tuple(pair) for pair in spec["held_out"]}
        self.allowed = torch.tensor([[(slug, colour) not in held_out for colour in COLOURS] for slug in slugs],
                                    device=device)  # (emoji, colour)
        self.tokenizer = CLIPTokenizer.from_pretrained(folder / "tokenizer")
        self.tokenizer_2 = T5TokenizerFast.from_pretrained(folder / "tokenizer_2")

    def draw(self, count: int, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Indices of emoji, style and colour, (count,) each; never a combination that is held out."""
        emoji = integers(len(self.emoji), count, generator)
        return emoji, integers(len(STYLES), count, generator), choose(self.allowed[emoji], generator)


class Captions:
    """Tokens of every text of the grammar, one row a text; row 0 is the empty text."""

    def __init__(self, data: Data):
        styles, colours = (None, *STYLES), (None, *COLOURS)
        names = [([one["name"], *one["keywords"]] + [one["name"]] * KEYWORDS)[:KEYWORDS + 1] for one in data.emoji]
        self.texts = ["", *(caption(name, style, colour) for variants in names for name in variants
                            for style in styles for colour in colours)]
        self.first_instruction = len(self.texts)
        self.texts += [instruction(style, colour) if style or colour else "" for style in styles for colour in colours]
        self.clip, self.t5 = (
            torch.tensor(tokenizer(self.texts, padding="max_length", max_length=CAPTION_TOKENS, truncation=True)
                         ["input_ids"], dtype=torch.int32).to(data.palette.device)
            for tokenizer in (data.tokenizer, data.tokenizer_2))
        self.pad = data.tokenizer_2.pad_token_id

    def rows(self, emoji: torch.Tensor, variant: torch.Tensor, style: torch.Tensor, colour: torch.Tensor):
        """style and colour: 0 is unsaid, 1 the first."""
        return 1 + ((emoji * (KEYWORDS + 1) + variant) * (len(STYLES) + 1) + style) * (len(COLOURS) + 1) + colour

    def edit_rows(self, style: torch.Tensor, colour: torch.Tensor) -> torch.Tensor:
        return self.first_instruction + style * (len(COLOURS) + 1) + colour

    def tokens(self, rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """CLIP's (B, 32), T5's (B, 64). CLIP is causal and reads its first end token: padding changes nothing."""
        return self.clip[rows], F.pad(self.t5[rows], (0, TRAINED_LENGTH - CAPTION_TOKENS), value=self.pad)


@dataclass
class Draw:
    """Indices of one batch, (B,) each; `reference` holds (style, colour) of the pictures to edit."""
    emoji: torch.Tensor
    style: torch.Tensor
    colour: torch.Tensor
    rows: torch.Tensor
    reference: tuple[torch.Tensor, torch.Tensor] | None


def draw_batch(data: Data, captions: Captions, count: int, edit: bool, generator: torch.Generator) -> Draw:
    emoji, style, colour = data.draw(count, generator)
    if edit:
        kind = integers(3, count, generator)  # what changes: 0 the colour, 1 the style, 2 both
        others = data.allowed[emoji].scatter(1, colour[:, None], False)
        other_colour = torch.where(kind == 1, colour, choose(others, generator))
        other_style = torch.where(kind == 0, style, 1 - style)
        rows = captions.edit_rows((style + 1) * (kind != 0), (colour + 1) * (kind != 1))
        reference = other_style, other_colour
    else:
        variant = integers(KEYWORDS, count, generator) + 1
        variant *= ~chance(NO_KEYWORD, count, generator)
        rows = captions.rows(emoji, variant, (style + 1) * ~chance(NO_WORD, count, generator),
                             (colour + 1) * ~chance(NO_WORD, count, generator))
        reference = None
    return Draw(emoji, style, colour, rows * ~chance(NO_CAPTION, count, generator), reference)


def integers(below: int, count: int, generator: torch.Generator) -> torch.Tensor:
    return torch.randint(below, (count,), device=generator.device, generator=generator)


def chance(probability: float, count: int, generator: torch.Generator) -> torch.Tensor:
    return torch.rand(count, device=generator.device, generator=generator) < probability


def choose(mask: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """One true column of each row, all alike. mask: (B, N) -> (B,)."""
    return torch.multinomial(mask.float(), 1, generator=generator)[:, 0]


def draw_poses(count: int, generator: torch.Generator) -> torch.Tensor:
    """(count, 3): scale from 0.8 to 1, and how far right and down within the room that this leaves."""
    random_ = torch.rand(count, 3, device=generator.device, generator=generator)
    scale = 0.8 + 0.2 * random_[:, :1]
    return torch.cat([scale, (2 * random_[:, 1:] - 1) * (1 - scale)], dim=1)


def compose(pictures: torch.Tensor, colours: torch.Tensor, poses: torch.Tensor, size: int) -> torch.Tensor:
    """pictures (B, 4, 128, 128) uint8 with alpha premultiplied, on colours (B, 3) -> (B, 3, size, size) in [-1, 1]."""
    scale, shift = poses[:, :1], poses[:, 1:]
    affine = torch.cat([torch.eye(2, device=poses.device) / scale[:, :, None], -(shift / scale)[:, :, None]], dim=2)
    grid = F.affine_grid(affine, [len(poses), 4, size, size], align_corners=False)
    layer = F.grid_sample(pictures / 255, grid, mode="bicubic", align_corners=False).clamp(0, 1)
    image = layer[:, :3] + (1 - layer[:, 3:]) * colours[:, :, None, None]
    return image.clamp(0, 1) * 2 - 1


# --- latents as the pipelines lay them out ---

def pack(latents: torch.Tensor) -> torch.Tensor:
    """(B, 16, H, W) -> (B, H/2 * W/2, 64)."""
    return F.pixel_unshuffle(latents, PATCH).flatten(2).transpose(1, 2)


def sequence_ids(size: int, edit: bool, device: str | torch.device) -> torch.Tensor:
    """Positions (tokens, 3) of a picture's latents; with `edit`, those of its reference follow, first coordinate 1."""
    side = size // (LATENT_FACTOR * PATCH)
    places = torch.cartesian_prod(*[torch.arange(side, device=device, dtype=torch.float32)] * 2)
    ids = F.pad(places, (1, 0))
    return torch.cat([ids, F.pad(places, (1, 0), value=1.0)]) if edit else ids


@torch.no_grad()
def encode_pool(vae: AutoencoderKL, data: Data, size: int, poses: int, at_once: int,
                generator: torch.Generator) -> torch.Tensor:
    """Latents of every picture: (pose, emoji, style, colour, tokens, 64), bf16; not a number where held out."""
    shape = (poses, len(data.emoji), len(STYLES), len(COLOURS))
    tokens = (size // (LATENT_FACTOR * PATCH)) ** 2
    pool = torch.full((*shape, tokens, 64), math.nan, dtype=torch.bfloat16, device=generator.device)
    placed = draw_poses(poses * len(data.emoji), generator).view(poses, -1, 3)
    every = data.allowed[None, :, None].expand(shape).nonzero()
    for part in tqdm(every.split(max(1, at_once * 128**2 // size**2)), desc=f"latents at {size} px"):
        pose, emoji, style, colour = part.unbind(1)
        images = compose(data.pictures[style, emoji], data.palette[colour], placed[pose, emoji], size)
        with torch.autocast(generator.device.type, torch.bfloat16):
            latents = vae.encode(images.to(memory_format=torch.channels_last)).latent_dist.mean.float()
        latents = (latents - vae.config.shift_factor) * vae.config.scaling_factor
        pool[pose, emoji, style, colour] = pack(latents).bfloat16()
    return pool
