"""Which techniques are on where: a table of machines against the decisions."""

import argparse
import re
import sys
from dataclasses import replace

import pytest
import torch

from utils import attention, machine, random_weights, techniques
from utils.benchmark_utils import RecipeError, create_parser
from utils.checkpoint import weight_counts
from utils.techniques import GIB, Hardware, bf16_modulations_fit, plan, where_to_build

H100 = Hardware("cuda", (9, 0), False, "NVIDIA H100", 79 * GIB)
L20 = Hardware("cuda", (8, 9), False, "NVIDIA L20", 44 * GIB)
RTX4090 = Hardware("cuda", (8, 9), False, "NVIDIA GeForce RTX 4090", int(23.5 * GIB))
A100 = Hardware("cuda", (8, 0), False, "NVIDIA A100", 79 * GIB)
T4 = Hardware("cuda", (7, 5), False, "Tesla T4", 15 * GIB)
MI300 = Hardware("cuda", (9, 4), True, "AMD Instinct MI300X", 190 * GIB)
CPU = Hardware("cpu")

SCHNELL = random_weights.architecture("FLUX.1-schnell")
DEV = random_weights.architecture("FLUX.1-dev")
LIBSTDCXX_OBSTACLE = machine.libstdcxx_obstacle


@pytest.fixture(autouse=True)
def pretend(monkeypatch):
    """Attention libraries and compilers as a full installation has them; nothing is registered for real."""
    monkeypatch.setattr(attention, "find_library", lambda library: (lambda q, k, v: q, f"a stand-in for {library}"))
    monkeypatch.setattr(attention, "register_library", lambda *_: None)
    monkeypatch.setattr(techniques, "_compiler_obstacle", lambda hardware: None)
    monkeypatch.setattr(machine, "libstdcxx_obstacle", lambda: None)
    monkeypatch.setattr(machine, "header_obstacle", lambda: None)


def decide(hardware, *argv, configs=SCHNELL):
    args = create_parser().parse_args(["--device", hardware.device, *argv])
    return plan(args, configs, hardware)


@pytest.mark.parametrize("hardware, backend, quant", [
    (H100, "fa3", ("float8", "row")),
    (L20, "native", ("float8", "row")),
    (A100, "native", ("int8", "row")),
    (MI300, "aiter", ("float8", "row")),
    (CPU, "native", ("int8", "row")),
])
def test_defaults(hardware, backend, quant):
    chosen = decide(hardware)
    assert (chosen.attention_backend, chosen.quant) == (backend, quant)
    assert chosen.is_on("CUDA graphs") == (hardware.device == "cuda")


@pytest.mark.parametrize("argv, why", [
    ([], None),
    (["--disable_fused_kernels"], "--disable_fused_kernels"),
    (["--quant_granularity", "row"], "not with --quant_granularity row"),
    (["--disable_quant"], "not with --disable_quant"),
    (["--attention_backend", "fa3_bf16"], "not with --attention_backend fa3_bf16"),
    (["--attention_backend", "fa3"], None),
    (["--offload", "model"], "not with --offload model"),
    (["--offload", "group"], "not with --offload group"),
    (["--compile_scope", "whole"], "not with --compile_scope whole"),
    (["--disable_bf16"], "not with --disable_bf16"),
])
def test_fused_kernels_where_they_run(argv, why, monkeypatch):
    """A flag that takes away what they need is no failure of the machine: --strict lets it pass."""
    monkeypatch.setattr(techniques, "find_spec", lambda name: True)
    chosen = decide(H100, *argv, *(["--strict"] if "--offload" not in argv else []))
    assert chosen.is_on("fused kernels") == (why is None)
    if why:
        assert chosen.decisions["fused kernels"].how == why
    else:
        assert chosen.decisions["compile"].how == "VAE, T5; the blocks are kernels already"
    for hardware in (L20, A100, MI300, CPU):
        assert not decide(hardware).is_on("fused kernels")
    assert "sm_90" in decide(L20).decisions["fused kernels"].how


def test_the_fused_vae_where_it_runs(monkeypatch):
    monkeypatch.setattr(techniques, "find_spec", lambda name: True)
    for hardware in (H100, L20, A100):
        assert decide(hardware).is_on("fused VAE")
    for flag in ("--disable_fused_vae", "--disable_channels_last"):
        assert flag in decide(H100, flag, "--strict").decisions["fused VAE"].how
    assert decide(CPU).decisions["fused VAE"] == (False, "no GPU")
    assert not decide(MI300).is_on("fused VAE")


