"""A file of prompts: batches and processes change no picture, and nothing that is done is done again."""

import hashlib
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import PIL.Image
import pytest
import torch
from accelerate import PartialState
from conftest import pretend_hopper
from safetensors.torch import save_file

import gen_image
from utils import images, many_prompts, pipeline_utils, tiny_presets
from utils.benchmark_utils import images_per_call
from utils.cache import dbcache
from utils.common import RecipeError
from utils.hardware import Hardware
from utils.images import read_parameters, save_image
from utils.many_prompts import is_made
from utils.pipeline_utils import call_kwargs
from utils.prompts_file import Prompt

ROOT = Path(__file__).parent.parent
EAGER = ["--device", "cpu", "--compile_export_mode", "disabled", "--disable_quant", "--num_inference_steps", "1"]
FROG = "3d frog on a navy background"
TEXTS = [FROG, "3d cat on a teal background", "a dog", FROG, "a key"]
# Mean difference of a pixel, of 255. On one CPU thread there was none, on two 0.08 at most (and 1 for any one pixel).
PIXEL_BOUND = 0.3


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "prompts.txt").write_text("\n".join(TEXTS))
    return tmp_path


@pytest.fixture
def run(monkeypatch):
    """gen_image.py on prompts.txt; returns the batch of each of the transformer's steps."""
    def call(*argv, ckpt="tiny-flux", file="prompts.txt"):
        batches, optimize = [], pipeline_utils.optimize

        def watched(pipeline, *args):
            pipeline = optimize(pipeline, *args)
            pipeline.transformer.register_forward_pre_hook(
                lambda m, a, kwargs: batches.append(len(kwargs["hidden_states"])), with_kwargs=True)
            return pipeline

        with monkeypatch.context() as patch:
            patch.setattr(pipeline_utils, "optimize", watched)
            patch.setattr(sys, "argv", ["gen_image.py", "--ckpt", ckpt, *(["--prompts-file", file] if file else []),
                                        *EAGER, *argv])
            gen_image.main()
        return batches
    return call


def pixels(path):
    return np.asarray(PIL.Image.open(path)).astype(float)


def lines_of(manifest):
    return [json.loads(line) for line in Path(manifest).read_text().splitlines()]


def test_make_images_in_batches_equals_one_by_one(folder, run, capsys):
    assert run("--output-file", "alone/x.png") == [1] * 5
    assert run("--output-file", "batch/x.png", "--batch_size", "2") == [2] * 3, "the last batch is filled up"
    names = [f"x_{i:03d}_{42 + i}.png" for i in range(5)]
    for kind in ("alone", "batch"):
        assert sorted(path.name for path in (folder / kind).iterdir()) == ["x.jsonl", *names]
    for name in names:
        assert read_parameters(f"batch/{name}") == read_parameters(f"alone/{name}")
        assert np.abs(pixels(f"batch/{name}") - pixels(f"alone/{name}")).mean() < PIXEL_BOUND
    assert np.abs(pixels(f"batch/{names[0]}") - pixels(f"batch/{names[3]}")).mean() > 4, "their seeds differ"
    shown = capsys.readouterr().err
    assert all(f"{i} of 5 images" in shown for i in (1, 5)) and ", 0:00:0" in shown  # what remains

    listed = lines_of("batch/x.jsonl")
    assert [(line["file"], line["prompt"], line["seed"]) for line in listed] == [
        (name, text, 42 + i) for i, (name, text) in enumerate(zip(names, TEXTS, strict=True))]
    for line in listed:
        assert line["sha256"] == hashlib.sha256((folder / "batch" / line["file"]).read_bytes()).hexdigest()
        assert line["seconds"] > 0 and line["num_inference_steps"] == 1


@pytest.mark.parametrize("ckpt, argv", [
    pytest.param("tiny-flux-dev", [
        "--negative_prompt", "blue", "--true_cfg_scale", "3", "--num_images_per_prompt", "2"], marks=pytest.mark.slow),
    ("tiny-kontext", ["--image", "photo.png"]),
], ids=lambda x: x if isinstance(x, str) else "")
def test_make_images_in_batches_with_other_inputs_equals_one_by_one(folder, run, ckpt, argv):
    (folder / "prompts.txt").write_text("3d frog on a navy background\n3d cat\n3d key\n")
    PIL.Image.linear_gradient("L").convert("RGB").save("photo.png")
    run(*argv, "--output-file", "alone/x.png", ckpt=ckpt)
    per_prompt = 2 if "--num_images_per_prompt" in argv else 1
    passes = 2 if "--negative_prompt" in argv else 1
    assert run(*argv, "--output-file", "batch/x.png", "--batch_size", "2", ckpt=ckpt) == [2 * per_prompt] * 2 * passes
    names = sorted(path.name for path in (folder / "batch").glob("*.png"))
    assert names == [f"x_{i // per_prompt:03d}_{42 + i}.png" for i in range(3 * per_prompt)]
    for name in names:
        assert read_parameters(f"batch/{name}") == read_parameters(f"alone/{name}")
        assert np.abs(pixels(f"batch/{name}") - pixels(f"alone/{name}")).mean() < PIXEL_BOUND


