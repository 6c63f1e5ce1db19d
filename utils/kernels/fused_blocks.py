"""FLUX's two kinds of block on the fused kernels.

    single block                                      double block, text and image side by side
    residual_adaln   LayerNorm, modulation -> e4m3    residual_adaln
    qkv_gemm         QK-norm, RoPE -> e4m3            qkv_gemm
    attention        FlashAttention-3, fp8            attention
    place_attention  -> e4m3, beside GELU's columns   cast_attention, fp8_gemm
    gelu_gemm        -> e4m3                          residual_adaln, gelu_gemm, fp8_gemm
    fp8_gemm         by cuBLAS

A fused block takes and returns the same tensors as diffusers' block, so the transformer and a step cache need no
change. Two things differ. From the embedders to norm_out, the residual stream is stored in fp16 and divided by 16
(`to_stream`). And `temb` is one table with the modulations of all blocks; each block knows its offset (`Modulations`).

Unless a step cache reads the result in between, a block defers its last residual add to the LayerNorm of the next block
(`defer_residuals`). It then returns the tuple (text, y, y_scale, bias, gates) in the place of text, see
`residual_adaln`.

Shapes use these letters: B batch size, T text tokens, I image tokens, S = T + I, D model width, H heads, N GPUs.
"""

from collections.abc import Callable

import torch
from diffusers import FluxTransformer2DModel
from torch import Tensor

from utils.attention import attention, norm_scale
from utils.context_parallel import all_reduce_max, all_to_all, all_tokens, ring, shard, token_parts
from utils.equalization import EQUALIZATION, channel_shares, column_powers, reach
from utils.kernels.casts import cast_attention, place_attention
from utils.kernels.formats import STREAM, to_e4m3, use_torch_memory
from utils.kernels.gemm import fp8_gemm, gelu_gemm, qkv_gemm
from utils.kernels.layer_norm import adaln, gated_residual, residual_adaln
from utils.kernels.modulation import (
    GATE,
    MLP_GATE,
    MLP_SCALE,
    MLP_SHIFT,
    SCALE,
    SHIFT,
    Modulations,
    NormOut,
    QuantizedLinear,
    typical_conditions,
    typical_modulation,
)
from utils.tasks import current_timestep

READ = "tokens_read"  # key in joint_attention_kwargs: how many image tokens the pipeline reads


def _float32_copy(linear: torch.nn.Linear, device: torch.device) -> list[Tensor]:
    """Copies of a Linear's weight (N, K) and bias (N,), in float32 on `device`, for the caller to change."""
    weight = linear.weight.detach().to(device, torch.float32, copy=True)
    bias = torch.zeros(len(weight), device=device) if linear.bias is None else linear.bias.detach()
    return [weight, bias.to(device, torch.float32, copy=True)]


def gemm_bounds(hidden: QuantizedLinear, columns: Tensor, qkv: QuantizedLinear, heads: int) -> Tensor:
    """The bounds on weights and biases from which the kernels derive the scales of GELU's result and of v.

    With the length |x| of an input row, they bound every element of a GEMM: |w_j x + b_j| <= |w_j| |x| + |b_j|
    (Cauchy-Schwarz).

    Args:
        hidden: the MLP's first Linear, whose result GELU takes.
        columns: (streams * N,) float32, the reciprocal shares that GELU's channels are multiplied by. The shares of v
            are in its weights.
        qkv: the fused projections of q, k and v.
        heads: H.

    Returns:
        (streams, 2 + 2 H) float32. Columns 0 and 1: the largest |w_j| and the largest |b_j| of GELU's channels. The
        next H columns: the largest |w_j| of v in each head. The last H columns: the largest |b_j| of v in each head.
    """
    def largest(linear: QuantizedLinear, groups: int, columns: Tensor | float) -> tuple[Tensor, Tensor]:
        length = linear.weight.float().norm(dim=1) * linear.scale
        return tuple((x * columns).view(linear.count, groups, -1).amax(2) for x in (length, linear.bias.float().abs()))

    # The rows of q, k and v form 3 H groups. The last H groups are v's heads.
    return torch.cat([*largest(hidden, 1, columns), *(x[:, 2 * heads:] for x in largest(qkv, 3 * heads, 1.0))], dim=1)


