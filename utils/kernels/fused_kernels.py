"""The Triton kernels of the fused step, each with a plain torch reference that computes the same.

Between two GEMMs, a FLUX block runs LayerNorm, modulation, QK-norm, RoPE, GELU and gates. Every fp8 GEMM adds a pass
that finds the largest value and a pass that divides by it. Run one by one, these passes read and write each activation
several times. The fused kernels read each activation once and write it once, in e4m3 if a GEMM follows. Work that fits
into the registers of a GEMM is done in the GEMM.

Shapes use these letters: B batch size, T text tokens, I image tokens, S = T + I, D model width, H heads.

Every input of a GEMM has a per-row (per-token) scale, and every weight has a per-row (per-output-channel) scale. q and
k have one static scale a block (`utils.attention.norm_scale`), v one for each batch item and head. With Ulysses,
attention's result and a single block's hidden row have one for each batch item. The rules:

* **Measured scales for rows that lie in registers.** LayerNorm's output and attention's result are scaled by the
  largest value of each row. In a single block attention's result shares a row with GELU's: both take the larger of the
  measured scale and GELU's bound.
* **Bounds for scales that must be known before the GEMM.** GELU's result and v are GEMM outputs, and their rows are
  spread over many tiles. The Cauchy-Schwarz inequality gives |w_j x + b_j| <= |w_j| R + |b_j|. R is the length of the
  row x; the LayerNorm kernel measures it. GELU never increases a magnitude. The bound is about 14 times the maximum of
  a row of 12,288 normal values. e4m3 has room for that: it keeps four significant bits from 2^-6 to 448.
* **Static per-channel equalization.** One strong neuron, head or channel must not inflate a bound. Each channel j of
  GELU's result and of v is therefore divided by a static share e_j. The matching column of the next weight is
  multiplied by e_j before that weight is quantized. The modulation scales down input channels that the next weights
  hardly read: these channels must not determine R. See utils/equalization.py.
* **Scales applied after the GEMM.** cuBLAS multiplies plain e4m3 numbers, at the speed of per-tensor scaling. The
  residual kernel reads every row of the result anyway, so it also multiplies the row by its scale. The column scales
  are powers of two, and the gates already include them (`utils.kernels.modulation.Modulations`).
* **The residual stream in fp16, divided by 16.** Rounding the stream to bf16 after every block causes most of the error
  of a bf16 model. fp16 has the same size and three more bits of precision. Divided by 16, its range reaches 1,048,064.
  FLUX.1-dev's stream was seen at 91,648 (black-forest-labs/flux issue 472), which plain fp16 cannot hold.
* **Text before image.** Blocks exchange two tensors, text and image, as diffusers' blocks do. A kernel chooses the
  tensor by the row. Within a block, all tokens share one tensor (B, T + I, *). Nothing is ever concatenated.
* **Two streams, one GEMM.** The two sets of weights of a double block are stacked in one tensor, text's first. A tile
  of text rows reads the first set, and a tile of image rows reads the second.

Every op runs on CUDA through Triton, and on a CPU through its reference. The kernels are made for Hopper (sm_90): the
GEMMs load tiles with the tensor memory accelerator (TMA).
"""

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor
from torch.library import triton_op, wrap_triton

E4M3_MAX = 448.0
E4M3 = torch.float8_e4m3fn
EPS = 1e-6  # the epsilon of every norm in FLUX.1
STREAM = 16.0  # the residual stream is divided by this before fp16 stores it
TINY = 1e-12  # lower limit of the amax behind a scale: a row of zeros must not be divided by zero
# Rounding to e4m3 enlarges a value by at most half a step, a factor of 1 + 2^-4. Bounds that were computed from exact
# values are multiplied by it.
ROUNDING = 1 + 2**-4
BLOCK_M = 128  # rows of a GEMM tile
# Triton's interpreter, which runs the kernels in CPU tests, cannot execute assembly.
NATIVE = tl.constexpr(not triton.knobs.runtime.interpret)


def use_torch_memory(device: torch.device) -> None:
    """Makes Triton allocate kernel workspace on `device` through PyTorch. The GEMMs here need it for their tile
    descriptors."""
    triton.set_allocator(lambda size, alignment, stream: torch.empty(size, device=device, dtype=torch.int8))


# --- LayerNorm, modulation, residuals, casts ---

@triton.jit
def _to_e4m3_kernel(x, MAX: tl.constexpr):
    """x, clamped to [-MAX, MAX], as e4m3."""
    if not NATIVE:  # the GPU's conversion clamps by itself
        x = tl.minimum(tl.maximum(x, -MAX), MAX)
    return x.to(tl.float8e4nv)


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


@triton.jit
def _to_stream_kernel(x, STREAM: tl.constexpr):
    """x as the residual stream stores it: divided by STREAM, clamped to the range of fp16, in fp16."""
    x = x * (1 / STREAM)
    return tl.minimum(tl.maximum(x, -65504.), 65504.).to(tl.float16)


# A combine function of tl.reduce: the maximum of the first operand and the sum of the second.
@triton.jit
def _largest_and_sum(a, b, c, d):
    return tl.maximum(a, c), b + d


