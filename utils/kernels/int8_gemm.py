"""int8 GEMMs with a fused epilogue for Hopper, in Gluon.

int8 has no exponent. It keeps about seven bits of a row without outliers, where e4m3, which gemm.py multiplies, keeps
four.

The kernels are written in Gluon, Triton's lower level, for one reason: Triton (3.6 to 3.9) waits for every int8
instruction of the tensor cores before it issues the next. Here the warps of a program have three roles. One warp loads
tiles by the tensor memory accelerator (TMA). Two groups of four warps each multiply half of a tile's rows, and keep
one instruction in flight. bench/kernels.py times the kernels.

The results are bf16. A row's scale is not known before its last tile, and int8 cannot bear a bound in its place. The
row is measured and cast by the next kernel (`utils.kernels.casts.cast_int8`). Scales for groups of channels, which a
tile can measure, would have to be applied inside the next GEMM. Two sets of accumulators leave registers for tiles of
half the size, and that costs more than the pass (docs/kernels.md).

Shapes use these letters: B batch size, S tokens, D model width, H heads.

Every op runs on CUDA through Gluon, and on a CPU through its reference in plain torch.
"""

import torch
import torch.nn.functional as F
import triton
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from utils.kernels.formats import EPS
from utils.kernels.gemm import launch_ranges, split_streams

BLOCK_M = gl.constexpr(128)  # rows of a tile; each of the two groups of warps has half
BLOCK_K = gl.constexpr(128)  # input columns of a step
BOX = gl.constexpr(64)  # rows of w that one TMA instruction loads
STAGES = gl.constexpr(4)  # steps that are loaded ahead: 192 of an SM's 227 KiB of shared memory
GROUP = gl.constexpr(16)  # rows of tiles that share their columns of w in L2
# What follows the GEMM. PLAIN: scales alone.
PLAIN, GELU, QKV = gl.constexpr(0), gl.constexpr(1), gl.constexpr(2)
TILES = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=8, rank=2)
RESULTS = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=2)
# Triton 3.9 has renamed these.
_load_tile = getattr(tma, "async_load", None) or tma.async_copy_global_to_shared
_store_tile = getattr(tma, "async_store", None) or tma.async_copy_shared_to_global


