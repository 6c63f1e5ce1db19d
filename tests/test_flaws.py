"""No result is called a picture without having been looked at."""

import json
import re
import warnings

import numpy as np
import PIL.Image
import pytest
import torch
from conftest import exit_code_of
from diffusers.image_processor import VaeImageProcessor

import gen_image
import run_benchmark
from utils import pipeline_utils
from utils.common import BrokenResult, RecipeError
from utils.flaws import flaw_of, how_to_mend, non_finite_weights, raise_errors
from utils.hardware import Hardware
from utils.plan import make_plan
from utils.postprocess import CheckedImageProcessor, GPUImageProcessor
from utils.random_weights import architecture

EAGER = ["--ckpt", "tiny-flux", "--device", "cpu", "--compile_export_mode", "disabled", "--num_inference_steps", "1",
         "--quiet"]


@pytest.fixture
def run(monkeypatch, tmp_path):
    """A script's exit code, with `damage` done to its pipeline once it is optimized."""
    def call(script, damage, *argv):
        optimize = pipeline_utils.optimize

        def damaged(*args):
            pipeline = optimize(*args)
            damage(pipeline)
            return pipeline

        with monkeypatch.context() as patch, warnings.catch_warnings():
            warnings.filterwarnings("error", "invalid value")
            patch.chdir(tmp_path)
            patch.setattr(pipeline_utils, "optimize", damaged)
            return exit_code_of(patch, script, *EAGER, *argv)
    return call


def on_output(change):
    """Has `change` done to the decoder's output, (B, 3, H, W), in place."""
    return lambda pipeline: pipeline.vae.decoder.register_forward_hook(lambda module, args, output: change(output))


def half_nan(output):
    output[:, :, 64:] = torch.nan


def one_inf(output):
    output[0, 1, 2, 3] = torch.inf


def one_colour(output):
    output.copy_(torch.tensor([0.1, -2.0, 0.7]).view(1, 3, 1, 1).expand_as(output))


def nan_weight(pipeline):
    with torch.no_grad():
        pipeline.vae.decoder.conv_out.bias[1] = torch.nan


@pytest.mark.parametrize("damage", [on_output(half_nan), on_output(one_inf), on_output(one_colour), nan_weight])
def test_gen_image_broken_picture_is_kept_under_another_name_and_exit_code_3(run, tmp_path, capsys, damage):
    (tmp_path / "x.broken.png").write_text("mine")
    assert run(gen_image, damage, "--output-file", "x.png") == 3
    assert sorted(path.name for path in tmp_path.iterdir()) == ["x.broken.1.png", "x.broken.png"]
    assert (tmp_path / "x.broken.png").read_text() == "mine"
    assert PIL.Image.open(tmp_path / "x.broken.1.png").size == (128, 128)
    shown = capsys.readouterr().err
    assert "x.broken.1.png" in shown and ("vae/decoder.conv_out.bias" in shown) == (damage is nan_weight)


def test_gen_image_one_broken_picture_of_a_call_leaves_the_others(run, tmp_path):
    assert run(gen_image, on_output(one_inf), "--output-file", "x.png", "--num_images_per_prompt", "2") == 3
    assert sorted(path.name for path in tmp_path.iterdir()) == ["x_000_42.broken.png", "x_001_43.png"]


def test_gen_image_broken_pictures_of_a_file_are_made_again_by_the_next_run(run, tmp_path, capsys):
    """The second and the fourth call are broken; the next run makes these two."""
    (tmp_path / "p.txt").write_text("a cat\na dog\na key\na frog\na hat")
    calls = []

    def sometimes(output):
        calls.append(0)
        if len(calls) in (2, 4):
            half_nan(output)

    argv = ["--output-file", "all/x.png", "--prompts-file", "p.txt"]
    assert run(gen_image, on_output(sometimes), *argv) == 3
    right, broken = [f"x_{i:03d}_{42 + i}.png" for i in (0, 2, 4)], [f"x_{i:03d}_{42 + i}" for i in (1, 3)]
    assert sorted(path.name for path in (tmp_path / "all").iterdir()) == sorted(
        ["x.jsonl", *right, *(f"{name}.broken.png" for name in broken)])
    listed = [json.loads(line)["file"] for line in (tmp_path / "all/x.jsonl").read_text().splitlines()]
    assert listed == right
    shown = capsys.readouterr().err
    assert all(f"{name}.broken.png" in shown for name in broken)
    assert run(gen_image, lambda pipeline: None, *argv) == 0
    listed = [json.loads(line)["file"] for line in (tmp_path / "all/x.jsonl").read_text().splitlines()]
    assert listed == [*right, *(f"{name}.png" for name in broken)]


