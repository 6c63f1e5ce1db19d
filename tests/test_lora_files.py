"""Where a LoRA lies, and what a safetensors header must be before anything of it is used."""

import struct
import types

import pytest
import torch
from safetensors.torch import save_file

from utils import lora_files
from utils.common import RecipeError
from utils.lora import read_lora
from utils.safetensors_header import read_header


@pytest.mark.parametrize("spec, expected", [
    ("a.safetensors", ("a.safetensors", 1.0)), ("a.safetensors:0.5", ("a.safetensors", 0.5)),
    ("a/b:-1e-1", ("a/b", -0.1)), (r"C:\x.safetensors", (r"C:\x.safetensors", 1.0)), (r"C:\x:2", (r"C:\x", 2.0)),
    ("a:b:0", ("a:b", 0.0)), ("a:", ("a:", 1.0)), (":1", (":1", 1.0))])
def test_split_of_a_spec_is_path_and_scale(spec, expected):
    assert lora_files.split(spec) == expected


@pytest.mark.parametrize("spec", ["a:nan", "a:-inf", "a:1e400"])
def test_split_scale_that_is_not_finite_is_refused(spec):
    with pytest.raises(RecipeError, match=spec):
        lora_files.split(spec)


# --- headers ---

def safetensors(header: bytes, data: bytes = b"") -> bytes:
    return struct.pack("<Q", len(header)) + header + data


ENTRY = b'{"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}'
OVERLAPPING = b'{"a": {"dtype": "U8", "shape": [4], "data_offsets": [0, 4]}, ' \
              b'"b": {"dtype": "U8", "shape": [4], "data_offsets": [2, 6]}}'


@pytest.mark.parametrize("content, named", [
    (b"", ""), (b"version https://git-lfs.github.com/spec/v1\noid sha256:1\nsize 9\n", "git lfs pull"),
    (b"\n<!DOCTYPE html><html>no</html>", ""), (b"PK\x03\x04" + bytes(40), "zip"), (b"GGUF" + bytes(40), "GGUF"),
    (b"\x80\x02}q\x00." + bytes(40), "pickle"), (bytes(100), ""), (b"junk", ""),
    (safetensors(ENTRY)[:20], "20.*69"), (safetensors(ENTRY, bytes(7)), "76 of 77"),
    (safetensors(ENTRY, bytes(9)), "78 of 77"), (safetensors(b"{" * 300_000), ""), (safetensors(b"{}"), ""),
    (safetensors(b'{"a": 1}'), r"\ba\b"), (safetensors(ENTRY.replace(b"F32", b"F99"), bytes(8)), "F99"),
    (safetensors(ENTRY.replace(b"[2]", b"[3]"), bytes(8)), r"\ba, F32 of \[3\]"),
    (safetensors(ENTRY.replace(b"[2]", b"[-2]"), bytes(8)), r"\ba\b"),
    (safetensors(ENTRY.replace(b"[0, 8]", b"[8, 16]"), bytes(16)), "byte 8 .* 0"),
    (safetensors(OVERLAPPING, bytes(6)), "byte 2 .* 4"), (safetensors(ENTRY[:-1] + b"," + ENTRY[1:], bytes(8)), ""),
    (safetensors(b'{"__metadata__": {"a": 1}}'), "metadata"), (struct.pack("<Q", 1 << 60) + b"{}" * 40, ""),
    (safetensors(b'{"\xff": 1}'), "")])
def test_read_lora_of_another_or_a_damaged_file_is_refused(tmp_path, content, named):
    path = tmp_path / "lora.safetensors"
    path.write_bytes(content)
    with pytest.raises(RecipeError, match=rf"(?s)lora\.safetensors.*{named}"):
        read_lora(str(path), {})


def test_read_header_has_what_the_library_wrote(tmp_path):
    path = tmp_path / "x.safetensors"
    save_file({"b": torch.zeros(2, 3, dtype=torch.bfloat16), "a": torch.zeros(0, 5),
               "c": torch.zeros((), dtype=torch.int64)}, path, {"x": "y"})
    assert read_header(path) == ({"a": ("F32", (0, 5)), "b": ("BF16", (2, 3)), "c": ("I64", ())}, {"x": "y"})


# --- folders and the Hub ---

def unreachable():
    raise ConnectionError("no network")


@pytest.fixture
def hub(monkeypatch):
    """A Hub, or its local cache, whose every repository is a folder: the list that its downloads go to."""
    fetched = []

    def download(folder):
        return lambda repo, name, revision: fetched.append((repo, name, revision)) or folder / name

    def serve(folder, names, reachable=True):
        api = types.SimpleNamespace(list_repo_files=lambda repo, revision: names)
        monkeypatch.setattr(lora_files, "HfApi", (lambda: api) if reachable else unreachable)
        monkeypatch.setattr(lora_files, "snapshot_download", lambda repo, revision, local_files_only: folder)
        monkeypatch.setattr(lora_files, "hf_hub_download", download(folder))
        return fetched
    return serve


