"""Fewer bits: float8 or int8 Linears in the transformer's blocks (torchao), int8 weights in T5."""

import torch
import torch.nn.functional as F
from torchao.quantization import (
    Float8DynamicActivationFloat8WeightConfig,
    Int8DynamicActivationInt8WeightConfig,
    PerRow,
    PerTensor,
    quantize_,
)

from utils.equalization import equalize_values


def quantize_transformer(transformer: torch.nn.Module, kind: str, granularity: str, device: torch.device,
                         stored_on: torch.device | None = None) -> int:
    """Quantises the Linears of the blocks, weights now and activations at run time, one after the other on `device`.

    The embedders and the output projection stay as they are: 0.6 % of the weights, and every image passes through.

    Args:
        kind: "float8" (e4m3, fp32 accumulation) or "int8".
        granularity: one scale a "row" (output channel, token) or a "tensor".
        stored_on: where each block goes when it is done, if `device` has no room for all.

    Returns:
        The number of quantized Linears.
    """
    if kind == "float8":
        # An all-zero activation row (padding, a dead branch) would divide by zero and spread NaN: hence the bound.
        # set_inductor_config: torchao would switch on coordinate descent behind --disable_inductor_tuning_flags.
        config = Float8DynamicActivationFloat8WeightConfig(
            granularity=PerRow() if granularity == "row" else PerTensor(), activation_value_lb=1e-12,
            set_inductor_config=False)
    else:
        config = Int8DynamicActivationInt8WeightConfig(set_inductor_config=False)

    count = 0

    def quantisable(module, name):
        nonlocal count
        if not isinstance(module, torch.nn.Linear):
            return False
        if kind == "int8" and name.startswith("norm"):
            # Modulation has one row; cuBLAS' int8 kernel starts at 17.
            return False
        if granularity == "tensor" and module.weight.shape == (128, 128):
            # torchao takes one scale of a 128x128 weight for 128x128 block scaling.
            return False
        _replace_zero_rows(module.weight)
        count += 1
        return True

    for kind_of_block in ("transformer_blocks", "single_transformer_blocks"):
        for block in getattr(transformer, kind_of_block, ()):
            if kind == "int8":  # e4m3 is a floating-point format: it has room for a strong head
                equalize_values(block.to(device))
            quantize_(block, config, filter_fn=quantisable, device=device)
            block.to(stored_on or device)
    return count


@torch.no_grad()
def _replace_zero_rows(weight: torch.nn.Parameter) -> None:
    """Gives rows of zeros (an untrained LoRA target, a pruned channel) a value too small to matter: their scale would
    be 0/448 and their result NaN. Not the smallest there is: over 448 that is subnormal, which a GPU may flush to 0."""
    weight.masked_fill_((weight == 0).all(dim=1, keepdim=True), 1e-12)


class Int8Linear(torch.nn.Module):
    """A Linear whose weight is int8 with a scale for each output row and each input column, made bf16 again right
    before the GEMM.

    Columns have scales because int8 has no exponent: a neuron, head or channel that is strong, and whose column is weak
    for that reason, would round to zero.

    torchao's Int8WeightOnlyConfig is the same arithmetic, but inductor turns it into `_weight_int8pack_mm`, a kernel
    for single tokens: with it T5 took 2.6 s on an H200 where bf16 takes 9 ms.
    """

    def __init__(self, linear: torch.nn.Linear, device: torch.device):
        super().__init__()
        weight = linear.weight.to(device, torch.float32)
        # The largest of a column may lie in a large row: the second pass sees rows that have been brought to one size.
        scale = weight.abs().amax(dim=1, keepdim=True).clamp(min=1e-12)
        columns = (weight / scale).abs().amax(dim=0).clamp(min=1e-12)
        scale = (weight / columns).abs().amax(dim=1, keepdim=True).clamp(min=1e-12) / 127
        self.register_buffer("weight", (weight / columns / scale).round().to(torch.int8))
        self.register_buffer("scale", scale)
        self.register_buffer("columns", columns)
        self.register_buffer("bias", None if linear.bias is None else linear.bias.to(device))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x, (self.weight * self.scale * self.columns).to(x.dtype), self.bias)


@torch.no_grad()
def quantize_text_encoder(t5: torch.nn.Module, device: torch.device, stored_on: torch.device | None = None) -> None:
    """T5's Linears with int8 weights: 9.5 -> 4.9 GB. Activations stay: T5's have outliers.

    One Linear at a time is in float32 on `device`, and none in bf16: the card may be too small for the whole of T5.
    If it is too small for int8's as well, what is made goes to `stored_on`.
    """
    for parent in list(t5.modules()):
        for name, child in parent.named_children():
            if isinstance(child, torch.nn.Linear):
                setattr(parent, name, Int8Linear(child, device).to(stored_on or device))
