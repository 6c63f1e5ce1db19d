"""Queries this machine in the same way as the libraries do: caches, compilers, memory."""

import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil
import torch

from utils.common import RecipeError, reason_of
from utils.start import GIVEN, can_write, compiler_of, finds_libstdcxx, nearest_parent

# --- caches ---

def kernel_cache(cache_dir: str) -> Path:
    """The folder where inductor keeps compiled kernels. A second start finds most kernels there.

    TORCHINDUCTOR_CACHE_DIR takes precedence if the user set it. PyTorch sets the variable itself on import.

    Raises:
        RecipeError: `cache_dir` begins with the home folder of an unknown user.
    """
    try:
        return Path(GIVEN["TORCHINDUCTOR_CACHE_DIR"] or Path(cache_dir).expanduser() / "inductor").absolute()
    except RuntimeError as error:  # ~ of an unknown user
        raise RecipeError(f"--cache-dir {cache_dir}: {reason_of(error)}. Choose another folder.") from error


def triton_cache(cache_dir: str) -> Path:
    """The folder of Triton's compiled kernels: the user's own, or one beside inductor's."""
    if GIVEN["TRITON_CACHE_DIR"]:
        return Path(GIVEN["TRITON_CACHE_DIR"])
    if GIVEN["TRITON_HOME"]:
        return Path(GIVEN["TRITON_HOME"], ".triton", "cache")
    return kernel_cache(cache_dir) / "triton"


def use_kernel_cache(cache_dir: str) -> None:
    """Makes inductor and Triton keep their kernels in `kernel_cache(cache_dir)` from now on.

    Raises:
        RecipeError: the folder cannot be created or is not writable.
    """
    folder = kernel_cache(cache_dir)
    flag = "TORCHINDUCTOR_CACHE_DIR" if GIVEN["TORCHINDUCTOR_CACHE_DIR"] else "--cache-dir"
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except (OSError, ValueError) as error:
        raise RecipeError(f"{flag}: cannot create {folder} ({reason_of(error)}). Choose another folder.") from error
    if not can_write(folder):
        raise RecipeError(f"{flag}: {folder} is not writable. Choose another folder.")
    if (default := os.environ.get("TORCHINDUCTOR_CACHE_DIR")) and default != GIVEN["TORCHINDUCTOR_CACHE_DIR"]:
        with suppress(OSError):
            os.rmdir(default)  # PyTorch creates it on import; rmdir fails if it is not empty
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(folder)
    if not (GIVEN["TRITON_CACHE_DIR"] or GIVEN["TRITON_HOME"]):
        os.environ["TRITON_CACHE_DIR"] = str(triton_cache(cache_dir))
    from torch._inductor import codecache
    if hasattr(codecache, "_HEADER_DIR"):  # inductor sets it once, on import
        codecache._HEADER_DIR = str(folder / "precompiled_headers")
        codecache._HEADER_LOCK_DIR = str(folder / "precompiled_headers" / "locks")


def noexec_obstacle(path: str | Path, cure: str) -> str | None:
    """The reason why code cannot be loaded from files in `path`, or None. The path need not exist yet.

    Args:
        cure: the end of the reason, which tells the user how to fix it.
    """
    with suppress(OSError, AttributeError):  # Windows has no statvfs
        if os.statvfs(nearest_parent(path)).f_flag & os.ST_NOEXEC:
            return f"{path} is on a file system mounted noexec, so compiled code cannot be loaded from it. {cure}"
    return None


def code_obstacle(cache_dir: str) -> str | None:
    """The reason why compiled code cannot be loaded from inductor's cache, or None."""
    return noexec_obstacle(kernel_cache(cache_dir), "Choose another --cache-dir")


def package_obstacle() -> str | None:
    """The reason why packages cannot be opened, or None. PyTorch unpacks their code into the temporary folder."""
    try:
        folder = tempfile.gettempdir()
    except OSError as error:
        return f"there is no temporary folder ({reason_of(error)}). Set TMPDIR to one"
    return noexec_obstacle(folder, "Set TMPDIR to another folder")


# --- compilers ---

