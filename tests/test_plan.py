"""Which techniques are on where: a table of machines against the decisions."""

import argparse
import os
import re
import sys
from bisect import bisect_left
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from utils.benchmark_utils import create_parser
from utils.common import RecipeError
from utils.hardware import Hardware, _find_attention, detect
from utils.memory import GIB, bf16_modulations_fit, choose_load_device, weight_counts
from utils.plan import Plan, describe, lines, make_plan
from utils.random_weights import architecture

H100 = Hardware("cuda", (9, 0), False, "NVIDIA H100", 79 * GIB, attention_source="fa3_fwd_interface")
L20 = Hardware("cuda", (8, 9), False, "NVIDIA L20", 44 * GIB)
RTX4090 = Hardware("cuda", (8, 9), False, "NVIDIA GeForce RTX 4090", int(23.5 * GIB))
RTX3090 = Hardware("cuda", (8, 6), False, "NVIDIA GeForce RTX 3090", int(23.5 * GIB))
A100 = Hardware("cuda", (8, 0), False, "NVIDIA A100", 79 * GIB)
T4 = Hardware("cuda", (7, 5), False, "Tesla T4", 15 * GIB)
MI300 = Hardware("cuda", (9, 4), True, "AMD Instinct MI300X", 190 * GIB, attention_source="aiter")
TWO_H100 = replace(H100, processes=2)
CPU = Hardware("cpu")

SCHNELL, DEV, SMALL_DEV = architecture("FLUX.1-schnell"), architecture("FLUX.1-dev"), architecture("FLUX.1-dev", "3+5")


def arguments(hardware, *argv):
    return create_parser(measure=True).parse_args(["--device", hardware.device, *argv])


def decide(hardware, *argv, configs=SCHNELL):
    return make_plan(arguments(hardware, *argv), configs, hardware)


def lacking(hardware, **missing):
    names = {"libstdcxx": "libstdc++"}
    return replace(hardware, missing={names.get(name, name): why for name, why in missing.items()})


def quant(chosen: Plan):
    return (chosen.quantization.dtype, chosen.quantization.granularity) if chosen.quantization.on else None


def build_on(hardware, *argv):
    args = arguments(hardware, *argv)
    return choose_load_device(args, SCHNELL, hardware, make_plan(args, SCHNELL, hardware))


# --- the lines as `optimize` prints them, the one place that pins their wording ---

GOLDEN = Path(__file__).parent / "golden_techniques.txt"
FAST = ["--step_cache", "fast"]
PRINTED = [
    (H100, "schnell", []),
    *((H100, "schnell", flags.split()) for flags in (
        "--compile_export_mode compile", "--compile_export_mode disabled", "--compile_scope whole", "--disable_bf16",
        "--disable_cudagraphs", "--disable_fa3", "--disable_fused_kernels", "--disable_quant", "--offload text",
        "--offload model", "--offload group", "--text_encoder_quant", "--vae_tiling",
        "--attention_backend fa3_bf16", "--attention_backend fa3_unscaled", "--attention_backend _native_cudnn",
        "--disable_channels_last", "--quality high", "--quality exact")),
    (TWO_H100, "schnell", ["--context_parallel", "ulysses"]),
    *((H100, "dev", flags.split()) for flags in (
        "--step_cache f12b12", "--step_cache safe", "--step_cache fast", "--step_cache fast --force_cache",
        "--step_cache taylorseer:4")),
    *((H100, "small dev", flags.split()) for flags in ("--step_cache safe", "--step_cache f12b12")),
    (L20, "schnell", []), (L20, "schnell", ["--compile_export_mode", "export_aoti"]),
    (A100, "schnell", []), (A100, "schnell", ["--offload", "group"]), (A100, "schnell", ["--disable_bf16"]),
    (T4, "schnell", []), (MI300, "schnell", []), (MI300, "schnell", ["--quality", "high"]),
    (CPU, "schnell", []), (CPU, "schnell", ["--compile_export_mode", "disabled"]), (CPU, "schnell", ["--vae_tiling"]),
    (CPU, "schnell", ["--quality", "exact"]),
]


