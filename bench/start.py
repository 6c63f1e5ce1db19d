"""Measures gen_image.py's whole start: from a fresh process to the picture on disk.

    python -m bench.start write FOLDER --ckpt black-forest-labs/FLUX.1-schnell
    python -m bench.start measure --output-json start.json --rows first again cold -- --ckpt FOLDER

`write` saves a checkpoint with random weights in diffusers' format, at full size. `measure` passes the flags after `--`
to gen_image.py. It writes the record after every row. A row that cannot run here has its reason instead of seconds.

The seconds of stages come from the lines of `utils.common.StageLog`, which gen_image.py prints for its users. The time
before the first stage is "imports". This process does not import torch: a child's peak memory starts at its parent's,
and a parent on the GPU would keep the driver awake.
"""

import argparse
import json
import math
import os
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

from bench.environment import SCHEMA_VERSION
from utils.benchmark_utils import create_parser
from utils.common import RecipeError, run_cli
from utils.output_checks import check_output
from utils.outputs import is_record, write_json
from utils.start import nearest_parent

ROOT = Path(__file__).parent.parent
BLOCK, THREADS = 8 * 2**20, 4  # bytes of a plain read, and its threads

ROWS = {
    "help": "gen_image.py --help",
    "refusal": "a --height that is no multiple of 16",
    "import torch": "Python and torch alone",
    "imports": "gen_image.py until its first stage, which loads the weights",
    "plain read": "the checkpoint's files from the page cache, in blocks of 8 MiB on 4 threads",
    "plain read cold": "the same files from the disk",
    "first": "a picture with an empty --cache-dir",
    "again": "a picture with the --cache-dir of an earlier start",
    "cold": "as again, with the checkpoint from the disk",
    "kept": "as again, with the quantized weights of an earlier start",
    "kept cold": "as kept, with the checkpoint and the kept weights from the disk",
}
DROPPED = "dropped before each repeat: fsync and posix_fadvise(POSIX_FADV_DONTNEED) on each file"
WARM = "warm: each file was read before the row"
NO_FILES = "--ckpt is no local folder, or the weights are random"

UNTIL_LOAD = """
import os, runpy, sys
sys.argv.pop(0)
sys.path[0] = os.path.dirname(sys.argv[0])
from utils import common
common.StageLog.stage = lambda *_: os._exit(0)
runpy.run_path(sys.argv[0], run_name="__main__")
"""
ENVIRONMENT = """
import json, sys, torch
from bench.environment import environment
print(json.dumps(environment(sys.argv.pop(1) or ("cuda" if torch.cuda.is_available() else "cpu"))))
"""


def given_environment() -> dict[bytes, bytes]:
    """Returns this process's environment before `utils.start` changed it, so that the children repeat that work.

    The variables that override --cache-dir are left out.
    """
    entries = Path("/proc/self/environ").read_bytes().split(b"\0")
    given = dict(entry.split(b"=", 1) for entry in entries if b"=" in entry)
    overriding = {b"TORCHINDUCTOR_CACHE_DIR", b"TRITON_CACHE_DIR", b"TRITON_HOME"}
    return {name: value for name, value in given.items() if name not in overriding}


def stages_of(lines: Sequence[tuple[float, str]]) -> dict[str, float]:
    """Returns the seconds of each stage, and of "imports" before the first stage.

    Args:
        lines: of stderr, each after the seconds from the process's start to its arrival.
    """
    stages = {}
    for arrived, line in lines:
        if match := re.fullmatch(r"([a-z]\S*(?: \S+)*) {2,}(\d+\.\d\d) s", line):
            seconds = float(match[2])
            stages.setdefault("imports", arrived - seconds)
            stages[match[1]] = seconds
    return stages


def launch(arguments: list[str], code: int = 0) -> dict:
    """Runs Python with `arguments`. Returns its wall seconds, stages, and peak resident memory with mapped files.

    Raises:
        RecipeError: the exit code is not `code`. The text is the last error line.
    """
    lines, start = [], time.perf_counter()
    process = subprocess.Popen([sys.executable, *arguments], env=given_environment(), stdin=subprocess.DEVNULL,
                               stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, errors="replace")
    for line in process.stderr:
        lines.append((time.perf_counter() - start, line.rstrip()))
        print(line, end="", file=sys.stderr, flush=True)
    _, status, usage = os.wait4(process.pid, 0)  # `process.wait` does not return the peak
    seconds, process.returncode = time.perf_counter() - start, os.waitstatus_to_exitcode(status)
    if process.returncode != code:
        texts = [line for _, line in lines] or ["no output"]
        errors = [text for text in texts if "error: " in text]
        raise RecipeError(f"exit code {process.returncode}: {(errors or texts)[-1]}")
    return {"seconds": seconds, "stages": stages_of(lines), "peak_cpu_bytes": usage.ru_maxrss * 1024}


