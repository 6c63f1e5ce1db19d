"""The Triton kernels of the fused step against plain torch.

On a CPU Triton's interpreter runs the very kernels, in a process of its own, since the variable that asks for it is
read when they are made. Its cast to e4m3 loses the carry when a mantissa rounds up to the next power of two, so the
bounds there are wide, and it knows no assembly (NATIVE is off).
"""

import pytest
import torch
from interpreter import INTERPRETED, run_in_the_interpreter

pytest.importorskip("triton", reason="Triton is not installed: pip install triton")

from utils.kernels import fused_kernels as kernels

if INTERPRETED:  # torch 2.11's wrap_triton takes no interpreted kernel, and a call that nothing traces needs none
    kernels.wrap_triton = lambda kernel: kernel

DEVICES = (["interpreter"] if INTERPRETED else []) + [
    pytest.param("cuda", marks=[pytest.mark.gpu, pytest.mark.skipif(
        not torch.cuda.is_available() or torch.cuda.get_device_capability()[0] != 9,
        reason="the kernels are made for Hopper GPUs, and PyTorch sees none here")])]
# (batch, text tokens, image tokens, D, heads, MLP). ROWS are for kernels whose programs are rows: a batch, a width that
# is no power of two. TILES are for kernels whose programs are tiles: of one stream and of both, tails, small heads,
# shared tiles behind whole ones.
SMALL = (1, 4, 6, 128, 2, 128)
ROWS = [SMALL, (2, 4, 7, 128, 2, 256), (1, 3, 6, 192, 3, 256)]
TILES = [SMALL, (2, 10, 37, 128, 2, 256), (1, 128, 140, 192, 3, 256), (1, 128, 140, 128, 2, 512)]
LARGE = [(1, 256, 1024, 3072, 24, 12288), (2, 77, 333, 384, 3, 1536), (1, 512, 4096, 3072, 24, 12288)]


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
        self.text, self.image = kernels.to_stream(self.text), kernels.to_stream(self.image)
        self.y = (100 * self.normal(self.B, self.tokens, self.D)).bfloat16()
        self.y_scale = 0.01 * 4 ** self.normal(self.B, self.tokens)
        self.bias = (10 * self.normal(2, self.D)).bfloat16()
        self.table = (0.3 * self.normal(self.B, 12 * self.D + 4)).bfloat16()
        for part in (1, 4, 7, 10):
            self.table[:, part * self.D:(part + 1) * self.D] += 1
        self.offsets, self.gates = torch.tensor([0, 6 * self.D]), torch.tensor([2, 8]) * self.D
        self.bounds = self.normal(2, 2 + 2 * self.heads).abs()
        self.qk_scale = torch.tensor([0.03, 0.05])
        self.x, self.x_scale = kernels.quantize_rows(self.normal(self.B, self.tokens, self.D))
        self.scale = 0.02 * 4 ** self.normal(self.B, self.tokens)

    def normal(self, *shape):
        return torch.randn(*shape, generator=self.generator)

    def weights(self, rows):
        return *kernels.quantize_rows(0.05 * self.normal(rows, self.D)), self.normal(rows).bfloat16()

    def deferred(self, streams):
        """A residual that is yet to be added: `residual_adaln`'s y and what belongs to it."""
        return self.y, self.y_scale, self.bias[:streams].expand(2, -1), self.gates

    def lengths(self):
        return 10 * self.normal(self.B, self.tokens).abs()


def run(op, device, *args, written=None):
    """The kernel's results and the reference's, on the CPU, as lists; of the argument `written`, if they are there."""
    results = []
    for fused in (True, False):
        given = [x.clone() if isinstance(x, torch.Tensor) else x for x in args]
        if fused and device == "cuda":
            kernels.use_torch_memory(torch.device("cuda"))
            given = [x.cuda() if isinstance(x, torch.Tensor) else x for x in given]
            found = op(*given)
        elif fused:
            found = op._init_fn(*given)  # past the dispatcher, which would give a CPU tensor to the reference
        else:
            found = getattr(kernels, f"{op._name}_reference")(*given)
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
    found, expected = run(kernels.adaln, device, case.text, case.image, *common, 0, 1)
    assert_near(found, expected, device, [0.01, 1e-4, 1e-4, 1e-4])
    zeros = [x[0][0, case.T] for x in (found, expected)]  # x is zero there, its LayerNorm the shift alone
    assert_near(zeros[:1], zeros[1:], device, [0.02])
    for streams in (1, 2):
        found, expected = run(kernels.residual_adaln, device, case.text, case.image, *case.deferred(streams), *common,
                              3, 4)
        assert_near(found, expected, device, [0.003, 0.003, 0.02, 0.003, 0.003, 0.003])
        found, expected = run(kernels.gated_residual, device, case.text, case.image, *case.deferred(streams),
                              case.table)
        assert_near(found, expected, device, [0.003, 0.003])
    # The last block of a picture makes the image's tokens alone.
    y, y_scale = case.y[:, case.T:].contiguous(), case.y_scale[:, case.T:].contiguous()
    found, expected = run(kernels.gated_residual, device, case.text[:, :0], case.image, y, y_scale,
                          *case.deferred(1)[2:], case.table)
    assert_near(found[1:], expected[1:], device, [0.003])