def printed() -> str:
    """All lines of a machine without flags, and with flags those that differ."""
    configs, plain, text = {"schnell": SCHNELL, "dev": DEV, "small dev": SMALL_DEV}, {}, []
    for hardware, model, argv in PRINTED:
        found = lines(decide(hardware, *argv, configs=configs[model])).splitlines()
        text += [" ".join([hardware.name, model, *argv]),
                 *(line for line in found if line not in plain.get(hardware.name, []))]
        plain.setdefault(hardware.name, found)
    return "\n".join(text) + "\n"


def test_plan_lines_are_the_golden_ones():
    """After a change of wording: RENEW_GOLDEN=1 python -m pytest -n 0 tests/test_plan.py -k golden"""
    if os.environ.get("RENEW_GOLDEN"):
        GOLDEN.write_text(printed())
    assert printed() == GOLDEN.read_text()


# --- what is on, by fields ---

@pytest.mark.parametrize("hardware, backend, quantization", [
    (H100, "fa3", ("float8", "row")),
    (L20, "native", ("float8", "row")),
    (A100, "native", ("int8", "row")),
    (MI300, "aiter", ("float8", "row")),
    (CPU, "native", None),
], ids=str)
def test_plan_without_flags_goes_by_the_machine(hardware, backend, quantization):
    chosen = decide(hardware)
    assert (chosen.attention.backend, quant(chosen)) == (backend, quantization)
    assert chosen.cuda_graphs.on == (hardware.device == "cuda")


def gear(chosen: Plan):
    return chosen.attention.backend, quant(chosen), chosen.fused_kernels.on


FLOAT8, INT8 = ("float8", "row"), ("int8", "row")
H100_WITHOUT_FA3 = lacking(replace(H100, attention_source=""), attention="pip install it")


@pytest.mark.parametrize("hardware, fast, high, exact", [
    (H100, ("fa3", FLOAT8, True), ("fa3_bf16", INT8, True), ("fa3_bf16", None, False)),
    (H100_WITHOUT_FA3, ("native", FLOAT8, False), ("native", INT8, False), ("native", None, False)),
    (RTX4090, ("native", FLOAT8, False), ("native", INT8, False), ("native", None, False)),
    (A100, ("native", INT8, False), ("native", INT8, False), ("native", None, False)),
    (MI300, ("aiter", FLOAT8, False), ("native", INT8, False), ("native", None, False)),
    (CPU, ("native", None, False), ("native", None, False), ("native", None, False)),
], ids=["H100", "H100 without FA3", "RTX 4090", "A100", "MI300X", "CPU"])
def test_plan_quality_chooses_the_formats(hardware, fast, high, exact):
    assert gear(decide(hardware)) == gear(decide(hardware, "--quality", "fast")) == fast
    assert gear(decide(hardware, "--quality", "high")) == high
    assert gear(decide(hardware, "--quality", "exact")) == exact
    lossless = decide(hardware, "--quality", "exact")
    assert not lossless.lossy() and not lossless.fp8_check.on
    assert decide(hardware, "--quality", "high").fp8_check.on == (hardware is not CPU)


