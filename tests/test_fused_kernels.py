"""The Triton kernels of the fused step against plain torch.

On a CPU Triton's interpreter runs the very kernels, in a process of its own, since the variable that asks for it is
read when they are made. Its cast to e4m3 loses the carry when a mantissa rounds up to the next power of two, so the
bounds there are wide, and it knows no assembly (NATIVE is off). It cannot run Gluon: on a CPU the references of the
int8 GEMMs are tested alone, and tests/test_sm90.py compiles the kernels.
"""

import pytest
import torch
import torch.nn.functional as F
from interpreter import INTERPRETED, run_in_the_interpreter

pytest.importorskip("triton", reason="Triton is not installed: pip install triton")

from utils.kernels import casts, gemm, int8_gemm, layer_norm
from utils.kernels.formats import E4M3, E4M3_MAX, EPS, INT8_MAX, quantize_rows, to_e4m3, to_stream, use_torch_memory

if INTERPRETED:  # torch 2.11's wrap_triton takes no interpreted kernel, and a call that nothing traces needs none
    layer_norm.wrap_triton = casts.wrap_triton = lambda kernel: kernel

REFERENCES = vars(layer_norm) | vars(casts) | vars(gemm) | vars(int8_gemm)
HOPPER = [pytest.mark.gpu, pytest.mark.skipif(
    not torch.cuda.is_available() or torch.cuda.get_device_capability()[0] != 9,
    reason="the kernels are made for Hopper GPUs, and PyTorch sees none here")]
DEVICES = (["interpreter"] if INTERPRETED else []) + [pytest.param("cuda", marks=HOPPER)]
# (batch, text tokens, image tokens, D, heads, MLP). ROWS are for kernels whose programs are rows: a batch, a width that
# is no power of two. TILES are for kernels whose programs are tiles: of one stream and of both, tails, small heads,
# shared tiles behind whole ones.
SMALL = (1, 4, 6, 128, 2, 128)
ROWS = [SMALL, (2, 4, 7, 128, 2, 256), (1, 3, 6, 192, 3, 256)]
TILES = [SMALL, (2, 10, 37, 128, 2, 256), (1, 128, 140, 192, 3, 256), (1, 128, 140, 128, 2, 512)]
LARGE = [(1, 256, 1024, 3072, 24, 12288), (2, 77, 333, 384, 3, 1536), (1, 512, 4096, 3072, 24, 12288)]
# Of int8 GEMMs alone: 192 and 960 input columns are no whole steps of 128, 77 text tokens no whole tiles.
ODD = [(2, 77, 300, 192, 3, 256), (2, 77, 333, 960, 15, 1024)]


@pytest.mark.parametrize("tests", [
    pytest.param("interpreter and small", id="small"),
    pytest.param("interpreter and not small", id="others", marks=pytest.mark.slow)])
@pytest.mark.skipif(INTERPRETED, reason="this is the inner run")
def test_kernels_interpreted_equal_their_references(tests):
    run_in_the_interpreter(__file__, tests)


