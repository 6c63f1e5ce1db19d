"""The Triton kernels of the fused step, each beside the plain torch function that it has to equal.

Between two GEMMs of a FLUX block lie LayerNorm, modulation, QK-norm, RoPE, GELU, gates, and for every fp8 GEMM a pass
that finds the largest value and another that divides by it. Done one by one they read and write each activation
several times. Here each activation is read once and written once, in e4m3 where a GEMM follows, and the work that fits
into a GEMM's registers happens there.

Every activation has one scale a row (token), and every weight has one scale a row (output channel). The rules:

* **A measured scale where a row lies in registers.** LayerNorm's output and attention's result get the largest value of
  their own row.
* **A bound where the scale must be known before the GEMM.** GELU's result and v are GEMM outputs, whose rows are spread
  over many tiles. Cauchy-Schwarz gives |w_j x + b_j| <= |w_j| R + |b_j|. R is the true length of the row x, measured
  by the LayerNorm kernel. GELU only makes values smaller. The bound is about 14 times the maximum of a row of 12,288
  normal values, and e4m3 has room for that: it keeps four bits from 2^-6 to 448.
* **Static per-channel equalization.** A bound must not be thrown off by one strong neuron, head or channel. Each
  channel j of GELU's result and of v is therefore divided by a static share e_j, and the column of the next weight is
  multiplied by it before that weight is quantized. Input channels that the next weights hardly read are made smaller in
  the same way, through the modulation: they must not decide R. See utils/equalization.py.
* **Scales after the GEMM.** cuBLAS multiplies plain e4m3 numbers, at the speed of one scale a tensor. The kernel that
  adds the residual reads every row of the result anyway, and multiplies it by the scale of the row. The scales of the
  columns are powers of two, and are in the gates already (`utils.kernels.fused_blocks.Modulations`).
* **The residual stream in fp16, over 16.** Rounding the stream to bf16 after every block is most of the error of a bf16
  model. fp16 has three bits more and the same size. Divided by 16 it reaches 1,048,064: FLUX.1-dev's stream was seen at
  91,648 (black-forest-labs/flux issue 472), which plain fp16 cannot hold.
* **Text before image.** Blocks exchange two tensors, as diffusers has it, and a kernel picks its pointer by the row;
  within a block all tokens are one (B, T + I, *). Nothing is ever concatenated.
* **Two streams, one GEMM.** A double block's two sets of weights lie one behind the other. A tile of text rows reads
  the first set, and a tile of image rows the second.

Every op runs on CUDA through Triton, and on a CPU through its reference. Made for Hopper (sm_90): the GEMMs load tiles
by its copy engine.
"""

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor
from torch.library import triton_op, wrap_triton

E4M3_MAX = 448.0
E4M3 = torch.float8_e4m3fn
EPS = 1e-6  # of every norm in FLUX.1
STREAM = 16.0  # the residual stream is this many times larger than the fp16 numbers that store it
TINY = 1e-12  # the least amax of a scale: a row of zeros must not be divided by zero
# The rounding to e4m3 adds at most half a step, 2^-4, to a bound that was made from exact values.
ROUNDING = 1 + 2**-4
BLOCK_M = 128
# Triton's interpreter, for tests on a CPU, knows no assembly.
NATIVE = tl.constexpr(not triton.knobs.runtime.interpret)


def use_torch_memory(device: torch.device) -> None:
    """Lets kernels that make tile descriptors, as the GEMMs here do, take the memory for them from PyTorch."""
    triton.set_allocator(lambda size, alignment, stream: torch.empty(size, device=device, dtype=torch.int8))


# --- LayerNorm, modulation, residuals, casts ---

@triton.jit
def _to_e4m3_kernel(x, MAX: tl.constexpr):
    if not NATIVE:  # the GPU's own conversion does that
        x = tl.minimum(tl.maximum(x, -MAX), MAX)
    return x.to(tl.float8e4nv)


@triton.jit
def _own_stream(row, text, image, new_text, new_image, T, S, D: tl.constexpr):
    """Batch item and stream (text 0, image 1) of a row of all tokens, and where it is read and written."""
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
    x = x * (1 / STREAM)
    return tl.minimum(tl.maximum(x, -65504.), 65504.).to(tl.float16)