@pytest.mark.parametrize("hardware, argv, expected", [
    (H100, "--quant_dtype int8", ("fa3_bf16", INT8, True)),
    (H100, "--quant_dtype int8 --attention_backend fa3", ("fa3", INT8, False)),
    (H100, "--quant_dtype int8 --attention_backend fa3_bf16", ("fa3_bf16", INT8, True)),
    (H100, "--quant_dtype int8 --quant_granularity row", ("fa3_bf16", INT8, False)),
    (H100, "--attention_backend fa3_bf16", ("fa3_bf16", FLOAT8, False)),
    (H100, "--attention_backend fa3", ("fa3", FLOAT8, True)),
    (H100, "--quality high --quant_dtype float8", ("fa3_bf16", FLOAT8, False)),
    (H100, "--quality high --quant_dtype float8 --attention_backend fa3", ("fa3", FLOAT8, True)),
    (H100, "--quality high --quant_granularity row", ("fa3_bf16", INT8, False)),
    (H100, "--quality high --quant_granularity tensor", ("fa3_bf16", ("float8", "tensor"), False)),
    (H100, "--quality high --disable_quant", ("fa3_bf16", None, False)),
    (H100, "--quality high --attention_backend fa3", ("fa3", INT8, False)),
    (H100, "--quality high --disable_fa3", ("native", INT8, False)),
    (H100, "--quality high --disable_fused_kernels", ("fa3_bf16", INT8, False)),
    (H100, "--quality exact --quant_dtype int8", ("fa3_bf16", INT8, True)),
    (H100, "--quality exact --quant_dtype float8", ("fa3_bf16", FLOAT8, False)),
    (H100, "--quality exact --quant_granularity row", ("fa3_bf16", FLOAT8, False)),
    (H100, "--quality exact --attention_backend fa3", ("fa3", None, False)),
    (H100, "--quality exact --disable_fa3", ("native", None, False)),
    (MI300, "--quant_dtype int8", ("aiter", INT8, False)),
    (MI300, "--quality high --attention_backend aiter", ("aiter", INT8, False)),
    (RTX4090, "--quality high --quant_dtype float8", ("native", FLOAT8, False)),
    (CPU, "--quality high --quant_dtype int8", ("native", INT8, False)),
], ids=lambda value: value if isinstance(value, str) else "")
def test_plan_a_single_flag_wins_over_quality(hardware, argv, expected):
    assert gear(decide(hardware, *argv.split())) == expected


@pytest.mark.parametrize("quality", ["high", "exact"])
def test_plan_quality_leaves_what_is_off_by_default_to_its_flags(quality):
    chosen = decide(H100, "--quality", quality, "--text_encoder_quant", *FAST, configs=DEV)
    assert chosen.text_encoder_quant.on and chosen.step_cache.on


def test_plan_quality_is_an_error_only_with_strict():
    for quality in ("fast", "high", "exact"):
        decide(H100, "--quality", quality, "--strict")
        with pytest.raises(RecipeError, match=r"--strict: attention .*pip install it"):
            decide(H100_WITHOUT_FA3, "--quality", quality, "--strict")
    # AITER computes in fp8 alone, so that its absence is no failure of the machine.
    bare = lacking(MI300, attention="pip install aiter")
    others = ("--disable_fused_vae", "--disable_fused_kernels", "--strict")
    assert gear(decide(bare, "--quality", "high", *others)) == ("native", INT8, False)
    with pytest.raises(RecipeError, match="pip install aiter"):
        decide(bare, *others)


@pytest.mark.parametrize("argv", ["--compile_export_mode disabled", "--offload text --vae_tiling", "--vae_tiling"])
def test_plan_int8_on_the_fused_kernels_needs_no_compilation_of_the_blocks(argv):
    for asked in (["--quality", "high"], ["--quant_dtype", "int8"]):
        chosen = decide(H100, *asked, *argv.split(), "--strict")
        assert gear(chosen) == ("fa3_bf16", INT8, True) and not chosen.inductor_flags.on
        assert not chosen.compile.on or chosen.compile.scope == "none"
    packaged = decide(H100, "--quality", "high").compile
    assert (packaged.mode, packaged.scope, packaged.with_vae, packaged.with_t5) == ("export_aoti", "none", True, True)


def test_plan_int8_without_the_fused_kernels_pays_only_when_compiled():
    uncompiled = ["--compile_export_mode", "disabled", "--disable_fused_kernels"]
    assert quant(decide(H100, "--quality", "high", *uncompiled)) is None
    assert quant(decide(H100, "--quality", "high", "--offload", "group")) is None
    with pytest.raises(RecipeError, match=r"--quant_dtype int8.*--compile_export_mode"):
        decide(H100, "--quant_dtype", "int8", *uncompiled)


@pytest.mark.parametrize("argv", [[], ["--attention_backend", "fa3"], ["--quality", "high"]], ids=" ".join)
def test_plan_on_hopper_has_the_fused_kernels(argv):
    assert decide(H100, *argv, "--strict").fused_kernels.on


@pytest.mark.parametrize("flag", ["--disable_fused_kernels", "--quant_granularity row", "--disable_quant",
                                  "--attention_backend fa3_bf16", "--offload model", "--offload group",
                                  "--compile_scope whole", "--disable_bf16", "--quality exact"])
