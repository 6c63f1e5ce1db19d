"""What a run writes: never over what is the user's, whole or not at all, and never lost."""

import errno
import gzip
import io
import json
import os
import shutil
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
from conftest import exit_code_of

import gen_image
import run_benchmark
from bench import timing
from utils import outputs, pipeline_utils
from utils.common import RecipeError
from utils.images import read_parameters, save_image
from utils.output_checks import check_output, check_outputs
from utils.outputs import append_line, as_path, atomic_write, free_name, is_record, write_json, write_or_rescue
from utils.prompts_file import Prompt, image_paths

EAGER = ["--ckpt", "tiny-flux", "--device", "cpu", "--compile_export_mode", "disabled", "--num_inference_steps", "1",
         "--quiet"]
OURS = {"techniques": {}}


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def check(make_args):
    """The check of gen_image.py's files; of run_benchmark.py's with `benchmark`."""
    def call(*argv, benchmark=False):
        args = make_args(*argv)
        prompts = [Prompt(1, 0, "a cat"), Prompt(2, 1, "a dog", 7)] if args.prompts_file else None
        paths = [as_path(args.output_file)] if benchmark else image_paths(args, prompts)
        check_outputs(args, paths, [args.prompt])
    return call


@pytest.fixture
def run(monkeypatch, folder):
    """A script from its arguments to its exit code."""
    def call(script, *argv):
        return exit_code_of(monkeypatch, script, *EAGER, *argv)
    return call


def everything(folder: Path) -> dict:
    return {path.relative_to(folder).as_posix(): None if path.is_dir() else path.read_bytes()
            for path in folder.rglob("*")}


def picture(seed=0):
    return PIL.Image.fromarray(np.random.default_rng(seed).integers(0, 256, (16, 16, 3), dtype=np.uint8))


def no_space(*_, **__):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def foreign_image(path):
    picture().save(path)


def foreign_parameters(path):
    info = PIL.PngImagePlugin.PngInfo()
    info.add_text("parameters", "a cat\nSteps: 20, Sampler: Euler, techniques: none")
    picture().save(path, "png", pnginfo=info)


def text(content):
    return lambda path: path.write_text(content)


FOREIGN = [
    (["--output-file", "x.png"], "x.png", foreign_image), (["--output-file", "x.png"], "x.png", foreign_parameters),
    (["--output-file", "x.PNG"], "x.PNG", text("no image")), (["--output-file", "x.jpg"], "x.jpg", foreign_image),
    (["--output-file", "x.webp"], "x.webp", foreign_image),
    (["--output-file", "x.png", "--num_images_per_prompt", "2"], "x_001_43.png", foreign_image),
    (["--output-file", "x.png", "--prompts-file", "p.txt"], "x_001_7.png", foreign_image),
    (["--output-file", "x.png", "--prompts-file", "p.txt"], "x.jsonl", text('{"file": "x.png", "text": "a cat"}\n')),
    (["--output-file", "x.png", "--prompts-file", "p.txt"], "x.jsonl", text("{}")),
    (["--output-file", "x.png", "--prompts-file", "p.txt"], "x.jsonl", lambda path: path.write_bytes(b"\xff\x00" * 9)),
    (["--output-json", "r.json"], "r.json", text('{"weights": [1, 2]}')),
    (["--output-json", "r.json"], "r.json", text('["schema_version"]')),
    (["--output-json", "r.json"], "r.json", text("[" * 100_000)),
    (["--output-json", "ck/config.json"], "ck/config.json", text('{"_class_name": "FluxTransformer2DModel"}')),
    (["--trace-file", "t.json"], "t.json", text('{"schema_version": 1}')),
    (["--trace-file", "t.json.gz"], "t.json.gz", lambda path: path.write_bytes(gzip.compress(b"my thesis"))),
    (["--trace-file", "t.json.gz"], "t.json.gz", lambda path: path.write_bytes(gzip.compress(b"my thesis")[:-9])),
]


@pytest.mark.parametrize("argv, name, make", FOREIGN)
def test_check_outputs_foreign_file_is_refused_and_stays(check, folder, argv, name, make):
    (folder / name).parent.mkdir(exist_ok=True)
    make(folder / name)
    before = everything(folder)
    with pytest.raises(RecipeError, match=f"{argv[0]}.*{Path(name).name}"):
        check(*argv)
    assert everything(folder) == before


