"""A whole image's modulations in one GEMM, and the e4m3 Linears whose weights they are scaled for."""

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.hooks import RemovableHandle

from utils.kernels.fused_kernels import E4M3, EPS, STREAM, quantize_rows

# The parts of a modulation, in the order of diffusers' AdaLayerNormZero; AdaLayerNormZeroSingle has the first three.
SHIFT, SCALE, GATE, MLP_SHIFT, MLP_SCALE, MLP_GATE = range(6)


class Float8Linear(torch.nn.Module):
    """Weights of Linears of one shape, one below the other, as e4m3 (N, K) with one scale a row, and biases.

    Args:
        weights: (N, K) float32 each; biases: (N,) each.
        gated: the kernel of the residual reads the result, and multiplies it by a gate that has the scale in it already
            (see `Modulations`). Scales are powers of two then, and biases are divided by them.
    """

    def __init__(self, weights: list[Tensor], biases: list[Tensor], gated: bool = False):
        super().__init__()
        self.count = len(weights)
        parts = [quantize_rows(weight, powers=gated) for weight in weights]
        self.register_buffer("weight", torch.cat([weight for weight, _ in parts]))
        self.register_buffer("scale", torch.cat([scale for _, scale in parts]))
        bias = torch.cat(biases)
        self.register_buffer("bias", (bias / self.scale if gated else bias).bfloat16())

    def operands(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.weight, self.scale, self.bias

    def scales(self) -> tuple[Tensor, ...]:
        """(N,) of each Linear."""
        return self.scale.chunk(self.count)


class Modulations(torch.nn.Module):
    """In time_text_embed's place: a step's modulations of all blocks, (B, total) bf16, instead of the embedding that
    they follow from. It holds 1 + scale for scale. Each part is multiplied by the block's factors, powers of two: shift
    and scale by what the next weights' columns were divided by (`column_powers`), each gate by the scales of the weight
    whose result it multiplies (`Float8Linear`). Behind them lie norm_out's scale and shift.

    The blocks' modulation Linears hold 3.2 B weights, and a step reads them for one row a batch item: 1.1 ms on an H100
    as one GEMM in e4m3, more as 76. All steps of an image have the same text and guidance and a timestep that the
    scheduler knows beforehand. `prepare` therefore makes them all before the first step, in one GEMM of steps x B rows
    that reads the weights once; `forward`, which a CUDA graph may record, only says where they are.

    Args:
        doubles, singles: the modulation Linears in the order of the blocks, text's before image's, each with its
            factors, (parts, D).
        in_float8: the weights in e4m3, 3.2 GB, and not in bf16, 6.4 GB and 0.5 ms more an image. e4m3 costs accuracy:
            every token of every block is multiplied by these values.
    """

    def __init__(self, embed: torch.nn.Module, doubles: list[tuple], singles: list[tuple], last: torch.nn.Linear,
                 device: torch.device, in_float8: bool):
        super().__init__()
        self.embed, self.last, self.in_float8 = embed, last, in_float8
        self.doubles, self.singles, self.width = len(doubles), len(singles), last.in_features
        linears = [*doubles, *singles]
        rows = sum(linear.out_features for linear, _ in linears)
        self.register_buffer("weight", torch.empty(rows, self.width, dtype=E4M3 if in_float8 else torch.bfloat16,
                                                   device=device))
        self.register_buffer("scale", torch.ones(rows if in_float8 else 1, device=device))
        self.register_buffer("bias", torch.empty(rows, device=device))
        at = 0
        for linear, factors in linears:
            own, parts = slice(at, at + linear.out_features), len(factors)
            # Nothing is rounded by a power of two.
            weight = linear.weight.detach().to(device).unflatten(0, (parts, -1))
            weight = (weight * factors[:, :, None].to(weight.dtype)).flatten(0, 1)
            bias = torch.zeros(len(weight)) if linear.bias is None else linear.bias.detach()
            bias = bias.to(device, torch.float32, copy=True).view(parts, -1)
            # 1 + scale is rounded as a whole: where it is near zero, bf16 keeps eight bits of it and not of 1.
            bias[SCALE::3] += 1
            if in_float8:
                weight, self.scale[own] = quantize_rows(weight)
            self.weight[own], self.bias[own] = weight, (bias * factors).flatten()
            at = own.stop
            linear.weight = linear.bias = None  # freed here, or there would be all of them twice for a while
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
        return torch.cat([self.gemm(x), self.last(x).to(torch.bfloat16)], dim=1).unflatten(0, (steps, -1))

    def gemm(self, x: Tensor) -> Tensor:
        """x (M, D) bf16, in e4m3 quantized by row: (M, blocks' modulations), bf16."""
        # 32 rows at a time, whose float32 results are 0.2 GB.
        return torch.cat([(self._gemm(rows).float() + self.bias).bfloat16() for rows in x.split(32)])

    def _gemm(self, x: Tensor) -> Tensor:
        if not self.in_float8:
            if x.device.type == "cpu":
                return F.linear(x.float(), self.weight.float())
            # Not rounded to bf16 before 1 is added, as said above.
            return torch.mm(x.to(self.weight.dtype), self.weight.t(), out_dtype=torch.float32)
        x8, scale = quantize_rows(x)
        if x.device.type == "cpu":
            return F.linear(x8.float() * scale[:, None], self.weight.float() * self.scale[:, None])
        return torch._scaled_mm(x8, self.weight.t(), scale[:, None], self.scale[None], out_dtype=torch.bfloat16,
                                use_fast_accum=True)


def _index_in(schedule: Tensor | None, now: Tensor | None) -> int | None:
    """Which element of `schedule` the view `now` is, found without asking the GPU for its value."""
    if schedule is None or now is None or now.untyped_storage().data_ptr() != schedule.untyped_storage().data_ptr():
        return None
    return now.storage_offset() - schedule.storage_offset()


class NormOut(torch.nn.Module):
    """diffusers' AdaLayerNormContinuous of the residual stream, with scale and shift from the end of `Modulations`'
    table."""

    def forward(self, x: Tensor, table: Tensor) -> Tensor:
        """x (B, S, D) of the stream, table (B, *) bf16: (B, S, D) bf16."""
        width = x.shape[-1]
        scale, shift = table[:, None, -2 * width:].chunk(2, dim=-1)
        # LayerNorm undoes the stream's scale, all but its epsilon.
        return torch.addcmul(shift, F.layer_norm(x, (width,), eps=EPS / STREAM**2).to(table.dtype), 1 + scale)


def attach_modulation_hook(pipeline) -> RemovableHandle:
    """Has `Modulations` prepared before each call of the pipeline's transformer, whatever else is put around it, until
    the handle is removed."""
    modulations = pipeline.transformer.time_text_embed

    def before(module, args, kwargs):
        modulations.prepare(kwargs["timestep"], kwargs.get("guidance"), kwargs["pooled_projections"],
                            pipeline.scheduler.timesteps, getattr(pipeline, "_current_timestep", None))

    return pipeline.transformer.register_forward_pre_hook(before, with_kwargs=True)