@pytest.mark.parametrize("device", DEVICES)
@both(ROWS)
def test_casts_of_attention_equal_their_references(device, shape):
    case = Case(shape)
    assert_near(*run(kernels.cast_attention, device, case.y), device, [0.005, 1e-6])
    hidden = torch.ones(case.B, case.tokens, case.D + case.mlp).to(kernels.E4M3)
    own = case.y.float().abs().amax(-1) / kernels.E4M3_MAX
    least = own * 4 ** case.normal(case.B, case.tokens)  # half of the rows have a larger one
    found, expected = run(kernels.place_attention, device, case.y, least, hidden, written=2)
    assert_near(found, expected, device, [1e-6, 0.005])
    assert (found[1][..., case.D:].float() == 1).all() and not (found[1][..., :case.D].float() == 1).all()
    assert (found[0] >= least).all() and (found[0] > least).any() and (found[0] > 1.01 * own).any()


@pytest.mark.parametrize("device", DEVICES)
@both(TILES)
def test_gelu_gemm_equals_its_reference(device, shape):
    case = Case(shape)
    for streams, room in ((1, case.D), (2, 0)):
        columns = 4 ** case.normal(streams * case.mlp)
        hidden = torch.ones(case.B, case.tokens, room + case.mlp).to(kernels.E4M3)
        # The scale of a whole row, so that nothing saturates.
        scale = case.scale * columns.max()
        [found], [expected] = run(kernels.gelu_gemm, device, case.x, case.x_scale, *case.weights(streams * case.mlp),
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
                kernels.qkv_gemm, device, case.x, case.x_scale, *case.weights(streams * 3 * case.D), norms,
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
    memory = [torch.ones(gpus, case.B, y.shape[1] // gpus, case.D, device=there).to(kernels.E4M3) for _ in range(gpus)]
    addresses = torch.tensor([x.data_ptr() for x in memory], device=there)
    kernels.send_attention(y.to(there), scale.float().to(there), addresses, 1)
    expected = kernels.to_e4m3(y.float() / scale[:, None, None])
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
        assert_near(*run(kernels.fp8_gemm, "cuda", case.x, w, torch.ones(()), case.T, streams), "cuda", [0.005])


def test_ops_have_fake_kernels_of_the_same_shapes():
    """torch.compile and torch.export do not look into the ops."""
    case = Case(TILES[2])
    angle = case.normal(case.tokens, case.D // case.heads // 2).half()
    for streams, parts in ((1, 1), (2, 1), (1, 3)):
        norms = torch.ones(streams, 3, case.D // case.heads)
        args = (case.x, case.x_scale, *case.weights(streams * 3 * case.D), norms, angle, angle, case.qk_scale,
                case.lengths(), case.bounds, case.T, streams, parts)
        torch.library.opcheck(kernels.qkv_gemm, args, test_utils="test_faketensor")
    hidden = case.x.new_empty(case.B, case.tokens, case.D + case.mlp)
    args = case.x, case.x_scale, *case.weights(case.mlp), torch.ones(case.mlp), case.scale, hidden, case.T, 1
    torch.library.opcheck(kernels.gelu_gemm, args, test_utils="test_faketensor")
    torch.library.opcheck(kernels.place_attention, (case.y, case.scale, hidden), test_utils="test_faketensor")
    for streams in (1, 2):
        args = case.x, case.weights(streams * case.D)[0], torch.ones(()), case.T, streams
        torch.library.opcheck(kernels.fp8_gemm, args, test_utils="test_faketensor")


@pytest.mark.skipif(INTERPRETED, reason="this is the inner run")
def test_triton_ops_are_known_to_the_compile_cache():
    """It finds them in the op's own source; one launched by a helper would leave stale code in the cache."""
    from torch._library.triton import triton_ops_to_kernels
    ours = {name: found for name, found in triton_ops_to_kernels.items() if name.startswith("flux_faster::")}
    assert {f"flux_faster::{name}" for name in ("adaln", "residual_adaln", "gated_residual", "cast_attention")
            } <= set(ours) and all(ours.values())


def test_adaln_scales_bound_the_next_gemm():
    """No element of a GEMM exceeds the scales that `adaln` allows, whatever the input, and none is useless."""
    for seed in range(5):
        case = Case((2, 12, 20, 128, 2, 256), seed)
        w, w_scale, bias = case.weights(case.mlp)
        exact = w.float() * w_scale[:, None]
        case.bounds[:, 0], case.bounds[:, 1] = exact.norm(dim=1).max(), bias.float().abs().max()
        x, x_scale, scale, lengths = kernels.adaln(case.text, case.image, case.table, case.offsets, case.bounds, 0, 1)
        x = x.float() * x_scale[..., None]
        hidden = (x @ exact.T + bias.float()).abs() / scale[..., None]
        assert hidden.amax(-1).min() > 1e-2 * kernels.E4M3_MAX and hidden.max() <= kernels.E4M3_MAX
        assert (x.norm(dim=-1) <= lengths).all() and (x.norm(dim=-1) > 0.9 * lengths).all()


@pytest.mark.skipif(INTERPRETED, reason="this is the inner run")
def test_kernel_table_calls_every_op_of_both_blocks(monkeypatch):
    """On small shapes and a CPU, where each op is its reference: what is timed is what the blocks call."""
    from bench import kernels as table

    given = table.random_inputs(16, 48, 128, 2, 256, "cpu")
    rows = [table.measure(call, lambda function: function() is None or 2.0) for call in table.calls(given)]
    assert {row["kernel"].split(",")[0] for row in rows} == {
        "adaln", "qkv_gemm", "attention", "gelu_gemm", "fp8_gemm", "gated_residual", "cast_attention",
        "place_attention", "residual_adaln"}
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
    assert len(table.alternatives(given)) == 10
