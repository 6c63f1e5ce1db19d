"""Exports a module as one package with torch.export and AOTInductor, and works around their bugs."""

import warnings
from contextlib import contextmanager
from pathlib import Path

import torch
from torch._inductor import cpu_vec_isa
from torch._inductor.cpu_vec_isa import VecISA
from torch.utils._pytree import tree_leaves

# Inductor's settings that differ from its defaults.
SETTINGS = {
    "aot_inductor.package_constants_in_so": False,
    # No weight may become a literal in the code, since other blocks and other fine-tunes run the same code. Folding
    # would inline scales, and inductor inlines constants of up to eight elements, such as the bias of the VAE's output.
    "joint_graph_constant_folding": False,
    "always_keep_tensor_constants": True,
}


def write_package(module: torch.nn.Module, arguments: dict, path: Path, settings: dict, metadata: dict[str, str]
                  ) -> None:
    """Writes a .pt2 of `module` without its weights.

    Args:
        module: the module to export.
        arguments: the arguments of one call, by name. The code supports only their shapes, dtypes and devices.
        path: the .pt2 file to write.
        settings: inductor's settings for this module, which override `SETTINGS`.
        metadata: strings to store in the file. They can be read without loading its code.
    """
    settings = SETTINGS | settings | {"aot_inductor.metadata": metadata}
    on_gpu = any(x.is_cuda for x in tree_leaves(arguments) if isinstance(x, torch.Tensor))
    if on_gpu:
        # A CUDA graph replays the kernels without the code around them. -O0 halves the compile time.
        settings["aot_inductor.compile_wrapper_opt_level"] = "O0"
    with warnings.catch_warnings(), _cudnn_left_on():
        warnings.simplefilter("ignore", FutureWarning)  # PyTorch calls its own deprecated functions
        program = torch.export.export(module, (), kwargs=arguments, strict=False)
        try:
            torch._inductor.aoti_compile_and_package(program, package_path=str(path), inductor_configs=settings)
        finally:
            # torch.export holds its last program, weights included, until the next export. On a GPU, inductor holds
            # the programs of the last 32 kernels for which it chose tiles.
            from torch._inductor.codegen.simd import SIMDScheduling  # 0.3 s to import, and loading does not need it
            torch.export.export(torch.nn.Identity(), (torch.empty(0),), strict=False)
            SIMDScheduling.candidate_tilings.cache_clear()


@contextmanager
def _cudnn_left_on():
    """Keeps cuDNN on during torch.export, which would turn it off while tracing.

    Without cuDNN, a convolution of a channels_last image returns a contiguous image. PyTorch caches that layout by
    shape, and AOTInductor reads it from the cache. The code then reads cuDNN's channels_last results in the wrong
    order. With torch 2.11 on an H100 the VAE's package drew another picture, for weights that need no gradients.
    """
    set_flags = torch.backends.cudnn.set_flags
    torch.backends.cudnn.set_flags = lambda *_, **__: ()  # torch.export passes the result back to set_flags
    try:
        yield
    finally:
        torch.backends.cudnn.set_flags = set_flags


@contextmanager
def no_vector_instructions(on_gpu: bool):
    """For GPU packages, tells inductor that the CPU has no SIMD: probing it compiles six programs (30 s on an H100
    host).

    Inductor writes the CPU's SIMD into every package and compares it on loading, so both happen within this context.
    Inductor caches the CPU's SIMD. This context clears the cache on entry and exit.
    """
    if not on_gpu:
        yield
        return
    kinds = [kind for kind in vars(cpu_vec_isa).values() if isinstance(kind, type) and issubclass(kind, VecISA)]

    def forget():
        cpu_vec_isa.valid_vec_isa_list.cache_clear()
        for kind in kinds:
            if hasattr(kind.__bool__, "cache_clear"):
                kind.__bool__.cache_clear()

    forget()
    try:
        with torch._inductor.config.patch({"cpp.vec_isa_ok": False}):
            yield
    finally:
        forget()