def test_what_is_off_says_why():
    assert "sm_90" in decide(L20).decisions["attention"].how
    assert decide(CPU).decisions["CUDA graphs"] == (False, "no GPU")
    assert decide(H100, "--disable_quant").decisions["quantisation"] == (False, "--disable_quant")


def test_no_bf16_units_means_float32():
    chosen = decide(T4)
    assert chosen.dtype == torch.float32 and not chosen.is_on("bf16")


def test_float32_takes_one_scale_a_tensor():
    assert decide(H100, "--disable_bf16").quant == ("float8", "tensor")


@pytest.mark.parametrize("argv, text", [
    (["--attention_backend", "fa3"], "Hopper"),
    (["--attention_backend", "aiter"], "AMD"),
    (["--quant_dtype", "float8"], "8.9"),
])
def test_wishes_that_an_a100_cannot_fulfil(argv, text):
    with pytest.raises(RecipeError, match=text):
        decide(A100, *argv)


def test_a_backend_of_diffusers_is_checked_and_the_process_left_alone():
    from diffusers.models.attention_dispatch import _AttentionBackendRegistry as registry
    before = registry.get_active_backend()
    with pytest.raises(RecipeError, match="sageattention"):
        decide(H100, "--attention_backend", "sage")
    assert decide(H100, "--attention_backend", "_native_cudnn").attention_backend == "_native_cudnn"
    assert registry.get_active_backend() == before


@pytest.mark.parametrize("hardware, argv", [(A100, ["--quant_granularity", "tensor"]),
                                            (H100, ["--quant_dtype", "int8", "--offload", "group"])])
def test_a_granularity_without_effect_is_refused(hardware, argv):
    with pytest.raises(RecipeError, match="quant_granularity"):
        decide(hardware, *argv)


def test_a_missing_library_is_an_error_only_when_asked_for(monkeypatch):
    monkeypatch.setattr(attention, "find_library", lambda library: (None, "pip install it"))
    assert decide(H100).decisions["attention"] == (False, "SDPA: pip install it")
    with pytest.raises(RecipeError, match="pip install it"):
        decide(H100, "--attention_backend", "fa3")
    with pytest.raises(RecipeError, match="--strict: attention"):
        decide(H100, "--strict")
    assert not decide(H100, "--strict", "--disable_fa3").is_on("attention")


def test_the_cache_decides_between_graphs():
    chosen = decide(H100, "--enable_cache_dit", configs=DEV)
    assert str(chosen.cache).startswith("DBCache F12B12, warm-up 8, at most 8 cached, threshold 0.12")
    assert chosen.decisions["CUDA graphs"].how.endswith("step in 5 segments, between which the cache decides")
    chosen = decide(H100, "--cache_preset", "fast", configs=DEV)
    assert "step in 4 segments" in chosen.decisions["CUDA graphs"].how
    assert decide(H100, configs=DEV).decisions["CUDA graphs"].how.endswith(", step")


def test_the_cache_says_that_it_was_scaled():
    small = DEV | {"transformer": DEV["transformer"] | {"num_layers": 3, "num_single_layers": 5}}
    said = decide(H100, "--enable_cache_dit", configs=small).decisions["step cache"].how
    assert said.startswith("DBCache F2B2, warm-up 8") and said.endswith("(F12B12 in proportion to 8 blocks)")


def test_a_preset_says_its_name_its_options_and_what_they_leave():
    said = decide(H100, "--cache_preset", "fast", configs=DEV).decisions["step cache"].how
    assert said == ("fast, at least 40% computed: DBCache F1B0, warm-up 6, at most any cached, threshold 0.2, "
                    "TaylorSeer order 1, mask 1111110100010000100000100001")
    forced = decide(H100, "--cache_preset", "fast", "--force_cache", configs=DEV).decisions["step cache"].how
    assert forced.endswith("mask 1111110100010000100000100001, whatever the residuals")
    ahead = decide(H100, "--cache_preset", "fast", "--cache_decide_ahead", configs=DEV).decisions["step cache"].how
    assert ahead == said + ", decided a step ahead"
    small = DEV | {"transformer": DEV["transformer"] | {"num_layers": 3, "num_single_layers": 5}}
    said = decide(H100, "--cache_preset", "safe", configs=small).decisions["step cache"].how
    assert said.startswith("safe, at least 69%") and said.endswith("(F8B0 in proportion to 8 blocks)")


