"""The folder of exported packages, and the checks that keep a wrong, damaged or foreign package from being loaded.

    CACHE/packages/KEY/manifest.json, double.pt2, single.pt2, ...

KEY is a hash of the manifest's `fields`, which hold everything that decides what the code computes and where it runs.
A `.pt2` file is native code that runs with the user's rights. So the store refuses links, files of other users and
files that others may write, and compares each file's SHA-256 before anything opens the file.
"""

import errno
import hashlib
import json
import os
import re
import shutil
import stat
import sys
import tempfile
import zipfile
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout
from huggingface_hub import hf_hub_download

from utils.checkpoint import hub_errors
from utils.common import RecipeError, reason_of

SOURCE = re.compile(r"([^@:]+/[^@:]+)@([^@:]+):([0-9a-fA-F]{64})")
KEY = re.compile("[0-9a-f]{20}")
MANIFEST = "manifest.json"
NEEDED_BYTES = 256 * 2**20  # several times the size of the full-size models' packages and the compiler's files


def key_of(fields: dict) -> str:
    """The folder's name for these fields: 20 hexadecimal digits."""
    return hashlib.sha256(json.dumps(fields, sort_keys=True).encode()).hexdigest()[:20]


def open_store(cache_dir: str | Path) -> Path:
    """The folder of all packages. Creates it with mode 0700 if it is missing.

    Raises:
        RecipeError: the folder cannot be created or written, or other users may write into it.
    """
    try:
        root = Path(cache_dir).expanduser() / "packages"
        root.mkdir(mode=0o700, parents=True, exist_ok=True)
    except (OSError, ValueError, RuntimeError) as error:  # RuntimeError: ~ of an unknown user
        raise RecipeError(f"--cache-dir {cache_dir}: its folder packages cannot be made ({reason_of(error)}). Choose "
                          "another.") from error
    if not os.access(root, os.W_OK | os.X_OK):
        raise RecipeError(f"--cache-dir {cache_dir}: {root} is not writable. Choose another.")
    if reason := _distrust(root):
        raise RecipeError(f"--cache-dir {cache_dir}: {reason}, and packages are code that would run as you. Choose "
                          "another folder, or make this one yours alone (chmod 700).")
    return root


def _distrust(path: Path) -> str | None:
    info = path.lstat()
    if stat.S_ISLNK(info.st_mode):
        return f"{path} is a symbolic link"
    if os.name == "nt":  # Windows has neither number; the folder lies in the user's own profile
        return None
    if info.st_uid != os.getuid():
        return f"{path} belongs to another user"
    return f"{path} is writable for others" if info.st_mode & 0o022 else None


def unusable(key: str, reason: str) -> RecipeError:
    """The error about a package that must not be loaded."""
    return RecipeError(f"package {key} cannot be used: {reason}. --re-export makes it anew, --compile_export_mode "
                       "compile does without packages.")


def verify(folder: Path) -> dict:
    """Compares a package folder with its manifest: owners, SHA-256s and the folder's name. Returns the manifest.

    Raises:
        RecipeError: a file is missing, damaged or not the user's own, or the fields belong to another key.
    """
    manifest = read_manifest(folder)
    if folder.name != key_of(manifest["fields"]):
        raise unusable(folder.name, f"its fields belong to {key_of(manifest['fields'])}")
    for name, expected in manifest["files"].items():
        path = folder / name
        if Path(name).name != name or not path.is_file():
            raise unusable(folder.name, f"{name} is missing")
        if reason := _distrust(path):
            raise unusable(folder.name, reason)
        if _sha256(path) != expected:
            raise unusable(folder.name, f"{name} is damaged, its SHA-256 is not the manifest's")
    return manifest


