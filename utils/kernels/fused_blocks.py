"""FLUX's two kinds of block on the fused kernels, and the modulations of a whole image in one GEMM.

    single block                                      double block, text and image side by side
    residual_adaln   LayerNorm, modulation -> e4m3    residual_adaln
    qkv_gemm         QK-norm, RoPE -> e4m3            qkv_gemm
    attention        FlashAttention-3, fp8            attention
    place_attention  -> e4m3, beside GELU's columns   cast_attention, fp8_gemm
    gelu_gemm        -> e4m3                          residual_adaln, gelu_gemm, fp8_gemm
    fp8_gemm         by cuBLAS

A block takes and gives what diffusers' blocks do, so that the transformer and a step cache find it where they expect
it. Two things differ. The residual stream is stored in fp16, over 16 (`to_stream`), from the embedders to norm_out. And
`temb` is one table with the modulations of all blocks, in which each block knows its offset. Where no cache looks in
between, a block defers its last residual add to the LayerNorm of the next one (`defer_residuals`): in the place of text
it then returns (text, y, y_scale, bias, gates), see `residual_adaln`.
"""

from collections.abc import Callable

import torch
from diffusers import FluxTransformer2DModel
from torch import Tensor

from utils.attention import attention, norm_scale
from utils.context_parallel import all_reduce_max, all_to_all, all_tokens, ring, shard, token_parts
from utils.equalization import channel_shares, column_powers, reach
from utils.kernels.fused_kernels import (
    STREAM,
    adaln,
    cast_attention,
    fp8_gemm,
    gated_residual,
    gelu_gemm,
    place_attention,
    qkv_gemm,
    residual_adaln,
    to_e4m3,
    use_torch_memory,
)
from utils.kernels.modulation import (
    GATE,
    MLP_GATE,
    MLP_SCALE,
    MLP_SHIFT,
    SCALE,
    SHIFT,
    Float8Linear,
    Modulations,
    NormOut,
)

READ = "tokens_read"  # among a block's joint_attention_kwargs: how many of the image's the pipeline reads


def _read(linear: torch.nn.Linear, device: torch.device) -> list[Tensor]:
    """Weight (N, K) and bias (N,) in float32, to be changed."""
    weight = linear.weight.detach().to(device, torch.float32, copy=True)
    bias = torch.zeros(len(weight), device=device) if linear.bias is None else linear.bias.detach()
    return [weight, bias.to(device, torch.float32, copy=True)]


def gemm_bounds(hidden: Float8Linear, columns: Tensor, qkv: Float8Linear, heads: int) -> Tensor:
    """(streams, 2 + 2 H) float32: |w| and |b| of GELU's largest channel, then |w| and |b| of v's in each head.

    With the length of a row x they bound every element of a GEMM: |w_j x + b_j| <= |w_j| |x| + |b_j|. Channels are
    weighted by `columns` (streams N,), GELU's reciprocal shares; v's are in its weights.
    """
    def largest(linear: Float8Linear, groups: int, columns: Tensor | float) -> tuple[Tensor, Tensor]:
        length = linear.weight.float().norm(dim=1) * linear.scale
        return tuple((x * columns).view(linear.count, groups, -1).amax(2) for x in (length, linear.bias.float().abs()))

    # Of q, k and v, as of 3 H groups of rows, v's are the last.
    return torch.cat([*largest(hidden, 1, columns), *(x[:, 2 * heads:] for x in largest(qkv, 3 * heads, 1.0))], dim=1)


def _norms(pairs: list[tuple], device: torch.device) -> Tensor:
    """(streams, 3, D / H) float32: the weights of q's norm, of k's, and ones for v."""
    rows = [[norm.weight.detach().float() for norm in pair] for pair in pairs]
    return torch.stack([torch.stack([q, k, torch.ones_like(q)]) for q, k in rows]).to(device)