def _norms(pairs: list[tuple], device: torch.device) -> Tensor:
    """(streams, 3, D / H) float32: the weights of q's norm, of k's, and ones for v."""
    rows = [[norm.weight.detach().float() for norm in pair] for pair in pairs]
    return torch.stack([torch.stack([q, k, torch.ones_like(q)]) for q, k in rows]).to(device)


class _Block(torch.nn.Module):
    """The parts that both kinds of block share.

    Attributes:
        int8: whether the weights and the inputs of GEMMs are int8 (utils/kernels/int8_blocks.py), or else e4m3.
        equalization: the strength of `channel_shares`.
        offset: where the block's modulation begins in a row of the table, set by `fused_block`.
        defers_residual: whether the next block does this block's last residual add, see `defer_residuals`.
        prunes_unused_tokens: see `prune_unused_tokens`.
        context_parallel: None, or how several GPUs share attention: "ulysses" or "ring".
        parts: among how many GPUs the heads are divided (Ulysses); otherwise 1.
        boxes: a `SymmetricAllToAll`, or None if NCCL does the all-to-all.
    """

    int8 = False
    equalization = EQUALIZATION
    defers_residual = False
    prunes_unused_tokens = False
    context_parallel, parts, boxes = None, 1, None

    def first_adaln(self, text, image: Tensor, table: Tensor) -> tuple[Tensor, ...]:
        """The block's first LayerNorm and modulation, after the residual add that the previous block may have deferred.

        Args:
            text: (B, T, D) fp16 of the residual stream, or the tuple (text, y, y_scale, bias, gates) of a deferred
                residual.
            image: (B, I, D) fp16 of the residual stream.
            table: (B, total) bf16, see `Modulations`.

        Returns:
            text (B, T, D) and image (B, I, D) after the residual add. Then the results of `adaln`: (B, S, D), and
            its scales, the scales of GELU's result and the lengths of the rows, (B, S) float32 each.
        """
        if isinstance(text, tuple):
            text, *deferred = text
            results = residual_adaln(text, image, *deferred, table, self.offsets, self.bounds, SHIFT, SCALE, self.int8)
        else:
            results = text, image, *adaln(text, image, table, self.offsets, self.bounds, SHIFT, SCALE, self.int8)
        # The scales of v must hold for the tokens of all GPUs: every GPU takes the element-wise maximum of the lengths.
        bounded = self.context_parallel and not self.int8
        return (*results[:-1], all_reduce_max(results[-1])) if bounded else results

    def project(self, x: Tensor, x_scale: Tensor, rope: tuple, lengths: Tensor, text_tokens: int, streams: int
                ) -> tuple[Callable[[], Tensor], Tensor, Tensor]:
        """Computes q, k and v by `qkv_gemm`, and starts their all-to-all if there are several GPUs with Ulysses.

        Args:
            x: (B, S, D) e4m3, this GPU's tokens. x_scale: (B, S) float32.
            rope: cos and sin, (S, D / H / 2) float16 each.
            lengths: (B, S) float32, see `adaln`.
            text_tokens: how many of the S tokens are text.
            streams: how many sets of weights, 1 or 2.

        Returns:
            A function that waits for q, k and v and returns them: (3, B, S, H, D / H) e4m3. With Ulysses, it returns
            (N, B, S, 3, H / N, D / H), where part i holds the tokens of GPU i. The scales of q, k and v, (B, 3, H)
            float32. The scales that bound attention's result and the MLP's, (B, 2) float32, see `qkv_gemm`.
        """
        qkv, descale, bounds = qkv_gemm(x, x_scale, *self.qkv.operands(), self.norms, *rope, self.qk_scale, lengths,
                                        self.bounds, text_tokens, streams, self.parts)
        if self.boxes:
            return self.boxes.start(qkv, "qkv"), descale, bounds
        if self.context_parallel == "ulysses":
            qkv = all_to_all(qkv)
        return lambda: qkv, descale, bounds

    def attend(self, qkv: Callable[[], Tensor], descale: Tensor, queries: slice = slice(None)) -> Tensor:
        """Attention on one GPU, or ring attention.

        Args:
            qkv: a function that returns q, k and v, (3, B, S, H, D / H) e4m3.
            descale: (B, 3, H) float32, their scales.
            queries: the tokens whose attention is computed. Ring attention ignores it and computes all.

        Returns:
            (B, S, D) bf16, or fewer tokens if `queries` selects fewer. With ring attention, S counts this GPU's tokens.
        """
        if self.context_parallel == "ring":
            return ring(qkv()[0], qkv()[1:], *descale.unbind(1), "fa3").flatten(2)
        q, k, v = qkv().unbind()
        return attention(q[:, queries], k, v, *descale.unbind(1), "fa3").flatten(2)

    def attend_by_heads(self, qkv: Callable[[], Tensor], descale: Tensor, scale: Tensor) -> Tensor:
        """Ulysses: attends to this GPU's heads of all tokens, then exchanges the result for all heads of this GPU's
        tokens.

        No GPU holds a whole row before the exchange, so the rows cannot be scaled by their own maximum. The exchange
        moves e4m3, half the bytes of bf16.

        Args:
            qkv: a function that returns q, k and v, (N, B, S / N, 3, H / N, D / H) e4m3. S counts the tokens of all
                GPUs.
            descale: (B, 3, H) float32, their scales.
            scale: (B,) float32, the scale of the result, equal on all GPUs.

        Returns:
            (N, B, S / N, D / N) e4m3, where part i holds the columns of GPU i's heads.
        """
        attended = attention(*all_tokens(qkv()).unbind(2), *shard(descale, 2).unbind(1), "fa3").flatten(2)
        if self.boxes:
            return self.boxes.send_attention(attended, scale)
        return all_to_all(token_parts(to_e4m3(attended.float() / scale[:, None, None])))

    def deferred_residual(self, text: Tensor, image: Tensor, y: Tensor, y_scale: Tensor, linear: QuantizedLinear,
                          gates: Tensor, table: Tensor) -> tuple:
        """The block's result, after its last residual add or with the residual add deferred to the next block.

        Args:
            text, image: (B, T, D) and (B, I, D) fp16 of the residual stream.
            y: (B, S, D) bf16, the result of `fp8_gemm`. y_scale: (B, S) float32.
            linear: the Linear that y came from; its bias is still to be added.
            gates: (2,) int64, where the gates of text and of image begin in a row of the table.
            table: (B, total) bf16, see `Modulations`.

        Returns:
            (text, image), or ((text, y, y_scale, bias, gates), image) if `defers_residual` is set.
        """
        deferred = y, y_scale, linear.bias.view(linear.count, -1).expand(2, -1), gates
        return ((text, *deferred), image) if self.defers_residual else gated_residual(text, image, *deferred, table)


