"""Compares an optimized transformer step with float32, and pictures and latents with a reference's."""

from pathlib import Path

import numpy as np
import PIL.Image
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._pytree import tree_map_only

from utils.fp8_check import relative_error


def capture_step(pipeline, kwargs: dict) -> dict:
    """Returns the named arguments of the transformer's first call in `pipeline(**kwargs)`. Runs one step, no decoding.

    Args:
        kwargs: of the pipeline's call.
    """
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
    """Returns the transformer's output (B, S, C) in float32 arithmetic, with the weights that it has.

    One block at a time is converted to float32 and back, without loss, so that 12 B parameters need 24 GB instead of
    48. The transformer must be as loaded: not quantized and not compiled. Timestep and guidance are rounded to the
    model's dtype first (guidance 3.5 is 3504/1000 in bf16), because that rounding is part of the model.

    Args:
        inputs: the transformer's named arguments, from `capture_step`.
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


GAUSSIAN_SIGMA, GAUSSIAN_RADIUS = 1.5, 5  # SSIM's window: 11 x 11 pixels


def ssim(found: Tensor, reference: Tensor) -> Tensor:
    """Returns the SSIM (N,) of pictures (N, 3, H, W), float64 from 0 to 255, H and W at least 6.

    The definition is from Wang et al. (2004), with a Gaussian window, K1 = 0.01, K2 = 0.03 and reflection padding.
    torchmetrics computes the same values without a separable window: 20 times slower, and with 5 GB for 1024x1024.
    """
    offsets = torch.arange(-GAUSSIAN_RADIUS, GAUSSIAN_RADIUS + 1, dtype=torch.float64)
    window = torch.exp(-(offsets / GAUSSIAN_SIGMA).square() / 2)
    first, *others = (window / window.sum()).tolist()

    def blur(x: Tensor) -> Tensor:
        for dim in (-2, -1):
            size = x.shape[dim] - 2 * GAUSSIAN_RADIUS
            blurred = first * x.narrow(dim, 0, size)
            for start, weight in enumerate(others, 1):
                blurred.add_(x.narrow(dim, start, size), alpha=weight)
            x = blurred
        return x

    x, y = (F.pad(images, (GAUSSIAN_RADIUS,) * 4, mode="reflect") for images in (found, reference))
    mean_x, mean_y = blur(x), blur(y)
    variances = (blur(x * x) - mean_x * mean_x) + (blur(y * y) - mean_y * mean_y)
    covariance = blur(x * y) - mean_x * mean_y
    c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
    luminance = (2 * mean_x * mean_y + c1) / (mean_x * mean_x + mean_y * mean_y + c1)
    return (luminance * (2 * covariance + c2) / (variances + c2)).mean((1, 2, 3))


def picture_drift(found: list[PIL.Image.Image], reference: list[PIL.Image.Image]) -> dict[str, float]:
    """Compares 8-bit pictures with a reference's pictures of the same prompts and seeds.

    Identical pictures have a PSNR of 100 dB, so that the mean is finite.

    Returns:
        "psnr_mean" and "psnr_min" in dB, the mean "ssim", and the share of "identical" pictures.
    """
    a, b = (torch.stack([torch.from_numpy(np.array(image.convert("RGB"))) for image in images]).permute(0, 3, 1, 2)
            .double() for images in (found, reference))
    psnr = (10 * (255**2 / (a - b).pow(2).mean((1, 2, 3))).log10()).clamp(max=100.0)
    return {"psnr_mean": psnr.mean().item(), "psnr_min": psnr.min().item(), "ssim": ssim(a, b).mean().item(),
            "identical": (a == b).all(dim=(1, 2, 3)).double().mean().item()}


BLACK = 3  # of 255: the VAE's black is not exactly 0


def broken_share(pictures: list[PIL.Image.Image], latents: Tensor) -> dict[str, float]:
    """Returns the share of "black" pictures, and the share of latents that are "not_finite".

    NaN becomes black in 8 bits.

    Args:
        latents: of the last step, (N, S, C).
    """
    black = [np.array(picture.convert("RGB")).max() < BLACK for picture in pictures]
    return {"black": float(np.mean(black)), "not_finite": (~latents.isfinite().flatten(1).all(1)).float().mean().item()}


def latent_recorder(steps: list[Tensor]):
    """Returns a `callback_on_step_end` that appends each step's latents (B, S, C) to `steps`, on the CPU."""
    def keep(pipeline, step, timestep, kwargs):
        steps.append(kwargs["latents"].detach().to("cpu", copy=True))
        return kwargs
    return keep