def test_extrapolation_leaves_the_step_in_one_graph():
    chosen = decide(H100, "--step_cache", "taylorseer", "--taylorseer_interval", "4", configs=DEV)
    assert chosen.decisions["step cache"].how == ("TaylorSeer over whole steps, order 2, 12 of 28 computed: "
                                                  "1111110100010001000100010001")
    assert chosen.cache is None and chosen.decisions["CUDA graphs"].how.endswith(", step")


def test_offload_switches_graphs_off():
    assert not decide(H100, "--offload", "model").is_on("CUDA graphs")
    group = decide(H100, "--offload", "group", "--text_encoder_quant")
    assert group.quant == ("float8", "row") and not group.is_on("compile") and not group.is_on("CUDA graphs")
    assert decide(A100, "--offload", "group").decisions["quantisation"] == (
        False, "int8 pays only when compiled, which --offload group rules out (--offload text does not)")


@pytest.mark.parametrize("argv", [[], ["--text_encoder_quant"], ["--vae_tiling"]])
def test_with_t5_alone_off_the_gpu_all_else_stays_on(argv, monkeypatch):
    monkeypatch.setattr(techniques, "find_spec", lambda name: True)
    chosen, without = decide(H100, "--offload", "text", *argv), decide(H100, *argv)
    assert chosen.decisions["CUDA graphs"] == (True, "CLIP, VAE decoder, step")
    assert without.decisions["CUDA graphs"] == (True, "text encoders, VAE decoder, step")
    assert chosen.decisions["compile"].how.startswith("VAE; the blocks are kernels already")
    assert chosen.decisions["offload"] == (True, "T5, layer by layer") and not without.is_on("offload")
    assert {name for name in without.decisions if chosen.is_on(name) != without.is_on(name)} == {"offload"}
    assert chosen.compile_mode == without.compile_mode and chosen.quant == without.quant


def test_parameter_counts_are_flux():
    """Published sizes: 11.9 B transformer, 4.76 B T5 encoder, 84 M VAE, 123 M CLIP text model."""
    counts = weight_counts(DEV)
    assert [round(counts[name] / 1e6, -1) for name in ("transformer", "text_encoder_2", "vae", "text_encoder")] == [
        11900, 4760, 80, 120]
    modules_share = counts["blocks"] / counts["transformer"]
    assert 0.99 < modules_share < 1


def build_on(hardware, *argv):
    args = create_parser().parse_args(["--device", "cuda", *argv])
    return where_to_build(args, SCHNELL, hardware, plan(args, SCHNELL, hardware))


def test_memory_decides_where_weights_are_built():
    assert build_on(H100) == "cuda"
    assert build_on(RTX4090, "--text_encoder_quant") == "cpu"
    assert build_on(H100, "--offload", "model") == "cpu"
    # 16 GiB: with T5 alone off the GPU, but not with the VAE's whole working set besides.
    card = replace(H100, free_bytes=16 * GIB)
    assert build_on(card, "--offload", "text", "--vae_tiling") == "cpu"
    with pytest.raises(RecipeError, match="--vae_tiling"):
        build_on(card, "--offload", "text")
    with pytest.raises(RecipeError, match="--offload text, --offload group"):
        build_on(card, "--text_encoder_quant", "--vae_tiling")


@pytest.mark.parametrize("argv", [["--text_encoder_quant"], ["--offload", "text"], ["--offload", "model"]])
def test_fused_modulations_are_in_bf16_where_3_gib_more_fit(argv):
    """Wherever the weights are built: offloading builds on the CPU beside a GPU that has room."""
    args = create_parser().parse_args(["--device", "cuda", *argv])
    chosen = plan(args, SCHNELL, H100)
    assert bf16_modulations_fit(args, SCHNELL, H100, chosen)
    in_float8 = next(gib for gib in range(80) if _fits(args, chosen, gib))
    more = next(gib for gib in range(80) if bf16_modulations_fit(args, SCHNELL, replace(H100, free_bytes=gib * GIB),
                                                                 chosen)) - in_float8
    assert more == 3


