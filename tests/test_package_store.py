"""Packages on disk: every fault made for real, none of them loaded, nothing lost."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from utils import package_store
from utils.benchmark_utils import RecipeError
from utils.package_store import Rejected, key_of, locked, nearest, open_store, publish, set_aside, verify

ROOT = Path(__file__).parent.parent
FIELDS = {"models": {"transformer": {"num_layers": "2"}}, "versions": {"torch": "2.13.0"}}


def make(folder):
    (folder / "double.pt2").write_bytes(b"code" * 1000)
    (folder / "single.pt2").write_bytes(b"more" * 1000)


@pytest.fixture
def root(tmp_path):
    return open_store(tmp_path / "cache")


def test_what_is_published_is_whole_and_private(root):
    folder = publish(root, FIELDS, make)
    assert folder == root / key_of(FIELDS) and verify(folder)["fields"] == FIELDS
    assert {path.name for path in folder.iterdir()} == {"double.pt2", "single.pt2", "manifest.json"}
    assert folder.stat().st_mode & 0o777 == root.stat().st_mode & 0o777 == 0o700
    assert all(path.stat().st_mode & 0o777 == 0o600 for path in folder.iterdir())


def test_the_key_is_every_field():
    other = json.loads(json.dumps(FIELDS))
    assert key_of(other) == key_of(FIELDS)
    other["versions"]["torch"] = "2.11.0"
    assert key_of(other) != key_of(FIELDS)


def flip(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize("spoil, said", [
    (lambda f: flip(f / "double.pt2"), "double.pt2 is damaged"),
    (lambda f: (f / "single.pt2").write_bytes((f / "single.pt2").read_bytes()[:-1]), "single.pt2 is damaged"),
    (lambda f: (f / "single.pt2").unlink(), "single.pt2 is missing"),
    (lambda f: (f / "manifest.json").unlink(), "manifest.json is missing"),
    (lambda f: (f / "manifest.json").write_text("{"), "manifest.json is damaged"),
    (lambda f: (f / "manifest.json").write_text("[]"), "manifest.json is damaged"),
    (lambda f: (f / "double.pt2").chmod(0o666), "writable for others"),
    (lambda f: f.chmod(0o777), "writable for others"),
    (lambda f: ((f / "double.pt2").rename(f.parent / "x"), (f / "double.pt2").symlink_to(f.parent / "x")),
     "symbolic link"),
])
def test_a_spoilt_package_is_rejected(root, spoil, said):
    folder = publish(root, FIELDS, make)
    spoil(folder)
    with pytest.raises(Rejected, match=said):
        verify(folder)


def test_other_fields_and_other_formats_are_rejected(root):
    folder = publish(root, FIELDS, make)
    with pytest.raises(Rejected, match="belong to"):
        verify(folder.rename(root / ("0" * 20)))
    manifest = json.loads((root / ("0" * 20) / "manifest.json").read_text())
    (root / ("0" * 20) / "manifest.json").write_text(json.dumps(manifest | {"format": 99}))
    with pytest.raises(Rejected, match="format 99"):
        verify(root / ("0" * 20))


def test_names_in_a_manifest_cannot_leave_the_folder(root):
    folder = publish(root, FIELDS, make)
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["files"]["../outside.pt2"] = manifest["files"].pop("double.pt2")
    (root / "outside.pt2").write_bytes(b"code" * 1000)
    (folder / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(Rejected, match=r"outside\.pt2 is missing"):
        verify(folder)


@pytest.mark.skipif(os.getuid() != 0, reason="only root can give a file to another user")
def test_files_of_another_user_are_rejected(root):
    folder = publish(root, FIELDS, make)
    os.chown(folder / "double.pt2", 12345, -1)
    with pytest.raises(Rejected, match="another user"):
        verify(folder)


def test_a_cache_that_others_can_write_into_is_refused(tmp_path):
    root = open_store(tmp_path / "cache")
    root.chmod(0o777)
    with pytest.raises(RecipeError, match=r"writable for others.*chmod 700"):
        open_store(tmp_path / "cache")
    root.chmod(0o700)
    (tmp_path / "link").mkdir()
    (tmp_path / "link" / "packages").symlink_to(root)
    with pytest.raises(RecipeError, match="symbolic link"):
        open_store(tmp_path / "link")


def test_a_cache_that_cannot_be_written_into_is_said(root, monkeypatch):
    monkeypatch.setattr(os, "access", lambda path, mode: path != root)  # root, as in a container, may write anywhere
    with pytest.raises(RecipeError, match=r"packages is not writable\. Choose another"):
        open_store(root.parent)


def test_a_failed_export_leaves_nothing(root):
    def fail(folder):
        make(folder)
        raise ValueError("differs from eager")

    with pytest.raises(ValueError):
        publish(root, FIELDS, fail)
    assert list(root.iterdir()) == []


def test_a_full_disk_is_said_and_leaves_nothing(root, monkeypatch):
    def fill(folder):
        make(folder)
        with open("/dev/full", "w") as full:  # the kernel's own "no space left on device"
            full.write("x")

    with pytest.raises(RecipeError, match="no space left"):
        publish(root, FIELDS, fill)
    assert list(root.iterdir()) == []
    monkeypatch.setattr(package_store, "NEEDED_BYTES", 2**60)
    with pytest.raises(RecipeError, match="exporting needs"):
        publish(root, FIELDS, lambda folder: pytest.fail("began to export"))


CHILD = """
import sys, time
sys.path.insert(0, {project!r})
from pathlib import Path
from utils.package_store import key_of, locked, publish, verify
root, fields = Path({root!r}), {fields!r}
def make(folder):
    (folder / "double.pt2").write_bytes(b"part")
    print("exporting", flush=True)
    time.sleep({pause})
    (folder / "double.pt2").write_bytes(b"code" * 1000)
