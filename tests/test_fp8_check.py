"""The check of fp8 against bf16, on tiny-flux: a CPU runs the fused blocks through the kernels' references."""

import math
import re

import pytest
import torch
from conftest import pretend_hopper

pytest.importorskip("triton", reason="Triton is not installed: pip install triton")

from bench import trained_like
from bench.quality import capture_step
from utils import fp8_check, pipeline_utils
from utils.benchmark_utils import flags_over_quality
from utils.common import RecipeError
from utils.fp8_check import BOUND, Fp8Check
from utils.hardware import Hardware
from utils.images import image_parameters, save_image
from utils.kernels import fused_blocks
from utils.many_prompts import is_made
from utils.pipeline_utils import call_kwargs, load_pipeline, optimize
from utils.plan import describe, make_plan
from utils.random_weights import architecture


@pytest.fixture
def on_hopper(monkeypatch):
    """A pipeline, which `optimize` then treats as on a Hopper GPU."""
    pretend_hopper(monkeypatch)
    return load_pipeline


@pytest.fixture
def args(make_args):
    return lambda *argv: make_args("--ckpt", "tiny-flux-dev", "--compile_export_mode", "disabled", *argv)


def test_fp8_check_of_a_recipe_that_holds_is_recorded(on_hopper, args, capfd, tmp_path):
    """The error is that of a step, it reaches record and metadata, and it does not decide whether a picture is made."""
    pipeline = optimize(on_hopper(args()), args())
    errors = pipeline.fp8_check["errors"]
    assert set(errors) == {"first", "middle"} and all(0.01 < error < BOUND for error in errors.values())
    assert pipeline.fp8_check["holds"] and "WARNING" not in capfd.readouterr().err
    assert pipeline.fp8_check["difference"] == pytest.approx(sum(errors.values()) / 2)
    assert f"{50 * sum(errors.values()):.1f} %" in describe(pipeline.plan.fp8_check)
    kwargs = call_kwargs(pipeline, args(), num_inference_steps=1)
    parameters = image_parameters(args(), pipeline, kwargs, "x", 1)
    assert parameters["techniques"]["fp8 check"]["difference"] == pipeline.fp8_check["difference"]
    save_image(pipeline(**kwargs).images[0], tmp_path / "x.png", parameters)
    without = parameters | {"techniques": {name: how for name, how in parameters["techniques"].items()
                                           if name != "fp8 check"}}
    assert is_made(tmp_path / "x.png", without)


def test_fp8_check_of_int8_on_the_fused_kernels_is_closer_to_bf16_than_that_of_fp8(on_hopper, args):
    """6.7 and 2.1 %."""
    fast, high = (optimize(on_hopper(args(*argv)), args(*argv)) for argv in ([], ["--quality", "high"]))
    assert high.plan.quantization.dtype == "int8" and high.plan.fused_kernels.on
    assert 0.005 < high.fp8_check["difference"] < fast.fp8_check["difference"] / 2


def test_fp8_check_of_the_finished_recipe_compares_the_first_step(on_hopper, args):
    """The error after all wrappers is that of the blocks by themselves, though the call starts from other noise."""
    pipeline = on_hopper(args())
    check = Fp8Check(pipeline, call_kwargs(pipeline, args()))
    pipeline = optimize(pipeline, args("--skip_fp8_check"))
    with check.measure_next_call(pipeline.transformer):
        pipeline(**call_kwargs(pipeline, args(), seed=7, num_inference_steps=2))
    check.measure(pipeline.transformer)
    assert check.errors["finished"] == pytest.approx(check.errors["first"], rel=1e-3)
    before = dict(check.errors)
    pipeline(**call_kwargs(pipeline, args(), num_inference_steps=1))
    assert check.errors == before, "hooks are left"


def broken_gemm(monkeypatch):
    """One GEMM's weight scale is 1,000 times too large."""
    init = fused_blocks.FusedSingleBlock.__init__

    def broken(self, *given):
        init(self, *given)
        self.mlp.scale *= 1000

    monkeypatch.setattr(fused_blocks.FusedSingleBlock, "__init__", broken)


def broken_attention(monkeypatch):
    """Attention takes v for 1,000 times what it is."""
    attention = fused_blocks.attention
    monkeypatch.setattr(fused_blocks, "attention",
                        lambda q, k, v, qs, ks, vs, library: attention(q, k, v, qs, ks, 1000 * vs, library))


def broken_row_scale(monkeypatch):
    """LayerNorm's result is divided by a scale 1,000 times too large, and is multiplied by the right one."""
    adaln = fused_blocks.residual_adaln

    def broken(*given):
        text, image, x, *rest = adaln(*given)
        return text, image, (x.float() / 1000).to(x.dtype), *rest

    monkeypatch.setattr(fused_blocks, "residual_adaln", broken)


@pytest.mark.parametrize("breaks", [broken_gemm, broken_attention, broken_row_scale])
def test_fp8_check_of_a_scale_1000_times_too_large_fails(on_hopper, args, monkeypatch, capfd, breaks):
    breaks(monkeypatch)
    pipeline = optimize(on_hopper(args()), args())
    assert pipeline.fp8_check["holds"] is False and not pipeline.fp8_check["difference"] <= BOUND
    printed = capfd.readouterr().err
    assert "WARNING" in printed
    flags = ("--quality high", "--disable_fused_kernels", "--attention_backend fa3_bf16", "--quality exact")
    assert sorted(flags, key=printed.index) == list(flags)  # in the order of what they cost
    with pytest.raises(RecipeError, match="--strict"):
        optimize(on_hopper(args()), args("--strict", "--disable_cudagraphs", "--disable_gpu_postprocess",
                                         "--disable_fused_vae", "--disable_inductor_tuning_flags"))


