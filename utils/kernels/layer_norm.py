"""These kernels add residuals, normalize, modulate and cast the result to e4m3 or int8.

Between two GEMMs, a FLUX block runs LayerNorm, modulation, QK-norm, RoPE, GELU and gates. Every fp8 GEMM adds a pass
that finds the largest value and a pass that divides by it. Run one by one, these passes read and write each activation
several times. The fused kernels read each activation once and write it once, in e4m3 if a GEMM follows. Work that fits
into the registers of a GEMM is done in the GEMM.

**Text before image.** Blocks exchange two tensors, text and image, as diffusers' blocks do. A kernel chooses the
tensor by the row. Within a block, all tokens share one tensor (B, T + I, *). Nothing is ever concatenated.

Shapes use these letters: B batch size, T text tokens, I image tokens, S = T + I, D model width, H heads.

Every op runs on CUDA through Triton, and on a CPU through its reference. A reference is plain torch. It has the
arguments and results of its op and computes the same.
"""

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor
from torch.library import triton_op, wrap_triton

from utils.kernels.formats import (
    E4M3,
    E4M3_MAX,
    EPS,
    INT8_MAX,
    ROUNDING,
    STREAM,
    TINY,
    _to_int8_kernel,
    _to_stream_kernel,
    from_stream,
    quantize_rows,
    to_stream,
)


@triton.jit
def _own_stream(row, text, image, new_text, new_image, T, S, D: tl.constexpr):
    """Locates a row of the (B * S) rows of all tokens in the two tensors of the residual stream.

    Args:
        row: index of the row, b * S + s. The first T of the S tokens are text.
        text, image: pointers to (B, T, D) and (B, S - T, D), contiguous. new_text, new_image: pointers of the same
            layout.

    Returns:
        Batch item b; stream (0 text, 1 image); pointers to the D elements of the row in the old and in the new tensor.
    """
    item = row // S
    s = row % S
    if s < T:
        stream = 0
        at = (item * T + s) * D
        source, new = text + at, new_text + at
    else:
        stream = 1
        at = (item * (S - T) + s - T) * D
        source, new = image + at, new_image + at
    return item, stream, source, new


# A combine function of tl.reduce: the maximum of the first operand and the sum of the second.
@triton.jit
def _largest_and_sum(a, b, c, d):
    return tl.maximum(a, c), b + d