class FusedSingleBlock(_Block):
    """A FluxSingleTransformerBlock on the fused kernels, with its own copy of the weights in e4m3.

    Args:
        block: diffusers' block, with fused projections.
        offset: where the block's modulation begins in a row of the table (see `Modulations`).
        device: where the weights will be.
        modulation: (1, D), the block's `typical_modulation`. For int8 only.
    """

    def __init__(self, block, offset: int, device: torch.device, modulation: Tensor | None = None):
        super().__init__()
        attn, width = block.attn, block.attn.query_dim
        (qkv, qkv_bias), mlp, (out, out_bias) = (
            _float32_copy(linear, device) for linear in (attn.to_qkv, block.proj_mlp, block.proj_out))
        v, v_bias = qkv[-width:], qkv_bias[-width:]
        # In e4m3, q and k have no bound that depends on their weights.
        powers = column_powers([qkv if self.int8 else v, mlp[0]], None if modulation is None else modulation[0])
        qkv /= powers
        mlp[0] /= powers
        shares = channel_shares(torch.cat([reach(v, v_bias), reach(*mlp)]), out.abs().amax(0), self.equalization)
        v /= shares[:width, None]
        v_bias /= shares[:width]
        out *= shares
        self.qkv = QuantizedLinear([qkv], [qkv_bias], int8=self.int8)
        self.mlp = QuantizedLinear([mlp[0]], [mlp[1]], int8=self.int8)
        self.out = QuantizedLinear([out], [out_bias], gated=True, int8=self.int8, shifted_from=width)
        # The factors of shift, scale and gate, see `Modulations`.
        self.factors = [torch.stack([powers, powers, *self.out.gate_factors()])]
        self.register_buffer("columns", 1 / shares[width:])
        self.register_buffer("norms", _norms([(attn.norm_q, attn.norm_k)], device))
        self.register_buffer("offsets", torch.full((2,), offset, device=device))  # on the GPU, without a wait
        self.register_buffer("gates", self.offsets + GATE * width)
        self.register_buffer("bounds", torch.zeros(2, 2, device=device) if self.int8 else
                             gemm_bounds(self.mlp, self.columns, self.qkv, attn.heads).repeat(2, 1))
        self.register_buffer("qk_scale", torch.stack([norm_scale(attn.norm_q), norm_scale(attn.norm_k)]).to(device))
        self.register_buffer("one", torch.ones((), device=device))

    def forward(self, hidden_states: Tensor, encoder_hidden_states: Tensor, temb: Tensor, image_rotary_emb=None,
                joint_attention_kwargs=None) -> tuple[Tensor, Tensor]:
        """Computes attention and the MLP side by side, and adds them to the residual stream.

        1. `first_adaln`: the residual add that the previous block deferred, LayerNorm and modulation; x in e4m3 with a
           measured scale per row.
        2. `project`: q, k, v = x times weights, plus bias, QK-norm and RoPE; in e4m3 with static scales of q and k, and
           a bound per head of v.
        3. `attend`: FlashAttention-3, bf16. The last block computes only the rows that the pipeline reads.
        4. `place_attention`: e4m3, into the first D columns of `hidden`, with a scale per row: the larger of the
           measured scale and GELU's bound.
        5. `gelu_gemm`: GELU(x times weights, plus bias) in e4m3, into the other columns, with the same scale.
        6. `fp8_gemm`: y = hidden times weights, bf16. The residual add multiplies it by the scale of the row.
        7. `deferred_residual`: the residual add, or a tuple with which the next block does it.

        With Ulysses 5 comes before 3, and `hidden` has one scale for each batch item, a bound.

        Args:
            hidden_states: (B, I, D) fp16, image tokens of the residual stream, as `to_stream` stores it.
            encoder_hidden_states: (B, T, D) fp16, text tokens of the residual stream, or the tuple (text, y, y_scale,
                bias, gates) of the previous block's deferred residual add.
            temb: (B, total) bf16, the table of `Modulations`.
            image_rotary_emb: cos and sin of `RotaryEmbedding`, (S, D / H / 2) float16 each. Required.
            joint_attention_kwargs: a dict; only the entry `READ` is used, see `prune_unused_tokens`.

        Returns:
            (text, image), (B, T, D) and (B, I, D) fp16, with the tuple in the place of text if `defers_residual` is
            set. If unused tokens are pruned, text has no tokens and image has the first `READ` tokens.
        """
        text, image, x, x_scale, gelu_scale, lengths = self.first_adaln(encoder_hidden_states, hidden_states, temb)
        tokens, queries = text.shape[1], slice(None)
        qkv, descale, bounds = self.project(x, x_scale, image_rotary_emb, lengths, tokens, 1)
        kept = (joint_attention_kwargs or {}).get(READ)
        if self.prunes_unused_tokens and kept:
            queries = slice(tokens, tokens + kept)
            text, image, x, x_scale, gelu_scale = (text[:, :0], image[:, :kept], x[:, queries], x_scale[:, queries],
                                                   gelu_scale[:, queries])
        width = x.shape[2]
        hidden = x.new_empty(*x.shape[:2], self.out.weight.shape[1])
        mlp = *self.mlp.operands(), self.columns
        if self.context_parallel == "ulysses":
            # GELU's GEMM comes first, so that it runs while q, k and v travel between the GPUs. Attention's result is
            # unknown until then, so the scale of a row has to be a bound.
            hidden_scale = bounds[:, 1:].expand_as(gelu_scale).contiguous()
            gelu_gemm(x, x_scale, *mlp, hidden_scale, hidden, 0, 1)
            hidden[..., :width].unflatten(2, (self.parts, -1)).copy_(
                self.attend_by_heads(qkv, descale, bounds[:, 1].contiguous()).permute(1, 2, 0, 3))
        else:
            hidden_scale = place_attention(self.attend(qkv, descale, queries), gelu_scale, hidden)
            gelu_gemm(x, x_scale, *mlp, hidden_scale, hidden, 0, 1)
        y = fp8_gemm(hidden, self.out.weight, self.one, 0, 1)
        return self.deferred_residual(text, image, y, hidden_scale, self.out, self.gates, temb)