# --- lines with settings ---

def write_lines(path, *lines):
    path.write_text("\n".join(map(json.dumps, lines)))


def assert_equals_its_flags(run, path, line, *argv, **kwargs):
    """The image of a line is that of a run with the line's settings as flags, and its metadata too."""
    flags = [text for key, value in line.items() if key != "num_images" for text in (f"--{key}", str(value))]
    run(*argv, "--seed", str(read_parameters(path)["seed"]), *flags, "--output-file", "by_flags.png", file=None,
        **kwargs)
    assert np.array_equal(pixels(path), pixels("by_flags.png")), line
    assert read_parameters(path) == read_parameters("by_flags.png")


def test_make_images_of_lines_with_settings_equal_runs_with_these_flags(folder, run, capsys):
    argv = ["--true_cfg_scale", "2", "--negative_prompt", "red", "--height", "64"]
    settings = [{}, {"height": 80, "width": 96}, {"num_inference_steps": 2}, {"guidance_scale": 1.5},
                {"negative_prompt": "blue"}, {"num_images": 2}]
    lines = [{"prompt": FROG} | one for one in settings]
    write_lines(folder / "p.jsonl", *({"seed": 7} | line for line in lines))
    steps = run(*argv, "--output-file", "x.png", file="p.jsonl", ckpt="tiny-flux-dev")
    assert steps == [1] * 2 * (len(lines) + 2)  # one line takes two steps, one makes two images
    assert "size" not in capsys.readouterr().err, "nothing is compiled"
    for index, line in enumerate(lines[:5]):
        assert_equals_its_flags(run, f"x_{index:03d}_7.png", line, *argv, ckpt="tiny-flux-dev")
    first = pixels("x_000_7.png")
    for index in (2, 3, 4):
        assert np.abs(pixels(f"x_{index:03d}_7.png") - first).mean() > 0.05, "the setting changes the picture"
    assert np.array_equal(pixels("x_005_7.png"), first) and not np.array_equal(pixels("x_005_8.png"), first)
    assert {line["file"]: line["height"] for line in lines_of("x.jsonl")}["x_001_7.png"] == 80


def test_make_images_of_lines_with_references_equal_runs_with_these_flags(folder, run, capsys):
    """References of one size share a batch. Without --image each line needs its own."""
    for name, size, turn in (("a", (96, 64), 0), ("b", (96, 64), 180), ("c", (64, 64), 90)):
        PIL.Image.linear_gradient("L").convert("RGB").rotate(turn).resize(size).save(f"{name}.png")
    (folder / "broken.png").write_bytes((folder / "a.png").read_bytes()[:40])
    lines = [{"prompt": "make it red"}, *({"prompt": "make it red", "image": f"{name}.png"} for name in (
        "broken", "a", "c", "b"))]
    write_lines(folder / "p.jsonl", *({"seed": 7} | line for line in lines))
    small = dict(file="p.jsonl", ckpt="tiny-kontext"), ["--height", "64", "--width", "64"]
    assert run("--output-file", "batch/x.png", "--batch_size", "2", *small[1], **small[0]) == [2, 2]
    shown = capsys.readouterr().err
    assert re.findall(r"line (\d) is left out.*--image", shown) == ["1", "2"]
    assert run("--output-file", "x.png", *small[1], **small[0]) == [1, 1, 1]
    assert [line["file"] for line in lines_of("x.jsonl")] == ["x_002_7.png", "x_004_7.png", "x_003_7.png"]
    for index in (2, 3, 4):
        name = f"x_{index:03d}_7.png"
        if index > 2:
            assert_equals_its_flags(run, name, lines[index], *small[1], ckpt="tiny-kontext")
        assert read_parameters(f"batch/{name}") == read_parameters(name)
        assert np.abs(pixels(f"batch/{name}") - pixels(name)).mean() < PIXEL_BOUND
    assert np.abs(pixels("x_002_7.png") - pixels("x_004_7.png")).mean() > 0.5


