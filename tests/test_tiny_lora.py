"""The LoRA that was trained on tiny-flux: what its file holds, and that it turns pictures pale and blue."""

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from tiny_flux import judge
from tiny_flux.training import train_lora
from tiny_flux.training.data import caption
from utils import tiny_presets
from utils.checkpoint import model_shapes, read_configs
from utils.lora import read_lora
from utils.pipeline_utils import load_pipeline

LORA = tiny_presets.CHECKPOINT.parent / "moonlight_lora.safetensors"
PROMPTS = ["3d avocado on a teal background", "flat red heart on a yellow background", "3d frog on a pink background"]


@pytest.fixture
def draw(make_args):
    """Draws a picture for each text with the LoRA at a scale: as images, and as (B, 3, 128, 128) from 0 to 1."""
    def call(texts, scale, name="tiny-flux", steps=4):
        pipeline = load_pipeline(make_args("--ckpt", name, "--lora", f"{LORA}:{scale}"))
        pipeline.set_progress_bar_config(disable=True)
        images = judge.draw_pictures(pipeline, texts, steps)
        return images, torch.from_numpy(np.stack([np.array(image) for image in images])).permute(0, 3, 1, 2) / 255
    return call


def moonlight_judge() -> judge.Judge:
    """A judge whose references are emoji on black, recoloured as the training's pictures."""
    found = judge.Judge()
    on_black = found.references[:, :3] + (1 - found.references[:, 3:]) * train_lora.BLACK[:, None, None]
    found.references = torch.cat([train_lora.moonlight(on_black), torch.ones_like(on_black[:, :1])], dim=1)
    return found


def test_moonlight_of_black_is_blue_and_of_white_is_white():
    images = torch.stack([train_lora.BLACK, torch.ones(3), torch.tensor([1.0, 0.0, 0.0])])[:, :, None, None]
    found = train_lora.moonlight(images)
    torch.testing.assert_close(found[:2, :, 0, 0], torch.stack([train_lora.BLUE, torch.ones(3)]))
    before, after = train_lora.off_style(images), train_lora.off_style(found)
    assert after[:2].max() < 1e-6 and after[2] < before[2] / 2


def test_lora_file_is_of_rank_4_and_16_bit_and_fits_whole():
    tensors, lora = load_file(LORA), read_lora(str(LORA), model_shapes(read_configs("tiny-flux")))
    assert lora.left_out == "" and len(tensors) == 2 * len(lora.changes) == 56
    assert {change.rank for change in lora.changes} == {train_lora.RANK} == {4}
    assert {tensor.dtype for tensor in tensors.values()} == {torch.float16}
    assert all(train_lora.MODULES.fullmatch(change.name) for change in lora.changes)
    assert LORA.stat().st_size < 100_000


def test_lora_takes_pictures_to_blue_by_its_scale(draw):
    none, half, full = (train_lora.off_style(draw(PROMPTS, scale)[1]) for scale in (0, 0.5, 1))
    assert (none > 0.3).all() and (full < 0.12).all() and (half < 0.8 * none).all() and (full < 0.8 * half).all()


def test_lora_of_tiny_flux_works_with_tiny_flux_dev(draw):
    images, found = draw(PROMPTS, 1, "tiny-flux-dev", steps=8)
    assert (train_lora.off_style(found) < 0.12).all() and {judge.background(image) for image in images} == {"blue"}


def test_train_lora_writes_factors_of_the_shipped_shapes(tmp_path, monkeypatch):
    path = tmp_path / "lora.safetensors"
    monkeypatch.setattr("sys.argv", ["train_lora", "--pictures", "4", "--steps", "2", "--out", str(path)])
    train_lora.main()
    tensors, shipped = load_file(path), load_file(LORA)
    assert {key: tensor.shape for key, tensor in tensors.items()} == {key: t.shape for key, t in shipped.items()}
    assert all(tensor.isfinite().all() and tensor.any() for tensor in tensors.values())


@pytest.mark.slow
def test_lora_keeps_the_objects(draw):
    """By the judge, on 50 captions."""
    names, wanted = [one["name"] for one in judge.read_captions()], judge.training_captions(50)
    images, found = draw([caption(names[one.emoji], one.style, one.colour) for one in wanted], 1)
    verdicts = moonlight_judge().verdicts(images, wanted)
    assert verdicts["top5"] >= 0.75 and train_lora.off_style(found).mean() < 0.05, verdicts