class FusedDoubleBlock(_Block):
    """A FluxTransformerBlock on the fused kernels, with its own copy of the weights in e4m3, text's before image's.

    Args:
        block: diffusers' block, with fused projections.
        text_offset, image_offset: where the modulations of text and of image begin in a row of the table (see
            `Modulations`).
        device: where the weights will be.
        modulation: (2, D) each, the `typical_modulation` of text and of image. For int8 only.
    """

    def __init__(self, block, text_offset: int, image_offset: int, device: torch.device,
                 modulation: tuple[Tensor, Tensor] | None = None):
        super().__init__()
        attn, width = block.attn, block.attn.query_dim
        qkv, out, up, down = (
            [_float32_copy(linear, device) for linear in pair] for pair in
            ((attn.to_added_qkv, attn.to_qkv), (attn.to_add_out, attn.to_out[0]),
             (block.ff_context.net[0].proj, block.ff.net[0].proj), (block.ff_context.net[2], block.ff.net[2])))
        # Attention mixes the values of both streams, so both streams get the same shares.
        v = [(weight[-width:], bias[-width:]) for weight, bias in qkv]
        powers = [(column_powers([(own if self.int8 else value)[0]], by_qkv), column_powers([other[0]], by_up))
                  for own, value, other, (by_qkv, by_up) in zip(qkv, v, up, modulation or [(None, None)] * 2,
                                                                strict=True)]
        for (by_qkv, by_up), own, other in zip(powers, qkv, up, strict=True):
            own[0] /= by_qkv
            other[0] /= by_up
        shares = channel_shares(torch.maximum(*(reach(*one) for one in v)),
                                torch.maximum(*(weight.abs().amax(0) for weight, _ in out)), self.equalization)
        for (weight, bias), (reader, _) in zip(v, out, strict=True):
            weight /= shares[:, None]
            bias /= shares
            reader *= shares
        columns = []
        for one, (reader, _) in zip(up, down, strict=True):
            shares = channel_shares(reach(*one), reader.abs().amax(0), self.equalization)
            reader *= shares
            columns.append(1 / shares)
        for name, pairs in {"qkv": qkv, "out": out, "up": up, "down": down}.items():
            weights, biases = map(list, zip(*pairs, strict=True))
            setattr(self, name, QuantizedLinear(weights, biases, name in ("out", "down"), self.int8,
                                                shifted_from=0 if name == "down" else None))
        # The factors of text's and of image's modulation, six parts each, see `Modulations`.
        gates = zip(self.out.gate_factors(), self.down.gate_factors(), strict=True)
        self.factors = [torch.stack([by_qkv, by_qkv, gate, by_up, by_up, mlp_gate])
                        for (by_qkv, by_up), (gate, mlp_gate) in zip(powers, gates, strict=True)]
        norms = [(attn.norm_added_q, attn.norm_added_k), (attn.norm_q, attn.norm_k)]
        self.register_buffer("columns", torch.cat(columns))
        self.register_buffer("norms", _norms(norms, device))
        # Made on the GPU: the copy of a `torch.tensor` would be waited for.
        self.register_buffer("offsets", torch.stack([torch.full((), offset, device=device)
                                                     for offset in (text_offset, image_offset)]))
        self.register_buffer("gates", self.offsets + GATE * width)
        self.register_buffer("mlp_gates", self.offsets + MLP_GATE * width)
        self.register_buffer("bounds", torch.zeros(2, 2, device=device) if self.int8 else
                             gemm_bounds(self.up, self.columns, self.qkv, attn.heads))
        qk_scale = [norm_scale(*both) for both in zip(*norms, strict=True)]
        self.register_buffer("qk_scale", torch.stack(qk_scale).to(device))
        self.register_buffer("one", torch.ones((), device=device))

    def forward(self, hidden_states: Tensor, encoder_hidden_states: Tensor, temb: Tensor, image_rotary_emb=None,
                joint_attention_kwargs=None) -> tuple[Tensor, Tensor]:
        """Computes attention over both streams, then an MLP for each stream, and adds both to the residual stream.

        Args:
            hidden_states: (B, I, D) fp16, image tokens of the residual stream, as `to_stream` stores it.
            encoder_hidden_states: (B, T, D) fp16, text tokens of the residual stream, or the tuple (text, y, y_scale,
                bias, gates) of the previous block's deferred residual add.
            temb: (B, total) bf16, the table of `Modulations`.
            image_rotary_emb: cos and sin of `RotaryEmbedding`, (S, D / H / 2) float16 each. Required.
            joint_attention_kwargs: unused.

        Returns:
            (text, image), (B, T, D) and (B, I, D) fp16, with the tuple in the place of text if `defers_residual` is
            set.
        """
        text, image, x, x_scale, scale, lengths = self.first_adaln(encoder_hidden_states, hidden_states, temb)
        tokens = text.shape[1]
        qkv, descale, bounds = self.project(x, x_scale, image_rotary_emb, lengths, tokens, 2)
        if self.context_parallel == "ulysses":
            parts = self.attend_by_heads(qkv, descale, bounds[:, 0].contiguous())
            attended, attended_scale = parts.permute(1, 2, 0, 3).flatten(2), bounds[:, :1].expand_as(scale).contiguous()
        else:
            attended, attended_scale = cast_attention(self.attend(qkv, descale))
        y = fp8_gemm(attended, self.out.weight, self.one, tokens, 2)
        text, image, x, x_scale, scale, _ = residual_adaln(
            text, image, y, attended_scale, self.out.bias.view(2, -1), self.gates, temb, self.offsets, self.bounds,
            MLP_SHIFT, MLP_SCALE)
        hidden = x.new_empty(*x.shape[:2], self.down.weight.shape[1])
        gelu_gemm(x, x_scale, *self.up.operands(), self.columns, scale, hidden, tokens, 2)
        y = fp8_gemm(hidden, self.down.weight, self.one, tokens, 2)
        return self.deferred_residual(text, image, y, scale, self.down, self.mlp_gates, temb)


