"""The VAE's norms, attention and upsampling, for channels_last images on a GPU.

**GroupNorm.** cuDNN wants NHWC, where the few channels of a group lie side by side in every pixel. GroupNorm's
statistics cover all pixels of a group. The fastest method computes them tile by tile, for all groups of a pixel at
once, and merges the tiles. It takes one read for the statistics, then one read and one write for the norm with SiLU. At
1024x1024, that adds up to about 11 GB over FLUX.1's decoder. If the norm follows a convolution, the same reads add the
convolution's bias.

**Attention.** The VAE's attention has one head of 512 channels, more than any flash kernel takes. PyTorch falls back to
a kernel written for Ampere. Two GEMMs with the softmax between them are faster on Hopper.

**Upsampling.** Nearest upsampling by 2, followed by a 3x3 convolution, is one linear map in which an output pixel
depends on 2x2 input pixels. A transposed convolution needs 4 products per output pixel, where the two steps need 9. It
also avoids writing and reading the upsampled image, which is four times as large.
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

TILE = 8192  # elements that a program holds in registers
CHUNKS = 512  # upper limit of the programs per image that compute statistics
QUERIES = 4096  # rows of attention scores computed at a time: 256 MiB in float32 at 1024x1024


@triton.jit
def _statistics_kernel(x, offset, partial, PIXELS, CHUNK, C: tl.constexpr, GROUPS: tl.constexpr, ROWS: tl.constexpr,
                       OFFSET: tl.constexpr):
    """Count, mean and sum of squared deviations of each group over a chunk of pixels. A program computes one chunk.

    The tiles of a chunk are merged as in Chan, Golub and LeVeque (1979). A difference of large sums would lose a small
    variance.

    Args:
        x: (B, PIXELS, C), channels_last, any floating-point dtype.
        offset: (C,), added to x. Unused without OFFSET.
        partial: written, (B, chunks, 3, GROUPS) float32: count, mean and sum of squared deviations.
        PIXELS, CHUNK: pixels of an image and of a chunk.
        C, GROUPS: channels and groups. C and C / GROUPS are powers of two.
        ROWS: pixels of a tile, a power of two.
        OFFSET: whether to add `offset`.
    """
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
    """Merges the statistics of all chunks. A program computes one group of one image.

    Args:
        partial: (B, COUNT, 3, GROUPS) float32, see `_statistics_kernel`.
        statistics: written, (B, GROUPS, 2) float32: mean and 1 / standard deviation.
        COUNT, BLOCK: chunks of an image, and the next power of two.
        EPS: the norm's epsilon.
    """
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
    """Normalizes a tile of ROWS pixels with all their channels. A program computes one tile.

    Args:
        x: (B, PIXELS, C), channels_last. out: written, like x.
        offset: (C,), added to x. Unused without OFFSET.
        statistics: (B, GROUPS, 2) float32, see `_merge_kernel`.
        weight, bias: (C,), the norm's.
        PIXELS, C, GROUPS, ROWS, OFFSET: as in `_statistics_kernel`.
        SILU: whether SiLU follows.
    """
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
    """GroupNorm of x + offset, followed by SiLU if `silu` is set.

    Args:
        x: (B, C, H, W), channels_last; any other layout is copied. C and C / groups are powers of two.
        offset: (C,), the bias that the convolution before left out, or None.
        weight, bias: (C,), the norm's.
        groups: number of groups.
        eps: the norm's epsilon.
        silu: whether SiLU follows.

    Returns:
        (B, C, H, W), channels_last, in x's dtype.
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
    """A GroupNorm that also adds the bias of the convolution before it and applies the SiLU after it.

    Args:
        norm: the GroupNorm, whose parameters are shared.
        silu: whether SiLU follows.
        convolution: the convolution before the norm, or None. Its bias moves into this module.
    """

    def __init__(self, norm: torch.nn.GroupNorm, silu: bool, convolution: torch.nn.Conv2d | None = None):
        super().__init__()
        self.weight, self.bias, self.groups, self.eps, self.silu = (norm.weight, norm.bias, norm.num_groups, norm.eps,
                                                                    silu)
        self.offset = None
        if convolution is not None:
            self.offset, convolution.bias = convolution.bias, None

    def forward(self, x: Tensor) -> Tensor:
        """x (B, C, H, W), best in channels_last: (B, C, H, W), channels_last, in x's dtype."""
        return group_norm(x, self.offset, self.weight, self.bias, self.groups, self.eps, self.silu)


