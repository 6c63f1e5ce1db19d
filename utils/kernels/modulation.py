"""The modulations of a whole image in one GEMM, and the quantized Linears of the fused blocks.

The two belong together: the gates in the table of modulations include the column scales of gated e4m3 Linears.
"""

import copy

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.hooks import RemovableHandle

from utils.kernels.formats import E4M3, EPS, STREAM, quantize_rows
from utils.tasks import current_timestep

# The parts of a modulation, in the order of diffusers' AdaLayerNormZero. AdaLayerNormZeroSingle has the first three.
SHIFT, SCALE, GATE, MLP_SHIFT, MLP_SCALE, MLP_GATE = range(6)


class QuantizedLinear(torch.nn.Module):
    """One or more Linears of one shape: their weights stacked as e4m3 or int8 (N, K) with per-row scales, and biases.

    Args:
        weights: (N, K) float32 each.
        biases: (N,) float32 each.
        gated: whether the residual kernel reads the result.
        int8: the format. `fp8_gemm` leaves the scales of a gated Linear to the residual kernel, which multiplies by
            gates that include them (see `Modulations`). The scales are then powers of two, and the biases are divided
            by them. `int8_gemm` applies the scales itself, since powers of two would cost int8 a bit.
        shifted_from: the first input column to which `int8_gemm`'s zero point applies (None: none).
    """

    def __init__(self, weights: list[Tensor], biases: list[Tensor], gated: bool = False, int8: bool = False,
                 shifted_from: int | None = None):
        super().__init__()
        self.count, self.scaled_by_gate = len(weights), gated and not int8
        parts = [quantize_rows(weight, powers=self.scaled_by_gate, int8=int8) for weight in weights]
        self.register_buffer("weight", torch.cat([weight for weight, _ in parts]))
        self.register_buffer("scale", torch.cat([scale for _, scale in parts]))
        bias = torch.cat(biases)
        self.register_buffer("bias", (bias / self.scale if self.scaled_by_gate else bias).bfloat16())
        if gated and int8:
            start = self.weight.shape[1] if shifted_from is None else shifted_from
            self.register_buffer("sums", self.weight[:, start:].sum(1, dtype=torch.float32))

    def operands(self) -> tuple[Tensor, Tensor, Tensor]:
        """Weights (count * N, K) e4m3 or int8, scales (count * N,) float32 and biases (count * N,) bf16."""
        return self.weight, self.scale, self.bias

    def gate_factors(self) -> tuple[Tensor, ...]:
        """What the gates must include for each Linear, (N,) float32: its scales, or ones."""
        return (self.scale if self.scaled_by_gate else torch.ones_like(self.scale)).chunk(self.count)


@torch.no_grad()
def typical_conditions(embed: torch.nn.Module, device: torch.device) -> Tensor:
    """The conditions of four noise levels without a text, which the modulation Linears take: (4, D), after SiLU.

    Args:
        embed: diffusers' time_text_embed. It may be on another device.
        device: where the result is computed, so that its bits do not depend on where the weights were loaded.
    """
    embed = copy.deepcopy(embed).to(device)
    weight = embed.timestep_embedder.linear_1.weight
    timesteps = torch.tensor([1000., 750., 500., 250.], device=device, dtype=weight.dtype)
    guidance = [torch.full_like(timesteps, 3500)] if hasattr(embed, "guidance_embedder") else []
    text = timesteps.new_zeros(len(timesteps), embed.text_embedder.linear_1.in_features)
    return F.silu(embed(timesteps, *guidance, text))