class Case:
    """Inputs of every kernel, made on the CPU from a seed, with a row of zeros and outliers among them."""

    def __init__(self, shape, seed=0):
        self.B, self.T, self.tokens, self.D, self.heads, self.mlp = (*shape[:2], shape[1] + shape[2], *shape[3:])
        self.generator = torch.Generator().manual_seed(seed)
        self.text, self.image = 3 * self.normal(self.B, self.T, self.D), self.normal(self.B, shape[2], self.D)
        self.image[0, 0] = 0
        self.image[0, 1, 5] = 3000
        self.image[0, 2, 5] = -1e5  # more than fp16 holds
        self.text, self.image = to_stream(self.text), to_stream(self.image)
        self.y = (100 * self.normal(self.B, self.tokens, self.D)).bfloat16()
        self.y_scale = 0.01 * 4 ** self.normal(self.B, self.tokens)
        self.bias = (10 * self.normal(2, self.D)).bfloat16()
        self.table = (0.3 * self.normal(self.B, 12 * self.D + 4)).bfloat16()
        for part in (1, 4, 7, 10):
            self.table[:, part * self.D:(part + 1) * self.D] += 1
        self.offsets, self.gates = torch.tensor([0, 6 * self.D]), torch.tensor([2, 8]) * self.D
        self.bounds = self.normal(2, 2 + 2 * self.heads).abs()
        self.qk_scale = torch.tensor([0.03, 0.05])
        self.x, self.x_scale = quantize_rows(self.normal(self.B, self.tokens, self.D))
        self.scale = 0.02 * 4 ** self.normal(self.B, self.tokens)

    def normal(self, *shape):
        return torch.randn(*shape, generator=self.generator)

    def weights(self, rows):
        return *quantize_rows(0.05 * self.normal(rows, self.D)), self.normal(rows).bfloat16()

    def deferred(self, streams):
        """A residual that is yet to be added: `residual_adaln`'s y and what belongs to it."""
        return self.y, self.y_scale, self.bias[:streams].expand(2, -1), self.gates

    def lengths(self):
        return 10 * self.normal(self.B, self.tokens).abs()

    def int8(self, streams, columns, rows):
        """The operands that all int8 GEMMs have: x (B, S, columns), its scales, w (streams * rows, columns), w's."""
        return (*quantize_rows(self.normal(self.B, self.tokens, columns), int8=True),
                *quantize_rows(0.05 * self.normal(streams * rows, columns), int8=True))

    def int8_gemm(self, streams, shifted_from):
        """The arguments of `int8_gemm`. Zero points apply to the columns of x from `shifted_from`."""
        x, _, w, w_scale = self.int8(streams, self.D, self.D)
        zero_point = torch.randint(-128, 0, (self.B, self.tokens), generator=self.generator).float()
        return x, zero_point, w, w_scale, w[:, shifted_from:].sum(1, dtype=torch.float32), self.T, streams

    def int8_gelu_gemm(self, streams):
        return (*self.int8(streams, self.D, self.mlp), self.normal(streams * self.mlp).bfloat16(),
                4 ** self.normal(streams * self.mlp), self.T, streams)

    def int8_qkv_gemm(self, streams):
        head = self.D // self.heads
        norms = torch.ones(streams, 3, head)
        norms[:, :2] += 0.1 * self.normal(streams, 2, head)
        angle = self.normal(self.tokens, head // 2)
        return (*self.int8(streams, self.D, 3 * self.D), self.normal(streams * 3 * self.D).bfloat16(), norms,
                angle.cos().half(), angle.sin().half(), self.T, streams)

    def int8_calls(self):
        """Every int8 GEMM with its arguments, of one stream and of both; and how near a GPU is to the reference."""
        for streams in (1, 2):
            yield int8_gemm.int8_gemm, self.int8_gemm(streams, self.D // 4), 0.002
            yield int8_gemm.int8_gelu_gemm, self.int8_gelu_gemm(streams), 0.004  # its tanh is accurate to 2^-11
            yield int8_gemm.int8_qkv_gemm, self.int8_qkv_gemm(streams), 0.002


def run(op, device, *args, written=None):
    """The kernel's results and the reference's, on the CPU, as lists; of the argument `written`, if they are there."""
    results = []
    for fused in (True, False):
        given = [x.clone() if isinstance(x, torch.Tensor) else x for x in args]
        if fused and device == "cuda":
            use_torch_memory(torch.device("cuda"))
            given = [x.cuda() if isinstance(x, torch.Tensor) else x for x in given]
            found = op(*given)
        elif fused:
            found = op._init_fn(*given)  # past the dispatcher, which would give a CPU tensor to the reference
        else:
            found = REFERENCES[f"{op._name}_reference"](*given)
        found = [] if found is None else list(found) if isinstance(found, tuple) else [found]
        results.append([x.cpu() for x in [*found, *([] if written is None else [given[written]])]])
    return results


def assert_near(found, expected, device, rounding):
    for i, (a, b) in enumerate(zip(found, expected, strict=True)):
        assert a.shape == b.shape and a.dtype == b.dtype
        a, b = a.float(), b.float()
        assert a.isfinite().all()
        error = ((a - b).norm() / b.norm().clamp(min=1e-30)).item()
        assert error < (rounding[i] if device == "cuda" else max(rounding[i], 0.1)), (i, error)


def both(shapes):
    """Shapes for the interpreter and for a GPU, and for a GPU alone FLUX.1's own."""
    return pytest.mark.parametrize("shape", [
        *(pytest.param(one, id="small" if one is SMALL else None) for one in shapes),
        *(pytest.param(one, marks=pytest.mark.gpu) for one in LARGE)])


@pytest.mark.parametrize("device", DEVICES)
@both(ROWS)
def test_adaln_equals_its_reference(device, shape):
    case = Case(shape)
    common = case.table, case.offsets, case.bounds
    found, expected = run(layer_norm.adaln, device, case.text, case.image, *common, 0, 1)
    assert_near(found, expected, device, [0.01, 1e-4, 1e-4, 1e-4])
    zeros = [x[0][0, case.T] for x in (found, expected)]  # x is zero there, its LayerNorm the shift alone
    assert_near(zeros[:1], zeros[1:], device, [0.02])
    for streams in (1, 2):
        found, expected = run(layer_norm.residual_adaln, device, case.text, case.image, *case.deferred(streams),
                              *common, 3, 4)
        assert_near(found, expected, device, [0.003, 0.003, 0.02, 0.003, 0.003, 0.003])
        found, expected = run(layer_norm.gated_residual, device, case.text, case.image, *case.deferred(streams),
                              case.table)
        assert_near(found, expected, device, [0.003, 0.003])
    # The last block of a picture makes the image's tokens alone.
    y, y_scale = case.y[:, case.T:].contiguous(), case.y_scale[:, case.T:].contiguous()
    found, expected = run(layer_norm.gated_residual, device, case.text[:, :0], case.image, y, y_scale,
                          *case.deferred(1)[2:], case.table)
    assert_near(found[1:], expected[1:], device, [0.003])


@pytest.mark.parametrize("device", DEVICES)
@both(ROWS)
def test_adaln_in_int8_equals_its_reference(device, shape):
    case = Case(shape)
    common = case.table, case.offsets, case.bounds, 3, 4, True
    for op, deferred in ((layer_norm.adaln, ()), (layer_norm.residual_adaln, case.deferred(2))):
        found, expected = run(op, device, case.text, case.image, *deferred, *common)
        assert_near(found[:-4], expected[:-4], device, [0.003, 0.003])
        assert found[-4].dtype == torch.int8 and found[-4].int().abs().amax(-1).eq(INT8_MAX).all()
        # A sum or a product that is rounded otherwise can move a value across the middle between two steps.
        apart = (found[-4].int() - expected[-4].int()).abs().float()
        assert apart.max() <= 1 and apart.mean() < 0.02
        for a, b in zip(found[-3:], expected[-3:], strict=True):
            torch.testing.assert_close(a, b, rtol=0.002, atol=1e-6)


@pytest.mark.parametrize("device", DEVICES)
@both(ROWS)
def test_cast_int8_keeps_each_value_to_half_a_step(device, shape):
    """In rows of zeros, rows where attention's or GELU's values dominate, and rows with GELU on one side of zero. A
    value that wrapped would be 256 steps off."""
    case = Case(shape)
    attention = case.normal(case.B, case.tokens, case.D)
    hidden = F.gelu(2 * case.normal(case.B, case.tokens, case.mlp))
    attention[:, 0] = hidden[:, 0] = 0
    attention[:, 1] *= 100
    attention[:, 2] /= 100
    hidden[:, 3] = -hidden[:, 3].abs()
    hidden[:, 4] = hidden[:, 4].abs()
    hidden[:, 5, 1] = 1e4  # a row that one value stretches
    attention[..., 0] = hidden[..., 0] = 0
    attention, hidden = attention.bfloat16(), hidden.bfloat16()
    for parts in ((attention, hidden), (attention, None), (None, hidden)):
        results = run(casts.cast_int8, device, *parts)
        for out, scale, zero_point in results:
            assert (out.dtype, scale.dtype, zero_point.dtype) == (torch.int8, torch.float32, torch.float32)
            plain, shifted = (torch.zeros(case.B, case.tokens, 0) if x is None else x.float() for x in parts)
            steps = out.float().split([plain.shape[2], shifted.shape[2]], 2)
            steps = torch.cat([steps[0], steps[1] - zero_point[..., None]], 2)
            given = torch.cat([plain, shifted], 2)
            assert ((steps - given / scale[..., None]).abs() <= 0.501).all()
            assert (steps[given == 0] == 0).all() and (given == 0).any(-1).all()
            # No step is larger than int8's 254 steps need.
            plain, shifted = F.pad(plain, (0, 1)), F.pad(shifted, (0, 1))
            needed = torch.maximum(plain.abs().amax(-1) / 127, (shifted.amax(-1) - shifted.amin(-1)) / 254)
            torch.testing.assert_close(scale, needed.clamp(min=1e-12), rtol=1e-6, atol=0)
            assert (zero_point == zero_point.round()).all()
        assert all(a.shape == b.shape for a, b in zip(*results, strict=True))


@pytest.mark.parametrize("device", DEVICES)
@both(ROWS)
def test_casts_of_attention_equal_their_references(device, shape):
    case = Case(shape)
    assert_near(*run(casts.cast_attention, device, case.y), device, [0.005, 1e-6])
    hidden = torch.ones(case.B, case.tokens, case.D + case.mlp).to(E4M3)
    own = case.y.float().abs().amax(-1) / E4M3_MAX
    least = own * 4 ** case.normal(case.B, case.tokens)  # half of the rows have a larger one
    found, expected = run(casts.place_attention, device, case.y, least, hidden, written=2)
    assert_near(found, expected, device, [1e-6, 0.005])
    assert (found[1][..., case.D:].float() == 1).all() and not (found[1][..., :case.D].float() == 1).all()
    assert (found[0] >= least).all() and (found[0] > least).any() and (found[0] > 1.01 * own).any()


@pytest.mark.parametrize("device", DEVICES)
@both(TILES)
def test_gelu_gemm_equals_its_reference(device, shape):
    case = Case(shape)
    for streams, room in ((1, case.D), (2, 0)):
        columns = 4 ** case.normal(streams * case.mlp)
        hidden = torch.ones(case.B, case.tokens, room + case.mlp).to(E4M3)
        # The scale of a whole row, so that nothing saturates.
        scale = case.scale * columns.max()
        [found], [expected] = run(gemm.gelu_gemm, device, case.x, case.x_scale, *case.weights(streams * case.mlp),
                                  columns, scale, hidden, case.T, streams, written=7)
        assert (found[..., :room].float() == 1).all()
        assert_near([found[..., room:]], [expected[..., room:]], device, [0.02])


@pytest.mark.parametrize("device", DEVICES)
@both(TILES)
def test_qkv_gemm_equals_its_reference(device, shape):
    case = Case(shape)
    angle = case.normal(case.tokens, case.D // case.heads // 2)
    for streams in (1, 2):
        norms = torch.ones(streams, 3, case.D // case.heads)
        norms[:, :2] += 0.1 * case.normal(streams, 2, case.D // case.heads)
        bounds = case.bounds if streams == 2 else case.bounds[:1].repeat(2, 1)
        for parts in (1, case.heads):
            found, expected = run(
                gemm.qkv_gemm, device, case.x, case.x_scale, *case.weights(streams * 3 * case.D), norms,
                angle.cos().half(), angle.sin().half(), case.qk_scale, case.lengths(), bounds, case.T, streams,
                parts)
            assert_near(found, expected, device, [0.02, 1e-5, 1e-5])
        assert found[0].shape == (case.heads, case.B, case.tokens, 3, 1, case.D // case.heads)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("gpus", [2, 4])
@both(ROWS)
def test_send_attention_writes_the_part_of_each_gpu(device, shape, gpus):
    """Tensors of this GPU stand for the others' memory, and rank 1 leaves the others' parts as they are."""
    case, there = Case(shape), "cuda" if device == "cuda" else "cpu"
    y = case.y[:, :case.tokens // gpus * gpus].contiguous()
    scale = 1 + torch.arange(case.B)
    memory = [torch.ones(gpus, case.B, y.shape[1] // gpus, case.D, device=there).to(E4M3) for _ in range(gpus)]
    addresses = torch.tensor([x.data_ptr() for x in memory], device=there)
    casts.send_attention(y.to(there), scale.float().to(there), addresses, 1)
    expected = to_e4m3(y.float() / scale[:, None, None])
    for found, part in zip(memory, expected.chunk(gpus, 1), strict=True):
        assert_near([found[1].cpu()], [part], device, [0.001])
        found[1] = 1
        assert (found.float() == 1).all()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU: PyTorch sees none here")
@pytest.mark.parametrize("shape", LARGE)
def test_fp8_gemm_equals_its_reference(shape):
    case = Case(shape)
    for streams in (1, 2):
        w = case.weights(streams * case.D)[0]
        assert_near(*run(gemm.fp8_gemm, "cuda", case.x, w, torch.ones(()), case.T, streams), "cuda", [0.005])


@pytest.mark.parametrize("shape", [pytest.param(one, marks=HOPPER) for one in [*TILES, *ODD, *LARGE]])
def test_int8_gemms_equal_their_references(shape):
    for op, args, bound in Case(shape).int8_calls():
        assert_near(*run(op, "cuda", *args), "cuda", [bound])


@pytest.mark.parametrize("heads", [pytest.param(heads, marks=HOPPER) for heads in (2, 4)])
@pytest.mark.parametrize("shared", [2, 4])
def test_int8_gemms_share_tiles(monkeypatch, heads, shared):
    """Five programs compute the first half of the tiles alone, and `shared` of them each tile after those."""
    def shares(rows, columns, block_n, most, device):
        tiles = -(-rows // 128) * (columns // block_n)
        asked.append(min(shared, most))
        return tiles // 2, tiles, asked[-1], 5

    asked = []
    monkeypatch.setattr(int8_gemm, "_shares", shares)
    for op, args, bound in Case((1, 128, 140, 256, heads, 512)).int8_calls():
        assert_near(*run(op, "cuda", *args), "cuda", [bound])
    assert set(asked) == {2, shared}


@pytest.mark.parametrize("streams", [1, 2])
@pytest.mark.parametrize("shape", [TILES[1], ODD[0]])
def test_int8_references_equal_float64(shape, streams):
    """Of the numbers that the operands stand for: all that is lost is the rounding of the result to bf16."""
    case = Case(shape)

    def exact(x, scale, w, w_scale, *_):
        """x w^T of each stream's tokens, (B, S, N)."""
        x, w = x.double() * scale[..., None], (w.double() * w_scale[:, None]).chunk(streams)
        parts = x.split([case.T, case.tokens - case.T] if streams == 2 else [case.tokens], 1)
        return [part @ own.T for part, own in zip(parts, w, strict=True)]

    def by_stream(values, vectors):
        """Each stream's values with its vector: of columns, (N,)."""
        return zip(values, vectors.double().chunk(streams), strict=True)

    for start in (0, case.D // 3, case.D):
        args = case.int8_gemm(streams, start)
        x, zero_point, w, w_scale, *_ = args
        scale = 0.01 * 4 ** case.normal(case.B, case.tokens)
        shifted = x - zero_point[..., None] * (torch.arange(case.D) >= start)
        found, expected = int8_gemm.int8_gemm(*args) * scale[..., None], torch.cat(exact(shifted, scale, w, w_scale), 1)
        torch.testing.assert_close(found.double(), expected, rtol=2**-8, atol=1e-6)
    args = case.int8_gelu_gemm(streams)
    hidden = [F.gelu(part + bias, approximate="tanh") for part, bias in by_stream(exact(*args), args[4])]
    expected = torch.cat([part * columns for part, columns in by_stream(hidden, args[5])], 1)
    torch.testing.assert_close(int8_gemm.int8_gelu_gemm(*args).double(), expected, rtol=2**-8, atol=1e-5)

    args = case.int8_qkv_gemm(streams)
    norms, cos, sin = args[5:8]
    rotation = torch.complex(cos.double(), sin.double())[:, None, None]
    parts = []
    for (part, bias), own in zip(by_stream(exact(*args), args[4]), norms, strict=True):
        q, k, v = (part + bias).unflatten(2, (3, case.heads, -1)).unbind(2)
        parts.append(torch.stack([F.rms_norm(q, q.shape[-1:], own[0].double(), EPS),
                                  F.rms_norm(k, k.shape[-1:], own[1].double(), EPS), v], 2))
    qkv = torch.cat(parts, 1)
    turned = torch.view_as_complex(qkv[:, :, :2].unflatten(-1, (-1, 2))) * rotation
    expected = torch.cat([torch.view_as_real(turned).flatten(-2), qkv[:, :, 2:]], 2)
    torch.testing.assert_close(int8_gemm.int8_qkv_gemm(*args).double(), expected, rtol=2**-8, atol=1e-5)


def test_quantize_rows_to_int8_keeps_each_value_to_half_a_step():
    x = 4 ** torch.randn(3, 20, 1) * torch.randn(3, 20, 64)
    x[0, 0] = 0
    x[1, 1, 5] = 1e6
    q, scale = quantize_rows(x, int8=True)
    assert (q.dtype, scale.dtype, scale.shape) == (torch.int8, torch.float32, (3, 20))
    assert ((q * scale[..., None] - x).abs() <= 0.501 * scale[..., None]).all()
    largest = q.int().abs().amax(-1)
    assert largest[0, 0] == 0 and (largest.flatten()[1:] == 127).all()


def test_ops_have_fake_kernels_of_the_same_shapes():
    """torch.compile and torch.export do not look into the ops."""
    case = Case(TILES[2])
    angle = case.normal(case.tokens, case.D // case.heads // 2).half()
    for streams, parts in ((1, 1), (2, 1), (1, 3)):
        norms = torch.ones(streams, 3, case.D // case.heads)
        args = (case.x, case.x_scale, *case.weights(streams * 3 * case.D), norms, angle, angle, case.qk_scale,
                case.lengths(), case.bounds, case.T, streams, parts)
        torch.library.opcheck(gemm.qkv_gemm, args, test_utils="test_faketensor")
    hidden = case.x.new_empty(case.B, case.tokens, case.D + case.mlp)
    args = case.x, case.x_scale, *case.weights(case.mlp), torch.ones(case.mlp), case.scale, hidden, case.T, 1
    torch.library.opcheck(gemm.gelu_gemm, args, test_utils="test_faketensor")
    torch.library.opcheck(casts.place_attention, (case.y, case.scale, hidden), test_utils="test_faketensor")
    for streams in (1, 2):
        args = case.x, case.weights(streams * case.D)[0], torch.ones(()), case.T, streams
        torch.library.opcheck(gemm.fp8_gemm, args, test_utils="test_faketensor")
    for op, args, _ in case.int8_calls():
        torch.library.opcheck(op, args, test_utils="test_faketensor")
    for parts in ((case.y, case.y), (case.y, None), (None, case.y)):
        torch.library.opcheck(casts.cast_int8, parts, test_utils="test_faketensor")


@pytest.mark.skipif(INTERPRETED, reason="this is the inner run")
def test_triton_ops_are_known_to_the_compile_cache():
    """It finds them in the op's own source; one launched by a helper would leave stale code in the cache."""
    from torch._library.triton import triton_ops_to_kernels
    ours = {name: found for name, found in triton_ops_to_kernels.items() if name.startswith("flux_faster::")}
    names = "adaln", "residual_adaln", "gated_residual", "cast_attention", "cast_int8"
    assert {f"flux_faster::{name}" for name in names} <= set(ours) and all(ours.values())


def test_adaln_scales_bound_the_next_gemm():
    """No element of a GEMM exceeds the scales that `adaln` allows, whatever the input, and none is useless."""
    for seed in range(5):
        case = Case((2, 12, 20, 128, 2, 256), seed)
        w, w_scale, bias = case.weights(case.mlp)
        exact = w.float() * w_scale[:, None]
        case.bounds[:, 0], case.bounds[:, 1] = exact.norm(dim=1).max(), bias.float().abs().max()
        x, x_scale, scale, lengths = layer_norm.adaln(case.text, case.image, case.table, case.offsets, case.bounds,
                                                      0, 1)
        x = x.float() * x_scale[..., None]
        hidden = (x @ exact.T + bias.float()).abs() / scale[..., None]
        assert hidden.amax(-1).min() > 1e-2 * E4M3_MAX and hidden.max() <= E4M3_MAX
        assert (x.norm(dim=-1) <= lengths).all() and (x.norm(dim=-1) > 0.9 * lengths).all()


@pytest.mark.skipif(INTERPRETED, reason="this is the inner run")
def test_kernel_table_calls_every_op_of_both_blocks(monkeypatch):
    """On small shapes and a CPU, where each op is its reference: what is timed is what the blocks call."""
    from bench import kernels as table

    given, in_int8 = (table.random_inputs(16, 48, 128, 2, 256, "cpu", int8) for int8 in (False, True))
    rows = [table.measure(call, lambda function: function() is None or 2.0)
            for call in table.calls(given) + table.int8_calls(in_int8)]
    assert {row["kernel"].split(",")[0] for row in rows} == {
        "adaln", "qkv_gemm", "attention", "gelu_gemm", "fp8_gemm", "gated_residual", "cast_attention",
        "place_attention", "residual_adaln", "int8_qkv_gemm", "int8_gelu_gemm", "int8_gemm", "cast_int8"}
    assert all(row["error"] < 1e-6 and row["ms"] == 2.0 for row in rows)
    by_name = {(row["block"], row["kernel"]): row for row in rows}
    # 64 tokens, 128 wide, 256 in the MLP, by hand.
    assert by_name["single", "qkv_gemm"]["flops"] == 2 * 64 * 128 * 384
    assert by_name["single", "fp8_gemm, out"]["flops"] == 2 * 64 * 384 * 128
    assert by_name["double", "adaln"]["bytes"] == 64 * 128 * (2 + 1)
    assert by_name["double", "residual_adaln"]["bytes"] == 64 * 128 * (2 + 2 + 2 + 1)
    assert by_name["single", "gelu_gemm"]["bytes"] == 64 * (128 + 256) + 256 * 128
    assert by_name["double", "gelu_gemm"]["bytes"] == 64 * (128 + 256) + 2 * 256 * 128
    assert by_name["double", "fp8_gemm, MLP's down"]["bytes"] == 64 * (256 + 2 * 128) + 2 * 128 * 256
    assert by_name["single", "place_attention"]["bytes"] == by_name["double", "cast_attention"]["bytes"] == 64 * 128 * 3
    assert by_name["both", "attention"]["flops"] == 4 * 64 * 64 * 128
    assert by_name["both int8", "attention, bf16"]["flops"] == 4 * 64 * 64 * 128
    assert by_name["both int8", "attention, bf16"]["bytes"] == 64 * 128 * 4 * 2
    assert by_name["single int8", "int8_qkv_gemm"]["flops"] == 2 * 64 * 128 * 384
    assert by_name["double int8", "int8_qkv_gemm"]["bytes"] == 64 * (128 + 2 * 384) + 2 * 384 * 128
    assert by_name["double int8", "int8_gelu_gemm"]["bytes"] == 64 * (128 + 2 * 256) + 2 * 256 * 128
    assert by_name["single int8", "int8_gemm, out"]["flops"] == 2 * 64 * 384 * 128
    assert by_name["double int8", "int8_gemm, MLP's down"]["bytes"] == 64 * (256 + 2 * 128) + 2 * 128 * 256
    assert by_name["double int8", "int8_gemm, attention's out"]["flops"] == 2 * 64 * 128 * 128
    assert by_name["single int8", "cast_int8"]["bytes"] == 64 * (128 + 256) * (2 + 1)
    assert by_name["double int8", "cast_int8, MLP"]["bytes"] == 64 * 256 * (2 + 1)
    assert len(table.alternatives(given)) == 10