def test_plan_with_a_flag_against_the_fused_kernels_names_it_and_strict_lets_it_pass(flag):
    """A flag that takes away what they need is no failure of the machine."""
    chosen = decide(H100, *flag.split(), *(["--strict"] if "--offload" not in flag else []))
    assert not chosen.fused_kernels.on and flag in describe(chosen.fused_kernels)


@pytest.mark.parametrize("hardware", [L20, A100, MI300, CPU], ids=str)
def test_plan_off_hopper_has_no_fused_kernels(hardware):
    assert not decide(hardware).fused_kernels.on


@pytest.mark.parametrize("hardware, on", [(H100, True), (L20, True), (A100, True), (MI300, False), (CPU, False)],
                         ids=str)
def test_plan_fused_vae_is_on_with_an_nvidia_gpu(hardware, on):
    assert decide(hardware).fused_vae.on == on


@pytest.mark.parametrize("flag", ["--disable_fused_vae", "--disable_channels_last"])
def test_plan_with_a_flag_against_the_fused_vae_names_it(flag):
    chosen = decide(H100, flag, "--strict")
    assert not chosen.fused_vae.on and flag in describe(chosen.fused_vae)


def test_plan_disable_quant_quantises_nothing():
    chosen = decide(H100, "--disable_quant")
    assert quant(chosen) is None and not chosen.quantization.on


def test_plan_without_bf16_units_is_in_float32():
    chosen = decide(T4)
    assert chosen.dtype == torch.float32 and not chosen.bf16.on


def test_plan_in_float32_takes_one_scale_a_tensor():
    assert quant(decide(H100, "--disable_bf16")) == ("float8", "tensor")


@pytest.mark.parametrize("argv", [["--attention_backend", "fa3"], ["--attention_backend", "aiter"],
                                  ["--quant_dtype", "float8"]], ids=" ".join)
def test_plan_flag_that_an_a100_cannot_fulfil_is_refused(argv):
    with pytest.raises(RecipeError, match=f"{' '.join(argv)}.*NVIDIA A100"):
        decide(A100, *argv)


def test_plan_backend_of_diffusers_is_checked_without_setting_it():
    from diffusers.models.attention_dispatch import _AttentionBackendRegistry as registry
    before = registry.get_active_backend()
    for backend in ("sage", "native"):
        args = arguments(CPU, "--attention_backend", backend)
        assert detect(args).missing.get("attention") is None  # sage is refused on a CPU without looking for it
    assert _find_attention("sage", H100)[1] and _find_attention("_native_cudnn", H100)[1] is None
    with pytest.raises(RecipeError, match="--attention_backend sage: not here"):
        decide(lacking(H100, attention="not here"), "--attention_backend", "sage")
    assert decide(H100, "--attention_backend", "_native_cudnn").attention.backend == "_native_cudnn"
    assert registry.get_active_backend() == before


@pytest.mark.parametrize("hardware, argv", [(A100, ["--quant_granularity", "tensor"]),
                                            (H100, ["--quant_dtype", "int8", "--offload", "group"])], ids=str)
def test_plan_quantisation_flag_without_effect_is_refused(hardware, argv):
    with pytest.raises(RecipeError, match=argv[0]):
        decide(hardware, *argv)


def test_plan_per_row_float8_without_bf16_is_refused_and_int8_is_per_row_anyway():
    with pytest.raises(RecipeError, match=r"--quant_granularity row.*--disable_bf16"):
        decide(H100, "--quant_granularity", "row", "--disable_bf16")
    assert quant(decide(A100, "--quant_granularity", "row", "--disable_bf16")) == ("int8", "row")


def test_plan_without_an_attention_library_is_refused_only_if_asked_for():
    bare = lacking(H100, attention="pip install it")
    chosen = decide(bare)
    assert chosen.attention.backend == "native" and not chosen.attention.on
    assert "pip install it" in describe(chosen.attention)
    for argv in (["--attention_backend", "fa3"], ["--strict"]):
        with pytest.raises(RecipeError, match=f"{' '.join(argv)}.*pip install it"):
            decide(bare, *argv)
    assert not decide(bare, "--strict", "--disable_fa3").attention.on


# --- step caches ---

