"""The Triton kernels of the fused step against plain torch.

On a CPU Triton's interpreter runs the very kernels, in a process of its own, since the variable that asks for it is
read when they are made. Its cast to e4m3 loses the carry when a mantissa rounds up to the next power of two, so the
bounds there are wide, and it knows no assembly (NATIVE is off).
"""

import os
import sys
from pathlib import Path

import pytest
import torch
from conftest import run_in_the_interpreter

pytest.importorskip("triton", reason="Triton is not installed: pip install triton")

from utils import fused_kernels as kernels

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICES = (["interpreter"] if INTERPRETED else []) + [
    pytest.param("cuda", marks=[pytest.mark.gpu, pytest.mark.skipif(
        not torch.cuda.is_available() or torch.cuda.get_device_capability()[0] != 9,
        reason="the kernels are made for Hopper GPUs, and PyTorch sees none here")])]
# (batch, text tokens, image tokens, D, heads, MLP): tiles of one stream and of both, tails, small heads, shared tiles
# behind whole ones, FLUX.1's own.
SHAPES = [(2, 10, 37, 128, 2, 256), (1, 128, 140, 192, 3, 256), (1, 128, 140, 128, 2, 512)]
LARGE = [(1, 256, 1024, 3072, 24, 12288), (2, 77, 333, 384, 3, 1536), (1, 512, 4096, 3072, 24, 12288)]


@pytest.mark.skipif(INTERPRETED, reason="this is the inner run")
@pytest.mark.skipif(torch.__version__ < "2.12", reason="torch 2.11's wrap_triton takes no interpreted kernel")
def test_kernels_in_the_interpreter():
    run_in_the_interpreter(__file__)


class Case:
    """Inputs of every kernel, made on the CPU from a seed, with a row of zeros and outliers among them."""

    def __init__(self, shape, seed=0):
        self.B, self.T, self.tokens, self.D, self.heads, self.mlp = (*shape[:2], shape[1] + shape[2], *shape[3:])
        self.generator = torch.Generator().manual_seed(seed)
        self.text, self.image = 3 * self.normal(self.B, self.T, self.D), self.normal(self.B, shape[2], self.D)
        self.text, self.image = self.text.bfloat16(), self.image.bfloat16()
        self.image[0, 0] = 0
        self.image[0, 1, 5] = 3000
        self.y = self.normal(self.B, self.tokens, self.D).bfloat16()
        self.table = (0.3 * self.normal(self.B, 12 * self.D + 4)).bfloat16()
        self.table[:, -4:] = (20 * self.normal(self.B, 4).abs()).bfloat16()
        self.offsets = torch.tensor([0, 6 * self.D, 12 * self.D, 12 * self.D + 2])
        self.bounds = self.normal(2, 2 + 2 * self.heads).abs()
        self.qk_scale = torch.tensor([0.03, 0.05])
        self.x, self.x_scale = kernels.quantize_rows(self.normal(self.B, self.tokens, self.D))
        self.scales = torch.tensor([0.02, 0.03, 0.04])[:, None].repeat(1, 4)

    def normal(self, *shape):
        return torch.randn(*shape, generator=self.generator)

    def weights(self, rows):
        return *kernels.quantize_rows(0.05 * self.normal(rows, self.D)), self.normal(rows).bfloat16()


def run(op, device, *args):
    """The kernel's results and the reference's, on the CPU, as lists."""
    if device == "cuda":
        kernels.use_torch_memory(torch.device("cuda"))
        args_there = [x.cuda() if isinstance(x, torch.Tensor) else x for x in args]
        found = op(*args_there)
    else:
        found = op._init_fn(*args)  # past the dispatcher, which would give a CPU tensor to the reference
    expected = getattr(kernels, f"{op._name}_reference")(*args)
    return [[x.cpu() for x in (part if isinstance(part, tuple) else (part,))] for part in (found, expected)]


def placed(device, attention, case):
    """What `place_attention` and its reference make of a tensor of ones."""
    there = "cuda" if device == "cuda" else "cpu"
    expected, found = (torch.ones(case.B, case.tokens, case.D + case.mlp).to(kernels.E4M3) for _ in range(2))
    kernels.place_attention_reference(attention, case.scales, expected)
    place, found = (kernels.place_attention if device == "cuda" else kernels.place_attention._init_fn), found.to(there)
    place(attention.to(there), case.scales.to(there), found)
    assert (found[..., case.D:].float() == 1).all() and not (expected[..., :case.D].float() == 1).all()
    return [found.cpu()], [expected]


def assert_near(found, expected, device, rounding):
    for i, (a, b) in enumerate(zip(found, expected, strict=True)):
        if a.shape == (3, 4):
            a, b = a[:, :1], b[:, :1]
        assert a.shape == b.shape and a.dtype == b.dtype
        a, b = a.float(), b.float()
        assert a.isfinite().all()
        error = ((a - b).norm() / b.norm().clamp(min=1e-30)).item()
        assert error < (rounding[i] if device == "cuda" else max(rounding[i], 0.1)), (i, error)