def _fits(args, chosen, gib):
    try:
        return where_to_build(args, SCHNELL, replace(H100, free_bytes=gib * GIB), chosen) == "cpu"
    except RecipeError:
        return False


def test_int8_keeps_the_modulation_in_bf16():
    """3.2 B weights: an A100's or 3090's transformer takes 14 GiB, not 11."""
    card = Hardware("cuda", (8, 6), False, "NVIDIA GeForce RTX 3090", int(23.5 * GIB))
    with pytest.raises(RecipeError, match=r"transformer 14\.\d"):
        build_on(card, "--text_encoder_quant")
    assert build_on(card, "--text_encoder_quant", "--vae_tiling") == "cpu"


def test_not_enough_memory_says_what_is_needed_what_is_free_and_what_helps():
    with pytest.raises(RecipeError, match=r"(?s)needed.*transformer 11\.\d.*23\.5 GiB are free.*--text_encoder_quant"):
        build_on(RTX4090)
    with pytest.raises(RecipeError, match="drop --disable_quant"):
        build_on(RTX4090, "--disable_quant", "--text_encoder_quant")


def test_the_namespace_is_left_alone():
    args = create_parser().parse_args(["--device", "cuda"])
    before = argparse.Namespace(**vars(args))
    plan(args, SCHNELL, H100)
    assert args == before


EXPORT, COMPILE, DISABLED = (["--compile_export_mode", mode] for mode in ("export_aoti", "compile", "disabled"))
TO_COMPILE = [
    (CPU, ["--compile_scope", "whole"], "--compile_scope whole (a package is of one kind of block)"),
    (H100, ["--offload", "model"], "--offload model (it moves weights, "),
    (H100, ["--context_parallel", "ulysses"], "--context_parallel ulysses (its exchanges"),
    (CPU, ["--attention_backend", "_native_math"], "--attention_backend _native_math (torch.export forgets"),
    (MI300, [], "torch.export does not work on AMD"),
]


@pytest.mark.parametrize("hardware, argv, mode, how", [
    (CPU, [], "export_aoti", "blocks, VAE"),
    (H100, [], "export_aoti", "VAE, T5; the blocks are kernels already"),
    (H100, COMPILE, "compile", "VAE, T5; the blocks are kernels already"),
    (H100, ["--vae_tiling"], "compile", "VAE, T5; the blocks are kernels already; torch.compile, not packages: "
                                        "--vae_tiling"),
    (H100, ["--cache_preset", "fast", "--num_inference_steps", "28"], "export_aoti", "VAE, T5; the blocks are kernels"
                                                                                     " already"),
    (H100, ["--disable_fused_kernels"], "compile", "; torch.compile, not packages: without the fused kernels"),
    (H100, ["--text_encoder_quant"], "compile", "; torch.compile, not packages: of T5 in int8"),
    (L20, ["--text_encoder_quant"], "compile", "; torch.compile, not packages: without the fused kernels"),
    (L20, COMPILE, "compile", "blocks, VAE, T5"),
    (MI300, [], "compile", "; torch.compile, not packages: torch.export does not work on AMD"),
    (L20, EXPORT, "export_aoti", "blocks, VAE, T5"),
    (H100, [*EXPORT, "--attention_backend", "fa3_bf16"], "export_aoti", "blocks, VAE, T5"),
    (CPU, ["--attention_backend", "native"], "export_aoti", "blocks, VAE"),
    (CPU, ["--use-cached-model"], "export_aoti", "blocks, VAE"),
    (CPU, ["--re-export"], "export_aoti", "blocks, VAE"),
    (CPU, ["--package-from", "x"], "export_aoti", "blocks, VAE"),
    (CPU, ["--vae_tiling", "--re-export"], "export_aoti", "blocks, VAE"),
    (CPU, COMPILE, "compile", "blocks, VAE"),
    (MI300, COMPILE, "compile", "blocks, VAE, T5"),
    (CPU, [*COMPILE, "--compile_scope", "whole"], "compile", "whole, VAE"),
    (CPU, DISABLED, "disabled", "--compile_export_mode disabled"),
    (H100, ["--offload", "group"], "disabled", "--offload group hooks into every layer"),
    (CPU, ["--vae_tiling"], "compile", "blocks, VAE; torch.compile, not packages: --vae_tiling"),
    *((CPU, argv, "compile", f"; torch.compile, not packages: {why}") for _, argv, why in TO_COMPILE if argv),
], ids=str)
def test_packages_are_the_default_where_they_can_be(hardware, argv, mode, how):
    chosen = decide(hardware, *argv)
    assert chosen.compile_mode == mode and chosen.is_on("compile") == (mode != "disabled")
    assert (how in chosen.decisions["compile"].how if how[0] == ";" else how == chosen.decisions["compile"].how)