@torch.no_grad()
def typical_modulation(conditions: Tensor, linear: torch.nn.Linear, parts: int) -> Tensor:
    """How strongly a modulation scales and shifts each channel, over the noise levels and without a text.

    Args:
        conditions: from `typical_conditions`. The result is computed on their device.
        linear: a modulation Linear, from D to parts * D.
        parts: 3 or 6.

    Returns:
        (parts / 3, D) float32: for each pair of scale and shift the root mean square of both.
    """
    found = F.linear(conditions, *(None if one is None else one.to(conditions.device)
                                   for one in (linear.weight, linear.bias)))
    found = found.float().unflatten(1, (parts // 3, 3, -1))
    return (found[:, :, SHIFT].square() + (1 + found[:, :, SCALE]).square()).mean(0).sqrt()


class Modulations(torch.nn.Module):
    """Takes the place of time_text_embed: returns a step's modulations of all blocks instead of the embedding behind
    them.

    **Contents.** The table is (B, total) bf16. Each double block has text's six parts and image's six parts, each
    single block has three parts, in the order of the blocks. Each part has D values. norm_out's scale and shift, D
    values each, come last. The table holds 1 + scale in place of scale, except norm_out's.

    **Factors.** Each part is multiplied by the block's factors, which are powers of two. Shift and scale are multiplied
    by the numbers that the columns of the next weights were divided by (`column_powers`). Each gate is multiplied by
    the scales of the e4m3 weight whose result it multiplies (`QuantizedLinear`).

    **Speed.** The modulation Linears of all blocks hold 3.2 billion weights, and a step reads them for one row per
    batch item. This takes 1.1 ms on an H100 as one GEMM in e4m3, and more as 76 GEMMs. All steps of an image share the
    text and the guidance, and the scheduler knows the timesteps beforehand. `prepare` therefore computes the tables of
    all steps before the first step, in one GEMM of steps * B rows that reads the weights once. `forward`, which a CUDA
    graph may record, only returns the table.

    Args:
        embed: diffusers' time_text_embed.
        doubles, singles: the modulation Linears in the order of the blocks, text's before image's, each with its
            factors (parts, D) float32. Their weights are freed.
        last: norm_out's Linear.
        device: where the table and the weights will be.
        in_float8: store the weights in e4m3, 3.2 GB, instead of bf16, which takes 6.4 GB and 0.5 ms more per image.
            e4m3 costs accuracy: these values multiply every token of every block.
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
            self.put(at, linear, factors)
            at += linear.out_features
            linear.weight = linear.bias = None  # freed here: otherwise memory would briefly hold all weights twice
        # The tables of the current image: schedule, guidance, pooled text, (steps, B, total). A negative prompt adds a
        # second entry.
        self.tables: list[tuple] = []
        self.current: dict[int, Tensor] = {}  # batch size -> table; fixed addresses, which CUDA graphs hold
        self.batch = 0

    @torch.no_grad()
    def put(self, at: int, linear: torch.nn.Linear, factors: Tensor) -> None:
        """Writes a block's modulation Linear in its place, in the dtype of all.

        Args:
            at: the place, which is the block's offset in a row of the table.
            linear: from D to parts * D. factors: (parts, D) float32.
        """
        own, parts, device = slice(at, at + linear.out_features), len(factors), self.weight.device
        # A factor is a power of two, so it does not round the weights.
        weight = linear.weight.detach().to(device).unflatten(0, (parts, -1))
        weight = (weight * factors[:, :, None].to(weight.dtype)).flatten(0, 1)
        bias = torch.zeros(len(weight), device=device) if linear.bias is None else linear.bias.detach()
        bias = bias.to(device, torch.float32, copy=True).view(parts, -1)
        # 1 + scale is rounded once, as a sum. Near zero, bf16 keeps eight bits of the sum, not eight bits of 1.
        bias[SCALE::3] += 1
        if self.in_float8:
            weight, self.scale[own] = quantize_rows(weight)
        self.weight[own], self.bias[own] = weight, (bias * factors).flatten()

    def forward(self, *_: Tensor) -> Tensor:
        """The table of the step that `prepare` was last called for.

        Args:
            _: the arguments of time_text_embed (timestep, guidance, pooled text), ignored.

        Returns:
            (B, total) bf16. For each batch size, the address is always the same.
        """
        return self.current[self.batch]

    @torch.no_grad()
    def prepare(self, timestep: Tensor, guidance: Tensor | None, pooled: Tensor, schedule: Tensor | None = None,
                now: Tensor | None = None) -> None:
        """Puts the modulations of a step where `forward` finds them.

        Args:
            timestep, guidance, pooled: the transformer's arguments, (B,), (B,) or None, and (B, P).
            schedule: the scheduler's timesteps (steps,), or None if the step does not belong to a denoising loop.
            now: the timestep of this step, a view into `schedule`. If it is no such view, only this step is computed.
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
        """The tables of several steps.

        Args:
            timesteps: (steps, B), as the transformer takes them: the scheduler's timestep divided by 1000.
            guidance: (B,) or None. pooled: (B, P), in the model's dtype.

        Returns:
            (steps, B, total) bf16.
        """
        steps, dtype = len(timesteps), pooled.dtype
        conditions = [timesteps.flatten(), *([guidance.repeat(steps)] if guidance is not None else [])]
        # FluxTransformer2DModel.forward scales timestep and guidance in the same way, in the model's dtype.
        x = F.silu(self.embed(*(one.to(dtype) * 1000 for one in conditions), pooled.repeat(steps, 1)))
        return torch.cat([self.gemm(x), self.last(x).to(torch.bfloat16)], dim=1).unflatten(0, (steps, -1))

    def gemm(self, x: Tensor) -> Tensor:
        """The modulations of the blocks, without norm_out's.

        Args:
            x: (M, D) bf16, after SiLU. With e4m3 weights, it is quantized per row.

        Returns:
            (M, total - 2 D) bf16.
        """
        # 32 rows at a time limit the float32 results to 0.2 GB.
        return torch.cat([(self._gemm(rows).float() + self.bias).bfloat16() for rows in x.split(32)])

    def _gemm(self, x: Tensor) -> Tensor:
        """x (M, D) bf16 times the blocks' weights, without bias: float32, but bf16 if CUDA multiplies e4m3."""
        if not self.in_float8:
            if x.device.type == "cpu":
                return F.linear(x.float(), self.weight.float())
            # float32, so that nothing is rounded before the bias, which includes the 1 of 1 + scale, is added.
            return torch.mm(x.to(self.weight.dtype), self.weight.t(), out_dtype=torch.float32)
        x8, scale = quantize_rows(x)
        if x.device.type == "cpu":
            return F.linear(x8.float() * scale[:, None], self.weight.float() * self.scale[:, None])
        return torch._scaled_mm(x8, self.weight.t(), scale[:, None], self.scale[None], out_dtype=torch.bfloat16,
                                use_fast_accum=True)


def _index_in(schedule: Tensor | None, now: Tensor | None) -> int | None:
    """The index of the element of `schedule` that the view `now` is; None if `now` is no such view.

    The function compares addresses, so it need not wait for the GPU to report a value.
    """
    if schedule is None or now is None or now.untyped_storage().data_ptr() != schedule.untyped_storage().data_ptr():
        return None
    return now.storage_offset() - schedule.storage_offset()


class NormOut(torch.nn.Module):
    """diffusers' AdaLayerNormContinuous for the residual stream. Scale and shift come from the end of `Modulations`'
    table."""

    def forward(self, x: Tensor, table: Tensor) -> Tensor:
        """LayerNorm without weights, then x (1 + scale) + shift.

        Args:
            x: (B, S, D) fp16, the residual stream as `to_stream` stores it.
            table: (B, total) bf16, see `Modulations`. The last 2 D columns are scale and shift.

        Returns:
            (B, S, D) bf16.
        """
        width = x.shape[-1]
        scale, shift = table[:, None, -2 * width:].chunk(2, dim=-1)
        # LayerNorm cancels the division by STREAM, except in its epsilon.
        return torch.addcmul(shift, F.layer_norm(x, (width,), eps=EPS / STREAM**2).to(table.dtype), 1 + scale)


def attach_modulation_hook(pipeline) -> RemovableHandle:
    """Makes every call of the pipeline's transformer call `Modulations.prepare` first.

    The hook sits on the module that is the pipeline's transformer now. Other modules may wrap it, before or after.

    Args:
        pipeline: its transformer has fused blocks.

    Returns:
        A handle; `remove()` ends the preparation.
    """
    modulations = pipeline.transformer.time_text_embed

    def before(module, args, kwargs):
        modulations.prepare(kwargs["timestep"], kwargs.get("guidance"), kwargs["pooled_projections"],
                            pipeline.scheduler.timesteps, current_timestep(pipeline))

    return pipeline.transformer.register_forward_pre_hook(before, with_kwargs=True)