def test_gen_image_all_pictures_of_a_file_broken_leaves_no_manifest(run, tmp_path, capsys):
    (tmp_path / "p.txt").write_text("\n".join(["a cat"] * 5))
    assert run(gen_image, on_output(one_colour), "--output-file", "x.png", "--prompts-file", "p.txt") == 3
    assert len(list(tmp_path.glob("x_*.broken.png"))) == 5 and not (tmp_path / "x.jsonl").exists()
    assert re.search(r"\b5\b", capsys.readouterr().err)


def test_run_benchmark_broken_picture_is_in_its_result_and_exit_code_3(run, tmp_path, capsys):
    argv = ["--runs", "1", "--warmup", "0", "--output-json", "r.json"]
    assert run(run_benchmark, on_output(half_nan), *argv) == 3
    record = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert "NaN" in record["broken"] and record == json.loads((tmp_path / "r.json").read_text())
    assert sorted(path.name for path in tmp_path.iterdir()) == ["output.broken.png", "r.json"]


@pytest.mark.parametrize("processor", [CheckedImageProcessor, GPUImageProcessor])
def test_postprocess_marks_the_finite_images_of_a_batch(processor):
    image = torch.randn(4, 3, 16, 24)
    expected = VaeImageProcessor().postprocess(image.clone())
    processor = processor()
    assert [a.tobytes() for a in processor.postprocess(image.clone())] == [b.tobytes() for b in expected]
    assert processor.finite.tolist() == [True] * 4
    image[1, 2, 3, 4], image[3, 0, 0, 0] = torch.nan, -torch.inf
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = processor.postprocess(image.to(torch.bfloat16))
    assert processor.finite.tolist() == [True, False, True, False] and len(found) == 4


@pytest.mark.parametrize("channels, is_flawed", [((0, 0, 0), True), ((7, 200, 31), True), (None, False)])
def test_flaw_of_a_picture_of_one_colour_is_found(channels, is_flawed):
    pixels = np.full((16, 16, 3), channels or 9, dtype=np.uint8)
    if channels is None:
        pixels[3, 4, 1] = 10
    found = flaw_of(PIL.Image.fromarray(pixels), True)
    assert (found is not None) == is_flawed == (pixels.std((0, 1)) == 0).all()
    assert flaw_of(PIL.Image.effect_noise((16, 16), 9), False) is not None


def test_non_finite_weights_are_named_with_the_cure(build, make_args):
    pipeline = build()
    assert non_finite_weights(pipeline) == []
    pipeline.plan = make_plan(make_args("--disable_quant"), architecture("tiny-flux"), Hardware("cpu"))
    assert "--disable_bf16" in how_to_mend(pipeline) and "--disable_quant" not in how_to_mend(pipeline)
    proj = pipeline.transformer.proj_out
    bad = torch.full_like(proj.weight, 0.5)
    bad[0, 0] = torch.nan
    proj.weight = torch.nn.Parameter(bad.to(torch.float8_e4m3fn), requires_grad=False)
    pipeline.text_encoder.register_buffer("scale", torch.tensor([1.0, torch.inf]))
    pipeline.text_encoder.register_buffer("count", torch.tensor([1]))
    assert sorted(non_finite_weights(pipeline)) == ["text_encoder/scale", "transformer/proj_out.weight"]
    assert "transformer/proj_out.weight" in how_to_mend(pipeline)


def test_raise_errors_the_worse_exit_code_decides(build, make_args):
    pipeline = build()
    pipeline.plan = make_plan(make_args(), architecture("tiny-flux"), Hardware("cpu"))
    raise_errors([], pipeline)
    with pytest.raises(RecipeError) as found:
        raise_errors([RecipeError("disk")], pipeline)
    assert found.value.exit_code == 2
    with pytest.raises(BrokenResult, match="disk") as found:
        raise_errors([BrokenResult(f"picture {i}") for i in range(5)] + [RecipeError("disk")], pipeline)
    assert found.value.exit_code == 3 and "5" in str(found.value) and "picture 4" not in str(found.value)
