"""Files that a run leaves: whole or not at all, never in the place of somebody else's file, and never lost."""

import errno
import gzip
import itertools
import json
import os
import secrets
import tempfile
from collections.abc import Callable
from contextlib import contextmanager, suppress
from pathlib import Path

from utils.common import RecipeError, reason_of

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

LARGEST_RECORD = 64 * 2**20  # bytes; a larger file is no record of this program


def as_path(path: str | Path) -> Path:
    """A path of the command line. A "~name" of nobody is a name like others, as in a shell."""
    return Path(os.path.expanduser(path))


def manifest_path(output_file: str | Path) -> Path:
    """Where the images of --prompts-file are listed, beside them."""
    return as_path(output_file).with_suffix(".jsonl")


def refuse_foreign(path: Path, is_ours: Callable[[Path], bool]) -> None:
    """Raises OSError if something is at `path` that must stay. A file without content is nobody's.

    Args:
        is_ours: whether the file there is of the kind that this program writes there. It may raise whatever it likes
            for a file that is not.
    """
    if not path.exists():
        return
    if path.is_dir():
        raise IsADirectoryError(errno.EISDIR, "it is a folder", str(path))
    if not path.is_file():
        raise FileExistsError(errno.EEXIST, "it is no regular file", str(path))
    try:
        known = path.stat().st_size == 0 or is_ours(path)
    except Exception:
        known = False
    if not known:
        raise FileExistsError(errno.EEXIST, "a file that this program did not make is there", str(path))


def is_record(path: Path) -> bool:
    """Whether the file is a result in JSON."""
    with open(path, "rb") as file:
        record = json.loads(file.read(LARGEST_RECORD))
    return isinstance(record, dict) and ("schema_version" in record or "environment" in record)


def is_trace(path: Path) -> bool:
    """Whether the file is a trace of PyTorch's profiler, compressed or not."""
    with open(path, "rb") as file:
        is_compressed = file.read(2) == b"\x1f\x8b"
    with gzip.open(path) if is_compressed else open(path, "rb") as file:
        head = file.read(4096)
    return head.lstrip().startswith(b"{") and b'"schemaVersion"' in head


def is_manifest(path: Path) -> bool:
    """Whether the file's first line is one of a manifest, be it torn."""
    with open(path, "rb") as file:
        line = file.readline(LARGEST_RECORD)
    start = b'{"file": '
    if not line.endswith(b"\n"):
        return line.startswith(start) or start.startswith(line)
    return {"file", "sha256", "techniques"} <= set(json.loads(line))


def refuse_torn_trace(path: Path) -> None:
    """Raises OSError for a trace without its end: the profiler does not say that a disk is full."""
    with open(path, "rb") as file:
        file.seek(-min(64, path.stat().st_size), os.SEEK_END)
        tail = file.read()
    if not tail.rstrip().endswith(b"}"):
        raise OSError(errno.EIO, "the trace was not written to its end", str(path))


def temporary_beside(path: Path) -> Path:
    """A new, empty file in `path`'s folder. Its name is short, and ends as that of `path`: PIL and the profiler choose
    their format by the end."""
    temporary = path.with_name(f".{secrets.token_hex(8)}.tmp{path.suffix[-8:]}")
    open(temporary, "xb").close()  # not tempfile's, whose files nobody else may read
    return temporary


@contextmanager
def atomic_write(path: str | Path, is_ours: Callable[[Path], bool] | None = None):
    """Yields a temporary path beside `path` and renames it onto `path` on success: no half-written file stays.

    Args:
        is_ours: what may be replaced, as `refuse_foreign` takes it; None for any file.
    """
    path = Path(os.path.realpath(as_path(path)))  # a link stays one
    temporary = temporary_beside(path)
    try:
        yield temporary
        if is_ours:
            refuse_foreign(path, is_ours)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_json(path: str | Path, record: dict, is_ours: Callable[[Path], bool] | None = None) -> None:
    with atomic_write(path, is_ours) as temporary:
        temporary.write_text(json.dumps(record, indent=1) + "\n")


def append_line(path: Path, record: dict) -> None:
    """Adds a line to a manifest, whole or not at all. Several processes may do so at once.

    Raises:
        OSError: the disk is full, or the file is not a manifest.
    """
    refuse_foreign(path, is_manifest)
    line = (json.dumps(record) + "\n").encode()
    with open(path, "a+b", buffering=0) as file:
        if fcntl:
            with suppress(OSError):  # some network file systems have no locks
                fcntl.flock(file, fcntl.LOCK_EX)
        end = file.seek(0, os.SEEK_END)
        if end:
            file.seek(end - 1)
            if file.read(1) != b"\n":  # torn by a crash
                line = b"\n" + line
        written = file.write(line)  # at once: lines of several processes do not mix
        if written < len(line):
            if file.seek(0, os.SEEK_END) == end + written:  # nobody's line came behind
                file.truncate(end)
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))


def free_name(path: Path, mark: str) -> Path:
    """A name beside `path` that nobody has: x.png -> x.MARK.png, x.MARK.1.png, ..."""
    stem = path.stem.encode(errors="surrogateescape")[:200].decode(errors="ignore")
    names = (f"{stem}.{mark}{f'.{number}' * (number > 0)}{path.suffix[-8:]}" for number in itertools.count())
    return next(other for name in names if not os.path.lexists(other := path.with_name(name)))


def write_or_rescue(write: Callable[[Path], None], path: str | Path, what: str) -> RecipeError | None:
    """Writes a file by `write(path)`. If that fails, by the same function beside it under a free name, or else in the
    folder for temporary files: what took so long to compute is not lost.

    Returns:
        None, or an error, not raised, that says why and where the file is now.
    """
    path = as_path(path)
    try:
        return write(path)
    except Exception as error:
        reason = reason_of(error)
    for folder in (lambda: path.parent, tempfile.gettempdir):
        with suppress(Exception):
            other = free_name(Path(folder()) / path.name, "kept")
            write(other)
            return RecipeError(f"{what} {path}: {reason}. It is kept as {other}")
    return RecipeError(f"{what} {path}: {reason}. It cannot be written anywhere else either, and is lost")
