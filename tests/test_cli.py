"""The command line: names, spellings, and what is refused before anything loads."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import pretend_launched

from utils import benchmark_utils, pipeline_utils, random_weights
from utils.benchmark_utils import RecipeError, create_parser, summarize
from utils.checks import check_args
from utils.pipeline_utils import load_pipeline

ROOT = Path(__file__).parent.parent

# The usage text that the project started from.
SEED_FLAGS = [
    "--ckpt", "--prompt", "--cache-dir", "--device", "--num_inference_steps", "--output-file", "--trace-file",
    "--disable_bf16", "--compile_export_mode", "--disable_fused_projections", "--disable_channels_last",
    "--disable_fa3", "--disable_quant", "--disable_inductor_tuning_flags", "--enable_cache_dit", "--use-cached-model",
    "--image", "--seed"]


def test_every_flag_of_the_seed_is_there_under_its_name():
    text = create_parser().format_help()
    assert [flag for flag in SEED_FLAGS if not re.search(rf"{flag}\b", text)] == []


@pytest.mark.parametrize("argv", [
    ["--disable-fa3", "--output-file", "a.png", "--compile-export-mode=disabled"],
    ["--disable_fa3", "--output_file", "a.png", "--compile_export_mode=disabled"],
])
def test_dashes_and_underscores_are_the_same_flag(argv):
    args = create_parser().parse_args(argv)
    assert (args.disable_fa3, args.output_file, args.compile_export_mode) == (True, "a.png", "disabled")


def test_a_prompt_that_looks_like_a_flag_value_stays_as_it_is():
    assert create_parser().parse_args(["--prompt=a-b_c --d-e"]).prompt == "a-b_c --d-e"


def test_help_says_where_packages_are_the_default():
    """What stands against them depends on the machine: the flag is left open, for `utils.techniques.plan` to decide."""
    assert create_parser().parse_args([]).compile_export_mode is None
    text = " ".join(create_parser().format_help().split())
    assert "Default: export_aoti; compile where that cannot be" in text and "default: None" not in text
    assert "(default: blocks)" in text


def test_abbreviations_and_typos_are_errors(capsys):
    with pytest.raises(SystemExit) as error:
        create_parser().parse_args(["--disable_fa"])
    assert error.value.code == 2 and "--disable_fa" in capsys.readouterr().err


REFUSED_BY_ARGUMENTS = [
    (["--height", "100"], "--height 100.*multiple of 16.*96"),
    (["--width", "0"], "--width 0"),
    (["--num_inference_steps", "0"], "at least 1"),
    (["--num_images_per_prompt", "0"], "at least 1"),
    (["--runs", "0"], "at least 1"),
    (["--batch_size", "2"], "add --prompts-file"),
    (["--batch_size", "0", "--prompts-file", "README.md"], "at least 1"),
    (["--seed", "-1"], "--seed -1"),
    (["--seed", str(2**64)], "2\\^63"),
    (["--true_cfg_scale", "0.5"], "1 \\(off\\) or more"),
    (["--revision", "main", "--random_weights"], "--revision main"),
    (["--revision", "main", "--ckpt", "."], "--revision main"),
    (["--offload", "model"], "nothing to move"),
    (["--offload", "text"], "nothing to move"),
    (["--gpu_memory_limit", "8"], "needs --device cuda"),
    (["--negative_prompt", "x"], "--true_cfg_scale"),
    (["--true_cfg_scale", "3"], "--negative_prompt"),
    (["--disable_quant", "--quant_dtype", "int8"], "contradicts"),
    (["--disable_quant", "--quant_granularity", "row"], "contradicts"),
    (["--quant_dtype", "int8", "--quant_granularity", "tensor"], "per row"),
    (["--quant_granularity", "row", "--disable_bf16"], "bf16"),
    (["--disable_fa3", "--attention_backend", "fa3"], "contradicts"),
    (["--use-cached-model", "--compile_export_mode", "compile"], "--compile_export_mode compile neither makes"),
    (["--re-export", "--compile_export_mode", "disabled"], "--re-export is about exported packages"),
    (["--package-from", "x", "--compile_export_mode", "compile"], "--package-from is about exported packages"),
    (["--use-cached-model", "--re-export"], "never export"),
    (["--re-export", "--package-from", "x"], "never export"),
    (["--compile_export_mode", "export_aoti", "--compile_scope", "whole"], "does not go with --compile_scope whole"),
    (["--use-cached-model", "--compile_scope", "whole"], "--use-cached-model does not go with --compile_scope whole"),
    (["--re-export", "--attention_backend", "flex"], "--re-export does not go with --attention_backend flex"),
    (["--compile_scope", "whole", "--compile_export_mode", "disabled"], "contradicts"),
    (["--compile_scope", "whole", "--enable_cache_dit"], "--compile_scope blocks"),
    (["--compile_scope", "whole", "--cache_preset", "fast"], "with --cache_preset"),
    (["--enable_cache_dit", "--cache_preset", "fast"], "--enable_cache_dit and --cache_preset are step caches"),
    (["--cache_preset", "safe", "--cache_dit_config", "cache_config.yaml"], "give one of them"),
    (["--step_cache", "taylorseer", "--cache_preset", "fast"], "--cache_preset and --step_cache taylorseer are step"),
    (["--step_cache", "taylorseer", "--force_cache"], "--force_cache is about a step cache: add --cache_preset"),
    (["--taylorseer_interval", "4"], "add it"),
    (["--taylorseer_order", "0"], "add it"),
    (["--step_cache", "taylorseer", "--taylorseer_interval", "1"], "--taylorseer_interval 1: it must be at least 2"),
    (["--step_cache", "taylorseer", "--taylorseer_order", "-1"], "--taylorseer_order -1: it must be at least 0"),
    (["--force_cache"], "add --cache_preset"),
    (["--cache_decide_ahead"], "--cache_decide_ahead is about a step cache: add --cache_preset"),
    (["--cache_decide_ahead", "--force_cache", "--cache_preset", "fast"], "whatever residuals say.*drop one"),
    (["--context_parallel", "auto", "--stop_before_timing"], "--stop_before_timing stops one process"),
    (["--revision", "main", "--ckpt", "tiny-flux"], "--revision main"),
    (["--random_weights", "--lora", "x"], "drop one"),
    (["--prompts-file", "nowhere.txt"], "no such file"),
    (["--cache_dit_config", "nowhere.yaml"], "no such file"),
    (["--image", "nowhere.png"], "no such file"),
]


@pytest.mark.parametrize("argv, text", REFUSED_BY_ARGUMENTS, ids=lambda x: " ".join(x) if isinstance(x, list) else "")
def test_refused_by_the_arguments_alone(make_args, argv, text):
    with pytest.raises(RecipeError, match=f"(?s){text}"):
        check_args(make_args(*argv))


REFUSED_BY_THE_MODEL = [
    (["--ckpt", "tiny-kontext"], "--image PATH_OR_URL"),
    (["--ckpt", "tiny-flux", "--image", "IMAGE"], "--image is for Kontext"),
    (["--ckpt", "tiny-flux", "--enable_cache_dit"], "nothing could be cached"),
    (["--ckpt", "tiny-flux", "--cache_preset", "extreme"], "nothing could be cached"),
    (["--ckpt", "tiny-flux", "--step_cache", "taylorseer"], "takes 4: nothing could be extrapolated"),
    (["--ckpt", "tiny-flux-dev", "--cache_dit_config", "TOO_MANY"], "has 8: nothing is left to cache"),
    (["--ckpt", "tiny-flux", "--attention_backend", "fa3"], "fa3.*no GPU"),
    (["--ckpt", "tiny-flux", "--attention_backend", "aiter"], "aiter.*no GPU"),
    (["--ckpt", "tiny-flux", "--attention_backend", "flash3"], "unknown. Choose from"),
    (["--ckpt", "tiny-flux", "--attention_backend", "_native_cudnn"], "needs a GPU. On a CPU: native"),
    (["--ckpt", "tiny-flux", "--guidance_scale", "3"], "no guidance embedding"),
    (["--ckpt", "tiny-flux", "--quant_granularity", "tensor"], "int8, which goes per row"),
    (["--ckpt", "tiny-kontext", "--image", "IMAGE"], "empty file"),
    (["--ckpt", "tiny-flux", "--lora", "nowhere.safetensors:0.5"], "nowhere.safetensors: there is no such file"),
    (["--ckpt", "tiny-flux", "--quant_dtype", "float8"], "8.9"),
    (["--ckpt", "tiny-flux", "--quant_dtype", "int8", "--compile_export_mode", "disabled"], "only when compiled"),
    (["--ckpt", "tiny-flux", "--quant_granularity", "row", "--compile_export_mode", "disabled"], "only when compiled"),
    (["--ckpt", "tiny-flux", "--strict"], "--strict: fused VAE .*no GPU.* --disable_fused_vae,"),
    (["--ckpt", "someone/a-model", "--random_weights"], "knows no architecture called 'a-model'"),
    (["--ckpt", "FLUX.1-dev", "--random_weights", "2x4"], "2\\+4"),
]


@pytest.mark.parametrize("argv, text", REFUSED_BY_THE_MODEL, ids=lambda x: " ".join(x) if isinstance(x, list) else "")
def test_refused_before_weights_load(make_args, monkeypatch, tmp_path, argv, text):
    for module, name in ((random_weights, "build"), (pipeline_utils.DiffusionPipeline, "from_pretrained")):
        monkeypatch.setattr(module, name, lambda *_, **__: pytest.fail("weights were loaded first"))
    files = {"IMAGE": tmp_path / "image.png", "TOO_MANY": tmp_path / "cache.yaml"}
    files["IMAGE"].write_bytes(b"")
    files["TOO_MANY"].write_text("Fn_compute_blocks: 6\nBn_compute_blocks: 2\n")
    args = make_args(*[str(files.get(a, a)) for a in argv])
    check_args(args)
    with pytest.raises(RecipeError, match=f"(?s){text}"):
        load_pipeline(args)


@pytest.mark.parametrize("script", ["gen_image.py", pytest.param("run_benchmark.py", marks=pytest.mark.slow)])
def test_an_error_is_one_paragraph_and_exit_code_2(script, tmp_path):
    done = subprocess.run([sys.executable, script, "--ckpt", str(tmp_path), "--device", "cpu"], cwd=ROOT,
                          capture_output=True, text=True, timeout=120)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.startswith("error: --ckpt") and "model_index.json" in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1


@pytest.mark.parametrize("argv, text", [
    (["--compile_scope", "whole", "--offload", "model"], "--compile_scope blocks"),
    (["--compile_export_mode", "export_aoti", "--offload", "model"], "export_aoti does not go with --offload model"),
    (["--package-from", "x", "--offload", "group"], "--package-from does not go with --offload group"),
    (["--compile_scope", "whole", "--offload", "group"], "--compile_scope blocks"),
    (["--enable_cache_dit", "--offload", "model"], "--offload text or --offload group"),
    (["--step_cache", "taylorseer", "--offload", "model"], "--offload text or --offload group"),
])
def test_pairs_refused_on_a_gpu(make_args, monkeypatch, argv, text):
    monkeypatch.setattr(benchmark_utils.torch.cuda, "is_available", lambda: True)
    with pytest.raises(RecipeError, match=text):
        check_args(make_args("--device", "cuda", *argv))


@pytest.mark.parametrize("argv", [
    ["--compile_scope", "whole"], ["--enable_cache_dit"], ["--use-cached-model"], ["--text_encoder_quant"]], ids=str)
def test_t5_alone_off_the_gpu_goes_with_what_models_off_it_do_not(make_args, monkeypatch, argv):
    monkeypatch.setattr(benchmark_utils.torch.cuda, "is_available", lambda: True)
    check_args(make_args("--device", "cuda", "--offload", "text", *argv))
    if argv != ["--text_encoder_quant"]:
        with pytest.raises(RecipeError, match="--offload"):
            check_args(make_args("--device", "cuda", "--offload", "model", *argv))
    pretend_launched(monkeypatch, 2)
    with pytest.raises(RecipeError, match="--offload text does not go with --context_parallel"):
        check_args(make_args("--device", "cuda", "--offload", "text", "--context_parallel", "auto"))


def test_summary_against_the_definitions():
    found = summarize([1.0, 2.0, 4.0, 9.0])
    assert found["mean"] == 4.0 and found["median"] == 3.0 and (found["min"], found["max"]) == (1.0, 9.0)
    assert found["variance"] == pytest.approx((9 + 4 + 0 + 25) / 3)
    assert summarize([1.0])["variance"] == 0.0


def test_the_environment_names_versions_and_command():
    record = benchmark_utils.environment("cpu")
    assert record["packages"]["torch"] and record["packages"]["diffusers"] and record["argv"] is not None