def test_make_images_of_mixed_shapes_in_batches_equal_one_by_one_and_resume(folder, run, capsys):
    sizes = [(64, 96), (128, 128), (64, 96), (128, 128), (64, 96), (64, 80)]
    lines = [{"prompt": text, "height": height, "width": width} for text, (height, width) in zip(
        [*TEXTS, FROG], sizes, strict=True)]
    del lines[1]["height"], lines[1]["width"]  # the command line's, which are those of line 4
    write_lines(folder / "p.jsonl", *lines)
    assert run("--output-file", "alone/x.png", file="p.jsonl") == [1] * 6
    argv = ["--output-file", "batch/x.png", "--batch_size", "2"]
    assert run(*argv, file="p.jsonl") == [2] * 4
    names = [f"x_{i:03d}_{42 + i}.png" for i in range(6)]
    assert [line["file"] for line in lines_of("batch/x.jsonl")] == [names[i] for i in (0, 2, 4, 1, 3, 5)]
    for name, (height, width) in zip(names, sizes, strict=True):
        assert pixels(f"batch/{name}").shape == (height, width, 3)
        assert read_parameters(f"batch/{name}") == read_parameters(f"alone/{name}")
        assert np.abs(pixels(f"batch/{name}") - pixels(f"alone/{name}")).mean() < PIXEL_BOUND

    before = {path.name: path.stat().st_mtime_ns for path in (folder / "batch").glob("*.png")}
    (folder / "batch" / names[2]).unlink()
    (folder / "batch" / names[3]).write_bytes(b"")
    lines[5]["height"] = 80
    write_lines(folder / "p.jsonl", *lines)
    capsys.readouterr()
    assert run(*argv, file="p.jsonl") == [2] * 3
    assert "3 of 6 images" in capsys.readouterr().err
    after = {path.name: path.stat().st_mtime_ns for path in (folder / "batch").glob("*.png")}
    assert [name for name in names if after[name] != before[name]] == [names[2], names[3], names[5]]
    assert run(*argv, file="p.jsonl") == []


@pytest.mark.slow
@pytest.mark.parametrize("ckpt", ["tiny-flux-dev", "tiny-kontext"])
def test_make_images_of_lines_with_settings_on_fused_blocks_equal_runs_with_these_flags(folder, run, monkeypatch, ckpt):
    """The modulations are tables of all steps, and the last block counts the image's tokens."""
    pretend_hopper(monkeypatch, ["attention", "quantization", "fused_kernels", "cuda_graphs"])
    PIL.Image.linear_gradient("L").convert("RGB").resize((96, 64)).save("photo.png")
    argv = ["--height", "64", "--width", "64", "--skip_fp8_check"] + ["--image", "photo.png"] * (ckpt == "tiny-kontext")
    lines = [{"prompt": FROG} | one for one in ({}, {"width": 96, "num_inference_steps": 3}, {"seed": 3})]
    write_lines(folder / "p.jsonl", *lines)
    run(*argv, "--output-file", "x.png", file="p.jsonl", ckpt=ckpt)
    assert "fused kernels" in read_parameters("x_000_42.png")["techniques"]
    for name, line in zip(("x_000_42.png", "x_001_43.png", "x_002_3.png"), lines, strict=True):
        assert_equals_its_flags(run, name, line, *argv, ckpt=ckpt)


@pytest.mark.slow
def test_make_images_of_other_sizes_than_the_packages(folder, run, compiler, capsys):
    sizes = {"x_000_42.png": (64, 64), "x_001_43.png": (64, 96)}
    write_lines(folder / "p.jsonl", *({"prompt": FROG, "height": h, "width": w} for h, w in sizes.values()))
    argv = ["--disable_bf16", "--height", "64", "--width", "64", "--disable_inductor_tuning_flags"]
    run(*argv, "--output-file", "eager/x.png", file="p.jsonl")
    assert "size" not in capsys.readouterr().err
    run(*argv, "--output-file", "x.png", "--compile_export_mode", "export_aoti", "--cache-dir", "cache", file="p.jsonl")
    assert re.findall(r"size (\w+): .*\buncompiled", capsys.readouterr().err) == ["96x64"]
    for name, (height, width) in sizes.items():
        assert pixels(name).shape == (height, width, 3)
        assert np.abs(pixels(name) - pixels(f"eager/{name}")).mean() < PIXEL_BOUND


@pytest.mark.parametrize("cache", ["taylorseer", pytest.param("fast", marks=pytest.mark.slow)])
def test_make_images_of_lines_with_other_steps_have_their_own_mask(folder, run, capsys, cache):
    """The mask of 9 steps computes other steps than that of 10, and nothing is left over from the line before."""
    argv = ["--num_inference_steps", "10", "--step_cache", cache, "--height", "64", "--width", "64"]
    lines = [{"prompt": FROG} | one for one in (
        {}, {"num_inference_steps": 9}, {"num_inference_steps": 4}, {"seed": 3})]
    write_lines(folder / "p.jsonl", *lines)
    run(*argv, "--output-file", "x.png", file="p.jsonl", ckpt="tiny-flux-dev")
    assert re.findall(r"line (\d) is left out.*--step_cache.* 4", capsys.readouterr().err) == ["3"]
    masks = []
    for name, line in (("x_000_42.png", lines[0]), ("x_001_43.png", lines[1]), ("x_003_3.png", lines[3])):
        assert_equals_its_flags(run, name, line, *argv, ckpt="tiny-flux-dev")
        found = read_parameters(name)["techniques"]["step cache"]
        masks.append(found["mask"] or found["dbcache"]["steps_computation_mask"])
    assert [len(mask) for mask in masks] == [10, 9, 10] and masks[0] == masks[2]


