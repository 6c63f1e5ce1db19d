"""What a measurement records beside its seconds: machine, versions, commit, memory, the GPU's clock and power."""

import os
import platform
import re
import select
import statistics
import subprocess
import sys
import time
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path

import torch

SAMPLE_MS = 20
START_S = 5  # how long nvidia-smi may take to answer


SCHEMA_VERSION = 1


def summarize(seconds: list[float]) -> dict:
    """Mean, variance (of the sample), median, min, max and the raw list, in seconds."""
    return {
        "mean": statistics.fmean(seconds),
        "variance": statistics.variance(seconds) if len(seconds) > 1 else 0.0,
        "median": statistics.median(seconds),
        "min": min(seconds),
        "max": max(seconds),
        "raw": seconds,
    }


def environment(device: str) -> dict:
    """Machine, driver, package versions, commit and command line: what a figure of `device` must be read with."""
    packages = ("torch", "triton", "diffusers", "transformers", "torchao", "cache-dit", "accelerate", "fa3-fwd",
                "flash-attn-3", "amd-aiter")
    found = {}
    for name in packages:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    processes = torch.distributed.get_world_size() if torch.distributed.is_initialized() else 1
    record = {"python": platform.python_version(), "platform": platform.platform(), "packages": found,
              "cuda": torch.version.cuda, "hip": torch.version.hip, "cpu_threads": torch.get_num_threads(),
              "commit": current_commit(),
              "processes": processes, "argv": list(map(_without_folder, sys.argv[1:])),
              "date": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())}
    if device == "cuda":
        properties = torch.cuda.get_device_properties(torch.cuda.current_device())
        # By its UUID: nvidia-smi counts all GPUs, PyTorch those of CUDA_VISIBLE_DEVICES.
        uuid = str(getattr(properties, "uuid", ""))
        smi = _output_of("nvidia-smi", f"--id=GPU-{uuid}",
                         "--query-gpu=driver_version,power.limit", "--format=csv,noheader")
        driver, _, power = (smi or "").partition(", ")
        record |= {"gpu": properties.name, "gpu_uuid": uuid or None, "gpu_memory_gib": properties.total_memory / 2**30,
                   "compute_capability": f"{properties.major}.{properties.minor}",
                   "driver": driver or None, "power_limit": power or None}
    return record


def _without_folder(arg: str) -> str:
    """An absolute path, or --flag=PATH, by its file's name: folders are of one machine."""
    return re.sub(r"^([^/]*=)?/.*/", r"\1", arg)


def current_commit() -> str | None:
    """$GIT_COMMIT, or git's, with "-dirty" where files differ from it, but for what measurements and reports write
    below results/."""
    if given := os.environ.get("GIT_COMMIT"):
        return given
    git, written = ("git", "-C", str(Path(__file__).parent.parent)), (":!results/*/*",)
    commit = _output_of(*git, "describe", "--always")
    changed = _output_of(*git, "status", "--porcelain", "--untracked-files=no", "--", ".", *written)
    return f"{commit}-dirty" if commit and changed else commit


def _output_of(*command: str) -> str | None:
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout.strip() or None
    except (OSError, subprocess.SubprocessError):
        return None


class PeakMemory:
    """Peak GPU memory in GiB of each phase: what tensors took, and what the allocator held for them."""

    def __init__(self):
        self.phases: dict[str, dict[str, float]] = {}
        self._reset()

    @staticmethod
    def _reset():
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()

    def end_of(self, phase: str) -> None:
        """Records the peak since the last phase ended."""
        if torch.cuda.is_available():
            self.phases[phase] = {"allocated_gib": torch.cuda.max_memory_allocated() / 2**30,
                                  "reserved_gib": torch.cuda.max_memory_reserved() / 2**30}
            self._reset()


@contextmanager
def monitor_gpu(device: str):
    """Yields a dict that holds, once the block has ended, what nvidia-smi saw meanwhile: medians of `sm_clock_mhz` and
    `power_w`, the number of `samples`. It stays empty on a CPU, without nvidia-smi, and if that has nothing to say."""
    found, process = {}, None
    if device == "cuda":
        # By its UUID: nvidia-smi counts all GPUs, PyTorch those of CUDA_VISIBLE_DEVICES.
        uuid = getattr(torch.cuda.get_device_properties(torch.cuda.current_device()), "uuid", "")
        command = ["nvidia-smi", f"--id=GPU-{uuid}", "--query-gpu=clocks.sm,power.draw.instant",
                   "--format=csv,noheader,nounits", f"--loop-ms={SAMPLE_MS}"]
        try:
            process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
            # It starts for as long as some images take; its first line is of an idle GPU.
            if select.select([process.stdout], [], [], START_S)[0]:
                process.stdout.readline()
        except OSError:
            pass  # no nvidia-smi; or Windows, whose pipes cannot be waited for
    try:
        yield found
    finally:
        if process:
            process.terminate()
            found |= medians(process.communicate()[0])


def medians(lines: str) -> dict:
    """Of nvidia-smi's lines "1980, 345.12"; the last one may be half a line, and some GPUs answer "[N/A]"."""
    samples = []
    for line in lines.splitlines():
        try:
            clock, power = map(float, line.split(","))
        except ValueError:
            continue
        samples.append((clock, power))
    if not samples:
        return {}
    clocks, powers = zip(*samples, strict=True)
    return {"sm_clock_mhz": statistics.median(clocks), "power_w": statistics.median(powers), "samples": len(samples)}
