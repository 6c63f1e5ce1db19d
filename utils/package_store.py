"""Where exported packages are kept, and why a wrong, damaged or foreign one is never loaded.

    CACHE/packages/KEY/manifest.json, double.pt2, single.pt2, ...

KEY is a hash of the manifest's `fields`: everything that decides what the code in the packages computes and where it
runs. A `.pt2` file is native code that runs with the user's rights, so files of other users, writable ones and links
are refused, and each file's SHA-256 is compared before anything opens it.
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
import time
import zipfile
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout
from huggingface_hub import hf_hub_download

from utils.benchmark_utils import RecipeError, reason_of
from utils.checkpoint import hub_errors

FORMAT = 1
SOURCE = re.compile(r"([^@:]+/[^@:]+)@([^@:]+):([0-9a-fA-F]{64})")
MANIFEST = "manifest.json"
NEEDED_BYTES = 256 * 2**20  # several times what the packages of the full-size models and their temporary files take


class Rejected(Exception):
    """A package that must not be used; the text says why."""


def key_of(fields: dict) -> str:
    """The folder's name for these fields: 20 hexadecimal digits."""
    return hashlib.sha256(json.dumps(fields, sort_keys=True).encode()).hexdigest()[:20]


def open_store(cache_dir: str | Path) -> Path:
    """The folder of all packages, made if it is not there, mode 0700.

    Raises:
        RecipeError: it cannot be made or written into, or others could have written into it.
    """
    try:
        root = Path(cache_dir).expanduser() / "packages"
        root.mkdir(mode=0o700, parents=True, exist_ok=True)
    except (OSError, ValueError, RuntimeError) as error:  # RuntimeError: ~ of nobody
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


def read_manifest(folder: Path) -> dict:
    """The manifest of a package folder, not yet compared with anything.

    Raises:
        Rejected: not ours alone, missing, damaged or of another version of this program.
    """
    for path in (folder, folder / MANIFEST):
        if not path.exists() and not path.is_symlink():
            raise Rejected(f"{path.name} is missing")
        if reason := _distrust(path):
            raise Rejected(reason)
    try:
        manifest = json.loads((folder / MANIFEST).read_text())
        manifest["fields"], manifest["files"], manifest["format"]
    except (ValueError, KeyError, TypeError) as error:
        raise Rejected(f"{MANIFEST} is damaged") from error
    if manifest["format"] != FORMAT:
        raise Rejected(f"format {manifest['format']}, this program reads {FORMAT}")
    return manifest


def verify(folder: Path) -> dict:
    """The manifest, after every file was compared with it: owner, size, SHA-256, and the folder's name.

    Raises:
        Rejected: anything differs.
    """
    manifest = read_manifest(folder)
    if folder.name != key_of(manifest["fields"]):
        raise Rejected(f"its fields belong to {key_of(manifest['fields'])}")
    for name, expected in manifest["files"].items():
        path = folder / name
        if Path(name).name != name or not path.is_file():
            raise Rejected(f"{name} is missing")
        if reason := _distrust(path):
            raise Rejected(reason)
        if path.stat().st_size != expected["bytes"] or _sha256(path) != expected["sha256"]:
            raise Rejected(f"{name} is damaged: its SHA-256 is not the manifest's")
    return manifest


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextmanager
def locked(root: Path, key: str):
    """One process at a time for a key; another one waits, and says so. Ends with the process, however it ends."""
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


