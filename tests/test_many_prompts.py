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

import numpy as np
import PIL.Image
import pytest
import torch
from accelerate import PartialState
from safetensors.torch import save_file

import gen_image
from utils import images, many_prompts, pipeline_utils, tiny_presets
from utils.benchmark_utils import images_per_call
from utils.cache import dbcache
from utils.common import RecipeError
from utils.images import read_parameters, save_image
from utils.many_prompts import is_made
from utils.pipeline_utils import call_kwargs

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
            patch.setattr(sys, "argv", ["gen_image.py", "--ckpt", ckpt, "--prompts-file", file, *EAGER, *argv])
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