@pytest.mark.parametrize("ckpt, field, named", [
    ("tiny-flux", {"guidance_scale": 2.0}, "--guidance_scale"),
    ("tiny-flux-dev", {"control_image": "photo.png"}, "--control_image"),
    ("tiny-flux-dev", {"strength": 0.5}, "--strength"),
    ("tiny-kontext", {"height": 64}, "--image"), ("tiny-kontext", {"image": "long.png"}, "4:1"),
    ("tiny-kontext", {"image": "ftp://a/b.png"}, "ftp")])
def test_gen_image_line_that_the_checkpoint_cannot_draw_is_named_before_weights_load(folder, run, monkeypatch, capsys,
                                                                                     ckpt, field, named):
    for name, size in (("photo", (64, 64)), ("long", (90, 20))):
        PIL.Image.new("RGB", size).save(f"{name}.png")
    good = {"prompt": "a", "image": "photo.png"} if ckpt == "tiny-kontext" else {"prompt": "a"}
    write_lines(folder / "p.jsonl", good, {"prompt": "b"} | field)
    monkeypatch.setattr(pipeline_utils, "load_pipeline", lambda args: (_ for _ in ()).throw(Killed))
    with pytest.raises(Killed):
        run(file="p.jsonl", ckpt=ckpt)
    assert re.findall(r"p\.jsonl, line (\d) is left out.*(" + re.escape(named) + ")", capsys.readouterr().err) == [
        ("2", named)]
    write_lines(folder / "p.jsonl", {"prompt": "b"} | field)
    with pytest.raises(RecipeError, match=rf"p\.jsonl[\s\S]*line 1[\s\S]*{named}"):
        run(file="p.jsonl", ckpt=ckpt)


def test_gen_image_output_that_is_a_lines_reference_is_refused(folder, run):
    save_image(PIL.Image.new("RGB", (64, 64)), "x_001_43.png", parameters())
    write_lines(folder / "p.jsonl", {"prompt": "a", "image": "x_001_43.png"}, {"prompt": "b", "image": "x_001_43.png"})
    with pytest.raises(RecipeError, match=r"x_001_43\.png.*line \d"):
        run("--output-file", "x.png", file="p.jsonl", ckpt="tiny-kontext")


@pytest.mark.parametrize("mode, scope, graphs, once, said", [
    ("compile", "blocks", True, False, "compiled and recorded now"), ("compile", "none", False, False, "compiled now"),
    ("compile", "blocks", True, True, f"compiled and recorded now; VAE uncompiled ({many_prompts.VAE_COST})"),
    ("compile", "none", True, True, f"recorded now; VAE uncompiled ({many_prompts.VAE_COST})"),
    ("disabled", "blocks", True, False, "recorded now"), ("disabled", "blocks", False, False, None),
    ("export_aoti", "none", True, True, f"recorded now; VAE uncompiled ({many_prompts.VAE_COST})"),
    ("export_aoti", "blocks", False, True, "blocks uncompiled, because the packages are for another size "
     f"(--compile_export_mode compile serves all sizes); VAE uncompiled ({many_prompts.VAE_COST})")])
def test_new_size_line_says_what_happens(mode, scope, graphs, once, said):
    plan = SimpleNamespace(compile=SimpleNamespace(mode=mode, scope=scope), compiles_vae_once=once,
                           fused_vae=SimpleNamespace(on=True), cuda_graphs=SimpleNamespace(on=graphs))
    assert many_prompts.new_size_line("64x96", plan) == (said and f"size 64x96: {said}")


@pytest.mark.parametrize("cache", [[], ["--step_cache", "taylorseer", "--num_inference_steps", "10"]], ids=" ".join)
def test_make_images_out_of_memory_leaves_out_one_batch(folder, run, monkeypatch, capsys, cache):
    """A step of the second batch does not fit. The exit code is that of an error which the user can put right."""
    optimize = pipeline_utils.optimize

    def with_little_memory(pipeline, *args):
        def refuse(module, args, kwargs):
            if len(kwargs["hidden_states"][0]) > 16 and kwargs["timestep"][0] < 1:
                raise torch.OutOfMemoryError("Tried to allocate 9 GiB. The rest.")
        pipeline = optimize(pipeline, *args)
        pipeline.transformer.register_forward_pre_hook(refuse, with_kwargs=True)
        return pipeline

    monkeypatch.setattr(pipeline_utils, "optimize", with_little_memory)
    write_lines(folder / "p.jsonl", {"prompt": FROG}, {"prompt": FROG, "height": 128}, {"prompt": "b", "seed": 3},
                {"prompt": FROG, "height": 128, "seed": 5}, {"prompt": FROG, "width": 32, "seed": 7})
    argv = ["--height", "64", "--width", "64", "--num_inference_steps", "2", *cache]
    ckpt = "tiny-flux-dev" if cache else "tiny-flux"
    with pytest.raises(RecipeError, match=r"x_001_43\.png, x_003_5\.png not made.*64x128.*9 GiB") as caught:
        run(*argv, "--batch_size", "2", "--output-file", "x.png", file="p.jsonl", ckpt=ckpt)
    assert caught.value.exit_code == 2 and "x_001_43.png, x_003_5.png not made" in capsys.readouterr().err
    assert sorted(path.name for path in folder.glob("*.png")) == ["x_000_42.png", "x_002_3.png", "x_004_7.png"]
    assert_equals_its_flags(run, "x_004_7.png", {"prompt": FROG, "width": 32, "seed": 7}, *argv, ckpt=ckpt)


