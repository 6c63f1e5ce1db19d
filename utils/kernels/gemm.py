"""These ops multiply e4m3 matrices. Two of them also do the work that follows, while the result lies in registers.

**Two streams, one GEMM.** The two sets of weights of a double block are stacked in one tensor, text's first. A tile
of text rows reads the first set, and a tile of image rows reads the second.

Shapes use these letters: B batch size, T text tokens, I image tokens, S = T + I, D model width, H heads.

On CUDA, `gelu_gemm` and `qkv_gemm` run through Triton, and `fp8_gemm` runs through cuBLAS. The kernels are made for
Hopper (sm_90): the GEMMs load tiles with the tensor memory accelerator (TMA). On a CPU, every op runs through its
reference. A reference is plain torch. It has the arguments and results of its op and computes the same.
"""

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from utils.kernels.formats import E4M3_MAX, EPS, NATIVE, ROUNDING, TINY, _to_e4m3_kernel, to_e4m3

BLOCK_M = 128  # rows of a GEMM tile


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
        EPS, MAX, ROUNDING: the epsilon of QK-norm, E4M3_MAX, and the constant of formats.py.
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
            # The constants are sqrt(2 / pi) and 0.044715 * sqrt(2 / pi), of GELU's tanh approximation. The scales come
            # last: before tanh they would need registers beside it.
            value = value + value * _tanh(value * (0.7978845608 + 0.0356774081 * value * value))
            value = value * (0.5 / tl.load(out_scale + r, inside, 1.))[:, None] * tl.load(out_columns + c)[None, :]
            out_tiles.store([m, n], _to_e4m3_kernel(value, MAX))


def launch_ranges(tokens: int, text_tokens: int, streams: int) -> list[tuple[int, int, int]]:
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


def split_streams(x: Tensor, text_tokens: int, streams: int) -> tuple[Tensor, ...]:
    """x (B, S, *) in the parts that each set of weights multiplies: all tokens, or text's and image's."""
    return x.split([text_tokens, x.shape[1] - text_tokens] if streams == 2 else [x.shape[1]], 1)


def _gemm(x, x_scale, w, w_scale, bias, text_tokens, streams):
    """x w^T + bias, (B, S, N) float32. The rows of each stream use that stream's weights."""
    x = split_streams(x.float() * x_scale[..., None], text_tokens, streams)
    w, bias = (w.float() * w_scale[:, None]).chunk(streams), bias.float().chunk(streams)
    return torch.cat([part @ own.T + offset for part, own, offset in zip(x, w, bias, strict=True)], 1)


# The GEMMs are opaque to the compiler, for two reasons. If a kernel writes into part of an e4m3 tensor, inductor
# generates code that Triton 3.6 cannot compile. If a kernel makes tile descriptors, AOTInductor of torch 2.11 allocates
# the workspace of a single program for all programs.

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
        for row, rows, stream in launch_ranges(tokens, text_tokens, streams):
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


@gelu_gemm.register_kernel("cpu")
def gelu_gemm_reference(x, x_scale, w, w_scale, bias, columns, scale, hidden, text_tokens, streams):
    result = F.gelu(_gemm(x, x_scale, w, w_scale, bias, text_tokens, streams), approximate="tanh")
    parts = zip(split_streams(result, text_tokens, streams), columns.chunk(streams), strict=True)
    result = torch.cat([part * own for part, own in parts], 1) / scale[..., None]
    hidden[..., -result.shape[-1]:] = to_e4m3(result)


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
        for row, rows, stream in launch_ranges(tokens, text_tokens, streams):
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
    weight = torch.cat([own[:2, None].expand(-1, part.shape[1], -1) for own, part in
                        zip(norms, split_streams(x, text_tokens, streams), strict=True)], 1)  # (2, S, D / H)
    qk = qkv[:2] * (qkv[:2].square().mean(-1, keepdim=True) + EPS).rsqrt() * weight[:, None, :, None]
    even, odd, cos, sin = qk[..., 0::2], qk[..., 1::2], cos.float()[:, None], sin.float()[:, None]
    qk = torch.stack([even * cos - odd * sin, odd * cos + even * sin], -1).flatten(-2)
    qkv = to_e4m3(torch.cat([qk, qkv[2:]]) / descale.transpose(0, 1)[:, :, None, :, None])
    if parts > 1:
        qkv = qkv.unflatten(3, (parts, -1)).permute(3, 1, 2, 0, 4, 5).contiguous()
    return qkv, descale, torch.stack([attended, torch.maximum(attended, hidden)], 1)


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


@fp8_gemm.register_kernel("cpu")
def fp8_gemm_reference(x, w, one, text_tokens, streams):
    x = split_streams(x.float(), text_tokens, streams)
    return torch.cat([(part @ own.float().T).bfloat16() for part, own in zip(x, w.chunk(streams), strict=True)], 1)
