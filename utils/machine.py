"""What this machine has, asked as the libraries will ask it: launchers, caches, a compiler, memory."""

import os
import re
import subprocess
import sys
import sysconfig
import tempfile
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil
import torch

from utils.common import RecipeError, reason_of
from utils.start import GIVEN, can_write, compiler_of, nearest_parent

# --- processes ---

# torchrun and `accelerate launch` set all of them.
LAUNCHER = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
# What mpirun and srun set in each of the processes that they start. An allocation of Slurm's sets SLURM_NTASKS as well
# where a single process runs.
MPI_SIZES = ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "MV2_COMM_WORLD_SIZE", "SLURM_STEP_NUM_TASKS")


def world_size() -> int:
    """How many processes torchrun, or accelerate, has started.

    Raises:
        RecipeError: variables of a launcher that are not complete, or make no sense; or a launcher of another kind.
    """
    found = {name: os.environ.get(name, "").strip() for name in LAUNCHER}
    size = _number("WORLD_SIZE", found["WORLD_SIZE"] or "1", 1)
    missing = [name for name, value in found.items() if not value]
    if size > 1 and missing:
        raise RecipeError(f"WORLD_SIZE={size}, but {', '.join(missing)} {'is' if len(missing) == 1 else 'are'} not "
                          "set: no launcher has started this process. For one process run it with `env -u WORLD_SIZE`, "
                          "for several with torchrun or accelerate launch.")
    if not missing:
        for name, least, end in (("RANK", 0, size), ("LOCAL_RANK", 0, size), ("MASTER_PORT", 0, 2**16)):
            _number(name, found[name], least, end)
        return size
    for name in MPI_SIZES:
        value = os.environ.get(name, "").strip()
        if value.isdecimal() and int(value) > 1:
            raise RecipeError(f"{name}={value}: mpirun or srun has started this process, and each of {value} would do "
                              "the same work. Start several with torchrun or accelerate launch, or run a single one "
                              f"with `env -u {name}`.")
    return 1


def _number(name: str, text: str, least: int, end: int | None = None) -> int:
    if not text.isdecimal() or int(text) < least or (end is not None and int(text) >= end):
        limits = f"from {least} to {end - 1}" if end is not None else f"of at least {least}"
        raise RecipeError(f"{name}={text} is not a number {limits}, and torchrun sets such a number. If no launcher "
                          f"has started this process, run it with `env -u WORLD_SIZE -u {name}`.")
    return int(text)


def own_gpu() -> int:
    """The GPU of this process, one of several that a launcher has started here.

    Raises:
        RecipeError: there are fewer GPUs than processes.
    """
    local = int(os.environ["LOCAL_RANK"])
    if local >= torch.cuda.device_count():
        raise RecipeError(f"torchrun started {os.environ.get('LOCAL_WORLD_SIZE', world_size())} processes here and "
                          f"PyTorch sees {torch.cuda.device_count()} GPUs: one process a GPU.")
    return local


def forget_launchers() -> None:
    """For a process by itself: takes out of its environment what accelerate would read as one of several."""
    prefixes = ("PMI_", "OMPI_COMM_WORLD_", "MV2_COMM_WORLD_", "MPI_LOCAL")
    for name in [name for name in os.environ if name in (*LAUNCHER, "LOCAL_WORLD_SIZE") or name.startswith(prefixes)]:
        del os.environ[name]


# --- caches ---

def kernel_cache(cache_dir: str) -> Path:
    """Where inductor keeps compiled kernels: a second start finds most of them there. PyTorch's own variable wins, if
    it was set by the user and not, as it is on import, by PyTorch."""
    try:
        return Path(GIVEN["TORCHINDUCTOR_CACHE_DIR"] or Path(cache_dir).expanduser() / "inductor").absolute()
    except RuntimeError as error:  # ~ of nobody
        raise RecipeError(f"--cache-dir {cache_dir}: {reason_of(error)}. Choose another.") from error


def use_kernel_cache(cache_dir: str) -> None:
    """Has inductor and Triton keep their kernels there, from now on.

    Raises:
        RecipeError: nothing can be written there.
    """
    folder = kernel_cache(cache_dir)
    flag = "TORCHINDUCTOR_CACHE_DIR" if GIVEN["TORCHINDUCTOR_CACHE_DIR"] else "--cache-dir"
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except (OSError, ValueError) as error:
        raise RecipeError(f"{flag}: cannot make {folder} ({reason_of(error)}). Choose another.") from error
    if not can_write(folder):
        raise RecipeError(f"{flag}: {folder} is not writable. Choose another.")
    if (made := os.environ.get("TORCHINDUCTOR_CACHE_DIR")) and made != GIVEN["TORCHINDUCTOR_CACHE_DIR"]:
        with suppress(OSError):
            os.rmdir(made)  # by PyTorch on import; it stays if anything is in it
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(folder)
    if not (GIVEN["TRITON_CACHE_DIR"] or GIVEN["TRITON_HOME"]):
        os.environ["TRITON_CACHE_DIR"] = str(folder / "triton")
    from torch._inductor import codecache
    if hasattr(codecache, "_HEADER_DIR"):  # read once, on import, and not from the variable
        codecache._HEADER_DIR = str(folder / "precompiled_headers")
        codecache._HEADER_LOCK_DIR = str(folder / "precompiled_headers" / "locks")