def read_manifest(folder: Path) -> dict:
    """The manifest of a package folder, before its files are compared with it.

    Raises:
        RecipeError: the manifest is missing, damaged or not the user's own.
    """
    for path in (folder, folder / MANIFEST):
        if not os.path.lexists(path):
            raise unusable(folder.name, f"{path.name} is missing")
        if reason := _distrust(path):
            raise unusable(folder.name, reason)
    try:
        manifest = json.loads((folder / MANIFEST).read_text())
        dict(manifest["fields"]), dict(manifest["files"])
    except (ValueError, KeyError, TypeError) as error:
        raise unusable(folder.name, f"{MANIFEST} is damaged") from error
    return manifest


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextmanager
def locked(root: Path, key: str):
    """Lets one process at a time work on a key; others wait and say so. The lock ends with its process."""
    lock = FileLock(root / f".{key}.lock")
    try:
        lock.acquire(timeout=0)
    except Timeout:
        print(f"another process works on package {key}: waiting", file=sys.stderr)
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


def publish(root: Path, fields: dict, make: Callable[[Path], None]) -> Path:
    """Writes a package folder whole or not at all, in the place of an older one. The caller holds the key's lock.

    Args:
        make: writes the files into the empty folder that it is given; raises if they are wrong.

    Raises:
        RecipeError: the cache or the compiler's temporary folder lacks space, or the older one is another user's.
    """
    key = key_of(fields)
    for left_over in root.glob(f".{key}.*.tmp"):  # by a process that was killed
        shutil.rmtree(left_over)
    for place in (root, Path(tempfile.gettempdir())):
        if (free := shutil.disk_usage(place).free) < NEEDED_BYTES:
            raise RecipeError(f"exporting needs {NEEDED_BYTES / 2**20:.0f} MiB in {place}, {free / 2**20:.0f} are free."
                              " Make room, or choose another --cache-dir (or TMPDIR).")
    temporary, folder = root / f".{key}.{os.getpid()}.tmp", root / key
    temporary.mkdir(mode=0o700)
    try:
        make(temporary)
        manifest = {"fields": fields, "files": {path.name: _sha256(path) for path in sorted(temporary.iterdir())}}
        (temporary / MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n")
        for path in temporary.iterdir():
            path.chmod(0o600)
        if os.path.lexists(folder):
            remove(folder)
        os.rename(temporary, folder)
        return folder
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise RecipeError(f"no space left in {root} while exporting. Make room, or choose another --cache-dir; nothing "
                          "half-written stays.") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def remove(folder: Path) -> None:
    """Deletes a package folder. Of a symbolic link it deletes the link alone.

    Raises:
        RecipeError: the folder belongs to another user.
    """
    if folder.is_symlink():
        folder.unlink()
    elif os.name != "nt" and folder.stat().st_uid != os.getuid():
        raise RecipeError(f"{folder} belongs to another user and stays. Choose another --cache-dir.")
    else:
        shutil.rmtree(folder)


def fetch(source: str, key: str) -> Callable[[Path], None]:
    """Downloads KEY.zip and compares its SHA-256. Returns a function that unpacks it, for `publish`.

    Args:
        source: REPO@REVISION:SHA256, a Hub repository and the SHA-256 of its KEY.zip.

    Raises:
        RecipeError: `source` has another form, the file is missing, or its SHA-256 is another one.
    """
    match = SOURCE.fullmatch(source)
    if not match:
        raise RecipeError(f"--package-from {source}: give REPO@REVISION:SHA256, such as me/packages@main:{'0' * 64}.")
    repo, revision, expected = match.groups()
    with hub_errors("--package-from", repo, revision):
        archive = Path(hf_hub_download(repo, f"{key}.zip", revision=revision))
    if (actual := _sha256(archive)) != expected.lower():
        raise RecipeError(f"--package-from {source}: the SHA-256 of {key}.zip there is {actual}. It is native code "
                          "that would run as you: not used.")

    def extract(folder: Path) -> None:
        with zipfile.ZipFile(archive) as files:
            for name in files.namelist():
                if name.endswith(".pt2"):
                    (folder / Path(name).name).write_bytes(files.read(name))

    return extract
