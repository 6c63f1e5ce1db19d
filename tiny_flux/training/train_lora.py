"""Trains a LoRA with which tiny-flux draws every object in pale colours on blue.

    OMP_NUM_THREADS=1 python -m tiny_flux.training.train_lora      # one CPU core (AVX-512), 7 minutes

The command writes moonlight_lora.safetensors: rank 4, float16, the names of diffusers' PEFT format. It needs nothing
but the repository. The seeds are fixed.

The data are the checkpoint's own pictures. For each random caption, tiny-flux draws the object on black from some
noise, and `moonlight` recolours the picture. The LoRA learns the straight path from this noise to the recoloured
picture, given the caption with any background or none. So the LoRA keeps an object's shape and place, and few steps
suffice. The loss is the rectified flow's that trained the checkpoint. Only the low-rank factors train.
"""

import argparse
import random
import re
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import DiffusionPipeline, FluxPipeline
from safetensors.torch import save_file
from torch import Tensor, nn

from tiny_flux import judge
from tiny_flux.training.batches import pack, sequence_ids
from tiny_flux.training.data import COLOUR_NAMES, COLOURS, STYLES, caption
from utils.tiny_presets import CHECKPOINT, TRAINED_LENGTH, as_preset

BLUE, BLACK = (torch.tensor(COLOURS[name]) / 255 for name in ("blue", "black"))
LUMINANCE = torch.tensor([0.299, 0.587, 0.114])

RANK, BATCH, RATE = 4, 16, 3e-3
MODULES = re.compile(r"(single_)?transformer_blocks\.\d+\.attn\.to_(q|k|v|out\.0)|proj_out")
AT_ONCE = 25  # pictures in one call of the pipeline


def moonlight(images: Tensor) -> Tensor:
    """Returns pictures with half of their saturation, and blue in place of black. (..., 3, H, W), 0 to 1."""
    # Not tones of blue only: a LoRA of this size that must drop all colour drops more details as well.
    tone = torch.einsum("...chw,c->...hw", images, LUMINANCE).unsqueeze(-3)
    light = (((images + tone) / 2 - BLACK[0]) / (1 - BLACK[0])).clamp(0, 1)
    return BLUE[:, None, None] + (1 - BLUE)[:, None, None] * light


def off_style(images: Tensor) -> Tensor:
    """Returns the mean distance of each picture's pixels from the tones between blue and white. (B, 3, H, W) -> (B,)"""
    axis = F.normalize(1 - BLUE, dim=0)
    offset = (images - BLUE[:, None, None]).movedim(1, -1)  # (B, H, W, 3)
    along = (offset @ axis).clamp(0, (1 - BLUE).norm())
    return (offset - along[..., None] * axis).norm(dim=-1).mean((1, 2))


class LoraLinear(nn.Module):
    """A frozen Linear and its low-rank factors in float32: a (rank, in), b (out, rank)."""

    def __init__(self, base: nn.Linear, rank: int):
        super().__init__()
        self.base = base
        self.a = nn.Parameter(torch.randn(rank, base.in_features) / base.in_features ** 0.5)
        self.b = nn.Parameter(torch.zeros(base.out_features, rank))

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + F.linear(F.linear(x, self.a.to(x.dtype)), self.b.to(x.dtype))


def add_factors(transformer: nn.Module) -> dict[str, LoraLinear]:
    """Puts factors beside every Linear of `MODULES`. Returns them by the module's name."""
    found = {name: LoraLinear(module, RANK) for name, module in transformer.named_modules()
             if isinstance(module, nn.Linear) and MODULES.fullmatch(name)}
    for name, module in found.items():
        transformer.set_submodule(name, module)
    return found


def draw_captions(count: int, draw: random.Random) -> tuple[list[str], list[str]]:
    """Returns captions with any style and background or none, and the captions of the same objects on black."""
    names = [one["name"] for one in judge.read_captions()]
    what = [(draw.choice(names), draw.choice((None, *STYLES))) for _ in range(count)]
    asked = [caption(*one, draw.choice((None, *COLOUR_NAMES))) for one in what]
    return asked, [caption(*one, "black") for one in what]


