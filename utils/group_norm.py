"""The VAE's GroupNorm and SiLU on Triton kernels, for channels_last pictures.

cuDNN wants NHWC, where a group's few channels lie side by side in every pixel. Statistics over all pixels of a group
are then best made tile by tile, all groups of a pixel at once, and merged: one read, then one read and one write, which
at 1024x1024 add up to about 11 GB over FLUX.1's decoder. inductor's kernels for the same take most of what its decoding
takes beside the convolutions (H200: 35 ms in all, 12.6 of them convolutions).
"""

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from diffusers.models.resnet import ResnetBlock2D
from torch import Tensor
from torch.library import triton_op, wrap_triton

TILE = 8192  # elements that a program has in registers at a time
CHUNKS = 512  # programs a picture that make statistics


@triton.jit
def _statistics_kernel(x, partial, PIXELS, CHUNK, C: tl.constexpr, GROUPS: tl.constexpr, ROWS: tl.constexpr):
    """Count, mean and sum of squared deviations of each group over a chunk of pixels, merged tile by tile as Chan,
    Golub and LeVeque do (1979): a difference of large sums would lose a small variance."""
    chunk, b = tl.program_id(0), tl.program_id(1)
    x += b.to(tl.int64) * PIXELS * C
    count = 0.
    mean = tl.zeros((GROUPS,), tl.float32)
    deviation = tl.zeros((GROUPS,), tl.float32)
    end = tl.minimum((chunk + 1) * CHUNK, PIXELS)
    for start in range(chunk * CHUNK, end, ROWS):
        row = start + tl.arange(0, ROWS)
        inside = row < end
        tile = tl.load(x + row[:, None].to(tl.int64) * C + tl.arange(0, C)[None, :], inside[:, None], 0.)
        tile = tl.reshape(tile.to(tl.float32), (ROWS, GROUPS, C // GROUPS))
        own = tl.sum(inside.to(tl.float32), 0) * (C // GROUPS)
        center = tl.sum(tl.sum(tile, 2), 0) / own
        away = tl.where(inside[:, None, None], tile - center[None, :, None], 0.)
        step = center - mean
        both = count + own
        mean += step * (own / both)
        deviation += tl.sum(tl.sum(away * away, 2), 0) + step * step * (count * own / both)
        count = both
    out = partial + (b * tl.num_programs(0) + chunk) * 3 * GROUPS + tl.arange(0, GROUPS)
    tl.store(out, tl.zeros((GROUPS,), tl.float32) + count)
    tl.store(out + GROUPS, mean)
    tl.store(out + 2 * GROUPS, deviation)


@triton.jit
def _merge_kernel(partial, statistics, COUNT: tl.constexpr, BLOCK: tl.constexpr, GROUPS: tl.constexpr,
                  EPS: tl.constexpr):
    """A program is a group of a picture: mean and 1 / standard deviation from those of all chunks."""
    group, b = tl.program_id(0), tl.program_id(1)
    chunk = tl.arange(0, BLOCK)
    inside = chunk < COUNT
    source = partial + (b * COUNT + chunk) * 3 * GROUPS + group
    count = tl.load(source, inside, 0.)
    mean = tl.load(source + GROUPS, inside, 0.)
    deviation = tl.load(source + 2 * GROUPS, inside, 0.)
    whole = tl.sum(count, 0)
    center = tl.sum(count * mean, 0) / whole
    deviation = tl.sum(deviation + count * (mean - center) * (mean - center), 0)
    tl.store(statistics + (b * GROUPS + group) * 2, center)
    tl.store(statistics + (b * GROUPS + group) * 2 + 1, tl.rsqrt(deviation / whole + EPS))


@triton.jit
def _apply_kernel(x, out, statistics, weight, bias, PIXELS, C: tl.constexpr, GROUPS: tl.constexpr, ROWS: tl.constexpr,
                  SILU: tl.constexpr):
    """A program is a tile of pixels, all channels."""
    b = tl.program_id(1)
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    channel = tl.arange(0, C)
    at = (b.to(tl.int64) * PIXELS + row[:, None]) * C + channel[None, :]
    inside = (row < PIXELS)[:, None]
    own = statistics + (b * GROUPS + channel // (C // GROUPS)) * 2
    gain = tl.load(own + 1) * tl.load(weight + channel).to(tl.float32)
    shift = tl.load(bias + channel).to(tl.float32) - tl.load(own) * gain
    value = tl.load(x + at, inside, 0.).to(tl.float32) * gain[None, :] + shift[None, :]
    if SILU:
        value = value * tl.sigmoid(value)
    tl.store(out + at, value.to(out.dtype.element_ty), inside)


@triton_op("flux_faster::group_norm_silu", mutates_args=())
def group_norm_silu(x: Tensor, weight: Tensor, bias: Tensor, groups: int, eps: float, silu: bool) -> Tensor:
    """SiLU(GroupNorm(x)), or the norm alone: x (B, C, H, W), C and C / groups powers of two; the result is
    channels_last, as x should be."""
    x = x.contiguous(memory_format=torch.channels_last)
    B, C, height, width = x.shape
    pixels = height * width
    rows = max(1, TILE // C)
    chunk = rows * triton.cdiv(triton.cdiv(pixels, rows), CHUNKS)
    chunks = triton.cdiv(pixels, chunk)
    partial = torch.empty(B, chunks, 3, groups, dtype=torch.float32, device=x.device)
    statistics = torch.empty(B, groups, 2, dtype=torch.float32, device=x.device)
    out = torch.empty_like(x)
    wrap_triton(_statistics_kernel)[(chunks, B)](x, partial, pixels, chunk, C, groups, rows, num_warps=8)
    wrap_triton(_merge_kernel)[(groups, B)](partial, statistics, chunks, triton.next_power_of_2(chunks), groups, eps,
                                            num_warps=4)
    wrap_triton(_apply_kernel)[(triton.cdiv(pixels, rows), B)](x, out, statistics, weight, bias, pixels, C, groups,
                                                               rows, silu, num_warps=8)
    return out


@group_norm_silu.register_kernel("cpu")
def group_norm_silu_reference(x, weight, bias, groups, eps, silu):
    value = F.group_norm(x.float(), groups, weight.float(), bias.float(), eps)
    value = F.silu(value) if silu else value
    return value.to(x.dtype).contiguous(memory_format=torch.channels_last)


class GroupNormSiLU(torch.nn.Module):
    """A GroupNorm with the SiLU that follows it, on the weights of `norm`."""

    def __init__(self, norm: torch.nn.GroupNorm):
        super().__init__()
        self.weight, self.bias, self.groups, self.eps = norm.weight, norm.bias, norm.num_groups, norm.eps

    def forward(self, x: Tensor) -> Tensor:
        return group_norm_silu(x, self.weight, self.bias, self.groups, self.eps, True)


def fuse_group_norms(model: torch.nn.Module) -> int:
    """Fuses each GroupNorm of a VAE's encoder or decoder with the SiLU behind it, where the kernels take its sizes.

    Returns:
        How many were.
    """
    def takes(norm) -> bool:
        return isinstance(norm, torch.nn.GroupNorm) and all(
            size & (size - 1) == 0 for size in (norm.num_channels, norm.num_channels // norm.num_groups))

    count = 0
    for block in model.modules():
        if isinstance(block, ResnetBlock2D) and isinstance(block.nonlinearity, torch.nn.SiLU) and all(
                takes(norm) for norm in (block.norm1, block.norm2)):
            block.norm1, block.norm2 = GroupNormSiLU(block.norm1), GroupNormSiLU(block.norm2)
            block.nonlinearity = torch.nn.Identity()
            count += 2
    if isinstance(model.conv_act, torch.nn.SiLU) and takes(model.conv_norm_out):
        model.conv_norm_out, model.conv_act = GroupNormSiLU(model.conv_norm_out), torch.nn.Identity()
        count += 1
    return count