def test_plan_step_cache_has_its_options_and_leaves_cuda_graphs_on():
    assert decide(H100, configs=DEV).step_cache.dbcache is None
    chosen = decide(H100, "--step_cache", "f12b12", configs=DEV)
    cache = chosen.step_cache.dbcache
    assert (cache.Fn_compute_blocks, cache.Bn_compute_blocks, cache.max_warmup_steps, cache.max_cached_steps,
            cache.residual_diff_threshold) == (12, 12, 8, 8, 0.12)
    assert chosen.step_cache.on and chosen.cuda_graphs.on
    fast = decide(H100, *FAST, configs=DEV).step_cache.dbcache
    assert (fast.Fn_compute_blocks, fast.Bn_compute_blocks, fast.max_warmup_steps, fast.max_cached_steps,
            fast.residual_diff_threshold, fast.enable_taylorseer, fast.taylorseer_order, fast.steps_computation_mask,
            fast.steps_computation_policy) == (1, 0, 6, -1, 0.2, True, 1, "1111110100010000100000100001", "dynamic")
    forced = decide(H100, *FAST, "--force_cache", configs=DEV).step_cache.dbcache
    assert forced == replace(fast, steps_computation_policy="static")


@pytest.mark.parametrize("name, blocks", [("f12b12", (2, 2)), ("safe", (1, 0))])
def test_plan_step_cache_of_a_small_transformer_computes_fewer_blocks(name, blocks):
    """12 and 8 of FLUX.1's 57 blocks, in proportion to 8."""
    cache = decide(H100, "--step_cache", name, configs=SMALL_DEV).step_cache.dbcache
    assert (cache.Fn_compute_blocks, cache.Bn_compute_blocks) == blocks


def test_plan_taylorseer_extrapolates_whole_steps():
    chosen = decide(H100, "--step_cache", "taylorseer:4", configs=DEV)
    cache = chosen.step_cache
    assert (cache.taylorseer.interval, cache.taylorseer.order) == (4, 2)
    assert cache.mask == "1111110100010001000100010001"
    assert cache.dbcache is None and chosen.step_cache.on and chosen.cuda_graphs.on


# --- the fp8 check ---

@pytest.mark.parametrize("argv, on", [([], True), (["--num_images_per_prompt", "2"], False),
                                      (["--step_cache", "fast"], False),
                                      (["--compile_export_mode", "disabled", "--disable_cudagraphs"], False)], ids=str)
def test_plan_on_several_gpus_checks_the_step_of_the_warm_up(argv, on):
    """Only the finished recipe shards the tokens, and the reference's step is one image's first."""
    assert decide(TWO_H100, "--context_parallel", "auto", *argv, configs=DEV).fp8_check.on == on
    assert decide(H100, *argv, configs=DEV).fp8_check.on


# --- text tokens ---

def test_plan_more_text_tokens_than_the_model_was_trained_with_are_refused():
    assert decide(H100, "--max_sequence_length", "128").settings.max_sequence_length == 128
    assert decide(H100, "--max_sequence_length", "512", configs=DEV).settings.max_sequence_length == 512
    with pytest.raises(RecipeError, match=r"--max_sequence_length 512.* 256 "):
        decide(H100, "--max_sequence_length", "512")


# --- kept weights ---

def test_plan_keeps_the_fused_weights_of_checkpoints_alone():
    assert decide(H100, "--keep_quantized").kept_weights.on and not decide(H100).kept_weights.on
    assert decide(H100, "--keep_quantized", "--quality", "high").kept_weights.on
    for argv in (["--disable_fused_kernels"], ["--random_weights"], ["--ckpt", "tiny-flux"], ["--step_error"],
                 ["--quality", "exact"]):
        with pytest.raises(RecipeError, match="--keep_quantized"):
            decide(H100, *argv, "--keep_quantized")


# --- memory ---

def test_plan_offload_switches_off_what_cannot_follow_moving_weights():
    assert not decide(H100, "--offload", "model").cuda_graphs.on
    group = decide(H100, "--offload", "group", "--text_encoder_quant")
    assert quant(group) == ("float8", "row") and not group.compile.on and not group.cuda_graphs.on
    assert quant(decide(A100, "--offload", "group")) is None  # int8, which pays only when compiled


