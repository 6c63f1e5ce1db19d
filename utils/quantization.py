"""Quantization: float8 or int8 Linears in the transformer's blocks (torchao), and int8 weights in T5."""

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
    """Quantizes the Linears of the blocks, one block at a time on `device`.

    The weights are quantized now, the activations at run time. The embedders and the output projection keep their
    precision: they have 0.6 % of the weights, and every image passes through them.

    Args:
        kind: "float8" (e4m3, fp32 accumulation) or "int8".
        granularity: "row" for per-row scales (one per output channel and per token), or "tensor" for per-tensor scales.
        stored_on: the device to which each quantized block moves, if `device` has no room for all blocks.

    Returns:
        The number of quantized Linears.
    """
    if kind == "float8":
        # activation_value_lb: without a lower bound, an all-zero activation row (padding, a dead branch) would divide
        # by zero, and NaN would spread. set_inductor_config: torchao would enable coordinate descent even with
        # --disable_inductor_tuning_flags.
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
            # A modulation's input has one row, and cuBLAS' int8 kernel needs at least 17.
            return False
        if granularity == "tensor" and module.weight.shape == (128, 128):
            # torchao mistakes one scale of a 128x128 weight for 128x128 block scaling.
            return False
        _replace_zero_rows(module.weight)
        count += 1
        return True

    for kind_of_block in ("transformer_blocks", "single_transformer_blocks"):
        for block in getattr(transformer, kind_of_block, ()):
            if kind == "int8":  # e4m3 does not need it: as a floating-point format it has the range for a strong head
                equalize_values(block.to(device))
            quantize_(block, config, filter_fn=quantisable, device=device)
            block.to(stored_on or device)
    return count


@torch.no_grad()
def _replace_zero_rows(weight: torch.nn.Parameter) -> None:
    """Fills all-zero rows of a weight (N, K) (an untrained LoRA target, a pruned channel) with a negligible value.

    The scale of an all-zero row would be 0 / 448, and its result NaN. The value is 1e-12 and not the smallest float32:
    divided by 448 the smallest float32 is subnormal, and a GPU may flush it to 0.
    """
    weight.masked_fill_((weight == 0).all(dim=1, keepdim=True), 1e-12)


class Int8Linear(torch.nn.Module):
    """A Linear with an int8 weight, dequantized right before the GEMM.

    The weight has one scale per output row and one per input column. The column scales are needed because int8 has no
    exponent: a strong neuron, head or channel often has a weak column, which would round to zero.

    torchao's Int8WeightOnlyConfig is the same arithmetic with row scales. But inductor turns it into
    `_weight_int8pack_mm`, a kernel for single tokens: with this kernel T5 took 2.6 s on an H200, and 9 ms in bf16.
    """

    def __init__(self, linear: torch.nn.Linear, device: torch.device):
        super().__init__()
        weight = linear.weight.to(device, torch.float32)
        # The largest element of a column may lie in a large row, so the columns are measured after a division of the
        # rows by their scales. The row scales are measured again after the division of the columns.
        scale = weight.abs().amax(dim=1, keepdim=True).clamp(min=1e-12)
        columns = (weight / scale).abs().amax(dim=0).clamp(min=1e-12)
        scale = (weight / columns).abs().amax(dim=1, keepdim=True).clamp(min=1e-12) / 127
        self.register_buffer("weight", (weight / columns / scale).round().to(torch.int8))
        self.register_buffer("scale", scale)
        self.register_buffer("columns", columns)
        self.register_buffer("bias", None if linear.bias is None else linear.bias.to(device))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x (..., K) to (..., N), in x's dtype.

        The weight (N, K) is int8; `scale` (N, 1) and `columns` (K,) are float32.
        """
        return F.linear(x, (self.weight * self.scale * self.columns).to(x.dtype), self.bias)


@torch.no_grad()
def quantize_text_encoder(t5: torch.nn.Module, device: torch.device, stored_on: torch.device | None = None) -> None:
    """Replaces T5's Linears with `Int8Linear`s: 9.5 -> 4.9 GB.

    The activations keep their precision, because T5's activations have outliers. The GPU may be too small for all of T5
    in bf16, so `device` holds one Linear in float32 at a time, and none in bf16.

    Args:
        stored_on: the device to which each `Int8Linear` moves, if `device` has no room for all of them.
    """
    for parent in list(t5.modules()):
        for name, child in parent.named_children():
            if isinstance(child, torch.nn.Linear):
                setattr(parent, name, Int8Linear(child, device).to(stored_on or device))
