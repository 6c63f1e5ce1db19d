"""Compiles a pipeline's blocks, VAE and T5: AOTInductor packages that later starts load, or torch.compile."""

from collections.abc import Callable
from contextlib import nullcontext

import torch

from utils.aoti import export
from utils.common import StageLog, no_progress
from utils.machine import use_kernel_cache
from utils.plan import Plan
from utils.text_encoding import compile_text_encoder, set_static_attention_mask, with_embeddings

# flux-fast's inductor flags, but for the transformer alone: coordinate descent over the VAE's norms did not end in the
# time at hand. Its fourth flag, conv_1x1_as_mm, is about the VAE.
TUNING_FLAGS = {
    "epilogue_fusion": False,  # leave pointwise work out of the matrix products
    "coordinate_descent_tuning": True,
    "coordinate_descent_check_all_directions": True,
}


def use_packages(plan: Plan, pipeline, args, inputs: Callable[..., dict], log: StageLog) -> None:
    """Exported code in the place of the code that `compile_pipeline` would compile; see `utils.aoti.export`.

    Args:
        args: --cache-dir, --use-cached-model, --re-export and --package-from of the command line.
        inputs: makes the arguments of a pipeline call, from which the shapes of the export are captured.

    Raises:
        RecipeError: a package is missing, damaged or unlike eager, or the cache folder is full or not the user's own.
    """
    use_kernel_cache(args.cache_dir)
    if plan.compile.with_t5:
        set_static_attention_mask(pipeline.text_encoder_2)
    fused = plan.fused_kernels.on
    kinds = export.packaged(pipeline, plan.compile.scope != "none", plan.compile.with_vae,
                            plan.settings.is_encoded, plan.compile.with_t5)

    with log.stage("packages"), _modulations(pipeline) if fused else nullcontext():
        with no_progress(pipeline):
            units = export.capture(kinds, lambda: pipeline(
                **with_embeddings(pipeline, inputs(num_inference_steps=1), {})))
        for unit in units:
            if plan.inductor_flags.on and unit.name.startswith(("double", "single")):
                unit.settings = TUNING_FLAGS
        plan.compile.note = export.use_packages(pipeline, units, plan.graph_switches(), args.cache_dir,
                                                args.use_cached_model, args.re_export, args.package_from, log.line)


def _modulations(pipeline):
    """The modulation hook of fused blocks until the end of a `with`."""
    from utils.kernels.modulation import attach_modulation_hook  # needs Triton

    return attach_modulation_hook(pipeline)


class CompiledOnce(torch.nn.Module):
    """Runs `module`, which is marked for compilation, compiled for the inputs of its first call and uncompiled for all
    other shapes.

    It is for the fused VAE, which decodes a megapixel 6.5 ms faster if it is compiled
    (results/h100/2026-11/tried.json). Half a minute of torch.compile for each new size would pay after thousands of
    images. Dynamic code would not avoid it: attention is compiled for each number of its parts (QUERIES in
    utils/kernels/fused_vae.py), and after eight recompilations torch raises an error.
    """

    def __init__(self, module: torch.nn.Module):
        super().__init__()
        self.module, self.is_compiled = module, False

    def forward(self, *args, **kwargs):
        """The module's outputs."""
        with torch.compiler.set_stance("eager_on_recompile" if self.is_compiled else "default"):
            outputs = self.module(*args, **kwargs)
        self.is_compiled = True
        return outputs


def compile_pipeline(plan: Plan, pipeline, cache_dir: str) -> None:
    """Marks the transformer (its two kinds of block, or the whole), the VAE, and on a GPU T5's blocks for compilation
    at their first call. Fused blocks are Triton kernels and stay as they are.

    torch.compile makes dynamic code at the second shape, which serves most further shapes.
    """
    use_kernel_cache(cache_dir)
    flags = TUNING_FLAGS if plan.inductor_flags.on else {}
    # On ROCm static shapes gave black images in flux-fast's experience; not tried here.
    dynamic = True if torch.version.hip else None
    if plan.compile.scope == "blocks":
        pipeline.transformer.compile_repeated_blocks(fullgraph=True, dynamic=dynamic, options=flags)
    elif plan.compile.scope == "whole":
        flags = torch._inductor.list_mode_options("max-autotune-no-cudagraphs") | flags
        pipeline.transformer = torch.compile(pipeline.transformer, fullgraph=True, dynamic=dynamic, options=flags)
    for name in ("decoder", "encoder") if plan.settings.is_encoded else ("decoder",):
        part = getattr(pipeline.vae, name)
        part.compile(fullgraph=True, dynamic=dynamic)
        if plan.compiles_vae_once:
            setattr(pipeline.vae, name, CompiledOnce(part))
    if plan.compile.with_t5:
        compile_text_encoder(pipeline.text_encoder_2, dynamic)