class StreamEmbedder(torch.nn.Module):
    """Wraps an embedder of tokens so that its result begins the residual stream, stored as `to_stream` stores it.

    The embedder's weights are divided by STREAM in place. STREAM is a power of two, so weights in bf16 are not rounded.

    Args:
        embed: the embedder, a Linear from C to D.
    """

    def __init__(self, embed: torch.nn.Linear):
        super().__init__()
        self.embed = embed
        embed.weight /= STREAM
        if embed.bias is not None:
            embed.bias /= STREAM

    def forward(self, x: Tensor) -> Tensor:
        """x (B, S, C) in the embedder's dtype: (B, S, D) fp16."""
        return self.embed(x).half()


class RotaryEmbedding(torch.nn.Module):
    """diffusers' FluxPosEmbed, with each angle once instead of twice and in float16.

    Values between -1 and 1 are accurate to 2^-12 in float16; the e4m3 result of RoPE is accurate to 2^-4. In float32,
    the GEMM that applies RoPE would run out of registers (76 bytes of spills a thread, Triton 3.6).

    Args:
        embed: diffusers' FluxPosEmbed.
    """

    def __init__(self, embed: torch.nn.Module):
        super().__init__()
        self.embed = embed

    def forward(self, ids: Tensor) -> tuple[Tensor, ...]:
        """ids (S, 3), the position of each token: cos and sin, (S, D / H / 2) float16 each."""
        return tuple(table[:, ::2].half().contiguous() for table in self.embed(ids))


