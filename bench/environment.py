"""Records the environment of a measurement: machine, versions, commit, memory, and the GPU's clock and power."""

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

SAMPLE_MS = 20
START_S = 5  # time limit for nvidia-smi's first line


SCHEMA_VERSION = 1


def summarize(seconds: list[float]) -> dict:
    """Returns mean, sample variance, median, min, max and the raw list, in seconds (the variance in s^2)."""
    return {
        "mean": statistics.fmean(seconds),
        "variance": statistics.variance(seconds) if len(seconds) > 1 else 0.0,
        "median": statistics.median(seconds),
        "min": min(seconds),
        "max": max(seconds),
        "raw": seconds,
    }


def environment(device: str) -> dict:
    """Returns the machine, driver, package versions, commit and command line of a measurement.

    Args:
        device: "cuda" or "cpu"; "cuda" adds the GPU.
    """
    import torch

    packages = ("torch", "triton", "diffusers", "transformers", "torchao", "cache-dit", "accelerate", "fa3-fwd",
                "flash-attn-3", "amd-aiter")
    versions = {}
    for name in packages:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    processes = torch.distributed.get_world_size() if torch.distributed.is_initialized() else 1
    record = {"python": platform.python_version(), "platform": platform.platform(), "packages": versions,
              "cuda": torch.version.cuda, "hip": torch.version.hip, "cpu_threads": torch.get_num_threads(),
              "commit": current_commit(),
              "processes": processes, "argv": list(map(_without_folder, sys.argv[1:])),
              "date": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())}
    if device == "cuda":
        properties = torch.cuda.get_device_properties(torch.cuda.current_device())
        # The UUID names the GPU: nvidia-smi numbers all GPUs, and PyTorch only the visible ones (CUDA_VISIBLE_DEVICES).
        uuid = str(getattr(properties, "uuid", ""))
        smi = _output_of("nvidia-smi", f"--id=GPU-{uuid}",
                         "--query-gpu=driver_version,power.limit", "--format=csv,noheader")
        driver, _, power = (smi or "").partition(", ")
        record |= {"gpu": properties.name, "gpu_uuid": uuid or None, "gpu_memory_gib": properties.total_memory / 2**30,
                   "compute_capability": f"{properties.major}.{properties.minor}",
                   "driver": driver or None, "power_limit": power or None}
    return record


def _without_folder(arg: str) -> str:
    """Shortens an absolute path, also in --flag=PATH, to the file's name: its folders mean nothing elsewhere."""
    return re.sub(r"^([^/]*=)?/.*/", r"\1", arg)


def current_commit() -> str | None:
    """Returns $GIT_COMMIT or git's commit, with "-dirty" if tracked files differ from it; None if it is unknown.

    Files in the folders of results/ do not count, because measurements and reports write them.
    """
    if commit := os.environ.get("GIT_COMMIT"):
        return commit
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
    """Records the peak GPU memory of each phase in GiB: allocated by tensors, and reserved by PyTorch's allocator."""

    def __init__(self):
        self.phases: dict[str, dict[str, float]] = {}
        self._reset()

    @staticmethod
    def _reset():
        import torch

        if torch.cuda.is_available():
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()

    def end_of(self, phase: str) -> None:
        """Records the peak since the end of the last phase."""
        import torch

        if torch.cuda.is_available():
            self.phases[phase] = {"allocated_gib": torch.cuda.max_memory_allocated() / 2**30,
                                  "reserved_gib": torch.cuda.max_memory_reserved() / 2**30}
            self._reset()


@contextmanager
def monitor_gpu(device: str):
    """Context manager: samples the GPU's clock and power with nvidia-smi.

    It yields a dict, and fills it at the end of the block: the medians `sm_clock_mhz` and `power_w`, and the number of
    `samples`. The dict stays empty on a CPU, and if nvidia-smi is missing or reports no values.
    """
    import torch

    load, process = {}, None
    if device == "cuda":
        # The UUID names the GPU: nvidia-smi numbers all GPUs, and PyTorch only the visible ones (CUDA_VISIBLE_DEVICES).
        uuid = getattr(torch.cuda.get_device_properties(torch.cuda.current_device()), "uuid", "")
        command = ["nvidia-smi", f"--id=GPU-{uuid}", "--query-gpu=clocks.sm,power.draw.instant",
                   "--format=csv,noheader,nounits", f"--loop-ms={SAMPLE_MS}"]
        try:
            process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
            # nvidia-smi takes as long to start as several images take, and its first line shows an idle GPU.
            if select.select([process.stdout], [], [], START_S)[0]:
                process.stdout.readline()
        except OSError:
            pass  # nvidia-smi is missing, or this is Windows, where select does not accept pipes
    try:
        yield load
    finally:
        if process:
            process.terminate()
            load |= medians(process.communicate()[0])


def medians(lines: str) -> dict:
    """Returns the medians of nvidia-smi's lines, such as "1980, 345.12" (MHz, W).

    Invalid lines are skipped: the last line may be cut off, and some GPUs report "[N/A]".
    """
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