class _Block(torch.nn.Module):
    """How both kinds begin and end."""

    defers_residual = False
    prunes_unused_tokens = False  # see `prune_unused_tokens`
    # Of several GPUs: how they share attention, among how many its heads, and through what, if not NCCL.
    context_parallel, parts, boxes = None, 1, None

    def first_adaln(self, text, image: Tensor, table: Tensor) -> tuple[Tensor, ...]:
        """text (B, T, D) and image (B, I, D) of the stream, complete, and the results of `adaln`."""
        if isinstance(text, tuple):
            text, *deferred = text
            found = residual_adaln(text, image, *deferred, table, self.offsets, self.bounds, SHIFT, SCALE)
        else:
            found = text, image, *adaln(text, image, table, self.offsets, self.bounds, SHIFT, SCALE)
        # q, k and v of all GPUs' tokens have common scales.
        return (*found[:-1], all_reduce_max(found[-1])) if self.context_parallel else found

    def project(self, x: Tensor, x_scale: Tensor, rope: tuple, lengths: Tensor, text_tokens: int, streams: int
                ) -> tuple[Callable[[], Tensor], Tensor, Tensor]:
        """The results of `qkv_gemm` for x (B, S, D) e4m3. q, k and v are a function: between several GPUs they are on
        their way to the GPU that attends to them until it is called."""
        qkv, descale, shared = qkv_gemm(x, x_scale, *self.qkv.operands(), self.norms, *rope, self.qk_scale, lengths,
                                        self.bounds, text_tokens, streams, self.parts)
        if self.boxes:
            return self.boxes.start(qkv, "qkv"), descale, shared
        if self.context_parallel == "ulysses":
            qkv = all_to_all(qkv)
        return lambda: qkv, descale, shared

    def attend(self, qkv: Callable[[], Tensor], descale: Tensor, queries: slice = slice(None)) -> Tensor:
        """(B, S, D) bf16, with all heads of this GPU's tokens; on one GPU of the tokens `queries` alone."""
        if self.context_parallel == "ring":
            return ring(qkv()[0], qkv()[1:], *descale.unbind(1), "fa3").flatten(2)
        q, k, v = qkv().unbind()
        return attention(q[:, queries], k, v, *descale.unbind(1), "fa3").flatten(2)

    def attend_by_heads(self, qkv: Callable[[], Tensor], descale: Tensor, scale: Tensor) -> Tensor:
        """Ulysses: attends to this GPU's heads of all tokens, and exchanges the result for all heads of its tokens.

        Returns (N, B, S / N, D / N) e4m3 over `scale` (B,), which all GPUs know: no GPU has a whole row before the
        exchange. e4m3 moves half of bf16's bytes.
        """
        attended = attention(*all_tokens(qkv()).unbind(2), *shard(descale, 2).unbind(1), "fa3").flatten(2)
        if self.boxes:
            return self.boxes.send_attention(attended, scale)
        return all_to_all(token_parts(to_e4m3(attended.float() / scale[:, None, None])))

    def deferred_residual(self, text: Tensor, image: Tensor, y: Tensor, y_scale: Tensor, linear: Float8Linear,
                          gates: Tensor, table: Tensor) -> tuple:
        """The block's result, with the residual add of y (B, S, D) done, or deferred to the next block."""
        deferred = y, y_scale, linear.bias.view(linear.count, -1).expand(2, -1), gates
        return ((text, *deferred), image) if self.defers_residual else gated_residual(text, image, *deferred, table)


