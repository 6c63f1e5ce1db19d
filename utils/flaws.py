"""A result is looked at before it is called one: NaN, infinite values, and pictures of a single colour."""

import PIL.Image
import torch

from utils.common import BrokenResult, RecipeError

SHOWN = 3


def flaw_of(image: PIL.Image.Image, is_finite: bool) -> str | None:
    """Why an image is no picture, or None.

    Args:
        is_finite: whether the decoder's output was, of which 8-bit pixels tell nothing.
    """
    if not is_finite:
        return "the picture holds NaN or infinite values"
    extremes = image.convert("RGB").getextrema()
    if all(low == high for low, high in extremes):
        return f"the picture is of one colour, {tuple(low for low, _ in extremes)}"
    return None


def non_finite_weights(pipeline) -> list[str]:
    """The names of the pipeline's weights and buffers that hold NaN or infinite values."""
    return [f"{name}/{key}" for name, model in pipeline.components.items() if isinstance(model, torch.nn.Module)
            for key, tensor in [*model.named_parameters(), *model.named_buffers()] if not _is_finite(tensor)]


@torch.no_grad()
def _is_finite(tensor: torch.Tensor) -> bool:
    """True also for what cannot be looked at: without memory, or of a kind that lacks the operation."""
    try:
        if not tensor.is_floating_point() or tensor.is_meta:
            return True
        if type(tensor) not in (torch.Tensor, torch.nn.Parameter):  # quantized
            tensor = tensor.dequantize()
        if tensor.element_size() == 1:  # float8 knows no arithmetic
            tensor = tensor.float()
        return bool(tensor.isfinite().all())
    except (RuntimeError, NotImplementedError, TypeError, AttributeError):
        return True


def how_to_mend(pipeline) -> str:
    """A sentence: the weights to blame, or the techniques to switch off."""
    names = non_finite_weights(pipeline)
    if names:
        more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
        return (f"Weights are not finite: {', '.join(names[:SHOWN])}{more}. Load another copy of --ckpt and --lora, or "
                "give --lora a smaller scale.")
    flags = [flag for name, flag in (("quantization", "--disable_quant"), ("attention", "--disable_fa3"),
                                     ("step cache", "no step cache"), ("bf16", "--disable_bf16"))
             if name in pipeline.techniques and pipeline.techniques[name].on]
    if getattr(pipeline, "contents", {}).get("lora"):
        flags.insert(0, "--lora with a smaller scale")
    return f"All weights are finite. Try {', or '.join(flags or ['other weights'])}."


def raise_errors(errors: list[RecipeError], pipeline) -> None:
    """Raises one error for all that went wrong with a run's results, once everything that could be kept is.

    Raises:
        BrokenResult: one of them is; with what to do about it.
        RecipeError: none is.
    """
    broken = [str(error) for error in errors if isinstance(error, BrokenResult)]
    others = [str(error) for error in errors if not isinstance(error, BrokenResult)]
    if len(broken) > SHOWN:
        broken[SHOWN:] = [f"{len(broken)} pictures are broken in all"]
    if broken:
        raise BrokenResult(".\n".join([*others, *broken]) + ". " + how_to_mend(pipeline))
    if others:
        raise RecipeError(".\n".join(others) + ".")
