"""From trained parts to a checkpoint that plain diffusers loads, a sheet of what it draws, and the curves of a log.

    python -m tiny_flux.training.export tiny_flux/training.jsonl tiny_flux/losses.webp    # needs matplotlib
"""

import json
import shutil
import sys
from pathlib import Path

import PIL.Image
import torch
from diffusers import DiffusionPipeline, FlowMatchEulerDiscreteScheduler, FluxPipeline
from safetensors.torch import load_file, save_file

from tiny_flux.training.data import COLOUR_NAMES, STYLES, caption, held_out, instruction
from utils.random_weights import DYNAMIC_SHIFT
from utils.tiny_presets import TRAINED_LENGTH, as_preset

MAX_BYTES = 22_000_000


def assemble(vae, models, data, notice: Path, out: Path) -> int:
    """Writes the bf16 checkpoint and its notices, and returns its bytes.

    Args:
        models: transformer, text_encoder and text_encoder_2 by name.
        data: has tokenizer and tokenizer_2.
    """
    shutil.rmtree(out, ignore_errors=True)
    scheduler = FlowMatchEulerDiscreteScheduler(num_train_timesteps=1000, **DYNAMIC_SHIFT)
    FluxPipeline(scheduler=scheduler, vae=vae, tokenizer=data.tokenizer, tokenizer_2=data.tokenizer_2,
                 **models).to(torch.bfloat16).save_pretrained(out)
    # transformers 5 leaves out the prefix that the published FLUX checkpoints have; both load.
    weights = out / "text_encoder" / "model.safetensors"
    save_file({f"text_model.{key.removeprefix('text_model.')}": value for key, value in load_file(weights).items()},
              weights, metadata={"format": "pt"})
    index = json.loads((out / "model_index.json").read_text())
    index["tokenizer"][1], index["tokenizer_2"][1] = "CLIPTokenizer", "T5TokenizerFast"
    (out / "model_index.json").write_text(json.dumps(index, indent=2) + "\n")
    # A VAE that was loaded would name the folder it came from.
    vae_config = json.loads((out / "vae" / "config.json").read_text())
    vae_config.pop("_name_or_path", None)
    (out / "vae" / "config.json").write_text(json.dumps(vae_config, indent=2, sort_keys=True) + "\n")
    for path in out.glob("tokenizer*/tokenizer.json"):  # a quarter of it is white space
        path.write_text(json.dumps(json.loads(path.read_text()), ensure_ascii=False, separators=(",", ":")))
    shutil.copyfile(notice, out / "NOTICE")
    files = [path for path in out.rglob("*") if path.is_file()]
    for path in files:
        path.chmod(0o644)
    size = sum(path.stat().st_size for path in files)
    if size > MAX_BYTES:
        raise SystemExit(f"{out} has {size} bytes, more than {MAX_BYTES}.")
    return size


def draw_sheet(checkpoint: Path, data, device: str, columns: int = 12) -> PIL.Image.Image:
    """Five double rows: 28 steps, 4 steps folded, 4 steps at 256 px; held-out combinations; edits of the first row."""
    pipeline = DiffusionPipeline.from_pretrained(checkpoint, dtype=torch.bfloat16).to(device)
    folded, kontext = as_preset(pipeline, "tiny-flux"), as_preset(pipeline, "tiny-kontext")
    names = [one["name"] for one in data.emoji[::max(1, len(data.emoji) // columns)]][:columns]
    prompts = [caption(name, STYLES[i % 2], COLOUR_NAMES[i % len(COLOUR_NAMES)]) for i, name in enumerate(names)]
    by_slug = {one["slug"]: one["name"] for one in data.emoji}
    unseen = [caption(by_slug[slug], "3d", colour) for slug, colour in held_out(list(by_slug))][:columns]
    edits = [instruction(*((None, "green"), ("flat", None), ("3d", None))[i % 3]) for i in range(len(names))]

    def pictures(pipe, texts: list[str], steps: int, size: int = 128, **kwargs) -> list[PIL.Image.Image]:
        return pipe(prompt=texts, height=size, width=size, num_inference_steps=steps, guidance_scale=3.5,
                    max_sequence_length=TRAINED_LENGTH, generator=torch.Generator().manual_seed(0), **kwargs).images

    first = pictures(pipeline, prompts, 28)
    rows = [first, pictures(folded, prompts, 4), pictures(folded, prompts, 4, 256), pictures(pipeline, unseen, 28),
            pictures(kontext, edits, 28, image=first, max_area=128**2, _auto_resize=False)]
    sheet = PIL.Image.new("RGB", (128 * columns, 128 * len(rows)), "white")
    for y, row in enumerate(rows):
        for x, image in enumerate(row):
            sheet.paste(image.resize((128, 128)), (128 * x, 128 * y))
    return sheet


def draw_losses(log: Path, path: Path) -> None:
    """The loss of each phase in a `log.jsonl`, a point for every hundred steps or so, and where the rate decays."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    lines = [json.loads(line) for line in log.read_text().splitlines()]
    phases = list(dict.fromkeys(line["phase"] for line in lines))
    figure, axes = pyplot.subplots(1, len(phases), figsize=(4 * len(phases), 3), constrained_layout=True)
    for phase, axis in zip(phases, axes, strict=True):
        own = [line for line in lines if line["phase"] == phase]
        axis.plot([line["step"] for line in own], [line["loss"] for line in own], linewidth=1)
        decay = next((line["step"] for line in own[1:] if line["lr_factor"] < 1 and line["step"] > 100), None)
        if decay:
            axis.axvline(decay, color="gray", linewidth=0.8, linestyle=":")
        axis.set(title=f"{phase}: {own[-1]['loss']:.3f} after {own[-1]['seconds']:.0f} s", xlabel="step", yscale="log")
    axes[0].set_ylabel("loss")
    figure.savefig(path, dpi=100, pil_kwargs={"lossless": True})


if __name__ == "__main__":
    draw_losses(Path(sys.argv[1]), Path(sys.argv[2]))
