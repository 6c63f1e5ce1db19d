"""The VAE's norms, its attention and its upsampling, for channels_last pictures on a GPU.

cuDNN wants NHWC, where a group's few channels lie side by side in every pixel. GroupNorm's statistics over all pixels
of a group are then best made tile by tile, all groups of a pixel at once, and merged: one read, then one read and one
write with SiLU, which at 1024x1024 add up to about 11 GB over FLUX.1's decoder. Where the norm follows a convolution,
its bias is added in the same reads. Attention has one head of 512 channels, more than any flash kernel takes; PyTorch
falls back to one written for Ampere. Two products with the softmax between them are faster on Hopper.

Nearest upsampling by 2 and a convolution of 3x3 are one linear map, in which a pixel depends on 2x2 others: a
transposed convolution has 4 products a pixel where those two have 9, and writes no picture of four times the size for
them to read.
"""

from itertools import pairwise

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from diffusers.models.attention_processor import Attention
from diffusers.models.resnet import ResnetBlock2D
from diffusers.models.upsampling import Upsample2D
from torch import Tensor

TILE = 8192  # elements that a program has in registers at a time
CHUNKS = 512  # programs a picture that make statistics
QUERIES = 4096  # rows of attention's scores at a time: 256 MiB in float32 at 1024x1024


