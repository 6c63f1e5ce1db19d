"""Prepares the environment before any library loads.

It records the user's variables, and sets the temporary folder, the home folder, the compilers and the handling of
Ctrl-C. Libraries read these settings once, and some set the variables themselves. This module imports only Python's
standard library.
"""

import getpass
import os
import select
import shlex
import shutil
import signal
import stat
import subprocess
import sys
import tempfile
import threading
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent

# The values that the user set, or None. torch._inductor sets the first two itself on import.
GIVEN = {name: os.environ.get(name) or None
         for name in ("TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR", "TRITON_HOME")}

# These programs run the compiler that follows them, and `works` would accept them: `ccache --version` succeeds.
WRAPPERS = ("ccache", "sccache", "distcc", "icecc", "env", "nice", "time")

notes: list[str] = []  # one sentence for each setting that differs from the environment


def settle() -> None:
    """Sets everything in `os.environ`, once, and adds a sentence to `notes` for each setting that had to change."""
    if is_our_script() and threading.current_thread() is threading.main_thread() \
            and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, end_at_once)
    settle_temporary_folder()
    settle_home()
    if sys.platform != "win32":  # on Windows torch finds cl by itself
        settle_compilers()


def is_our_script() -> bool:
    """Whether Python was started to run gen_image.py or run_benchmark.py."""
    main = getattr(sys.modules.get("__main__"), "__file__", None)
    return main is not None and Path(main).resolve() in (ROOT / "gen_image.py", ROOT / "run_benchmark.py")


def end_at_once(*_) -> None:
    """Handles Ctrl-C while libraries load and after the program's work has ended.

    Some libraries treat a KeyboardInterrupt during their import as a missing package.
    """
    os.write(2, b"interrupted\n")
    os._exit(130)


def hand_over() -> None:
    """Makes Ctrl-C raise KeyboardInterrupt again and prints the notes, except for --help.

    `utils.common.run_cli` calls it before a script's main function.
    """
    if signal.getsignal(signal.SIGINT) is end_at_once:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    if not {"-h", "--help"} & set(sys.argv[1:]) and os.environ.get("RANK", "0") == "0":
        for note in notes:
            print(f"note: {note}", file=sys.stderr)


def take_back() -> None:
    """Makes a second Ctrl-C end the program at once, even if the program still waits for something."""
    if is_our_script():
        signal.signal(signal.SIGINT, end_at_once)


def reader_has_gone() -> bool:
    """Whether stdout or stderr is a pipe whose reader has closed it."""
    if not hasattr(select, "poll"):  # Windows
        return False
    poll = select.poll()
    for descriptor in (1, 2):
        poll.register(descriptor, 0)
    return any(event & select.POLLERR for _, event in poll.poll(0))


def settle_temporary_folder() -> None:
    """Sets TMPDIR to the temporary folder that Python chooses, since C++ libraries use TMPDIR without a check.

    Raises:
        SystemExit: no temporary folder is writable.
    """
    named = next(filter(None, map(os.environ.get, ("TMPDIR", "TEMP", "TMP"))), None)
    try:
        folder = tempfile.gettempdir()  # tries to write into it
    except OSError as error:
        print(f"error: no temporary folder is writable ({error}). Set TMPDIR to a writable folder.", file=sys.stderr)
        raise SystemExit(2) from error
    if named and os.path.abspath(named) != folder:
        os.environ["TMPDIR"] = folder
        notes.append(f"the temporary folder {named} (TMPDIR) is not writable; {folder} is used instead")


def settle_home() -> None:
    """Without a home folder, sets HOME to a private folder below the temporary folder.

    If the home folder exists but is not writable, only the caches go to the private folder. The models and tokens in
    the home folder stay in use.
    """
    try:
        getpass.getuser()
    except (KeyError, OSError, ImportError):  # torch needs the user's name to name folders
        os.environ["LOGNAME"] = f"uid_{uid()}"
    home = os.path.expanduser("~")
    if not os.environ.get("HOME", home) or not os.path.isabs(home) or not os.path.isdir(home):
        os.environ["HOME"] = str(private_folder())
        notes.append(f"there is no home folder{f' {home}' if os.path.isabs(home) else ''}: caches go to "
                     f"{os.environ['HOME']}. Set HOME, or --cache-dir and HF_HOME, to keep the caches")
    elif not can_write(home):
        hub = Path(home, ".cache", "huggingface")
        if not any(map(os.environ.get, ("HF_HOME", "XDG_CACHE_HOME"))) and not hub.exists() and not can_write(hub):
            os.environ["HF_HOME"] = str(private_folder() / "huggingface")
            notes.append(f"the home folder {home} is not writable: downloads go to {os.environ['HF_HOME']}. Set "
                         "HF_HOME to keep the downloads")


