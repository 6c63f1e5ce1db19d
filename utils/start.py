"""What is settled before any library loads, because libraries read it once, or fill it in themselves: the user's own
variables, the temporary and the home folder, the compiler, and Ctrl-C. Python's own modules only."""

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

# As the user set them, or None. torch._inductor, once imported, sets the first two itself.
GIVEN = {name: os.environ.get(name) or None
         for name in ("TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR", "TRITON_HOME")}

# These run a compiler, which stands behind them, and would pass for one: `ccache --version` succeeds.
WRAPPERS = ("ccache", "sccache", "distcc", "icecc", "env", "nice", "time")

notes: list[str] = []  # what was settled otherwise than the environment says


def settle() -> None:
    """Settles all of it in `os.environ`, once; `notes` says what could not be as it was."""
    if is_our_script() and threading.current_thread() is threading.main_thread() \
            and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, end_at_once)
    settle_temporary_folder()
    settle_home()
    if sys.platform != "win32":  # there torch looks for cl by itself
        settle_compilers()


def is_our_script() -> bool:
    """Whether gen_image.py or run_benchmark.py is what Python was started for."""
    main = getattr(sys.modules.get("__main__"), "__file__", None)
    return main is not None and Path(main).resolve() in (ROOT / "gen_image.py", ROOT / "run_benchmark.py")


def end_at_once(*_) -> None:
    """Ctrl-C while libraries load, which take KeyboardInterrupt for a missing package, and once all is over."""
    os.write(2, b"interrupted\n")
    os._exit(130)


def hand_over() -> None:
    """What a script's main begins with: Ctrl-C raises KeyboardInterrupt again, and the notes are printed, unless only
    the help is wanted."""
    if signal.getsignal(signal.SIGINT) is end_at_once:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    if not {"-h", "--help"} & set(sys.argv[1:]) and os.environ.get("RANK", "0") == "0":
        for note in notes:
            print(f"note: {note}", file=sys.stderr)


def take_back() -> None:
    """After Ctrl-C a second one ends the program, whatever it still waits for."""
    if is_our_script():
        signal.signal(signal.SIGINT, end_at_once)


def reader_has_gone() -> bool:
    """Whether stdout is a pipe, or stderr is, that nobody reads any more."""
    if not hasattr(select, "poll"):  # Windows
        return False
    poll = select.poll()
    for descriptor in (1, 2):
        poll.register(descriptor, 0)
    return any(event & select.POLLERR for _, event in poll.poll(0))


def settle_temporary_folder() -> None:
    """TMPDIR becomes the folder that Python takes. C++ libraries take TMPDIR as it is."""
    named = next(filter(None, map(os.environ.get, ("TMPDIR", "TEMP", "TMP"))), None)
    try:
        found = tempfile.gettempdir()  # tries to write into it
    except OSError as error:
        print(f"error: there is no temporary folder to write into ({error}). Set TMPDIR to one.", file=sys.stderr)
        raise SystemExit(2) from error
    if named and os.path.abspath(named) != found:
        os.environ["TMPDIR"] = found
        notes.append(f"nothing can be written into the temporary folder {named} (TMPDIR); {found} is used")


def settle_home() -> None:
    """Without a home folder HOME becomes a private one below the temporary folder. Where the home is there, but nothing
    can be written into it, caches alone go there: models and tokens that lie in it stay in use."""
    try:
        getpass.getuser()
    except (KeyError, OSError, ImportError):  # torch asks for it to name folders
        os.environ["LOGNAME"] = f"uid_{uid()}"
    home = os.path.expanduser("~")
    if not os.environ.get("HOME", home) or not os.path.isabs(home) or not os.path.isdir(home):
        os.environ["HOME"] = str(private_folder())
        notes.append(f"there is no home folder{f' {home}' if os.path.isabs(home) else ''}: caches go to "
                     f"{os.environ['HOME']}. Set HOME or --cache-dir and HF_HOME to keep them")
    elif not can_write(home):
        hub = Path(home, ".cache", "huggingface")
        if not any(map(os.environ.get, ("HF_HOME", "XDG_CACHE_HOME"))) and not hub.exists() and not can_write(hub):
            os.environ["HF_HOME"] = str(private_folder() / "huggingface")
            notes.append(f"nothing can be written into the home folder {home}: downloads go to "
                         f"{os.environ['HF_HOME']}. Set HF_HOME to keep them")


def default_cache_dir() -> Path:
    """--cache-dir's default, ~/.cache/flux-fast, or its like below the temporary folder if that cannot be written."""
    folder = Path.home() / ".cache" / "flux-fast"
    if can_write(folder):
        return folder
    instead = private_folder() / "flux-fast"
    notes.append(f"nothing can be written into {folder}: --cache-dir is {instead} unless it is given")
    return instead


def can_write(folder: str | Path) -> bool:
    """Whether files can be made in `folder`, which need not be there yet."""
    parent = nearest_parent(folder)
    return parent.is_dir() and os.access(parent, os.W_OK | os.X_OK)


def nearest_parent(path: str | Path) -> Path:
    """`path`, or the nearest of the folders above it that is there."""
    path = Path(path).absolute()
    return next(one for one in (path, *path.parents) if os.path.lexists(one))


def private_folder() -> Path:
    """A folder below the temporary one, the same at each start, that belongs to this user alone; a new one if another
    user has taken its name."""
    folder = Path(tempfile.gettempdir(), f"flux-fast-{uid()}")
    with suppress(OSError):
        folder.mkdir(mode=0o700, exist_ok=True)
        info = folder.lstat()
        of_others = info.st_mode & 0o077 and os.name != "nt"  # there the temporary folder is the user's own
        if stat.S_ISDIR(info.st_mode) and info.st_uid == uid() and not of_others:
            return folder
    return Path(tempfile.mkdtemp(prefix="flux-fast-"))


def uid() -> int:
    """The user's number; 0 on Windows, which has none."""
    return os.getuid() if hasattr(os, "getuid") else 0


def settle_compilers() -> None:
    """CXX and CC become one executable that works. torch._inductor takes CXX for one, and g++ without it; Triton takes
    CC for one, and looks for itself without it."""
    names = ("clang++", "g++", "c++") if sys.platform == "darwin" else ("g++", "c++", "clang++")
    for variable, fallback in (("CXX", names), ("CC", ())):
        wanted = os.environ.get(variable)
        if wanted is None and (not fallback or shutil.which(fallback[0])):
            continue
        found = compiler_of(wanted or "", fallback)
        if found == wanted:
            continue
        os.environ.pop(variable, None)
        if found:
            os.environ[variable] = found
        if wanted:
            instead = found or ("the compiler that Triton finds" if variable == "CC" else "none, for none works,")
            notes.append(f"{variable}={wanted} is not one executable that works, which PyTorch needs: {instead} is "
                         "used")


def compiler_of(wanted: str, fallback: Sequence[str]) -> str | None:
    """The first that works of `wanted`, which may be the name of a file, the words in `wanted`, and `fallback`."""
    try:
        words = shlex.split(wanted)
    except ValueError:
        words = wanted.split()
    words = [] if words == [wanted] else [word for word in words if not word.startswith("-")]
    candidates = [one for one in (wanted, *words, *fallback) if one and Path(one).name not in WRAPPERS]
    return next(filter(works, candidates), None)


def works(compiler: str) -> bool:
    """Whether it can be started and knows its version: all that torch._inductor asks as well."""
    try:
        return subprocess.run([compiler, "--version"], stdin=subprocess.DEVNULL, capture_output=True,
                              timeout=10).returncode == 0
    except (OSError, ValueError, subprocess.SubprocessError):
        return False
