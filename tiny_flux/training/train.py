"""Trains tiny-flux: a FLUX of 22 MB that draws about 1,000 emoji, and edits them as Kontext does.

    python -m tiny_flux.training.train vae flow guidance assemble            # one GPU: 15 minutes on an H100
    python -m tiny_flux.training.train vae flow guidance assemble --smoke    # a CPU, 2 minutes: does every line run?

Needs the folder that `data.py` wrote. The phases, each with its own checkpoint in --run, from which it goes on when it
was cut off and which skips it when it is done:

    vae        AutoencoderKL on the composed pictures
    flow       rectified flow on latents encoded beforehand; T5 and CLIP are trained along
    guidance   the guidance embedder learns what classifier-free guidance would give (FLUX.1-dev's distillation)
    assemble   bf16 weights in diffusers' layout in --out, and a sheet of samples

A step does nothing on the CPU but launch: batches are indices into tables on the GPU (`batches.py`), and what follows
is a CUDA graph (`loop.py`). Step n draws from
a seed made of n, so that a run that goes on draws what it would have drawn. Where one call may not last long enough,
--stop_after ends it in time (exit status 75) and the same command goes on. While a file `pause` is in --run it waits.
"""

import argparse
import copy
import json
import random
import time
from dataclasses import replace
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, FluxTransformer2DModel
from transformers import CLIPTextConfig, CLIPTextModel, T5Config, T5EncoderModel

from tiny_flux.training.batches import (
    Captions,
    Data,
    chance,
    compose,
    draw_batch,
    draw_poses,
    encode_pool,
    integers,
    sequence_ids,
)
from tiny_flux.training.export import assemble, draw_sheet
from tiny_flux.training.loop import SMOKE, OutOfTime, Settings, load_averages, load_state, run_phase
from utils.tiny_presets import TRAINED_LENGTH

TRANSFORMER = dict(
    patch_size=1, in_channels=64, num_layers=3, num_single_layers=5, attention_head_dim=64, num_attention_heads=3,
    joint_attention_dim=128, pooled_projection_dim=128, guidance_embeds=True, axes_dims_rope=(8, 28, 28))
VAE = dict(
    down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4,
    block_out_channels=(32, 64, 96, 96), layers_per_block=1, latent_channels=16, norm_num_groups=8, sample_size=128,
    use_quant_conv=False, use_post_quant_conv=False, mid_block_add_attention=False, force_upcast=False)
T5 = dict(d_model=128, d_kv=64, d_ff=256, num_layers=2, num_heads=2, feed_forward_proj="gated-gelu",
          is_encoder_decoder=False, use_cache=False, dropout_rate=0.0)
CLIP = dict(hidden_size=128, intermediate_size=256, num_hidden_layers=2, num_attention_heads=2, projection_dim=128,
            max_position_embeddings=77)

PHASES = ("vae", "flow", "guidance", "assemble")
SIZES = {128: 0.8, 256: 0.2}
# (pixels, edit) and their share of the steps: few, since each is compiled for itself.
BATCHES = {(128, False): 0.55, (128, True): 0.2, (256, False): 0.15, (256, True): 0.1}
GUIDANCE = (1.0, 5.0)


def build_vae(args) -> AutoencoderKL:
    torch.manual_seed(args.seed)
    return AutoencoderKL(**VAE).to(args.device, memory_format=torch.channels_last)


def trained_vae(args) -> AutoencoderKL:
    if args.vae:
        return AutoencoderKL.from_pretrained(args.vae).to(args.device, memory_format=torch.channels_last).eval()
    vae = build_vae(args)
    load_averages(args.run, "vae", vae)
    vae.register_to_config(**json.loads((args.run / "vae.json").read_text())["config"])
    return vae.eval().requires_grad_(False)