@torch.no_grad()
def fused_block(kind: type, block, offset: int, device: torch.device, conditions: Tensor | None
                ) -> tuple[_Block, list[tuple[int, torch.nn.Linear, Tensor]]]:
    """A block of diffusers on the fused kernels. Everything is computed on `device`.

    Args:
        kind: the class of the fused block.
        block: diffusers' block, with fused projections.
        offset: where the block's modulation begins in a row of the table (see `Modulations`).
        conditions: from `typical_conditions`. For int8 only.

    Returns:
        The fused block, and each of its modulation Linears with its offset and its factors, for `Modulations`.
    """
    double = issubclass(kind, FusedDoubleBlock)
    linears, parts = ((block.norm1_context.linear, block.norm1.linear), 6) if double else ((block.norm.linear,), 3)
    offsets = [offset + i * parts * block.attn.query_dim for i in range(len(linears))]
    typical = [typical_modulation(conditions, linear, parts) for linear in linears] if kind.int8 else [None] * 2
    fused = kind(block, *offsets, device, (tuple(typical) if kind.int8 else None) if double else typical[0])
    fused.offset = offset
    return fused, list(zip(offsets, linears, fused.factors, strict=True))


@torch.no_grad()
def fuse_blocks(transformer: FluxTransformer2DModel, device: torch.device, float8_modulations: bool = False,
                int8: bool = False) -> int:
    """Replaces diffusers' blocks by the fused blocks, one after the other on `device`, and frees the originals.

    Also replaces the embedders, time_text_embed, pos_embed and norm_out. Call `attach_modulation_hook` afterwards.

    Args:
        transformer: has fused projections. LoRA weights, if any, are fused too, and nothing is quantized.
        device: where the fused blocks will be.
        float8_modulations: whether the modulation Linears are e4m3, see `Modulations`.
        int8: whether the blocks' Linears are int8, see utils/kernels/int8_blocks.py; or else e4m3.

    Returns:
        The number of quantized Linears.
    """
    if int8:
        from utils.kernels.int8_blocks import Int8DoubleBlock as DoubleBlock  # which imports this module
        from utils.kernels.int8_blocks import Int8SingleBlock as SingleBlock
    else:
        DoubleBlock, SingleBlock = FusedDoubleBlock, FusedSingleBlock
    if device.type == "cuda":
        use_torch_memory(device)
    embed, at, doubles, singles = transformer.time_text_embed, 0, [], []
    conditions = typical_conditions(embed, device) if int8 else None
    for kind, blocks, modulated in ((DoubleBlock, transformer.transformer_blocks, doubles),
                                    (SingleBlock, transformer.single_transformer_blocks, singles)):
        for i, block in enumerate(blocks):
            blocks[i], linears = fused_block(kind, block, at, device, conditions)
            modulated += [(linear, factors) for _, linear, factors in linears]
            at += sum(linear.out_features for _, linear, _ in linears)
    norm_out = transformer.norm_out
    transformer.time_text_embed = Modulations(embed, doubles, singles, norm_out.linear, device, float8_modulations)
    transformer.norm_out = NormOut()
    transformer.x_embedder = StreamEmbedder(transformer.x_embedder)
    transformer.context_embedder = StreamEmbedder(transformer.context_embedder)
    transformer.pos_embed = RotaryEmbedding(transformer.pos_embed)
    return float8_modulations * (len(doubles) + len(singles)) + sum(
        module.count for module in transformer.modules() if isinstance(module, QuantizedLinear))