with locked(root, key_of(fields)):
    if (root / key_of(fields)).exists():
        print("found", sorted(verify(root / key_of(fields))["files"]))
    else:
        publish(root, fields, make)
        print("made")
"""


def child(root, pause):
    code = CHILD.format(project=str(ROOT), root=str(root), fields=FIELDS, pause=pause)
    return subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def test_killed_in_the_middle(root):
    """SIGKILL while exporting: no package, the lock is free, and the next export clears what was left."""
    process = child(root, pause=60)
    assert process.stdout.readline() == "exporting\n"
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert [path.name for path in root.glob(".*.tmp")] and not (root / key_of(FIELDS)).exists()
    with locked(root, key_of(FIELDS)):
        folder = publish(root, FIELDS, make)
    assert verify(folder) and list(root.glob(".*.tmp")) == []


@pytest.mark.slow
def test_two_at_once_leave_one_good_package(root):
    processes = [child(root, pause=1.5) for _ in range(2)]
    said = sorted(process.communicate(timeout=120)[0] for process in processes)
    assert said == ["exporting\nmade\n", "found ['double.pt2']\n"]
    assert verify(root / key_of(FIELDS)) and list(root.glob(".*.tmp")) == []


@pytest.mark.slow
def test_waiting_for_another_process_is_said(root, capfd):
    process = child(root, pause=1.0)
    process.stdout.readline()
    with locked(root, key_of(FIELDS)):
        assert (root / key_of(FIELDS)).exists()
    process.communicate()
    assert "waiting" in capfd.readouterr().err


def test_what_is_set_aside_is_kept(root):
    for n in range(2):
        folder = publish(root, FIELDS, make)
        aside = set_aside(folder, "rejected")
        assert aside.name == f"rejected-{key_of(FIELDS)}-{n}" and (aside / "double.pt2").exists()
    publish(root, FIELDS, make)
    publish(root, FIELDS, make)  # --re-export
    assert (root / f"replaced-{key_of(FIELDS)}-0").exists() and verify(root / key_of(FIELDS))


def test_the_nearest_package_names_what_differs(root):
    assert nearest(root, FIELDS) is None
    publish(root, FIELDS, make)
    publish(root, FIELDS | {"versions": {"torch": "2.11.0"}, "x": 1}, make)
    (root / "broken").mkdir()
    key, differs = nearest(root, FIELDS | {"versions": {"torch": "2.14.0"}})
    assert key == key_of(FIELDS) and differs == {"versions.torch": ("2.13.0", "2.14.0")}


@pytest.fixture
def hub(root, tmp_path, monkeypatch):
    """A repository with one packed package; its SHA-256."""
    folder = publish(root, FIELDS, make)
    digest = package_store.pack(folder, tmp_path / f"{key_of(FIELDS)}.zip")
    monkeypatch.setattr(package_store, "hf_hub_download", lambda repo, name, revision: str(tmp_path / name))
    set_aside(folder, "old")
    return digest


def test_a_fetched_package_is_the_one_that_was_packed(root, hub):
    folder = publish(root, FIELDS, package_store.fetch(f"me/packages@v1:{hub}", key_of(FIELDS)))
    assert verify(folder)["files"] == verify_aside(root)["files"]


def verify_aside(root):
    return package_store.read_manifest(next(root.glob("old-*")))


@pytest.mark.parametrize("source, said", [
    ("me/packages", "give REPO@REVISION:SHA256"), ("me/packages@main:abc", "give REPO@REVISION:SHA256"),
    ("packages@main:" + "0" * 64, "give REPO@REVISION:SHA256"), ("me/packages@main:" + "0" * 64, "not used")])
def test_what_was_not_meant_is_not_used(root, hub, source, said):
    with pytest.raises(RecipeError, match=said):
        package_store.fetch(source, key_of(FIELDS))


def test_a_fetched_package_of_other_fields_is_refused(root, hub, tmp_path):
    (tmp_path / f"{'1' * 20}.zip").write_bytes((tmp_path / f"{key_of(FIELDS)}.zip").read_bytes())
    with pytest.raises(RecipeError, match="holds the package"):
        publish(root, FIELDS, package_store.fetch(f"me/packages@main:{hub}", "1" * 20))
    assert not (root / key_of(FIELDS)).exists()