def publish(root: Path, fields: dict, make) -> Path:
    """Writes a package folder whole or not at all, and returns it. For the holder of the key's lock.

    Args:
        make: fills the empty folder it is given with files, and raises if they are not right.

    Raises:
        RecipeError: no space, in the cache or in the compiler's temporary folder.
    """
    key = key_of(fields)
    for left_over in root.glob(f".{key}.*.tmp"):  # of a process that was killed
        shutil.rmtree(left_over)
    for place in (root, Path(tempfile.gettempdir())):
        if (free := shutil.disk_usage(place).free) < NEEDED_BYTES:
            raise RecipeError(f"exporting needs {NEEDED_BYTES / 2**20:.0f} MiB in {place}, {free / 2**20:.0f} are free."
                              " Make room, or choose another --cache-dir (or TMPDIR).")
    temporary, folder = root / f".{key}.{os.getpid()}.tmp", root / key
    temporary.mkdir(mode=0o700)
    try:
        make(temporary)
        files = {path.name: {"bytes": path.stat().st_size, "sha256": _sha256(path)}
                 for path in sorted(temporary.iterdir())}
        manifest = {"format": FORMAT, "fields": fields, "files": files, "made": time.strftime("%Y-%m-%dT%H:%M:%SZ",
                                                                                                time.gmtime())}
        (temporary / MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n")
        for path in (*temporary.iterdir(), temporary):
            path.chmod(0o700 if path.is_dir() else 0o600)
            _sync(path)
        if folder.exists():
            set_aside(folder, "replaced")
        os.rename(temporary, folder)
        _sync(root)
        return folder
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise RecipeError(f"no space left in {root} while exporting. Make room, or choose another --cache-dir; nothing "
                          "half-written stays.") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def pack(folder: Path, target: Path) -> str:
    """Writes a verified package folder as one zip file, for others to fetch, and returns its SHA-256."""
    names = [MANIFEST, *verify(folder)["files"]]
    with zipfile.ZipFile(target, "w", zipfile.ZIP_DEFLATED) as archive:
        for name in names:
            archive.write(folder / name, name)
    return _sha256(target)


def fetch(source: str, key: str) -> Callable[[Path], None]:
    """Downloads KEY.zip and compares it; what is returned fills a folder with its packages, for `publish`.

    Args:
        source: REPO@REVISION:SHA256 of a Hub repository; the SHA-256 is the zip file's (see `pack`).

    Raises:
        RecipeError: not of that form, not there, or another file than the one that was meant.
    """
    found = SOURCE.fullmatch(source)
    if not found:
        raise RecipeError(f"--package-from {source}: give REPO@REVISION:SHA256, such as me/packages@main:{'0' * 64}.")
    repo, revision, expected = found.groups()
    with hub_errors("--package-from", repo, revision):
        path = Path(hf_hub_download(repo, f"{key}.zip", revision=revision))
    if (actual := _sha256(path)) != expected.lower():
        raise RecipeError(f"--package-from {source}: the SHA-256 of {key}.zip there is {actual}. It is native code "
                          "that would run as you: not used.")

    def extract(folder: Path) -> None:
        with zipfile.ZipFile(path) as archive:
            manifest = json.loads(archive.read(MANIFEST))
            if key_of(manifest["fields"]) != key:
                raise RecipeError(f"--package-from {source}: {key}.zip holds the package {key_of(manifest['fields'])}.")
            for name in manifest["files"]:
                (folder / Path(name).name).write_bytes(archive.read(name))

    return extract


def _sync(path: Path) -> None:
    if os.name == "nt":  # opens no folders, and syncs no file that was opened to read
        return
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def set_aside(folder: Path, why: str) -> Path:
    """Renames a folder that must not be used, so that it can be looked at, and returns where it is now."""
    for n in range(1000):
        if not (aside := folder.with_name(f"{why}-{folder.name}-{n}")).exists():
            break
    os.rename(folder, aside)
    return aside


def nearest(root: Path, fields: dict) -> tuple[str, dict] | None:
    """The package that differs least from `fields`: its key, and {field: (its value, the value asked for)}."""
    best = None
    for folder in sorted(root.iterdir()):
        try:
            found = _flat(read_manifest(folder)["fields"])
        except (Rejected, NotADirectoryError):
            continue
        wanted = _flat(fields)
        differs = {name: (found.get(name), wanted.get(name)) for name in sorted(found | wanted)
                   if found.get(name) != wanted.get(name)}
        if best is None or len(differs) < len(best[1]):
            best = folder.name, differs
    return best


def _flat(fields: dict, prefix: str = "") -> dict:
    found = {}
    for name, value in fields.items():
        found |= _flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {prefix + name: value}
    return found