def default_cache_dir() -> Path:
    """The default of --cache-dir: ~/.cache/flux-fast, or a folder below the temporary one if that is not writable."""
    folder = Path.home() / ".cache" / "flux-fast"
    if can_write(folder):
        return folder
    instead = private_folder() / "flux-fast"
    notes.append(f"{folder} is not writable: the default of --cache-dir is {instead}")
    return instead


def can_write(folder: str | Path) -> bool:
    """Whether the process can create files in `folder`. The folder need not exist yet."""
    parent = nearest_parent(folder)
    return parent.is_dir() and os.access(parent, os.W_OK | os.X_OK)


def nearest_parent(path: str | Path) -> Path:
    """`path` if it exists, else the nearest folder above it that exists."""
    path = Path(path).absolute()
    return next(parent for parent in (path, *path.parents) if os.path.lexists(parent))


def private_folder() -> Path:
    """A folder below the temporary folder that only this user can access.

    Each start of the program returns the same folder. If another user has taken its name, the folder is a new one.
    """
    folder = Path(tempfile.gettempdir(), f"flux-fast-{uid()}")
    with suppress(OSError):
        folder.mkdir(mode=0o700, exist_ok=True)
        info = folder.lstat()
        of_others = info.st_mode & 0o077 and os.name != "nt"  # Windows has a temporary folder per user
        if stat.S_ISDIR(info.st_mode) and info.st_uid == uid() and not of_others:
            return folder
    return Path(tempfile.mkdtemp(prefix="flux-fast-"))


def uid() -> int:
    """The user's numeric id, or 0 on Windows, which has no such ids."""
    return os.getuid() if hasattr(os, "getuid") else 0


def settle_compilers() -> None:
    """Sets CXX and CC to a single working executable each.

    torch._inductor expects CXX to name one executable and defaults to g++. Triton expects the same of CC and searches
    for a compiler without it.
    """
    names = ("clang++", "g++", "c++") if sys.platform == "darwin" else ("g++", "c++", "clang++")
    for variable, fallback in (("CXX", names), ("CC", ())):
        wanted = os.environ.get(variable)
        if wanted is None and (not fallback or shutil.which(fallback[0])):
            continue
        compiler = compiler_of(wanted or "", fallback)
        if compiler == wanted:
            continue
        os.environ.pop(variable, None)
        if compiler:
            os.environ[variable] = compiler
        if wanted:
            instead = compiler or ("the compiler that Triton finds" if variable == "CC" else "no compiler (none works)")
            notes.append(f"{variable}={wanted} is not a single working executable, as PyTorch requires: {instead} is "
                         "used")
    if sys.platform == "linux":
        settle_libstdcxx(names)
    # A script that imported torchao first has let torch read CXX already.
    if "CXX" in os.environ and (config := sys.modules.get("torch._inductor.config")):
        config.cpp.cxx = (None, os.environ["CXX"])


def settle_libstdcxx(names: Sequence[str]) -> None:
    """Sets CXX to a compiler that finds libstdc++.so, if torch's does not and another one on the PATH does.

    Exported packages need the library (`utils.machine.libstdcxx_obstacle`).

    Args:
        names: of compilers, the preferred first.
    """
    compiler = os.environ.get("CXX", names[0])
    if not works(compiler) or finds_libstdcxx(compiler):
        return
    for folder in os.get_exec_path():
        for other in (os.path.join(folder, name) for name in names):
            if os.access(other, os.X_OK) and works(other) and finds_libstdcxx(other):
                os.environ["CXX"] = other
                notes.append(f"{compiler} finds no libstdc++.so, which exported packages need: {other} is used")
                return


def finds_libstdcxx(compiler: str) -> bool:
    """Whether a compiler finds libstdc++.so: it prints the full path of a library that it finds, else the bare name."""
    try:
        done = subprocess.run([compiler, "-print-file-name=libstdc++.so"], stdin=subprocess.DEVNULL,
                              capture_output=True, text=True, timeout=10)
        return done.stdout.strip() != "libstdc++.so"
    except (OSError, ValueError, subprocess.SubprocessError):
        return False


def compiler_of(wanted: str, fallback: Sequence[str]) -> str | None:
    """The first working compiler among `wanted` itself, the words in `wanted`, and the names in `fallback`.

    Args:
        wanted: a file name, or a command such as "ccache g++".
        fallback: names of compilers to try last.

    Returns:
        The compiler's name, or None if no candidate works.
    """
    try:
        words = shlex.split(wanted)
    except ValueError:
        words = wanted.split()
    words = [] if words == [wanted] else [word for word in words if not word.startswith("-")]
    candidates = [name for name in (wanted, *words, *fallback) if name and Path(name).name not in WRAPPERS]
    return next(filter(works, candidates), None)


def works(compiler: str) -> bool:
    """Whether `compiler --version` succeeds. torch._inductor makes the same test."""
    try:
        return subprocess.run([compiler, "--version"], stdin=subprocess.DEVNULL, capture_output=True,
                              timeout=10).returncode == 0
    except (OSError, ValueError, subprocess.SubprocessError):
        return False