def both(shapes, large):
    return pytest.mark.parametrize("shape", [*shapes, *(pytest.param(one, marks=pytest.mark.gpu) for one in large)])


@pytest.mark.parametrize("device", DEVICES)
@both(SHAPES, LARGE)
def test_adaln(device, shape):
    case = Case(shape)
    common = case.table, case.offsets, case.bounds, case.qk_scale
    for joint in (False, True):
        found, expected = run(kernels.adaln, device, case.text, case.image, *common, 0, 1, 1, joint)
        assert_near(found, expected, device, [0.01, 1e-4, 1e-5, 1e-5])
        zeros = [x[0][0, case.T] for x in (found, expected)]  # x is zero there, its LayerNorm the shift alone
        assert_near(zeros[:1], zeros[1:], device, [0.02])
        gates = torch.tensor([2, 8]) * case.D  # another block's: nothing but the table says where
        found, expected = run(kernels.residual_adaln, device, case.text, case.image, case.y, gates, *common, 3, 4, 0,
                              joint)
        assert_near(found, expected, device, [0.003, 0.003, 0.02, 0.003, 1e-5, 1e-5])
    found, expected = run(kernels.gated_residual, device, case.text, case.image, case.y, gates, case.table)
    assert_near(found, expected, device, [0.003, 0.003])


