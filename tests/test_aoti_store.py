"""Packages on disk: every fault made for real, none of them loaded."""

import json
import multiprocessing
import os
import signal
import time
import zipfile

import pytest

from utils.aoti import store
from utils.aoti.store import fetch, key_of, locked, open_store, publish, remove, verify
from utils.common import RecipeError

FIELDS = {"models": {"transformer": {"num_layers": "2"}}, "versions": {"torch": "2.13.0"}}
KEY = key_of(FIELDS)


def make(folder):
    (folder / "double.pt2").write_bytes(b"code" * 1000)
    (folder / "single.pt2").write_bytes(b"more" * 1000)


@pytest.fixture
def root(tmp_path):
    return open_store(tmp_path / "cache")


def test_publish_is_whole_and_private(root):
    folder = publish(root, FIELDS, make)
    assert folder == root / KEY and verify(folder)["fields"] == FIELDS
    assert {path.name for path in folder.iterdir()} == {"double.pt2", "single.pt2", "manifest.json"}
    assert folder.stat().st_mode & 0o777 == root.stat().st_mode & 0o777 == 0o700
    assert all(path.stat().st_mode & 0o777 == 0o600 for path in folder.iterdir())


def test_key_of_depends_on_every_field():
    other = json.loads(json.dumps(FIELDS))
    assert key_of(other) == KEY and store.KEY.fullmatch(KEY)
    other["versions"]["torch"] = "2.11.0"
    assert key_of(other) != KEY