class FusedSingleBlock(_Block):
    """A FluxSingleTransformerBlock with fused projections, on the fused kernels, with weights of its own.

    Args:
        offset: where its modulation begins in the table (see `Modulations`).
    """

    def __init__(self, block, offset: int, device: torch.device):
        super().__init__()
        attn, width = block.attn, block.attn.query_dim
        (qkv, qkv_bias), mlp, (out, out_bias) = (_read(one, device) for one in
                                                 (attn.to_qkv, block.proj_mlp, block.proj_out))
        v, v_bias = qkv[-width:], qkv_bias[-width:]
        read = column_powers([v, mlp[0]])
        qkv /= read
        mlp[0] /= read
        shares = channel_shares(torch.cat([reach(v, v_bias), reach(*mlp)]), out.abs().amax(0))
        v /= shares[:width, None]
        v_bias /= shares[:width]
        out *= shares
        self.qkv = Float8Linear([qkv], [qkv_bias])
        self.mlp = Float8Linear([mlp[0]], [mlp[1]])
        self.out = Float8Linear([out], [out_bias], gated=True)
        self.factors = [torch.stack([read, read, self.out.scale])]  # of the modulation's parts, see `Modulations`
        self.register_buffer("columns", 1 / shares[width:])
        self.register_buffer("norms", _norms([(attn.norm_q, attn.norm_k)], device))
        self.register_buffer("offsets", torch.tensor([offset, offset], device=device))
        self.register_buffer("gates", self.offsets + GATE * width)
        self.register_buffer("bounds", gemm_bounds(self.mlp, self.columns, self.qkv, attn.heads).repeat(2, 1))
        self.register_buffer("qk_scale", torch.stack([norm_scale(attn.norm_q), norm_scale(attn.norm_k)]).to(device))
        self.register_buffer("one", torch.ones((), device=device))

    def forward(self, hidden_states: Tensor, encoder_hidden_states: Tensor, temb: Tensor, image_rotary_emb=None,
                joint_attention_kwargs=None) -> tuple[Tensor, Tensor]:
        """hidden_states (B, I, D) and encoder_hidden_states (B, T, D) of the stream, or what the last block left; temb
        (B, *) bf16, the table of `Modulations`; image_rotary_emb: cos and sin of `RotaryEmbedding`."""
        text, image, x, x_scale, scale, lengths = self.first_adaln(encoder_hidden_states, hidden_states, temb)
        tokens, queries = text.shape[1], slice(None)
        qkv, descale, shared = self.project(x, x_scale, image_rotary_emb, lengths, tokens, 1)
        read = (joint_attention_kwargs or {}).get(READ)
        if self.prunes_unused_tokens and read:
            queries = slice(tokens, tokens + read)
            text, image, x, x_scale, scale = (text[:, :0], image[:, :read], x[:, queries], x_scale[:, queries],
                                              scale[:, queries])
        width = x.shape[2]
        hidden = x.new_empty(*x.shape[:2], self.out.weight.shape[1])
        mlp = *self.mlp.operands(), self.columns
        if self.context_parallel == "ulysses":
            # GELU first, so that it runs while q, k and v travel. The scale of a row then has to be a bound.
            scale = shared[:, 1:].expand_as(scale).contiguous()
            gelu_gemm(x, x_scale, *mlp, scale, hidden, 0, 1)
            hidden[..., :width].unflatten(2, (self.parts, -1)).copy_(
                self.attend_by_heads(qkv, descale, shared[:, 1].contiguous()).permute(1, 2, 0, 3))
        else:
            scale = place_attention(self.attend(qkv, descale, queries), scale, hidden)
            gelu_gemm(x, x_scale, *mlp, scale, hidden, 0, 1)
        y = fp8_gemm(hidden, self.out.weight, self.one, 0, 1)
        return self.deferred_residual(text, image, y, scale, self.out, self.gates, temb)