@triton.jit
def _adaln_kernel(
        text, image, y, y_scale, bias, new_text, new_image, table, offsets, gates, out, row_scale, hidden_scale,
        lengths, bounds, T, S, table_stride, bias_stride, D: tl.constexpr, BLOCK: tl.constexpr, BOUNDS: tl.constexpr,
        SHIFT: tl.constexpr, SCALE: tl.constexpr, RESIDUAL: tl.constexpr, EPS: tl.constexpr, MAX: tl.constexpr,
        ROUNDING: tl.constexpr, STREAM: tl.constexpr):
    """Residual add (optional), LayerNorm, modulation and the cast to e4m3. A program computes one of B * S rows.

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
        out: written, (B, S, D) e4m3, contiguous.
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
        EPS, MAX, ROUNDING, STREAM: LayerNorm's epsilon, E4M3_MAX, and the constants of this module.
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
        tl.store(out + row * D + j * BLOCK + i, (modulated[j] * (MAX / largest)).to(tl.float8e4nv))
    length = tl.sqrt(squares) * ROUNDING
    tl.store(row_scale + row, largest / MAX)
    tl.store(hidden_scale + row, tl.maximum(length * slope + least, 1e-12) / MAX)
    tl.store(lengths + row, length)


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
        STREAM: the constant of this module.
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


# --- fp8 GEMMs with a fused epilogue ---

@triton.jit
def _tanh(x):
    """tanh of float32 values."""
    if NATIVE:  # one instruction, accurate to 2^-11: finer than the cast to e4m3 that follows
        return tl.inline_asm_elementwise("tanh.approx.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True,
                                         pack=1)
    return 2 * tl.sigmoid(2 * x) - 1


# A combine function of tl.reduce: the maximum of each of two operands.
@triton.jit
def _both_largest(a, b, c, d):
    return tl.maximum(a, c), tl.maximum(b, d)


@triton.jit
def _v_scale(bounds, heads, mask, text_length, image_length, HEADS: tl.constexpr, MAX: tl.constexpr):
    """The scale of v in each of `heads`: the larger of text's and image's bound, divided by MAX.

    Args:
        bounds: (2, 2 + 2 * HEADS) float32, text's row and image's row, as `gemm_bounds` returns them. The columns of a
            row: 0 and 1 are the largest |w_j| and |b_j| of GELU's GEMM; then follow HEADS columns with the largest
            |w_j| of v in each head, and HEADS columns with the largest |b_j|.
        heads, mask: indices of heads, and which of them exist.
        text_length, image_length: the largest length R of a row of each stream.
    """
    BOUNDS: tl.constexpr = 2 + 2 * HEADS
    of_text = text_length * tl.load(bounds + 2 + heads, mask, 0.) + tl.load(bounds + 2 + HEADS + heads, mask, 0.)
    bounds += BOUNDS
    of_image = image_length * tl.load(bounds + 2 + heads, mask, 0.) + tl.load(bounds + 2 + HEADS + heads, mask, 0.)
    return tl.maximum(tl.maximum(of_text, of_image), 1e-12) / MAX


@triton.jit
def _gemm_kernel(
        x, w, x_scale, w_scale, bias, out, out_scale, out_columns, cos, sin, norms, qk_scale, lengths, bounds, descale,
        shared_scale, M, T, whole, out_stride, part_stride, text_tokens, tokens, N: tl.constexpr, K: tl.constexpr,
        BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP: tl.constexpr,
        PROGRAMS: tl.constexpr, HALVES: tl.constexpr, QKV: tl.constexpr, STREAMS: tl.constexpr, D: tl.constexpr,
        HEAD: tl.constexpr, HEADS: tl.constexpr, HEADS_BLOCK: tl.constexpr, LENGTHS_BLOCK: tl.constexpr,
        PARTS: tl.constexpr, ONE_BOUND: tl.constexpr, EPS: tl.constexpr, MAX: tl.constexpr, ROUNDING: tl.constexpr):
    """x (M, K) times w (STREAMS * N, K)^T, plus bias, with a fused epilogue whose result is written as e4m3.

    With QKV, the epilogue is QK-norm, RoPE and the division by the scales of q, k and v. Without QKV, it is GELU and
    the division by the scales of the row and of the column. The kernel is persistent: of the first `whole` tiles, each
    program computes every PROGRAMS-th. The tiles after them are too few for all programs. With HALVES, two programs
    share each of these tiles, one the left half and one the right half.

    Args:
        x: (M, K) e4m3, contiguous. x_scale: (M,) float32, per-row scales.
        w: (STREAMS * N, K) e4m3, contiguous. With two streams, the first T rows of x use the first N rows of w, and the
            others use the last N. w_scale: (STREAMS * N,) float32, per-row scales. bias: (STREAMS * N,) bf16.
        out: written, e4m3, with rows out_stride elements apart. GELU: (M, N). QKV on one GPU: (3, M, D). QKV for PARTS
            GPUs, which attend to D / PARTS columns each: (PARTS, M, 3 * D / PARTS).
        out_scale: (M,) float32; GELU's result is divided by it. Unused with QKV.
        out_columns: (STREAMS * N,) float32; GELU's result is multiplied by it. Unused with QKV.
        cos, sin: (M, HEAD / 2) float16, contiguous, the angles of RoPE. These two arguments and the next six are unused
            without QKV.
        norms: (STREAMS, 3, HEAD) float32, the weights of q's norm, the weights of k's norm, and ones for v.
        qk_scale: (2,) float32, the static scales of q and k.
        lengths: (tokens,) float32, the length R of every row of a batch item, the first text_tokens of which are text.
            `tokens` exceeds M if this launch computes the rows of one stream alone.
        bounds: (2, 2 + 2 * HEADS) float32, see `_v_scale`.
        descale: written, (3, HEADS) float32, the scales of q, k and v.
        shared_scale: written, (2,) float32. The first scale bounds attention's result. The second bounds attention's
            and GELU's results.
        M: rows of x. T: the first row of the image stream, a multiple of BLOCK_M. Without effect if STREAMS is 1.
        whole: how many tiles are computed by one program each.
        out_stride: elements between rows of out. part_stride: elements between the 3 or PARTS planes of out (QKV only).
        text_tokens, tokens: see lengths.
        N, K: output columns of one stream, and input columns.
        BLOCK_M, BLOCK_N, BLOCK_K: the size of a tile in rows, columns, and input columns per step. QKV: BLOCK_N divides
            D / PARTS.
        GROUP: tile rows in a group that shares columns of w in L2.
        PROGRAMS: programs of the launch.
        HALVES: whether two programs share each tile after the first `whole` tiles.
        QKV: which epilogue. STREAMS: how many sets of weights w holds, 1 or 2.
        D, HEAD, HEADS: columns of q (and of k, and of v), columns of a head, number of heads.
        HEADS_BLOCK, LENGTHS_BLOCK: HEADS and tokens, each rounded up to a power of two.
        PARTS: how many GPUs divide the heads among them.
        ONE_BOUND: whether both rows of bounds are equal, so that one maximum over all lengths suffices.
        EPS, MAX, ROUNDING: the epsilon of QK-norm, E4M3_MAX, and the constant of this module.
    """
    text_length = 0.
    image_length = 0.
    if QKV:
        i = tl.arange(0, LENGTHS_BLOCK)
        length = tl.load(lengths + i, i < tokens, 0.)
        if ONE_BOUND:
            text_length = tl.max(length, 0)
            image_length = text_length
        else:
            text_length, image_length = tl.reduce(
                (tl.where(i < text_tokens, length, 0.), tl.where(i < text_tokens, 0., length)), 0, _both_largest)
        if tl.program_id(0) == PROGRAMS - 1:  # the last program has the fewest tiles, so it writes the scales
            heads = tl.arange(0, HEADS_BLOCK)
            mask = heads < HEADS
            v = _v_scale(bounds, heads, mask, text_length, image_length, HEADS, MAX)
            zeros = tl.zeros((HEADS_BLOCK,), tl.float32)
            tl.store(descale + heads, tl.load(qk_scale) + zeros, mask)
            tl.store(descale + HEADS + heads, tl.load(qk_scale + 1) + zeros, mask)
            tl.store(descale + 2 * HEADS + heads, v, mask)
            # Attention averages v, and it rounds the weights of the average to e4m3: hence ROUNDING.
            attended = ROUNDING * tl.max(tl.where(mask, v, 0.), 0)
            of_image = bounds + 2 + 2 * HEADS  # the second row of bounds
            hidden = tl.maximum(text_length * tl.load(bounds) + tl.load(bounds + 1),
                                image_length * tl.load(of_image) + tl.load(of_image + 1)) / MAX
            tl.store(shared_scale, attended)
            tl.store(shared_scale + 1, tl.maximum(attended, hidden))
    _tiles_kernel(x, w, x_scale, w_scale, bias, out, out_scale, out_columns, cos, sin, norms, qk_scale, bounds,
                  text_length, image_length, M, T, 0, whole, out_stride, part_stride, N, K, BLOCK_M, BLOCK_N, 1,
                  BLOCK_K, GROUP, PROGRAMS, QKV, STREAMS, D, HEAD, HEADS, PARTS, EPS, MAX)
    if HALVES:
        _tiles_kernel(x, w, x_scale, w_scale, bias, out, out_scale, out_columns, cos, sin, norms, qk_scale, bounds,
                      text_length, image_length, M, T, whole, tl.cdiv(M, BLOCK_M) * (N // BLOCK_N), out_stride,
                      part_stride, N, K, BLOCK_M, BLOCK_N // 2, 2, BLOCK_K, GROUP, PROGRAMS, QKV, STREAMS, D, HEAD,
                      HEADS, PARTS, EPS, MAX)


@triton.jit
def _tiles_kernel(
        x, w, x_scale, w_scale, bias, out, out_scale, out_columns, cos, sin, norms, qk_scale, bounds, text_length,
        image_length, M, T, first, last, out_stride, part_stride, N: tl.constexpr, K: tl.constexpr,
        BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, SHARED: tl.constexpr, BLOCK_K: tl.constexpr, GROUP: tl.constexpr,
        PROGRAMS: tl.constexpr, QKV: tl.constexpr, STREAMS: tl.constexpr, D: tl.constexpr, HEAD: tl.constexpr,
        HEADS: tl.constexpr, PARTS: tl.constexpr, EPS: tl.constexpr, MAX: tl.constexpr):
    """Computes the tiles from `first` up to `last`, in groups of GROUP tile rows that share their columns of w in L2.

    `flatten` merges the loop over tiles and the loop over K, so that the end of a tile overlaps with the loads of the
    next. A flattened loop allows no branches (Triton 3.6). Instead of branching around QK-norm and RoPE, the code
    therefore normalizes v by 1 and rotates it by an angle of 0.

    Args:
        text_length, image_length: the largest length R of a row of each stream; 0 without QKV.
        first, last: the range of tiles. Tiles are numbered down a group's rows, then across its columns.
        BLOCK_N: columns that one program computes of a tile. A tile has SHARED * BLOCK_N columns.
        SHARED: how many programs share a tile, 1 or 2.

    The other arguments are those of `_gemm_kernel`.
    """
    x_tiles = tl.make_tensor_descriptor(x, [M, K], [K, 1], [BLOCK_M, BLOCK_K])
    w_tiles = tl.make_tensor_descriptor(w, [STREAMS * N, K], [K, 1], [BLOCK_N, BLOCK_K])
    OWN: tl.constexpr = D // PARTS  # columns of q of one GPU's heads
    if QKV:
        planes: tl.constexpr = 3 if PARTS == 1 else PARTS
        out_tiles = tl.make_tensor_descriptor(out, [planes, M, 3 * D // planes], [part_stride, out_stride, 1],
                                              [1, BLOCK_M, BLOCK_N])
    else:
        out_tiles = tl.make_tensor_descriptor(out, [M, N], [out_stride, 1], [BLOCK_M, BLOCK_N])
    rows = tl.cdiv(M, BLOCK_M)
    columns: tl.constexpr = N // (BLOCK_N * SHARED)
    for share in tl.range(tl.program_id(0), (last - first) * SHARED, PROGRAMS, flatten=True):
        tile = first + share // SHARED
        group = tile // (GROUP * columns)
        height = min(rows - group * GROUP, GROUP)
        within = tile % (GROUP * columns)
        m = (group * GROUP + within % height) * BLOCK_M
        n = ((within // height) * SHARED + share % SHARED) * BLOCK_N
        stream = tl.where(m >= T, STREAMS - 1, 0)
        total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        for k in range(0, K, BLOCK_K):
            total = tl.dot(x_tiles.load([m, k]), w_tiles.load([stream * N + n, k]).T, total)
        r = m + tl.arange(0, BLOCK_M)
        c = stream * N + n + tl.arange(0, BLOCK_N)
        inside = r < M
        value = total * tl.load(x_scale + r, inside, 0.)[:, None]
        value = value * tl.load(w_scale + c)[None, :] + tl.load(bias + c).to(tl.float32)[None, :]
        if QKV:
            part = n // D  # 0 is q, 1 is k, 2 is v: BLOCK_N divides D, so a tile has only one of them
            is_v = part == 2
            heads = tl.reshape(value, (BLOCK_M, BLOCK_N // HEAD, HEAD))
            root = tl.where(is_v, 1., tl.rsqrt(tl.sum(heads * heads, 2) / HEAD + EPS))
            head = (n - part * D) // HEAD + tl.arange(0, BLOCK_N // HEAD)
            v_scale = _v_scale(bounds, head, head < HEADS, text_length, image_length, HEADS, MAX)
            root = root / tl.where(is_v, v_scale, tl.load(qk_scale + tl.minimum(part, 1)))[None, :]
            weight = tl.load(norms + (stream * 3 + part) * HEAD + tl.arange(0, HEAD))
            heads = heads * root[:, :, None] * weight[None, None, :]
            even, odd = tl.split(tl.reshape(heads, (BLOCK_M, BLOCK_N // HEAD, HEAD // 2, 2)))
            angle = r[:, None] * (HEAD // 2) + tl.arange(0, HEAD // 2)[None, :]
            c_ = tl.where(is_v, 1., tl.load(cos + angle, inside[:, None], 0.).to(tl.float32))[:, None, :]
            s_ = tl.where(is_v, 0., tl.load(sin + angle, inside[:, None], 0.).to(tl.float32))[:, None, :]
            value = tl.reshape(tl.join(even * c_ - odd * s_, odd * c_ + even * s_), (BLOCK_M, BLOCK_N))
            finished = tl.reshape(_to_e4m3_kernel(value, MAX), (1, BLOCK_M, BLOCK_N))
            column = n - part * D
            if PARTS == 1:
                out_tiles.store([part, m, column], finished)
            else:
                out_tiles.store([column // OWN, m, part * OWN + column % OWN], finished)
        else:
            half = value * (0.5 / tl.load(out_scale + r, inside, 1.))[:, None] * tl.load(out_columns + c)[None, :]
            # The constants are sqrt(2 / pi) and 0.044715 * sqrt(2 / pi), of GELU's tanh approximation.
            value = half + half * _tanh(value * (0.7978845608 + 0.0356774081 * value * value))
            out_tiles.store([m, n], _to_e4m3_kernel(value, MAX))


def _ranges(tokens: int, text_tokens: int, streams: int) -> list[tuple[int, int, int]]:
    """The launches of a GEMM: one for all rows, or two if a tile would otherwise hold rows of both streams.

    Returns:
        (first row, number of rows, first stream) of each launch.
    """
    if streams == 1 or text_tokens % BLOCK_M == 0:
        return [(0, tokens, 0)]
    return [(0, text_tokens, 0), (text_tokens, tokens - text_tokens, 1)]


def _tiles(rows: int, columns: int, part: int, head: int, depth: int, device: torch.device) -> tuple[int, dict]:
    """Chooses the tile sizes of a GEMM and the number of programs.

    Of 13 configurations tried on an H100 at 4,352 tokens, tiles of 128x256x128 in groups of 16 with three stages were
    the fastest for both GEMMs. bench/kernels.py measures them.

    Args:
        rows, columns, depth: M, N and K of the GEMM.
        part: a number of columns that BLOCK_N must divide.
        head: columns of a head. The last tiles are shared only if each half has whole heads.

    Returns:
        How many tiles come before the shared tiles, and the kernel's constants from BLOCK_M to HALVES.
    """
    block_n = next(size for size in (256, 128, 64) if part % size == 0)
    block_k = next(size for size in (128, 64) if depth % size == 0)
    units = torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 4
    tiles = triton.cdiv(rows, BLOCK_M) * (columns // block_n)
    left = tiles % units
    halves = 0 < 2 * left <= units and block_n // 2 % max(head, 32) == 0
    return tiles - left * halves, dict(BLOCK_M=BLOCK_M, BLOCK_N=block_n, BLOCK_K=block_k, GROUP=16,
                                       PROGRAMS=min(units, 2 * tiles if halves else tiles), HALVES=halves)


# --- ops ---
#
# The GEMMs are opaque to the compiler, for two reasons. If a kernel writes into part of an e4m3 tensor, inductor
# generates code that Triton 3.6 cannot compile. If a kernel makes tile descriptors, AOTInductor of torch 2.11 allocates
# the workspace of a single program for all programs.

@triton_op("flux_faster::adaln", mutates_args=())
def adaln(text: Tensor, image: Tensor, table: Tensor, offsets: Tensor, bounds: Tensor, shift: int, scale: int
          ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """LayerNorm, then x (1 + scale) + shift, as e4m3 with per-row scales. Also returns bounds for the GEMMs that
    follow.

    Args:
        text, image: (B, T, D) and (B, I, D) fp16, the residual stream as `to_stream` stores it.
        table: (B, total) bf16, every modulation of the step. It holds 1 + scale in place of scale.
        offsets: (2,) int64, where the modulations of text and of image begin in a row of the table, multiples of 16.
        bounds: (2, 2 + 2 H) float32, of text and image, see `utils.kernels.fused_blocks.gemm_bounds`.
        shift, scale: the parts of a modulation to use, counted from 0, of D values each.

    Returns:
        The result (B, T + I, D) e4m3. Then three tensors, (B, T + I) float32: its scales; scales that bound GELU's
        result; the lengths of the rows, times ROUNDING.
    """
    operands = _adaln_operands(text, image, None, None, None, table, offsets, offsets, bounds, shift, scale)
    wrap_triton(_adaln_kernel)[(operands[0][3].numel(),)](*operands[1], num_warps=4)
    return operands[0][2:]


@triton_op("flux_faster::residual_adaln", mutates_args=())
def residual_adaln(text: Tensor, image: Tensor, y: Tensor, y_scale: Tensor, bias: Tensor, gates: Tensor, table: Tensor,
                   offsets: Tensor, bounds: Tensor, shift: int, scale: int
                   ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """`adaln` of x + gate * (y * y_scale + bias).

    Args:
        text, image: (B, T, D) and (B, I, D) fp16, the residual stream x as `to_stream` stores it.
        y: (B, T + I, D) bf16, the result of `fp8_gemm`. y_scale: (B, T + I) float32.
        bias: (2, D) bf16, of text and of image, divided by the column scales of y. One bias for both may be expanded.
        gates: (2,) int64, where the gates of text and of image begin in a row of the table, multiples of 16. The table
            holds each gate times the scale of its column of y.
        table, offsets, bounds, shift, scale: as in `adaln`.

    Returns:
        The sum: text (B, T, D) and image (B, I, D) fp16, stored like the inputs. Then the results of `adaln`.
    """
    operands = _adaln_operands(text, image, y, y_scale, bias, table, offsets, gates, bounds, shift, scale)
    wrap_triton(_adaln_kernel)[(operands[0][3].numel(),)](*operands[1], num_warps=4)
    return operands[0]


def _adaln_operands(text, image, y, y_scale, bias, table, offsets, gates, bounds, shift, scale
                    ) -> tuple[tuple[Tensor, ...], tuple]:
    """The results of `_adaln_kernel`, allocated, and its arguments. If y is None, the first two results are the inputs.

    Each op launches the kernel itself: torch's compile cache learns from an op's source which kernels the op has.
    """
    text, image, table = text.contiguous(), image.contiguous(), table.contiguous()
    B, T, D = text.shape
    tokens, adds = T + image.shape[1], y is not None
    out = text.new_empty(B, tokens, D, dtype=E4M3)
    row_scale, hidden_scale, lengths = (text.new_empty(B, tokens, dtype=torch.float32) for _ in range(3))
    new_text, new_image = (torch.empty_like(text), torch.empty_like(image)) if adds else (text, image)
    if not adds:
        y, y_scale, bias = text, row_scale, text[0]
    args = (text, image, y, y_scale, bias, new_text, new_image, table, offsets, gates, out, row_scale, hidden_scale,
            lengths, bounds, T, tokens, table.stride(0), bias.stride(0), D, _piece(D), bounds.shape[1], shift,
             scale, adds, EPS, E4M3_MAX, ROUNDING, STREAM)
    return (new_text, new_image, out, row_scale, hidden_scale, lengths), args


def _piece(width: int) -> int:
    """The largest power of two that divides a row's width."""
    return width & -width


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