def flip(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def link(path):
    path.rename(path.parent.parent / "x")
    path.symlink_to(path.parent.parent / "x")


@pytest.mark.parametrize("spoil, said", [
    (lambda f: flip(f / "double.pt2"), "double.pt2 is damaged"),
    (lambda f: (f / "single.pt2").write_bytes((f / "single.pt2").read_bytes()[:-1]), "single.pt2 is damaged"),
    (lambda f: (f / "single.pt2").unlink(), "single.pt2 is missing"),
    (lambda f: (f / "manifest.json").unlink(), "manifest.json is missing"),
    (lambda f: (f / "manifest.json").write_text("{"), "manifest.json is damaged"),
    (lambda f: (f / "manifest.json").write_text('{"fields": {}, "files": 1}'), "manifest.json is damaged"),
    (lambda f: (f / "double.pt2").chmod(0o666), "double.pt2 is writable for others"),
    (lambda f: f.chmod(0o777), f"{KEY} is writable for others"),
    (lambda f: link(f / "double.pt2"), "double.pt2 is a symbolic link"),
    (link, f"{KEY} is a symbolic link"),
])
def test_verify_spoilt_package_raises(root, spoil, said):
    folder = publish(root, FIELDS, make)
    spoil(folder)
    with pytest.raises(RecipeError, match=said):
        verify(folder)


def test_verify_other_fields_raises(root):
    folder = publish(root, FIELDS, make)
    with pytest.raises(RecipeError, match="belong to"):
        verify(folder.rename(root / ("0" * 20)))


def test_verify_names_cannot_leave_the_folder(root):
    folder = publish(root, FIELDS, make)
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["files"]["../outside.pt2"] = manifest["files"].pop("double.pt2")
    (root / "outside.pt2").write_bytes(b"code" * 1000)
    (folder / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(RecipeError, match=r"outside\.pt2 is missing"):
        verify(folder)


@pytest.mark.skipif(os.getuid() != 0, reason="only root can give a file to another user")
def test_files_of_another_user_are_neither_loaded_nor_deleted(root):
    folder = publish(root, FIELDS, make)
    os.chown(folder / "double.pt2", 12345, -1)
    with pytest.raises(RecipeError, match="another user"):
        verify(folder)
    os.chown(folder, 12345, -1)
    for delete in (lambda: remove(folder), lambda: publish(root, FIELDS, make)):
        with pytest.raises(RecipeError, match="another user"):
            delete()
    assert (folder / "double.pt2").exists() and list(root.glob(".*.tmp")) == []


def test_remove_of_a_link_keeps_its_target(root, tmp_path):
    make(tmp_path)
    (root / KEY).symlink_to(tmp_path)
    remove(root / KEY)
    assert not (root / KEY).is_symlink() and (tmp_path / "double.pt2").exists()


def test_open_store_that_others_can_write_into_is_refused(tmp_path):
    root = open_store(tmp_path / "cache")
    root.chmod(0o777)
    with pytest.raises(RecipeError, match="writable for others"):
        open_store(tmp_path / "cache")
    root.chmod(0o700)
    (tmp_path / "link").mkdir()
    (tmp_path / "link" / "packages").symlink_to(root)
    with pytest.raises(RecipeError, match="symbolic link"):
        open_store(tmp_path / "link")


def test_open_store_that_cannot_be_written_into_is_refused(root, monkeypatch):
    monkeypatch.setattr(os, "access", lambda path, mode: path != root)  # root, as in a container, may write anywhere
    with pytest.raises(RecipeError, match="not writable"):
        open_store(root.parent)


def test_publish_failed_export_leaves_what_was_there(root):
    def fail(folder):
        make(folder)
        raise ValueError("differs from eager")

    with pytest.raises(ValueError):
        publish(root, FIELDS, fail)
    assert list(root.iterdir()) == []
    publish(root, FIELDS, make)
    with pytest.raises(ValueError):
        publish(root, FIELDS, fail)
    assert verify(root / KEY) and list(root.iterdir()) == [root / KEY]


def test_publish_full_disk_leaves_nothing(root, monkeypatch):
    def fill(folder):
        make(folder)
        with open("/dev/full", "w") as full:  # the kernel's own "no space left on device"
            full.write("x")

    with pytest.raises(RecipeError, match="no space left"):
        publish(root, FIELDS, fill)
    assert list(root.iterdir()) == []
    monkeypatch.setattr(store, "NEEDED_BYTES", 2**60)
    with pytest.raises(RecipeError, match="packages needs"):
        publish(root, FIELDS, lambda folder: pytest.fail("began to export"))


def test_publish_replaces_an_older_package(root):
    publish(root, FIELDS, make)
    publish(root, FIELDS, lambda folder: (folder / "double.pt2").write_bytes(b"new"))
    assert set(verify(root / KEY)["files"]) == {"double.pt2"} and list(root.iterdir()) == [root / KEY]


def fork(function):
    """Another process, without another start of Python."""
    process = multiprocessing.get_context("fork").Process(target=function)
    process.start()
    return process


def test_publish_killed_in_the_middle_leaves_no_package_and_no_lock(root):
    """The next export clears what was left."""
    def killed(folder):
        make(folder)
        os.kill(os.getpid(), signal.SIGKILL)

    def export():
        with locked(root, KEY):
            publish(root, FIELDS, killed)

    process = fork(export)
    process.join(60)
    assert process.exitcode == -signal.SIGKILL and list(root.glob(".*.tmp")) and not (root / KEY).exists()
    with locked(root, KEY):
        assert verify(publish(root, FIELDS, make)) and list(root.glob(".*.tmp")) == []


def test_locked_second_process_waits_for_the_first_and_says_so(root, capfd):
    begun = multiprocessing.get_context("fork").Event()

    def slowly(folder):
        begun.set()
        time.sleep(0.3)
        make(folder)

    def export():
        with locked(root, KEY):
            publish(root, FIELDS, slowly)

    process = fork(export)
    assert begun.wait(60) and not (root / KEY).exists()
    with locked(root, KEY):
        assert verify(root / KEY)
    process.join(60)
    assert process.exitcode == 0 and KEY in capfd.readouterr().err


@pytest.fixture
def digest(root, tmp_path, monkeypatch):
    """The SHA-256 of the one package, as a zip file, of a repository on the Hub."""
    folder, archive = publish(root, FIELDS, make), tmp_path / f"{KEY}.zip"
    zipfile.main(["-c", str(archive), *map(str, folder.iterdir())])
    remove(folder)
    monkeypatch.setattr(store, "hf_hub_download", lambda repo, name, revision: str(tmp_path / name))
    return store._sha256(archive)


def test_fetch_unpacks_what_was_packed(root, digest):
    folder = publish(root, FIELDS, fetch(f"me/packages@v1:{digest}", KEY))
    assert set(verify(folder)["files"]) == {"double.pt2", "single.pt2"}
    assert (folder / "double.pt2").read_bytes() == b"code" * 1000


@pytest.mark.parametrize("source", ["me/packages", "me/packages@main:abc", "packages@main:" + "0" * 64,
                                    "me/packages@main:" + "0" * 64])
def test_fetch_of_another_form_or_another_sha256_is_refused(digest, source):
    with pytest.raises(RecipeError, match=source):
        fetch(source, KEY)