def test_fp8_check_of_nan_fails(on_hopper, args):
    pipeline = on_hopper(args())
    check = Fp8Check(pipeline, call_kwargs(pipeline, args()))
    check.errors = {"first": 0.01, "middle": math.nan}
    assert math.isnan(check.difference) and not check.holds
    check.errors = {"first": 0.01, "middle": 0.02, "finished": 0.5}
    assert check.difference == pytest.approx(0.5) and not check.holds


HOPPER = Hardware("cuda", (9, 0), False, "NVIDIA H100", 80 * 2**30, attention_source="flash_attn_interface")
L20 = Hardware("cuda", (8, 9), False, "NVIDIA L20", 44 * 2**30)
A100 = Hardware("cuda", (8, 0), False, "NVIDIA A100", 80 * 2**30)
MI300 = Hardware("cuda", (9, 4), True, "AMD Instinct MI300X", 190 * 2**30, attention_source="aiter")
CURES = {"high": "--quality high", "fused": "--disable_fused_kernels", "attention": "--attention_backend fa3_bf16",
         "exact": "--quality exact"}


@pytest.mark.parametrize("machine, argv, expected", [
    (HOPPER, "", "high fused attention exact"),
    (HOPPER, "--quality high", "fused exact"),
    (HOPPER, "--quality high --compile_export_mode disabled", "exact"),
    (HOPPER, "--quant_dtype int8", "fused exact"),
    (HOPPER, "--quant_dtype int8 --attention_backend fa3", "high attention exact"),
    (HOPPER, "--quality high --quant_dtype float8", "high exact"),
    (HOPPER, "--quality exact --attention_backend fa3", "high attention exact"),
    (HOPPER, "--disable_quant", "high attention exact"),
    (HOPPER, "--quant_granularity tensor --disable_fa3", "high exact"),
    (L20, "", "high exact"), (L20, "--quant_dtype float8", "high exact"), (A100, "", "exact"),
    (MI300, "", "high exact"), (MI300, "--disable_quant", "high exact"),
    (MI300, "--attention_backend aiter --quant_dtype int8", "high exact"),
], ids=lambda value: value if isinstance(value, str) else value.name)
def test_report_names_flags_that_help(make_args, capfd, machine, argv, expected):
    """Each advice, followed, changes the plan; the first leaves nothing in fp8, and the last nothing in 8 bits."""
    def plan_of(flags):
        return make_plan(make_args("--device", "cuda", *flags), architecture("FLUX.1-dev"), machine)

    def formats(plan):
        return plan.attention.backend, plan.quantization.on and plan.quantization.dtype, plan.fused_kernels.on

    before, check = plan_of(argv.split()), Fp8Check.__new__(Fp8Check)
    check.steps, check.errors = ["first"], {"first": 1.0}
    check.report(before.lossy(), False, flags_over_quality(make_args(*argv.split())))
    advice = re.search(r"in this order: (.*)\.$", capfd.readouterr().err, re.MULTILINE)[1].split("; ")
    for name, text in zip(expected.split(), advice, strict=True):
        flags, _, dropped = text.partition(" (")[0].partition(" without ")
        assert flags == CURES[name]
        kept = argv
        for flag in dropped.split(" and "):
            kept = kept.replace(flag, "")
        after = plan_of([*kept.split(), *flags.split()])
        assert formats(after) != formats(before)
        assert name != "high" or not {"fp8", "fp8 attention"} & after.lossy()
        assert name != "exact" or not (after.lossy() or after.quantization.on)


@pytest.mark.parametrize("argv, why", [(["--skip_fp8_check"], "--skip_fp8_check"),
                                       (["--offload", "text"], "--offload text")])
def test_begin_fp8_check_that_does_not_run_names_the_flag(on_hopper, args, argv, why, monkeypatch):
    pipeline = on_hopper(args())
    chosen = make_plan(args(*argv), pipeline_utils.configs_of(pipeline), HOPPER)
    monkeypatch.setattr(fp8_check, "Fp8Check", None)
    assert pipeline_utils.begin_fp8_check(chosen, pipeline, args(*argv), None) is None
    assert pipeline.fp8_check is None and why in describe(chosen.fp8_check)


def test_optimize_without_fp8_has_no_check(make_args):
    """int8 on a CPU, and bf16, have no fp8 to check."""
    args = make_args("--ckpt", "tiny-flux", "--compile_export_mode", "disabled")
    pipeline = optimize(load_pipeline(args), args)
    assert pipeline.fp8_check is None and not pipeline.plan.fp8_check.on


def test_fp8_check_with_guidance_takes_the_first_call_of_each_step(on_hopper, args):
    pipeline = on_hopper(args())
    given = args("--negative_prompt", "red", "--true_cfg_scale", "2")
    check = Fp8Check(pipeline, call_kwargs(pipeline, given))
    first, middle = (check.steps[name][0] for name in ("first", "middle"))
    assert first["timestep"] > middle["timestep"] > 0
    assert torch.equal(first["encoder_hidden_states"], middle["encoder_hidden_states"])


@pytest.mark.parametrize("mixture", [pytest.param("neuron=3000,head=3000", marks=pytest.mark.slow),
                                     "massive=500,spread=0.5,neuron=300"])
def test_fp8_check_of_reshaped_weights_holds(on_hopper, args, mixture):
    """bench/trained_like.py's mixtures, on the trained checkpoint."""
    pipeline = on_hopper(args())
    inputs = capture_step(pipeline, call_kwargs(pipeline, args()))
    trained_like.reshape(pipeline.transformer, trained_like.parse(mixture), inputs)
    assert optimize(pipeline, args()).fp8_check["holds"]