@pytest.fixture(params=["folder", "Hub", "cache"])
def place(request, tmp_path, hub):
    """Puts empty files into a folder, a repository or the local copy of one: its folder and what --lora calls it."""
    def put(names):
        folder = tmp_path / "hub" / "models--me--style" / "snapshots" / ("0" * 40)
        folder.mkdir(parents=True)
        for name in names:
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).touch()
        hub(folder, names, reachable=request.param == "Hub")
        return folder, str(folder) if request.param == "folder" else "me/style"
    return put


@pytest.mark.parametrize("names, only", [
    (["style.safetensors"], "style.safetensors"), (["x.safetensors", "y/z.safetensors", "c.json"], "x.safetensors"),
    (["b.safetensors", "pytorch_lora_weights.safetensors"], "pytorch_lora_weights.safetensors"),
    (["b.safetensors", "adapter_model.safetensors", "b.bin"], "adapter_model.safetensors")])
def test_locate_the_one_lora_of_a_folder_or_repository_is_found(place, names, only):
    folder, path = place(names)
    assert lora_files.locate(path) == folder / only
    if path == "me/style" and names[-1].endswith(".safetensors"):
        assert lora_files.locate(f"{path}/{names[-1]}") == folder / names[-1]


@pytest.mark.parametrize("names, named", [
    (["a.safetensors", "b.safetensors"], r"a\.safetensors.*b\.safetensors"), ([], "safetensors"),
    (["adapter_model.safetensors", "pytorch_lora_weights.safetensors"], r"adapter_model.*pytorch_lora_weights"),
    (["step-1/a.safetensors", "step-2/a.safetensors"], r"step-1/a\.safetensors.*step-2/a\.safetensors"),
    (["pytorch_lora_weights.bin", "README.md"], r"pytorch_lora_weights\.bin.*weights_only=True")])
def test_locate_none_or_several_loras_are_refused_by_name(place, names, named):
    _, path = place(names)
    with pytest.raises(RecipeError, match=f"(?s){named}"):
        lora_files.locate(path)


def test_locate_fetches_the_config_with_the_weights(tmp_path, hub):
    fetched = hub(tmp_path, ["a/adapter_config.json", "a/adapter_model.safetensors", "adapter_config.json",
                             "x.safetensors"])
    assert lora_files.locate("me/style/a/adapter_model.safetensors") == tmp_path / "a/adapter_model.safetensors"
    assert fetched == [("me/style", "a/adapter_config.json", None), ("me/style", "a/adapter_model.safetensors", None)]
    with pytest.raises(RecipeError, match=r"(?s)y\.safetensors.*x\.safetensors"):
        lora_files.locate("me/style/y.safetensors")


@pytest.mark.parametrize("spec, revision, scale", [
    ("me/style/b.safetensors@refs/pr/1:0.5", "refs/pr/1", 0.5), ("me/style/b.safetensors@v1.0", "v1.0", 1.0)])
def test_locate_takes_a_file_of_a_revision(tmp_path, hub, spec, revision, scale):
    """Split from its scale first. A local folder with an @ in its name stays a folder."""
    fetched = hub(tmp_path, ["a.safetensors", "b.safetensors"])
    path, found = lora_files.split(spec)
    assert lora_files.locate(path) == tmp_path / "b.safetensors" and found == scale
    assert fetched == [("me/style", "b.safetensors", revision)]
    with pytest.raises(RecipeError, match=f"me/style/a.safetensors@{revision}"):
        lora_files.locate(f"me/style@{revision}")
    with pytest.raises(RecipeError, match="@"):
        lora_files.locate("me/style@")
    (tmp_path / "x@y").mkdir()
    (tmp_path / "x@y" / "own.safetensors").touch()
    assert lora_files.locate(f"{tmp_path}/x@y") == tmp_path / "x@y" / "own.safetensors"


@pytest.mark.parametrize("path", [
    "nowhere", "nowhere.safetensors", "./a/b", "../a/b", "/a/b", "~/a/b", "a/b.safetensors", r"C:\a", "a//b", "a/b/c",
    "a/b/c/d.txt", "lora.bin", "a/b/c.bin", "", "~nobody-of-that-name/x"])
def test_locate_path_that_is_not_here_is_refused_and_not_looked_for_on_the_hub(monkeypatch, path):
    monkeypatch.setattr(lora_files, "HfApi", None)  # whose call would end in another reason
    with pytest.raises(RecipeError, match="--lora") as refused:
        lora_files.locate(path)
    assert "NoneType" not in str(refused.value)
