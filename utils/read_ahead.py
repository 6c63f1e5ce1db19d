"""Reads a checkpoint's files into the page cache while Python imports its libraries.

Imports take seconds and hardly touch the disk, and a 34 GB checkpoint takes 5 s from the page cache and 24 s from a
local disk. Reading during the imports hides the smaller of both. This module imports only Python's standard library.
"""

import os
import threading
from contextlib import suppress
from pathlib import Path

BLOCK = 8 * 2**20  # bytes of a read
THREADS = 4
LEAST = 2**30  # bytes; smaller checkpoints load in no time
# In the order in which diffusers loads them, as far as it matters: the transformer is two thirds of a checkpoint.
COMPONENTS = ("transformer", "text_encoder_2", "text_encoder", "vae")


def start(args) -> threading.Thread | None:
    """Starts to read the weights of --ckpt and --transformer, on threads that end with the process.

    Nothing is read if the weights are random, small, not there yet, or more than half of the free memory: the pages
    read first would then push each other out. Of several processes of a host, one reads for all.

    Args:
        args: the parsed command line.

    Returns:
        The thread that leads the others, or None.
    """
    if args.random_weights or os.environ.get("LOCAL_RANK", "0") != "0":
        return None
    if not (folder := local_folder(args.ckpt, args.revision)):
        return None
    files = kept_files(args.cache_dir) if args.keep_quantized else []
    components = COMPONENTS[1:] if files or args.transformer else COMPONENTS
    single = local_file(args.transformer) if args.transformer and not files else None
    files = [*([single] if single else []),
             *(file for name in components for file in sorted(Path(folder, name).glob("*.safetensors"))), *files]
    with suppress(OSError):
        if LEAST <= sum(file.stat().st_size for file in files) <= free_memory() // 2:
            thread = threading.Thread(target=read, args=(files,), daemon=True, name="read ahead")
            thread.start()
            return thread
    return None


def local_folder(ckpt: str, revision: str | None) -> Path | None:
    """The folder of a checkpoint: --ckpt itself, or its snapshot in the Hub's cache. None if there is none."""
    with suppress(OSError, RuntimeError, ValueError):  # RuntimeError: ~ of an unknown user
        if (folder := Path(ckpt).expanduser()).is_dir():
            return folder
        home = os.environ.get("HF_HOME") or Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache", "huggingface")
        cache = Path(os.environ.get("HF_HUB_CACHE") or Path(home, "hub")).expanduser()
        folder = cache / f"models--{ckpt.replace('/', '--')}"
        ref = folder / "refs" / (revision or "main")
        snapshot = folder / "snapshots" / (ref.read_text().strip() if ref.is_file() else revision or "")
        if ckpt.count("/") == 1 and snapshot.parent.name == "snapshots" and snapshot.is_dir():
            return snapshot
    return None


def local_file(spec: str) -> Path | None:
    """The file of --transformer: a path, or a file of a snapshot in the Hub's cache. None if there is none."""
    with suppress(OSError, RuntimeError, ValueError):
        on_hub, _, revision = spec.partition("@")
        owner, _, inside = on_hub.partition("/")
        repo, _, name = inside.partition("/")
        snapshot = local_folder(f"{owner}/{repo}", revision or None) if name else None
        for path in (Path(spec).expanduser(), *([snapshot / name] if snapshot else [])):
            if path.is_file():
                return path
    return None


def kept_files(cache_dir: str) -> list[Path]:
    """The files of the kept transformer that was used last (utils/kept_weights.py): most likely the one to be used."""
    with suppress(OSError, RuntimeError):
        manifests = Path(cache_dir).expanduser().glob("weights/*/manifest.json")
        if newest := max(manifests, key=lambda path: path.stat().st_mtime, default=None):
            return sorted(newest.parent.glob("*.safetensors"))
    return []


def free_memory() -> int:
    """The bytes that Linux can give away without swapping; elsewhere 0, and nothing is read ahead."""
    with suppress(OSError):
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    return 0


def read(files: list[Path]) -> None:
    """Reads files whole, a few at a time. A file that cannot be read is left to whoever loads it, and to its error."""
    left = iter(files)

    def read_next() -> None:
        block = bytearray(BLOCK)
        for file in left:
            with suppress(OSError), open(file, "rb", buffering=0) as opened:
                while opened.readinto(block):
                    pass

    # Daemons, since a program that is refused meanwhile must not wait for them. Those of a pool are waited for.
    threads = [threading.Thread(target=read_next, daemon=True) for _ in range(THREADS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
