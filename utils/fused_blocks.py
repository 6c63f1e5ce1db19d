"""FLUX's two kinds of block on the fused kernels, and the modulations of a whole image in one product.

    single block                                      double block, text and image side by side
    residual_adaln  LayerNorm, modulation -> e4m3     residual_adaln
    qkv_product     QK-norm, rotation -> e4m3         qkv_product
    gelu_product    -> e4m3                           attention
    attention       FlashAttention-3, fp8             cast_attention, products
    place_attention beside GELU -> e4m3               residual_adaln, gelu_product, products
    products        by cuBLAS

A block takes and gives what diffusers' blocks do, so that the transformer and a step cache find it where they expect
it. Only `temb` is another: the modulations of all blocks, of which each knows its place. And where no cache looks in
between, a block leaves its last sum to the LayerNorm of the next one, which reads it anyway (`leave_sums`): what it
gives as text is then (text, y, gates) with x + gate * y yet to be made.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from diffusers import FluxTransformer2DModel
from torch import Tensor
from torch.utils.hooks import RemovableHandle

from utils.attention import attention, norm_scale
from utils.fused_kernels import (
    E4M3,
    E4M3_MAX,
    adaln,
    cast_attention,
    gated_residual,
    gelu_product,
    place_attention,
    products,
    qkv_product,
    quantize_rows,
    residual_adaln,
    use_torch_memory,
)
from utils.parallel import all_tokens, exchange, own_part, ring, token_parts

# The parts of a modulation, in the order of diffusers' AdaLayerNormZero; AdaLayerNormZeroSingle has the first three.
SHIFT, SCALE, GATE, MLP_SHIFT, MLP_SCALE, MLP_GATE = range(6)
READ = "tokens_read"  # among a block's joint_attention_kwargs: how many of the image's the pipeline reads


class Float8Linear(torch.nn.Module):
    """The weights of Linears of one shape, one below the other, as e4m3 (N, K), their scales, and biases (N,) in bf16.

    Args:
        by_row: one scale a row, (N,); or one a Linear, in a list as cuBLAS' products want them: weights and biases too.
    """

    def __init__(self, linears: list[torch.nn.Linear], by_row: bool, device: torch.device):
        super().__init__()
        self.count, self.by_row = len(linears), by_row
        for i, linear in enumerate(linears):
            weight = linear.weight.detach().to(device)
            if by_row:
                weight, scale = quantize_rows(weight)
            else:
                scale = weight.float().abs().amax().clamp(min=1e-12) / E4M3_MAX
                weight = (weight.float() / scale).to(E4M3)
            bias = torch.zeros(len(weight)) if linear.bias is None else linear.bias.detach()
            for name, value in (("weight", weight), ("scale", scale), ("bias", bias.to(device, torch.bfloat16))):
                self.register_buffer(f"{name}_{i}", value)
        if by_row:  # one tensor each
            for name in ("weight", "scale", "bias"):
                parts = [self._buffers.pop(f"{name}_{i}") for i in range(self.count)]
                self.register_buffer(name, torch.cat(parts) if len(parts) > 1 else parts[0])

    def operands(self) -> tuple:
        """Weights, scales, biases: tensors if by row, else lists of one tensor a Linear."""
        if self.by_row:
            return self.weight, self.scale, self.bias
        return tuple([getattr(self, f"{name}_{i}") for i in range(self.count)] for name in ("weight", "scale", "bias"))


def product_bounds(hidden: Float8Linear, qkv: Float8Linear, heads: int) -> Tensor:
    """(streams, 2 + 2 H) float32: |w| and |b| of the MLP's widest row, then |w| and |b| of v's widest row in each head.

    With a bound of |x| they bound every element of a product: |w_j x + b_j| <= |w_j| |x| + |b_j|.
    """
    def widest(linear: Float8Linear, groups: int) -> tuple[Tensor, Tensor]:
        length = linear.weight.float().norm(dim=1) * linear.scale
        return tuple(x.view(linear.count, groups, -1).amax(2) for x in (length, linear.bias.float().abs()))

    # Of q, k and v, as of 3 H groups of rows, v's are the last.
    return torch.cat([*widest(hidden, 1), *(x[:, 2 * heads:] for x in widest(qkv, 3 * heads))], dim=1)


def _norms(pairs: list[tuple], device: torch.device) -> Tensor:
    """(streams, 3, D / H) float32: the weights of q's norm, of k's, and ones for v."""
    rows = [[norm.weight.detach().float() for norm in pair] for pair in pairs]
    return torch.stack([torch.stack([q, k, torch.ones_like(q)]) for q, k in rows]).to(device)


class _Block(torch.nn.Module):
    """How both kinds begin and end."""

    leaves_sum = False
    drops_unread = False  # see `drop_unread`
    # Of several GPUs: how they share attention, among how many its heads, and through what, if not NCCL.
    context_parallel, parts, boxes = None, 1, None

    def first_adaln(self, text, image: Tensor, table: Tensor, joint: bool) -> tuple[Tensor, ...]:
        """text and image, complete, and what `adaln` makes of them."""
        common = table, self.offsets, self.bounds, self.qk_scale, SHIFT, SCALE, 0, joint
        if isinstance(text, tuple):
            text, y, gates = text
            return residual_adaln(text, image, y, gates, *common)
        return text, image, *adaln(text, image, *common)

    def project(self, x: Tensor, x_scale: Tensor, rotation: tuple, descale: Tensor, text_tokens: int, streams: int
                ) -> Callable[[], Tensor]:
        """q, k and v; between several GPUs on their way to who attends to them, until what is returned is called."""
        qkv = qkv_product(x, x_scale, *self.qkv.operands(), self.norms, *rotation, descale, text_tokens, streams,
                          self.parts)
        if self.boxes:
            return self.boxes.start(qkv, "qkv")
        if self.context_parallel == "ulysses":
            qkv = exchange(qkv)
        return lambda: qkv

    def attend(self, qkv: Callable[[], Tensor], descale: Tensor, scales: Tensor, queries: slice = slice(None)
               ) -> Tensor:
        """What attention makes of `project`'s, as `cast_attention` and `place_attention` take it; on one GPU of
        `queries` alone, which are tokens."""
        if self.context_parallel == "ulysses":
            attended = attention(*all_tokens(qkv()).unbind(2), *own_part(descale, 2).unbind(1), "fa3").flatten(2)
            if self.boxes:
                return self.boxes.send_attention(attended, scales)
            return exchange(token_parts(cast_attention(attended, scales)))  # e4m3 moves half the bytes
        if self.context_parallel == "ring":
            return ring(qkv()[0], qkv()[1:], *descale.unbind(1), "fa3").flatten(2)
        q, k, v = qkv().unbind()
        return attention(q[:, queries], k, v, *descale.unbind(1), "fa3").flatten(2)

    def last_sum(self, text: Tensor, image: Tensor, y: Tensor, gates: Tensor, table: Tensor) -> tuple:
        return ((text, y, gates), image) if self.leaves_sum else gated_residual(text, image, y, gates, table)


class FusedSingleBlock(_Block):
    """A FluxSingleTransformerBlock with fused projections, on the fused kernels, with weights of its own.

    Args:
        offset: where its modulation begins in the table (see `Modulations`); length: where the bound of its rows is.
    """

    def __init__(self, block, offset: int, length: int, device: torch.device):
        super().__init__()
        attn = block.attn
        self.qkv = Float8Linear([attn.to_qkv], True, device)
        self.mlp = Float8Linear([block.proj_mlp], True, device)
        self.out = Float8Linear([block.proj_out], False, device)
        self.register_buffer("norms", _norms([(attn.norm_q, attn.norm_k)], device))
        self.register_buffer("offsets", torch.tensor([offset, offset, length, length], device=device))
        self.register_buffer("gates", self.offsets[:2] + GATE * attn.query_dim)
        self.register_buffer("bounds", product_bounds(self.mlp, self.qkv, attn.heads).repeat(2, 1))
        self.register_buffer("qk_scale", torch.stack([norm_scale(attn.norm_q), norm_scale(attn.norm_k)]).to(device))

    def forward(self, hidden_states: Tensor, encoder_hidden_states: Tensor, temb: Tensor, image_rotary_emb=None,
                joint_attention_kwargs=None) -> tuple[Tensor, Tensor]:
        text, image, x, x_scale, descale, scales = self.first_adaln(encoder_hidden_states, hidden_states, temb, True)
        qkv = self.project(x, x_scale, image_rotary_emb, descale, 0, 1)
        queries = slice(None)
        read = (joint_attention_kwargs or {}).get(READ)
        if self.drops_unread and read:
            queries = slice(text.shape[1], text.shape[1] + read)
            text, image, x, x_scale = text[:, :0], image[:, :read], x[:, queries], x_scale[:, queries]
        # Before attention, so that it runs while q, k and v travel between GPUs.
        hidden = gelu_product(x, x_scale, *self.mlp.operands(), scales, 0, 1, x.shape[2])
        place_attention(self.attend(qkv, descale, scales, queries), scales, hidden)
        y = products(hidden, scales, [0], *self.out.operands(), 0)
        return self.last_sum(text, image, y, self.gates, temb)


class FusedDoubleBlock(_Block):
    """A FluxTransformerBlock with fused projections, on the fused kernels, with weights of its own, text's before
    image's.

    Args:
        text_offset, image_offset: where its modulations begin in the table (see `Modulations`); text_length,
            image_length: where the bounds of their rows are, for attention and, behind it, for the MLP.
    """

    def __init__(self, block, text_offset: int, image_offset: int, text_length: int, image_length: int,
                 device: torch.device):
        super().__init__()
        attn = block.attn
        self.qkv = Float8Linear([attn.to_added_qkv, attn.to_qkv], True, device)
        self.out = Float8Linear([attn.to_add_out, attn.to_out[0]], False, device)
        self.up = Float8Linear([block.ff_context.net[0].proj, block.ff.net[0].proj], True, device)
        self.down = Float8Linear([block.ff_context.net[2], block.ff.net[2]], False, device)
        norms = [(attn.norm_added_q, attn.norm_added_k), (attn.norm_q, attn.norm_k)]
        self.register_buffer("norms", _norms(norms, device))
        self.register_buffer("offsets", torch.tensor([text_offset, image_offset, text_length, image_length],
                                                     device=device))
        self.register_buffer("gates", self.offsets[:2] + GATE * attn.query_dim)
        self.register_buffer("mlp_gates", self.offsets[:2] + MLP_GATE * attn.query_dim)
        self.register_buffer("bounds", product_bounds(self.up, self.qkv, attn.heads))
        qk_scale = [norm_scale(*both) for both in zip(*norms, strict=True)]
        self.register_buffer("qk_scale", torch.stack(qk_scale).to(device))

    def forward(self, hidden_states: Tensor, encoder_hidden_states: Tensor, temb: Tensor, image_rotary_emb=None,
                joint_attention_kwargs=None) -> tuple[Tensor, Tensor]:
        text, image, x, x_scale, descale, scales = self.first_adaln(encoder_hidden_states, hidden_states, temb, False)
        tokens = text.shape[1]
        attended = self.attend(self.project(x, x_scale, image_rotary_emb, descale, tokens, 2), descale, scales)
        y = products(cast_attention(attended, scales), scales, [0, 0], *self.out.operands(), tokens)
        text, image, x, x_scale, _, scales = residual_adaln(text, image, y, self.gates, temb, self.offsets, self.bounds,
                                                            self.qk_scale, MLP_SHIFT, MLP_SCALE, 1, False)
        hidden = gelu_product(x, x_scale, *self.up.operands(), scales, tokens, 2, 0)
        y = products(hidden, scales, [1, 2], *self.down.operands(), tokens)
        return self.last_sum(text, image, y, self.mlp_gates, temb)


class Modulations(torch.nn.Module):
    """In time_text_embed's place: a step's modulations of all blocks, (B, total) bf16, instead of the embedding that
    they follow from. Behind them the bounds of the modulated rows' lengths, and norm_out's scale and shift.

    The blocks' modulation Linears hold 3.2 B weights, and a step reads them for one row a batch item: 1.1 ms on an H100
    as one product, more as 76. All steps of an image have the same text and guidance and a timestep that the scheduler
    knows beforehand, so that `prepare` makes them all in one product of steps x B rows, which reads the weights once,
    before the first; `forward`, which a CUDA graph may record, only says where they are.
    """

    def __init__(self, embed: torch.nn.Module, doubles: list[torch.nn.Linear], singles: list[torch.nn.Linear],
                 last: torch.nn.Linear, device: torch.device):
        super().__init__()
        self.embed, self.last = embed, last
        self.doubles, self.singles, self.width = len(doubles), len(singles), last.in_features
        linears = [*doubles, *singles]
        rows = sum(linear.out_features for linear in linears)
        for name, shape, dtype in (("weight", (rows, self.width), E4M3), ("scale", (rows,), torch.float32),
                                   ("bias", (rows,), torch.bfloat16)):
            self.register_buffer(name, torch.empty(shape, dtype=dtype, device=device))
        at = 0
        for linear in linears:
            part, own = Float8Linear([linear], True, device), slice(at, at + linear.out_features)
            self.weight[own], self.scale[own], self.bias[own] = part.operands()
            at = own.stop
            linear.weight = linear.bias = None  # freed here, or there would be 3.2 GB of them twice for a while
        self.tables: list[tuple] = []  # (conditions, (steps, B, total)): one, or two with a negative prompt
        self.current: dict[int, Tensor] = {}  # by batch size: CUDA graphs hold their addresses
        self.batch = 0

    def forward(self, *_: Tensor) -> Tensor:
        return self.current[self.batch]

    @torch.no_grad()
    def prepare(self, timestep: Tensor, guidance: Tensor | None, pooled: Tensor, schedule: Tensor | None = None,
                now: Tensor | None = None) -> None:
        """Puts the modulations of a step where `forward` finds them.

        Args:
            timestep, guidance, pooled: the transformer's arguments, (B,), (B,) and (B, P).
            schedule: the scheduler's timesteps (steps,), if the step is one of a denoising loop; now: the one of them
                that it is, a view into it.
        """
        index = _index_in(schedule, now)
        if index is None:
            table = self.table(timestep[None], guidance, pooled)[0]
        else:
            of_this_loop = [entry for entry in self.tables if entry[0] is schedule]
            found = [made for _, own, text, made in of_this_loop if own is guidance and text is pooled]
            if not found:
                steps = schedule.to(timestep.dtype)[:, None].expand(-1, len(timestep)) / 1000
                found = [self.table(steps, guidance, pooled)]
                self.tables = [*of_this_loop, (schedule, guidance, pooled, found[0])]
            table = found[0][index]
        self.batch = len(timestep)
        if self.batch not in self.current:
            self.current[self.batch] = torch.empty_like(table)
        self.current[self.batch].copy_(table)

    def table(self, timesteps: Tensor, guidance: Tensor | None, pooled: Tensor) -> Tensor:
        """timesteps (steps, B): (steps, B, total), bf16."""
        steps, dtype = len(timesteps), pooled.dtype
        conditions = [timesteps.flatten(), *([guidance.repeat(steps)] if guidance is not None else [])]
        # As FluxTransformer2DModel.forward scales them, in the model's dtype.
        x = F.silu(self.embed(*(one.to(dtype) * 1000 for one in conditions), pooled.repeat(steps, 1)))
        made = self.product(x)
        at = self.doubles * 6 * self.width
        doubles = made[:, :at].view(len(x), self.doubles, 6, self.width).float()
        singles = made[:, at:].view(len(x), self.singles, 3, self.width).float()
        both = [row_length(doubles, *parts) for parts in ((SHIFT, SCALE), (MLP_SHIFT, MLP_SCALE))]
        lengths = [torch.stack(both, 2).flatten(1), row_length(singles, SHIFT, SCALE)]
        # bf16 rounds by up to 2^-9: up is safe. Each row of the table begins where 16 bytes can be loaded at once.
        lengths = (torch.cat(lengths, 1) * (1 + 2**-8)).to(made.dtype)
        lengths = F.pad(lengths, (0, -lengths.shape[1] % 16))
        return torch.cat([made, lengths, self.last(x).to(made.dtype)], dim=1).unflatten(0, (steps, -1))

    def product(self, x: Tensor) -> Tensor:
        """x (M, D) bf16, quantised by row: (M, total), bf16."""
        x8, scale = quantize_rows(x)
        if x.device.type == "cpu":
            return F.linear(x8.float() * scale[:, None], self.weight.float() * self.scale[:, None],
                            self.bias.float()).bfloat16()
        return torch._scaled_mm(x8, self.weight.t(), scale[:, None], self.scale[None], bias=self.bias,
                                out_dtype=torch.bfloat16, use_fast_accum=True)


def _index_in(schedule: Tensor | None, now: Tensor | None) -> int | None:
    """Which element of `schedule` the view `now` is, found without asking the GPU for its value."""
    if schedule is None or now is None or now.untyped_storage().data_ptr() != schedule.untyped_storage().data_ptr():
        return None
    return now.storage_offset() - schedule.storage_offset()


def row_length(modulations: Tensor, shift: int, scale: int) -> Tensor:
    """The bound sqrt(D) max|1 + scale| + |shift| of what LayerNorm and modulation make: (M, N, parts, D) -> (M, N)."""
    width = modulations.shape[-1]
    return width**0.5 * (1 + modulations[:, :, scale]).abs().amax(-1) + modulations[:, :, shift].norm(dim=-1)


class NormOut(torch.nn.Module):
    """diffusers' AdaLayerNormContinuous with scale and shift from the end of `Modulations`' table."""

    def __init__(self, norm: torch.nn.Module):
        super().__init__()
        self.norm = norm

    def forward(self, x: Tensor, table: Tensor) -> Tensor:
        scale, shift = table[:, None, -2 * x.shape[-1]:].chunk(2, dim=-1)
        return self.norm(x) * (1 + scale) + shift


class Rotation(torch.nn.Module):
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
def fuse_blocks(transformer: FluxTransformer2DModel, device: torch.device) -> int:
    """Puts the fused blocks in the place of diffusers', one after the other on `device`, freeing theirs. Afterwards
    `follow_schedule` has to be called.

    For a transformer with fused projections, LoRA included, and nothing quantised.

    Returns:
        The number of Linears in e4m3.
    """
    if device.type == "cuda":
        use_torch_memory(device)
    width, double, single = transformer.inner_dim, transformer.transformer_blocks, transformer.single_transformer_blocks
    doubles = [linear for block in double for linear in (block.norm1_context.linear, block.norm1.linear)]
    singles = [block.norm.linear for block in single]
    first_single = 6 * width * len(doubles)
    lengths = first_single + 3 * width * len(singles)
    for i, block in enumerate(double):
        double[i] = FusedDoubleBlock(block, 12 * width * i, 12 * width * i + 6 * width, lengths + 4 * i,
                                     lengths + 4 * i + 2, device)
    for i, block in enumerate(single):
        single[i] = FusedSingleBlock(block, first_single + 3 * width * i, lengths + 2 * len(doubles) + i, device)
    embed, norm_out = transformer.time_text_embed, transformer.norm_out
    transformer.time_text_embed = Modulations(embed, doubles, singles, norm_out.linear, device)
    transformer.norm_out = NormOut(norm_out.norm)
    transformer.pos_embed = Rotation(transformer.pos_embed)
    return len(doubles) + len(singles) + sum(module.count for module in transformer.modules()
                                             if isinstance(module, Float8Linear))


def leave_sums(transformer: FluxTransformer2DModel, first: int = 0, last: int = 0) -> None:
    """Has every fused block leave its last sum to the next, but for the last one and for those whose sums a step cache
    reads: the last of the `first` blocks, and the last one before the `last` blocks."""
    blocks = [*transformer.transformer_blocks, *transformer.single_transformer_blocks]
    for count, block in enumerate(blocks, 1):
        block.leaves_sum = count not in (first, len(blocks) - last, len(blocks))


def drop_unread(pipeline) -> None:
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
    pipeline.transformer.single_transformer_blocks[-1].drops_unread = True
    pipeline.transformer.register_forward_pre_hook(before, with_kwargs=True)


def share_attention(transformer: FluxTransformer2DModel, kind: str, gpus: int, device: torch.device) -> str:
    """Has every fused block attend to the tokens of all GPUs; see `utils.parallel`. Returns what there is to say."""
    boxes = None
    if kind == "ulysses" and device.type == "cuda":
        from utils.peer_memory import mailboxes
        boxes = mailboxes()
    for block in (*transformer.transformer_blocks, *transformer.single_transformer_blocks):
        block.context_parallel, block.parts, block.boxes = kind, gpus if kind == "ulysses" else 1, boxes
    return ", through each other's memory" if boxes else ""


def follow_schedule(pipeline) -> RemovableHandle:
    """Has `Modulations` prepared before each call of the pipeline's transformer, whatever else is put around it, until
    the handle is removed."""
    modulations = pipeline.transformer.time_text_embed

    def before(module, args, kwargs):
        modulations.prepare(kwargs["timestep"], kwargs.get("guidance"), kwargs["pooled_projections"],
                            pipeline.scheduler.timesteps, getattr(pipeline, "_current_timestep", None))

    return pipeline.transformer.register_forward_pre_hook(before, with_kwargs=True)