class FusedDoubleBlock(_Block):
    """A FluxTransformerBlock with fused projections, on the fused kernels, with weights of its own, text's before
    image's.

    Args:
        text_offset, image_offset: where its modulations begin in the table (see `Modulations`).
    """

    def __init__(self, block, text_offset: int, image_offset: int, device: torch.device):
        super().__init__()
        attn, width = block.attn, block.attn.query_dim
        qkv, out, up, down = (
            [_read(one, device) for one in pair] for pair in
            ((attn.to_added_qkv, attn.to_qkv), (attn.to_add_out, attn.to_out[0]),
             (block.ff_context.net[0].proj, block.ff.net[0].proj), (block.ff_context.net[2], block.ff.net[2])))
        # Attention mixes the values of both streams: they have common shares.
        v = [(weight[-width:], bias[-width:]) for weight, bias in qkv]
        read = [(column_powers([own[0]]), column_powers([other[0]])) for own, other in zip(v, up, strict=True)]
        for (by_qkv, by_up), own, other in zip(read, qkv, up, strict=True):
            own[0] /= by_qkv
            other[0] /= by_up
        shares = channel_shares(torch.maximum(*(reach(*one) for one in v)),
                                torch.maximum(*(weight.abs().amax(0) for weight, _ in out)))
        for (weight, bias), (reader, _) in zip(v, out, strict=True):
            weight /= shares[:, None]
            bias /= shares
            reader *= shares
        columns = []
        for one, (reader, _) in zip(up, down, strict=True):
            shares = channel_shares(reach(*one), reader.abs().amax(0))
            reader *= shares
            columns.append(1 / shares)
        for name, pairs in {"qkv": qkv, "out": out, "up": up, "down": down}.items():
            weights, biases = map(list, zip(*pairs, strict=True))
            setattr(self, name, Float8Linear(weights, biases, gated=name in ("out", "down")))
        # Of the parts of text's and of image's modulation, see `Modulations`.
        gates = zip(self.out.scales(), self.down.scales(), strict=True)
        self.factors = [torch.stack([by_qkv, by_qkv, gate, by_up, by_up, mlp_gate])
                        for (by_qkv, by_up), (gate, mlp_gate) in zip(read, gates, strict=True)]
        norms = [(attn.norm_added_q, attn.norm_added_k), (attn.norm_q, attn.norm_k)]
        self.register_buffer("columns", torch.cat(columns))
        self.register_buffer("norms", _norms(norms, device))
        self.register_buffer("offsets", torch.tensor([text_offset, image_offset], device=device))
        self.register_buffer("gates", self.offsets + GATE * width)
        self.register_buffer("mlp_gates", self.offsets + MLP_GATE * width)
        self.register_buffer("bounds", gemm_bounds(self.up, self.columns, self.qkv, attn.heads))
        qk_scale = [norm_scale(*both) for both in zip(*norms, strict=True)]
        self.register_buffer("qk_scale", torch.stack(qk_scale).to(device))
        self.register_buffer("one", torch.ones((), device=device))

    def forward(self, hidden_states: Tensor, encoder_hidden_states: Tensor, temb: Tensor, image_rotary_emb=None,
                joint_attention_kwargs=None) -> tuple[Tensor, Tensor]:
        """The arguments are those of `FusedSingleBlock.forward`."""
        text, image, x, x_scale, scale, lengths = self.first_adaln(encoder_hidden_states, hidden_states, temb)
        tokens = text.shape[1]
        qkv, descale, shared = self.project(x, x_scale, image_rotary_emb, lengths, tokens, 2)
        if self.context_parallel == "ulysses":
            parts = self.attend_by_heads(qkv, descale, shared[:, 0].contiguous())
            attended, attended_scale = parts.permute(1, 2, 0, 3).flatten(2), shared[:, :1].expand_as(scale).contiguous()
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
    """An embedder of tokens (B, S, C) whose result begins the residual stream (B, S, D).

    The stream's scale is a power of two, so that weights in bf16 take it in without rounding.
    """

    def __init__(self, embed: torch.nn.Linear):
        super().__init__()
        self.embed = embed
        embed.weight /= STREAM
        if embed.bias is not None:
            embed.bias /= STREAM

    def forward(self, x: Tensor) -> Tensor:
        return self.embed(x).half()


class RotaryEmbedding(torch.nn.Module):
    """diffusers' FluxPosEmbed with every angle once: cos and sin (S, D / H / 2), float16.

    Between -1 and 1 that is right to 2^-12 and e4m3, which follows, to 2^-4; in float32 the product that rotates would
    run out of registers (76 bytes of spills a thread, Triton 3.6).
    """

    def __init__(self, embed: torch.nn.Module):
        super().__init__()
        self.embed = embed

    def forward(self, ids: Tensor) -> tuple[Tensor, ...]:
        return tuple(table[:, ::2].half().contiguous() for table in self.embed(ids))