@pytest.mark.parametrize("flags", [EXPORT, ["--use-cached-model"], ["--re-export"], ["--package-from", "x"]], ids=str)
@pytest.mark.parametrize("hardware, argv, why", [*TO_COMPILE, (H100, ["--offload", "group"], "--offload group")],
                         ids=str)
def test_packages_asked_for_by_name_are_packages_or_an_error(hardware, argv, why, flags):
    with pytest.raises(RecipeError, match=f"^{re.escape(' '.join(flags[:1]))}.*{re.escape(why)}"):
        decide(hardware, *argv, *flags)


def test_strict_minds_what_the_machine_lacks_not_what_a_flag_takes_away(monkeypatch):
    monkeypatch.setattr(techniques, "find_spec", lambda name: True)
    for argv in (["--compile_scope", "whole"], ["--vae_tiling"], ["--attention_backend", "_native_cudnn"]):
        assert decide(H100, *argv, "--strict").compile_mode == "compile"
    assert decide(H100, "--strict", *EXPORT).compile_mode == "export_aoti"
    monkeypatch.setattr(machine, "libstdcxx_obstacle", lambda: "no libstdc++.so")
    with pytest.raises(RecipeError, match=r"no libstdc\+\+\.so"):
        decide(H100, "--strict", *EXPORT)
    for argv in (COMPILE, ["--disable_fused_kernels"], ["--text_encoder_quant"]):
        assert decide(H100, "--strict", *argv).compile_mode == "compile"
    for hardware, argv in ((H100, []), (CPU, ["--disable_fused_vae", "--disable_fa3", "--disable_fused_kernels"])):
        with pytest.raises(RecipeError, match=r"--strict: exported packages.*no libstdc\+\+\.so"):
            decide(hardware, "--strict", *argv)
    monkeypatch.setattr(techniques, "_compiler_obstacle", lambda hardware: "no C++ compiler")
    with pytest.raises(RecipeError, match=r"--strict: compile is on by default.*no C\+\+ compiler"):
        decide(H100, "--strict")


def test_without_a_compiler_nothing_is_made_and_what_is_there_is_loaded(monkeypatch):
    monkeypatch.setattr(techniques, "_compiler_obstacle", lambda hardware: "no C++ compiler")
    assert decide(CPU).decisions["compile"] == (False, "no C++ compiler") and decide(CPU).compile_mode == "disabled"
    for flags in (EXPORT, ["--re-export"]):
        with pytest.raises(RecipeError, match=r"no C\+\+ compiler"):
            decide(CPU, *flags)
    for flags in (["--use-cached-model"], ["--package-from", "x"]):
        assert decide(CPU, *flags).compile_mode == "export_aoti"


@pytest.mark.skipif(sys.platform != "linux", reason="libstdc++ is Linux's")
def test_a_compiler_that_would_link_its_own_libstdcxx_makes_no_packages(tmp_path, monkeypatch):
    """g++ names a library that it finds by its path, and one that it does not find by the name it was given."""
    monkeypatch.setattr(machine, "libstdcxx_obstacle", LIBSTDCXX_OBSTACLE)
    compiler = tmp_path / "g++"
    compiler.write_text('#!/bin/sh\necho "${1#-print-file-name=}"\n')
    compiler.chmod(0o755)
    monkeypatch.setenv("CXX", str(compiler))
    for hardware in (CPU, H100):
        with pytest.raises(RecipeError, match=r"g\+\+ finds no libstdc\+\+\.so.*apt install"):
            decide(hardware, "--compile_export_mode", "export_aoti")
        decide(hardware, "--compile_export_mode", "export_aoti", "--use-cached-model")
    chosen = decide(CPU)
    assert chosen.compile_mode == "compile" and "not packages: " in chosen.decisions["compile"].how
    assert "finds no libstdc++.so" in chosen.decisions["compile"].how
    compiler.write_text('#!/bin/sh\necho "/usr/lib/${1#-print-file-name=}"\n')
    assert decide(CPU).compile_mode == "export_aoti"
