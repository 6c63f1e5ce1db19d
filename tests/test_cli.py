"""The command line: names, spellings, and what is refused before anything loads."""

import importlib
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import exit_code_of, pretend_world_size

import gen_image
import run_benchmark
from bench.environment import environment, summarize
from utils import pipeline_utils, random_weights
from utils.benchmark_utils import check_args, choose_device, create_parser
from utils.common import RecipeError
from utils.pipeline_utils import load_pipeline

ROOT = Path(__file__).parent.parent

# The usage text that the project started from.
SEED_FLAGS = [
    "--ckpt", "--prompt", "--cache-dir", "--device", "--num_inference_steps", "--output-file", "--trace-file",
    "--disable_bf16", "--compile_export_mode", "--disable_fused_projections", "--disable_channels_last",
    "--disable_fa3", "--disable_quant", "--disable_inductor_tuning_flags", "--enable_cache_dit", "--use-cached-model",
    "--image", "--seed"]


def test_parser_has_every_flag_of_the_seed():
    text = create_parser(measure=True).format_help()
    assert [flag for flag in SEED_FLAGS if not re.search(rf"{flag}\b", text)] == []


@pytest.mark.parametrize("argv", [
    ["--disable-fa3", "--output-file", "a.png", "--compile-export-mode=disabled"],
    ["--disable_fa3", "--output_file", "a.png", "--compile_export_mode=disabled"],
])
def test_parser_dashes_and_underscores_are_the_same_flag(argv):
    args = create_parser(measure=True).parse_args(argv)
    assert (args.disable_fa3, args.output_file, args.compile_export_mode) == (True, "a.png", "disabled")


def test_parser_prompt_with_dashes_and_underscores_is_unchanged():
    assert create_parser(measure=True).parse_args(["--prompt=a-b_c --d-e"]).prompt == "a-b_c --d-e"


def test_parser_default_of_compile_export_mode_is_left_to_the_plan():
    """The default depends on the machine: `utils.plan.plan` decides it."""
    assert create_parser(measure=True).parse_args([]).compile_export_mode is None
    text = " ".join(create_parser(measure=True).format_help().split())
    assert "default: None" not in text and "default: blocks" in text


def test_parser_abbreviated_flag_is_an_error(capsys):
    with pytest.raises(SystemExit) as error:
        create_parser(measure=True).parse_args(["--disable_fa"])
    assert error.value.code == 2 and "--disable_fa" in capsys.readouterr().err


