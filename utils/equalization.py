"""Static per-channel equalization: a strong channel in an activation, and the weak column that reads it, look alike.

A quantized activation has one scale a row, and so does a quantized weight. A neuron, head or channel that is many times
stronger than the others sets the scale of the row, and the others round to zero. Where one Linear's output channel is
another Linear's input channel, the first can be divided and the second multiplied by any number. The function stays.
This is SmoothQuant's idea (arXiv 2211.10438), from the weights alone, without calibration data.
"""

import torch
from torch import Tensor

# How much of a channel's share lies on the activation's side. The rest lies on the weight's side, whose scale is
# measured, and which can bear more than an activation whose scale is a bound.
EQUALIZATION = 0.75


def reach(weight: Tensor, bias: Tensor) -> Tensor:
    """(N,): about the largest |w_j x + b_j| over many rows x of unit variance, four standard deviations."""
    return 4 * weight.norm(dim=1) + bias.abs()


def channel_shares(written: Tensor, read: Tensor) -> Tensor:
    """The static share e (K,) of each channel: the activation is divided by it, and the weight that reads the
    activation is multiplied by it.

    As SmoothQuant chooses them, e = written^a / read^(1 - a), up to a factor for all channels that both scales take in.
    A channel that is n times stronger, and is read n times weaker, gets e = n: both sides look as if it was like the
    others. A channel of real weight spreads it over both sides.

    Args:
        written: (K,) how far each channel reaches. read: (K,) the largest |w| of the column that reads it.
    """
    sides = [(x / x.amax().clamp(min=1e-30)).clamp(min=2.0**-24) for x in (written.double(), read.double())]
    return (sides[0] ** EQUALIZATION / sides[1] ** (1 - EQUALIZATION)).float()


def column_powers(weights: list[Tensor]) -> Tensor:
    """(K,) powers of two: how much more than the median the rows of `weights`, (N, K) each, read of each input channel.

    Rows count alike, however long they are. Where an input channel is multiplied by its power, and the columns are
    divided by it, the length of an input says how large a GEMM's results can be: channels that hardly anybody reads,
    such as massive ones that no modulation undoes, add little to it.
    """
    squares = sum((weight / weight.norm(dim=1, keepdim=True).clamp(min=1e-30)).square().sum(0) for weight in weights)
    columns = squares.sqrt()
    columns = (columns / columns.median().clamp(min=1e-30)).clamp(2.0**-14, 2.0**14)
    return torch.exp2(columns.log2().round())


@torch.no_grad()
def equalize_values(block: torch.nn.Module) -> None:
    """Equalizes v and the columns that read attention's result, in the weights of one of diffusers' FLUX blocks.

    Shares are powers of two, so that nothing is rounded. A double block's streams have common shares: attention mixes
    their values.
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