def drop_cache(files: Sequence[Path]) -> None:
    """Drops files from the page cache."""
    for file in files:
        with open(file, "rb") as opened:
            os.fsync(opened.fileno())  # pages that are not on the disk yet would stay
            os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def plain_read(files: Sequence[Path]) -> dict:
    """Reads files whole, the threads side by side in each file. Returns the seconds and the bytes."""
    start = time.perf_counter()
    blocks = iter([(file, offset) for file in files for offset in range(0, file.stat().st_size, BLOCK)])

    def read(_) -> int:
        buffer, count = bytearray(BLOCK), 0
        for file, offset in blocks:
            with open(file, "rb", buffering=0) as opened:
                opened.seek(offset)
                count += opened.readinto(buffer)
        return count

    with ThreadPoolExecutor(THREADS) as pool:
        size = sum(pool.map(read, range(THREADS)))
    return {"seconds": time.perf_counter() - start, "bytes": size}


def summary(runs: list[dict]) -> dict:
    """Returns the repeats as one: {"median", "raw"} in the place of each number. A stage that did not run took 0 s."""
    result = {}
    for name in dict.fromkeys(name for run in runs for name in run):
        raw = [run.get(name, 0.0) for run in runs]
        result[name] = summary(raw) if isinstance(raw[0], dict) else {"median": statistics.median(raw), "raw": raw}
    return result


def files_below(folder: Path) -> list[Path]:
    """Returns the files in a folder and in the folders in it."""
    return sorted(path for path in folder.rglob("*") if path.is_file())


class Bench:
    """The rows of one `measure`.

    Args:
        flags: of gen_image.py.
        checkpoint: the files of --ckpt, if any.
        scratch: an empty folder for --cache-dir and the pictures.
    """

    def __init__(self, flags: list[str], checkpoint: list[Path], scratch: Path, repeats: int):
        self.checkpoint, self.repeats = checkpoint, repeats
        self.cache, self.pictures = scratch / "cache", scratch / "pictures"
        self.command = [str(ROOT / "gen_image.py"), *flags, "--cache-dir", str(self.cache),
                        "--output-file", str(self.pictures / "image.png")]
        self.prepared: set[bool] = set()  # values of `draw`'s `kept` that have filled the cache

    def row(self, name: str) -> dict:
        """Measures a row and returns its entry.

        Raises:
            RecipeError: the row cannot run here.
        """
        cold, kept = name.endswith("cold"), name.startswith("kept")
        if not self.checkpoint and (cold or name == "plain read"):
            raise RecipeError(NO_FILES)
        run = {"help": partial(launch, [self.command[0], "--help"]),
               "refusal": partial(launch, [*self.command, "--height", "100"], code=2),
               "import torch": partial(launch, ["-c", "import torch"]),
               "imports": partial(launch, ["-c", UNTIL_LOAD, *self.command]),
               "plain read": partial(plain_read, self.checkpoint),
               "plain read cold": partial(plain_read, self.checkpoint)}.get(name, partial(self.draw, kept))
        entry, runs = {"page_cache": (DROPPED if cold else WARM) if self.checkpoint else NO_FILES}, []
        if name in ("again", "cold", "kept", "kept cold") and kept not in self.prepared:
            entry["before"] = summary([self.draw(kept)])
        for repeat in range(self.repeats):
            if name == "first":
                shutil.rmtree(self.cache, ignore_errors=True)
            if cold:
                drop_cache(self.checkpoint + files_below(self.cache / "weights"))
            elif repeat == 0:
                plain_read(self.checkpoint + files_below(self.cache / "weights"))
            runs.append(run())
        return entry | summary(runs)

    def draw(self, kept: bool) -> dict:
        """Draws a picture. Returns as `launch`, with the seconds to the picture on disk and to the process's end."""
        shutil.rmtree(self.pictures, ignore_errors=True)
        began = time.time()
        run = launch([*self.command, *["--keep_quantized"] * kept])
        written = [path.stat().st_mtime for path in self.pictures.glob("image*.png")]
        if not written:
            raise RecipeError("gen_image.py wrote no picture")
        if kept and not any(self.cache.glob("weights/*/manifest.json")):
            raise RecipeError("gen_image.py kept no weights; its line on stderr says why")
        self.prepared |= {False, kept}
        return {"seconds": max(written) - began, "process_seconds": run.pop("seconds")} | run