@pytest.mark.parametrize("argv", [[], ["--text_encoder_quant"], ["--vae_tiling"]], ids=" ".join)
def test_plan_offload_text_changes_nothing_else(argv):
    chosen, without = decide(H100, "--offload", "text", *argv), decide(H100, *argv)
    before = without.techniques()
    assert {name for name, technique in chosen.techniques().items() if technique.on != before[name].on} == {
        "offload", "fp8 check"}  # the bf16 reference step would need T5 and the transformer on the GPU
    assert chosen.compile.mode == without.compile.mode and quant(chosen) == quant(without)


def test_weight_counts_are_those_of_flux():
    """Published sizes: 11.9 B transformer, 4.76 B T5 encoder, 84 M VAE, 123 M CLIP text model."""
    counts = weight_counts(DEV)
    assert [round(counts[name] / 1e6, -1) for name in ("transformer", "text_encoder_2", "vae", "text_encoder")] == [
        11900, 4760, 80, 120]
    assert 0.99 < counts["blocks"] / counts["transformer"] < 1


def test_where_to_build_goes_by_free_memory():
    assert build_on(H100) == "cuda"
    assert build_on(RTX4090, "--text_encoder_quant") == "cpu"
    assert build_on(H100, "--offload", "model") == "cpu"
    # 16 GiB: with T5 alone off the GPU, but not with the VAE's whole working set besides.
    card = replace(H100, free_bytes=16 * GIB)
    assert build_on(card, "--offload", "text", "--vae_tiling") == "cpu"
    with pytest.raises(RecipeError, match="--vae_tiling"):
        build_on(card, "--offload", "text")
    with pytest.raises(RecipeError, match=r"--offload text.*--offload group"):
        build_on(card, "--text_encoder_quant", "--vae_tiling")


def test_where_to_build_int8_keeps_the_modulation_in_bf16():
    """3.2 B weights: an A100's or 3090's transformer takes 14 GiB, not 11."""
    with pytest.raises(RecipeError, match=r"transformer 14\.\d"):
        build_on(RTX3090, "--text_encoder_quant")
    assert build_on(RTX3090, "--text_encoder_quant", "--vae_tiling") == "cpu"


def test_where_to_build_without_enough_memory_names_sizes_and_flags():
    with pytest.raises(RecipeError, match=r"(?s)transformer 11\.\d.*\b23\.5 GiB.*--text_encoder_quant"):
        build_on(RTX4090)
    for flag in ("--disable_quant", "--quality exact"):
        with pytest.raises(RecipeError, match=f"drop {flag}"):
            build_on(RTX4090, *flag.split(), "--text_encoder_quant")


@pytest.mark.parametrize("argv, size", [("", "11"), ("--quality high", "11"), ("--quant_dtype int8", "11"),
                                        ("--quality high --disable_fused_kernels", "14"), ("--quality exact", "22")])
def test_where_to_build_int8_on_the_fused_kernels_takes_a_byte_a_weight(argv, size):
    """Modulations included, which torchao's int8 keeps in bf16."""
    with pytest.raises(RecipeError, match=rf"transformer {size}\.\d"):
        build_on(replace(H100, free_bytes=12 * GIB), *argv.split())


@pytest.mark.parametrize("argv", [["--text_encoder_quant"], ["--offload", "text"], ["--offload", "model"],
                                  ["--text_encoder_quant", "--quality", "high"]], ids=" ".join)
def test_bf16_modulations_fit_where_3_gib_more_are_free(argv):
    """Wherever the weights are built: offloading builds on the CPU beside a GPU that has room."""
    args = arguments(H100, *argv)
    chosen = make_plan(args, SCHNELL, H100)
    assert bf16_modulations_fit(args, SCHNELL, H100, chosen)

    def in_float8(card):
        try:
            return bool(choose_load_device(args, SCHNELL, card, chosen))
        except RecipeError:
            return False

    cards = [replace(H100, free_bytes=gib * GIB) for gib in range(80)]
    least = bisect_left(cards, True, key=in_float8)
    in_bf16 = bisect_left(cards, True, key=lambda card: bf16_modulations_fit(args, SCHNELL, card, chosen))
    assert least > 0 and in_bf16 == least + 3


