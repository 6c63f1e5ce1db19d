"""One package of a module: torch.export and AOTInductor, and what both have to be told."""

import warnings
from contextlib import contextmanager
from pathlib import Path

import torch
from torch._inductor import cpu_vec_isa
from torch._inductor.cpu_vec_isa import VecISA
from torch.utils._pytree import tree_leaves

# Inductor's settings, besides its own defaults.
SETTINGS = {
    "aot_inductor.package_constants_in_so": False,
    # No weight may become a number in the code: another block's, or another fine-tune's, is another number. Folding
    # would write scales there, and inductor itself what has up to eight elements: the bias of the VAE's three colours.
    "joint_graph_constant_folding": False,
    "always_keep_tensor_constants": True,
}


def write_package(module: torch.nn.Module, arguments: dict, path: Path, settings: dict, metadata: dict[str, str]
                  ) -> None:
    """Writes a .pt2 of `module` for these arguments, by name, without its weights.

    Args:
        settings: of inductor, besides those here. metadata: to be read before any of the code is opened.
    """
    settings = SETTINGS | settings | {"aot_inductor.metadata": metadata}
    on_gpu = any(x.is_cuda for x in tree_leaves(arguments) if isinstance(x, torch.Tensor))
    if on_gpu:
        # The code around the kernels runs when a CUDA graph is recorded: unoptimised it compiles in half the time.
        settings["aot_inductor.compile_wrapper_opt_level"] = "O0"
    with warnings.catch_warnings(), _cudnn_left_on():
        warnings.simplefilter("ignore", FutureWarning)  # torch's, about its own use of itself
        program = torch.export.export(module, (), kwargs=arguments, strict=False)
        try:
            torch._inductor.aoti_compile_and_package(program, package_path=str(path), inductor_configs=settings)
        finally:
            # Weights and all, torch.export remembers the last program that it made until it makes another. Inductor,
            # on a GPU, remembers those of the last 32 kernels whose tiles it chose.
            from torch._inductor.codegen.simd import SIMDScheduling  # a third of a second, which loading does not need
            torch.export.export(torch.nn.Identity(), (torch.empty(0),), strict=False)
            SIMDScheduling.candidate_tilings.cache_clear()


@contextmanager
def _cudnn_left_on():
    """torch.export turns cuDNN off while it traces. Without it convolutions of channels_last pictures would give
    contiguous ones, and PyTorch remembers that for whoever asks next about the same shapes: AOTInductor, whose code
    then reads what cuDNN gives in the wrong order. (Seen with torch 2.11 on an H100, of weights that need no gradients:
    what is remembered goes by that too. The VAE's package drew another picture.)"""
    set_flags = torch.backends.cudnn.set_flags
    torch.backends.cudnn.set_flags = lambda *_, **__: ()  # what export hands back when it is done
    try:
        yield
    finally:
        torch.backends.cudnn.set_flags = set_flags


@contextmanager
def no_vector_instructions(on_gpu: bool):
    """Within it packages are made and loaded as on a CPU without vector instructions, if their code is a GPU's.

    Inductor writes the CPU's into a package and compares them when it loads one. To find them it compiles and runs six
    programs: half a minute on an H100's host. What it found it remembers: forgotten again here."""
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
