"""Stores exported packages and refuses to load wrong, damaged or foreign packages.

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
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
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
    """The name of the package folder for these fields: 20 hexadecimal digits of a SHA-256."""
    return hashlib.sha256(json.dumps(fields, sort_keys=True).encode()).hexdigest()[:20]


def open_store(cache_dir: str | Path, name: str = "packages") -> Path:
    """The folder of all packages, or of all kept weights (`name` "weights"). Creates it with mode 0700 if missing.

    Raises:
        RecipeError: the folder cannot be created or written, or other users may write into it.
    """
    try:
        root = Path(cache_dir).expanduser() / name
        root.mkdir(mode=0o700, parents=True, exist_ok=True)
    except (OSError, ValueError, RuntimeError) as error:  # RuntimeError: ~ of an unknown user
        raise RecipeError(f"--cache-dir {cache_dir}: its folder {name} cannot be created ({reason_of(error)}). "
                          "Choose another folder.") from error
    if not os.access(root, os.W_OK | os.X_OK):
        raise RecipeError(f"--cache-dir {cache_dir}: {root} is not writable. Choose another folder.")
    if reason := _distrust(root):
        raise RecipeError(f"--cache-dir {cache_dir}: {reason}, and what is in there runs, or draws, with your rights. "
                          "Choose another folder, or restrict this folder to yourself (chmod 700).")
    return root


def _distrust(path: Path) -> str | None:
    """The reason why another user may have written `path`, or None."""
    info = path.lstat()
    if stat.S_ISLNK(info.st_mode):
        return f"{path} is a symbolic link"
    if os.name == "nt":  # Windows has neither uids nor mode bits; the folder is in the user's profile
        return None
    if info.st_uid != os.getuid():
        return f"{path} belongs to another user"
    return f"{path} is writable for others" if info.st_mode & 0o022 else None


class Unusable(RecipeError):
    """A package, or kept weights, that must not be loaded. `reason` is the text without the packages' cure."""

    def __init__(self, key: str, reason: str):
        super().__init__(f"package {key} cannot be used: {reason}. --re-export exports it again; "
                         "--compile_export_mode compile uses no packages.")
        self.reason = reason


def unusable(key: str, reason: str) -> Unusable:
    """The error for a package that must not be loaded."""
    return Unusable(key, reason)


def verify(folder: Path) -> dict:
    """Compares a package folder with its manifest: owners, SHA-256s and the folder's name.

    Returns:
        The manifest.

    Raises:
        RecipeError: a file is missing, damaged or another user's, or the fields belong to another key.
    """
    manifest = read_manifest(folder)
    if folder.name != key_of(manifest["fields"]):
        raise unusable(folder.name, f"its fields belong to {key_of(manifest['fields'])}")
    paths = {name: folder / name for name in manifest["files"]}
    for name, path in paths.items():
        if Path(name).name != name or not path.is_file():
            raise unusable(folder.name, f"{name} is missing")
        if reason := _distrust(path):
            raise unusable(folder.name, reason)
    for name, found in zip(paths, _sha256s(paths.values()), strict=True):
        if found != manifest["files"][name]:
            raise unusable(folder.name, f"{name} is damaged: its SHA-256 differs from the manifest's")
    return manifest


def read_manifest(folder: Path) -> dict:
    """Reads the manifest of a package folder. It does not compare the files with the manifest.

    Raises:
        RecipeError: the manifest is missing, damaged or another user's.
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


def _sha256s(paths: Iterable[Path]) -> list[str]:
    """Of several files at once: kept weights of 12 GB would take one thread several seconds."""
    with ThreadPoolExecutor(8) as pool:
        return list(pool.map(_sha256, paths))


@contextmanager
def locked(root: Path, key: str):
    """Lets one process at a time work on a key; others print a line and wait. The lock ends with its process."""
    lock = FileLock(root / f".{key}.lock")
    try:
        lock.acquire(timeout=0)
    except Timeout:
        print(f"another process works on {root.name}/{key}: waiting", file=sys.stderr)
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


def publish(root: Path, fields: dict, make: Callable[[Path], None], facts: dict | None = None,
            needed_bytes: int | None = None) -> Path:
    """Writes a package folder whole or not at all, and replaces an older one. The caller holds the key's lock.

    Args:
        root: the folder of all packages.
        fields: everything that decides the package's code.
        make: writes the files into the empty folder that it receives, and raises an exception if they are wrong.
        facts: further entries of the manifest, which decide nothing.
        needed_bytes: free space that `root` needs; by default that of an export, which the temporary folder needs too.

    Returns:
        The package folder.

    Raises:
        RecipeError: the cache or the compiler's temporary folder lacks space, or the older folder is another user's.
    """
    key = key_of(fields)
    for left_over in root.glob(f".{key}.*.tmp"):  # a killed process left it behind
        shutil.rmtree(left_over)
    for place, needed in ([(root, NEEDED_BYTES), (Path(tempfile.gettempdir()), NEEDED_BYTES)] if needed_bytes is None
                          else [(root, needed_bytes)]):
        if (free := shutil.disk_usage(place).free) < needed:
            raise RecipeError(f"writing {root.name} needs {needed / 2**20:.0f} MiB in {place}, but only "
                              f"{free / 2**20:.0f} are free. Free some space, or choose another --cache-dir (or "
                              "TMPDIR).")
    temporary, folder = root / f".{key}.{os.getpid()}.tmp", root / key
    temporary.mkdir(mode=0o700)
    try:
        make(temporary)
        paths = sorted(temporary.iterdir())
        manifest = {"fields": fields, "facts": facts or {},
                    "files": {path.name: digest for path, digest in zip(paths, _sha256s(paths), strict=True)}}
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
        raise RecipeError(f"no space left in {root}. Free some space, or choose another --cache-dir. Nothing "
                          "half-written stays.") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def remove(folder: Path) -> None:
    """Deletes a package folder. If the folder is a symbolic link, it deletes only the link.

    Raises:
        RecipeError: the folder belongs to another user.
    """
    if folder.is_symlink():
        folder.unlink()
    elif os.name != "nt" and folder.stat().st_uid != os.getuid():
        raise RecipeError(f"{folder} belongs to another user and cannot be removed. Choose another --cache-dir.")
    else:
        shutil.rmtree(folder)


def fetch(source: str, key: str) -> Callable[[Path], None]:
    """Downloads KEY.zip and compares its SHA-256.

    Args:
        source: REPO@REVISION:SHA256, a Hub repository and the SHA-256 of its KEY.zip.
        key: the package's key.

    Returns:
        A function that unpacks the file into a folder, for `publish`.

    Raises:
        RecipeError: `source` has another form, the file is missing, or its SHA-256 differs.
    """
    match = SOURCE.fullmatch(source)
    if not match:
        raise RecipeError(f"--package-from {source}: give REPO@REVISION:SHA256, such as me/packages@main:{'0' * 64}.")
    repo, revision, expected = match.groups()
    with hub_errors("--package-from", repo, revision):
        archive = Path(hf_hub_download(repo, f"{key}.zip", revision=revision))
    if (actual := _sha256(archive)) != expected.lower():
        raise RecipeError(f"--package-from {source}: the SHA-256 of {key}.zip is {actual}. The file is not used, "
                          "because it is native code that would run with your rights.")

    def extract(folder: Path) -> None:
        with zipfile.ZipFile(archive) as files:
            for name in files.namelist():
                if name.endswith(".pt2"):
                    (folder / Path(name).name).write_bytes(files.read(name))

    return extract
