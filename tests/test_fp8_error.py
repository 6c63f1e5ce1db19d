"""The program that measures recipes on reshaped weights: on a CPU, with the smallest models."""

import json
import sys

import pytest
import torch
from conftest import skip_without_float8_products

pytest.importorskip("triton", reason="Triton is not installed: pip install triton")

from bench import fp8_error, trained_like
from bench.quality import capture_step
from utils.attention import use_attention_library
from utils.common import RecipeError
from utils.kernels.formats import quantize_rows
from utils.pipeline_utils import call_kwargs

SMALL = ["--ckpt", "tiny-flux-dev", "--random_weights", "1+2", "--device", "cpu", "--height", "64", "--width", "64"]


@pytest.fixture
def measured(monkeypatch, tmp_path, float8_on_cpu):
    """The record that the program writes."""
    def run(*argv):
        path = tmp_path / "out.json"
        monkeypatch.setattr(sys, "argv", ["fp8_error", *argv, "--output-json", str(path)])
        fp8_error.main()
        return json.loads(path.read_text())
    return run


def test_fp8_error_measures_every_recipe_on_every_case(measured):
    skip_without_float8_products()
    record = measured(*SMALL, "--cases", "plain", "neuron=3000,head=300", "--recipes", "bf16", "fp8_attention", "fused",
                      "fused_int8")
    assert [row["case"] for row in record["rows"]] == ["plain", "neuron=3000,head=300"]
    for row in record["rows"]:
        errors = row["errors"]
        assert set(errors) == {"bf16", "fp8_attention", "fused", "fused_int8"}
        assert 0.001 < errors["bf16"] < errors["fp8_attention"] < errors["fused"] < 0.05
        assert errors["bf16"] < errors["fused_int8"] < errors["fused"]
    assert record["gates"] == fp8_error.RANDOM_GATES and record["environment"]["packages"]["torch"]
    assert record["environment"]["argv"][-2:] == ["--output-json", "out.json"]  # without its folder


class RowLinear(torch.nn.Module):
    """A Linear with per-row float8 weights and inputs, multiplied out in float32: torchao's takes seconds on a CPU."""

    def __init__(self, linear):
        super().__init__()
        weight, scale = quantize_rows(linear.weight)
        self.weight, self.bias = weight.float() * scale[:, None], linear.bias.float()

    def forward(self, x):
        rows, scale = quantize_rows(x)
        return torch.nn.functional.linear(rows.float() * scale[..., None], self.weight, self.bias).to(x.dtype)


def as_float8_row(transformer, device):
    """`fp8_error.as_float8_row`, faster."""
    use_attention_library(transformer, "fa3")
    for block in (*transformer.transformer_blocks, *transformer.single_transformer_blocks):
        for parent in list(block.modules()):
            for name, child in parent.named_children():
                if isinstance(child, torch.nn.Linear):
                    setattr(parent, name, RowLinear(child))


@pytest.mark.slow
def test_fp8_error_of_the_fused_recipe_is_below_that_of_float8_in_every_case(measured, monkeypatch):
    """Families and mixtures of bench/trained_like.py at all strengths: no worse than per-row float8."""
    monkeypatch.setitem(fp8_error.RECIPES, "float8_row", as_float8_row)
    record = measured(*SMALL, "--recipes", "float8_row", "fused", "fused_float8_modulations")
    assert len(record["rows"]) == 1 + len(trained_like.cases())
    for row in record["rows"]:
        errors = row["errors"]
        assert errors["fused"] < 1.05 * errors["float8_row"], row
        assert errors["fused_float8_modulations"] < 1.2 * errors["float8_row"], row


@pytest.mark.slow
def test_fp8_error_pictures_are_compared_with_those_of_bf16(measured):
    skip_without_float8_products()
    record = measured("--ckpt", "tiny-flux", "--device", "cpu", "--pictures", "8", "--cases", "head=300", "--recipes",
                      "bf16", "float8_row", "fused")
    psnr = record["rows"][0]["psnr"]
    assert psnr["bf16"] > 60 and 20 < psnr["float8_row"] < 45 and psnr["fused"] > psnr["float8_row"] - 1
    assert record["gates"] == 1


def test_fp8_error_pictures_of_random_weights_are_refused(measured):
    with pytest.raises(RecipeError, match="tiny-flux"):
        measured("--random_weights", "--device", "cpu", "--pictures", "2")


def test_measure_leaves_the_model_as_it_was(build, make_args):
    pipeline = build("tiny-flux-dev", torch.bfloat16, "1+1")
    inputs = capture_step(pipeline, call_kwargs(pipeline, make_args("--ckpt", "tiny-flux-dev")))
    transformer = pipeline.transformer
    before = {name: value.clone() for name, value in transformer.state_dict().items()}
    fp8_error.measure(pipeline, inputs, {"massive": 500.0}, ["bf16", "fused"], 64, 0, 1)
    assert pipeline.transformer is transformer
    assert all(torch.equal(value, before[name]) for name, value in transformer.state_dict().items())