class MatmulAttnProcessor:
    """Attention processor for one head of any size: softmax(q k^T / sqrt(C)) v, with scores in float32.

    It computes `QUERIES` rows of the scores at a time.
    """

    def __call__(self, attn: Attention, x: Tensor, encoder_hidden_states=None, attention_mask=None, temb=None
                 ) -> Tensor:
        """Self-attention of an image, with the residual add.

        Args:
            attn: diffusers' attention module, with fused or separate projections.
            x: (B, C, H, W).
            encoder_hidden_states, attention_mask, temb: None in a VAE. They need names here: diffusers logs a warning
                about arguments that a processor does not name, and torch.compile cannot compile the warning.

        Returns:
            (B, C, H, W): attention's result plus x, divided by the module's `rescale_output_factor`.
        """
        tokens = attn.group_norm(x).flatten(2).transpose(1, 2)
        q, k, v = (attn.to_qkv(tokens).chunk(3, dim=-1) if attn.fused_projections else
                   (attn.to_q(tokens), attn.to_k(tokens), attn.to_v(tokens)))
        out = torch.cat([(scores(part, k) * attn.scale).softmax(dim=-1).to(v.dtype) @ v
                         for part in q.split(QUERIES, dim=1)], dim=1)
        return (attn.to_out[0](out).transpose(1, 2).unflatten(2, x.shape[2:]) + x) / attn.rescale_output_factor


@torch.library.custom_op("flux_faster::scores", mutates_args=())
def scores(q: Tensor, k: Tensor) -> Tensor:
    """q k^T in float32.

    The op is opaque to the compiler, because AOTInductor of torch 2.11 has no batched GEMM that takes bf16 and returns
    float32.

    Args:
        q: (B, Q, C). k: (B, S, C).

    Returns:
        (B, Q, S) float32.
    """
    if q.device.type == "cuda" and q.dtype != torch.float32:
        return torch.bmm(q, k.mT, out_dtype=torch.float32)
    return q.float() @ k.float().mT


@scores.register_fake
def _(q, k):
    return q.new_empty(*q.shape[:2], k.shape[1], dtype=torch.float32)


def fuse_upsample_conv(convolution: torch.nn.Conv2d) -> torch.nn.ConvTranspose2d:
    """Merges nearest upsampling by 2 and the convolution after it into one transposed convolution.

    For output row 2i + a (a is 0 or 1), tap t of the convolution reads input row floor((2i + a + t - 1) / 2). Taps that
    read the same row are added up, in float32. The same holds for columns.

    Args:
        convolution: a 3x3 convolution with stride 1 and padding 1.

    Returns:
        A 4x4 transposed convolution with stride 2, in the dtype of `convolution`. It maps (B, C_in, H, W) to (B, C_out,
        2H, 2W).
    """
    taps = convolution.weight.detach().float().flip(2, 3).transpose(0, 1)  # (C_in, C_out, 3, 3)
    weight = sum(F.pad(taps, (a, 1 - a, b, 1 - b)) for a in (0, 1) for b in (0, 1))
    transposed = torch.nn.ConvTranspose2d(convolution.in_channels, convolution.out_channels, 4, stride=2, padding=1,
                                          device="meta")
    transposed.weight = torch.nn.Parameter(weight.to(convolution.weight.dtype, memory_format=torch.channels_last),
                                           requires_grad=False)
    transposed.bias = convolution.bias
    return transposed


def fuse_vae(vae: torch.nn.Module) -> tuple[int, int, int]:
    """Replaces the norms, attentions and upsamplers of a VAE's encoder and decoder wherever the kernels support their
    sizes.

    Call it after the projections of attention are fused, if they are to be fused.

    Args:
        vae: diffusers' AutoencoderKL, changed in place.

    Returns:
        The numbers of replaced norms, attentions and upsamplers.
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
    """Moves an upsampler's bias into the resnet that reads its result.

    The resnet's norm adds the bias as it reads. On the way around the norm, the bias is a constant. It is added to the
    bias of the shortcut, or of the second convolution if there is no shortcut.
    """
    bias, shortcut = convolution.bias, resnet.conv_shortcut
    reached = bias.float() if shortcut is None else shortcut.weight[:, :, 0, 0].float() @ bias.float()
    other = (resnet.conv2 if shortcut is None else shortcut).bias
    other.copy_(other.float() + reached)
    resnet.norm1.offset, convolution.bias = bias, None


def _is_nearest_2x(module: Upsample2D) -> bool:
    """Whether `fuse_upsample_conv` supports the module: it interpolates, has no norm and ends in a 3x3 convolution."""
    convolution = getattr(module, "conv", None)
    return (module.interpolate and module.norm is None and type(convolution) is torch.nn.Conv2d
            and (convolution.kernel_size, convolution.padding) == ((3, 3), (1, 1)))


def _supports_norm(norm: torch.nn.Module) -> bool:
    """Whether `group_norm` supports the norm: channels, and channels of a group, are powers of two."""
    return isinstance(norm, torch.nn.GroupNorm) and all(
        size & (size - 1) == 0 for size in (norm.num_channels, norm.num_channels // norm.num_groups))