@pytest.mark.parametrize("device", DEVICES)
@both(SHAPES, LARGE)
def test_products(device, shape):
    case = Case(shape)
    found, expected = run(kernels.cast_attention, device, case.y, case.scales)
    assert_near(found, expected, device, [0.001])
    # As several GPUs send it: before the cast and after it.
    parts = torch.stack(case.y.chunk(case.heads, -1))
    cast, sent = kernels.cast_attention(case.y, case.scales), kernels.cast_attention(parts, case.scales)
    assert torch.equal(sent.float(), cast.float())
    for part in (parts, torch.stack(cast.chunk(case.heads, -1))):
        found, expected = run(kernels.cast_attention, device, part, case.scales)
        assert_near(found, expected, device, [0.001])
        assert_near(*placed(device, part, case), device, [0.001])
    assert_near(*placed(device, case.y, case), device, [0.001])
    for streams, room in ((1, case.D), (2, 0)):
        weights = case.weights(streams * case.mlp)
        results = run(kernels.gelu_product, device, case.x, case.x_scale, *weights, case.scales, case.T, streams, room)
        assert_near(*([x[..., room:] for x in result] for result in results), device, [0.02])
    angle = case.normal(case.tokens, case.D // case.heads // 2)
    descale = 0.02 + 0.02 * torch.rand(case.B, 3, case.heads, generator=case.generator)
    for streams in (1, 2):
        norms = torch.ones(streams, 3, case.D // case.heads)
        norms[:, :2] += 0.1 * case.normal(streams, 2, case.D // case.heads)
        found, expected = run(kernels.qkv_product, device, case.x, case.x_scale, *case.weights(streams * 3 * case.D),
                              norms, angle.cos().half(), angle.sin().half(), descale, case.T, streams)
        assert_near(found, expected, device, [0.02])
        found, expected = run(kernels.qkv_product, device, case.x, case.x_scale, *case.weights(streams * 3 * case.D),
                              norms, angle.cos().half(), angle.sin().half(), descale, case.T, streams, case.heads)
        assert_near(found, expected, device, [0.02])
        assert found[0].shape == (case.heads, case.B, case.tokens, 3, 1, case.D // case.heads)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("gpus", [2, 4])
@both(SHAPES, LARGE)
def test_attention_is_written_into_each_gpus_memory(device, shape, gpus):
    """Tensors of this GPU stand for the others' memory, and rank 1 leaves the others' parts as they are."""
    case, there = Case(shape), "cuda" if device == "cuda" else "cpu"
    y = case.y[:, :case.tokens // gpus * gpus].contiguous().to(there)
    memory = [torch.ones(gpus, case.B, y.shape[1] // gpus, case.D, device=there).to(kernels.E4M3) for _ in range(gpus)]
    addresses = torch.tensor([x.data_ptr() for x in memory], device=there)
    kernels.send_attention(y, case.scales.to(there), addresses, 1)
    expected = kernels.cast_attention_reference(y.cpu(), case.scales)
    for found, part in zip(memory, expected.chunk(gpus, 1), strict=True):
        assert_near([found[1].cpu()], [part], device, [0.001])
        found[1] = 1
        assert (found.float() == 1).all()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU: PyTorch sees none here")
@pytest.mark.parametrize("shape", LARGE)
def test_cublas_products(shape):
    case = Case(shape)
    for streams in (1, 2):
        w, scale, bias = ([], [], [])
        for _ in range(streams):
            own, rows, offset = case.weights(case.D)
            w, scale, bias = [*w, own], [*scale, rows.mean()], [*bias, offset]
        args = case.x, case.scales, list(range(streams)), w, scale, bias, case.T
        expected = kernels.products_reference(*args)
        there = [[x.cuda() for x in arg] if isinstance(arg, list) and not isinstance(arg[0], int) else
                 arg.cuda() if isinstance(arg, torch.Tensor) else arg for arg in args]
        assert_near([kernels.products(*there).cpu()], [expected], "cuda", [0.005])


def test_products_say_what_they_give():
    """To torch.compile and torch.export, which do not look into them."""
    case = Case(SHAPES[1])
    angle, descale = case.normal(case.tokens, case.D // case.heads // 2).half(), torch.ones(case.B, 3, case.heads)
    for streams, parts in ((1, 1), (2, 1), (1, 3)):
        norms = torch.ones(streams, 3, case.D // case.heads)
        args = case.x, case.x_scale, *case.weights(streams * 3 * case.D), norms, angle, angle, descale, case.T, streams
        torch.library.opcheck(kernels.qkv_product, (*args, parts), test_utils="test_faketensor")
    for streams, room in ((2, 0), (1, case.D)):
        args = case.x, case.x_scale, *case.weights(streams * case.mlp), case.scales, case.T, streams, room
        torch.library.opcheck(kernels.gelu_product, args, test_utils="test_faketensor")
    hidden = kernels.gelu_product(*args)
    for attention in (case.y, torch.stack(case.y.chunk(3, -1))):
        torch.library.opcheck(kernels.place_attention, (attention, case.scales, hidden), test_utils="test_faketensor")


@pytest.mark.skipif(INTERPRETED, reason="this is the inner run")
def test_the_compile_cache_knows_each_ops_kernels():
    """It finds them in the op's own source; one launched by a helper would leave stale code in the cache."""
    from torch._library.triton import triton_ops_to_kernels
    ours = {name: found for name, found in triton_ops_to_kernels.items() if name.startswith("flux_faster::")}
    assert {f"flux_faster::{name}" for name in ("adaln", "residual_adaln", "gated_residual", "cast_attention")
            } <= set(ours) and all(ours.values())


def test_bounds_hold():
    """No element of a product exceeds what adaln's scales allow, whatever the input: nothing saturates."""
    for seed in range(5):
        case = Case((2, 12, 20, 128, 2, 256), seed)
        shift, stretch = case.table[:, :case.D].float(), 1 + case.table[:, case.D:2 * case.D].float()
        length = case.D**0.5 * stretch.abs().amax(1) + shift.norm(dim=1)
        case.table[:, 12 * case.D:12 * case.D + 4] = (1.004 * length[:, None]).bfloat16()
        case.offsets[1] = 0
        w, w_scale, bias = case.weights(case.mlp)
        exact = w.float() * w_scale[:, None]
        case.bounds[:, 0], case.bounds[:, 1] = exact.norm(dim=1).max(), bias.float().abs().max()
        x, x_scale, _, scales = kernels.adaln(case.text, case.image, case.table, case.offsets, case.bounds,
                                              case.qk_scale, 0, 1, 0, False)
        hidden = (x.float() * x_scale[..., None]) @ exact.T + bias.float()
        assert hidden.abs().max() <= kernels.E4M3_MAX * scales[1, 0]
        assert hidden.abs().max() > 1e-3 * kernels.E4M3_MAX * scales[1, 0], "the bound is useless"


@pytest.mark.skipif(INTERPRETED, reason="this is the inner run")
def test_the_kernel_table_runs_every_op_of_both_blocks():
    """On small shapes and a CPU, where each op is its reference: what is timed is what the blocks call."""
    sys.path.insert(0, str(Path(__file__).parent.parent / "results"))
    import kernels as table

    given = table.random_inputs(16, 48, 128, 2, 256, "cpu")
    rows = [table.measure(call, lambda function: function() is None or 2.0) for call in table.calls(given)]
    assert {row["kernel"].split(",")[0] for row in rows} == {
        "adaln", "qkv_product", "attention", "gelu_product", "products", "gated_residual", "cast_attention",
        "place_attention", "residual_adaln"}
    assert all(row["error"] < 1e-6 and row["ms"] == 2.0 for row in rows)
    by_name = {(row["block"], row["kernel"]): row for row in rows}
    # 64 tokens, 128 wide, 256 in the MLP, by hand.
    assert by_name["single", "qkv_product"]["flops"] == 2 * 64 * 128 * 384
    assert by_name["single", "products, out"]["flops"] == 2 * 64 * 384 * 128
    assert by_name["double", "adaln"]["bytes"] == 64 * 128 * (2 + 1)
    assert by_name["double", "residual_adaln"]["bytes"] == 64 * 128 * (2 + 2 + 2 + 1)
    assert by_name["both", "attention"]["flops"] == 4 * 64 * 64 * 128
    assert len(table.alternatives(given)) == 10
