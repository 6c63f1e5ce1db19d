"""Reads the energy that the GPUs have used, from NVML's counter (NVIDIA GPUs since Volta).

The driver updates the counter from time to time, so two readings should be seconds apart.
"""

import ctypes


class EnergyCounter:
    """The energy of this process's GPU, and of the other processes' GPUs that share an image with it.

    Args:
        device: "cuda" or "cpu".
    """

    def __init__(self, device: str):
        self.library = self.handle = None
        if device != "cuda":
            return
        import torch

        uuid = getattr(torch.cuda.get_device_properties(torch.cuda.current_device()), "uuid", None)
        try:
            library, handle = ctypes.CDLL("libnvidia-ml.so.1"), ctypes.c_void_p()
            failed = library.nvmlInit_v2() or library.nvmlDeviceGetHandleByUUID(f"GPU-{uuid}".encode(),
                                                                                ctypes.byref(handle))
            if not failed:
                self.library, self.handle = library, handle
        except (OSError, AttributeError):
            pass  # no NVIDIA driver

    def joules(self) -> float | None:
        """The energy since the driver was loaded; None if the GPU does not report it."""
        used = ctypes.c_ulonglong()
        if self.handle is None or self.library.nvmlDeviceGetTotalEnergyConsumption(self.handle, ctypes.byref(used)):
            return None
        return used.value / 1000

    def since(self, before: float | None) -> float | None:
        """The energy of all processes' GPUs since `before`, which each process got from `joules`.

        Several processes must call it together. None if the GPU does not report it.
        """
        now = self.joules()
        if before is None or now is None:
            return None
        import torch
        import torch.distributed as dist

        if not dist.is_initialized():
            return now - before
        total = torch.tensor(now - before, device="cuda", dtype=torch.float64)
        dist.all_reduce(total)
        return total.item()
