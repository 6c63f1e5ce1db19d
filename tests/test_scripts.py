"""Both scripts from the command line to the files that they leave."""

import atexit
import gc
import gzip
import json
import re
import subprocess
import sys
import types
from pathlib import Path

import PIL.Image
import pytest
import torch

import gen_image
import run_benchmark
from bench import timing
from bench.quality import capture_step
from utils.cache.dbcache import preset
from utils.common import RecipeError, freeze_gc
from utils.images import read_parameters
from utils.pipeline_utils import call_kwargs

EAGER = ["--device", "cpu", "--compile_export_mode", "disabled", "--num_inference_steps", "2"]


@pytest.fixture
def run(monkeypatch, tmp_path):
    def call(script, *argv):
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(sys, "argv", [script.__name__, *argv])
        script.main()
    return call


def test_gen_image_saves_one_image_with_its_parameters(run, tmp_path, capsys):
    run(gen_image, "--ckpt", "tiny-flux", "--prompt", "a cat", "--seed", "7", "--output-file", "out/cat.png", *EAGER)
    path = tmp_path / "out" / "cat.png"
    assert PIL.Image.open(path).size == (128, 128)
    found = read_parameters(path)
    names = ("prompt", "seed", "model", "num_inference_steps")
    assert [found[name] for name in names] == ["a cat", 7, "tiny-flux", 2]
    assert "bf16" in found["techniques"] and "compile" not in found["techniques"]
    assert "--compile_export_mode disabled" in capsys.readouterr().err


def test_gen_image_quiet_prints_nothing(run, capfd):
    run(gen_image, "--ckpt", "tiny-flux", "--quiet", *EAGER)
    assert capfd.readouterr() == ("", "")


def test_gen_image_file_of_prompts_makes_one_image_each(run, tmp_path):
    (tmp_path / "prompts.txt").write_text("a cat\n\n  a dog  \na cat\n")
    run(gen_image, "--ckpt", "tiny-flux", "--prompts-file", "prompts.txt", "--output-file", "all/x.png", "--seed", "5",
        *EAGER)
    found = {path.name: read_parameters(path) for path in (tmp_path / "all").glob("*.png")}
    assert {name: (p["prompt"], p["seed"]) for name, p in found.items()} == {
        "x_000_5.png": ("a cat", 5), "x_001_6.png": ("a dog", 6), "x_002_7.png": ("a cat", 7)}
    run(gen_image, "--ckpt", "tiny-flux", "--prompt", "a dog", "--seed", "6", "--output-file", "alone.png", *EAGER)
    assert PIL.Image.open(tmp_path / "alone.png").tobytes() == PIL.Image.open(tmp_path / "all/x_001_6.png").tobytes()


def test_gen_image_several_images_of_one_prompt_are_numbered(run, tmp_path):
    run(gen_image, "--ckpt", "tiny-flux", "--num_images_per_prompt", "2", "--output-file", "x.jpg", *EAGER)
    assert sorted(p.name for p in tmp_path.glob("x*")) == ["x_000_42.jpg", "x_001_43.jpg"]


@pytest.mark.parametrize("content", [b"\n  \n", b"\xff\xfe\xff"], ids=["blank", "half a character"])
def test_gen_image_prompts_file_without_prompts_is_refused(run, tmp_path, content):
    (tmp_path / "p.txt").write_bytes(content)
    with pytest.raises(RecipeError, match=r"p\.txt"):
        run(gen_image, "--ckpt", "tiny-flux", "--prompts-file", "p.txt", *EAGER)


@pytest.mark.parametrize("argv", [["--trace-file", "t.json"], ["--output-json", "r.json"], ["--step_error"],
                                  ["--runs", "3"], ["--warmup", "0"], ["--force_cache"], ["--kernels"]])
def test_gen_image_flags_that_measure_are_unknown(run, capsys, argv):
    with pytest.raises(SystemExit) as ended:
        run(gen_image, "--ckpt", "tiny-flux", *argv, *EAGER)
    assert ended.value.code == 2 and argv[0] in capsys.readouterr().err


@pytest.mark.parametrize("argv", [["--runs", "0"], ["--warmup", "-1"]])
def test_run_benchmark_counts_below_the_least_are_refused(run, argv):
    with pytest.raises(RecipeError, match=argv[0]):
        run(run_benchmark, "--ckpt", "tiny-flux", *argv, *EAGER)


