"""How far an optimised transformer step is from float32, and pictures from those of a reference."""

import numpy as np
import PIL.Image
import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only
from torchmetrics.functional.image import structural_similarity_index_measure


def capture_step(pipeline, kwargs: dict) -> dict:
    """The named arguments with which `pipeline(**kwargs)` calls its transformer first. Runs one step, no decoding."""
    captured = {}

    def keep(module, args, named):
        captured.setdefault("kwargs", tree_map_only(Tensor, Tensor.clone, named))

    handle = pipeline.transformer.register_forward_pre_hook(keep, with_kwargs=True)
    try:
        pipeline(**kwargs | dict(num_inference_steps=1, output_type="latent"))
    finally:
        handle.remove()
    return captured["kwargs"]


@torch.no_grad()
def float32_step(transformer: torch.nn.Module, inputs: dict) -> Tensor:
    """The transformer's output (B, S, C) in float32 arithmetic, from the very weights it has.

    One block at a time is widened to float32 and narrowed again, exactly, so that 12 B parameters need 24 GB and not
    48. For a transformer as it was loaded: not quantised, not compiled. Timestep and guidance enter as the model
    rounds them (guidance 3.5 is 3504/1000 in bf16): that belongs to the model, it is no error of a technique.
    """
    def to_float32(module, args, kwargs):
        module.float()
        return tree_map_only(Tensor, _widened, (args, kwargs))

    def back(module, args, output):
        module.to(dtype)

    dtype = transformer.dtype
    inputs = inputs | {name: (inputs[name].to(dtype) * 1000).float() / 1000
                       for name in ("timestep", "guidance") if inputs.get(name) is not None}
    blocks = {"transformer_blocks", "single_transformer_blocks"}
    outer = [module for name, module in transformer.named_children() if name not in blocks]
    inner = [block for name in sorted(blocks) for block in getattr(transformer, name)]
    handles = [block.register_forward_pre_hook(to_float32, with_kwargs=True) for block in inner]
    handles += [block.register_forward_hook(back) for block in inner]
    try:
        for module in outer:
            module.float()
        return transformer(**tree_map_only(Tensor, _widened, inputs))[0]
    finally:
        for handle in handles:
            handle.remove()
        for module in outer:
            module.to(dtype)


def _widened(x: Tensor) -> Tensor:
    return x.float() if x.is_floating_point() else x


def relative_error(found: Tensor, reference: Tensor) -> float:
    """||found - reference|| / ||reference||, in float64; NaN if anything is NaN."""
    return ((found.double() - reference.double()).norm() / reference.double().norm()).item()


def picture_drift(found: list[PIL.Image.Image], reference: list[PIL.Image.Image]) -> dict[str, float]:
    """PSNR (dB, of each picture; mean and minimum) and mean SSIM of 8-bit pictures against others of the same prompts
    and seeds. Identical pictures count as 100 dB, so that the mean stays finite."""
    a, b = (torch.stack([torch.from_numpy(np.array(image.convert("RGB"))) for image in images]).permute(0, 3, 1, 2)
            .double() for images in (found, reference))
    psnr = (10 * (255**2 / (a - b).pow(2).mean((1, 2, 3))).log10()).clamp(max=100.0)
    ssim = structural_similarity_index_measure(a, b, data_range=255.0)
    return {"psnr_mean": psnr.mean().item(), "psnr_min": psnr.min().item(), "ssim": ssim.item(),
            "identical": (a == b).all(dim=(1, 2, 3)).double().mean().item()}
