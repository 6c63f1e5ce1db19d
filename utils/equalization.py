"""Static per-channel equalization: it balances a strong activation channel and the weak weight column that reads it.

Quantized activations and weights have per-row scales. A neuron, head or channel that is many times stronger than the
others sets the scale of the row, and the others round to zero. Where one Linear writes a channel and another Linear
reads it, the first can be divided and the second multiplied by any number. The function stays the same. This is
SmoothQuant's idea (arXiv 2211.10438), applied to the weights alone, without calibration data.
"""

import torch
from torch import Tensor

# SmoothQuant's migration strength a: the exponent of the activation in `channel_shares`; the weight has 1 - a. The
# weight can take more than the activation, because its scale is measured and the activation's scale is a bound.
EQUALIZATION = 0.75
# The same where the activation's scale is measured as well: int8.
EQUALIZATION_INT8 = 0.35
# The exponent with which strong modulations reduce an int8 activation.
MODULATION_INT8 = 0.5


def reach(weight: Tensor, bias: Tensor) -> Tensor:
    """Estimates the largest |w_j x + b_j| over many rows x of unit variance, as four standard deviations.

    Args:
        weight: (N, K). bias: (N,).

    Returns:
        (N,)
    """
    return 4 * weight.norm(dim=1) + bias.abs()


def channel_shares(written: Tensor, read: Tensor, strength: float = EQUALIZATION) -> Tensor:
    """The static factor e of each channel: the activation is divided by e, and its weight column multiplied by e.

    The formula is SmoothQuant's (arXiv 2211.10438): e = written^a / read^(1 - a), up to a factor common to all
    channels, which the scales of both sides absorb. A channel that is n times stronger, and is read n times weaker,
    gets e = n: both sides then have the magnitude of the other channels. If a strong channel is not read weaker, both
    sides share its strength.

    Args:
        written: (K,), the largest |activation| of each channel, as `reach` estimates it.
        read: (K,), the largest |w| of the weight column that reads the channel.
        strength: the exponent a.

    Returns:
        (K,) float32.
    """
    sides = [(x / x.amax().clamp(min=1e-30)).clamp(min=2.0**-24) for x in (written.double(), read.double())]
    return (sides[0] ** strength / sides[1] ** (1 - strength)).float()


def column_powers(weights: list[Tensor], modulation: Tensor | None = None) -> Tensor:
    """How strongly the weights read each input channel, relative to the median channel, as powers of two.

    All rows of the weights count alike, since each is divided by its length. The caller multiplies each input channel
    by its power and divides the weights' columns by it. The length of an input row then bounds the results of a GEMM
    tightly: channels that the weights hardly read, such as massive ones that no modulation reduces, add little to the
    length.

    Args:
        weights: (N, K) each; N may differ.
        modulation: (K,), the typical magnitude of the modulation of each channel, or None. Channels with a stronger
            modulation than the median get smaller powers, so that they do not set the scales of an int8 row. A weak
            modulation may suppress a massive channel, so it gets no larger power.

    Returns:
        (K,), powers of two from 2^-14 to 2^14.
    """
    squares = sum((weight / weight.norm(dim=1, keepdim=True).clamp(min=1e-30)).square().sum(0) for weight in weights)
    columns = squares.sqrt()
    columns = columns / columns.median().clamp(min=1e-30)
    if modulation is not None:
        columns = columns / (modulation / modulation.median().clamp(min=1e-30)).clamp(min=1) ** MODULATION_INT8
    columns = columns.clamp(2.0**-14, 2.0**14)
    return torch.exp2(columns.log2().round())


@torch.no_grad()
def equalize_values(block: torch.nn.Module) -> None:
    """Equalizes v and the columns that read attention's result, in place, in the weights of one diffusers FLUX block.

    The factors are powers of two, so the weights are not rounded. The text and image streams of a double block share
    their factors, because attention mixes their values.
    """
    attn = block.attn
    single = not hasattr(block, "ff")
    width = attn.inner_dim
    fused = hasattr(attn, "to_qkv")
    names = [("to_qkv" if fused else "to_v", block.proj_out if single else attn.to_out[0])]
    if not single:
        names.append(("to_added_qkv" if fused else "add_v_proj", attn.to_add_out))
    values = [(linear.weight[-width:], None if linear.bias is None else linear.bias[-width:])
              for linear in (getattr(attn, name) for name, _ in names)]
    readers = [reader.weight[:, :width] for _, reader in names]
    written = [reach(weight.float(), torch.zeros(width, device=weight.device) if bias is None else bias.float())
               for weight, bias in values]
    read = [reader.float().abs().amax(0) for reader in readers]
    shares = channel_shares(torch.stack(written).amax(0), torch.stack(read).amax(0))
    shares = torch.exp2((shares / shares.median()).log2().round())
    for (weight, bias), reader in zip(values, readers, strict=True):
        weight /= shares[:, None].to(weight.dtype)
        reader *= shares.to(reader.dtype)
        if bias is not None:
            bias /= shares.to(bias.dtype)