def test_usable_prompts_line_too_large_for_the_gpu_is_named(make_args, monkeypatch):
    """1024x1024 of schnell fits into 40 GiB, 4096x4096 does not."""
    args = make_args("--ckpt", "FLUX.1-schnell", "--random_weights", "--prompts-file", "p.jsonl")
    args.device = "cuda"
    card = Hardware("cuda", (9, 0), name="H100", free_bytes=40 * 2**30, attention_source="fa3_fwd_interface")
    monkeypatch.setattr(many_prompts, "detect", lambda args: card)
    prompts = [Prompt(line, line, "a", settings=settings) for line, settings in (
        (1, ()), (2, (("height", 4096), ("width", 4096))), (3, (("height", 768),)), (4, (("height", 4096),
                                                                                        ("width", 4096))))]
    usable, complaints = many_prompts.usable_prompts(args, prompts)
    assert [prompt.line for prompt in usable] == [1, 3]
    assert [re.search(r"line (\d) is left out: not enough GPU memory.* 40\.0 GiB", text)[1] for text in complaints] == [
        "2", "4"]
    with pytest.raises(RecipeError, match="not enough GPU memory"):
        many_prompts.usable_prompts(args, prompts[1:2])


def test_make_images_says_a_new_size_once(folder, run, monkeypatch, capsys):
    monkeypatch.setattr(many_prompts, "new_size_line", lambda size, plan: f"size {size}: new")
    write_lines(folder / "p.jsonl", *({"prompt": FROG, "width": width, "num_inference_steps": steps}
                                      for width, steps in ((32, 1), (64, 1), (32, 2), (48, 1), (32, 1))))
    run("--output-file", "x.png", "--height", "64", "--width", "64", file="p.jsonl")
    assert re.findall(r"size (\w+): new", capsys.readouterr().err) == ["32x64", "48x64"]


def test_warn_of_cut_texts_names_the_first_long_line(capsys):
    class Words:
        def __call__(self, texts):
            return SimpleNamespace(input_ids=[text.split() for text in texts])

        def decode(self, ids, skip_special_tokens):
            return " ".join(ids)

    pipeline = SimpleNamespace(tokenizer_2=Words())
    prompts = [Prompt(line, 0, text, settings=settings) for line, text, settings in (
        (3, "a b", ()), (5, "a b c", (("negative_prompt", "a b"),)), (7, "a", (("negative_prompt", "a b c d"),)))]
    many_prompts.warn_of_cut_texts(pipeline, SimpleNamespace(negative_prompt=None), prompts, 2)
    assert re.findall(r"(\d) of (\d) (.*) are.* line (\d)", capsys.readouterr().err) == [
        ("1", "3", "prompts", "5"), ("1", "2", "negative prompts", "7")]


class Killed(BaseException):
    """The end of a process, as far as one in the same process can be."""


def test_make_images_run_again_makes_missing_and_changed_images_alone(folder, run, monkeypatch, capsys):
    """Ended between the third picture and its line, run again, then a changed prompt, broken files, a foreign one."""
    append = many_prompts.append_line

    def ends(manifest, line):
        if line["file"] == "x_002_44.png":
            raise Killed
        append(manifest, line)

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(many_prompts, "append_line", ends)
        run("--output-file", "x.png")
    before = {path.name: path.stat().st_mtime_ns for path in folder.glob("x_*.png")}
    assert len(before) == 3 and len(lines_of("x.jsonl")) == 2
    capsys.readouterr()

    assert len(run("--output-file", "x.png")) == 2
    assert "3 of 5 images" in capsys.readouterr().err
    after = {path.name: path.stat().st_mtime_ns for path in folder.glob("x_*.png")}
    assert len(after) == 5 and before.items() <= after.items()
    assert all(pixels(name).shape == (128, 128, 3) for name in after)

    (folder / "prompts.txt").write_text("\n".join(["something else", *TEXTS[1:]]))
    (folder / "x_001_43.png").write_bytes((folder / "x_001_43.png").read_bytes()[:-100])
    (folder / "x_002_44.png").write_bytes(b"")
    PIL.Image.new("RGB", (8, 8)).save("x_003_45.png")
    foreign = (folder / "x_003_45.png").read_bytes()
    with pytest.raises(RecipeError, match=r"x_003_45\.png"):
        run("--output-file", "x.png")
    assert (folder / "x_003_45.png").read_bytes() == foreign and read_parameters("x_000_42.png")["prompt"] == FROG
    (folder / "x_003_45.png").unlink()
    assert len(run("--output-file", "x.png")) == 4
    assert read_parameters("x_000_42.png")["prompt"] == "something else"
    assert [line["file"] for line in lines_of("x.jsonl")[-4:]] == [
        "x_000_42.png", "x_001_43.png", "x_002_44.png", "x_003_45.png"]
    assert run("--output-file", "x.png", "--batch_size", "3") == [], "the batch is no parameter of a picture"