def test_plan_leaves_the_namespace_alone():
    args = arguments(H100)
    before = argparse.Namespace(**vars(args))
    make_plan(args, SCHNELL, H100)
    assert args == before


# --- packages, torch.compile, or neither ---

EXPORT, COMPILE, DISABLED = (["--compile_export_mode", mode] for mode in ("export_aoti", "compile", "disabled"))
# Machine, flags, and what stands against packages there.
AGAINST_PACKAGES = [
    (CPU, ["--compile_scope", "whole"], "--compile_scope whole"),
    (H100, ["--offload", "model"], "--offload model"),
    (H100, ["--context_parallel", "ulysses"], "--context_parallel ulysses"),
    (H100, ["--attention_backend", "_native_math"], "--attention_backend _native_math"),
    (MI300, [], "AMD"),
]


@pytest.mark.parametrize("hardware, argv, mode", [
    (CPU, [], "disabled"),
    (H100, [], "export_aoti"),
    (H100, COMPILE, "compile"),
    (H100, ["--vae_tiling"], "compile"),
    (H100, [*FAST, "--num_inference_steps", "28"], "export_aoti"),
    (H100, ["--disable_fused_kernels"], "compile"),
    (H100, ["--text_encoder_quant"], "compile"),
    (L20, ["--text_encoder_quant"], "compile"),
    (L20, COMPILE, "compile"),
    (L20, EXPORT, "export_aoti"),
    (H100, [*EXPORT, "--attention_backend", "fa3_bf16"], "export_aoti"),
    (CPU, [*EXPORT, "--attention_backend", "native"], "export_aoti"),
    (CPU, ["--quant_dtype", "int8"], "export_aoti"),
    (CPU, ["--use-cached-model"], "export_aoti"),
    (CPU, ["--re-export"], "export_aoti"),
    (CPU, ["--package-from", "x"], "export_aoti"),
    (CPU, ["--vae_tiling", "--re-export"], "export_aoti"),
    (CPU, COMPILE, "compile"),
    (MI300, COMPILE, "compile"),
    (CPU, [*COMPILE, "--compile_scope", "whole"], "compile"),
    (CPU, DISABLED, "disabled"),
    (H100, ["--offload", "group"], "disabled"),
    (CPU, ["--vae_tiling", "--quant_dtype", "int8"], "compile"),
], ids=str)
def test_plan_compile_mode_is_packages_where_they_can_be(hardware, argv, mode):
    chosen = decide(hardware, *argv)
    assert chosen.compile.mode == mode and chosen.compile.on == (mode != "disabled")


@pytest.mark.parametrize("hardware, argv, why", AGAINST_PACKAGES, ids=str)
def test_plan_without_packages_compiles_and_says_why(hardware, argv, why):
    chosen = decide(hardware, *argv)
    assert chosen.compile.mode == "compile" and why in describe(chosen.compile)


@pytest.mark.parametrize("flags", [EXPORT, ["--use-cached-model"], ["--re-export"], ["--package-from", "x"]],
                         ids=" ".join)
@pytest.mark.parametrize("hardware, argv, why", [*AGAINST_PACKAGES, (H100, ["--offload", "group"], "--offload group")],
                         ids=str)
def test_plan_packages_asked_for_that_cannot_be_are_refused(hardware, argv, why, flags):
    with pytest.raises(RecipeError, match=f"^{re.escape(' '.join(flags[:1]))}.*{re.escape(why)}"):
        decide(hardware, *argv, *flags)


def test_plan_vae_tiling_leaves_the_vae_out_of_packages_and_nothing_to_package_is_refused():
    assert not decide(CPU, *EXPORT, "--vae_tiling").compile.with_vae and decide(CPU, *EXPORT).compile.with_vae
    assert decide(CPU, "--vae_tiling", "--quant_dtype", "int8").compile.with_vae  # by torch.compile
    with pytest.raises(RecipeError, match=r"--compile_export_mode export_aoti.*--vae_tiling.*--offload text"):
        decide(H100, *EXPORT, "--vae_tiling", "--offload", "text")


def test_plan_compile_that_a_flag_asks_for_and_offload_forbids_is_refused():
    with pytest.raises(RecipeError, match=r"--compile_export_mode compile.*--offload group"):
        decide(H100, *COMPILE, "--offload", "group")


