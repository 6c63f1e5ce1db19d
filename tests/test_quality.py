"""The float32 reference of a step, relative error, the drift of pictures, and the stages' regions."""

import copy
import math
from contextlib import contextmanager

import numpy as np
import PIL.Image
import pytest
import torch
from torchmetrics.functional.image import structural_similarity_index_measure

from bench.profiling import StageTimes, annotate
from bench.quality import (
    broken_share,
    capture_step,
    float32_step,
    latent_drift,
    latent_recorder,
    perceptual,
    picture_drift,
    ssim,
)
from utils.fp8_check import relative_error
from utils.pipeline_utils import call_kwargs


def test_float32_step_is_the_model_in_float32(build, make_args):
    pipeline = build("tiny-flux-dev", torch.bfloat16)
    inputs = capture_step(pipeline, call_kwargs(pipeline, make_args("--ckpt", "tiny-flux-dev")))
    assert inputs["guidance"].dtype == torch.float32 and inputs["hidden_states"].dtype == torch.bfloat16
    before = copy.deepcopy(pipeline.transformer.state_dict())
    found = float32_step(pipeline.transformer, inputs)

    wide = copy.deepcopy(pipeline.transformer).float()
    as_rounded = torch.tensor([3504.0]) / 1000  # 3.5 * 1000 in bf16
    with torch.no_grad():
        expected = wide(**{k: v.float() if isinstance(v, torch.Tensor) else v
                           for k, v in inputs.items() if k != "guidance"}, guidance=as_rounded)[0]
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    for name, value in pipeline.transformer.state_dict().items():
        assert value.dtype == torch.bfloat16 and torch.equal(value, before[name]), name
    with torch.no_grad():
        assert 1e-4 < relative_error(pipeline.transformer(**inputs)[0], found) < 0.03


def test_relative_error():
    assert relative_error(torch.tensor([3.0, 4.5]), torch.tensor([3.0, 4.0])) == pytest.approx(0.1)
    assert math.isnan(relative_error(torch.tensor([float("nan")]), torch.tensor([1.0])))


SEED_REGIONS = ["prompt_encoding", "denoising_step", "decoding", "postprocessing", "pil_conversion"]


def test_in_regions_enters_the_seeds_regions_and_leaves_no_trace(build, make_args):
    pipeline = build("tiny-flux")
    kwargs = call_kwargs(pipeline, make_args("--num_inference_steps", "3"))
    entered = []

    @contextmanager
    def region(name):
        entered.append(name)
        yield

    parts = (pipeline, pipeline.vae, pipeline.image_processor)
    before = [dict(part.__dict__) for part in parts]
    with annotate(pipeline, region):
        annotated = pipeline(**kwargs).images[0]
    assert entered == ["prompt_encoding", *["denoising_step"] * 3, "decoding", "postprocessing", "pil_conversion"]
    assert set(entered) == set(SEED_REGIONS)
    assert not pipeline.transformer._forward_hooks and not pipeline.transformer._forward_pre_hooks
    after = [set(part.__dict__) for part in parts]
    assert after[1:] == [set(b) for b in before[1:]] and "encode_prompt" not in pipeline.__dict__
    again = pipeline(**call_kwargs(pipeline, make_args("--num_inference_steps", "3"))).images[0]
    assert annotated.tobytes() == again.tobytes()


def test_stage_times_count_every_span(build, make_args):
    pipeline = build("tiny-flux")
    times = StageTimes("cpu")
    with annotate(pipeline, times.timer):
        pipeline(**call_kwargs(pipeline, make_args()))
    found = times.milliseconds()
    assert len(found["denoising_step"]) == 4 and len(found["decoding"]) == 1
    assert all(ms > 0 for spans in found.values() for ms in spans)


def test_picture_drift_of_shifted_pixels_is_computed_by_hand():
    torch.manual_seed(0)
    reference = [PIL.Image.effect_noise((64, 64), 80).convert("RGB") for _ in range(2)]
    same = picture_drift(reference, reference)
    assert same["psnr_min"] == 100 and same["identical"] == 1 and same["ssim"] > 0.999
    pixels = np.array(reference[0]).astype(int)
    shifted = PIL.Image.fromarray(np.where(pixels < 128, pixels + 10, pixels - 10).astype(np.uint8))
    found = picture_drift([shifted, reference[1]], reference)
    assert found["psnr_min"] == pytest.approx(20 * np.log10(255 / 10)) and found["identical"] == 0.5
    assert found["psnr_mean"] == pytest.approx((found["psnr_min"] + 100) / 2)
    large = PIL.Image.new("RGB", (512, 512))
    other = large.copy()
    other.putpixel((0, 0), (1, 0, 0))  # over 100 dB, and not the same
    assert picture_drift([other], [large])["identical"] == 0
    assert picture_drift(reference[::-1], reference)["ssim"] < 0.2 < found["ssim"] < 1