@torch.no_grad()
def fuse_blocks(transformer: FluxTransformer2DModel, device: torch.device, float8_modulations: bool = False) -> int:
    """Puts the fused blocks in the place of diffusers', one after the other on `device`, freeing theirs. Afterwards
    `attach_modulation_hook` has to be called.

    For a transformer with fused projections, LoRA included, and nothing quantized.

    Args:
        float8_modulations: see `Modulations`.

    Returns:
        The number of Linears in e4m3.
    """
    if device.type == "cuda":
        use_torch_memory(device)
    width, double, single = transformer.inner_dim, transformer.transformer_blocks, transformer.single_transformer_blocks
    doubles, singles = [], []
    for i, block in enumerate(double):
        double[i] = FusedDoubleBlock(block, 12 * width * i, 12 * width * i + 6 * width, device)
        doubles += zip((block.norm1_context.linear, block.norm1.linear), double[i].factors, strict=True)
    for i, block in enumerate(single):
        single[i] = FusedSingleBlock(block, 6 * width * len(doubles) + 3 * width * i, device)
        singles += zip((block.norm.linear,), single[i].factors, strict=True)
    embed, norm_out = transformer.time_text_embed, transformer.norm_out
    transformer.time_text_embed = Modulations(embed, doubles, singles, norm_out.linear, device, float8_modulations)
    transformer.norm_out = NormOut()
    transformer.x_embedder = StreamEmbedder(transformer.x_embedder)
    transformer.context_embedder = StreamEmbedder(transformer.context_embedder)
    transformer.pos_embed = RotaryEmbedding(transformer.pos_embed)
    return float8_modulations * (len(doubles) + len(singles)) + sum(
        module.count for module in transformer.modules() if isinstance(module, Float8Linear))


def defer_residuals(transformer: FluxTransformer2DModel, first: int = 0, last: int = 0) -> None:
    """Has every fused block leave its last sum to the next, but for the last one and for those whose sums a step cache
    reads: the last of the `first` blocks, and the last one before the `last` blocks."""
    blocks = [*transformer.transformer_blocks, *transformer.single_transformer_blocks]
    for count, block in enumerate(blocks, 1):
        block.defers_residual = count not in (first, len(blocks) - last, len(blocks))


def prune_unused_tokens(pipeline) -> None:
    """Has the last block make what the pipeline reads and no more: the picture's tokens, none of the text's, and none
    of Kontext's reference's, of which it needs keys and values alone. In the pipeline's denoising loop the
    transformer's output then has only those; whoever else calls it gets all.

    Not on several GPUs, nor with a step cache over blocks that are not in segments, of which it wants all tokens.
    """
    prepare, read = pipeline.prepare_latents, None

    def prepared(*args, **kwargs):
        nonlocal read
        found = prepare(*args, **kwargs)
        read = found[0].shape[1]
        return found

    def before(module, args, kwargs):
        if getattr(pipeline, "_current_timestep", None) is None:
            return None
        # An argument, since CUDA graphs are told apart by those: of as many tokens the picture's can be more or fewer.
        return args, kwargs | {"joint_attention_kwargs": (kwargs.get("joint_attention_kwargs") or {}) | {READ: read}}

    pipeline.prepare_latents = prepared
    pipeline.transformer.single_transformer_blocks[-1].prunes_unused_tokens = True
    pipeline.transformer.register_forward_pre_hook(before, with_kwargs=True)


def share_attention(transformer: FluxTransformer2DModel, kind: str, gpus: int, device: torch.device) -> str:
    """Has every fused block attend to the tokens of all GPUs (`utils.context_parallel`). Returns a note about it."""
    boxes = None
    if kind == "ulysses" and device.type == "cuda":
        from utils.kernels.symmetric_memory import mailboxes
        boxes = mailboxes()
    for block in (*transformer.transformer_blocks, *transformer.single_transformer_blocks):
        block.context_parallel, block.parts, block.boxes = kind, gpus if kind == "ulysses" else 1, boxes
    return ", through each other's memory" if boxes else ""
