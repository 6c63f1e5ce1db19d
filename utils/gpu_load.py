"""A GPU's clock and power while it works. At its power limit it lowers the clock: then work is as fast as it is frugal,
and a kernel that is faster by itself need not be so in the middle of others."""

import select
import statistics
import subprocess
from contextlib import contextmanager

import torch

SAMPLE_MS = 20
START_S = 5  # how long nvidia-smi may take to answer


@contextmanager
def watching_load(device: str):
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
