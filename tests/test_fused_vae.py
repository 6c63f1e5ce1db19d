"""The VAE's norms in Triton against PyTorch's, in Triton's interpreter and on a GPU; its attention and upsampling; the
whole VAE."""

import pytest
import torch
from conftest import relative
from interpreter import INTERPRETED, run_in_the_interpreter

pytest.importorskip("triton", reason="Triton is not installed: pip install triton")

from utils import random_weights
from utils.kernels import fused_vae
from utils.kernels.fused_vae import fuse_upsample_conv, fuse_vae, group_norm, group_norm_reference
from utils.pipeline_utils import fuse_projections

DEVICES = (["interpreter"] if INTERPRETED else []) + [pytest.param("cuda", marks=[
    pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="PyTorch sees no GPU here")])]


@pytest.mark.slow
@pytest.mark.skipif(INTERPRETED, reason="this is the inner run")
def test_kernels_interpreted_equal_pytorch():
    run_in_the_interpreter(__file__, "interpreter")


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("shape, groups", [((2, 32, 9, 7), 8), ((1, 128, 11, 13), 32), ((1, 64, 1, 1), 32)])
@pytest.mark.parametrize("mean, size", [(0, 1), (100, 0.1), (0, 0)], ids=["normal", "far off zero", "constant"])
def test_group_norm_equals_pytorch(device, shape, groups, mean, size, monkeypatch):
    """Statistics far from zero, whose variance a difference of sums would lose; tails of tiles and of chunks."""
    monkeypatch.setattr(fused_vae, "CHUNKS", 3)
    monkeypatch.setattr(fused_vae, "TILE", 512)
    generator = torch.Generator().manual_seed(0)
    x = mean + size * torch.randn(shape, generator=generator)
    weight, bias, offset = (torch.randn(shape[1], generator=generator) for _ in range(3))
    for silu in (True, False):
        for before in (None, offset):
            args = x, before, weight, bias, groups, 1e-6, silu
            found = (group_norm(*(a.cuda() if isinstance(a, torch.Tensor) else a for a in args)).cpu()
                     if device == "cuda" else group_norm._init_fn(*args))
            double = [a.double() if isinstance(a, torch.Tensor) else a for a in args]
            expected = group_norm_reference(*double)
            shifted = double[0] if before is None else double[0] + double[1][:, None, None]
            reference = torch.nn.functional.group_norm(shifted, groups, *double[2:4], 1e-6)
            reference = torch.nn.functional.silu(reference) if silu else reference
            assert relative(expected, reference) < 2e-3 and relative(found, reference) < 2e-3
            assert found.is_contiguous(memory_format=torch.channels_last) and found.dtype == x.dtype


@pytest.mark.parametrize("height, width", [(1, 1), (5, 8)])
@pytest.mark.parametrize("dtype, bound", [(torch.float32, 1e-6), (torch.bfloat16, 5e-3)])
@torch.no_grad()
def test_transposed_convolution_equals_upsampling_and_convolution(height, width, dtype, bound):
    """Edges too: of few pixels nearly all are."""
    torch.manual_seed(0)
    convolution = torch.nn.Conv2d(6, 10, 3, padding=1, dtype=dtype).to(memory_format=torch.channels_last)
    x = torch.randn(2, 6, height, width, dtype=dtype)
    large = torch.nn.functional.interpolate(x.double(), scale_factor=2.0, mode="nearest")
    expected = torch.nn.functional.conv2d(large, convolution.weight.double(), convolution.bias.double(), padding=1)
    one = fuse_upsample_conv(convolution)
    assert one.weight.dtype == dtype and one.weight.is_contiguous(memory_format=torch.channels_last)
    assert relative(one(x), expected) < bound


@pytest.mark.parametrize("fused_projections", [pytest.param(False, marks=pytest.mark.slow), True])
@torch.no_grad()
def test_fuse_vae_keeps_the_function(fused_projections, monkeypatch):
    """FLUX.1's own decoder and encoder, narrowed: every norm, both attentions, with scores in more than one part, all
    three upsamplers, one before a block without a shortcut and two before blocks that have one."""
    monkeypatch.setattr(fused_vae, "QUERIES", 20)
    torch.manual_seed(0)
    config = random_weights.architecture("FLUX.1-schnell")["vae"] | {
        "block_out_channels": (32, 64, 128, 128), "sample_size": 64}
    from diffusers import AutoencoderKL
    vae = AutoencoderKL(**{k: v for k, v in config.items() if not k.startswith("_")}).eval()
    vae.to(memory_format=torch.channels_last)
    for module in vae.modules():  # PyTorch's start would be 1 and 0
        if isinstance(module, torch.nn.GroupNorm):
            torch.nn.init.normal_(module.weight, 1), torch.nn.init.normal_(module.bias)
    latents, image = torch.randn(2, 16, 6, 8), torch.randn(1, 3, 48, 64)
    expected = vae.decode(latents).sample, vae.encode(image).latent_dist.mean
    norms = sum(isinstance(module, torch.nn.GroupNorm) for module in vae.modules())
    if fused_projections:
        fuse_projections(vae)
    assert fuse_vae(vae) == (norms, 2, 3)
    assert [block.upsamplers[0].conv.bias for block in vae.decoder.up_blocks[:-1]] == [None] * 3
    assert [block.resnets[0].conv_shortcut is None for block in vae.decoder.up_blocks[1:]] == [True, False, False]
    assert not any(isinstance(module, (torch.nn.GroupNorm, torch.nn.SiLU)) for module in vae.modules())
    found = vae.decode(latents).sample, vae.encode(image).latent_dist.mean
    for a, b in zip(found, expected, strict=True):
        assert relative(a, b) < 1e-5
    torch._dynamo.reset()
    compiled = torch.compile(vae.decoder, fullgraph=True, backend="eager")  # the recipe allows no graph break
    assert relative(compiled(latents), vae.decoder(latents)) < 1e-6


def test_fuse_vae_leaves_norms_of_other_group_sizes(build):
    """96 channels in 8 groups of 12."""
    vae = build("tiny-flux").vae
    block = vae.decoder.mid_block.resnets[0]
    block.norm1 = torch.nn.GroupNorm(8, 96)
    reader = vae.decoder.up_blocks[1].resnets[0]
    reader.norm1 = torch.nn.GroupNorm(8, 96)
    fuse_vae(vae)
    assert isinstance(block.norm1, torch.nn.GroupNorm) and isinstance(block.nonlinearity, torch.nn.SiLU)
    assert block.conv1.bias is not None
    assert isinstance(reader.norm1, torch.nn.GroupNorm)
    assert vae.decoder.up_blocks[0].upsamplers[0].conv.bias is not None