@triton.jit
def _statistics_kernel(x, offset, partial, PIXELS, CHUNK, C: tl.constexpr, GROUPS: tl.constexpr, ROWS: tl.constexpr,
                       OFFSET: tl.constexpr):
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
        tile = tile.to(tl.float32)
        if OFFSET:
            shift = tl.load(offset + tl.arange(0, C)).to(tl.float32)
            tile = tl.where(inside[:, None], tile + shift[None, :], 0.)
        tile = tl.reshape(tile, (ROWS, GROUPS, C // GROUPS))
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
def _apply_kernel(x, offset, out, statistics, weight, bias, PIXELS, C: tl.constexpr, GROUPS: tl.constexpr,
                  ROWS: tl.constexpr, OFFSET: tl.constexpr, SILU: tl.constexpr):
    """A program is a tile of pixels, all channels."""
    b = tl.program_id(1)
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    channel = tl.arange(0, C)
    at = (b.to(tl.int64) * PIXELS + row[:, None]) * C + channel[None, :]
    inside = (row < PIXELS)[:, None]
    own = statistics + (b * GROUPS + channel // (C // GROUPS)) * 2
    gain = tl.load(own + 1) * tl.load(weight + channel).to(tl.float32)
    center = tl.load(own)
    if OFFSET:
        center -= tl.load(offset + channel).to(tl.float32)
    shift = tl.load(bias + channel).to(tl.float32) - center * gain
    value = tl.load(x + at, inside, 0.).to(tl.float32) * gain[None, :] + shift[None, :]
    if SILU:
        value = value * tl.sigmoid(value)
    tl.store(out + at, value.to(out.dtype.element_ty), inside)


@torch.library.custom_op("flux_faster::group_norm", mutates_args=())
def group_norm(x: Tensor, offset: Tensor | None, weight: Tensor, bias: Tensor, groups: int, eps: float, silu: bool
               ) -> Tensor:
    """GroupNorm of x + offset, and SiLU of that if `silu`.

    Args:
        x: (B, C, H, W), channels_last if no copy is to be made; C and C / groups are powers of two.
        offset: (C,), a bias that x lacks, or None. weight, bias: (C,), the norm's.

    Returns:
        (B, C, H, W), channels_last.
    """
    x = x.contiguous(memory_format=torch.channels_last)
    B, C, height, width = x.shape
    pixels = height * width
    rows = max(1, TILE // C)
    chunk = rows * triton.cdiv(triton.cdiv(pixels, rows), CHUNKS)
    chunks = triton.cdiv(pixels, chunk)
    partial = torch.empty(B, chunks, 3, groups, dtype=torch.float32, device=x.device)
    statistics = torch.empty(B, groups, 2, dtype=torch.float32, device=x.device)
    out = torch.empty_like(x)
    has_offset = offset is not None
    offset = offset if has_offset else bias
    _statistics_kernel[(chunks, B)](x, offset, partial, pixels, chunk, C, groups, rows, has_offset, num_warps=8)
    _merge_kernel[(groups, B)](partial, statistics, chunks, triton.next_power_of_2(chunks), groups, eps, num_warps=4)
    _apply_kernel[(triton.cdiv(pixels, rows), B)](x, offset, out, statistics, weight, bias, pixels, C, groups, rows,
                                                  has_offset, silu, num_warps=8)
    return out


@group_norm.register_fake
def _(x, offset, weight, bias, groups, eps, silu):
    return torch.empty_like(x, memory_format=torch.channels_last)


@group_norm.register_kernel("cpu")
def group_norm_reference(x, offset, weight, bias, groups, eps, silu):
    value = x.float() if offset is None else x.float() + offset.float()[:, None, None]
    value = F.group_norm(value, groups, weight.float(), bias.float(), eps)
    value = F.silu(value) if silu else value
    return value.to(x.dtype).contiguous(memory_format=torch.channels_last)


class FusedGroupNorm(torch.nn.Module):
    """A GroupNorm on its own weights, with what comes before and after it.

    Args:
        silu: whether SiLU follows.
        convolution: the one before; its bias moves here.
    """

    def __init__(self, norm: torch.nn.GroupNorm, silu: bool, convolution: torch.nn.Conv2d | None = None):
        super().__init__()
        self.weight, self.bias, self.groups, self.eps, self.silu = (norm.weight, norm.bias, norm.num_groups, norm.eps,
                                                                    silu)
        self.offset = None
        if convolution is not None:
            self.offset, convolution.bias = convolution.bias, None

    def forward(self, x: Tensor) -> Tensor:
        return group_norm(x, self.offset, self.weight, self.bias, self.groups, self.eps, self.silu)


class MatmulAttnProcessor:
    """Attention processor: softmax(q k^T / sqrt(C)) v with scores in float32, some thousand rows at a time, for one
    head of any size."""

    def __call__(self, attn: Attention, x: Tensor, encoder_hidden_states=None, attention_mask=None, temb=None
                 ) -> Tensor:
        """x (B, C, H, W), and the result, which has x added to it. What else diffusers hands over is None in a VAE, but
        has to have a name here: for others it writes a warning, which torch.compile cannot."""
        tokens = attn.group_norm(x).flatten(2).transpose(1, 2)
        q, k, v = (attn.to_qkv(tokens).chunk(3, dim=-1) if attn.fused_projections else
                   (attn.to_q(tokens), attn.to_k(tokens), attn.to_v(tokens)))
        out = torch.cat([(scores(part, k) * attn.scale).softmax(dim=-1).to(v.dtype) @ v
                         for part in q.split(QUERIES, dim=1)], dim=1)
        return (attn.to_out[0](out).transpose(1, 2).unflatten(2, x.shape[2:]) + x) / attn.rescale_output_factor


@torch.library.custom_op("flux_faster::scores", mutates_args=())
def scores(q: Tensor, k: Tensor) -> Tensor:
    """q k^T of (B, Q, C) and (B, S, C), in float32. Opaque to the compiler: AOTInductor of torch 2.11 has no batched
    product that takes bf16 and gives float32."""
    if q.device.type == "cuda" and q.dtype != torch.float32:
        return torch.bmm(q, k.mT, out_dtype=torch.float32)
    return q.float() @ k.float().mT


@scores.register_fake
def _(q, k):
    return q.new_empty(*q.shape[:2], k.shape[1], dtype=torch.float32)


def fuse_upsample_conv(convolution: torch.nn.Conv2d) -> torch.nn.ConvTranspose2d:
    """What gives at once what `convolution`, of 3x3 with stride 1 and padding 1, gives of a picture upsampled by 2.

    Of output row 2i + a (a is 0 or 1), tap t of the convolution reads input row floor((2i + a + t - 1) / 2). Taps that
    read the same row are added up, in float32. Columns alike.
    """
    taps = convolution.weight.detach().float().flip(2, 3).transpose(0, 1)  # (C_in, C_out, 3, 3)
    weight = sum(F.pad(taps, (a, 1 - a, b, 1 - b)) for a in (0, 1) for b in (0, 1))
    made = torch.nn.ConvTranspose2d(convolution.in_channels, convolution.out_channels, 4, stride=2, padding=1,
                                    device="meta")
    made.weight = torch.nn.Parameter(weight.to(convolution.weight.dtype, memory_format=torch.channels_last),
                                     requires_grad=False)
    made.bias = convolution.bias
    return made


def fuse_vae(vae: torch.nn.Module) -> tuple[int, int, int]:
    """Puts the kernels under a VAE's encoder and decoder, where they take its sizes. Call it once the projections are
    fused, if they are to be.

    Returns:
        How many norms, how many attentions, and how many upsamplers.
    """
    norms = attentions = upsamplers = 0
    for module in vae.modules():
        if isinstance(module, ResnetBlock2D) and isinstance(module.nonlinearity, torch.nn.SiLU) and all(
                _supports_norm(norm) for norm in (module.norm1, module.norm2)):
            module.norm1 = FusedGroupNorm(module.norm1, True)
            module.norm2 = FusedGroupNorm(module.norm2, True, module.conv1)
            module.nonlinearity = torch.nn.Identity()
            norms += 2
        elif isinstance(module, Attention) and module.heads == 1 and module.residual_connection:
            module.set_processor(MatmulAttnProcessor())
            attentions += 1
            if _supports_norm(module.group_norm):
                module.group_norm = FusedGroupNorm(module.group_norm, False)
                norms += 1
        elif isinstance(getattr(module, "conv_act", None), torch.nn.SiLU) and _supports_norm(module.conv_norm_out):
            module.conv_norm_out, module.conv_act = FusedGroupNorm(module.conv_norm_out, True), torch.nn.Identity()
            norms += 1
        elif isinstance(module, Upsample2D) and _is_nearest_2x(module):
            module.conv, module.use_conv_transpose = fuse_upsample_conv(module.conv), True
            upsamplers += 1
    for block, following in pairwise(vae.decoder.up_blocks):
        convolution, reader = block.upsamplers[-1].conv, following.resnets[0]
        if isinstance(convolution, torch.nn.ConvTranspose2d) and isinstance(reader.norm1, FusedGroupNorm):
            _move_bias(convolution, reader)
    return norms, attentions, upsamplers


@torch.no_grad()
def _move_bias(convolution: torch.nn.ConvTranspose2d, resnet: ResnetBlock2D) -> None:
    """From a convolution into what reads it: a norm, which adds it as it reads, and a shortcut, where it is a constant
    that goes with another."""
    bias, shortcut = convolution.bias, resnet.conv_shortcut
    reached = bias.float() if shortcut is None else shortcut.weight[:, :, 0, 0].float() @ bias.float()
    other = (resnet.conv2 if shortcut is None else shortcut).bias
    other.copy_(other.float() + reached)
    resnet.norm1.offset, convolution.bias = bias, None


def _is_nearest_2x(module: Upsample2D) -> bool:
    convolution = getattr(module, "conv", None)
    return (module.interpolate and module.norm is None and type(convolution) is torch.nn.Conv2d
            and (convolution.kernel_size, convolution.padding) == ((3, 3), (1, 1)))


def _supports_norm(norm: torch.nn.Module) -> bool:
    return isinstance(norm, torch.nn.GroupNorm) and all(
        size & (size - 1) == 0 for size in (norm.num_channels, norm.num_channels // norm.num_groups))