def cpp_compiler() -> str | None:
    """The C++ compiler that torch._inductor will call, or None if it does not work. See
    `utils.start.settle_compilers`."""
    default = {"win32": "cl", "darwin": "clang++"}.get(sys.platform, "g++")
    if sys.platform == "win32":
        from shutil import which
        return which(os.environ.get("CXX", default))
    return compiler_of(os.environ.get("CXX", default), ())


def compiler_obstacle() -> str | None:
    """The reason why no C++ code can be compiled, or None."""
    return None if cpp_compiler() else "no C++ compiler (Debian, Ubuntu: apt install g++)"


def triton_obstacle(cache_dir: str) -> str | None:
    """The reason why Triton's kernels cannot run on this GPU, or None.

    At its first use Triton compiles a launcher in C, which includes Python.h. Later starts load it from Triton's cache.
    """
    try:
        import triton  # noqa: F401
    except ImportError:
        return "Triton is not installed"
    if any(triton_cache(cache_dir).glob("*")):
        return None
    named = os.environ.get("CC")
    if not any(map(shutil.which, [named] if named else ("clang", "gcc"))):
        return "Triton needs a C compiler (Debian, Ubuntu: apt install gcc)"
    return header_obstacle() or code_obstacle(cache_dir)


def header_obstacle() -> str | None:
    """The reason why torch.compile cannot build its code, which includes Python.h, or None.

    On a CPU the code of packages does not include Python.h.
    """
    if sys.platform == "darwin" or Path(sysconfig.get_path("include"), "Python.h").exists():
        return None  # on macOS torch finds the header inside Python's framework
    return "no Python.h (Debian, Ubuntu: apt install python3-dev)"


def libstdcxx_obstacle() -> str | None:
    """The reason why packages would crash for lack of libstdc++.so, or None.

    Without libstdc++.so the compiler links libstdc++.a into each package. Two copies of the library in one process
    disagree about locales, so std::regex crashes when the package is opened. macOS uses another C++ library.
    """
    compiler = cpp_compiler()
    if compiler is None or sys.platform != "linux":
        return None
    if finds_libstdcxx(compiler):
        return None
    return (f"{compiler} finds no libstdc++.so, and packages with their own copy of libstdc++ crash when opened. "
            "Install it (Debian, Ubuntu: apt install libstdc++-13-dev, or the version of your g++)")


@contextmanager
def compiling():
    """Turns a compiler's failure in the body into a one-paragraph error.

    Raises:
        RecipeError: replaces the exceptions of torch._inductor and Triton about a failed compiler.
    """
    try:
        yield
    except Exception as error:
        if isinstance(error, (RecipeError, torch.OutOfMemoryError)) or not _is_of_a_compiler(error):
            raise
        lines = [line.strip() for line in str(error).splitlines()]
        first = next((line for line in lines if re.search(r"\berror:", line)), reason_of(error)).rstrip(".")
        raise RecipeError(f"compilation failed ({os.environ.get('CXX', 'g++')}): {first[:300]}. Repair the compiler, "
                          "or do without it: --compile_export_mode disabled, and on a GPU --disable_fused_kernels "
                          "--disable_fused_vae as well.") from error


def _is_of_a_compiler(error: BaseException | None) -> bool:
    """Whether `error`, or an exception in its chain of causes, is a compiler's failure."""
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
    """The number of bytes that this process may still allocate.

    It is the smallest of the machine's free memory, swap included, and the free memory of each control group (cgroup
    v1 and v2).

    Args:
        sysfs: where control groups are mounted.
        of_self: the file that names this process's control groups.
    """
    free_bytes = [psutil.virtual_memory().available + psutil.swap_memory().free]
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
        group = mount / path.strip("/")
        for folder in (group, *group.parents):  # a parent group's limit holds as well
            if folder.is_relative_to(mount):
                free_bytes += _left_in(folder, *files)
    return max(0, min(free_bytes))


def _left_in(group: Path, limit: str, usage: str, reclaimable: str) -> list[int]:
    """[free bytes of a control group], or [] if the group has no limit. `limit` and `usage` are file names in it."""
    try:
        most, used = int((group / limit).read_text()), int((group / usage).read_text())
        stat = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
        return [most - used + int(stat.get(reclaimable, 0))]
    except (OSError, ValueError):  # the file is missing or says "max"
        return []