REFUSED_BY_ARGUMENTS = [
    (["--height", "100"], "--height 100.*multiple of 16.*96"),
    (["--width", "0"], "--width 0"),
    (["--num_inference_steps", "0"], "--num_inference_steps 0"),
    (["--num_images_per_prompt", "0"], "--num_images_per_prompt 0"),
    (["--batch_size", "2"], "--batch_size 2.*--prompts-file"),
    (["--batch_size", "0", "--prompts-file", "README.md"], "--batch_size 0"),
    (["--seed", "-1"], "--seed -1"),
    (["--seed", str(2**64)], "2\\^63"),
    (["--true_cfg_scale", "0.5"], "--true_cfg_scale 0.5"),
    (["--revision", "main", "--random_weights"], "--revision main"),
    (["--revision", "main", "--ckpt", "."], "--revision main"),
    (["--offload", "model"], "--offload model.*--device cpu"),
    (["--offload", "text"], "--offload text.*--device cpu"),
    (["--gpu_memory_limit", "8"], "--gpu_memory_limit.*--device cuda"),
    (["--negative_prompt", "x"], "--true_cfg_scale"),
    (["--true_cfg_scale", "3"], "--negative_prompt"),
    (["--disable_quant", "--quant_dtype", "int8"], "--disable_quant.*--quant_dtype"),
    (["--disable_quant", "--quant_granularity", "row"], "--disable_quant.*--quant_granularity"),
    (["--quant_dtype", "int8", "--quant_granularity", "tensor"], "--quant_granularity tensor.*int8"),
    (["--disable_fa3", "--attention_backend", "fa3"], "--disable_fa3.*--attention_backend fa3"),
    (["--use-cached-model", "--compile_export_mode", "compile"], "--use-cached-model.*--compile_export_mode compile"),
    (["--re-export", "--compile_export_mode", "disabled"], "--re-export.*--compile_export_mode disabled"),
    (["--package-from", "x", "--compile_export_mode", "compile"], "--package-from.*--compile_export_mode compile"),
    (["--use-cached-model", "--re-export"], "--use-cached-model.*--re-export"),
    (["--re-export", "--package-from", "x"], "never export"),
    (["--compile_export_mode", "export_aoti", "--compile_scope", "whole"], "export_aoti.*--compile_scope whole"),
    (["--use-cached-model", "--compile_scope", "whole"], "--use-cached-model.*--compile_scope whole"),
    (["--re-export", "--attention_backend", "flex"], "--re-export.*--attention_backend flex"),
    (["--compile_scope", "whole", "--compile_export_mode", "disabled"], "whole.*--compile_export_mode disabled"),
    (["--compile_scope", "whole", "--enable_cache_dit"], "--compile_scope blocks"),
    (["--compile_scope", "whole", "--cache_preset", "fast"], "--step_cache fast.*--compile_scope blocks"),
    (["--enable_cache_dit", "--cache_preset", "fast"], "--step_cache.*f12b12 and fast"),
    (["--cache_preset", "safe", "--cache_dit_config", "cache_config.yaml"], "--step_cache.*safe and cache_config.yaml"),
    (["--step_cache", "taylorseer", "--cache_preset", "fast"], "--step_cache.*taylorseer and fast"),
    (["--step_cache", "taylorseer", "--force_cache"], "--force_cache.*--step_cache"),
    (["--max_sequence_length", "0"], "--max_sequence_length 0"),
    *((["--step_cache", name], f"--step_cache {name}.*taylorseer:N:ORDER") for name in (
        "taylorseer:1", "taylorseer:", "taylorseer:x", "taylorseer:3:-1", "taylorseer:3:2:1", "taylorseer:²")),
    (["--force_cache"], "--force_cache.*--step_cache"),
    (["--revision", "main", "--ckpt", "tiny-flux"], "--revision main"),
    (["--prompts-file", "nowhere.txt"], "nowhere.txt"),
    (["--cache_dit_config", "nowhere.yaml"], "nowhere.yaml"),
    (["--step_cache", "medium"], "--step_cache medium.*safe, balanced, fast, extreme, taylorseer, f12b12"),
    (["--image", "nowhere.png"], "nowhere.png"),
    (["--mask_image", "tests/test_cli.py"], "--mask_image.*--image"),
    (["--strength", "0"], "--strength 0.0.*0.01"), (["--strength", "1.1"], "--strength 1.1"),
]


@pytest.mark.parametrize("argv, text", REFUSED_BY_ARGUMENTS, ids=lambda x: " ".join(x) if isinstance(x, list) else "")
def test_check_args_contradicting_or_impossible_flags_are_refused(make_args, argv, text):
    with pytest.raises(RecipeError, match=f"(?s){text}"):
        check_args(make_args(*argv))