@triton.jit
def _largest_and_sum(a, b, c, d):
    return tl.maximum(a, c), b + d


@triton.jit
def _adaln_kernel(
        text, image, y, y_scale, bias, new_text, new_image, table, offsets, gates, out, row_scale, hidden_scale,
        lengths, bounds, T, S, table_stride, bias_stride, D: tl.constexpr, BLOCK: tl.constexpr, BOUNDS: tl.constexpr,
        SHIFT: tl.constexpr, SCALE: tl.constexpr, RESIDUAL: tl.constexpr, EPS: tl.constexpr, MAX: tl.constexpr,
        ROUNDING: tl.constexpr, STREAM: tl.constexpr):
    """x + gate * (y * y_scale + bias), LayerNorm, modulation, e4m3. A program is a row: token s of batch item b.

    The row lies in D / BLOCK pieces, so that no lane is masked where D is no power of two: FLUX.1's 3072 are 3 x 1024.

    Args:
        text, image: the residual stream, (B, T, D) and (B, S - T, D) fp16, over STREAM. new_text, new_image: the sums,
            like them.
        y: (B, S, D) bf16, the result of `fp8_gemm`; y_scale: (B, S) float32; bias: (2, D) bf16 of text and
            image, bias_stride apart. Without RESIDUAL none of them is read, nor `gates`.
        table: (B, *) bf16 with rows of table_stride: every modulation of the step.
        offsets, gates: (2,) int64: where text's and image's modulation and gate begin in a row of the table. SHIFT and
            SCALE count parts of D values from there. The table holds 1 + scale.
        out: (B, S, D) e4m3; row_scale: (B, S) float32.
        hidden_scale: (B, S) float32, (R bounds[stream, 0] + bounds[stream, 1]) / MAX, for GELU's result.
        lengths: (B, S) float32, R: the length of the row as `out` may have rounded it.
        bounds: (2, BOUNDS) float32, see `utils.kernels.fused_blocks.gemm_bounds`.
    """
    PIECES: tl.constexpr = D // BLOCK
    # Once there is a sum nobody reads its terms again: L2 is for the sum and for what the next GEMM reads.
    DEAD: tl.constexpr = "evict_first" if RESIDUAL else ""
    row = tl.program_id(0).to(tl.int64)
    i = tl.arange(0, BLOCK)
    item, stream, source, new = _own_stream(row, text, image, new_text, new_image, T, S, D)
    # All loads before the first reduction, which waits for the others: their latencies are what a row takes.
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
    """The sum of `_adaln_kernel` alone, for one row. The arguments are those of that kernel."""
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
    """A row of x (rows, D) bf16 as e4m3, into rows of out_stride, over the larger of its own scale and `least_scale`'s
    (rows,) float32. `scale` (rows,) float32 gets the result."""
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
    """A row of D elements over its item's scale as e4m3, into the memory of the GPU that has this token."""
    row = tl.program_id(0).to(tl.int64)
    i = tl.arange(0, BLOCK)
    token = row % tokens
    out = tl.load(addresses + token // own).to(tl.pointer_type(tl.float8e4nv))
    out += offset + (row // tokens * own + token % own) * D
    value = tl.load(x + row * D + i, i < D, 0.).to(tl.float32) / tl.load(scale + row // tokens)
    tl.store(tl.multiple_of(out, 16) + i, _to_e4m3_kernel(value, MAX), i < D)


# --- fp8 GEMMs that finish their tile ---

@triton.jit
def _tanh(x):
    if NATIVE:  # one instruction, good to 2^-11: finer than the e4m3 that follows
        return tl.inline_asm_elementwise("tanh.approx.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True,
                                         pack=1)
    return 2 * tl.sigmoid(2 * x) - 1


@triton.jit
def _both_largest(a, b, c, d):
    return tl.maximum(a, c), tl.maximum(b, d)


@triton.jit
def _v_scale(bounds, heads, mask, text_length, image_length, HEADS: tl.constexpr, MAX: tl.constexpr):
    """The scale of v in each of `heads`: the larger bound of both streams. `bounds` as in `gemm_bounds`."""
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
    """x (M, K) times w (STREAMS N, K)^T, plus bias, finished in registers and written as e4m3.

    With QKV the end is QK-norm, RoPE and the division by the scales of q, k and v; without, GELU and the division by
    the scales of its row and column. Persistent: a program takes every PROGRAMS-th tile of the `whole` first tiles.
    Of the tiles behind them there are too few for all programs, so two programs share each (HALVES), left and right.

    Args:
        x: e4m3; x_scale: (M,). w: e4m3; w_scale: (STREAMS N,); bias: (STREAMS N,) bf16. Of two streams the rows below T
            have the first N rows of w.
        out: e4m3. GELU: (M, N) with rows of out_stride. QKV: (3, M, D), planes of part_stride; or, for PARTS GPUs that
            attend to D / PARTS columns each, (PARTS, M, 3 D / PARTS).
        out_scale: (M,), out_columns: (STREAMS N,): GELU's result is divided by the one and multiplied by the other.
        cos, sin: (M, HEAD / 2) float16. norms: (STREAMS, 3, HEAD): the weights of q's norm, of k's, and ones.
        qk_scale: (2,), static scales of q and k. bounds: (2, 2 + 2 HEADS). lengths: (tokens,), of all rows, of which
            text's are the first text_tokens; M may be the rows of one stream alone. ONE_BOUND: both streams have the
            same bounds.
        descale: (3, HEADS), written: the scales of q, k and v. shared_scale: (2,), written: a scale that bounds
            attention's result, and one that bounds GELU's as well.
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
        if tl.program_id(0) == PROGRAMS - 1:  # the last program has the fewest tiles
            heads = tl.arange(0, HEADS_BLOCK)
            mask = heads < HEADS
            v = _v_scale(bounds, heads, mask, text_length, image_length, HEADS, MAX)
            zeros = tl.zeros((HEADS_BLOCK,), tl.float32)
            tl.store(descale + heads, tl.load(qk_scale) + zeros, mask)
            tl.store(descale + HEADS + heads, tl.load(qk_scale + 1) + zeros, mask)
            tl.store(descale + 2 * HEADS + heads, v, mask)
            # Attention averages v, with weights that are rounded to e4m3 themselves.
            attended = ROUNDING * tl.max(tl.where(mask, v, 0.), 0)
            of_image = bounds + 2 + 2 * HEADS
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
    """The tiles from `first` to `last`, each SHARED by so many programs of BLOCK_N columns, in groups of GROUP tile
    rows that share their columns of w in L2. The other arguments are those of `_gemm_kernel`.

    `flatten` makes one loop of tiles and K, so that a tile's end overlaps with the next one's loads; it takes no
    branches (Triton 3.6), hence the arithmetic that leaves v as it is where a branch would be.
    """
    x_tiles = tl.make_tensor_descriptor(x, [M, K], [K, 1], [BLOCK_M, BLOCK_K])
    w_tiles = tl.make_tensor_descriptor(w, [STREAMS * N, K], [K, 1], [BLOCK_N, BLOCK_K])
    OWN: tl.constexpr = D // PARTS
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
            part = n // D  # q, k or v: BLOCK_N divides D
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
            value = half + half * _tanh(value * (0.7978845608 + 0.0356774081 * value * value))
            out_tiles.store([m, n], _to_e4m3_kernel(value, MAX))


def _ranges(tokens: int, text_tokens: int, streams: int) -> list[tuple[int, int, int]]:
    """(first row, rows, first stream): one launch, or two where a tile would hold rows of both streams."""
    if streams == 1 or text_tokens % BLOCK_M == 0:
        return [(0, tokens, 0)]
    return [(0, text_tokens, 0), (text_tokens, tokens - text_tokens, 1)]


def _tiles(rows: int, columns: int, part: int, head: int, depth: int, device: torch.device) -> tuple[int, dict]:
    """How many tiles come before the shared ones, and the kernel's constants: sizes of the tiles (BLOCK_N divides
    `part`), number of programs, and whether the last tiles are shared, each half of which has whole heads.

    Of 13 sets tried on an H100 at 4,352 tokens 128x256x128 in groups of 16 with three stages was the fastest at both
    GEMMs; bench/kernels.py measures them."""
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
# The GEMMs are opaque to the compiler. Of a kernel that writes into part of an e4m3 tensor inductor makes code that
# Triton 3.6 cannot compile; and AOTInductor of torch 2.11 gives all programs of a kernel that makes tile descriptors
# the memory of one.

@triton_op("flux_faster::adaln", mutates_args=())
def adaln(text: Tensor, image: Tensor, table: Tensor, offsets: Tensor, bounds: Tensor, shift: int, scale: int
          ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """LayerNorm, then x (1 + scale) + shift, as e4m3 with one scale a row; and what bounds the GEMMs behind it.

    Args:
        text, image: (B, T, D) and (B, I, D), the residual stream as `to_stream` stores it.
        table: (B, *) bf16, every modulation of the step, 1 + scale in the place of scale.
        offsets: (2,) int64: where text's and image's modulation begin in it, multiples of 16.
        bounds: (2, 2 + 2 H) float32, of text and image, see `utils.kernels.fused_blocks.gemm_bounds`.
        shift, scale: which D values of a modulation these are.

    Returns:
        (B, T + I, D) e4m3; then, (B, T + I) float32 each, its scales; scales that GELU's result does not exceed; the
        lengths of the rows.
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
        y: (B, T + I, D) bf16, of `fp8_gemm`; y_scale: (B, T + I) float32.
        bias: (2, D) bf16, of text and image; one for both may be expanded.
        gates: (2,) int64: where in the table text's and image's gate begin, multiples of 16. The table holds each gate
            times the scale of its column of y.

    Returns:
        The sum: text (B, T, D) and image (B, I, D), like them; then the results of `adaln`.
    """
    operands = _adaln_operands(text, image, y, y_scale, bias, table, offsets, gates, bounds, shift, scale)
    wrap_triton(_adaln_kernel)[(operands[0][3].numel(),)](*operands[1], num_warps=4)
    return operands[0]


def _adaln_operands(text, image, y, y_scale, bias, table, offsets, gates, bounds, shift, scale
                    ) -> tuple[tuple[Tensor, ...], tuple]:
    """Empty results (without y the first two are the inputs), and the kernel's arguments. The launch is each op's own:
    by its source torch's compile cache knows which kernels an op has."""
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
    """x + gate * (y * y_scale + bias): text (B, T, D) and image (B, I, D). The arguments are those of
    `residual_adaln`."""
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
    """attention (B, S, D) bf16 as e4m3 with the measured scale of each row: (B, S, D), (B, S) float32."""
    attention = attention.contiguous()
    B, tokens, D = attention.shape
    out, scale = attention.new_empty(B, tokens, D, dtype=E4M3), attention.new_empty(B, tokens, dtype=torch.float32)
    wrap_triton(_cast_kernel)[(B * tokens,)](attention, scale, out, scale, D, D, triton.next_power_of_2(D), False,
                                             E4M3_MAX, num_warps=4)
    return out, scale


@torch.library.custom_op("flux_faster::place_attention", mutates_args=("hidden",))
def place_attention(attention: Tensor, least_scale: Tensor, hidden: Tensor) -> Tensor:
    """attention (B, S, D) bf16 as e4m3 into the first D columns of hidden (B, S, D + N) e4m3.

    Returns:
        The scale of each row, (B, S) float32: the larger of the measured one and least_scale (B, S).
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
    """attention over the scale of its item, as e4m3, into each GPU's memory. No op: nobody compiles or exports the work
    of several GPUs.

    Args:
        attention: (B, S, D) bf16, D a multiple of 16. scale: (B,) float32.
        addresses: (N,) int64, of the memory that each GPU's tokens are written into, one N-th of them each:
            (N, B, S / N, D) e4m3, of which part `rank` is written.
    """
    B, tokens, D = attention.shape
    own = tokens // len(addresses)
    _send_kernel[(B * tokens,)](attention, addresses, scale, tokens, own, rank * B * own * D, D,
                                triton.next_power_of_2(D), E4M3_MAX, num_warps=4)


@torch.library.custom_op("flux_faster::gelu_gemm", mutates_args=("hidden",))
def gelu_gemm(x: Tensor, x_scale: Tensor, w: Tensor, w_scale: Tensor, bias: Tensor, columns: Tensor, scale: Tensor,
              hidden: Tensor, text_tokens: int, streams: int) -> None:
    """GELU(x w^T + bias), tanh's approximation, times `columns`, over `scale`, into the last columns of `hidden`.

    Args:
        x: (B, S, K) e4m3, x_scale: (B, S). w: (streams N, K) e4m3, w_scale the same without K, bias in bf16.
        columns: (streams N,) float32, scale: (B, S) float32.
        hidden: (B, S, room + N) e4m3, whose first `room` columns stay as they are.
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
    """q, k, v = x w^T + bias; RMSNorm of each head of q and k, RoPE; over their scales, as e4m3.

    Args:
        x: (B, S, K) e4m3, x_scale: (B, S). w: (streams 3 D, K) e4m3, w_scale the same without K, bias in bf16.
        norms: (streams, 3, D / H) float32, the weights of q's norm, of k's, and ones.
        cos, sin: (S, D / H / 2) float16. qk_scale: (2,) float32, static scales of q and k.
        lengths, bounds: as `adaln` gives and takes them; of one stream both rows of bounds are the same.
        text_tokens: how many of the S tokens are text's, for `lengths`, and for the weights if there are two streams.
        parts: how many GPUs will attend, each to its part of the heads.

    Returns:
        (3, B, S, H, D / H), e4m3; of several parts (parts, B, S, 3, H / parts, D / H), so that each can be sent as it
        lies there. The scales (B, 3, H) float32 of q, k and v. (B, 2) float32: a scale that attention's result does
        not exceed, and one that GELU's of the same rows does not exceed either.
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
    """x w^T of plain e4m3 numbers by cuBLAS, at the speed of one scale a tensor: the scales of its rows and columns are
    `gated_residual`'s and `residual_adaln`'s to multiply by.

    cuBLAS and a kernel of its own for the residual, 0.274 + 0.025 ms, are faster here than a GEMM like the above that
    adds it in its registers, 0.353 ms (H100, 4,352 x 15,360 x 3,072).

    Args:
        x: (B, S, K) e4m3. w: (streams N, K) e4m3: of two streams the first N rows are text's. one: (), float32.

    Returns:
        (B, S, N), bf16.
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


# --- the same in plain torch: what the kernels are tested against, and what runs on a CPU ---

def to_e4m3(x: Tensor) -> Tensor:
    """x as e4m3; values beyond its largest become its largest."""
    return x.clamp(-E4M3_MAX, E4M3_MAX).to(E4M3)


def to_stream(x: Tensor) -> Tensor:
    """x as the residual stream is stored: over STREAM, in fp16."""
    limit = torch.finfo(torch.float16).max
    return (x.float() / STREAM).clamp(-limit, limit).half()


def from_stream(x: Tensor) -> Tensor:
    """The float32 values of a stored residual stream."""
    return x.float() * STREAM


def quantize_rows(x: Tensor, powers: bool = False) -> tuple[Tensor, Tensor]:
    """x (..., D) as e4m3 and its scales (...), float32.

    Args:
        powers: scales are powers of two. That costs one of e4m3's 15 powers of two and no accuracy, and other numbers
            can be multiplied by the scale without rounding.
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
    """The rows of each set of weights."""
    return [text_tokens, x.shape[1] - text_tokens] if streams == 2 else [x.shape[1]]


def _gemm(x, x_scale, w, w_scale, bias, text_tokens, streams):
    """float32 (B, S, N): each stream's rows with its own part of the weights."""
    x = (x.float() * x_scale[..., None]).split(_streams(x, text_tokens, streams), 1)
    w, bias = (w.float() * w_scale[:, None]).chunk(streams), bias.float().chunk(streams)
    return torch.cat([part @ own.T + offset for part, own, offset in zip(x, w, bias, strict=True)], 1)


@gelu_gemm.register_kernel("cpu")
def gelu_gemm_reference(x, x_scale, w, w_scale, bias, columns, scale, hidden, text_tokens, streams):
    found = F.gelu(_gemm(x, x_scale, w, w_scale, bias, text_tokens, streams), approximate="tanh")
    parts = zip(found.split(_streams(x, text_tokens, streams), 1), columns.chunk(streams), strict=True)
    found = torch.cat([part * own for part, own in parts], 1) / scale[..., None]
    hidden[..., -found.shape[-1]:] = to_e4m3(found)


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
