"""The benchmark of the whole start: what it drops, reads and parses, and a real start of tiny-flux."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from bench import start
from utils import common, machine, random_weights, weight_files
from utils.checkpoint import read_configs
from utils.common import RecipeError

ROOT = Path(__file__).parent.parent


@pytest.fixture
def files(tmp_path):
    """Three files of 0, 10 and 25 bytes."""
    for size in (0, 10, 25):
        (tmp_path / f"{size}.bin").write_bytes(bytes(size))
    return start.files_below(tmp_path)


@pytest.fixture
def measured(monkeypatch, tmp_path):
    """measured(flags, rows) is the record, with processes of 1, 2, ... seconds that are not started.

    `measured.calls` has their arguments. A start with a flag of `measured.refused` fails.
    """
    calls, refused = [], set()

    def launch(arguments, code=0):
        calls.append(arguments)
        if refused & set(arguments):
            raise RecipeError("exit code 2: error: no")
        if "--output-file" in arguments:
            picture = Path(arguments[arguments.index("--output-file") + 1])
            picture.parent.mkdir(exist_ok=True)
            picture.touch()
            if "--keep_quantized" in arguments:
                weights = picture.parent.parent / "cache" / "weights" / "key"
                weights.mkdir(parents=True, exist_ok=True)
                (weights / "manifest.json").touch()
        return {"seconds": float(len(calls)), "stages": {"load": 2.0 * len(calls)}, "peak_cpu_bytes": 7}

    def call(flags, rows=tuple(start.ROWS), repeats=2):
        path = tmp_path / "record.json"
        start.measure(SimpleNamespace(rows=rows, repeats=repeats, output_json=str(path)), flags)
        return json.loads(path.read_text())

    environment = {"argv": ["--", "--ckpt", "tiny-flux"]}
    monkeypatch.setattr(start, "launch", launch)
    monkeypatch.setattr(start.subprocess, "run", lambda *_, **__: SimpleNamespace(stdout=json.dumps(environment)))
    call.calls, call.refused = calls, refused
    return call


def test_drop_cache_syncs_and_drops_each_file(files, monkeypatch):
    done = []
    monkeypatch.setattr(os, "fsync", lambda file: done.append(("fsync", os.readlink(f"/proc/self/fd/{file}"))))
    monkeypatch.setattr(os, "posix_fadvise", lambda file, offset, length, advice: done.append(
        (offset, length, advice, os.readlink(f"/proc/self/fd/{file}"))))
    start.drop_cache(files)
    assert len(files) == 3 and done == [one for file in files for one in (
        ("fsync", str(file)), (0, 0, os.POSIX_FADV_DONTNEED, str(file)))]


@pytest.mark.parametrize("block", [1, 10, 100])
def test_plain_read_counts_every_byte_once(files, monkeypatch, block):
    monkeypatch.setattr(start, "BLOCK", block)
    assert start.plain_read(files)["bytes"] == 35 and start.plain_read([])["bytes"] == 0


def test_stages_of_stage_log_has_every_stage_and_the_time_before(capsys):
    log = common.StageLog()
    for name in ("load", "float32 step"):
        with log.stage(name):
            pass
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 2
    noise = ["wrote it in 1.23 s", "denoising: 100%|##| 4/4 [00:01<00:00,  1.23 s/it]", "  bf16  on  a  1.00 s", ""]
    stages = start.stages_of([(9.0, line) for line in noise] + [(10.0, line.replace("0.00", "4.25")) for line in lines])
    assert stages == {"imports": 5.75, "load": 4.25, "float32 step": 4.25}
    assert start.stages_of([(20.0, f"{'compile':<12} {1234.5:8.2f} s")])["compile"] == 1234.5


def test_launch_returns_seconds_and_stages():
    code = "import sys, time; time.sleep(0.2); print('load             0.10 s', file=sys.stderr)"
    run = start.launch(["-c", code])
    assert run["seconds"] > run["stages"]["imports"] + run["stages"]["load"] > 0.2
    assert run["stages"]["load"] == 0.1


def test_launch_names_the_last_error_of_another_exit_code():
    code = "import sys; print('error: no disk', 'further', sep=chr(10), file=sys.stderr); sys.exit(3)"
    assert start.launch(["-c", code], code=3)["stages"] == {}
    with pytest.raises(RecipeError, match=r"exit code 3: error: no disk$"):
        start.launch(["-c", code])


def test_summary_has_the_median_and_every_repeat():
    runs = [{"seconds": s, "stages": {"load": 2 * s}} for s in (3.0, 1.0, 2.0)]
    runs[1]["stages"]["packages"] = 5.0
    assert start.summary(runs) == {"seconds": {"median": 2.0, "raw": [3.0, 1.0, 2.0]}, "stages": {
        "load": {"median": 4.0, "raw": [6.0, 2.0, 4.0]}, "packages": {"median": 0.0, "raw": [0.0, 5.0, 0.0]}}}


def test_given_environment_is_the_process_own_without_caches_of_its_own():
    code = "import os, json; from bench import start; os.environ['LATER'] = '1'\n" \
           "print(sorted(name.decode() for name in start.given_environment()))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True,
                          env={"TRITON_CACHE_DIR": "/x", "TORCHINDUCTOR_CACHE_DIR": "/x", "PATH": os.environ["PATH"]})
    assert done.stdout.strip() == "['PATH']"


def test_record_of_a_checkpoint_has_every_row_with_its_page_cache(measured, monkeypatch):
    dropped = []
    monkeypatch.setattr(start, "drop_cache", lambda files: dropped.append({path.name for path in files}))
    record = measured(["--ckpt", "tiny-flux"])
    assert list(record["rows"]) == list(start.ROWS) and not any("not_run" in row for row in record["rows"].values())
    assert record["schema_version"] == 1 and record["flags"] == ["--ckpt", "tiny-flux"]
    sizes, row = record["checkpoint_bytes"], record["rows"]
    assert {"transformer", "vae", "text_encoder", "text_encoder_2", "tokenizer_2"} <= set(sizes)
    assert row["plain read"]["bytes"]["raw"] == [sum(sizes.values())] * 2
    assert row["help"] == {"meaning": start.ROWS["help"], "page_cache": start.WARM, "seconds": {
        "median": 1.5, "raw": [1.0, 2.0]}, "stages": {"load": {"median": 3.0, "raw": [2.0, 4.0]}},
        "peak_cpu_bytes": {"median": 7, "raw": [7, 7]}}
    cold = [name for name in row if row[name]["page_cache"] == start.DROPPED]
    assert cold == ["plain read cold", "cold", "kept cold"]
    weights = "diffusion_pytorch_model.safetensors"
    assert len(dropped) == 6 and all(weights in names for names in dropped)
    assert ["manifest.json" in names for names in dropped] == [False] * 4 + [True] * 2
    # A start fills the cache only where no earlier row has done so.
    assert [name for name in row if "before" in row[name]] == ["kept"]
    assert row["first"]["process_seconds"]["raw"] == [9.0, 10.0] and max(row["first"]["seconds"]["raw"]) < 5


def test_row_again_alone_is_measured_warm_after_a_start_that_fills_the_cache(measured, monkeypatch):
    read = []
    monkeypatch.setattr(start, "plain_read", lambda files: read.append([len(measured.calls), len(files)]))
    row = measured(["--ckpt", "tiny-flux"], ["again"])["rows"]["again"]
    assert [before for before, _ in read] == [1] and read[0][1] > 10
    assert row["before"]["process_seconds"]["raw"] == [1.0] and row["process_seconds"]["raw"] == [2.0, 3.0]


def test_rows_that_cannot_run_say_why_and_the_others_are_measured(measured):
    measured.refused |= {"--keep_quantized"}
    record = measured(["--ckpt", "FLUX.1-schnell", "--random_weights", "1+2"])
    why = {name: row["not_run"] for name, row in record["rows"].items() if "not_run" in row}
    assert why == {"plain read": start.NO_FILES, "plain read cold": start.NO_FILES, "cold": start.NO_FILES,
                   "kept": "exit code 2: error: no", "kept cold": start.NO_FILES}
    assert record["checkpoint_bytes"] == {} and record["rows"]["first"]["page_cache"] == start.NO_FILES


def test_record_is_written_after_every_row(measured, tmp_path, monkeypatch):
    monkeypatch.setattr(start.Bench, "draw", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        measured(["--ckpt", "tiny-flux"], ["help", "import torch", "first"])
    assert list(json.loads((tmp_path / "record.json").read_text())["rows"]) == ["help", "import torch"]


@pytest.mark.parametrize("flags, repeats, text", [(["--quiet"], 1, "--quiet"), ([], 0, "--repeats 0")])
def test_measure_refuses_what_it_cannot_measure(measured, flags, repeats, text):
    with pytest.raises(RecipeError, match=text):
        measured(["--ckpt", "tiny-flux", *flags], repeats=repeats)
    assert measured.calls == []


def write(folder, layers="1+1", ckpt="tiny-flux"):
    start.write(SimpleNamespace(folder=folder, ckpt=ckpt, random_weights=layers))


def test_written_checkpoint_is_one_that_loads(tmp_path, capsys):
    write(tmp_path / "made")
    folder = tmp_path / "made"
    found = weight_files.find_checkpoint(str(folder), folder, None, read_configs(str(folder)))
    assert set(found.tensors) == set(weight_files.STEMS)
    size = float(re.search(r"([\d.]+) GB", capsys.readouterr().out)[1])
    assert size == pytest.approx(sum(path.stat().st_size for path in start.files_below(folder)) / 1e9, abs=0.01)
    with pytest.raises(RecipeError, match="no empty folder"):
        write(folder)


@pytest.mark.parametrize("free, memory, text", [(30, 99, r"33\.\d GB, and the disk has 30\.0 GB"),
                                                (99, 30, r"33\.\d GB of memory")])
def test_write_refuses_a_small_disk_or_memory_before_it_builds_weights(tmp_path, monkeypatch, free, memory, text):
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=free * 10**9))
    monkeypatch.setattr(machine, "available_memory", lambda: memory * 10**9)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(random_weights, "build", None)
    with pytest.raises(RecipeError, match=text):
        write(tmp_path / "new" / "made", "full", "black-forest-labs/FLUX.1-schnell")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_measure_times_starts_of_tiny_flux_on_a_cpu(tmp_path):
    """In a process of its own: a child's peak memory starts at its parent's, and pytest's holds torch."""
    path = tmp_path / "record.json"
    done = subprocess.run([sys.executable, "-m", "bench.start", "measure", "--output-json", str(path), "--repeats", "1",
                           "--rows", "help", "refusal", "imports", "first", "--", "--ckpt", "tiny-flux", "--device",
                           "cpu", "--num_inference_steps", "1"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    record = json.loads(path.read_text())
    rows = record["rows"]
    assert list(rows) == ["help", "refusal", "imports", "first"]
    assert all(row["seconds"]["median"] > 0 and len(row["seconds"]["raw"]) == 1 for row in rows.values())
    # Only a picture on the disk has an end.
    assert 0 < rows["first"]["seconds"]["median"] < rows["first"]["process_seconds"]["median"]
    assert {"imports", "load", "image"} <= set(rows["first"]["stages"]) and rows["help"]["stages"] == {}
    assert all(stage["median"] > 0 for stage in rows["first"]["stages"].values())
    assert rows["first"]["peak_cpu_bytes"]["median"] > rows["imports"]["peak_cpu_bytes"]["median"] > 1e8
    assert rows["help"]["peak_cpu_bytes"]["median"] < 1e8
    assert record["flags"][:2] == ["--ckpt", "tiny-flux"] and record["environment"]["packages"]["torch"]
    assert "error: --height 100" in done.stderr and [line.split()[0] for line in done.stdout.splitlines()] == list(rows)