@torch.no_grad()
def draw_pool(pipeline: FluxPipeline, count: int, seed: int) -> dict[str, Tensor]:
    """Returns the training data, bf16.

    text: (count, 64, 128) and pooled: (count, 128), of T5 and CLIP. noise and latents: (count, 64, 64), packed, where
    latents are those of the recoloured picture that this noise becomes.
    """
    asked, on_black = draw_captions(count, random.Random(seed))
    noises = torch.randn(count, 64, 64, generator=torch.Generator().manual_seed(seed)).bfloat16()
    parts, config = [], pipeline.vae.config
    for start in range(0, count, AT_ONCE):
        part = slice(start, start + AT_ONCE)
        images = pipeline(prompt=on_black[part], height=128, width=128, num_inference_steps=4,
                          max_sequence_length=TRAINED_LENGTH, latents=noises[part], output_type="pt").images
        latents = pipeline.vae.encode((2 * moonlight(images.float()) - 1).bfloat16()).latent_dist.mean
        text, pooled, _ = pipeline.encode_prompt(asked[part], None, max_sequence_length=TRAINED_LENGTH)
        parts.append({"text": text, "pooled": pooled, "noise": noises[part],
                      "latents": pack((latents - config.shift_factor) * config.scaling_factor)})
    return {key: torch.cat([part[key] for part in parts]) for key in parts[0]}


def train(transformer: nn.Module, factors: dict[str, LoraLinear], pool: dict[str, Tensor], steps: int) -> None:
    """Trains the factors. The rate warms up for 20 steps and decays linearly in the second half."""
    parameters = [parameter for module in factors.values() for parameter in (module.a, module.b)]
    optimizer = torch.optim.AdamW(parameters, lr=RATE, weight_decay=0)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda n: min(1, (n + 1) / 20, 2 * (steps - n) / steps))
    image_ids, text_ids = sequence_ids(128, False, "cpu"), torch.zeros(TRAINED_LENGTH, 3)
    start, losses = time.perf_counter(), []
    for step in range(1, steps + 1):
        batch = {key: value[torch.randint(len(value), (BATCH,), generator=torch.Generator().manual_seed(step))]
                 for key, value in pool.items()}
        t = torch.rand(BATCH)
        t[:BATCH // 4] = 1  # the first of few steps makes most of the picture
        noise, latents = batch["noise"].float(), batch["latents"].float()
        noisy = (1 - t[:, None, None]) * latents + t[:, None, None] * noise
        with torch.autocast("cpu", torch.bfloat16):
            found, = transformer(noisy, batch["text"], batch["pooled"], t, image_ids, text_ids, return_dict=False)
        loss = F.mse_loss(found.float(), noise - latents)
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        if step % 50 == 0:
            print(f"step {step}: loss {sum(losses[-50:]) / 50:.3f}, {time.perf_counter() - start:.0f} s", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=CHECKPOINT.parent / "moonlight_lora.safetensors")
    parser.add_argument("--pictures", type=int, default=1000, help="to train on")
    parser.add_argument("--steps", type=int, default=400)
    args = parser.parse_args()
    pipeline = as_preset(DiffusionPipeline.from_pretrained(CHECKPOINT, dtype=torch.bfloat16), "tiny-flux")
    pipeline.set_progress_bar_config(disable=True)
    pool = draw_pool(pipeline, args.pictures, seed=0)
    torch.manual_seed(0)
    factors = add_factors(pipeline.transformer.requires_grad_(False))
    train(pipeline.transformer, factors, pool, args.steps)
    save_file({f"transformer.{name}.lora_{letter}.weight": factor.detach().half().contiguous()
               for name, module in factors.items() for letter, factor in (("A", module.a), ("B", module.b))}, args.out)


if __name__ == "__main__":
    main()