@pytest.mark.parametrize("size", [(64, 64), (40, 72), (97, 16), (6, 11)])
@pytest.mark.parametrize("noise", [0, 1, 20, 255])
def test_ssim_equals_that_of_torchmetrics(size, noise):
    """Noise of 255 leaves nothing of the reference, noise of 0 all. The last third of each picture is flat."""
    reference = torch.randint(0, 256, (2, 3, *size)).double()
    reference[..., -size[1] // 3:] = torch.tensor([0.0, 255.0])[:, None, None, None]
    found = (reference + torch.randint(-noise, noise + 1, reference.shape)).clamp(0, 255)
    values = ssim(found, reference)
    expected = structural_similarity_index_measure(found, reference, data_range=255.0, reduction="none")
    assert (values - expected).abs().max() < 1e-9
    assert values.dtype == torch.float64 and (values.tolist() == [1.0, 1.0]) == (noise == 0)


def test_broken_share_counts_black_pictures_and_broken_latents():
    black, nearly = PIL.Image.new("RGB", (16, 16)), PIL.Image.new("RGB", (16, 16), (1, 0, 2))
    dot = black.copy()
    dot.putpixel((3, 3), (0, 200, 0))
    latents = torch.zeros(4, 8, 2)
    latents[1, 5, 0], latents[2, 0, 1] = float("nan"), float("inf")
    assert broken_share([black, nearly, dot, PIL.Image.new("RGB", (16, 16), "white")], latents) == {
        "black": 0.5, "not_finite": 0.5}


def test_latent_drift_equals_that_of_a_loop():
    torch.manual_seed(0)
    reference, noise = torch.randn(3, 5, 8, 2), torch.randn(3, 5, 8, 2)
    noise[:, 0] = 0
    found = reference + noise * torch.tensor([0.1, 0.2, 0.4])[:, None, None, None]
    by_picture = [[relative_error(found[i, step], reference[i, step]) for i in range(3)] for step in range(5)]
    drift = latent_drift(found, reference)
    assert drift["by_step"] == pytest.approx([sorted(errors)[1] for errors in by_picture])
    assert drift["by_step"][0] == 0 and drift["median"] == drift["by_step"][-1]
    assert drift["max"] == pytest.approx(max(by_picture[-1]))
    shorter = latent_drift(found[:, 1:], reference)
    assert shorter["by_step"] is None and shorter["median"] == drift["median"]
    found[0, -1, 0, 0] = float("nan")
    assert math.isnan(latent_drift(found, reference)["median"])


def test_latent_recorder_records_each_step_and_changes_nothing(build, make_args):
    pipeline, args = build("tiny-flux"), make_args("--num_inference_steps", "3")
    plain = pipeline(**call_kwargs(pipeline, args)).images[0]
    final = pipeline(**call_kwargs(pipeline, args) | {"output_type": "latent"}).images
    steps = []
    image = pipeline(**call_kwargs(pipeline, args), callback_on_step_end=latent_recorder(steps)).images[0]
    assert image.tobytes() == plain.tobytes() and len(steps) == 3 and torch.equal(steps[-1], final)
    assert not torch.equal(steps[0], steps[1])


def test_perceptual_without_weights_says_why(monkeypatch, tmp_path):
    """No download and no failure: one line each."""
    import huggingface_hub
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    monkeypatch.setattr(huggingface_hub, "try_to_load_from_cache", lambda *a: None)
    pictures = [PIL.Image.new("RGB", (64, 64), "red")]
    found = perceptual(pictures, pictures, ["red"])
    assert found["lpips"] is None and found["clip_score"] is None
    assert "torchvision" in found["not_available"]["lpips"]
    assert all("--download-metrics" in why and "\n" not in why for why in found["not_available"].values())
