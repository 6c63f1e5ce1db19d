"""The fused step stores the inputs of GEMMs in e4m3 or int8 with scales, and the residual stream in fp16.

Every input of a GEMM has a per-row (per-token) scale, and every weight has a per-row (per-output-channel) scale. q and
k have one static scale a block (`utils.attention.norm_scale`), v one for each batch item and head. With Ulysses,
attention's result and a single block's hidden row have one for each batch item. The rules:

* **Measured scales for rows that lie in registers.** LayerNorm's output and attention's result are scaled by the
  largest value of each row. In a single block attention's result shares a row with GELU's: both take the larger of the
  measured scale and GELU's bound.
* **Bounds for scales that must be known before the GEMM.** GELU's result and v are GEMM outputs, and their rows are
  spread over many tiles. The Cauchy-Schwarz inequality gives |w_j x + b_j| <= |w_j| R + |b_j|. R is the length of the
  row x; the LayerNorm kernel measures it. GELU never increases a magnitude. The bound is about 14 times the maximum of
  a row of 12,288 normal values. e4m3 has room for that: it keeps four significant bits from 2^-6 to 448.
* **Static per-channel equalization.** One strong neuron, head or channel must not inflate a bound. Each channel j of
  GELU's result and of v is therefore divided by a static share e_j. The matching column of the next weight is
  multiplied by e_j before that weight is quantized. The modulation scales down input channels that the next weights
  hardly read: these channels must not determine R. See utils/equalization.py.
* **Scales applied after the GEMM.** cuBLAS multiplies plain e4m3 numbers, at the speed of per-tensor scaling. The
  residual kernel reads every row of the result anyway, so it also multiplies the row by its scale. The column scales
  are powers of two, and the gates already include them (`utils.kernels.modulation.Modulations`).
* **int8 has measured scales only.** A bound would waste bits that int8 has not. GELU's result and q, k and v leave
  their GEMMs in bf16; a pass over the rows of GELU's result measures and casts them. GELU's results are hardly
  negative, so they have a zero point, which lets them use about twice as many of int8's steps.
* **The residual stream in fp16, divided by 16.** Rounding the stream to bf16 after every block causes most of the error
  of a bf16 model. fp16 has the same size and three more bits of precision. Divided by 16, its range reaches 1,048,064.
  FLUX.1-dev's stream was seen at 91,648 (black-forest-labs/flux issue 472), which plain fp16 cannot hold.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

E4M3_MAX = 448.0
E4M3 = torch.float8_e4m3fn
INT8_MAX = 127.0
EPS = 1e-6  # the epsilon of every norm in FLUX.1
STREAM = 16.0  # the residual stream is divided by this before fp16 stores it
TINY = 1e-12  # lower limit of the amax behind a scale: a row of zeros must not be divided by zero
# Rounding to e4m3 enlarges a value by at most half a step, a factor of 1 + 2^-4. Bounds that were computed from exact
# values are multiplied by it.
ROUNDING = 1 + 2**-4
# Triton's interpreter, which runs the kernels in CPU tests, cannot execute assembly.
NATIVE = tl.constexpr(not triton.knobs.runtime.interpret)


def use_torch_memory(device: torch.device) -> None:
    """Makes Triton allocate kernel workspace on `device` through PyTorch. The GEMMs need it for their tile
    descriptors."""
    triton.set_allocator(lambda size, alignment, stream: torch.empty(size, device=device, dtype=torch.int8))


@triton.jit
def _to_e4m3_kernel(x, MAX: tl.constexpr):
    """x, clamped to [-MAX, MAX], as e4m3."""
    if not NATIVE:  # the GPU's conversion clamps by itself
        x = tl.minimum(tl.maximum(x, -MAX), MAX)
    return x.to(tl.float8e4nv)


@triton.jit
def _to_int8_kernel(x, zero_point):
    """x, rounded to the nearest integer, plus an integer zero point, as int8. The sum must fit.

    1.5 * 2^23 shifts the integer into the low bits of a float32: one addition, and no conversion.
    """
    return (x + (12582912. + zero_point)).to(tl.int32, bitcast=True).to(tl.int8)


def to_e4m3(x: Tensor) -> Tensor:
    """x as e4m3. Values beyond the largest e4m3 number become that number."""
    return x.clamp(-E4M3_MAX, E4M3_MAX).to(E4M3)


@triton.jit
def _to_stream_kernel(x, STREAM: tl.constexpr):
    """x as the residual stream stores it: divided by STREAM, clamped to the range of fp16, in fp16."""
    x = x * (1 / STREAM)
    return tl.minimum(tl.maximum(x, -65504.), 65504.).to(tl.float16)


def to_stream(x: Tensor) -> Tensor:
    """x as the residual stream is stored: divided by STREAM, clamped to the range of fp16, in fp16."""
    limit = torch.finfo(torch.float16).max
    return (x.float() / STREAM).clamp(-limit, limit).half()


def from_stream(x: Tensor) -> Tensor:
    """The float32 values of a stored residual stream."""
    return x.float() * STREAM


def quantize_rows(x: Tensor, powers: bool = False, int8: bool = False) -> tuple[Tensor, Tensor]:
    """Quantizes x (..., D) to e4m3 or int8 with per-row scales.

    Args:
        x: (..., D), any floating-point dtype.
        int8: to int8, with exact scales, instead of e4m3.
        powers: round the scales up to powers of two. This costs one of e4m3's 15 powers of two and no accuracy. Other
            numbers can then be multiplied by a scale without rounding.

    Returns:
        (..., D) e4m3 or int8, and the scales (...) float32.
    """
    if int8:
        scale = x.float().abs().amax(-1).clamp(min=TINY) / INT8_MAX
        return (x.float() / scale[..., None]).round().to(torch.int8), scale
    scale = x.float().abs().amax(-1).clamp(min=TINY) / E4M3_MAX
    if powers:
        scale = torch.exp2(scale.log2().ceil())
    return to_e4m3(x.float() / scale[..., None]), scale
