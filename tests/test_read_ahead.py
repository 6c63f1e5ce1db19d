"""Reading a checkpoint ahead: which files, and when not."""

import subprocess
import sys
from pathlib import Path

import pytest

from utils import read_ahead
from utils.benchmark_utils import create_parser

ROOT = Path(__file__).parent.parent


@pytest.fixture
def checkpoint(tmp_path, monkeypatch):
    """A folder with a file for each component, and the list of files that are read."""
    for name in (*read_ahead.COMPONENTS, "scheduler"):
        (tmp_path / "flux" / name).mkdir(parents=True)
        for part in (1, 2):
            (tmp_path / "flux" / name / f"{part}.safetensors").write_bytes(b"x" * 1000)
    (tmp_path / "flux" / "vae" / "config.json").write_text("{}")
    monkeypatch.setattr(read_ahead, "LEAST", 100)
    monkeypatch.setattr(read_ahead, "free_memory", lambda: 10**6)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
    for name in ("HF_HUB_CACHE", "XDG_CACHE_HOME", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    return tmp_path / "flux"


def files_read(monkeypatch, *argv) -> list[str]:
    read = []
    monkeypatch.setattr(read_ahead, "read", read.extend)
    if thread := read_ahead.start(create_parser().parse_args(list(map(str, argv)))):
        thread.join()
    return ["/".join(file.parts[-2:]) for file in read]


def test_start_reads_the_weights_of_a_folder_the_transformer_first(checkpoint, monkeypatch):
    assert files_read(monkeypatch, "--ckpt", checkpoint) == [
        f"{name}/{part}.safetensors" for name in read_ahead.COMPONENTS for part in (1, 2)]


def test_start_reads_once_for_all_processes_of_a_host(checkpoint, monkeypatch):
    for rank, count in (("0", 8), ("1", 0)):
        monkeypatch.setenv("LOCAL_RANK", rank)
        assert len(files_read(monkeypatch, "--ckpt", checkpoint)) == count


def test_start_reads_a_snapshot_of_the_hub(checkpoint, monkeypatch, tmp_path):
    hub = tmp_path / "home" / "hub" / "models--owner--name"
    (hub / "refs").mkdir(parents=True)
    (hub / "refs" / "main").write_text("abc")
    (hub / "snapshots").mkdir()
    checkpoint.rename(hub / "snapshots" / "abc")
    for revision in ((), ("--revision", "main"), ("--revision", "abc")):
        assert len(files_read(monkeypatch, "--ckpt", "owner/name", *revision)) == 8
    for argv in (("owner/name", "--revision", "other"), ("owner/other",), ("owner",), ("../name",)):
        assert not files_read(monkeypatch, "--ckpt", *argv)


def test_start_reads_kept_weights_in_the_place_of_the_transformers(checkpoint, monkeypatch, tmp_path):
    for age, key in enumerate(("old", "new")):
        folder = tmp_path / "cache" / "weights" / key
        folder.mkdir(parents=True)
        (folder / "00.safetensors").write_bytes(b"x" * 1000)
        (folder / "manifest.json").write_text("{}")
        read_ahead.os.utime(folder / "manifest.json", (age, age))
    flags = "--ckpt", checkpoint, "--cache-dir", tmp_path / "cache"
    found = files_read(monkeypatch, *flags, "--keep_quantized")
    assert found[-1] == "new/00.safetensors" and len(found) == 7 and not any("transformer" in name for name in found)
    assert len(files_read(monkeypatch, *flags)) == 8


def test_start_reads_a_single_file_in_the_place_of_the_transformers(checkpoint, monkeypatch, tmp_path):
    file = tmp_path / "transformer.gguf"
    file.write_bytes(b"x" * 1000)
    hub = tmp_path / "home" / "hub" / "models--me--model"
    (hub / "snapshots" / "abc" / "sub").mkdir(parents=True)
    (hub / "snapshots" / "abc" / "sub" / "x.safetensors").write_bytes(b"x" * 1000)
    (hub / "refs").mkdir()
    (hub / "refs" / "main").write_text("abc")
    for spec, name in ((file, f"{tmp_path.name}/transformer.gguf"), ("me/model/sub/x.safetensors", "sub/x.safetensors"),
                       ("me/model/sub/x.safetensors@abc", "sub/x.safetensors"), ("me/model/gone.safetensors", None)):
        found = files_read(monkeypatch, "--ckpt", checkpoint, "--transformer", spec)
        assert found[:1] == [name or "text_encoder_2/1.safetensors"] and len(found) == 6 + (name is not None)
        assert not any(read.startswith("transformer/") for read in found)


@pytest.mark.parametrize("argv, free, least", [
    (["--random_weights"], 10**6, 100), ([], 15_000, 100), ([], 0, 100), ([], 10**6, 8001)])
def test_start_reads_nothing_random_small_or_too_large(checkpoint, monkeypatch, argv, free, least):
    monkeypatch.setattr(read_ahead, "free_memory", lambda: free)
    monkeypatch.setattr(read_ahead, "LEAST", least)
    assert files_read(monkeypatch, "--ckpt", checkpoint, *argv) == []


def test_read_reads_every_byte_and_passes_over_what_it_cannot(checkpoint, monkeypatch):
    monkeypatch.setattr(read_ahead, "BLOCK", 300)
    total = []

    real = open

    def counting(path, *args, **kwargs):
        opened = real(path, *args, **kwargs)

        class File:
            def __enter__(self):
                return self

            def __exit__(self, *error):
                opened.close()

            def readinto(self, block):
                total.append(opened.readinto(block))
                return total[-1]
        return File()

    monkeypatch.setattr("builtins.open", counting)
    read_ahead.read([checkpoint / "missing.safetensors", *sorted(checkpoint.glob("vae/*.safetensors"))])
    assert sum(total) == 2000


def test_read_ahead_imports_the_standard_library_alone():
    done = subprocess.run([sys.executable, "-c", "import sys; from utils import read_ahead; "
                           "print([name for name in ('torch', 'numpy', 'huggingface_hub') if name in sys.modules])"],
                          capture_output=True, text=True, cwd=ROOT, check=True)
    assert done.stdout.strip() == "[]"


def test_free_memory_is_the_systems():
    assert sys.platform != "linux" or 2**20 < read_ahead.free_memory() < 2**50