def test_scripts_foreign_file_stays_and_nothing_loads(run, folder, monkeypatch, capsys):
    for script, argv in ((gen_image, []), (run_benchmark, []), (run_benchmark, ["--output-json", "r.json"])):
        foreign_image(folder / "output.png")
        if argv:
            os.rename("output.png", "r.json")
        before = everything(folder)
        monkeypatch.setattr(pipeline_utils, "load_pipeline", lambda args: pytest.fail("the model was loaded"))
        assert run(script, *argv) == 2
        assert everything(folder) == before
        assert len(capsys.readouterr().err.strip().splitlines()) == 1


@pytest.mark.parametrize("argv, name, make", [
    (["--output-file", "x.png"], "x.png", lambda path: save_image(picture(), path, OURS)),
    (["--output-file", "x.jpg"], "x.jpg", lambda path: save_image(picture(), path, OURS)),
    (["--output-file", "x.png"], "x.png", text("")),
    (["--output-file", "x.png", "--prompts-file", "p.txt"], "x_000_42.png",
     lambda path: save_image(picture(), path, OURS)),
    (["--output-file", "x.png", "--prompts-file", "p.txt"], "x.jsonl",
     lambda path: append_line(path, {"file": "x.png", "techniques": {}, "sha256": "0"})),
    (["--output-file", "x.png", "--prompts-file", "p.txt"], "x.jsonl", text('{"file": "x_0')),
    (["--output-file", "x.png", "--prompts-file", "p.txt"], "x.jsonl", text('{"fi')),
    (["--output-json", "r.json"], "r.json", lambda path: write_json(path, {"schema_version": 1})),
    (["--trace-file", "t.json"], "t.json", text('{\n  "schemaVersion": 1,\n  "traceEvents": []}')),
    (["--trace-file", "t.gz"], "t.gz", lambda path: path.write_bytes(gzip.compress(b' {\n  "schemaVersion": 1'))),
])
def test_check_outputs_file_of_this_program_may_be_overwritten(check, folder, argv, name, make):
    make(folder / name)
    before = everything(folder)
    check(*argv)
    assert everything(folder) == before


@pytest.mark.parametrize("link", [None, os.symlink, os.link])
@pytest.mark.parametrize("argv, written", [
    (["--image", "IN", "--output-file", "edit.png", "--num_images_per_prompt", "2"], "edit_000_42.png"),
    (["--image", "IN", "--output-file", "./a.png"], "a.png"),
    (["--lora", "other", "--lora", "IN:0.5", "--output-file", "a.png"], "a.png"),
    (["--prompts-file", "IN", "--output-file", "all.png"], "all.jsonl"),
    (["--step_cache", "IN", "--output-json", "c.json"], "c.json"),
])
def test_check_outputs_input_as_output_is_refused(check, folder, argv, written, link):
    """Not even one that this program made, and under whatever name."""
    make = {".png": lambda path: save_image(picture(), path, OURS),
            ".json": lambda path: write_json(path, {"schema_version": 1}),
            ".jsonl": lambda path: append_line(path, {"file": "x", "techniques": {}, "sha256": "0"})}
    read = f"in{Path(written).suffix}" if link else written
    make[Path(written).suffix](folder / read)
    if link:
        link(folder / read, folder / written)
    before = everything(folder)
    with pytest.raises(RecipeError, match=f"{written if link is not os.symlink else read}.*{argv[-4]}"):
        check(*[one.replace("IN", read) for one in argv])
    assert everything(folder) == before


@pytest.mark.parametrize("argv", [
    ["--output-json", "a.json", "--trace-file", "a.json"], ["--output-json", "a.json", "--trace-file", "b/../A.json"],
    ["--output-file", "a.png", "--output-json", "a.png"], ["--output-json", "link.json", "--trace-file", "a.json"],
    ["--output-file", "a.png", "--prompts-file", "p.txt", "--output-json", "a.jsonl"],
])
def test_check_outputs_two_outputs_in_one_file_are_refused(check, folder, argv):
    os.symlink("a.json", "link.json")
    with pytest.raises(RecipeError) as refused:
        check(*argv)
    assert all(flag in str(refused.value) for flag in argv if flag.startswith(("--output", "--trace")))
    check("--output-json", "a.json", "--trace-file", "b.json", "--output-file", "a.png")