def test_run_benchmark_leaves_json_image_and_trace(run, tmp_path, capsys):
    run(run_benchmark, "--ckpt", "tiny-flux-dev", "--runs", "3", "--warmup", "1", "--step_error", "--output-json",
        "r.json", "--trace-file", "t.json.gz", "--quality", "high", *EAGER)
    lines = capsys.readouterr().out.splitlines()
    record = json.loads(lines[-1])
    assert record == json.loads((tmp_path / "r.json").read_text())
    assert lines[0].startswith("time mean/var:")  # as flux-fast prints it, for scripts that read it

    assert record["schema_version"] == 1 and len(record["seconds"]["raw"]) == 3
    assert record["settings"]["num_inference_steps"] == 2 and record["settings"]["max_sequence_length"] == 64
    assert record["images_per_second"] == pytest.approx(1 / record["seconds"]["median"])
    assert set(record["stages_ms"]) == {"prompt_encoding", "denoising_step", "decoding", "postprocessing",
                                        "pil_conversion"}
    steps = record["steps_ms"]
    assert len(steps) == 2 and min(steps) <= record["stages_ms"]["denoising_step"] <= max(steps)
    assert record["gpu_load"] == {} and record["energy_j"] == {"image": None, "step": None}
    assert 1e-4 < record["step_relative_error"] < 0.03
    work = record["roofline"]
    assert (work["image_tokens"], work["text_tokens"], work["batch"]) == (64, 64, 1)
    assert work["tflops"] == pytest.approx(sum(work["flops"].values()) / record["stages_ms"]["denoising_step"] / 1e9)
    assert record["techniques"]["compile"] == {"on": False, "how": "--compile_export_mode disabled"}
    assert {"load", "warm-up"} <= set(record["cold_start_s"]) and record["settings"]["seed"] == 42
    assert record["settings"]["quality"] == read_parameters(tmp_path / "output.png")["quality"] == "high"
    assert record["environment"]["argv"][:2] == ["--ckpt", "tiny-flux-dev"]
    assert read_parameters(tmp_path / "output.png")["num_inference_steps"] == 2

    trace = json.loads(gzip.decompress((tmp_path / "t.json.gz").read_bytes()))
    names = [event.get("name") for event in trace["traceEvents"]]
    assert {name: names.count(name) for name in record["stages_ms"]} == {
        "prompt_encoding": 1, "denoising_step": 2, "decoding": 1, "postprocessing": 1, "pil_conversion": 1}


def test_time_images_makes_arguments_outside_the_timed_region(run, monkeypatch):
    """flux-fast timed loading Kontext's reference image in every run."""
    order = []
    counter = timing.time.perf_counter
    monkeypatch.setattr(timing.time, "perf_counter", lambda: (order.append("clock"), counter())[1])

    def pipeline(**kwargs):
        order.append("call")
        return types.SimpleNamespace(images=[0])

    monkeypatch.setattr(timing, "call_kwargs", lambda *a: order.append("kwargs") or {})
    seconds, image = timing.time_images(pipeline, types.SimpleNamespace(runs=2, device="cpu"))
    assert order == ["kwargs", "clock", "call", "clock"] * 2 and len(seconds) == 2 and image == 0


def test_run_benchmark_of_a_step_cache_that_compares_nothing_records_its_steps(run, tmp_path, capsys):
    (tmp_path / "c.yaml").write_text("Fn_compute_blocks: 1\nmax_warmup_steps: 2\nresidual_diff_threshold: 100.0\n")
    run(run_benchmark, "--ckpt", "tiny-flux-dev", "--runs", "1", "--warmup", "0", "--step_cache", "c.yaml",
        *EAGER[:-1], "6")
    record = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert record["cached_steps"] and record["techniques"]["step cache"]["on"]
    assert record["residual_diffs"] == {}  # a threshold of 1 or more compares nothing
    assert record["roofline"]["tflops"] is None
    with pytest.raises(RecipeError, match="--step_error"):
        run(run_benchmark, "--ckpt", "tiny-flux-dev", "--step_cache", "c.yaml", "--step_error", *EAGER[:-1], "6")


def test_scripts_cached_steps_and_residual_differences_are_reported(run, capsys):
    argv = ["--ckpt", "tiny-flux-dev", "--step_cache", "fast", *EAGER[:-1], "10"]
    run(run_benchmark, "--runs", "1", "--warmup", "0", *argv)
    record = json.loads(capsys.readouterr().out.splitlines()[-1])
    cached = record["cached_steps"]
    assert cached and set(map(str, cached)) <= set(record["residual_diffs"])
    run(run_benchmark, "--runs", "1", "--warmup", "0", "--force_cache", *argv)
    record = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert record["residual_diffs"] == {}
    assert [i for i in range(10) if i not in record["cached_steps"]] == [
        i for i, one in enumerate(preset("fast", 10, 8).steps_computation_mask) if one == "1"]
    run(gen_image, *argv)
    assert re.search(rf"\b{len(cached)} of 10\b", capsys.readouterr().err)


def test_step_error_leaves_out_the_tokens_of_the_reference_image(build, make_args, tmp_path):
    """Kontext's reference tokens come behind the picture's, and the pipeline drops what becomes of them."""
    PIL.Image.new("RGB", (128, 128)).save(tmp_path / "x.png")
    pipeline, args = build("tiny-kontext"), make_args("--ckpt", "tiny-kontext", "--image", str(tmp_path / "x.png"))
    inputs = capture_step(pipeline, call_kwargs(pipeline, args))
    with torch.no_grad():
        reference = pipeline.transformer(**inputs)[0]
    assert reference.shape[1] == 128
    reference[:, 64:] += 1
    assert timing.step_error(pipeline, args, inputs, reference) == 0
    reference[:, 63] += 1
    assert timing.step_error(pipeline, args, inputs, reference) > 0.01


def test_spare_the_garbage_collector_gives_objects_back_at_exit(monkeypatch):
    at_exit = []
    monkeypatch.setattr(atexit, "register", at_exit.append)
    freeze_gc()
    assert gc.get_freeze_count() > 0
    at_exit[0]()
    assert gc.get_freeze_count() == 0


@pytest.mark.slow
def test_freeze_gc_leaves_triton_nothing_to_report_as_leaked():
    """Triton's bindings look for leaks when Python ends."""
    pytest.importorskip("triton", reason="Triton is not installed: pip install triton")
    code = "import triton; from utils.common import freeze_gc; freeze_gc()"
    done = subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parent.parent, capture_output=True,
                          text=True)
    assert done.returncode == 0 and "leaked" not in done.stderr