def build_flow(data: Data, args) -> torch.nn.ModuleDict:
    """Transformer and text encoders, as DiT starts: every block is the identity and the output is zero."""
    torch.manual_seed(args.seed)
    transformer = FluxTransformer2DModel(**TRANSFORMER)
    modulations = [m.linear for m in transformer.modules() if type(m).__name__.startswith("AdaLayerNorm")]
    guided = transformer.time_text_embed.guidance_embedder.linear_2
    for linear in (*modulations, transformer.proj_out, guided):
        torch.nn.init.zeros_(linear.weight)
        torch.nn.init.zeros_(linear.bias)
    guided.requires_grad_(False)  # guidance says nothing until the phase that teaches it
    words = data.tokenizer
    clip = CLIPTextModel(CLIPTextConfig(**CLIP, vocab_size=len(words), bos_token_id=words.bos_token_id,
                                        eos_token_id=words.eos_token_id, pad_token_id=words.pad_token_id))
    t5 = T5EncoderModel(T5Config(**T5, vocab_size=len(data.tokenizer_2)))
    return torch.nn.ModuleDict(
        {"transformer": transformer, "text_encoder": clip, "text_encoder_2": t5}).to(args.device).train()


def train_vae(data: Data, settings: Settings, args) -> None:
    vae = build_vae(args)

    def pictures(count: int, size: int, generator: torch.Generator) -> torch.Tensor:
        emoji, style, colour = data.draw(count, generator)
        images = compose(data.pictures[style, emoji], data.palette[colour], draw_poses(count, generator), size)
        return images.to(memory_format=torch.channels_last)

    def draw_batch_(generator, draw):
        size = draw.choices(list(SIZES), SIZES.values())[0]
        images = pictures(max(1, settings.pictures * 128**2 // size**2), size, generator)
        shape = (len(images), vae.config.latent_channels, size // 8, size // 8)
        noise = torch.randn(shape, device=args.device, generator=generator)
        return {"images": images, "noise": noise}, len(images), size

    def loss_of(batch):
        with torch.autocast(args.device, torch.bfloat16):
            latents = vae.encode(batch["images"]).latent_dist
            found = vae.decode(latents.mean + latents.std * batch["noise"]).sample
        return vae_loss(found.float(), batch["images"], latents.mean.float(), latents.logvar.float())

    run_phase("vae", vae, draw_batch_, loss_of, settings, args)
    load_averages(args.run, "vae", vae)
    generator = torch.Generator(args.device).manual_seed(args.seed)
    with torch.no_grad(), torch.autocast(args.device, torch.bfloat16):
        images = pictures(settings.pictures, 128, generator)
        latents = vae.encode(images).latent_dist.mean.float()
        error = (vae.decode(latents).sample.float().clamp(-1, 1) - images).pow(2).mean((1, 2, 3)) / 4
    shown = {"psnr": -10 * error.log10().mean().item(),
             "config": {"scaling_factor": 1 / latents.std().item(), "shift_factor": latents.mean().item()}}
    (args.run / "vae.json").write_text(json.dumps(shown))
    print(f"vae: {shown['psnr']:.1f} dB")


def vae_loss(found, images, mean, log_variance) -> torch.Tensor:
    """found and images: (B, 3, H, W). Pixels, their coarse means and edges, and a little pull to a unit Gaussian."""
    difference = found - images
    edges = difference.diff(dim=2).abs().mean() + difference.diff(dim=3).abs().mean()
    divergence = 0.5 * (mean.pow(2) + log_variance.exp() - 1 - log_variance).mean()
    return (difference.abs().mean() + 0.5 * F.avg_pool2d(difference, 4).abs().mean() + 0.5 * edges
            + difference.pow(2).mean() + 3e-4 * divergence)


class Latents:
    """Batches of noised latents with their captions and, when editing, their references."""

    def __init__(self, data: Data, settings: Settings, args):
        self.data, self.budget, self.captions = data, settings.tokens, Captions(data)
        vae, generator = trained_vae(args), torch.Generator(args.device).manual_seed(args.seed)
        self.pools = {size: encode_pool(vae, data, size, poses, 4 * settings.pictures, generator)
                      for size, poses in settings.poses.items()}

    def draw(self, generator: torch.Generator, draw: random.Random) -> tuple[dict[str, torch.Tensor], int, str]:
        """A batch, its size and its kind. latents, noise and, when editing, reference: (B, tokens, 64); t: (B,); rows:
        (B,) of captions; ids: (tokens, 3), a reference's included."""
        size, edit = draw.choices(list(BATCHES), BATCHES.values())[0]
        pool, ids = self.pools[size], sequence_ids(size, edit, generator.device)
        count = max(1, self.budget // (len(ids) + TRAINED_LENGTH))
        what, pose = draw_batch(self.data, self.captions, count, edit, generator), integers(len(pool), count, generator)
        latents = pool[pose, what.emoji, what.style, what.colour].float()
        uniform, normal = (make(count, device=generator.device, generator=generator)
                           for make in (torch.rand, torch.randn))
        batch = {"latents": latents, "rows": what.rows, "ids": ids,
                 "noise": torch.randn(latents.shape, device=generator.device, generator=generator),
                 "t": torch.where(chance(0.25, count, generator), uniform, normal.sigmoid())}
        if edit:
            batch["reference"] = pool[pose, what.emoji, *what.reference].float()
        return batch, count, f"{count} at {size} px{', edit' if edit else ''}"


def noised(batch: dict) -> tuple[torch.Tensor, torch.Tensor]:
    """What the transformer reads, (B, tokens, 64), the reference's latents behind the noisy ones; and the velocity."""
    t = batch["t"][:, None, None]
    noisy = (1 - t) * batch["latents"] + t * batch["noise"]
    inputs = torch.cat([noisy, batch["reference"]], dim=1) if "reference" in batch else noisy
    return inputs, batch["noise"] - batch["latents"]


def velocity(transformer, inputs, batch: dict, text, pooled, guidance: torch.Tensor) -> torch.Tensor:
    """(B, tokens, 64), float32; of a reference's tokens nothing is asked."""
    count = len(inputs) // len(batch["t"])  # 2 for a batch with and without its captions
    found = transformer(
        hidden_states=inputs, encoder_hidden_states=text, pooled_projections=pooled, timestep=batch["t"].repeat(count),
        guidance=guidance, img_ids=batch["ids"], txt_ids=torch.zeros(text.shape[1], 3, device=text.device),
        return_dict=False)[0]
    return found[:, :batch["latents"].shape[1]].float()


def encode_text(models, captions: Captions, rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    clip_ids, t5_ids = captions.tokens(rows)
    return models["text_encoder_2"](t5_ids)[0], models["text_encoder"](clip_ids).pooler_output


def train_flow(source: Latents, settings: Settings, args) -> None:
    models = build_flow(source.data, args)
    compile_blocks(models["transformer"], args)

    def loss_of(batch):
        inputs, goal = noised(batch)
        with torch.autocast(args.device, torch.bfloat16):
            text, pooled = encode_text(models, source.captions, batch["rows"])
            found = velocity(models["transformer"], inputs, batch, text, pooled, torch.ones_like(batch["t"]))
        return F.mse_loss(found, goal)

    run_phase("flow", models, source.draw, loss_of, settings, args)


def train_guidance(source: Latents, settings: Settings, args) -> None:
    """A student that is told g gives what the teacher gives in two calls: v_empty + g (v_caption - v_empty)."""
    models = build_flow(source.data, args)
    load_averages(args.run, "flow", models)
    models.requires_grad_(False)
    student = copy.deepcopy(models["transformer"]).requires_grad_(True)
    compile_blocks(student, args)

    def draw_guided(generator, draw):
        batch, count, kind = source.draw(generator, draw)
        low, high = GUIDANCE
        random_ = torch.rand(count, device=args.device, generator=generator)
        return batch | {"guidance": low + (high - low) * random_}, count, kind

    def loss_of(batch):
        inputs, _ = noised(batch)
        rows, count, guidance = batch["rows"], len(inputs), batch["guidance"]
        with torch.autocast(args.device, torch.bfloat16):
            with torch.no_grad():
                both = torch.cat([rows, torch.zeros_like(rows)])
                text, pooled = encode_text(models, source.captions, both)
                with_caption, without = velocity(models["transformer"], inputs.repeat(2, 1, 1), batch, text, pooled,
                                                 torch.ones(2 * count, device=args.device)).chunk(2)
                goal = without + guidance[:, None, None] * (with_caption - without)
            found = velocity(student, inputs, batch, text[:count], pooled[:count], guidance)
        return F.mse_loss(found, goal)

    run_phase("guidance", student, draw_guided, loss_of, settings, args)


def compile_blocks(transformer: FluxTransformer2DModel, args) -> None:
    """One graph a kind of batch and block; dynamic shapes, which would need one only, fail in torch 2.11's inductor."""
    if args.device == "cuda" and not args.disable_compile:
        torch._dynamo.config.recompile_limit = 32
        transformer.compile_repeated_blocks(fullgraph=True, dynamic=False)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("phases", nargs="+", choices=PHASES)
    parser.add_argument("--data", type=Path, default=Path("tiny_flux/.data"), help="folder that data.py wrote")
    parser.add_argument("--run", type=Path, default=Path("tiny_flux/.run"), help="folder of checkpoints and log.jsonl")
    parser.add_argument("--out", type=Path, default=Path("tiny_flux/checkpoint"), help="what `assemble` writes")
    parser.add_argument("--minutes", type=float, nargs=3, metavar=("VAE", "FLOW", "GUIDANCE"),
                        help="budgets (default: 3.8, 8 and 1.4)")
    parser.add_argument("--vae", type=Path, help="a trained one, instead of what the phase vae left in --run")
    parser.add_argument("--steps", type=int, help="end each phase after so many steps at the latest")
    parser.add_argument("--stop_after", type=float, default=float("inf"), help="end this call after so long")
    parser.add_argument("--preview", action="store_true", help="`assemble` what `flow` has so far, without guidance")
    parser.add_argument("--smoke", action="store_true", help="12 emoji, small batches, 20 steps a phase")
    parser.add_argument("--disable_compile", action="store_true", help="eager blocks: slower steps, no compilation")
    parser.add_argument("--disable_cudagraphs", action="store_true", help="launch every kernel of a step by itself")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args(argv)
    args.deadline = time.monotonic() + 60 * args.stop_after
    settings = SMOKE if args.smoke else Settings()
    if args.minutes:
        settings = replace(settings, minutes=dict(zip(PHASES, args.minutes, strict=False)))
    if args.steps:
        settings = replace(settings, steps=args.steps)
    torch.set_float32_matmul_precision("high")
    torch.backends.cudnn.benchmark = True
    torch.backends.cuda.enable_cudnn_sdp(False)  # its backward pass fails on these shapes (torch 2.11, H200)
    args.run.mkdir(parents=True, exist_ok=True)
    (args.run / ".gitignore").write_text("*\n")
    data, latents = Data(args.data, args.device, settings.emoji), None
    try:
        for phase in args.phases:
            if phase == "assemble":
                write_checkpoint(data, args)
            elif is_done(phase, args.run):
                print(f"{phase}: done before")
            elif phase == "vae":
                train_vae(data, settings, args)
            else:
                latents = latents or Latents(data, settings, args)
                (train_flow if phase == "flow" else train_guidance)(latents, settings, args)
    except OutOfTime as pause:
        print(pause)
        raise SystemExit(75) from pause


def is_done(phase: str, run: Path) -> bool:
    state = load_state(run, phase)
    return state is not None and state["done"] and (phase != "vae" or (run / "vae.json").exists())


def write_checkpoint(data: Data, args) -> None:
    models = build_flow(data, args)
    load_averages(args.run, "flow", models, done=not args.preview)
    if not args.preview:
        load_averages(args.run, "guidance", models["transformer"].requires_grad_(True))
    size = assemble(trained_vae(args), models, data, args.data / "NOTICE", args.out)
    print(f"{args.out}: {size / 1e6:.2f} MB")
    draw_sheet(args.out, data, args.device).save(args.run / "sheet.png")


if __name__ == "__main__":
    main()