@triton.jit
def _adaln_kernel(
        text, image, y, y_scale, bias, new_text, new_image, table, offsets, gates, out, row_scale, hidden_scale,
        lengths, bounds, T, S, table_stride, bias_stride, D: tl.constexpr, BLOCK: tl.constexpr, BOUNDS: tl.constexpr,
        SHIFT: tl.constexpr, SCALE: tl.constexpr, RESIDUAL: tl.constexpr, EPS: tl.constexpr, MAX: tl.constexpr,
        ROUNDING: tl.constexpr, STREAM: tl.constexpr, INT8: tl.constexpr):
    """Residual add (optional), LayerNorm, modulation and the cast to e4m3 or int8. A program computes a row.

        x = x + gate * (y * y_scale + bias)                      only with RESIDUAL
        v = LayerNorm(x) * scale + shift                         the table holds 1 + diffusers' scale
        out = v / row_scale,  row_scale = max |v| / MAX

    The row lies in D / BLOCK pieces of BLOCK elements. No lane is masked, even if D is no power of two: FLUX.1's 3072
    is 3 x 1024.

    Args:
        text, image: the residual stream, (B, T, D) and (B, S - T, D) fp16, contiguous, divided by STREAM.
        y: (B, S, D) bf16, contiguous, the result of `fp8_gemm`. Unused without RESIDUAL.
        y_scale: (B, S) float32, the scale of each row of y. Unused without RESIDUAL.
        bias: (2, D) bf16, divided by the column scales of y: text's row and image's row, bias_stride elements apart.
            Unused without RESIDUAL.
        new_text, new_image: written with RESIDUAL, the sums, with the layout of text and image.
        table: (B, total) bf16, every modulation of the step (`Modulations`); its rows are table_stride elements apart.
        offsets: (2,) int64, the element of a table row where the modulation of text and of image begins. Multiples of
            16.
        gates: (2,) int64, the element of a table row where the gate of text and of image begins. Multiples of 16. A
            gate has D elements, which include the column scales of y. Unused without RESIDUAL.
        out: written, (B, S, D) e4m3 or int8, contiguous.
        row_scale: written, (B, S) float32, the scale of each row of `out`.
        hidden_scale: written, (B, S) float32, the scale of each row of GELU's result: (R * bounds[stream, 0] +
            bounds[stream, 1]) / MAX.
        lengths: written, (B, S) float32, R: the Euclidean length of v times ROUNDING, which bounds the length of the
            rounded row.
        bounds: (2, BOUNDS) float32, text's row and image's row, contiguous. The kernel reads the first two columns: the
            largest |w_j| and |b_j| of GELU's GEMM. See `utils.kernels.fused_blocks.gemm_bounds`.
        T, S: text tokens and all tokens of a batch item.
        table_stride, bias_stride: in elements. bias_stride is 0 if both streams share one bias.
        D, BLOCK: elements of a row and of a piece. BLOCK is a power of two that divides D.
        BOUNDS: columns of `bounds`, 2 + 2 H.
        SHIFT, SCALE: the parts of a modulation that hold shift and scale, counted from 0. Each part has D elements.
        RESIDUAL: whether to add y.
        EPS, MAX, ROUNDING, STREAM: LayerNorm's epsilon, E4M3_MAX or INT8_MAX, and the constants of formats.py.
        INT8: whether `out` is int8. hidden_scale and lengths are bounds for e4m3, and nobody reads them then.
    """
    PIECES: tl.constexpr = D // BLOCK
    # After the residual add, no kernel reads its operands again. L2 should keep the sum and the next GEMM's input.
    DEAD: tl.constexpr = "evict_first" if RESIDUAL else ""
    row = tl.program_id(0).to(tl.int64)
    i = tl.arange(0, BLOCK)
    item, stream, source, new = _own_stream(row, text, image, new_text, new_image, T, S, D)
    # All loads come before the first reduction, which waits for all threads. Load latency dominates the time of a row,
    # so the loads must overlap.
    modulation = table + item * table_stride + tl.multiple_of(tl.load(offsets + stream), 16)
    slope = tl.load(bounds + stream * BOUNDS)
    least = tl.load(bounds + stream * BOUNDS + 1)
    if RESIDUAL:
        own_gate = table + item * table_stride + tl.multiple_of(tl.load(gates + stream), 16)
        own_scale = tl.load(y_scale + row)
    x = ()
    scale = ()
    shift = ()
    for j in tl.static_range(PIECES):
        x += (tl.load(source + j * BLOCK + i, eviction_policy=DEAD).to(tl.float32) * STREAM,)
        scale += (tl.load(modulation + SCALE * D + j * BLOCK + i),)
        shift += (tl.load(modulation + SHIFT * D + j * BLOCK + i),)
    if RESIDUAL:
        summed = ()
        for j in tl.static_range(PIECES):
            gate = tl.load(own_gate + j * BLOCK + i).to(tl.float32)
            added = tl.load(y + row * D + j * BLOCK + i, eviction_policy=DEAD).to(tl.float32) * own_scale
            added += tl.load(bias + stream * bias_stride + j * BLOCK + i).to(tl.float32)
            total = _to_stream_kernel(x[j] + gate * added, STREAM)
            tl.store(new + j * BLOCK + i, total)
            summed += (total.to(tl.float32) * STREAM,)
        x = summed
    total = tl.zeros((BLOCK,), tl.float32)
    for j in tl.static_range(PIECES):
        total += x[j]
    mean = tl.sum(total, 0) / D
    total = tl.zeros((BLOCK,), tl.float32)
    for j in tl.static_range(PIECES):
        total += (x[j] - mean) * (x[j] - mean)
    root = tl.rsqrt(tl.sum(total, 0) / D + EPS)
    largest = tl.zeros((BLOCK,), tl.float32)
    squares = tl.zeros((BLOCK,), tl.float32)
    modulated = ()
    for j in tl.static_range(PIECES):
        value = (x[j] - mean) * root * scale[j].to(tl.float32) + shift[j].to(tl.float32)
        largest = tl.maximum(largest, tl.abs(value))
        squares += value * value
        modulated += (value,)
    largest, squares = tl.reduce((largest, squares), 0, _largest_and_sum)
    largest = tl.maximum(largest, 1e-12)
    for j in tl.static_range(PIECES):
        scaled = modulated[j] * (MAX / largest)
        if INT8:
            tl.store(out + row * D + j * BLOCK + i, _to_int8_kernel(scaled, 0.))
        else:
            tl.store(out + row * D + j * BLOCK + i, scaled.to(tl.float8e4nv))
    length = tl.sqrt(squares) * ROUNDING
    tl.store(row_scale + row, largest / MAX)
    tl.store(hidden_scale + row, tl.maximum(length * slope + least, 1e-12) / MAX)
    tl.store(lengths + row, length)


