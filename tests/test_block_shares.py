"""The shares of e4m3 values by block, in tiny-flux-dev: a CPU runs the fused blocks through the kernels' references."""

import copy

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed: pip install triton")

from bench.block_shares import block_shares, shares
from bench.fp8_error import as_fused
from bench.quality import capture_step
from utils.benchmark_utils import create_parser
from utils.fp8_check import run_step
from utils.kernels import fused_blocks
from utils.pipeline_utils import call_kwargs, fuse_projections, load_pipeline

OPS = ("gelu_gemm", "qkv_gemm", "cast_attention", "place_attention")


@pytest.fixture(scope="module")
def fused():
    """A fused transformer and the inputs of its first step."""
    args = create_parser().parse_args(["--ckpt", "tiny-flux-dev", "--device", "cpu", "--quiet"])
    pipeline = load_pipeline(args)
    inputs = capture_step(pipeline, call_kwargs(pipeline, args))
    fuse_projections(pipeline.transformer)
    as_fused(pipeline.transformer, torch.device("cpu"))
    return pipeline.transformer, inputs


@pytest.fixture
def healthy(fused):
    return block_shares(*fused)


def with_bounds(transformer, index, factor):
    """A copy with the bounds of one block multiplied, and the block's name."""
    transformer = copy.deepcopy(transformer)
    doubles = len(transformer.transformer_blocks)
    block = [*transformer.transformer_blocks, *transformer.single_transformer_blocks][index]
    block.bounds.mul_(factor)
    return transformer, f"double {index}" if index < doubles else f"single {index - doubles}"


def worst(rows, tensor, *names):
    return max(rows, key=lambda row: sum(row[tensor][name] for name in names))["block"]


def test_shares_count_small_zero_and_saturated_values():
    values = torch.tensor([0, -0.0, 2**-9, -(2**-7), 2**-6, 1, -416, 448, -448, float("nan")])
    assert shares(values.to(torch.float8_e4m3fn)) == {"below": 0.4, "zero": 0.2, "saturated": 0.3}


def test_block_shares_of_healthy_blocks_are_small(fused, healthy):
    transformer, _ = fused
    assert [row["block"] for row in healthy] == [
        *(f"double {i}" for i in range(len(transformer.transformer_blocks))),
        *(f"single {i}" for i in range(len(transformer.single_transformer_blocks)))]
    for row in healthy:
        assert 0.02 < row["hidden"]["zero"] < row["hidden"]["below"] < 0.4 and row["hidden"]["saturated"] == 0
        assert row["v"]["below"] < 0.005 and row["v"]["saturated"] == 0
        assert row["attention"]["below"] < 0.005
        # The largest value of each of a double block's rows is 448.
        assert 1 / 256 <= row["attention"]["saturated"] < 0.02 or row["block"].startswith("single")


def test_block_shares_are_those_of_the_tensors_that_gemms_and_attention_read(fused, healthy, monkeypatch):
    transformer, inputs = fused
    attended, multiplied = [], []
    attention, fp8_gemm = fused_blocks.attention, fused_blocks.fp8_gemm
    monkeypatch.setattr(fused_blocks, "attention",
                        lambda q, k, v, *rest: attended.append(v.clone()) or attention(q, k, v, *rest))
    monkeypatch.setattr(fused_blocks, "fp8_gemm",
                        lambda x, *rest: multiplied.append(x.clone()) or fp8_gemm(x, *rest))
    run_step(transformer, inputs)
    doubles, width = len(transformer.transformer_blocks), transformer.inner_dim
    for row, v in zip(healthy, attended, strict=True):
        assert row["v"] == shares(v)
    of_doubles, of_singles = multiplied[:2 * doubles], multiplied[2 * doubles:]
    for row, result, hidden in zip(healthy[:doubles], of_doubles[::2], of_doubles[1::2], strict=True):
        assert (row["attention"], row["hidden"]) == (shares(result), shares(hidden))
    for row, hidden in zip(healthy[doubles:], of_singles, strict=True):
        assert (row["attention"], row["hidden"]) == (shares(hidden[..., :width]), shares(hidden[..., width:]))


@pytest.mark.parametrize("index", [0, 1, 3, 7])
def test_block_shares_of_bounds_far_too_wide_name_the_block(fused, index):
    transformer, name = with_bounds(fused[0], index, 1e5)
    rows = block_shares(transformer, fused[1])
    for tensor in ("hidden", "v"):
        assert worst(rows, tensor, "below", "saturated") == worst(rows, tensor, "zero") == name
        assert rows[index][tensor]["below"] == 1
        assert all(row[tensor]["below"] < 0.5 for row in rows if row["block"] != name)


@pytest.mark.parametrize("index", [0, 1, 3, 7])
def test_block_shares_of_bounds_too_narrow_name_the_block(fused, index):
    transformer, name = with_bounds(fused[0], index, 1e-3)
    rows = block_shares(transformer, fused[1])
    for tensor in ("hidden", "v"):
        assert worst(rows, tensor, "below", "saturated") == worst(rows, tensor, "saturated") == name
        assert rows[index][tensor]["saturated"] > 0.4
        assert all(row[tensor]["saturated"] < 0.01 for row in rows if row["block"] != name)


@pytest.mark.parametrize("fails", [False, True])
def test_block_shares_restores_ops_and_hooks_also_after_an_exception(fused, monkeypatch, fails):
    transformer, inputs = fused
    if fails:
        monkeypatch.setattr(fused_blocks, "gated_residual", None)
    before = {name: getattr(fused_blocks, name) for name in OPS}
    if fails:
        with pytest.raises(TypeError):
            block_shares(transformer, inputs)
    else:
        block_shares(transformer, inputs)
    assert all(getattr(fused_blocks, name) is op for name, op in before.items())
    assert not any(module._forward_pre_hooks for module in transformer.modules())