@pytest.mark.slow
def test_gen_image_killed_in_the_middle_goes_on_where_it_was(folder, run, capsys):
    command = [sys.executable, str(ROOT / "gen_image.py"), "--ckpt", "tiny-flux", "--prompts-file", "prompts.txt",
               "--output-file", "x.png", *EAGER]
    (folder / "prompts.txt").write_text("\n".join(TEXTS * 8))
    process = subprocess.Popen(command, env=os.environ | {"OMP_NUM_THREADS": "1"}, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while len(list(folder.glob("x_*.png"))) < 3 and time.monotonic() < deadline:
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.wait()
    before = {path.name: path.stat().st_mtime_ns for path in folder.glob("x_*.png")}
    assert 3 <= len(before) < 40
    assert abs(len(lines_of("x.jsonl")) - len(before)) <= 1, "at most one was killed between file and line"
    assert len(run("--output-file", "x.png")) == 40 - len(before)
    assert f"{len(before)} of 40 images" in capsys.readouterr().err
    after = {path.name: path.stat().st_mtime_ns for path in folder.glob("x_*.png")}
    assert len(after) == 40 and before.items() <= after.items()


def launch(*command):
    return subprocess.run([
        sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--num_machines",
        "1", "--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0", *map(str, command)],
        capture_output=True, text=True, timeout=240, env=os.environ | {"OMP_NUM_THREADS": "1"})


class Rank:
    """accelerate's state of one of two processes."""
    split_between_processes = PartialState.split_between_processes

    def __init__(self, index: int):
        self.process_index, self.num_processes, self.is_main_process = index, 2, index == 0

    def destroy_process_group(self):
        pass


def assert_shared(folder: Path) -> None:
    """two/ holds what one/ does, and its manifest the images that two processes made: all but the one copied there."""
    assert sorted(line["file"] for line in lines_of("two/x.jsonl")) == [
        f"x_{i:03d}_{42 + i}.png" for i in (0, 2, 3, 4)]
    for path in (folder / "one").glob("*.png"):
        assert np.abs(pixels(path) - pixels(folder / "two" / path.name)).mean() < PIXEL_BOUND


@pytest.fixture
def one_of_two(folder, run):
    """one/ with all images, and two/ with the second of them."""
    run("--output-file", "one/x.png", "--batch_size", "2")
    (folder / "two").mkdir()
    (folder / "two" / "x_001_43.png").write_bytes((folder / "one" / "x_001_43.png").read_bytes())


def test_make_images_two_ranks_share_missing_images_and_manifest(folder, run, one_of_two, monkeypatch, capsys):
    """One rank after the other, each in this process."""
    told = []

    def broadcast(shared, src, group):
        told.extend(shared if shared[0] is not None else [])
        shared[0] = told[0]

    for name, function in (("new_group", lambda **_: "a group"), ("barrier", lambda group: None),
                           ("broadcast_object_list", broadcast)):
        monkeypatch.setattr(torch.distributed, name, function)
    for index in (0, 1):
        monkeypatch.setattr(many_prompts, "join_processes", lambda args, index=index: Rank(index))
        capsys.readouterr()
        assert run("--output-file", "two/x.png", "--batch_size", "2") == [2]
        assert ("1 of 5 images" in capsys.readouterr().err) == (index == 0)
    assert_shared(folder)


@pytest.mark.slow
def test_gen_image_launched_twice_shares_missing_images_and_manifest(folder, one_of_two):
    """As `accelerate launch` starts them; --multi_gpu is what starts more than one on a CPU as well."""
    (folder / "launched.py").write_text(
        f"import os, sys; sys.path.insert(0, {str(ROOT)!r})\n"
        "import gen_image; from utils import many_prompts\n"
        "write = many_prompts.write_images\n"
        "def noted(images, *rest):\n"
        "    open(f'by_{os.environ[\"RANK\"]}', 'a').write(f'{len(images)} ')\n"
        "    return write(images, *rest)\n"
        "many_prompts.write_images = noted\n"
        "gen_image.run_cli(gen_image.main)\n")
    done = launch("launched.py", "--ckpt", "tiny-flux", "--prompts-file", "prompts.txt", *EAGER, "--output-file",
                  "two/x.png", "--batch_size", "2")
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("1 of 5 images") == 1 and "4 of 4 images" in done.stderr
    assert [(folder / f"by_{rank}").read_text() for rank in (0, 1)] == ["2 ", "2 "]
    assert_shared(folder)


@pytest.mark.parametrize("shared", [False, True])
def test_step_cache_averages_residuals_only_over_processes_that_share_an_image(build, make_args, monkeypatch, shared):
    """A step cache's residuals are each process's own: processes of other images would wait for each other."""
    asked = []
    for name, function in (("is_initialized", lambda: True), ("get_world_size", lambda *_: 2),
                           ("get_rank", lambda *_: 0), ("all_reduce", lambda *_, **__: asked.append(True))):
        monkeypatch.setattr(torch.distributed, name, function)
    pipeline = build("tiny-flux-dev")
    options = dbcache.CacheOptions(Fn_compute_blocks=1, Bn_compute_blocks=0, max_warmup_steps=1)
    dbcache.enable(pipeline, options, separate_cfg=False, shared=shared)
    pipeline(**call_kwargs(pipeline, make_args("--ckpt", "tiny-flux-dev", "--num_inference_steps", "3")))
    assert bool(asked) == shared


@pytest.mark.slow
def test_gen_image_launched_twice_with_a_step_cache_decides_apart(folder, run):
    """Three images on two processes, of which one would wait for the other's decisions."""
    (folder / "prompts.txt").write_text("\n".join(TEXTS[:3]))
    argv = [*EAGER, "--num_inference_steps", "10", "--cache_preset", "extreme"]
    steps = run("--output-file", "one/x.png", *argv, ckpt="tiny-flux-dev")
    assert len(steps) == 30
    done = launch(ROOT / "gen_image.py", "--ckpt", "tiny-flux-dev", "--prompts-file", "prompts.txt", *argv,
                  "--output-file", "two/x.png")
    assert done.returncode == 0, done.stderr
    for path in (folder / "one").glob("*.png"):
        assert np.abs(pixels(path) - pixels(folder / "two" / path.name)).mean() < PIXEL_BOUND


def test_make_images_on_a_full_disk_raises_and_keeps_what_was_computed(folder, run, monkeypatch, tmp_path_factory):
    """The disk is full for good from the second picture on. The third is computed by then; no others are."""
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    monkeypatch.setattr(tempfile, "gettempdir", lambda: str(elsewhere))

    def full_disk(image, path, parameters):
        if path.parent != elsewhere and path.name != "x_000_42.png":
            raise OSError(28, "No space left on device")
        save_image(image, path, parameters)

    with monkeypatch.context() as patch:
        patch.setattr(images, "save_image", full_disk)
        with pytest.raises(RecipeError, match=r"x_001_43\.png.*No space left on device") as found:
            run("--output-file", "x.png")
    assert [line["file"] for line in lines_of("x.jsonl")] == ["x_000_42.png"]
    kept = sorted(elsewhere.iterdir())
    assert [path.name for path in kept] == ["x_001_43.kept.png", "x_002_44.kept.png"]
    assert all(str(path) in str(found.value) for path in kept)
    assert len(run("--output-file", "x.png")) == 4
    for path in kept:
        assert np.abs(pixels(path) - pixels(path.name.replace(".kept", ""))).mean() == 0


def test_make_images_unwritable_manifest_stops_and_keeps_the_pictures(folder, run, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(many_prompts, "append_line", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left")))
        with pytest.raises(RecipeError, match=r"x\.jsonl.*x_000_42\.png.*No space left"):
            run("--output-file", "x.png")
    assert len(list(folder.glob("x_*.png"))) == 2 and len(run("--output-file", "x.png")) == 3


def test_gen_image_bad_lines_are_named_and_the_others_made(folder, run, capsys):
    (folder / "p.jsonl").write_bytes(
        b'{"prompt": "a cat"}\n\n{"prompt": "a dog", "seed": 7}\nno json\n{"prompt": "\xff"}\n{"prompt": "' +
        b"long " * 200 + b'", "seed": 9}\n')
    run("--output-file", "x.png", "--quiet", file="p.jsonl")
    assert sorted(path.name for path in folder.glob("*.png")) == ["x_000_42.png", "x_001_7.png", "x_004_9.png"]
    shown = capsys.readouterr().err
    assert [int(line) for line in re.findall(r"\bline (\d+)", shown)] == [4, 5, 6]  # no JSON, no UTF-8, too long
    assert "64 tokens" in shown


def test_is_made_ignores_whether_packages_were_exported_or_loaded(tmp_path):
    def made(how, scale=1.0):
        return {"techniques": {"compile": how, "bf16": "weights"}, "guidance_scale": scale}
    save_image(PIL.Image.new("RGB", (8, 8)), tmp_path / "x.jpg", made("exported abc, 3.1 MB"))
    assert is_made(tmp_path / "x.jpg", made("loaded abc"))
    kept = made("loaded abc")
    kept["techniques"] |= {"kept weights": {"loaded": True}}
    assert is_made(tmp_path / "x.jpg", kept)
    assert is_made(tmp_path / "x.jpg", made("loaded abc") | {"quality": "exact"})  # the techniques decide the picture
    assert not is_made(tmp_path / "x.jpg", made("loaded abc", 2.0))
    assert not is_made(tmp_path / "x.jpg", {"techniques": {"bf16": "weights"}, "guidance_scale": 1.0})


def parameters(weights="w", lora=(), **names):
    return {"techniques": {}, "contents": {"weights": weights, "lora": list(lora)}, "random_weights": False,
            "model": "a/b", "revision": None, "lora": None, "image": None, "image_sha256": "i"} | names


def test_is_made_compares_contents_not_names(tmp_path):
    path = tmp_path / "x.png"
    save_image(PIL.Image.new("RGB", (8, 8)), path, parameters(lora=[["l", 1.0]], image="a.png"))
    same = dict(lora=[["l", 1.0]])
    assert is_made(path, parameters(**same) | {"model": "b/c", "revision": "main", "lora": ["y"], "image": "b.png"})
    assert not is_made(path, parameters(lora=[["l", 0.5]])) and not is_made(path, parameters(lora=[["other", 1.0]]))
    assert not is_made(path, parameters()) and not is_made(path, parameters("other", **same))
    assert not is_made(path, parameters(**same) | {"image_sha256": "j"})
    # Of one set of weights, or of none, the name is what tells models apart.
    for one in ({"model": "tiny-flux"}, {"random_weights": True, "model": "FLUX.1-dev"}):
        save_image(PIL.Image.new("RGB", (8, 8)), path, parameters() | one)
        assert is_made(path, parameters() | one) and not is_made(path, parameters() | one | {"model": "tiny-flux-dev"})
    # As before contents were written.
    old = {name: value for name, value in parameters().items() if name != "contents"}
    save_image(PIL.Image.new("RGB", (8, 8)), path, old)
    assert not is_made(path, parameters())


@pytest.mark.parametrize("suffix", ["png", "jpg", "webp"])
def test_is_made_of_a_cut_file_is_false(tmp_path, suffix):
    path = tmp_path / f"x.{suffix}"
    save_image(PIL.Image.effect_noise((64, 64), 50).convert("RGB"), path, parameters())
    assert is_made(path, parameters())
    data = path.read_bytes()
    for cut in (5, 30, 300, len(data) // 2, len(data) - 4):
        path.write_bytes(data[:-cut])
        assert not is_made(path, parameters())


@pytest.mark.slow
def test_make_images_with_another_lora_of_the_same_name_makes_them_again(folder, run):
    (folder / "prompts.txt").write_text("\n".join(TEXTS[:2]))
    config = json.loads((tiny_presets.CHECKPOINT / "transformer/config.json").read_text())
    width = config["num_attention_heads"] * config["attention_head_dim"]
    a, b = torch.randn(4, width), torch.randn(width, 4)

    def style(name, scale):
        save_file({"transformer.transformer_blocks.0.attn.to_q.lora_A.weight": a,
                   "transformer.transformer_blocks.0.attn.to_q.lora_B.weight": b * scale}, name)

    style("style.safetensors", 0.1)
    argv = ["--output-file", "x.png", "--lora"]
    assert len(run(*argv, "style.safetensors")) == 2 and run(*argv, "style.safetensors") == []
    os.rename("style.safetensors", "renamed.safetensors")
    assert run(*argv, "renamed.safetensors") == []
    before = pixels("x_000_42.png")
    style("style.safetensors", 0.5)
    assert len(run(*argv, "style.safetensors")) == 2
    assert np.abs(pixels("x_000_42.png") - before).mean() > 0.1
    assert len(run(*argv, "style.safetensors:0.5")) == 2


def test_optimize_with_a_prompts_file_warms_up_with_the_batch(build, make_args, folder, monkeypatch):
    batches, pipeline = [], build("tiny-flux-dev")
    pipeline.transformer.register_forward_pre_hook(
        lambda m, a, kwargs: batches.append(len(kwargs["hidden_states"])), with_kwargs=True)
    monkeypatch.setattr(pipeline_utils, "compile_pipeline", lambda *_: None)
    args = make_args("--ckpt", "tiny-flux-dev", "--prompts-file", "prompts.txt", "--batch_size", "3",
                     "--num_images_per_prompt", "2", "--negative_prompt", "blue", "--true_cfg_scale", "3",
                     "--disable_quant", "--disable_bf16", "--disable_inductor_tuning_flags",
                     "--compile_export_mode", "compile")
    assert images_per_call(args) == 6
    pipeline_utils.optimize(pipeline, args)
    assert batches == [6, 6]


def test_make_images_repeated_prompts_are_encoded_once(folder, run, monkeypatch):
    encoded, load = [], pipeline_utils.load_pipeline

    def watched(args):
        pipeline = load(args)
        encode = pipeline.encode_prompt
        monkeypatch.setattr(pipeline, "encode_prompt", lambda **kwargs: (
            encoded.append(kwargs["prompt"]) if kwargs.get("prompt") else None, encode(**kwargs))[1])
        return pipeline

    monkeypatch.setattr(pipeline_utils, "load_pipeline", watched)
    run("--output-file", "x.png", "--batch_size", "2")
    assert encoded == list(dict.fromkeys(TEXTS))
