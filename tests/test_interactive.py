"""gen_image.py --interactive: the pictures are those of the flags, and nothing a person types ends the session."""

import io
import re
import sys

import numpy as np
import PIL.Image
import pytest
import torch

from utils import many_prompts
from utils.benchmark_utils import check_args
from utils.common import RecipeError, StageLog
from utils.hardware import Hardware
from utils.images import read_parameters
from utils.interactive import Session
from utils.pipeline_utils import call_kwargs, load_pipeline, optimize
from utils.prompts_file import args_with

FROG, KEY = "3d frog on a blue background", "flat key"


@pytest.fixture
def start(make_args, tmp_path, monkeypatch):
    """start(*flags): an optimized tiny-flux in an empty folder, and its arguments."""
    monkeypatch.chdir(tmp_path)

    def call(*argv):
        args = make_args("--ckpt", "tiny-flux", "--interactive", "--height", "64", "--width", "64",
                         "--num_inference_steps", "1", *argv)
        check_args(args)
        return optimize(load_pipeline(args), args), args
    return call


@pytest.fixture
def type_in(monkeypatch):
    """type_in(pipeline, args, *lines): a session whose standard input has these lines."""
    def call(pipeline, args, *lines):
        monkeypatch.setattr(sys, "stdin", io.StringIO("".join(f"{line}\n" for line in lines)))
        Session(pipeline, args, StageLog(True)).run()
    return call


def pixels(path):
    return np.asarray(PIL.Image.open(path))


def test_session_draws_what_the_flags_draw(start, type_in, tmp_path, capsys):
    pipeline, args = start()
    type_in(pipeline, args, FROG, ":size 96x64", ":seed 7", "", KEY, ":steps 2", " :size 64 x 64", ":seed 42", FROG)
    shown = [line.split("  ") for line in capsys.readouterr().out.splitlines()]
    names = ["output_000_42.png", "output_000_7.png", "output_001_42.png"]
    assert [name for _, name in shown] == names == sorted(path.name for path in tmp_path.iterdir())
    assert all(float(seconds.removesuffix(" s")) > 0 for seconds, _ in shown)
    for name, prompt, flags in zip(names, (FROG, KEY, FROG), (
            {}, {"width": 96, "seed": 7}, {"num_inference_steps": 2}), strict=True):
        own = args_with(args, flags)
        expected = pipeline(**call_kwargs(pipeline, own, prompt)).images[0]
        assert np.array_equal(pixels(name), np.asarray(expected))
        found = read_parameters(name)
        assert (found["prompt"], found["seed"], found["width"], found["num_inference_steps"]) == (
            prompt, own.seed, own.width, own.num_inference_steps)


@pytest.mark.parametrize("wrong", [
    ":size 97x64", ":size 96", ":size 0x64", ":seed -1", ":seed x", ":steps 0", ":steps", ":guidance 3",
    ":guidance nan", ":image nowhere.png", ":save x.png", ":", ":nothing", ": size 96x64"])
def test_session_goes_on_after_a_line_that_is_refused(start, type_in, capsys, wrong):
    pipeline, args = start()
    type_in(pipeline, args, wrong, FROG)
    printed = capsys.readouterr()
    assert printed.err.count("error: ") == 1 and "output_000_42.png" in printed.out
    assert pixels("output_000_42.png").shape == (64, 64, 3)


def test_session_drops_a_picture_and_goes_on(start, type_in, monkeypatch, capsys, tmp_path):
    pipeline, args = start()
    decode, calls = pipeline.vae.decode, []

    def interrupted(*given, **named):
        calls.append(1)
        if len(calls) == 1:
            raise KeyboardInterrupt
        return decode(*given, **named)

    monkeypatch.setattr(pipeline.vae, "decode", interrupted)
    type_in(pipeline, args, FROG, KEY)
    assert [path.name for path in tmp_path.iterdir()] == ["output_000_42.png"]
    assert read_parameters("output_000_42.png")["prompt"] == KEY and len(calls) == 2


def test_session_goes_on_after_a_picture_that_runs_out_of_memory(start, type_in, monkeypatch, capsys, tmp_path):
    pipeline, args = start()
    decode = pipeline.vae.decode

    def with_little_memory(latents, *given, **named):
        if latents.shape[-1] > 8:
            raise torch.OutOfMemoryError("Tried to allocate 9 GiB. The rest.")
        return decode(latents, *given, **named)

    monkeypatch.setattr(pipeline.vae, "decode", with_little_memory)
    type_in(pipeline, args, ":size 128x64", FROG, ":size 64x64", KEY)
    assert [path.name for path in tmp_path.iterdir()] == ["output_000_42.png"]
    assert "error: Tried to allocate 9 GiB" in capsys.readouterr().err


def test_session_refuses_a_size_that_does_not_fit(start, type_in, monkeypatch, capsys):
    pipeline, args = start()
    monkeypatch.setattr(many_prompts, "gpu", lambda limit: Hardware("cuda", name="H100", free_bytes=4 * 2**30))
    args.device = "cuda"
    type_in(pipeline, args, ":size 4096x4096", ":size 64x32", KEY)
    assert re.findall("error: (not enough GPU memory).* 4.0 GiB", capsys.readouterr().err) == ["not enough GPU memory"]
    assert pixels("output_000_42.png").shape == (32, 64, 3)


def test_session_keeps_the_pictures_of_earlier_ones(start, type_in, tmp_path):
    pipeline, args = start("--num_images_per_prompt", "2")
    type_in(pipeline, args, FROG)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    type_in(pipeline, args, KEY, ":save again.webp")
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "again.webp", *(f"output_{number:03d}_{seed}.png" for number in (0, 1) for seed in (42, 43))]
    assert all((tmp_path / name).read_bytes() == data for name, data in before.items())
    assert read_parameters("again.webp") == read_parameters("output_001_43.png")


def test_session_on_a_terminal_ends_with_its_input(start, monkeypatch, tmp_path):
    pipeline, args = start()
    answers = iter([FROG, KeyboardInterrupt(), ":seed 3", FROG, EOFError()])

    def ask(_):
        answer = next(answers)
        if isinstance(answer, BaseException):
            raise answer
        return answer

    monkeypatch.setattr("builtins.input", ask)
    monkeypatch.setattr(sys, "stdin", type("Terminal", (), {"isatty": lambda self: True})())
    Session(pipeline, args, StageLog(True)).run()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["output_000_3.png", "output_000_42.png"]


def test_interactive_with_a_file_of_prompts_is_refused(make_args, tmp_path):
    (tmp_path / "p.txt").write_text("a")
    with pytest.raises(RecipeError, match=r"--interactive.*--prompts-file"):
        check_args(make_args("--ckpt", "tiny-flux", "--interactive", "--prompts-file", str(tmp_path / "p.txt")))