REFUSED_BY_THE_MODEL = [
    (["--ckpt", "tiny-kontext"], "--image PATH_OR_URL"),
    (["--ckpt", "tiny-flux", "--control_image", "IMAGE"], "--control_image.*FLUX.1-Depth-dev"),
    (["--ckpt", "tiny-flux", "--enable_cache_dit"], "8 steps.* 4:"),
    (["--ckpt", "tiny-flux", "--cache_preset", "extreme"], " 4 steps"),
    (["--ckpt", "tiny-flux", "--step_cache", "taylorseer"], "--step_cache taylorseer.* 6 .* 4\\b"),
    (["--ckpt", "tiny-flux-dev", "--cache_dit_config", "TOO_MANY"], "6.*2.* 8:.*Fn_compute_blocks"),
    (["--ckpt", "tiny-flux", "--attention_backend", "fa3"], "--attention_backend fa3.*native"),
    (["--ckpt", "tiny-flux", "--attention_backend", "aiter"], "--attention_backend aiter.*native"),
    (["--ckpt", "tiny-flux", "--attention_backend", "flash3"], "--attention_backend flash3.*fa3.*native"),
    (["--ckpt", "tiny-flux", "--attention_backend", "_native_cudnn"], "_native_cudnn.*: native.*flex"),
    (["--ckpt", "tiny-flux", "--guidance_scale", "3"], "--guidance_scale 3.*--true_cfg_scale"),
    (["--ckpt", "tiny-flux", "--quant_granularity", "tensor"], "--quant_granularity tensor.*int8"),
    (["--ckpt", "tiny-kontext", "--image", "IMAGE"], "--image .*image\\.png"),
    (["--ckpt", "tiny-flux", "--lora", "nowhere.safetensors:0.5"], "--lora nowhere.safetensors"),
    (["--ckpt", "tiny-flux", "--quant_dtype", "float8"], "8.9"),
    (["--ckpt", "tiny-flux", "--quant_dtype", "int8", "--compile_export_mode", "disabled"], "--quant_dtype.*int8"),
    (["--ckpt", "tiny-flux", "--quant_granularity", "row", "--compile_export_mode", "disabled"], "granularity.*int8"),
    (["--ckpt", "tiny-flux", "--strict"], "--strict.*--disable_fused_vae"),
    (["--ckpt", "someone/a-model", "--random_weights"], "a-model.*FLUX.1-dev"),
    (["--ckpt", "FLUX.1-dev", "--random_weights", "2x4"], "2\\+4"),
]


@pytest.mark.parametrize("argv, text", REFUSED_BY_THE_MODEL, ids=lambda x: " ".join(x) if isinstance(x, list) else "")
def test_load_pipeline_impossible_flags_are_refused_before_weights_load(make_args, monkeypatch, tmp_path, argv, text):
    for module, name in ((random_weights, "build"), (pipeline_utils.DiffusionPipeline, "from_pretrained")):
        monkeypatch.setattr(module, name, lambda *_, **__: pytest.fail("weights were loaded first"))
    files = {"IMAGE": tmp_path / "image.png", "TOO_MANY": tmp_path / "cache.yaml"}
    files["IMAGE"].write_bytes(b"")
    files["TOO_MANY"].write_text("Fn_compute_blocks: 6\nBn_compute_blocks: 2\n")
    args = make_args(*[str(files.get(a, a)) for a in argv])
    check_args(args)
    with pytest.raises(RecipeError, match=f"(?s){text}"):
        load_pipeline(args)


def is_one_paragraph_of_a_wrong_checkpoint(stdout: str, stderr: str) -> bool:
    return (stdout == "" and stderr.startswith("error: --ckpt") and "model_index.json" in stderr
            and len(stderr.strip().splitlines()) == 1)


@pytest.mark.parametrize("script", [gen_image, run_benchmark])
def test_scripts_wrong_checkpoint_is_one_paragraph_and_exit_code_2(monkeypatch, tmp_path, capsys, script):
    assert exit_code_of(monkeypatch, script, "--ckpt", str(tmp_path), "--device", "cpu") == 2
    assert is_one_paragraph_of_a_wrong_checkpoint(*capsys.readouterr())


@pytest.mark.slow
def test_gen_image_as_a_process_wrong_checkpoint_is_one_paragraph_and_exit_code_2(tmp_path):
    done = subprocess.run([sys.executable, "gen_image.py", "--ckpt", str(tmp_path), "--device", "cpu"], cwd=ROOT,
                          capture_output=True, text=True, timeout=120)
    assert done.returncode == 2 and is_one_paragraph_of_a_wrong_checkpoint(done.stdout, done.stderr)


@pytest.mark.parametrize("argv, text", [
    (["--compile_scope", "whole", "--offload", "model"], "--compile_scope blocks"),
    (["--compile_export_mode", "export_aoti", "--offload", "model"], "export_aoti.*--offload model"),
    (["--package-from", "x", "--offload", "group"], "--package-from.*--offload group"),
    (["--compile_scope", "whole", "--offload", "group"], "--compile_scope blocks"),
    (["--enable_cache_dit", "--offload", "model"], "--offload text or --offload group"),
    (["--step_cache", "taylorseer", "--offload", "model"], "--offload text or --offload group"),
])
def test_check_args_offload_with_flags_it_excludes_is_refused(make_args, monkeypatch, argv, text):
    with pytest.raises(RecipeError, match=text):
        check_args(make_args("--device", "cuda", *argv))


