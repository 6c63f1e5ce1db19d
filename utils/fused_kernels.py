"""The Triton kernels of the fused step, each beside the plain torch function that it has to equal.

Between two matrix products of a FLUX block lie LayerNorm, modulation, QK-norm, rotary embedding, GELU, gates, and for
every fp8 product a pass to find the largest value and another to divide by it. Done one by one they read and write
each activation several times; here each is read once and written once, in e4m3 where a product follows, and what can
happen in a matrix product's own registers happens there.

Three rules keep it that simple:

* **Scales without a pass over the data.** e4m3 is a floating-point format with four bits of relative precision from
  2^-6 to 448, so a scale that is some ten or hundred times too large costs next to nothing, and a bound will do where
  a maximum is expensive. LayerNorm's output has length sqrt(D) at most; hence |W x + b| <= |w_j| R + |b_j| with
  R = sqrt(D) max|1 + scale| + |shift|, known before the product (Cauchy-Schwarz). GELU only makes it smaller, and
  attention averages values of v. LayerNorm's own output has its row in registers and gets the row's true maximum.
* **Text before image.** What blocks exchange stays two tensors, as diffusers has it, and a kernel picks its pointer by
  the row; within a block all tokens are one (B, T + I, *). Nothing is ever concatenated.
* **Two streams, one product.** A double block's two sets of weights lie one behind the other, and a tile of text rows
  begins at the first, a tile of image rows at the second.

Every op runs on CUDA through Triton, and on a CPU through its reference. Made for Hopper (sm_90): the products load
tiles by its copy engine.
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
# What e4m3's rounding may add to a bound that was made from exact values: half a step, 2^-4.
ROUNDING = 1 + 2**-4
BLOCK_M = 128
# Triton's interpreter, for tests on a CPU, knows no assembly.
NATIVE = tl.constexpr(not triton.knobs.runtime.interpret)


def use_torch_memory(device: torch.device) -> None:
    """Lets kernels that make tile descriptors, as the products here do, take the memory for them from PyTorch."""
    triton.set_allocator(lambda size, alignment, stream: torch.empty(size, device=device, dtype=torch.int8))


# --- LayerNorm, modulation, gates, casts: a program is a row, token s of batch item b ---

@triton.jit
def _to_e4m3_kernel(x, MAX: tl.constexpr):
    if not NATIVE:  # the GPU's own conversion does that
        x = tl.minimum(tl.maximum(x, -MAX), MAX)
    return x.to(tl.float8e4nv)


@triton.jit
def _own_stream(row, text, image, new_text, new_image, table, offsets, gates, T, S, table_stride, D: tl.constexpr):
    """Where a row of all tokens is read, where it is written, and where its modulation and its gate begin."""
    b = row // S
    s = row % S
    if s < T:
        at = (b * T + s) * D
        source, new = text + at, new_text + at
        modulation = table + b * table_stride + tl.multiple_of(tl.load(offsets), 16)
        gate = table + b * table_stride + tl.multiple_of(tl.load(gates), 16)
    else:
        at = (b * (S - T) + s - T) * D
        source, new = image + at, new_image + at
        modulation = table + b * table_stride + tl.multiple_of(tl.load(offsets + 1), 16)
        gate = table + b * table_stride + tl.multiple_of(tl.load(gates + 1), 16)
    return source, new, modulation, gate


@triton.jit
def _adaln_kernel(
        text, image, y, new_text, new_image, table, offsets, gates, out, row_scale, bounds, qk_scale, descale,
        tensor_scales, T, S, B, table_stride, D: tl.constexpr, BLOCK: tl.constexpr, HEADS: tl.constexpr,
        HEADS_BLOCK: tl.constexpr, SHIFT: tl.constexpr, SCALE: tl.constexpr, LENGTH: tl.constexpr, JOINT: tl.constexpr,
        RESIDUAL: tl.constexpr, EPS: tl.constexpr, MAX: tl.constexpr, ROUNDING: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    i = tl.arange(0, BLOCK)
    mask = i < D
    source, new, modulation, own_gate = _own_stream(row, text, image, new_text, new_image, table, offsets, gates, T, S,
                                                    table_stride, D)
    # All loads before the first reduction, which waits for the others: their latencies are what a row takes.
    x = tl.load(source + i, mask, 0.).to(tl.float32)
    scale = tl.load(modulation + SCALE * D + i, mask, 0.)
    shift = tl.load(modulation + SHIFT * D + i, mask, 0.)
    if RESIDUAL:
        gate = tl.load(own_gate + i, mask, 0.).to(tl.float32)
        x = (x + gate * tl.load(y + row * D + i, mask, 0.).to(tl.float32)).to(tl.bfloat16)
        tl.store(new + i, x, mask)
        x = x.to(tl.float32)
    x = tl.where(mask, x - tl.sum(x, 0) / D, 0.)
    x = x * tl.rsqrt(tl.sum(x * x, 0) / D + EPS)
    x = x * (1 + scale.to(tl.float32)) + shift.to(tl.float32)
    largest = tl.maximum(tl.max(tl.abs(x), 0), 1e-12)
    tl.store(row_scale + row, largest / MAX)
    tl.store(out + row * D + i, (x * (MAX / largest)).to(tl.float8e4nv), mask)

    if tl.program_id(0) == 0:  # the scales that follow from bounds
        h = tl.arange(0, HEADS_BLOCK)
        heads = h < HEADS
        none = tl.zeros((HEADS_BLOCK,), tl.float32)
        attention = 1e-12 / MAX
        text_hidden = 1e-12 / MAX
        image_hidden = 1e-12 / MAX
        for item in range(B):
            v = none + 1e-12
            for stream in tl.static_range(2):
                length = tl.load(table + item * table_stride + tl.load(offsets + 2 + stream) + LENGTH)
                length = length.to(tl.float32) * ROUNDING
                own = bounds + stream * (2 + 2 * HEADS)
                hidden = (length * tl.load(own) + tl.load(own + 1)) / MAX
                if stream == 0:
                    text_hidden = tl.maximum(text_hidden, hidden)
                else:
                    image_hidden = tl.maximum(image_hidden, hidden)
                v = tl.maximum(v, length * tl.load(own + 2 + h, heads, 0.) + tl.load(own + 2 + HEADS + h, heads, 0.))
            tl.store(descale + item * 3 * HEADS + h, tl.load(qk_scale) + none, heads)
            tl.store(descale + (item * 3 + 1) * HEADS + h, tl.load(qk_scale + 1) + none, heads)
            tl.store(descale + (item * 3 + 2) * HEADS + h, v / MAX, heads)
            # Attention averages v, with weights that are rounded to e4m3 themselves.
            attention = tl.maximum(attention, ROUNDING * tl.max(v, 0) / MAX)
        if JOINT:  # one product reads [attention | GELU]
            attention = tl.maximum(attention, tl.maximum(text_hidden, image_hidden))
            text_hidden = attention
            image_hidden = attention
        tl.store(tensor_scales, attention)
        tl.store(tensor_scales + 4, text_hidden)
        tl.store(tensor_scales + 8, image_hidden)


@triton.jit
def _residual_kernel(text, image, y, new_text, new_image, table, gates, T, S, table_stride, D: tl.constexpr,
                     BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    i = tl.arange(0, BLOCK)
    mask = i < D
    source, new, _, own_gate = _own_stream(row, text, image, new_text, new_image, table, gates, gates, T, S,
                                           table_stride, D)
    x = tl.load(source + i, mask, 0.).to(tl.float32)
    gate = tl.load(own_gate + i, mask, 0.).to(tl.float32)
    tl.store(new + i, (x + gate * tl.load(y + row * D + i, mask, 0.).to(tl.float32)).to(tl.bfloat16), mask)


@triton.jit
def _cast_kernel(x, out, tensor_scales, out_stride, part_stride, D: tl.constexpr, BLOCK: tl.constexpr,
                 PARTS: tl.constexpr, IS_E4M3: tl.constexpr, MAX: tl.constexpr):
    """A row of D elements, from PARTS places, over its scale as e4m3; or moved, if it is e4m3 already."""
    row = tl.program_id(0).to(tl.int64)
    i = tl.arange(0, BLOCK)
    if PARTS == 1:
        source = x + row * D + i
    else:
        OWN: tl.constexpr = D // PARTS
        source = x + (i // OWN) * part_stride + row * OWN + i % OWN
    if IS_E4M3:
        tl.store(out + row * out_stride + i, tl.load(source, i < D), i < D)
    else:
        value = tl.load(source, i < D, 0.).to(tl.float32) / tl.load(tensor_scales)
        tl.store(out + row * out_stride + i, _to_e4m3_kernel(value, MAX), i < D)


@triton.jit
def _send_kernel(x, addresses, tensor_scales, tokens, own, offset, D: tl.constexpr, BLOCK: tl.constexpr,
                 MAX: tl.constexpr):
    """A row of D elements over its scale as e4m3, into the memory of the GPU that has this token."""
    row = tl.program_id(0).to(tl.int64)
    i = tl.arange(0, BLOCK)
    token = row % tokens
    out = tl.load(addresses + token // own).to(tl.pointer_type(tl.float8e4nv))
    out += offset + (row // tokens * own + token % own) * D
    value = tl.load(x + row * D + i, i < D, 0.).to(tl.float32) / tl.load(tensor_scales)
    tl.store(tl.multiple_of(out, 16) + i, _to_e4m3_kernel(value, MAX), i < D)


# --- fp8 products that finish their tile ---

@triton.jit
def _tanh(x):
    if NATIVE:  # one instruction, good to 2^-11: finer than the e4m3 that follows
        return tl.inline_asm_elementwise("tanh.approx.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True,
                                         pack=1)
    return 2 * tl.sigmoid(2 * x) - 1


@triton.jit
def _product_kernel(
        x, w, x_scale, w_scale, bias, out, tensor_scales, cos, sin, norms, descale, M, T, whole, out_stride,
        part_stride, N: tl.constexpr, K: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
        BLOCK_K: tl.constexpr, GROUP: tl.constexpr, PROGRAMS: tl.constexpr, HALVES: tl.constexpr, QKV: tl.constexpr,
        SCALE: tl.constexpr, STREAMS: tl.constexpr, D: tl.constexpr, HEAD: tl.constexpr, PARTS: tl.constexpr,
        EPS: tl.constexpr, MAX: tl.constexpr):
    """x (M, K) w (STREAMS N, K)^T, scaled by row and column, plus bias; then, in registers, QK-norm and rotation, or
    GELU; e4m3. Of two streams the rows below T have the first N rows of w. q, k and v go to (3, M, D), or, for PARTS
    GPUs that attend to D / PARTS columns each, to (PARTS, M, 3 D / PARTS).

    Persistent: a program takes every PROGRAMS-th tile of the `whole` first ones. Of those behind them there are too few
    for all programs, so each is shared by two (HALVES), left and right.
    """
    _tiles_kernel(x, w, x_scale, w_scale, bias, out, tensor_scales, cos, sin, norms, descale, M, T, 0, whole,
                  out_stride, part_stride, N, K, BLOCK_M, BLOCK_N, 1, BLOCK_K, GROUP, PROGRAMS, QKV, SCALE, STREAMS, D,
                  HEAD, PARTS, EPS, MAX)
    if HALVES:
        _tiles_kernel(x, w, x_scale, w_scale, bias, out, tensor_scales, cos, sin, norms, descale, M, T, whole,
                      tl.cdiv(M, BLOCK_M) * (N // BLOCK_N), out_stride, part_stride, N, K, BLOCK_M, BLOCK_N // 2, 2,
                      BLOCK_K, GROUP, PROGRAMS, QKV, SCALE, STREAMS, D, HEAD, PARTS, EPS, MAX)


@triton.jit
def _tiles_kernel(
        x, w, x_scale, w_scale, bias, out, tensor_scales, cos, sin, norms, descale, M, T, first, last, out_stride,
        part_stride, N: tl.constexpr, K: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
        SHARED: tl.constexpr, BLOCK_K: tl.constexpr, GROUP: tl.constexpr, PROGRAMS: tl.constexpr, QKV: tl.constexpr,
        SCALE: tl.constexpr, STREAMS: tl.constexpr, D: tl.constexpr, HEAD: tl.constexpr, PARTS: tl.constexpr,
        EPS: tl.constexpr, MAX: tl.constexpr):
    """The tiles from `first` to `last`, each SHARED by so many programs of BLOCK_N columns, in groups of GROUP tile
    rows that share their columns of w in L2.

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
            # descale (3, heads) lies as the columns of the product do.
            root = root / tl.load(descale + n // HEAD + tl.arange(0, BLOCK_N // HEAD))[None, :]
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
            half = value * (0.5 / tl.load(tensor_scales + 4 * (SCALE + stream)))
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
    products; results/kernels.py measures them."""
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
# The products are opaque to the compiler. Of a kernel that writes into part of an e4m3 tensor inductor makes code that
# Triton 3.6 cannot compile; and AOTInductor of torch 2.11 gives all programs of a kernel that makes tile descriptors
# the memory of one.

@triton_op("flux_faster::adaln", mutates_args=())
def adaln(text: Tensor, image: Tensor, table: Tensor, offsets: Tensor, bounds: Tensor, qk_scale: Tensor, shift: int,
          scale: int, length: int, joint: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """LayerNorm, then x (1 + scale) + shift, as e4m3 with one scale a row; and the scales of what follows from it.

    Args:
        text, image: (B, T, D) and (B, I, D), bf16.
        table: (B, *) bf16, every modulation of the step and the bounds of their rows' lengths.
        offsets: (4,) int64: where text's and image's modulation begin in it, multiples of 16, and their lengths.
        bounds: (2, 2 + 2 H) float32, of text and image: |w| and |b| of the MLP's widest row, then of v's in each head.
        qk_scale: (2,) float32, static scales of q and k.
        shift, scale: which D values of a modulation these are; length: which of its lengths.
        joint: whether one product reads attention and GELU of all tokens.

    Returns:
        (B, T + I, D) e4m3; its scales (B, T + I); descale (B, 3, H), for each head of q, k and v; tensor_scales (3, 4),
        of which the first column counts: for attention's output, text's GELU, image's; if joint all three the same.
    """
    found, args = _adaln_operands(text, image, None, table, offsets, offsets, bounds, qk_scale, shift, scale, length,
                                  joint)
    wrap_triton(_adaln_kernel)[(found[3].numel(),)](*args, num_warps=2)
    return found[2:]


@triton_op("flux_faster::residual_adaln", mutates_args=())
def residual_adaln(text: Tensor, image: Tensor, y: Tensor, gates: Tensor, table: Tensor, offsets: Tensor,
                   bounds: Tensor, qk_scale: Tensor, shift: int, scale: int, length: int, joint: bool
                   ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """`adaln` of x + gate * y.

    Args:
        y: (B, T + I, D), bf16. gates: (2,) int64: where in the table text's and image's gate begin, multiples of 16.

    Returns:
        The sum: text (B, T, D), image (B, I, D), bf16; then what `adaln` gives.
    """
    found, args = _adaln_operands(text, image, y, table, offsets, gates, bounds, qk_scale, shift, scale, length, joint)
    wrap_triton(_adaln_kernel)[(found[3].numel(),)](*args, num_warps=2)
    return found


def _adaln_operands(text, image, y, table, offsets, gates, bounds, qk_scale, shift, scale, length, joint
                    ) -> tuple[tuple[Tensor, ...], tuple]:
    """The results of both, yet to be written (without y the first two are the inputs), and the kernel's arguments. The
    launch is each op's own: by its source torch's compile cache knows which kernels an op has."""
    text, image, table = text.contiguous(), image.contiguous(), table.contiguous()
    B, T, D = text.shape
    tokens, heads, adds = T + image.shape[1], (bounds.shape[1] - 2) // 2, y is not None
    out, row_scale = text.new_empty(B, tokens, D, dtype=E4M3), text.new_empty(B, tokens, dtype=torch.float32)
    descale = text.new_empty(B, 3, heads, dtype=torch.float32)
    tensor_scales = text.new_empty(3, 4, dtype=torch.float32)
    new_text, new_image = (torch.empty_like(text), torch.empty_like(image)) if adds else (text, image)
    args = (text, image, y if adds else text, new_text, new_image, table, offsets, gates, out, row_scale, bounds,
            qk_scale, descale, tensor_scales, T, tokens, B, table.stride(0), D, triton.next_power_of_2(D), heads,
            triton.next_power_of_2(heads), shift, scale, length, joint, adds, EPS, E4M3_MAX, ROUNDING)
    return (new_text, new_image, out, row_scale, descale, tensor_scales), args


@triton_op("flux_faster::gated_residual", mutates_args=())
def gated_residual(text: Tensor, image: Tensor, y: Tensor, gates: Tensor, table: Tensor) -> tuple[Tensor, Tensor]:
    """x + gate * y: text (B, T, D) and image (B, I, D), bf16. The others as in `residual_adaln`."""
    text, image, table = text.contiguous(), image.contiguous(), table.contiguous()
    B, T, D = text.shape
    tokens = T + image.shape[1]
    new_text, new_image = torch.empty_like(text), torch.empty_like(image)
    wrap_triton(_residual_kernel)[(B * tokens,)](
        text, image, y, new_text, new_image, table, gates, T, tokens, table.stride(0), D, triton.next_power_of_2(D),
        num_warps=4)
    return new_text, new_image


@triton_op("flux_faster::cast_attention", mutates_args=())
def cast_attention(attention: Tensor, tensor_scales: Tensor) -> Tensor:
    """attention (B, S, D) bf16 over its scale, as e4m3.

    Or (parts, B, S, D / parts), as it comes from several GPUs: in bf16, or in e4m3, cast before it was sent.
    """
    B, tokens, D, parts = _whole(attention)
    out = attention.new_empty(B, tokens, D, dtype=E4M3)
    wrap_triton(_cast_kernel)[(B * tokens,)](attention, out, tensor_scales, D, attention.stride(0), D,
                                             triton.next_power_of_2(D), parts, attention.dtype == E4M3, E4M3_MAX,
                                             num_warps=4)
    return out


def send_attention(attention: Tensor, tensor_scales: Tensor, addresses: Tensor, rank: int) -> None:
    """`cast_attention` into each GPU's memory. No op: nobody compiles or exports what several GPUs do.

    Args:
        attention: (B, S, D) bf16, D a multiple of 16.
        addresses: (N,) int64, of what each GPU's tokens are written into, one N-th of them each: (N, B, S / N, D) e4m3,
            of which part `rank` is.
    """
    B, tokens, D = attention.shape
    own = tokens // len(addresses)
    _send_kernel[(B * tokens,)](attention, addresses, tensor_scales, tokens, own, rank * B * own * D, D,
                                triton.next_power_of_2(D), E4M3_MAX, num_warps=4)


@torch.library.custom_op("flux_faster::place_attention", mutates_args=("hidden",))
def place_attention(attention: Tensor, tensor_scales: Tensor, hidden: Tensor) -> None:
    """`cast_attention` into the first D columns of hidden (B, S, D + N) e4m3, for which `gelu_product` left room."""
    B, tokens, D, parts = _whole(attention)
    _cast_kernel[(B * tokens,)](attention, hidden, tensor_scales, hidden.shape[2], attention.stride(0), D,
                                triton.next_power_of_2(D), parts, attention.dtype == E4M3, E4M3_MAX, num_warps=4)


@place_attention.register_fake
def _(attention, tensor_scales, hidden):
    pass


def _whole(attention: Tensor) -> tuple[int, int, int, int]:
    """B, S and D of all parts together, and how many there are."""
    parts = 1 if attention.dim() == 3 else attention.shape[0]
    B, tokens, own = attention.shape[-3:]
    return B, tokens, own * parts, parts


@torch.library.custom_op("flux_faster::gelu_product", mutates_args=())
def gelu_product(x: Tensor, x_scale: Tensor, w: Tensor, w_scale: Tensor, bias: Tensor, tensor_scales: Tensor,
                 text_tokens: int, streams: int, room: int) -> Tensor:
    """GELU(x w^T + bias), tanh's approximation, over its stream's scale, as e4m3.

    Args:
        x: (B, S, K) e4m3, x_scale: (B, S). w: (streams N, K) e4m3, w_scale the same without K, bias in bf16.
        room: columns before the result's own that are left as they are, for `place_attention`.

    Returns:
        (B, S, room + N), e4m3.
    """
    B, tokens, K = x.shape
    N = w.shape[0] // streams
    out = x.new_empty(B, tokens, room + N)
    for b in range(B):
        for row, rows, stream in _ranges(tokens, text_tokens, streams):
            whole, tiles = _tiles(rows, N, N, 1, K, x.device)
            own = slice(stream * N, (streams if rows == tokens else stream + 1) * N)
            _product_kernel[(tiles["PROGRAMS"],)](
                x[b, row:], w[own], x_scale[b, row:], w_scale[own], bias[own], out[b, row:, room:], tensor_scales, bias,
                bias, bias, bias, rows, text_tokens, whole, room + N, 0, N, K, *tiles.values(), False, 1 + stream,
                w[own].shape[0] // N, N, 16, 1, EPS, E4M3_MAX, num_warps=8, num_stages=3)
    return out


@gelu_product.register_fake
def _(x, x_scale, w, w_scale, bias, tensor_scales, text_tokens, streams, room):
    return x.new_empty(*x.shape[:2], room + w.shape[0] // streams)


@torch.library.custom_op("flux_faster::qkv_product", mutates_args=())
def qkv_product(x: Tensor, x_scale: Tensor, w: Tensor, w_scale: Tensor, bias: Tensor, norms: Tensor, cos: Tensor,
                sin: Tensor, descale: Tensor, text_tokens: int, streams: int, parts: int = 1) -> Tensor:
    """q, k, v = x w^T + bias; RMSNorm of each head of q and k, rotary embedding; over their scales, as e4m3.

    Args:
        x: (B, S, K) e4m3, x_scale: (B, S). w: (streams 3 D, K) e4m3, w_scale the same without K, bias in bf16.
        norms: (streams, 3, D / H) float32, the weights of q's norm, of k's, and ones.
        cos, sin: (S, D / H / 2) float16. descale: (B, 3, H), what to divide by.
        parts: how many GPUs will attend, each to its part of the heads.

    Returns:
        (3, B, S, H, D / H), e4m3; of several parts (parts, B, S, 3, H / parts, D / H), so that each can be sent as it
        lies there.
    """
    B, tokens, K = x.shape
    N, heads = w.shape[0] // streams, descale.shape[2]
    D = N // 3
    shape = (3, B, tokens, heads) if parts == 1 else (parts, B, tokens, 3, heads // parts)
    out = x.new_empty(*shape, D // heads)
    flat = out.view(out.shape[0], B, tokens, -1)
    for b in range(B):
        for row, rows, stream in _ranges(tokens, text_tokens, streams):
            whole, tiles = _tiles(rows, N, D // parts, D // heads, K, x.device)
            own = slice(stream * N, (streams if rows == tokens else stream + 1) * N)
            _product_kernel[(tiles["PROGRAMS"],)](
                x[b, row:], w[own], x_scale[b, row:], w_scale[own], bias[own], flat[0, b, row:], descale, cos[row:],
                sin[row:], norms[stream:], descale[b], rows, text_tokens, whole, flat.shape[3], flat.stride(0), N, K,
                *tiles.values(), True, 0, w[own].shape[0] // N, D, D // heads, parts, EPS, E4M3_MAX, num_warps=8,
                num_stages=3)
    return out


@qkv_product.register_fake
def _(x, x_scale, w, w_scale, bias, norms, cos, sin, descale, text_tokens, streams, parts=1):
    B, tokens, heads, head = *x.shape[:2], descale.shape[2], w.shape[0] // streams // 3 // descale.shape[2]
    shape = (3, B, tokens, heads) if parts == 1 else (parts, B, tokens, 3, heads // parts)
    return x.new_empty(*shape, head)


@torch.library.custom_op("flux_faster::products", mutates_args=())
def products(x: Tensor, tensor_scales: Tensor, scales: list[int], w: list[Tensor], w_scale: list[Tensor],
             bias: list[Tensor], text_tokens: int) -> Tensor:
    """x w^T + bias by cuBLAS, one scale a tensor, with a w for text's rows and one for image's, or one for all.

    cuBLAS and a kernel of its own for the residual, 0.274 + 0.025 ms, are faster here than a product like the above
    that adds it in its registers, 0.353 ms (H100, 4,352 x 15,360 x 3,072).

    Args:
        x: (B, S, K) e4m3; scales: for each w, which of tensor_scales (3, 4) its rows of x have.
        w: (N, K) e4m3 each, w_scale: () each, bias: (N,) bf16 each.

    Returns:
        (B, S, N), bf16.
    """
    B, tokens, K = x.shape
    out = x.new_empty(B, tokens, w[0].shape[0], dtype=torch.bfloat16)
    if len(w) == 1:
        parts = [(x.view(B * tokens, K), out.view(B * tokens, -1), 0)]
    else:
        parts = [(x[b, rows], out[b, rows], i) for b in range(B)
                 for i, rows in enumerate((slice(text_tokens), slice(text_tokens, None)))]
    for rows, into, i in parts:
        torch._scaled_mm(rows, w[i].t(), tensor_scales[scales[i], 0], w_scale[i], bias=bias[i],
                         out_dtype=torch.bfloat16, use_fast_accum=True, out=into)
    return out


@products.register_fake
def _(x, tensor_scales, scales, w, w_scale, bias, text_tokens):
    return x.new_empty(*x.shape[:2], w[0].shape[0], dtype=torch.bfloat16)


# --- the same in plain torch: what the kernels are tested against, and what runs on a CPU ---

def _to_e4m3(x: Tensor) -> Tensor:
    return x.clamp(-E4M3_MAX, E4M3_MAX).to(E4M3)


def quantize_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """x (..., D) as e4m3 and its scales (...), float32."""
    scale = x.float().abs().amax(-1).clamp(min=1e-12) / E4M3_MAX
    return _to_e4m3(x.float() / scale[..., None]), scale


def _modulated(x: Tensor, table: Tensor, offset: Tensor, shift: int, scale: int) -> Tensor:
    D = x.shape[-1]
    shift, scale = (table[:, None, int(offset) + i * D:int(offset) + (i + 1) * D].float() for i in (shift, scale))
    return F.layer_norm(x.float(), (D,), eps=EPS) * (1 + scale) + shift


@adaln.register_kernel("cpu")
def adaln_reference(text, image, table, offsets, bounds, qk_scale, shift, scale, length, joint):
    heads = (bounds.shape[1] - 2) // 2
    lengths = table[:, offsets[2:] + length].float()[..., None] * ROUNDING  # (B, stream, 1)
    v = (lengths * bounds[:, 2:2 + heads] + bounds[:, 2 + heads:]).amax(1).clamp(min=1e-12) / E4M3_MAX
    hidden = (lengths[..., 0] * bounds[:, 0] + bounds[:, 1]).amax(0).clamp(min=1e-12) / E4M3_MAX
    scales = torch.cat([ROUNDING * v.max()[None], hidden])
    if joint:
        scales = scales.max().expand(3)
    x = torch.cat([_modulated(part, table, offset, shift, scale)
                   for part, offset in zip((text, image), offsets[:2], strict=True)], 1)
    descale = torch.stack([*(one.expand_as(v) for one in qk_scale), v], 1)
    return *quantize_rows(x), descale, scales[:, None].repeat(1, 4)


@residual_adaln.register_kernel("cpu")
def residual_adaln_reference(text, image, y, gates, table, offsets, bounds, qk_scale, shift, scale, length, joint):
    text, image = gated_residual_reference(text, image, y, gates, table)
    return text, image, *adaln_reference(text, image, table, offsets, bounds, qk_scale, shift, scale, length, joint)


@gated_residual.register_kernel("cpu")
def gated_residual_reference(text, image, y, gates, table):
    D, parts = text.shape[-1], y.split([text.shape[1], image.shape[1]], 1)
    gates = (table[:, None, int(at):int(at) + D].float() for at in gates)
    return tuple((x.float() + gate * part.float()).to(x.dtype)
                 for x, gate, part in zip((text, image), gates, parts, strict=True))


@cast_attention.register_kernel("cpu")
def cast_attention_reference(attention, tensor_scales):
    if attention.dtype != E4M3:
        attention = _to_e4m3(attention.float() / tensor_scales[0, 0])
    return attention if attention.dim() == 3 else attention.permute(1, 2, 0, 3).flatten(2)


def _rows(x: Tensor, text_tokens: int, streams: int) -> list[int]:
    return [text_tokens, x.shape[1] - text_tokens] if streams == 2 else [x.shape[1]]


def _product(x, x_scale, w, w_scale, bias, text_tokens, streams):
    """float32 (B, S, N): each stream's rows with its own part of the weights."""
    x = (x.float() * x_scale[..., None]).split(_rows(x, text_tokens, streams), 1)
    w, bias = (w.float() * w_scale[:, None]).chunk(streams), bias.float().chunk(streams)
    return torch.cat([part @ own.T + offset for part, own, offset in zip(x, w, bias, strict=True)], 1)


@gelu_product.register_kernel("cpu")
def gelu_product_reference(x, x_scale, w, w_scale, bias, tensor_scales, text_tokens, streams, room):
    hidden = F.gelu(_product(x, x_scale, w, w_scale, bias, text_tokens, streams), approximate="tanh")
    scales = [scale.expand(rows) for rows, scale in zip(_rows(x, text_tokens, streams), tensor_scales[1:, 0],
                                                        strict=False)]
    hidden = _to_e4m3(hidden / torch.cat(scales)[:, None])
    return torch.cat([hidden.new_zeros(*hidden.shape[:2], room), hidden], -1)


@place_attention.register_kernel("cpu")
def place_attention_reference(attention, tensor_scales, hidden):
    cast = cast_attention_reference(attention, tensor_scales)
    hidden[..., :cast.shape[-1]] = cast


@qkv_product.register_kernel("cpu")
def qkv_product_reference(x, x_scale, w, w_scale, bias, norms, cos, sin, descale, text_tokens, streams, parts=1):
    qkv = _product(x, x_scale, w, w_scale, bias, text_tokens, streams).unflatten(-1, (3, descale.shape[2], -1))
    qkv = qkv.permute(2, 0, 1, 3, 4)
    weight = torch.cat([own[:2, None].expand(-1, rows, -1) for own, rows in
                        zip(norms, _rows(x, text_tokens, streams), strict=True)], 1)  # (2, S, D / H)
    qk = qkv[:2] * (qkv[:2].square().mean(-1, keepdim=True) + EPS).rsqrt() * weight[:, None, :, None]
    even, odd, cos, sin = qk[..., 0::2], qk[..., 1::2], cos.float()[:, None], sin.float()[:, None]
    qk = torch.stack([even * cos - odd * sin, odd * cos + even * sin], -1).flatten(-2)
    qkv = _to_e4m3(torch.cat([qk, qkv[2:]]) / descale.transpose(0, 1)[:, :, None, :, None])
    return qkv if parts == 1 else qkv.unflatten(3, (parts, -1)).permute(3, 1, 2, 0, 4, 5).contiguous()


@products.register_kernel("cpu")
def products_reference(x, tensor_scales, scales, w, w_scale, bias, text_tokens):
    x = x.float().split(_rows(x, text_tokens, len(w)), 1)
    return torch.cat([F.linear(part * tensor_scales[which, 0], own.float() * scale, offset.float()).bfloat16()
                      for part, which, own, scale, offset in zip(x, scales, w, w_scale, bias, strict=True)], 1)
