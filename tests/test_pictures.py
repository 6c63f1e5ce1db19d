"""One row of tiny-flux's pictures from the command line to its record."""

import json
import sys

import PIL.Image
import pytest
import torch

from tiny_flux import pictures
from utils.common import RecipeError

PLAIN = ["--device", "cpu", "--compile_export_mode", "disabled", "--disable_quant", "--num_inference_steps", "2"]


@pytest.fixture
def run(monkeypatch):
    def call(*argv, recipe=PLAIN):
        monkeypatch.setattr(sys, "argv", ["pictures", *map(str, argv), "--prompts", "4", "--", *recipe])
        pictures.main()
    return call


def test_pictures_of_a_row_are_compared_with_its_reference(run, tmp_path, monkeypatch):
    kept = tmp_path / "kept" / "eager.safetensors"
    run("--keep", kept)
    before = kept.stat().st_mtime_ns
    monkeypatch.setattr(pictures, "draw", None)
    run("--keep", kept)  # it is there
    assert kept.stat().st_mtime_ns == before
    monkeypatch.undo()

    monkeypatch.setattr(pictures, "judged", lambda *a: {"top1": 1.0, "top5": 1.0})  # seconds; it has its own tests
    run("--reference", kept, "--twin", kept, "--output-json", tmp_path / "r.json", "--sheet", tmp_path / "s.webp")
    same = json.loads((tmp_path / "r.json").read_text())
    assert same["given"]["identical"] == same["open"]["identical"] == 1
    assert same["latents"] == {"median": 0.0, "max": 0.0, "by_step": [0.0, 0.0]}
    assert same["twin"]["argv"] == PLAIN and same["broken"] == {"black": 0.0, "not_finite": 0.0}
    assert len(same["shown"]) == 4 and same["argv"] == PLAIN
    assert PIL.Image.open(tmp_path / "s.webp").size == (320, 80) and (tmp_path / "s.webp").stat().st_size < 40_000

    run("--reference", kept, "--output-json", tmp_path / "r.json", recipe=[*PLAIN[:-1], "3"])
    other = json.loads((tmp_path / "r.json").read_text())
    assert other["given"]["psnr_mean"] < 60 and other["latents"]["by_step"] is None and other["twin"] is None


def test_per_step_averages_cached_steps_and_residuals():
    found = pictures.per_step([[1, 2], [2]], [{1: 0.1, 2: 0.2}, {1: 0.5, 2: 0.1}], 4)
    assert found["cached_share"] == [0, 0.5, 1, 0]
    assert found["residual_diffs"] == {1: pytest.approx(0.3), 2: pytest.approx(0.15)}
    assert pictures.per_step([], [], 4) == {"cached_share": None, "residual_diffs": None}


def test_read_pictures_of_other_versions_are_refused(tmp_path):
    image, made = PIL.Image.new("RGB", (8, 8), "red"), pictures.origin(PLAIN, 1, "cpu")
    drawn = pictures.Drawn([image], torch.ones(1, 2, 4, 3, dtype=torch.bfloat16), made)
    pictures.keep(drawn, tmp_path / "x.safetensors")
    found = pictures.read(tmp_path / "x.safetensors", made | {"argv": ["--other"]})
    assert found.images[0].tobytes() == image.tobytes() and torch.equal(found.latents, drawn.latents)
    with pytest.raises(RecipeError, match="--keep"):
        pictures.read(tmp_path / "x.safetensors", made | {"packages": {"torch": "1.0"}})
    with pytest.raises(RecipeError, match=r"y\.safetensors"):
        pictures.read(tmp_path / "y.safetensors", made | {"prompts": 2})