@pytest.mark.parametrize("argv", [
    ["--compile_scope", "whole"], ["--enable_cache_dit"], ["--use-cached-model"], ["--text_encoder_quant"]], ids=str)
def test_check_args_offload_text_goes_with_flags_that_offload_model_excludes(make_args, monkeypatch, argv):
    check_args(make_args("--device", "cuda", "--offload", "text", *argv))
    if argv != ["--text_encoder_quant"]:
        with pytest.raises(RecipeError, match="--offload"):
            check_args(make_args("--device", "cuda", "--offload", "model", *argv))
    pretend_world_size(monkeypatch, 2)
    with pytest.raises(RecipeError, match=r"--offload text.*--context_parallel"):
        check_args(make_args("--device", "cuda", "--offload", "text", "--context_parallel", "auto"))


@pytest.mark.parametrize("script, argv, code", [
    *((script, ["--help"], 0) for script in ("gen_image.py", "run_benchmark.py", "experiments.py")),
    ("gen_image.py", ["--heigth", "64"], 2), ("gen_image.py", ["--height", "65"], 2),
    ("gen_image.py", ["--output-file", "x.tiff"], 2), ("gen_image.py", ["--prompts-file", "absent"], 2),
    ("gen_image.py", ["--step_cache", "absent.yaml"], 2), ("run_benchmark.py", ["--runs", "0"], 2),
    ("experiments.py", ["run", "h100", "--suite", "absent"], 2)], ids=str)
def test_scripts_help_and_refusals_import_no_large_library(tmp_path, script, argv, code):
    """torch alone takes 1.5 to 5 seconds to import."""
    text = f"""import runpy, sys
sys.path.insert(0, {str(ROOT)!r})
sys.argv = {[script, *argv]!r}
try:
    runpy.run_path({str(ROOT / script)!r}, run_name="__main__")
except SystemExit as end:
    large = {{"torch", "diffusers", "transformers", "numpy", "torchao"}} & set(sys.modules)
    sys.exit(f"imported {{large}}" if large else end.code)
"""
    done = subprocess.run([sys.executable, "-c", text], cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert done.returncode == code and "imported" not in done.stderr, done.stderr


@pytest.mark.parametrize("given, available, device", [(None, True, "cuda"), (None, False, "cpu"), ("cpu", True, "cpu")])
def test_choose_device_is_the_gpu_unless_a_flag_says_otherwise(monkeypatch, given, available, device):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: available)
    args = create_parser().parse_args(["--device", given] if given else [])
    check_args(args)
    choose_device(args)
    assert args.device == device


def test_choose_device_without_a_gpu_refuses_flags_that_need_it(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for argv in (["--device", "cuda"], ["--offload", "text"], ["--gpu_memory_limit", "8"]):
        args = create_parser().parse_args(argv)
        check_args(args)
        with pytest.raises(RecipeError, match=argv[0]):
            choose_device(args)


def test_summarize_values_are_those_of_the_definitions():
    found = summarize([1.0, 2.0, 4.0, 9.0])
    assert found["mean"] == 4.0 and found["median"] == 3.0 and (found["min"], found["max"]) == (1.0, 9.0)
    assert found["variance"] == pytest.approx((9 + 4 + 0 + 25) / 3)
    assert summarize([1.0])["variance"] == 0.0


def test_environment_has_versions_and_command():
    record = environment("cpu")
    assert record["packages"]["torch"] and record["packages"]["diffusers"] and record["argv"] is not None


@pytest.mark.parametrize("module", ["bench.ceilings", "bench.compare", "bench.fidelity",
                                    "bench.fp8_error", "bench.kernels", "experiments", "utils.aoti.__main__"])
def test_help_of_every_program_is_printed(module, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["x", "--help"])
    with pytest.raises(SystemExit) as ended:
        importlib.import_module(module).main()
    assert ended.value.code in (0, None) and "--help" in capsys.readouterr().out
