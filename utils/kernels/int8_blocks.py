"""FLUX's two kinds of block in int8, with attention in bf16: the fused blocks of --quality high.

    single block                                      double block, text and image side by side
    residual_adaln   LayerNorm, modulation -> int8    residual_adaln
    int8_qkv_gemm    QK-norm, RoPE -> bf16            int8_qkv_gemm
    attention        FlashAttention-3, bf16           attention
    int8_gelu_gemm   -> bf16                          cast_int8, int8_gemm
    cast_int8        both -> int8, side by side       residual_adaln, int8_gelu_gemm, cast_int8
    int8_gemm                                         int8_gemm

Everything that fused_blocks.py says about the residual stream, the table of modulations and deferred residuals holds
here too. Two things differ. No scale is a bound: each is measured, by the kernel that casts. And weights have exact
scales, which `int8_gemm` applies, so that gates include none.

Shapes use these letters: B batch size, T text tokens, I image tokens, S = T + I, D model width, H heads.
"""

import torch
from torch import Tensor

from utils.attention import attention
from utils.context_parallel import ring_attention, ulysses_attention
from utils.equalization import EQUALIZATION_INT8
from utils.kernels.casts import cast_int8
from utils.kernels.fused_blocks import READ, FusedDoubleBlock, FusedSingleBlock
from utils.kernels.int8_gemm import int8_gelu_gemm, int8_gemm, int8_qkv_gemm
from utils.kernels.layer_norm import residual_adaln
from utils.kernels.modulation import MLP_SCALE, MLP_SHIFT


def _attend(block: torch.nn.Module, qkv: Tensor, queries: slice = slice(None)) -> Tensor:
    """Attention in bf16, on one GPU or on several.

    Args:
        block: says how several GPUs share attention.
        qkv: (B, S, 3, H, D / H) bf16, this GPU's tokens.
        queries: the tokens whose attention is computed.

    Returns:
        (B, S, D) bf16, or fewer tokens if `queries` selects fewer.
    """
    q, k, v = qkv.unbind(2)
    if block.context_parallel == "ulysses":
        return ulysses_attention(q, k, v, None, None, None, "fa3", block.boxes).flatten(2)
    attend = ring_attention if block.context_parallel else attention
    return attend(q[:, queries], k, v, None, None, None, "fa3").flatten(2)


class Int8SingleBlock(FusedSingleBlock):
    """A FluxSingleTransformerBlock on the fused kernels, with its own copy of the weights in int8."""

    int8 = True
    equalization = EQUALIZATION_INT8

    def forward(self, hidden_states: Tensor, encoder_hidden_states: Tensor, temb: Tensor, image_rotary_emb=None,
                joint_attention_kwargs=None) -> tuple[Tensor, Tensor]:
        """Computes attention and the MLP side by side. Arguments and results are those of `FusedSingleBlock`."""
        text, image, x, x_scale, *_ = self.first_adaln(encoder_hidden_states, hidden_states, temb)
        tokens, queries = text.shape[1], slice(None)
        qkv = int8_qkv_gemm(x, x_scale, *self.qkv.operands(), self.norms, *image_rotary_emb, tokens, 1)
        kept = (joint_attention_kwargs or {}).get(READ)
        if self.prunes_unused_tokens and kept:
            queries = slice(tokens, tokens + kept)
            text, image, x, x_scale = text[:, :0], image[:, :kept], x[:, queries], x_scale[:, queries]
        attended = _attend(self, qkv, queries)
        hidden = int8_gelu_gemm(x, x_scale, *self.mlp.operands(), self.columns, 0, 1)
        both, scale, zero_point = cast_int8(attended, hidden)
        y = int8_gemm(both, zero_point, self.out.weight, self.out.scale, self.out.sums, 0, 1)
        return self.deferred_residual(text, image, y, scale, self.out, self.gates, temb)


class Int8DoubleBlock(FusedDoubleBlock):
    """A FluxTransformerBlock on the fused kernels, with its own copy of the weights in int8, text's before image's."""

    int8 = True
    equalization = EQUALIZATION_INT8

    def forward(self, hidden_states: Tensor, encoder_hidden_states: Tensor, temb: Tensor, image_rotary_emb=None,
                joint_attention_kwargs=None) -> tuple[Tensor, Tensor]:
        """Computes attention over both streams, then an MLP for each. As `FusedDoubleBlock` from outside."""
        text, image, x, x_scale, *_ = self.first_adaln(encoder_hidden_states, hidden_states, temb)
        tokens = text.shape[1]
        qkv = int8_qkv_gemm(x, x_scale, *self.qkv.operands(), self.norms, *image_rotary_emb, tokens, 2)
        attended, scale, zero_point = cast_int8(_attend(self, qkv), None)
        y = int8_gemm(attended, zero_point, self.out.weight, self.out.scale, self.out.sums, tokens, 2)
        text, image, x, x_scale, *_ = residual_adaln(
            text, image, y, scale, self.out.bias.view(2, -1), self.gates, temb, self.offsets, self.bounds, MLP_SHIFT,
            MLP_SCALE, True)
        hidden = int8_gelu_gemm(x, x_scale, *self.up.operands(), self.columns, tokens, 2)
        hidden, scale, zero_point = cast_int8(None, hidden)
        y = int8_gemm(hidden, zero_point, self.down.weight, self.down.scale, self.down.sums, tokens, 2)
        return self.deferred_residual(text, image, y, scale, self.down, self.mlp_gates, temb)