@gluon.jit
def _place(share, M, N: gl.constexpr, BLOCK_N: gl.constexpr, SHARED: gl.constexpr):
    """The first row and the first column of a share of a tile. A tile has SHARED shares of BLOCK_N columns."""
    rows = (M + BLOCK_M - 1) // BLOCK_M
    columns: gl.constexpr = N // (BLOCK_N * SHARED)
    tile = share // SHARED
    group = tile // (GROUP * columns)
    height = min(rows - group * GROUP, GROUP)
    within = tile % (GROUP * columns)
    row = (group * GROUP + within % height) * BLOCK_M
    return row, (within // height * SHARED + share % SHARED) * BLOCK_N


@gluon.jit
def _load_shares(x, w, x_tiles, w_tiles, loaded, free, step, first, last, M, T, N: gl.constexpr, K: gl.constexpr,
                 BLOCK_N: gl.constexpr, SHARED: gl.constexpr, PROGRAMS: gl.constexpr, STREAMS: gl.constexpr):
    for share in range(first * SHARED + gl.program_id(0), last * SHARED, PROGRAMS):
        m, n = _place(share, M, N, BLOCK_N, SHARED)
        row = n + gl.where(m >= T, (STREAMS - 1) * N, 0)
        for k in range(0, K, BLOCK_K):
            slot = step % STAGES
            mbarrier.wait(free.index(slot), (step // STAGES & 1) ^ 1)
            mbarrier.expect(loaded.index(slot), (BLOCK_M + BLOCK_N) * BLOCK_K)
            _load_tile(x, [m, k], loaded.index(slot), x_tiles.index(slot))
            for part in gl.static_range(BLOCK_N // BOX):
                _load_tile(w, [row + part * BOX, k], loaded.index(slot), w_tiles.index(slot).slice(part * BOX, BOX))
            step += 1
    return step


@gluon.jit
def _load(x, w, x_tiles, w_tiles, loaded, free, M, T, whole, tiles, N: gl.constexpr, K: gl.constexpr,
          BLOCK_N: gl.constexpr, SHARED: gl.constexpr, PROGRAMS: gl.constexpr, STREAMS: gl.constexpr):
    """The warp that loads: whole tiles first, then the shared tiles, in the order in which `_multiply` reads them."""
    step = _load_shares(x, w, x_tiles, w_tiles, loaded, free, gl.to_tensor(0), 0, whole, M, T, N, K, BLOCK_N, 1,
                        PROGRAMS, STREAMS)
    if SHARED > 1:
        _load_shares(x, w, x_tiles, w_tiles, loaded, free, step, whole, tiles, M, T, N, K, BLOCK_N // SHARED, SHARED,
                     PROGRAMS, STREAMS)


@gluon.jit
def _tanh(x):
    """tanh of float32 values: one instruction, accurate to 2^-11, finer than the cast to bf16 that follows."""
    return gl.inline_asm_elementwise("tanh.approx.f32 $0, $1;", "=f,f", [x], dtype=gl.float32, is_pure=True, pack=1)


@gluon.jit
def _norm_and_rope(value, norms, cos, sin, m, part, stream, M, HEAD: gl.constexpr, EPS: gl.constexpr):
    """QK-norm and RoPE of whole heads, (64, *) float32. `part` is 0 for q, 1 for k and 2 for v, which stays."""
    ROWS: gl.constexpr = value.shape[0]
    WIDTH: gl.constexpr = value.shape[1]
    is_v = part == 2
    heads = gl.reshape(value, (ROWS, WIDTH // HEAD, HEAD))
    columns: gl.constexpr = gl.SliceLayout(0, gl.SliceLayout(0, heads.type.layout))
    root = gl.where(is_v, 1., gl.rsqrt(gl.sum(heads * heads, 2) / HEAD + EPS))
    weight = gl.load(norms + (stream * 3 + part) * HEAD + gl.arange(0, HEAD, layout=columns))
    heads = heads * gl.expand_dims(root, 2) * gl.expand_dims(gl.expand_dims(weight, 0), 0)
    even, odd = gl.split(gl.reshape(heads, (ROWS, WIDTH // HEAD, HEAD // 2, 2)))
    angles: gl.constexpr = gl.SliceLayout(1, even.type.layout)
    r = m + gl.arange(0, ROWS, layout=gl.SliceLayout(1, angles))
    i = gl.arange(0, HEAD // 2, layout=gl.SliceLayout(0, angles))
    at = gl.expand_dims(r, 1) * (HEAD // 2) + gl.expand_dims(i, 0)
    inside = gl.expand_dims(r < M, 1)
    c = gl.expand_dims(gl.where(is_v, 1., gl.load(cos + at, inside, 0.).to(gl.float32)), 1)
    s = gl.expand_dims(gl.where(is_v, 0., gl.load(sin + at, inside, 0.).to(gl.float32)), 1)
    return gl.reshape(gl.join(even * c - odd * s, odd * c + even * s), (ROWS, WIDTH))


@gluon.jit
def _finish(total, out, staging, rows, w_scale, offsets, columns, norms, cos, sin, m, n, stream, M, N: gl.constexpr,
            KIND: gl.constexpr, HEAD: gl.constexpr, EPS: gl.constexpr):
    """The epilogue of `_gemm_kernel` on 64 rows from m and some columns from n: total (64, *) int32 becomes bf16."""
    layout: gl.constexpr = total.type.layout
    r = m + gl.arange(0, total.shape[0], layout=gl.SliceLayout(1, layout))
    c = stream * N + n + gl.arange(0, total.shape[1], layout=gl.SliceLayout(0, layout))
    of_rows = gl.expand_dims(gl.load(rows + r, r < M, 0.), 1)
    scale = gl.expand_dims(gl.load(w_scale + c), 0)
    offset = gl.expand_dims(gl.load(offsets + c).to(gl.float32), 0)
    value = total.to(gl.float32)
    value = (value - of_rows * offset) * scale if KIND == PLAIN else value * of_rows * scale + offset
    if KIND == GELU:
        # The constants are sqrt(2 / pi) and 0.044715 * sqrt(2 / pi), of GELU's tanh approximation.
        value = value + value * _tanh(value * (0.7978845608 + 0.0356774081 * value * value))
        value = value * gl.expand_dims(0.5 * gl.load(columns + c), 0)
    if KIND == QKV:
        value = _norm_and_rope(value, norms, cos, sin, m, n // (N // 3), stream, M, HEAD, EPS)
    tma.store_wait(0)  # until the previous result has left the shared memory
    staging.store(value.to(gl.bfloat16))
    fence_async_shared()
    _store_tile(out, [m, n], staging)


@gluon.jit
def _multiply_shares(x_tiles, w_tiles, loaded, free, out, staging, vectors, step, first, last, M, T,
                     HALF: gl.constexpr, N: gl.constexpr, K: gl.constexpr, BLOCK_N: gl.constexpr,
                     SHARED: gl.constexpr, PROGRAMS: gl.constexpr, STREAMS: gl.constexpr, KIND: gl.constexpr,
                     HEAD: gl.constexpr, EPS: gl.constexpr):
    # Triton's list of int8 instructions ends at 224 columns, so a tile of 256 takes two of 128.
    layout: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1],
                                                     instr_shape=[16, min(BLOCK_N, 128), 32])
    ROWS: gl.constexpr = BLOCK_M // 2
    rows, w_scale, offsets, columns, norms, cos, sin = vectors
    for share in range(first * SHARED + gl.program_id(0), last * SHARED, PROGRAMS):
        m, n = _place(share, M, N, BLOCK_N, SHARED)
        stream = gl.where(m >= T, STREAMS - 1, 0)
        m += HALF * ROWS
        total = gl.zeros((ROWS, BLOCK_N), gl.int32, layout)
        for k in range(0, K, BLOCK_K):
            slot = step % STAGES
            mbarrier.wait(loaded.index(slot), step // STAGES & 1)
            total = warpgroup_mma(x_tiles.index(slot).slice(HALF * ROWS, ROWS),
                                  w_tiles.index(slot).slice(0, BLOCK_N).permute((1, 0)), total, use_acc=k > 0,
                                  is_async=True)
            total = warpgroup_mma_wait(1, deps=(total,))
            mbarrier.arrive(free.index((step + STAGES - 1) % STAGES), count=1, pred=k > 0)
            step += 1
        total = warpgroup_mma_wait(0, deps=(total,))
        mbarrier.arrive(free.index((step + STAGES - 1) % STAGES), count=1)
        if BLOCK_N == 256:
            left, right = gl.split(gl.permute(gl.reshape(total, (ROWS, 2, 128)), (0, 2, 1)))
            _finish(left, out, staging, rows, w_scale, offsets, columns, norms, cos, sin, m, n, stream, M, N, KIND,
                    HEAD, EPS)
            _finish(right, out, staging, rows, w_scale, offsets, columns, norms, cos, sin, m, n + 128, stream, M, N,
                    KIND, HEAD, EPS)
        else:
            _finish(total, out, staging, rows, w_scale, offsets, columns, norms, cos, sin, m, n, stream, M, N, KIND,
                    HEAD, EPS)
    return step


@gluon.jit
def _multiply(x_tiles, w_tiles, loaded, free, out, out_narrow, vectors, M, T, whole, tiles, HALF: gl.constexpr,
              N: gl.constexpr, K: gl.constexpr, BLOCK_N: gl.constexpr, SHARED: gl.constexpr, PROGRAMS: gl.constexpr,
              STREAMS: gl.constexpr, KIND: gl.constexpr, HEAD: gl.constexpr, EPS: gl.constexpr):
    """A group of four warps that multiplies: rows 64 * HALF to 64 * HALF + 63 of each tile."""
    staging = gl.allocate_shared_memory(gl.bfloat16, out.block_type.shape, out.layout)
    step = _multiply_shares(x_tiles, w_tiles, loaded, free, out, staging, vectors, gl.to_tensor(0), 0, whole, M, T,
                            HALF, N, K, BLOCK_N, 1, PROGRAMS, STREAMS, KIND, HEAD, EPS)
    if SHARED > 1:
        narrow = gl.allocate_shared_memory(gl.bfloat16, out_narrow.block_type.shape, out_narrow.layout)
        _multiply_shares(x_tiles, w_tiles, loaded, free, out_narrow, narrow, vectors, step, whole, tiles, M, T, HALF,
                         N, K, BLOCK_N // SHARED, SHARED, PROGRAMS, STREAMS, KIND, HEAD, EPS)
    tma.store_wait(0)


@gluon.jit
def _gemm_kernel(x, w, out, out_narrow, rows, w_scale, offsets, columns, norms, cos, sin, M, T, whole, tiles,
                 N: gl.constexpr, K: gl.constexpr, BLOCK_N: gl.constexpr, SHARED: gl.constexpr,
                 PROGRAMS: gl.constexpr, STREAMS: gl.constexpr, KIND: gl.constexpr, HEAD: gl.constexpr,
                 EPS: gl.constexpr, num_warps: gl.constexpr):
    """x (M, K) times w (STREAMS * N, K)^T in int8, with a fused epilogue whose result is written as bf16.

        PLAIN  (total - rows * offsets) * w_scale             rows are zero points, offsets are sums of w's rows
        GELU   GELU(total * rows * w_scale + offsets) * columns      rows are scales, offsets are biases
        QKV    QK-norm and RoPE of total * rows * w_scale + offsets

    The kernel is persistent: of the first `whole` tiles of 128 x BLOCK_N, each program computes every PROGRAMS-th. The
    tiles after them are too few for all programs: SHARED programs share each of them.

    Args:
        x: descriptor of (M, K) int8 in boxes of BLOCK_M x BLOCK_K. w: of (STREAMS * N, K) int8 in boxes of BOX x
            BLOCK_K. The first T rows of x use the first N rows of w, the others the last N.
        out, out_narrow: descriptors of the result (M, N) bf16, in boxes of 64 rows, for whole and for shared tiles.
        rows: (M,) float32. w_scale: (STREAMS * N,) float32. offsets: (STREAMS * N,) float32 or bf16.
        columns: (STREAMS * N,) float32. Unused without GELU.
        norms, cos, sin: as in `utils.kernels.gemm._gemm_kernel`. Unused without QKV.
        M, T: rows of x, and of text among them; T is a multiple of BLOCK_M. Without effect if STREAMS is 1.
        whole, tiles: how many tiles are computed by one program each, and how many there are.
        N, K: output columns of one stream, a multiple of BLOCK_N, and input columns.
        HEAD, EPS: columns of a head, and the epsilon of QK-norm.
    """
    x_tiles = gl.allocate_shared_memory(gl.int8, [STAGES, BLOCK_M, BLOCK_K], x.layout)
    w_tiles = gl.allocate_shared_memory(gl.int8, [STAGES, BLOCK_N, BLOCK_K], w.layout)
    loaded = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    free = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(STAGES):
        mbarrier.init(loaded.index(i), count=1)
        mbarrier.init(free.index(i), count=2)
    vectors = (rows, w_scale, offsets, columns, norms, cos, sin)
    gl.warp_specialize([
        (_multiply, (x_tiles, w_tiles, loaded, free, out, out_narrow, vectors, M, T, whole, tiles, 0, N, K, BLOCK_N,
                     SHARED, PROGRAMS, STREAMS, KIND, HEAD, EPS)),
        (_multiply, (x_tiles, w_tiles, loaded, free, out, out_narrow, vectors, M, T, whole, tiles, 1, N, K, BLOCK_N,
                     SHARED, PROGRAMS, STREAMS, KIND, HEAD, EPS)),
        (_load, (x, w, x_tiles, w_tiles, loaded, free, M, T, whole, tiles, N, K, BLOCK_N, SHARED, PROGRAMS, STREAMS)),
    ], [4, 1], [232, 24])


def _shares(rows: int, columns: int, block_n: int, most: int, device: torch.device) -> tuple[int, int, int, int]:
    """How the tiles of a GEMM are divided among programs.

    Returns:
        The number of tiles that one program each computes; the number of all tiles; among how many programs each tile
        after the first ones is shared; the number of programs.
    """
    units = torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 4
    tiles = triton.cdiv(rows, BLOCK_M.value) * (columns // block_n)
    left = tiles % units
    shared = next((parts for parts in (4, 2) if parts <= most and 0 < left * parts <= units), 1)
    return tiles - left * (shared > 1), tiles, shared, min(units, tiles * shared)


def _launch(kind: gl.constexpr, x: Tensor, rows: Tensor, w: Tensor, w_scale: Tensor, offsets: Tensor, out: Tensor,
            text_tokens: int, streams: int, part: int, most: int, columns: Tensor | None = None,
            norms: Tensor | None = None, cos: Tensor | None = None, sin: Tensor | None = None, head: int = 1) -> None:
    """Launches `_gemm_kernel` for each batch item, and for each stream if a tile would hold rows of both.

    Args:
        x: (B, S, K) int8. rows: (B, S) float32. out: written, (B, S, N) bf16.
        part: a number of columns that a tile must divide. most: the most programs that may share a tile.
    """
    B, tokens, K = x.shape
    N = w.shape[0] // streams
    block_n = next(size for size in (256, 128, 64) if part % size == 0)
    w_boxes = TensorDescriptor.from_tensor
    for b in range(B):
        for row, count, stream in launch_ranges(tokens, text_tokens, streams):
            whole, tiles, shared, programs = _shares(count, N, block_n, most if block_n == 256 else 1, x.device)
            own = slice(stream * N, (streams if count == tokens else stream + 1) * N)
            here = slice(row, row + count)
            boxes = [w_boxes(out[b, here], [BLOCK_M.value // 2, min(size, 128)], RESULTS)
                     for size in (block_n, block_n // shared)]
            _gemm_kernel[(programs,)](
                w_boxes(x[b, here], [BLOCK_M.value, BLOCK_K.value], TILES),
                w_boxes(w[own], [BOX.value, BLOCK_K.value], TILES), *boxes, rows[b, here], w_scale[own], offsets[own],
                w_scale if columns is None else columns[own], w_scale if norms is None else norms[stream:],
                w_scale if cos is None else cos[here], w_scale if sin is None else sin[here], count, text_tokens,
                whole, tiles, N, K, block_n, shared, programs, w[own].shape[0] // N, kind, head, EPS, num_warps=4)


@torch.library.custom_op("flux_faster::int8_gemm", mutates_args=())
def int8_gemm(x: Tensor, zero_point: Tensor, w: Tensor, w_scale: Tensor, sums: Tensor, text_tokens: int, streams: int
              ) -> Tensor:
    """(x - zero_point) w^T times w's scales. `gated_residual` and `residual_adaln` multiply it by the scales of x.

    Args:
        x: (B, S, K) int8. zero_point: (B, S) float32. It applies to the columns of x that `sums` sums up.
        w: (streams * N, K) int8. w_scale, sums: (streams * N,) float32, the scale of each row, and its sum over the
            columns to which the zero point applies.
        text_tokens: how many of the S tokens are text. Without effect if streams is 1.
        streams: 1, or 2 if the first N rows of w are for text and the last N for image.

    Returns:
        (B, S, N) bf16.
    """
    out = x.new_empty(*x.shape[:2], w.shape[0] // streams, dtype=torch.bfloat16)
    _launch(PLAIN, x, zero_point, w, w_scale, sums, out, text_tokens, streams, out.shape[2], 4)
    return out


@int8_gemm.register_fake
def _(x, zero_point, w, w_scale, sums, text_tokens, streams):
    return x.new_empty(*x.shape[:2], w.shape[0] // streams, dtype=torch.bfloat16)


@int8_gemm.register_kernel("cpu")
def int8_gemm_reference(x, zero_point, w, w_scale, sums, text_tokens, streams):
    parts = zip(split_streams(x, text_tokens, streams), split_streams(zero_point, text_tokens, streams),
                w.chunk(streams), w_scale.chunk(streams), sums.chunk(streams), strict=True)
    return torch.cat([((part.float() @ own.float().T - zero[..., None] * of_rows) * scale).bfloat16()
                      for part, zero, own, scale, of_rows in parts], 1)


@torch.library.custom_op("flux_faster::int8_gelu_gemm", mutates_args=())
def int8_gelu_gemm(x: Tensor, x_scale: Tensor, w: Tensor, w_scale: Tensor, bias: Tensor, columns: Tensor,
                   text_tokens: int, streams: int) -> Tensor:
    """GELU(x w^T + bias), in the tanh approximation, times `columns`, as bf16.

    Args:
        x: (B, S, K) int8. x_scale: (B, S) float32.
        w: (streams * N, K) int8. w_scale: (streams * N,) float32. bias: (streams * N,) bf16.
        columns: (streams * N,) float32, the reciprocal shares of the channels (utils/equalization.py).
        text_tokens, streams: as in `int8_gemm`.

    Returns:
        (B, S, N) bf16.
    """
    out = x.new_empty(*x.shape[:2], w.shape[0] // streams, dtype=torch.bfloat16)
    _launch(GELU, x, x_scale, w, w_scale, bias, out, text_tokens, streams, out.shape[2], 4, columns=columns)
    return out


@int8_gelu_gemm.register_fake
def _(x, x_scale, w, w_scale, bias, columns, text_tokens, streams):
    return x.new_empty(*x.shape[:2], w.shape[0] // streams, dtype=torch.bfloat16)


def _scaled(x, x_scale, w, w_scale, bias, text_tokens, streams) -> list[Tensor]:
    """x w^T + bias in float32, for each stream (B, *, N)."""
    parts = zip(split_streams(x, text_tokens, streams), split_streams(x_scale, text_tokens, streams),
                w.chunk(streams), w_scale.chunk(streams), bias.chunk(streams), strict=True)
    return [part.float() @ own.float().T * scale[..., None] * of_rows + offset.float()
            for part, scale, own, of_rows, offset in parts]


@int8_gelu_gemm.register_kernel("cpu")
def int8_gelu_gemm_reference(x, x_scale, w, w_scale, bias, columns, text_tokens, streams):
    parts = zip(_scaled(x, x_scale, w, w_scale, bias, text_tokens, streams), columns.chunk(streams), strict=True)
    return torch.cat([(F.gelu(part, approximate="tanh") * own).bfloat16() for part, own in parts], 1)


@torch.library.custom_op("flux_faster::int8_qkv_gemm", mutates_args=())
def int8_qkv_gemm(x: Tensor, x_scale: Tensor, w: Tensor, w_scale: Tensor, bias: Tensor, norms: Tensor, cos: Tensor,
                  sin: Tensor, text_tokens: int, streams: int) -> Tensor:
    """q, k, v = x w^T + bias, with RMSNorm of each head of q and k, and RoPE, as bf16.

    Args:
        x: (B, S, K) int8. x_scale: (B, S) float32.
        w: (streams * 3 D, K) int8. w_scale: (streams * 3 D,) float32. bias: (streams * 3 D,) bf16.
        norms: (streams, 3, D / H) float32, the weights of q's norm, the weights of k's norm, and ones.
        cos, sin: (S, D / H / 2) float16.
        text_tokens, streams: as in `int8_gemm`.

    Returns:
        (B, S, 3, H, D / H) bf16.
    """
    D, head = w.shape[0] // streams // 3, norms.shape[2]
    out = x.new_empty(*x.shape[:2], 3 * D, dtype=torch.bfloat16)
    _launch(QKV, x, x_scale, w, w_scale, bias, out, text_tokens, streams, D, 2, norms=norms, cos=cos, sin=sin,
            head=head)
    return out.unflatten(2, (3, -1, head))


@int8_qkv_gemm.register_fake
def _(x, x_scale, w, w_scale, bias, norms, cos, sin, text_tokens, streams):
    head = norms.shape[2]
    return x.new_empty(*x.shape[:2], 3, w.shape[0] // streams // 3 // head, head, dtype=torch.bfloat16)


@int8_qkv_gemm.register_kernel("cpu")
def int8_qkv_gemm_reference(x, x_scale, w, w_scale, bias, norms, cos, sin, text_tokens, streams):
    parts = []
    for part, own in zip(_scaled(x, x_scale, w, w_scale, bias, text_tokens, streams), norms, strict=True):
        qkv = part.unflatten(2, (3, -1, norms.shape[2]))
        root = (qkv[:, :, :2].square().mean(-1, keepdim=True) + EPS).rsqrt()
        parts.append(torch.cat([qkv[:, :, :2] * root * own[:2, None], qkv[:, :, 2:]], 2))
    qkv = torch.cat(parts, 1)
    even, odd = qkv[:, :, :2, :, 0::2], qkv[:, :, :2, :, 1::2]
    cos, sin = (table.float()[:, None, None] for table in (cos, sin))
    qk = torch.stack([even * cos - odd * sin, odd * cos + even * sin], -1).flatten(-2)
    return torch.cat([qk, qkv[:, :, 2:]], 2).bfloat16()
