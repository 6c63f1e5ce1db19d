"""Writes the files of a run.

A file is written whole or not at all, and never replaces a foreign file. If its path is not writable, the file is saved
elsewhere.
"""

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

LARGEST_RECORD = 64 * 2**20  # bytes; this program writes no larger record


def as_path(path: str | Path) -> Path:
    """A path from the command line. As in a shell, "~name" of an unknown user stays a plain name."""
    return Path(os.path.expanduser(path))


def manifest_path(output_file: str | Path) -> Path:
    """The manifest of --prompts-file's images: a .jsonl file in the images' folder."""
    return as_path(output_file).with_suffix(".jsonl")


def refuse_foreign(path: Path, is_ours: Callable[[Path], bool]) -> None:
    """Refuses to replace a file at `path` that this program did not write. Empty files may be replaced.

    Args:
        is_ours: whether a file is of the kind that this program writes to `path`. It may raise any exception for
            another kind of file.

    Raises:
        OSError: `path` is a folder, no regular file, or a foreign file.
    """
    if not path.exists():
        return
    if path.is_dir():
        raise IsADirectoryError(errno.EISDIR, "it is a folder", str(path))
    if not path.is_file():
        raise FileExistsError(errno.EEXIST, "it is not a regular file", str(path))
    try:
        known = path.stat().st_size == 0 or is_ours(path)
    except Exception:
        known = False
    if not known:
        raise FileExistsError(errno.EEXIST, "the file there was not made by this program", str(path))


def is_record(path: Path) -> bool:
    """Whether the file is a JSON record of this program."""
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
    """Whether the file's first line belongs to a manifest. The line may be cut off."""
    with open(path, "rb") as file:
        line = file.readline(LARGEST_RECORD)
    start = b'{"file": '
    if not line.endswith(b"\n"):
        return line.startswith(start) or start.startswith(line)
    return {"file", "sha256", "techniques"} <= set(json.loads(line))


def refuse_torn_trace(path: Path) -> None:
    """Refuses a trace that lacks its end, because the profiler does not report a full disk.

    Raises:
        OSError: the trace does not end in a brace.
    """
    with open(path, "rb") as file:
        file.seek(-min(64, path.stat().st_size), os.SEEK_END)
        tail = file.read()
    if not tail.rstrip().endswith(b"}"):
        raise OSError(errno.EIO, "the trace is incomplete", str(path))


def temporary_beside(path: Path) -> Path:
    """Creates a new, empty file in the folder of `path`.

    Its name is short and has the suffix of `path`, because PIL and the profiler choose the format by the suffix.
    """
    temporary = path.with_name(f".{secrets.token_hex(8)}.tmp{path.suffix[-8:]}")
    open(temporary, "xb").close()  # tempfile's files would be unreadable for other users
    return temporary


@contextmanager
def atomic_write(path: str | Path, is_ours: Callable[[Path], bool] | None = None):
    """Yields a temporary path beside `path` and renames it onto `path` on success. No half-written file stays.

    Args:
        is_ours: whether a file may be replaced, as for `refuse_foreign`; None allows any file.

    Raises:
        OSError: `path` must not be replaced, or the rename failed.
    """
    path = Path(os.path.realpath(as_path(path)))  # a symbolic link stays a link
    temporary = temporary_beside(path)
    try:
        yield temporary
        if is_ours:
            refuse_foreign(path, is_ours)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_json(path: str | Path, record: dict, is_ours: Callable[[Path], bool] | None = None) -> None:
    """Writes a record as indented JSON by `atomic_write`."""
    with atomic_write(path, is_ours) as temporary:
        temporary.write_text(json.dumps(record, indent=1) + "\n")


def append_line(path: Path, record: dict) -> None:
    """Appends a line to a manifest, whole or not at all. Several processes may append at the same time.

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
            if file.read(1) != b"\n":  # a crash cut the last line off
                line = b"\n" + line
        written = file.write(line)  # a single write, so that lines of several processes do not mix
        if written < len(line):
            if file.seek(0, os.SEEK_END) == end + written:  # no other process appended a line since
                file.truncate(end)
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))


def free_name(path: Path, mark: str) -> Path:
    """The first unused name beside `path`: x.png -> x.MARK.png, x.MARK.1.png, ..."""
    stem = path.stem.encode(errors="surrogateescape")[:200].decode(errors="ignore")
    names = (f"{stem}.{mark}{f'.{number}' * (number > 0)}{path.suffix[-8:]}" for number in itertools.count())
    return next(other for name in names if not os.path.lexists(other := path.with_name(name)))


def write_or_rescue(write: Callable[[Path], None], path: str | Path, what: str) -> RecipeError | None:
    """Writes a file by `write(path)`. If that fails, writes it elsewhere, so that the result is not lost.

    The second try is an unused name beside `path`, and the third is the temporary folder.

    Args:
        what: the beginning of the error message, before the path.

    Returns:
        None, or an error that is not raised. It names the reason and the file's new place.
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
            return RecipeError(f"{what} {path}: {reason}. The file is kept as {other}")
    return RecipeError(f"{what} {path}: {reason}. It could not be written elsewhere either and is lost")