def measure(args, flags: list[str]) -> None:
    """Measures the rows of `args.rows`, and writes the record after each row.

    Args:
        flags: of gen_image.py.
    """
    if sys.platform != "linux":
        raise RecipeError("this benchmark needs Linux's /proc and posix_fadvise. Run it on a Linux machine.")
    parsed = create_parser().parse_args(flags)
    if parsed.quiet or args.repeats < 1:
        raise RecipeError("--quiet hides the stages. Drop the flag." if parsed.quiet else
                          f"--repeats {args.repeats}: the value must be at least 1.")
    check_output(args.output_json, "--output-json", is_record)
    folder = ROOT / "tiny_flux" / "checkpoint" if parsed.ckpt.startswith("tiny-") else Path(parsed.ckpt).expanduser()
    files = [] if parsed.random_weights else files_below(folder)
    sizes = Counter()
    for file in files:
        sizes[file.relative_to(folder).parts[0]] += file.stat().st_size
    machine = json.loads(subprocess.run([sys.executable, "-c", ENVIRONMENT, parsed.device or "", *sys.argv[1:]],
                                        cwd=ROOT, stdout=subprocess.PIPE, check=True).stdout)
    record = {"schema_version": SCHEMA_VERSION, "flags": machine["argv"][len(machine["argv"]) - len(flags):],
              "checkpoint_bytes": sizes, "rows": {}, "environment": machine}
    with tempfile.TemporaryDirectory() as scratch:
        bench = Bench(flags, files, Path(scratch), args.repeats)
        for name in filter(args.rows.__contains__, ROWS):
            try:
                entry = bench.row(name)
                print(f"{name:<16} {entry['seconds']['median']:8.2f} s", flush=True)
            except RecipeError as error:
                entry = {"not_run": str(error)}
                print(f"{name:<16} not run: {error}", flush=True)
            record["rows"][name] = {"meaning": ROWS[name]} | entry
            write_json(args.output_json, record, is_record)


def write(args) -> None:
    """Saves a checkpoint with random weights in bf16.

    Raises:
        RecipeError: the folder is not empty, or its disk or the memory is too small.
    """
    import torch

    from utils import random_weights
    from utils.checkpoint import model_shapes
    from utils.machine import available_memory

    folder, configs = args.folder.expanduser(), random_weights.architecture(args.ckpt, args.random_weights)
    numbers = sum(math.prod(shape) for shapes in model_shapes(configs).values() for shape in shapes.values())
    size, free = 2 * numbers + 10**8, shutil.disk_usage(nearest_parent(folder)).free
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise RecipeError(f"{folder} is no empty folder. Choose another one.")
    if free < size:
        raise RecipeError(f"{folder}: the checkpoint takes {size / 1e9:.1f} GB, and the disk has {free / 1e9:.1f} GB "
                          "free. Choose another disk, or fewer blocks with --random_weights 2+4.")
    on_gpu = torch.cuda.is_available() and torch.cuda.mem_get_info()[0] > size
    if not on_gpu and available_memory() < size:
        raise RecipeError(f"{folder}: the checkpoint takes {size / 1e9:.1f} GB of memory; neither GPU nor CPU has "
                          "as much free. Choose fewer blocks with --random_weights 2+4.")
    random_weights.build(configs, "cuda" if on_gpu else "cpu", torch.bfloat16).save_pretrained(folder)
    print(f"wrote {folder}: {sum(file.stat().st_size for file in files_below(folder)) / 1e9:.2f} GB")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    writing = commands.add_parser("write", help="save a checkpoint with random weights")
    writing.add_argument("folder", type=Path, metavar="FOLDER")
    writing.add_argument("--ckpt", required=True, help="the architecture, such as black-forest-labs/FLUX.1-schnell")
    writing.add_argument("--random_weights", default="full", metavar="DOUBLE+SINGLE", help="fewer blocks, such as 1+2")
    measuring = commands.add_parser("measure", help="time gen_image.py; its flags come after --")
    measuring.add_argument("--output-json", required=True, metavar="FILE", help="where to write the record")
    measuring.add_argument("--rows", nargs="+", choices=ROWS, default=list(ROWS), metavar="NAME",
                           help="measure these rows (all): " + "; ".join(map(": ".join, ROWS.items())))
    measuring.add_argument("--repeats", type=int, default=3, metavar="N", help="processes of each row (3)")
    end = sys.argv.index("--") if "--" in sys.argv else len(sys.argv)
    args = parser.parse_args(sys.argv[1:end])
    if args.command == "write":
        write(args)
    else:
        measure(args, sys.argv[end + 1:])


if __name__ == "__main__":
    run_cli(main)