@torch.library.custom_op("flux_faster::gelu_gemm", mutates_args=("hidden",))
def gelu_gemm(x: Tensor, x_scale: Tensor, w: Tensor, w_scale: Tensor, bias: Tensor, columns: Tensor, scale: Tensor,
              hidden: Tensor, text_tokens: int, streams: int) -> None:
    """GELU(x w^T + bias), in the tanh approximation, times `columns`, divided by `scale`, as e4m3.

    Args:
        x: (B, S, K) e4m3. x_scale: (B, S) float32.
        w: (streams * N, K) e4m3. w_scale: (streams * N,) float32. bias: (streams * N,) bf16.
        columns: (streams * N,) float32, the reciprocal shares of the channels (utils/equalization.py).
        scale: (B, S) float32.
        hidden: (B, S, room + N) e4m3. The result is written into the last N columns; the first `room` columns stay as
            they are.
        text_tokens: how many of the S tokens are text. Without effect if streams is 1.
        streams: 1, or 2 if the first N rows of w are for text and the last N for image.
    """
    B, tokens, K = x.shape
    N = w.shape[0] // streams
    room = hidden.shape[2] - N
    for b in range(B):
        for row, rows, stream in _ranges(tokens, text_tokens, streams):
            whole, tiles = _tiles(rows, N, N, 1, K, x.device)
            own = slice(stream * N, (streams if rows == tokens else stream + 1) * N)
            _gemm_kernel[(tiles["PROGRAMS"],)](
                x[b, row:], w[own], x_scale[b, row:], w_scale[own], bias[own], hidden[b, row:, room:], scale[b, row:],
                columns[own], bias, bias, bias, bias, bias, bias, bias, bias, rows, text_tokens, whole, room + N, 0, 0,
                0, N, K, *tiles.values(), False, w[own].shape[0] // N, N, 16, 1, 1, 1, 1, True, EPS, E4M3_MAX, ROUNDING,
                num_warps=8, num_stages=3)


