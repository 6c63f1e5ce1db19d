"""Checks results for NaN, infinite values and pictures of a single color."""

import PIL.Image

from utils.common import BrokenResult, RecipeError

SHOWN = 3  # names, broken pictures, or other errors that an error lists


def flaw_of(image: PIL.Image.Image, is_finite: bool) -> str | None:
    """The reason why an image is broken, or None.

    Args:
        image: of any mode.
        is_finite: whether the decoder's output is finite. The 8-bit pixels do not show it.
    """
    if not is_finite:
        return "the picture contains NaN or infinite values"
    extremes = image.convert("RGB").getextrema()
    if all(low == high for low, high in extremes):
        return f"the picture has a single color, {tuple(low for low, _ in extremes)}"
    return None


def non_finite_weights(pipeline) -> list[str]:
    """The names of the pipeline's weights and buffers that hold NaN or infinite values."""
    import torch

    return [f"{name}/{key}" for name, model in pipeline.components.items() if isinstance(model, torch.nn.Module)
            for key, tensor in [*model.named_parameters(), *model.named_buffers()] if not _is_finite(tensor)]


def _is_finite(tensor) -> bool:
    """Whether all values are finite. Meta tensors, and tensor types that lack the operation, count as finite."""
    import torch

    tensor = tensor.detach()
    try:
        if not tensor.is_floating_point() or tensor.is_meta:
            return True
        if type(tensor) not in (torch.Tensor, torch.nn.Parameter):  # quantized
            tensor = tensor.dequantize()
        if tensor.element_size() == 1:  # float8 has no arithmetic
            tensor = tensor.float()
        return bool(tensor.isfinite().all())
    except (RuntimeError, NotImplementedError, TypeError, AttributeError):
        return True


def how_to_mend(pipeline) -> str:
    """Sentences that name the weights at fault, or the techniques to switch off."""
    names = non_finite_weights(pipeline)
    if names:
        more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
        return (f"Weights are not finite: {', '.join(names[:SHOWN])}{more}. Load another copy of --ckpt and --lora, or "
                "give --lora a smaller scale.")
    plan = pipeline.plan
    cures = ((plan.quantization, "--disable_quant"), (plan.attention, "--attention_backend native"),
             (plan.step_cache, "the command without --step_cache"), (plan.bf16, "--disable_bf16"))
    flags = [flag for technique, flag in cures if technique.on]
    if getattr(pipeline, "contents", {}).get("lora"):
        flags.insert(0, "--lora with a smaller scale")
    return f"All weights are finite. Try {', or '.join(flags or ['other weights'])}."


def raise_errors(errors: list[RecipeError], pipeline) -> None:
    """Raises one error that combines all errors about a run's results. Call it after the results are saved.

    Raises:
        BrokenResult: at least one error is a BrokenResult. The message tells the user how to fix it.
        RecipeError: there are errors, but none is a BrokenResult.
    """
    broken = [str(error) for error in errors if isinstance(error, BrokenResult)]
    others = [str(error) for error in errors if not isinstance(error, BrokenResult)]
    if len(others) > SHOWN:
        others[SHOWN:] = [f"{len(others)} errors of this kind in all"]
    if len(broken) > SHOWN:
        broken[SHOWN:] = [f"{len(broken)} pictures are broken in all"]
    if broken:
        raise BrokenResult(".\n".join([*others, *broken]) + ". " + how_to_mend(pipeline))
    if others:
        raise RecipeError(".\n".join(others) + ".")
