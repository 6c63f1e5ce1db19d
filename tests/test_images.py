import types

import numpy as np
import PIL.Image
import pytest
import torch
from diffusers.image_processor import VaeImageProcessor

from utils.images import image_parameters, numbered_path, read_parameters, save_image
from utils.postprocess import GPUImageProcessor


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_postprocess_on_the_gpu_equals_diffusers(dtype):
    image = (torch.randn(2, 3, 40, 24) * 0.8).to(dtype).to(memory_format=torch.channels_last)
    theirs = VaeImageProcessor(vae_scale_factor=16).postprocess(image.clone())
    ours = GPUImageProcessor(vae_scale_factor=16).postprocess(image.clone())
    assert [a.tobytes() for a in ours] == [b.tobytes() for b in theirs] and ours[0].size == (24, 40)


@pytest.mark.parametrize("output_type", ["pt", "np", "latent"])
def test_postprocess_of_other_outputs_is_diffusers(output_type):
    image = torch.randn(1, 3, 16, 16)
    theirs = VaeImageProcessor().postprocess(image.clone(), output_type)
    ours = GPUImageProcessor().postprocess(image.clone(), output_type)
    assert torch.equal(torch.as_tensor(ours), torch.as_tensor(theirs))


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=[pytest.mark.gpu, pytest.mark.skipif(
    not torch.cuda.is_available(), reason="needs a GPU: PyTorch sees none here")])])
def test_preprocess_of_a_reference_equals_diffusers(device):
    """Of every value that a pixel can have; of another size or mode, and several, it is diffusers that reads them."""
    pixels = np.random.default_rng(0).integers(0, 256, (48, 80, 3), dtype=np.uint8)
    image, ours = PIL.Image.fromarray(pixels), GPUImageProcessor(vae_scale_factor=16)
    ours.device = torch.device(device)
    for given, size in ((image, (48, 80)), (image, (32, 64)), (image.convert("L"), (48, 80)), ([image] * 2, (48, 80))):
        theirs = VaeImageProcessor(vae_scale_factor=16).preprocess(given, *size)
        found = ours.preprocess(given, *size)
        assert found.device.type == (device if (given, size) == (image, (48, 80)) else "cpu")
        assert torch.equal(found.cpu(), theirs) and found.stride() == theirs.stride()


@pytest.mark.parametrize("suffix", ["png", "jpg", "webp"])
def test_save_image_writes_the_parameters(tmp_path, suffix):
    parameters = {"prompt": 'a "café" & 猫', "seed": 3, "techniques": {"bf16": "on"}}
    path = tmp_path / f"x.{suffix}"
    save_image(PIL.Image.new("RGB", (16, 16), (200, 10, 10)), path, parameters)
    assert read_parameters(path) == parameters
    assert [p.name for p in tmp_path.iterdir()] == [path.name]


def test_save_image_that_breaks_leaves_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(PIL.Image.Image, "save", lambda self, path, **kw: (path.write_bytes(b"half"), 1 / 0))
    with pytest.raises(ZeroDivisionError):
        save_image(PIL.Image.new("RGB", (4, 4)), tmp_path / "x.png", {})
    assert list(tmp_path.iterdir()) == []


def test_image_parameters_tell_references_of_other_shapes_apart(make_args):
    def sha256(size):
        image = PIL.Image.new("RGB", size, "red")
        pipeline = types.SimpleNamespace(plan=types.SimpleNamespace(parameters=dict), contents={})
        kwargs = dict(height=16, width=16, num_inference_steps=1, guidance_scale=1.0, image=image)
        return image_parameters(make_args("--image", "x.png"), pipeline, kwargs, "a cat", 0)["image_sha256"]

    assert sha256((32, 16)) == sha256((32, 16)) != sha256((16, 32))


def test_image_parameters_name_the_quality(make_args):
    pipeline = types.SimpleNamespace(plan=types.SimpleNamespace(parameters=dict), contents={})
    kwargs = dict(height=16, width=16, num_inference_steps=1, guidance_scale=1.0)
    found = [image_parameters(make_args(*argv), pipeline, kwargs, "a cat", 0)["quality"]
             for argv in ([], ["--quality", "high"], ["--quality", "exact"])]
    assert found == ["fast", "high", "exact"]


def test_numbered_path_pads_the_index():
    assert numbered_path("a/b.png", 3, 42).as_posix() == "a/b_003_42.png"