@gelu_gemm.register_fake
def _(x, x_scale, w, w_scale, bias, columns, scale, hidden, text_tokens, streams):
    pass


@torch.library.custom_op("flux_faster::qkv_gemm", mutates_args=())
def qkv_gemm(x: Tensor, x_scale: Tensor, w: Tensor, w_scale: Tensor, bias: Tensor, norms: Tensor, cos: Tensor,
             sin: Tensor, qk_scale: Tensor, lengths: Tensor, bounds: Tensor, text_tokens: int, streams: int,
             parts: int = 1) -> tuple[Tensor, Tensor, Tensor]:
    """q, k, v = x w^T + bias, with RMSNorm of each head of q and k, RoPE, and the division by their scales, as e4m3.

    Args:
        x: (B, S, K) e4m3. x_scale: (B, S) float32.
        w: (streams * 3 D, K) e4m3. w_scale: (streams * 3 D,) float32. bias: (streams * 3 D,) bf16.
        norms: (streams, 3, D / H) float32, the weights of q's norm, the weights of k's norm, and ones.
        cos, sin: (S, D / H / 2) float16.
        qk_scale: (2,) float32, the static scales of q and k.
        lengths: (B, S) float32, as `adaln` returns them.
        bounds: (2, 2 + 2 H) float32, as `adaln` takes them. With one stream, both rows are equal.
        text_tokens: how many of the S tokens are text. `lengths` is split there, and with two streams the weights are
            too.
        streams: 1, or 2 if the first 3 D rows of w are for text and the last 3 D for image.
        parts: how many GPUs will attend, each to its part of the heads.

    Returns:
        q, k and v, (3, B, S, H, D / H) e4m3; with several parts (parts, B, S, 3, H / parts, D / H), so that each part
        can be sent without a copy. Their scales, (B, 3, H) float32. Two more scales, (B, 2) float32: attention's result
        does not exceed the first; neither attention's result nor GELU's result of the same rows exceeds the second.
    """
    B, tokens, K = x.shape
    N, heads = w.shape[0] // streams, (bounds.shape[1] - 2) // 2
    D = N // 3
    shape = (3, B, tokens, heads) if parts == 1 else (parts, B, tokens, 3, heads // parts)
    out = x.new_empty(*shape, D // heads)
    flat = out.view(out.shape[0], B, tokens, -1)
    descale, shared = (x.new_empty(B, *shape, dtype=torch.float32) for shape in ((3, heads), (2,)))
    for b in range(B):
        for row, rows, stream in _ranges(tokens, text_tokens, streams):
            whole, tiles = _tiles(rows, N, D // parts, D // heads, K, x.device)
            own = slice(stream * N, (streams if rows == tokens else stream + 1) * N)
            _gemm_kernel[(tiles["PROGRAMS"],)](
                x[b, row:], w[own], x_scale[b, row:], w_scale[own], bias[own], flat[0, b, row:], x_scale, w_scale,
                cos[row:], sin[row:], norms[stream:], qk_scale, lengths[b], bounds, descale[b], shared[b], rows,
                text_tokens, whole, flat.shape[3], flat.stride(0), text_tokens, tokens, N, K, *tiles.values(), True,
                w[own].shape[0] // N, D, D // heads, heads, triton.next_power_of_2(heads),
                triton.next_power_of_2(tokens), parts, streams == 1, EPS, E4M3_MAX, ROUNDING, num_warps=8, num_stages=3)
    return out, descale, shared


@qkv_gemm.register_fake
def _(x, x_scale, w, w_scale, bias, norms, cos, sin, qk_scale, lengths, bounds, text_tokens, streams, parts=1):
    B, tokens, heads = *x.shape[:2], (bounds.shape[1] - 2) // 2
    head = w.shape[0] // streams // 3 // heads
    shape = (3, B, tokens, heads) if parts == 1 else (parts, B, tokens, 3, heads // parts)
    return x.new_empty(*shape, head), x_scale.new_empty(B, 3, heads), x_scale.new_empty(B, 2)


@torch.library.custom_op("flux_faster::fp8_gemm", mutates_args=())
def fp8_gemm(x: Tensor, w: Tensor, one: Tensor, text_tokens: int, streams: int) -> Tensor:
    """x w^T of plain e4m3 numbers by cuBLAS, at the speed of per-tensor scaling.

    `gated_residual` and `residual_adaln` multiply the result by the scales of its rows and columns.

    cuBLAS and a separate kernel for the residual take 0.274 + 0.025 ms. A GEMM like those above that adds the residual
    in its registers takes 0.353 ms (H100, 4,352 x 15,360 x 3,072).

    Args:
        x: (B, S, K) e4m3.
        w: (streams * N, K) e4m3. With two streams, the first N rows are text's.
        one: () float32, the number 1: the scale that cuBLAS applies.
        text_tokens: how many of the S tokens are text. Without effect if streams is 1.
        streams: 1 or 2.

    Returns:
        (B, S, N) bf16.
    """
    B, tokens, K = x.shape
    out = x.new_empty(B, tokens, w.shape[0] // streams, dtype=torch.bfloat16)
    if streams == 1:
        parts = [(x.view(B * tokens, K), out.view(B * tokens, -1), w)]
    else:
        parts = [(x[b, rows], out[b, rows], own) for b in range(B) for rows, own in
                 zip((slice(text_tokens), slice(text_tokens, None)), w.chunk(2), strict=True)]
    for rows, into, own in parts:
        torch._scaled_mm(rows, own.t(), one, one, out_dtype=torch.bfloat16, use_fast_accum=True, out=into)
    return out


@fp8_gemm.register_fake
def _(x, w, one, text_tokens, streams):
    return x.new_empty(*x.shape[:2], w.shape[0] // streams, dtype=torch.bfloat16)


# --- the same in plain torch: tests compare the kernels with these references, and a CPU runs them ---
#
# Arguments and results are those of the op that a reference is registered for.

def to_e4m3(x: Tensor) -> Tensor:
    """x as e4m3. Values beyond the largest e4m3 number become that number."""
    return x.clamp(-E4M3_MAX, E4M3_MAX).to(E4M3)


def to_stream(x: Tensor) -> Tensor:
    """x as the residual stream is stored: divided by STREAM, clamped to the range of fp16, in fp16."""
    limit = torch.finfo(torch.float16).max
    return (x.float() / STREAM).clamp(-limit, limit).half()


def from_stream(x: Tensor) -> Tensor:
    """The float32 values of a stored residual stream."""
    return x.float() * STREAM


def quantize_rows(x: Tensor, powers: bool = False) -> tuple[Tensor, Tensor]:
    """Quantizes x (..., D) to e4m3 with per-row scales.

    Args:
        x: (..., D), any floating-point dtype.
        powers: round the scales up to powers of two. This costs one of e4m3's 15 powers of two and no accuracy. Other
            numbers can then be multiplied by a scale without rounding.

    Returns:
        (..., D) e4m3, and the scales (...) float32.
    """
    scale = x.float().abs().amax(-1).clamp(min=TINY) / E4M3_MAX
    if powers:
        scale = torch.exp2(scale.log2().ceil())
    return to_e4m3(x.float() / scale[..., None]), scale


@adaln.register_kernel("cpu")
def adaln_reference(text, image, table, offsets, bounds, shift, scale):
    D = text.shape[-1]
    rows = []
    for x, offset in zip((text, image), offsets, strict=True):
        shift_, scale_ = (table[:, None, int(offset) + i * D:int(offset) + (i + 1) * D].float() for i in (shift, scale))
        rows.append(F.layer_norm(from_stream(x), (D,), eps=EPS) * scale_ + shift_)
    lengths = [x.norm(dim=-1) * ROUNDING for x in rows]
    hidden = torch.cat([own * bounds[i, 0] + bounds[i, 1] for i, own in enumerate(lengths)], 1)
    return *quantize_rows(torch.cat(rows, 1)), hidden.clamp(min=TINY) / E4M3_MAX, torch.cat(lengths, 1)


@residual_adaln.register_kernel("cpu")
def residual_adaln_reference(text, image, y, y_scale, bias, gates, table, offsets, bounds, shift, scale):
    text, image = gated_residual_reference(text, image, y, y_scale, bias, gates, table)
    return text, image, *adaln_reference(text, image, table, offsets, bounds, shift, scale)


@gated_residual.register_kernel("cpu")
def gated_residual_reference(text, image, y, y_scale, bias, gates, table):
    D, streams = text.shape[-1], (text, image)
    parts = (y.float() * y_scale[..., None]).split([text.shape[1], image.shape[1]], 1)
    gates = (table[:, None, int(at):int(at) + D].float() for at in gates)
    return tuple(to_stream(from_stream(x) + gate * (part + own.float()))
                 for x, gate, part, own in zip(streams, gates, parts, bias, strict=True))


@cast_attention.register_kernel("cpu")
def cast_attention_reference(attention):
    return quantize_rows(attention)


@place_attention.register_kernel("cpu")
def place_attention_reference(attention, least_scale, hidden):
    scale = torch.maximum(quantize_rows(attention)[1], least_scale)
    hidden[..., :attention.shape[-1]] = to_e4m3(attention.float() / scale[..., None])
    return scale


def _streams(x: Tensor, text_tokens: int, streams: int) -> list[int]:
    """How many of x's (B, S, *) tokens each set of weights multiplies."""
    return [text_tokens, x.shape[1] - text_tokens] if streams == 2 else [x.shape[1]]


def _gemm(x, x_scale, w, w_scale, bias, text_tokens, streams):
    """x w^T + bias, (B, S, N) float32. The rows of each stream use that stream's weights."""
    x = (x.float() * x_scale[..., None]).split(_streams(x, text_tokens, streams), 1)
    w, bias = (w.float() * w_scale[:, None]).chunk(streams), bias.float().chunk(streams)
    return torch.cat([part @ own.T + offset for part, own, offset in zip(x, w, bias, strict=True)], 1)


@gelu_gemm.register_kernel("cpu")
def gelu_gemm_reference(x, x_scale, w, w_scale, bias, columns, scale, hidden, text_tokens, streams):
    result = F.gelu(_gemm(x, x_scale, w, w_scale, bias, text_tokens, streams), approximate="tanh")
    parts = zip(result.split(_streams(x, text_tokens, streams), 1), columns.chunk(streams), strict=True)
    result = torch.cat([part * own for part, own in parts], 1) / scale[..., None]
    hidden[..., -result.shape[-1]:] = to_e4m3(result)


@qkv_gemm.register_kernel("cpu")
def qkv_gemm_reference(x, x_scale, w, w_scale, bias, norms, cos, sin, qk_scale, lengths, bounds, text_tokens, streams,
                       parts=1):
    heads = (bounds.shape[1] - 2) // 2
    of_streams = lengths[:, :text_tokens], lengths[:, text_tokens:]
    longest = torch.stack([F.pad(part, (0, 1)).amax(1) for part in of_streams], 1)
    v = (longest[..., None] * bounds[:, 2:2 + heads] + bounds[:, 2 + heads:]).amax(1).clamp(min=TINY) / E4M3_MAX
    descale = torch.stack([*(one.expand_as(v) for one in qk_scale), v], 1)
    attended = ROUNDING * v.amax(1)
    hidden = (longest * bounds[:, 0] + bounds[:, 1]).amax(1) / E4M3_MAX

    qkv = _gemm(x, x_scale, w, w_scale, bias, text_tokens, streams).unflatten(-1, (3, heads, -1))
    qkv = qkv.permute(2, 0, 1, 3, 4)
    weight = torch.cat([own[:2, None].expand(-1, rows, -1) for own, rows in
                        zip(norms, _streams(x, text_tokens, streams), strict=True)], 1)  # (2, S, D / H)
    qk = qkv[:2] * (qkv[:2].square().mean(-1, keepdim=True) + EPS).rsqrt() * weight[:, None, :, None]
    even, odd, cos, sin = qk[..., 0::2], qk[..., 1::2], cos.float()[:, None], sin.float()[:, None]
    qk = torch.stack([even * cos - odd * sin, odd * cos + even * sin], -1).flatten(-2)
    qkv = to_e4m3(torch.cat([qk, qkv[2:]]) / descale.transpose(0, 1)[:, :, None, :, None])
    if parts > 1:
        qkv = qkv.unflatten(3, (parts, -1)).permute(3, 1, 2, 0, 4, 5).contiguous()
    return qkv, descale, torch.stack([attended, torch.maximum(attended, hidden)], 1)


@fp8_gemm.register_kernel("cpu")
def fp8_gemm_reference(x, w, one, text_tokens, streams):
    x = x.float().split(_streams(x, text_tokens, streams), 1)
    return torch.cat([(part @ own.float().T).bfloat16() for part, own in zip(x, w.chunk(streams), strict=True)], 1)