def _adaln_operands(text, image, y, y_scale, bias, table, offsets, gates, bounds, shift, scale, int8
                    ) -> tuple[tuple[Tensor, ...], tuple]:
    """The results of `_adaln_kernel`, allocated, and its arguments. If y is None, the first two results are the inputs.

    Each op launches the kernel itself: torch's compile cache learns from an op's source which kernels the op has.
    """
    text, image, table = text.contiguous(), image.contiguous(), table.contiguous()
    B, T, D = text.shape
    tokens, adds = T + image.shape[1], y is not None
    out = text.new_empty(B, tokens, D, dtype=torch.int8 if int8 else E4M3)
    row_scale, hidden_scale, lengths = (text.new_empty(B, tokens, dtype=torch.float32) for _ in range(3))
    new_text, new_image = (torch.empty_like(text), torch.empty_like(image)) if adds else (text, image)
    if not adds:
        y, y_scale, bias = text, row_scale, text[0]
    args = (text, image, y, y_scale, bias, new_text, new_image, table, offsets, gates, out, row_scale, hidden_scale,
            lengths, bounds, T, tokens, table.stride(0), bias.stride(0), D, _piece(D), bounds.shape[1], shift,
            scale, adds, EPS, INT8_MAX if int8 else E4M3_MAX, ROUNDING, STREAM, int8)
    return (new_text, new_image, out, row_scale, hidden_scale, lengths), args


def _piece(width: int) -> int:
    """The largest power of two that divides a row's width."""
    return width & -width


@triton_op("flux_faster::adaln", mutates_args=())
def adaln(text: Tensor, image: Tensor, table: Tensor, offsets: Tensor, bounds: Tensor, shift: int, scale: int,
          int8: bool = False) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """LayerNorm, then x (1 + scale) + shift, as e4m3 or int8 with per-row scales. Also returns bounds for the e4m3
    GEMMs that follow.

    Args:
        text, image: (B, T, D) and (B, I, D) fp16, the residual stream as `to_stream` stores it.
        table: (B, total) bf16, every modulation of the step. It holds 1 + scale in place of scale.
        offsets: (2,) int64, where the modulations of text and of image begin in a row of the table, multiples of 16.
        bounds: (2, 2 + 2 H) float32, of text and image, see `utils.kernels.fused_blocks.gemm_bounds`.
        shift, scale: the parts of a modulation to use, counted from 0, of D values each.
        int8: whether the result is int8.

    Returns:
        The result (B, T + I, D) e4m3 or int8. Then three tensors, (B, T + I) float32: its scales; scales that bound
        GELU's result; the lengths of the rows, times ROUNDING.
    """
    operands = _adaln_operands(text, image, None, None, None, table, offsets, offsets, bounds, shift, scale, int8)
    wrap_triton(_adaln_kernel)[(operands[0][3].numel(),)](*operands[1], num_warps=4)
    return operands[0][2:]


@adaln.register_kernel("cpu")
def adaln_reference(text, image, table, offsets, bounds, shift, scale, int8=False):
    D = text.shape[-1]
    rows = []
    for x, offset in zip((text, image), offsets, strict=True):
        shift_, scale_ = (table[:, None, int(offset) + i * D:int(offset) + (i + 1) * D].float() for i in (shift, scale))
        rows.append(F.layer_norm(from_stream(x), (D,), eps=EPS) * scale_ + shift_)
    lengths = [x.norm(dim=-1) * ROUNDING for x in rows]
    hidden = torch.cat([own * bounds[i, 0] + bounds[i, 1] for i, own in enumerate(lengths)], 1)
    largest = INT8_MAX if int8 else E4M3_MAX
    return *quantize_rows(torch.cat(rows, 1), int8=int8), hidden.clamp(min=TINY) / largest, torch.cat(lengths, 1)