def noexec_obstacle(path: str | Path, cure: str) -> str | None:
    """Why no code can be loaded from files in `path`, which need not be there yet."""
    with suppress(OSError, AttributeError):  # Windows has no statvfs
        if os.statvfs(nearest_parent(path)).f_flag & os.ST_NOEXEC:
            return f"{path} is on a file system mounted noexec, and compiled code could not be loaded from it. {cure}"
    return None


def code_obstacle(cache_dir: str) -> str | None:
    """Why no compiled code could be loaded from where inductor puts it."""
    return noexec_obstacle(kernel_cache(cache_dir), "Choose another --cache-dir")


def package_obstacle() -> str | None:
    """Why no package could be opened: PyTorch unpacks its code into the temporary folder."""
    return noexec_obstacle(tempfile.gettempdir(), "Set TMPDIR to another folder")


# --- compilers ---

def cpp_compiler() -> str | None:
    """The compiler that torch._inductor will call, if it works; see `utils.start.settle_compilers`."""
    default = {"win32": "cl", "darwin": "clang++"}.get(sys.platform, "g++")
    if sys.platform == "win32":
        from shutil import which
        return which(os.environ.get("CXX", default))
    return compiler_of(os.environ.get("CXX", default), ())


def header_obstacle() -> str | None:
    """torch.compile's code includes Python.h; that of packages does not, on a CPU."""
    if sys.platform == "darwin" or Path(sysconfig.get_path("include"), "Python.h").exists():
        return None  # a framework of macOS has it elsewhere, where torch looks
    return "no Python.h (Debian, Ubuntu: apt install python3-dev)"


def libstdcxx_obstacle() -> str | None:
    """Without libstdc++.so a compiler links libstdc++.a into each package. Two copies of it in one process have two
    ideas of a locale, and a package crashes when it is opened, in std::regex. Not so on macOS, whose library is
    another."""
    compiler = cpp_compiler()
    if compiler is None or sys.platform != "linux":
        return None
    found = subprocess.run([compiler, "-print-file-name=libstdc++.so"], capture_output=True, text=True).stdout.strip()
    if found != "libstdc++.so":
        return None
    return (f"{compiler} finds no libstdc++.so, and packages with a libstdc++ of their own crash when they are opened. "
            "Install it (Debian, Ubuntu: apt install libstdc++-13-dev, or the version of your g++)")


@contextmanager
def compiling():
    """Around what compiles: a compiler that fails all the same becomes one paragraph.

    Raises:
        RecipeError: in the place of what torch._inductor and Triton raise then.
    """
    try:
        yield
    except Exception as error:
        if isinstance(error, (RecipeError, torch.OutOfMemoryError)) or not _is_of_a_compiler(error):
            raise
        lines = [line.strip() for line in str(error).splitlines()]
        first = next((line for line in lines if re.search(r"\berror:", line)), reason_of(error)).rstrip(".")
        raise RecipeError(f"compilation failed ({os.environ.get('CXX', 'g++')}): {first[:300]}. Mend the compiler, or "
                          "use --compile_export_mode disabled, which needs none on a CPU.") from error


def _is_of_a_compiler(error: BaseException | None) -> bool:
    """Whether it, or what it was raised from, is a compiler's failure."""
    from torch._dynamo.exc import BackendCompilerFailed
    from torch._inductor.exc import CppCompileError, InductorError, InvalidCxxCompiler
    known = BackendCompilerFailed, InductorError, CppCompileError, InvalidCxxCompiler, subprocess.CalledProcessError
    while error is not None:
        if isinstance(error, known) or re.search(r"Failed to find C\S* compiler|failed to map segment", str(error)):
            return not isinstance(getattr(error, "inner_exception", None), torch.OutOfMemoryError)
        error = error.__cause__
    return False


# --- memory ---

def available_memory(sysfs: str = "/sys/fs/cgroup", of_self: str = "/proc/self/cgroup") -> int:
    """Bytes that this process may still take: of the machine, swap included, and within the limits of its control
    groups (both versions)."""
    found = [psutil.virtual_memory().available + psutil.swap_memory().free]
    lines = []
    with suppress(OSError):
        lines = Path(of_self).read_text().splitlines()
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            files, mount = ("memory.max", "memory.current", "inactive_file"), Path(sysfs)
        elif "memory" in controllers.split(","):
            files = "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"
            mount = Path(sysfs, "memory")
        else:
            continue
        own = mount / path.strip("/")
        for folder in (own, *own.parents):  # a limit above holds here too
            if folder.is_relative_to(mount):
                found += _left_in(folder, *files)
    return max(0, min(found))


def _left_in(group: Path, limit: str, usage: str, reclaimable: str) -> list[int]:
    """[bytes left in a control group], or [] if it has no limit."""
    try:
        most, used = int((group / limit).read_text()), int((group / usage).read_text())
        stat = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
        return [most - used + int(stat.get(reclaimable, 0))]
    except (OSError, ValueError):  # not there, or "max"
        return []
