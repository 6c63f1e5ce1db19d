"""Quantized Linears: which ones, how close, and what float8 makes of zeros."""

import pytest
import torch
from conftest import relative, skip_without_float8_products
from torch._inductor.utils import run_and_get_code
from torchao.quantization import Float8Tensor

from utils.pipeline_utils import fuse_projections
from utils.quantization import Int8Linear, quantize_text_encoder, quantize_transformer


@pytest.mark.parametrize("kind, granularity", [("float8", "row"), ("int8", "row"), ("float8", "tensor")])
def test_quantize_transformer_takes_the_blocks_linears_alone(build, float8_on_cpu, kind, granularity):
    transformer = build("tiny-flux-dev", torch.bfloat16).transformer
    fuse_projections(transformer)
    linears = {n: m for n, m in transformer.named_modules() if isinstance(m, torch.nn.Linear)}
    expected = {n for n in linears if "blocks." in n and not (kind == "int8" and ".norm" in n)}
    count = quantize_transformer(transformer, kind, granularity, torch.device("cpu"))
    found = {n for n, m in transformer.named_modules()
             if isinstance(m, torch.nn.Linear) and type(m.weight) is not torch.nn.Parameter}
    assert found == expected and count == len(expected) == (44 if kind == "float8" else 34)


def test_quantize_transformer_float8_of_zero_rows_is_finite(float8_on_cpu):
    """A zero scale would divide 0 by 0: in a weight's row, in a token's row, in a whole input."""
    skip_without_float8_products()
    torch.manual_seed(0)
    for granularity in ("row", "tensor"):
        model = torch.nn.ModuleDict({"transformer_blocks": torch.nn.ModuleList([torch.nn.Linear(64, 48)])}).bfloat16()
        linear = model["transformer_blocks"][0]
        linear.weight.data[5] = 0
        x = torch.randn(8, 64, dtype=torch.bfloat16)
        x[3] = 0
        expected = linear(x).detach()
        quantize_transformer(model, "float8", granularity, torch.device("cpu"))
        linear = model["transformer_blocks"][0]
        assert isinstance(linear.weight, Float8Tensor)
        with torch.no_grad():
            assert linear(x).isfinite().all() and relative(linear(x), expected) < 0.06
            assert linear(torch.zeros_like(x)).isfinite().all()


def test_quantize_transformer_leaves_128x128_weights_that_read_as_block_scaled(float8_on_cpu):
    model = torch.nn.ModuleDict({"transformer_blocks": torch.nn.ModuleList([torch.nn.Linear(128, 128)])}).bfloat16()
    assert quantize_transformer(model, "float8", "tensor", torch.device("cpu")) == 0
    assert quantize_transformer(model, "float8", "row", torch.device("cpu")) == 1


def test_quantize_text_encoder_is_close(build):
    pipeline = build("tiny-flux", torch.bfloat16)
    with torch.no_grad():
        expected = pipeline.encode_prompt("a cat", max_sequence_length=64)[0]
        quantize_text_encoder(pipeline.text_encoder_2, torch.device("cpu"))
        found = pipeline.encode_prompt("a cat", max_sequence_length=64)[0]
    assert relative(found, expected) < 0.03
    kinds = {type(m) for m in pipeline.text_encoder_2.modules()}
    assert Int8Linear in kinds and torch.nn.Linear not in kinds


def test_int8_linear_weights_are_within_half_a_step():
    linear = torch.nn.Linear(48, 32).bfloat16()
    with torch.no_grad():
        linear.weight[3] = 0
        linear.weight[5] *= 1000
        found = Int8Linear(linear, linear.weight.device)
        step = found.scale * found.columns
        assert ((found.weight * step - linear.weight.float()).abs() <= step * 0.501).all()
        # No coarser than one scale a row would be.
        assert (step <= 1.01 * linear.weight.float().abs().amax(dim=1, keepdim=True).clamp(min=1e-12) / 127).all()
        x = torch.randn(7, 48).bfloat16()
        assert found(x).dtype == torch.bfloat16 and relative(found(x), linear(x)) < 0.01


def test_quantize_text_encoder_moves_quantised_weights_alone(build):
    """It would be 9.5 GB there before it is 4.9, on cards that have them not. `meta` stands in for the GPU."""
    t5 = build("tiny-flux").text_encoder_2
    linears = [m for m in t5.modules() if isinstance(m, torch.nn.Linear)]
    quantize_text_encoder(t5, torch.device("meta"))
    assert {linear.weight.device.type for linear in linears} == {"cpu"}
    assert {m.weight.device.type for m in t5.modules() if isinstance(m, Int8Linear)} == {"meta"}


@pytest.mark.slow
def test_int8_linear_compiled_avoids_the_kernel_for_single_tokens(compiler):
    """inductor makes `_weight_int8pack_mm` of `x @ weight.to(x.dtype) * scale`: seconds instead of milliseconds."""
    linear = Int8Linear(torch.nn.Linear(64, 64).bfloat16(), torch.device("cpu"))
    with torch.no_grad():
        _, code = run_and_get_code(torch.compile(linear), torch.randn(256, 64).bfloat16())
    assert "int8pack" not in "".join(code)


def test_quantize_transformer_leaves_inductors_flags_alone(build, float8_on_cpu):
    """torchao would switch coordinate descent on behind --disable_inductor_tuning_flags."""
    before = torch._inductor.config.get_config_copy()
    quantize_transformer(build("tiny-flux", torch.bfloat16).transformer, "float8", "row", torch.device("cpu"))
    quantize_text_encoder(build("tiny-flux", torch.bfloat16).text_encoder_2, torch.device("cpu"))
    assert torch._inductor.config.get_config_copy() == before