@triton_op("flux_faster::residual_adaln", mutates_args=())
def residual_adaln(text: Tensor, image: Tensor, y: Tensor, y_scale: Tensor, bias: Tensor, gates: Tensor, table: Tensor,
                   offsets: Tensor, bounds: Tensor, shift: int, scale: int, int8: bool = False
                   ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """`adaln` of x + gate * (y * y_scale + bias).

    Args:
        text, image: (B, T, D) and (B, I, D) fp16, the residual stream x as `to_stream` stores it.
        y: (B, T + I, D) bf16, the result of `fp8_gemm` or `int8_gemm`. y_scale: (B, T + I) float32.
        bias: (2, D) bf16, of text and of image, divided by the column scales of y. One bias for both may be expanded.
        gates: (2,) int64, where the gates of text and of image begin in a row of the table, multiples of 16. The table
            holds each gate times the scale of its column of y.
        table, offsets, bounds, shift, scale, int8: as in `adaln`.

    Returns:
        The sum: text (B, T, D) and image (B, I, D) fp16, stored like the inputs. Then the results of `adaln`.
    """
    operands = _adaln_operands(text, image, y, y_scale, bias, table, offsets, gates, bounds, shift, scale, int8)
    wrap_triton(_adaln_kernel)[(operands[0][3].numel(),)](*operands[1], num_warps=4)
    return operands[0]


@residual_adaln.register_kernel("cpu")
def residual_adaln_reference(text, image, y, y_scale, bias, gates, table, offsets, bounds, shift, scale, int8=False):
    text, image = gated_residual_reference(text, image, y, y_scale, bias, gates, table)
    return text, image, *adaln_reference(text, image, table, offsets, bounds, shift, scale, int8)


@triton.jit
def _residual_kernel(text, image, y, y_scale, bias, new_text, new_image, table, gates, T, S, table_stride, bias_stride,
                     D: tl.constexpr, BLOCK: tl.constexpr, STREAM: tl.constexpr):
    """The residual add of `_adaln_kernel` alone: x + gate * (y * y_scale + bias). A program computes one of B * S rows.

    Args:
        text, image: the residual stream, (B, T, D) and (B, S - T, D) fp16, contiguous, divided by STREAM.
        y: (B, S, D) bf16, contiguous, the result of `fp8_gemm`. y_scale: (B, S) float32, the scale of each row of y.
        bias: (2, D) bf16, divided by the column scales of y: text's row and image's row, bias_stride elements apart (0
            if both streams share one bias).
        new_text, new_image: written, the sums, with the layout of text and image.
        table: (B, total) bf16, every modulation of the step (`Modulations`); its rows are table_stride elements apart.
        gates: (2,) int64, the element of a table row where the gate of text and of image begins. Multiples of 16. A
            gate has D elements, which include the column scales of y.
        T, S: text tokens and all tokens of a batch item.
        D, BLOCK: elements of a row, and of the pieces that it is computed in. BLOCK is a power of two that divides D.
        STREAM: the constant of formats.py.
    """
    row = tl.program_id(0).to(tl.int64)
    item, stream, source, new = _own_stream(row, text, image, new_text, new_image, T, S, D)
    own_gate = table + item * table_stride + tl.multiple_of(tl.load(gates + stream), 16)
    own_scale = tl.load(y_scale + row)
    for j in tl.static_range(D // BLOCK):
        i = j * BLOCK + tl.arange(0, BLOCK)
        added = tl.load(y + row * D + i).to(tl.float32) * own_scale
        added += tl.load(bias + stream * bias_stride + i).to(tl.float32)
        x = tl.load(source + i).to(tl.float32) * STREAM + tl.load(own_gate + i).to(tl.float32) * added
        tl.store(new + i, _to_stream_kernel(x, STREAM))


@triton_op("flux_faster::gated_residual", mutates_args=())
def gated_residual(text: Tensor, image: Tensor, y: Tensor, y_scale: Tensor, bias: Tensor, gates: Tensor, table: Tensor
                   ) -> tuple[Tensor, Tensor]:
    """The residual add x + gate * (y * y_scale + bias) alone.

    Args:
        text, image, y, y_scale, bias, gates, table: as in `residual_adaln`.

    Returns:
        The sum: text (B, T, D) and image (B, I, D) fp16, stored like the inputs.
    """
    text, image, table = text.contiguous(), image.contiguous(), table.contiguous()
    B, T, D = text.shape
    tokens = T + image.shape[1]
    new_text, new_image = torch.empty_like(text), torch.empty_like(image)
    wrap_triton(_residual_kernel)[(B * tokens,)](
        text, image, y, y_scale, bias, new_text, new_image, table, gates, T, tokens, table.stride(0),
        bias.stride(0), D, _piece(D), STREAM, num_warps=4)
    return new_text, new_image


@gated_residual.register_kernel("cpu")
def gated_residual_reference(text, image, y, y_scale, bias, gates, table):
    D, streams = text.shape[-1], (text, image)
    parts = (y.float() * y_scale[..., None]).split([text.shape[1], image.shape[1]], 1)
    gates = (table[:, None, int(at):int(at) + D].float() for at in gates)
    return tuple(to_stream(from_stream(x) + gate * (part + own.float()))
                 for x, gate, part, own in zip(streams, gates, parts, bias, strict=True))
