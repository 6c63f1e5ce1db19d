"""These kernels cast attention's result to e4m3, or attention's and GELU's to int8, where the next GEMM reads them.

Shapes use these letters: B batch size, S tokens, D model width, N width of the MLP.

Every op runs on CUDA through Triton, and on a CPU through its reference. A reference is plain torch. It has the
arguments and results of its op and computes the same. `send_attention` is no op and has no reference.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.library import triton_op, wrap_triton

from utils.kernels.formats import (
    E4M3,
    E4M3_MAX,
    INT8_MAX,
    TINY,
    _to_e4m3_kernel,
    _to_int8_kernel,
    quantize_rows,
    to_e4m3,
)


@triton.jit
def _cast_kernel(x, least_scale, out, scale, out_stride, D: tl.constexpr, BLOCK: tl.constexpr, HAS_LEAST: tl.constexpr,
                 MAX: tl.constexpr):
    """Casts rows of bf16 to e4m3, each with its measured scale or a larger given one. A program computes one row.

    Args:
        x: (rows, D) bf16, contiguous.
        least_scale: (rows,) float32, lower limit of each row's scale. Unused without HAS_LEAST.
        out: written, e4m3, the first D columns of rows that are out_stride elements apart.
        scale: written, (rows,) float32, the scale that the row was divided by.
        D, BLOCK: elements of a row, and the next power of two.
        HAS_LEAST: whether least_scale applies. MAX: E4M3_MAX.
    """
    row = tl.program_id(0).to(tl.int64)
    i = tl.arange(0, BLOCK)
    value = tl.load(x + row * D + i, i < D, 0.).to(tl.float32)
    found = tl.maximum(tl.max(tl.abs(value), 0), 1e-12) / MAX
    if HAS_LEAST:
        found = tl.maximum(found, tl.load(least_scale + row))
    tl.store(scale + row, found)
    tl.store(out + row * out_stride + i, _to_e4m3_kernel(value * (1 / found), MAX), i < D)


@triton_op("flux_faster::cast_attention", mutates_args=())
def cast_attention(attention: Tensor) -> tuple[Tensor, Tensor]:
    """Attention's result as e4m3, with the measured scale of each row.

    Args:
        attention: (B, S, D) bf16.

    Returns:
        (B, S, D) e4m3, and the scales (B, S) float32.
    """
    attention = attention.contiguous()
    B, tokens, D = attention.shape
    out, scale = attention.new_empty(B, tokens, D, dtype=E4M3), attention.new_empty(B, tokens, dtype=torch.float32)
    wrap_triton(_cast_kernel)[(B * tokens,)](attention, scale, out, scale, D, D, triton.next_power_of_2(D), False,
                                             E4M3_MAX, num_warps=4)
    return out, scale


@cast_attention.register_kernel("cpu")
def cast_attention_reference(attention):
    return quantize_rows(attention)


# Opaque to the compiler for the first of the two reasons in gemm.py: it writes into part of an e4m3 tensor.
@torch.library.custom_op("flux_faster::place_attention", mutates_args=("hidden",))
def place_attention(attention: Tensor, least_scale: Tensor, hidden: Tensor) -> Tensor:
    """Casts attention's result to e4m3 and writes it into the first D columns of `hidden`.

    Args:
        attention: (B, S, D) bf16.
        least_scale: (B, S) float32, the scale that GELU's result in the same row needs.
        hidden: (B, S, D + N) e4m3, the input of a single block's last GEMM.

    Returns:
        The scale of each row, (B, S) float32: the larger of the measured scale and least_scale.
    """
    attention, least_scale = attention.contiguous(), least_scale.contiguous()
    B, tokens, D = attention.shape
    scale = torch.empty_like(least_scale)
    _cast_kernel[(B * tokens,)](attention, least_scale, hidden, scale, hidden.shape[2], D, triton.next_power_of_2(D),
                                True, E4M3_MAX, num_warps=4)
    return scale


@place_attention.register_fake
def _(attention, least_scale, hidden):
    return torch.empty(least_scale.shape, dtype=torch.float32, device=attention.device)


@place_attention.register_kernel("cpu")
def place_attention_reference(attention, least_scale, hidden):
    scale = torch.maximum(quantize_rows(attention)[1], least_scale)
    hidden[..., :attention.shape[-1]] = to_e4m3(attention.float() / scale[..., None])
    return scale


@triton.jit
def _cast_int8_kernel(attention, hidden, out, scale, zero_point, D: tl.constexpr, N: tl.constexpr,
                      D_BLOCK: tl.constexpr, N_BLOCK: tl.constexpr, MAX: tl.constexpr):
    """Casts a row of attention's result and a row of GELU's result to int8, side by side, with one measured scale.

    GELU's results lie between lo, which is hardly negative, and hi. With a zero point, (hi - lo) / scale steps of the
    254 that int8 has are used: about twice as many as without. Zero stays zero, because the zero point is an integer.
    A program computes one row, in pieces of powers of two.

    Args:
        attention: (rows, D) bf16, contiguous. hidden: (rows, N) bf16, contiguous. D or N may be 0.
        out: written, (rows, D + N) int8, contiguous.
        scale, zero_point: written, (rows,) float32. The zero point applies to the last N columns.
        D_BLOCK, N_BLOCK: elements of a piece.
        MAX: INT8_MAX.
    """
    row = tl.program_id(0).to(tl.int64)
    own = out + row * (D + N)
    found = 1e-12
    low = 0.
    plain = ()
    for j in tl.static_range(D // D_BLOCK):
        plain += (tl.load(attention + row * D + j * D_BLOCK + tl.arange(0, D_BLOCK)).to(tl.float32),)
    shifted = ()
    for j in tl.static_range(N // N_BLOCK):
        shifted += (tl.load(hidden + row * N + j * N_BLOCK + tl.arange(0, N_BLOCK)).to(tl.float32),)
    if D > 0:
        largest = tl.zeros((D_BLOCK,), tl.float32)
        for j in tl.static_range(D // D_BLOCK):
            largest = tl.maximum(largest, tl.abs(plain[j]))
        found = tl.maximum(found, tl.max(largest, 0) / MAX)
    if N > 0:
        high = tl.zeros((N_BLOCK,), tl.float32)
        least = tl.zeros((N_BLOCK,), tl.float32)
        for j in tl.static_range(N // N_BLOCK):
            high = tl.maximum(high, shifted[j])
            least = tl.minimum(least, shifted[j])
        low = tl.min(least, 0)
        found = tl.maximum(found, (tl.max(high, 0) - low) / (2 * MAX))
    steps = 1 / found
    zero = tl.floor(-MAX - low * steps)
    for j in tl.static_range(D // D_BLOCK):
        tl.store(own + j * D_BLOCK + tl.arange(0, D_BLOCK), _to_int8_kernel(plain[j] * steps, 0.))
    for j in tl.static_range(N // N_BLOCK):
        tl.store(own + D + j * N_BLOCK + tl.arange(0, N_BLOCK), _to_int8_kernel(shifted[j] * steps, zero))
    tl.store(scale + row, found)
    tl.store(zero_point + row, zero)


@triton_op("flux_faster::cast_int8", mutates_args=())
def cast_int8(attention: Tensor | None, hidden: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """Attention's and GELU's results as int8, side by side, with one measured scale per row.

    Args:
        attention: (B, S, D) bf16 or None. hidden: (B, S, N) bf16 or None, GELU's result.

    Returns:
        (B, S, D + N) int8. The scale and the zero point of each row, (B, S) float32: attention's result is the int8
        values times the scale, GELU's result is the int8 values minus the zero point, times the scale.
    """
    rows = attention if hidden is None else hidden
    B, tokens = rows.shape[:2]
    D, N = (0 if x is None else x.shape[2] for x in (attention, hidden))
    attention, hidden = ((rows if x is None else x).contiguous() for x in (attention, hidden))
    out = rows.new_empty(B, tokens, D + N, dtype=torch.int8)
    scale, zero_point = (rows.new_empty(B, tokens, dtype=torch.float32) for _ in range(2))
    wrap_triton(_cast_int8_kernel)[(B * tokens,)](
        attention, hidden, out, scale, zero_point, D, N, max(D & -D, 1), max(N & -N, 1), INT8_MAX, num_warps=8)
    return out, scale, zero_point


@cast_int8.register_kernel("cpu")
def cast_int8_reference(attention, hidden):
    parts = [x.float() for x in (attention, hidden) if x is not None]
    scale = torch.zeros(parts[0].shape[:2], device=parts[0].device)
    low = torch.zeros_like(scale)
    if attention is not None:
        scale = attention.float().abs().amax(2) / INT8_MAX
    if hidden is not None:
        low = hidden.float().amin(2).clamp(max=0)
        scale = torch.maximum(scale, (hidden.float().amax(2).clamp(min=0) - low) / (2 * INT8_MAX))
    scale = scale.clamp(min=TINY)
    zero_point = (-INT8_MAX - low / scale).floor()
    zeros = [torch.zeros_like(zero_point)] * (attention is not None) + [zero_point] * (hidden is not None)
    out = [(part / scale[..., None]).round() + zero[..., None] for part, zero in zip(parts, zeros, strict=True)]
    return torch.cat(out, 2).to(torch.int8), scale, zero_point


@triton.jit
def _send_kernel(x, addresses, scale, tokens, own, offset, D: tl.constexpr, BLOCK: tl.constexpr, MAX: tl.constexpr):
    """Casts attention's result to e4m3 and writes each row into the memory of the GPU that holds the row's token.

    A program handles one of the B * tokens rows. Token t belongs to GPU t // own.

    Args:
        x: (B, tokens, D) bf16, contiguous: all tokens, and the D columns of this GPU's heads.
        addresses: (N,) int64, the address of the receive buffer of each GPU: (N, B, own, D) e4m3, contiguous.
        scale: (B,) float32, the scale of each batch item.
        tokens, own: tokens of an item on all GPUs, and on one GPU (tokens / N).
        offset: the element of every receive buffer where this GPU's part begins, rank * B * own * D.
        D, BLOCK: elements of a row, and the next power of two. MAX: E4M3_MAX.
    """
    row = tl.program_id(0).to(tl.int64)
    i = tl.arange(0, BLOCK)
    token = row % tokens
    out = tl.load(addresses + token // own).to(tl.pointer_type(tl.float8e4nv))
    out += offset + (row // tokens * own + token % own) * D
    value = tl.load(x + row * D + i, i < D, 0.).to(tl.float32) / tl.load(scale + row // tokens)
    tl.store(tl.multiple_of(out, 16) + i, _to_e4m3_kernel(value, MAX), i < D)


def send_attention(attention: Tensor, scale: Tensor, addresses: Tensor, rank: int) -> None:
    """Divides attention's result by the scale of its batch item and writes it, as e4m3, into the memory of each GPU.

    The function is no custom op, because work on several GPUs is never compiled or exported.

    Args:
        attention: (B, S, D) bf16: all tokens and this GPU's heads. D is a multiple of 16.
        scale: (B,) float32.
        addresses: (N,) int64, the address of each GPU's receive buffer, (N, B, S / N, D) e4m3. A GPU receives its S / N
            tokens; this function writes part `rank` of each buffer.
        rank: the rank of this GPU.
    """
    B, tokens, D = attention.shape
    own = tokens // len(addresses)
    _send_kernel[(B * tokens,)](attention, addresses, scale, tokens, own, rank * B * own * D, D,
                                triton.next_power_of_2(D), E4M3_MAX, num_warps=4)