@pytest.mark.parametrize("name", ["", ".", "..", "/", "out/", "x.png/", ".png", "x", "x.gif", "x.png.", "~no", "d.png",
                                  "fifo.png", "/proc/nowhere/a.png", "x.png/a.png", "a" * 300 + ".png",
                                  "é" * 126 + ".png", "n" * 300 + "/x.png"])
def test_check_outputs_image_name_that_is_no_file_is_refused_and_leaves_nothing(check, folder, name):
    (folder / "d.png").mkdir()
    os.mkfifo("fifo.png")
    (folder / "x.png").write_bytes(b"")
    before = sorted(folder.rglob("*"))
    with pytest.raises(RecipeError, match="--output-file"):
        check("--output-file", name)
    assert sorted(folder.rglob("*")) == before


@pytest.mark.parametrize("flag", ["--output-json", "--trace-file"])
@pytest.mark.parametrize("name", ["", ".", "d", "/dev/null", "/proc/nowhere/r.json", "r" * 300])
def test_check_outputs_record_name_that_is_no_file_is_refused_and_leaves_nothing(check, folder, flag, name):
    (folder / "d").mkdir()
    with pytest.raises(RecipeError, match=flag):
        check("--output-file", "new/x.png", flag, name)
    assert [path.name for path in folder.iterdir()] == ["d"]


def test_gen_image_unusual_names_that_a_file_system_takes_work(run, folder):
    """Long names, dots, upper case, and bytes that are no UTF-8."""
    names = ["A cat. It sits" + "." * 60 + "x" * 170 + ".png", os.fsdecode(b"new/caf\xe9.JPeG"), "~nobody.webp"]
    for name in names:
        assert run(gen_image, "--output-file", name) == 0
        assert read_parameters(name)["num_inference_steps"] == 1
    assert sorted(everything(folder)) == sorted([*names, "new"])


def test_check_outputs_numbered_names_and_the_manifest_have_to_fit(check, folder):
    (folder / "p.txt").write_text("a cat")
    check("--output-file", "x" * 251 + ".png")
    for argv in (["--num_images_per_prompt", "2"], ["--prompts-file", "p.txt"]):
        check("--output-file", "x" * 243 + ".png", *argv)
        with pytest.raises(RecipeError, match="--output-file"):
            check("--output-file", "x" * 246 + ".png", *argv)
    with pytest.raises(RecipeError, match="--output-file"):
        check("--output-file", "x" * 250 + ".png", "--prompts-file", "p.txt")


def test_check_outputs_new_folders_stay_only_where_nothing_is_refused(check, folder):
    check("--output-file", "a/b/c.png")
    assert sorted(everything(folder)) == ["a", "a/b"]
    (folder / "a/r.json").write_text("{}")
    with pytest.raises(RecipeError):
        check("--output-file", "a/e/f/c.png", "--output-json", "a/r.json")
    assert sorted(everything(folder)) == ["a", "a/b", "a/r.json"]


def read_only(*_):
    raise OSError(errno.EROFS, os.strerror(errno.EROFS))


@pytest.mark.parametrize("module, name, stand_in", [
    (shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**9, 10**9, 10**6)), (os, "fsync", no_space),
    (outputs, "open", read_only)], ids=["nearly full", "full", "read-only"])
def test_check_outputs_folder_without_room_is_refused_and_leaves_nothing(check, folder, monkeypatch, module, name,
                                                                         stand_in):
    with monkeypatch.context() as patch:
        patch.setattr(module, name, stand_in, raising=False)
        with pytest.raises(RecipeError, match=f"--output-file.*{folder / 'new'}"):
            check("--output-file", "new/x.png")
    assert everything(folder) == {}


@pytest.mark.parametrize("argv, text", [
    (["--output-file", "x.webp", "--height", "16400"], "16.?383"),
    (["--output-file", "x.JPG", "--width", "65536"], "65.?535"),
    (["--output-file", "x.jpg", "--prompt", "a cat, " * 9_000], "png"),
    (["--output-file", "x.jpg", "--prompt", "猫" * 11_000], "png"),
])
def test_check_outputs_beyond_the_limits_of_a_format_is_refused(check, folder, argv, text):
    with pytest.raises(RecipeError, match=text):
        check(*argv)
    assert everything(folder) == {}


def test_check_outputs_within_the_limits_of_a_format_passes(check, folder):
    for name in ("x.png", "x.webp"):
        check("--output-file", name, "--prompt", "a cat, " * 9_000)
    check("--output-file", "x.jpg", "--prompt", "a cat, " * 8_000)