def defer_residuals(transformer: FluxTransformer2DModel, first: int = 0, last: int = 0) -> None:
    """Makes every fused block defer its last residual add to the next block, except where a result is read in between.

    The last block does not defer. A step cache reads two other results: the result of the last of the `first` blocks,
    and the result of the block before the `last` blocks.

    Args:
        transformer: has fused blocks.
        first, last: how many blocks at the beginning and at the end a step cache always computes.
    """
    blocks = [*transformer.transformer_blocks, *transformer.single_transformer_blocks]
    for count, block in enumerate(blocks, 1):
        block.defers_residual = count not in (first, len(blocks) - last, len(blocks))


def prune_unused_tokens(pipeline) -> None:
    """Makes the last block compute only the tokens that the pipeline reads: those of the generated image.

    The last block leaves out text tokens and Kontext's reference tokens; it needs only their keys and values. Inside
    the pipeline's denoising loop, the transformer's output then has only the tokens of the generated image. Any other
    caller of the transformer gets all tokens.

    Do not call it on several GPUs. Do not call it with a step cache over blocks that are not in segments
    (utils/cache/piecewise.py): that cache needs all tokens.

    Args:
        pipeline: its transformer has fused blocks. `prepare_latents` is replaced, and the transformer gets a pre-hook.
    """
    prepare, read = pipeline.prepare_latents, None

    def prepared(*args, **kwargs):
        nonlocal read
        results = prepare(*args, **kwargs)
        read = results[0].shape[1]
        return results

    def before(module, args, kwargs):
        if current_timestep(pipeline) is None:
            return None
        # The count is an argument, because the key of a CUDA graph consists of the arguments. With a reference, the
        # number of tokens alone does not say how many belong to the generated image.
        return args, kwargs | {"joint_attention_kwargs": (kwargs.get("joint_attention_kwargs") or {}) | {READ: read}}

    pipeline.prepare_latents = prepared
    pipeline.transformer.single_transformer_blocks[-1].prunes_unused_tokens = True
    pipeline.transformer.register_forward_pre_hook(before, with_kwargs=True)


def share_attention(transformer: FluxTransformer2DModel, kind: str, gpus: int, device: torch.device) -> bool:
    """Makes every fused block attend to the tokens of all GPUs (utils/context_parallel.py).

    Args:
        transformer: has fused blocks.
        kind: "ulysses" or "ring".
        gpus: the world size.
        device: this process's device.

    Returns:
        Whether the GPUs exchange q, k and v through symmetric memory.
    """
    boxes = None
    blocks = *transformer.transformer_blocks, *transformer.single_transformer_blocks
    if kind == "ulysses" and device.type == "cuda":
        from utils.kernels.symmetric_memory import mailboxes
        boxes = mailboxes()
    for block in blocks:
        block.context_parallel, block.parts, block.boxes = kind, gpus if kind == "ulysses" else 1, boxes
    return boxes is not None