def test_plan_triton_without_its_c_compiler_has_no_triton_kernels():
    chosen = decide(lacking(H100, triton="no C compiler"))
    assert (chosen.fused_kernels.why, chosen.fused_vae.why) == ("no C compiler", "no C compiler")


@pytest.mark.parametrize("argv", ["--offload model", "--offload group", "--compile_export_mode disabled",
                                  "--vae_tiling", "--offload text"])
def test_plan_strict_lets_every_flag_take_techniques_away(argv):
    """--strict is about the machine."""
    decide(lacking(H100, libstdcxx="no libstdc++.so") if "vae" in argv else H100, *argv.split(), "--strict")


@pytest.mark.parametrize("argv, obstacle", [
    *((argv, None) for argv in (["--compile_scope", "whole"], ["--vae_tiling"],
                                ["--attention_backend", "_native_cudnn"])),
    *((argv, "no libstdc++.so") for argv in (COMPILE, ["--disable_fused_kernels"], ["--text_encoder_quant"])),
], ids=str)
def test_plan_strict_lets_a_flag_take_packages_away(argv, obstacle):
    hardware = lacking(H100, libstdcxx=obstacle) if obstacle else H100
    assert decide(hardware, *argv, "--strict").compile.mode == "compile"


def test_plan_strict_without_what_packages_need_is_refused():
    assert decide(H100, "--strict", *EXPORT).compile.mode == "export_aoti"
    bare = lacking(H100, libstdcxx="no libstdc++.so")
    with pytest.raises(RecipeError, match=r"no libstdc\+\+\.so"):
        decide(bare, "--strict", *EXPORT)
    for hardware, argv in ((bare, []), (lacking(CPU, libstdcxx="no libstdc++.so"),
                                        ["--disable_fused_vae", "--disable_fa3", "--disable_fused_kernels"])):
        with pytest.raises(RecipeError, match=r"--strict.*no libstdc\+\+\.so.*--compile_export_mode compile"):
            decide(hardware, "--strict", *argv)
    with pytest.raises(RecipeError, match=r"--strict.*no C\+\+ compiler.*--compile_export_mode disabled"):
        decide(lacking(H100, compiler="no C++ compiler", libstdcxx="no libstdc++.so"), "--strict")


def test_plan_without_a_compiler_makes_nothing_and_loads_packages():
    bare = lacking(CPU, compiler="no C++ compiler")
    compiles = decide(lacking(H100, compiler="no C++ compiler")).compile
    assert (compiles.on, compiles.why, compiles.mode) == (False, "no C++ compiler", "disabled")
    for flags in (EXPORT, ["--re-export"]):
        with pytest.raises(RecipeError, match=r"no C\+\+ compiler"):
            decide(bare, *flags)
    for flags in (["--use-cached-model"], ["--package-from", "x"]):
        assert decide(bare, *flags).compile.mode == "export_aoti"


@pytest.mark.skipif(sys.platform != "linux", reason="libstdc++ is Linux's")
def test_plan_with_a_compiler_that_links_its_own_libstdcxx_makes_no_packages(tmp_path, monkeypatch):
    """g++ names a library that it finds by its path, and one that it does not find by the name it was given."""
    compiler = tmp_path / "g++"
    compiler.write_text('#!/bin/sh\necho "${1#-print-file-name=}"\n')
    compiler.chmod(0o755)
    monkeypatch.setenv("CXX", str(compiler))
    args = arguments(CPU, "--quant_dtype", "int8")
    for hardware in (CPU, H100):
        found = replace(hardware, missing={"libstdc++": detect(args).missing["libstdc++"]})
        with pytest.raises(RecipeError, match=r"--compile_export_mode export_aoti.*libstdc\+\+\.so.*apt install"):
            decide(found, *EXPORT)
        decide(found, *EXPORT, "--use-cached-model")
    chosen = make_plan(args, SCHNELL, detect(args))
    assert chosen.compile.mode == "compile" and "libstdc++.so" in describe(chosen.compile)
    compiler.write_text('#!/bin/sh\necho "/usr/lib/${1#-print-file-name=}"\n')
    assert make_plan(args, SCHNELL, detect(args)).compile.mode == "export_aoti"