def test_check_outputs_format_that_pil_lacks_is_refused(check, folder, monkeypatch):
    PIL.Image.init()
    monkeypatch.delitem(PIL.Image.SAVE, "WEBP")
    with pytest.raises(RecipeError, match=r"\.webp.*\.png"):
        check("--output-file", "x.webp")
    assert everything(folder) == {}


def test_check_output_foreign_record_is_refused(folder):
    check_output("new/r.json", "--output-json", is_record)
    (folder / "new/r.json").write_text("{}")
    with pytest.raises(RecipeError, match="--output-json"):
        check_output("new/r.json", "--output-json", is_record)


def test_replacing_failed_write_leaves_the_old_file_and_nothing_else(tmp_path):
    path = tmp_path / "r.json"
    path.write_text("old")
    with pytest.raises(RuntimeError), atomic_write(path) as temporary:
        temporary.write_text("half")
        raise RuntimeError
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]
    with atomic_write(path) as temporary:
        temporary.write_text("new")
    assert path.read_text() == "new" and list(tmp_path.iterdir()) == [path]


def test_write_json_keeps_the_mode_of_the_user_and_a_link(tmp_path):
    before = os.umask(0o027)
    try:
        os.symlink(tmp_path / "real.json", tmp_path / "link.json")
        write_json(tmp_path / "link.json", {"a": 1})
    finally:
        os.umask(before)
    assert (tmp_path / "link.json").is_symlink() and json.loads((tmp_path / "real.json").read_text()) == {"a": 1}
    assert (tmp_path / "real.json").stat().st_mode & 0o777 == 0o640


def test_write_or_rescue_file_that_appeared_during_the_run_stays(tmp_path):
    path = tmp_path / "x.png"
    foreign_image(path)
    before = path.read_bytes()
    error = write_or_rescue(lambda file: save_image(picture(1), file, OURS), path, "picture")
    assert path.read_bytes() == before and str(tmp_path / "x.kept.png") in str(error)
    assert PIL.Image.open(tmp_path / "x.kept.png").tobytes() == picture(1).tobytes()
    assert sorted(one.name for one in tmp_path.iterdir()) == ["x.kept.png", "x.png"]


def test_free_name_is_of_no_other_file_and_fits(tmp_path):
    path = tmp_path / "x.png"
    assert free_name(path, "kept") == tmp_path / "x.kept.png"
    os.symlink("nowhere", tmp_path / "x.kept.png")
    (tmp_path / "x.kept.1.png").write_text("")
    assert free_name(path, "kept") == tmp_path / "x.kept.2.png"
    free_name(tmp_path / ("猫" * 83 + ".jpeg"), "kept").write_text("it fits")


@pytest.fixture
def temporary(tmp_path_factory, monkeypatch):
    folder = tmp_path_factory.mktemp("temporary")
    monkeypatch.setattr(tempfile, "gettempdir", lambda: str(folder))
    return folder


def save_of(place, monkeypatch):
    """`Image.save` as on a disk that is full in some folder once the checks are over."""
    save = PIL.Image.Image.save

    def full(self, path, *args, **kwargs):
        if self.size != (16, 16) and Path(path).resolve().is_relative_to(place):
            Path(path).write_bytes(b"half")
            no_space()
        return save(self, path, *args, **kwargs)

    monkeypatch.setattr(PIL.Image.Image, "save", full)


def test_gen_image_on_a_full_disk_keeps_pictures_in_the_temporary_folder(run, folder, temporary, monkeypatch, capsys):
    assert run(gen_image, "--output-file", "right.png", "--num_images_per_prompt", "2") == 0
    save_of(folder, monkeypatch)
    assert run(gen_image, "--output-file", "x.png", "--num_images_per_prompt", "2") == 2
    assert sorted(path.name for path in temporary.iterdir()) == ["x_000_42.kept.png", "x_001_43.kept.png"]
    assert sorted(everything(folder)) == ["right_000_42.png", "right_001_43.png"]
    for name in ("000_42", "001_43"):
        kept, right = (PIL.Image.open(path) for path in (temporary / f"x_{name}.kept.png", f"right_{name}.png"))
        assert kept.tobytes() == right.tobytes()
    shown = capsys.readouterr().err
    assert all(str(path) in shown for path in temporary.iterdir())