def latent_drift(found: Tensor, reference: Tensor) -> dict:
    """Returns the relative errors of latents (N, steps, S, C), computed for each picture.

    Returns:
        "median" and "max" after the last step, and "by_step", the median after each step; None for different shapes.
    """
    final = torch.tensor([relative_error(a, b) for a, b in zip(found[:, -1], reference[:, -1], strict=True)])
    drift = {"median": _median(final), "max": final.max().item(), "by_step": None}
    if found.shape == reference.shape:
        drift["by_step"] = [_median(torch.tensor([relative_error(a, b) for a, b in zip(*step, strict=True)]))
                            for step in zip(found.unbind(1), reference.unbind(1), strict=True)]
    return drift


def _median(values: Tensor) -> float:
    """Returns the median: NaN if any value is not finite; for an even number the mean of the middle two values."""
    return values.double().quantile(0.5).item() if values.isfinite().all() else float("nan")


LPIPS_WEIGHTS = "alexnet-owt-7be5be79.pth"
CLIP_MODEL = "openai/clip-vit-base-patch16"


def perceptual(found: list[PIL.Image.Image], reference: list[PIL.Image.Image], prompts: list[str],
               download: bool = False) -> dict:
    """Returns the mean LPIPS (AlexNet) against the reference, and the mean CLIP score against the prompts.

    A metric is None if its weights are not on this machine, and "not_available" has the reason in one line.

    Args:
        download: whether to fetch missing weights.
    """
    scores = {"lpips": None, "clip_score": None, "not_available": {}}
    pixels, others = ([torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1) for image in images]
                      for images in (found, reference))
    metrics = {"lpips": lambda: _lpips(torch.stack(pixels), torch.stack(others), download),
               "clip_score": lambda: _clip_score(pixels, prompts, download)}
    for name, metric in metrics.items():
        try:
            scores[name] = metric()
        except Exception as error:  # any error of a library: a missing metric must not cost the row
            scores["not_available"][name] = f"{error}".split("\n")[0] or type(error).__name__
    return scores


def _lpips(found: Tensor, reference: Tensor, download: bool) -> float:
    """Returns the mean LPIPS of pictures (N, 3, H, W), uint8."""
    from torchmetrics.functional.image import learned_perceptual_image_patch_similarity

    if not download and not (Path(torch.hub.get_dir()) / "checkpoints" / LPIPS_WEIGHTS).exists():
        raise FileNotFoundError(f"LPIPS needs torchvision's {LPIPS_WEIGHTS}, which is not on this machine "
                                "(--download-metrics fetches it)")
    return learned_perceptual_image_patch_similarity(found.float() / 255, reference.float() / 255, net_type="alex",
                                                     normalize=True).item()


def _clip_score(pictures: list[Tensor], prompts: list[str], download: bool) -> float:
    """Returns the mean CLIP score of pictures (3, H, W), uint8, against their prompts."""
    from huggingface_hub import try_to_load_from_cache
    from torchmetrics.functional.multimodal import clip_score

    cached = [try_to_load_from_cache(CLIP_MODEL, name) for name in ("model.safetensors", "pytorch_model.bin")]
    if not download and not any(isinstance(path, str) for path in cached):
        raise FileNotFoundError(f"CLIP score needs {CLIP_MODEL}, which is not on this machine (--download-metrics "
                                "fetches it)")
    return clip_score(pictures, prompts, model_name_or_path=CLIP_MODEL).item()
