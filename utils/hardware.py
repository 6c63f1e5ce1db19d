"""Detects what this machine has, before any decision: the GPU, its free memory, and what is missing for a technique."""

import argparse
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from importlib.util import find_spec

import torch
from diffusers import FluxTransformer2DModel
from diffusers import attention_backend as diffusers_backend
from diffusers.models.attention_dispatch import AttentionBackendName

from utils import attention, launchers, machine

DISPATCHER = tuple(name.value for name in AttentionBackendName)  # diffusers' attention backends
CPU_BACKENDS = ("native", "_native_math", "_native_flash", "flex")  # of the dispatcher, tried on torch 2.13


@dataclass(frozen=True)
class Hardware:
    """The machine that the plan depends on, from `detect` or described by a test.

    Attributes:
        device: "cuda" (also AMD's ROCm) or "cpu".
        free_bytes: GPU memory that this process may use, with what it holds already.
        processes: of torchrun or accelerate.
        attention_source: where the attention library was found, "" if it was not found or not looked for.
        missing: {what: why it cannot be used, and the cure}. Keys: "triton" (with what its kernels need), "attention",
            "compiler" (of C++), "headers" (Python.h), "code" (a cache folder that code can be loaded from), "packages"
            (the same for the temporary folder), "libstdc++", "cache-dit". An absent key means that nothing is missing.
    """
    device: str
    capability: tuple[int, int] = (0, 0)
    is_rocm: bool = False
    name: str = "CPU"
    free_bytes: int = 0
    processes: int = 1
    attention_source: str = ""
    missing: Mapping[str, str] = field(default_factory=dict)

    @property
    def has_float8(self) -> bool:
        """The GPU multiplies e4m3 matrices."""
        if self.device != "cuda":
            return False
        return "MI3" in self.name if self.is_rocm else self.capability >= (8, 9)

    @property
    def is_hopper(self) -> bool:
        """sm_90, for which FlashAttention-3 and the fused kernels are written."""
        return self.device == "cuda" and not self.is_rocm and self.capability[0] == 9


def gpu(memory_limit_gib: float | None = None) -> Hardware:
    """The current GPU. `memory_limit_gib` caps the memory that this process may use."""
    free, _ = torch.cuda.mem_get_info()
    free += torch.cuda.memory_reserved()
    if memory_limit_gib:
        free = min(free, int(memory_limit_gib * 2**30))
    return Hardware("cuda", torch.cuda.get_device_capability(), torch.version.hip is not None,
                    torch.cuda.get_device_name(), free)


def detect(args: argparse.Namespace) -> Hardware:
    """The hardware and the installed software, as far as the flags in `args` make use of them."""
    found = gpu(args.gpu_memory_limit) if args.device == "cuda" else Hardware("cpu")
    # Importing FlashAttention-3 takes seconds.
    source, no_attention = ("", None) if args.disable_fa3 else _find_attention(args.attention_backend, found)
    no_triton = machine.triton_obstacle(args.cache_dir) if args.device == "cuda" else None
    no_headers = machine.header_obstacle()
    missing = {
        "triton": no_triton,
        "attention": no_attention,
        # Triton's launchers include Python.h, in packages as well.
        "compiler": no_triton or (no_headers if args.device == "cuda" else None) or machine.compiler_obstacle(),
        "headers": no_headers,
        "code": machine.code_obstacle(args.cache_dir),
        "packages": machine.package_obstacle(),
        "libstdc++": machine.libstdcxx_obstacle(),
        "cache-dit": None if find_spec("cache_dit") else "the step cache needs cache-dit: pip install cache-dit==1.5.3",
    }
    return replace(found, processes=launchers.world_size(), attention_source=source,
                   missing={name: why for name, why in missing.items() if why})


def _find_attention(wanted: str | None, found: Hardware) -> tuple[str, str | None]:
    """Looks for the library of --attention_backend, or of the default backend.

    Returns:
        The module in which the library was found, and why it cannot be used. A library for other hardware is not
        imported: importing takes seconds, and `utils.plan` refuses it anyway.
    """
    backend = wanted or ("aiter" if found.is_rocm else "fa3")
    if backend in attention.BACKENDS:
        library = attention.BACKENDS[backend][0]
        if not (found.is_hopper if library == "fa3" else found.is_rocm):
            return "", None
        function, source = attention.find_library(library)
        return (source, None) if function else ("", source)
    if backend not in DISPATCHER or (found.device == "cpu" and backend not in CPU_BACKENDS):
        return "", None
    try:
        # diffusers looks for the package when a backend is set: set it on a model that costs nothing. Setting a
        # backend also changes a default of the whole process; the context restores the default.
        with torch.device("meta"), diffusers_backend("native"):
            FluxTransformer2DModel(num_layers=1, num_single_layers=1).set_attention_backend(backend)
    except (RuntimeError, ImportError, ValueError) as error:
        return "", str(error)
    return "diffusers' dispatcher", None