def test_gen_image_into_a_vanished_folder_keeps_the_picture_elsewhere(run, folder, temporary, monkeypatch, capsys):
    optimize = pipeline_utils.optimize
    monkeypatch.setattr(pipeline_utils, "optimize", lambda *a: (optimize(*a), os.rmdir("new"))[0])
    assert run(gen_image, "--output-file", "new/x.png") == 2
    assert [path.name for path in temporary.iterdir()] == ["x.kept.png"] and everything(folder) == {}
    assert "x.kept.png" in capsys.readouterr().err
    monkeypatch.setattr(tempfile, "gettempdir", no_space)
    assert run(gen_image, "--output-file", "new/x.png") == 2
    shown = capsys.readouterr().err
    assert "x.png" in shown and "kept" not in shown


def test_run_benchmark_on_a_full_disk_prints_its_result_and_keeps_files(run, folder, temporary, monkeypatch, capsys):
    argv = ["--runs", "1", "--warmup", "0", "--output-json", "r.json", "--trace-file", "t.json.gz"]
    replace = os.replace

    def full(source, target):
        no_space() if Path(target).is_relative_to(folder) else replace(source, target)

    monkeypatch.setattr(os, "replace", full)
    assert run(run_benchmark, *argv) == 2
    shown = capsys.readouterr()
    record = json.loads(shown.out.splitlines()[-1])
    assert record["broken"] is None and record == json.loads((temporary / "r.kept.json").read_text())
    assert PIL.Image.open(temporary / "output.kept.png").size == (128, 128)
    assert b"traceEvents" in gzip.decompress((temporary / "t.json.kept.gz").read_bytes())
    assert everything(folder) == {}
    assert all(name in shown.err for name in ("output.kept.png", "r.kept.json", "t.json.kept.gz"))
    monkeypatch.setattr(timing, "refuse_torn_trace", no_space)
    assert run(run_benchmark, *argv) == 2
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["schema_version"] == 1


def test_run_benchmark_overwrites_its_own_files(run, folder):
    argv = ["--runs", "1", "--warmup", "0", "--output-json", "r.json", "--trace-file", "t.json.gz"]
    for _ in range(2):
        assert run(run_benchmark, *argv) == 0
    assert sorted(everything(folder)) == ["output.png", "r.json", "t.json.gz"]
    (folder / "t.json").write_bytes(gzip.decompress((folder / "t.json.gz").read_bytes())[:-9])
    with pytest.raises(OSError, match=r"t\.json"):
        outputs.refuse_torn_trace(folder / "t.json")


def record(number):
    return {"file": f"{number}.png", "sha256": "0", "techniques": {}}


def test_append_line_after_a_torn_line_begins_a_new_one(tmp_path):
    path = tmp_path / "x.jsonl"
    append_line(path, record(1))
    whole = path.read_bytes()
    path.write_bytes(whole + whole[:9])
    append_line(path, record(2))
    assert path.read_text().splitlines() == [json.dumps(record(1)), whole[:9].decode(), json.dumps(record(2))]


@pytest.mark.parametrize("space", [0, 7])
def test_append_line_on_a_full_disk_tears_no_line(tmp_path, monkeypatch, space):
    path = tmp_path / "x.jsonl"
    append_line(path, record(1))
    before = path.read_bytes()

    class Full(io.FileIO):
        def write(self, line):
            return super().write(line[:space]) if space else no_space()

    monkeypatch.setattr(outputs, "open", lambda path, mode, **_: Full(path, mode), raising=False)
    with pytest.raises(OSError) as failed:
        append_line(path, record(2))
    assert failed.value.errno == errno.ENOSPC and path.read_bytes() == before


def test_append_line_of_several_writers_mixes_no_lines(tmp_path):
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda i: append_line(tmp_path / "x.jsonl", record(i)), range(200)))
    lines = [json.loads(line) for line in (tmp_path / "x.jsonl").read_text().splitlines()]
    assert sorted(int(line["file"][:-4]) for line in lines) == list(range(200))


def test_append_line_to_a_foreign_manifest_is_refused(tmp_path):
    (tmp_path / "x.jsonl").write_text('{"text": "mine"}\n')
    with pytest.raises(FileExistsError):
        append_line(tmp_path / "x.jsonl", record(1))
    assert (tmp_path / "x.jsonl").read_text() == '{"text": "mine"}\n'
