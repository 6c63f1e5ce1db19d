"""Measures for each block how many e4m3 values leave e4m3's precise range, which shows the block where fp8 fails.

e4m3 keeps four bits from 2^-6 to 448. Below 2^-6 it keeps fewer, down to none, and beyond 448 it saturates. The fused
kernels divide GELU's result and v by bounds that are known before the GEMM. A bound that is far too wide pushes a
tensor below 2^-6, and a bound that is too narrow makes it saturate. Attention's result has a measured scale.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from diffusers import FluxTransformer2DModel
from torch import Tensor

from utils.fp8_check import run_step
from utils.kernels import fused_blocks

SIGN_MASK, SMALLEST_NORMAL, LARGEST = 0x7F, 0x08, 0x7E  # bytes of e4m3: all but the sign, 2^-6, 448


def shares(x: Tensor) -> dict[str, float]:
    """Returns three shares of the values of x.

    Args:
        x: e4m3, of any shape.

    Returns:
        "below": |x| < 2^-6, zeros included; "zero"; "saturated": +-448 or NaN.
    """
    magnitude = x.view(torch.uint8) & SIGN_MASK  # e4m3 orders its magnitudes as their bytes
    conditions = {"below": magnitude < SMALLEST_NORMAL, "zero": magnitude == 0, "saturated": magnitude >= LARGEST}
    return {name: condition.count_nonzero().item() / x.numel() for name, condition in conditions.items()}


def block_shares(transformer: FluxTransformer2DModel, inputs: dict) -> list[dict]:
    """Returns `shares` of three tensors in every block, from one eager step.

    On a CPU the kernels' references run instead of the kernels.

    Healthy blocks of tiny-flux-dev have these shares, with trained weights and with --random_weights 3+6:

    * hidden: 6 to 29 % below and 3 to 23 % zero with trained weights, 0.1 % and 0.01 % with random ones. GELU's
      negative side is small by nature: it lies between -0.17 and 0, and far below 0 it becomes -0. Most trained neurons
      are off. Positive values below 2^-6 make up less than 0.1 %. No value saturates.
    * v: 0.03 to 0.12 % below, none saturated.
    * attention: up to 0.05 % below and 0.4 to 1 % saturated in double blocks. Their measured scale puts the largest
      value of each row at 448, so that at least 1 / D of the values count as saturated. Single blocks share the scale
      of GELU's bound: up to 0.2 % below, none saturated.

    The same models show when the shares matter. Bounds of one block 1,000 times too wide put 45 to 94 % of its hidden
    and v below, and the step's error stays the same: subnormal numbers still hold a few bits. Bounds 10,000 times too
    wide put 100 % below, and the step's error grows 1.5 to 2 times.

    Args:
        transformer: with the fused blocks, not compiled.
        inputs: the transformer's named arguments, from `bench.quality.capture_step`.

    Returns:
        A dict for each block: {"block": "double 0", "hidden": shares, "v": shares, "attention": shares}. "hidden" is
        GELU's result, and "attention" is attention's result as the next GEMM reads it.
    """
    rows: list[dict] = []

    def keep(name: str, x: Tensor) -> None:
        rows[-1][name] = shares(x)

    with _announced_blocks(transformer, lambda name: rows.append({"block": name})), _observed_ops(keep):
        run_step(transformer, inputs)
    return rows


@contextmanager
def _announced_blocks(transformer: FluxTransformer2DModel, begin: Callable[[str], None]) -> Iterator[None]:
    """Calls `begin` with a block's name before the block runs."""
    kinds = {"double": transformer.transformer_blocks, "single": transformer.single_transformer_blocks}
    handles = [block.register_forward_pre_hook(lambda *_, name=f"{kind} {i}": begin(name))
               for kind, blocks in kinds.items() for i, block in enumerate(blocks)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def _observed_ops(keep: Callable[[str, Tensor], None]) -> Iterator[None]:
    """Calls `keep` with a tensor's name and values when one of the fused blocks' ops has written it."""
    ops = {name: getattr(fused_blocks, name) for name in ("gelu_gemm", "qkv_gemm", "cast_attention", "place_attention")}

    def gelu_gemm(x, x_scale, w, w_scale, bias, columns, scale, hidden, text_tokens, streams):
        ops["gelu_gemm"](x, x_scale, w, w_scale, bias, columns, scale, hidden, text_tokens, streams)
        keep("hidden", hidden[..., -(w.shape[0] // streams):])

    def qkv_gemm(*args):
        results = ops["qkv_gemm"](*args)
        keep("v", results[0][2])
        return results

    def cast_attention(attention):
        results = ops["cast_attention"](attention)
        keep("attention", results[0])
        return results

    def place_attention(attention, least_scale, hidden):
        scale = ops["place_attention"](attention, least_scale, hidden)
        keep("attention", hidden[..., :attention.shape[2]])
        return scale

    try:
        for wrapper in (gelu_gemm, qkv_gemm, cast_attention, place_attention):
            setattr(fused_blocks, wrapper.__name__, wrapper)
        yield
    finally:
        for name, op in ops.items():
            setattr(fused_blocks, name, op)
