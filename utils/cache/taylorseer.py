"""TaylorSeer over whole steps: the transformer is computed in some of them and its result extrapolated in the others.

What diffusers' TaylorSeerCache does with `use_lite_mode` (https://huggingface.co/papers/2503.06923), by its formula and
its schedule, but around the transformer and not inside each block: a computed step stays one CUDA graph, and an
extrapolated one is a handful of sums over what the transformer gave. Nothing is compared; nothing waits for the GPU.
"""

from dataclasses import dataclass
from math import factorial

import torch
from torch import Tensor

from utils.common import RecipeError
from utils.cuda_graph import ModuleProxy

WARM_UP = 6  # steps in which the picture is laid out, as in the step cache's presets


@dataclass(frozen=True)
class TaylorSeer:
    """Which steps are computed: the first `WARM_UP`, then every `interval`-th, and the last. The others are
    extrapolated by a polynomial of `order`."""
    interval: int = 3
    order: int = 2

    def mask(self, steps: int) -> str:
        """One character a step: 1 computed, 0 extrapolated."""
        computed = (step < WARM_UP or (step - WARM_UP - 1) % self.interval == 0 or step == steps - 1
                    for step in range(steps))
        return "".join("1" if computes else "0" for computes in computed)

    def check(self, steps: int) -> None:
        """Refuses what would extrapolate nothing."""
        if "0" not in self.mask(steps):
            raise RecipeError(
                f"--step_cache taylorseer computes the first {WARM_UP} steps and the last, and the image takes "
                f"{steps}: nothing could be extrapolated. Drop it (for schnell's 4 steps there is nothing to gain), or "
                "use a model of more steps.")


class TaylorSeerTransformer(ModuleProxy):
    """A pipeline's transformer, computed in the steps of a mask alone.

    Which step it is the scheduler says, whose counter is on the CPU; which of two calls a step (true classifier-free
    guidance) is known by the prompt's tensor, the same in all steps of an image. So an image that was broken off
    disturbs no other.

    Args:
        transformer: called by keywords, with `return_dict=False`, as FLUX's pipelines do.
        scheduler: the pipeline's.
        mask: 1 for a step to compute. Also computed are steps beyond it, and those of a prompt that is not known yet.
        order: of the polynomial, at most: fewer as long as not enough steps have been computed.
    """

    def __init__(self, transformer: torch.nn.Module, scheduler, mask: str, order: int):
        super().__init__(transformer)
        self.scheduler, self.mask, self.order = scheduler, mask, order
        self.step, self.series, self.extrapolated = 0, {}, []

    def forward(self, **kwargs) -> tuple[Tensor]:
        last, self.step = self.step, self.scheduler.step_index or 0
        step, call = self.step, kwargs["encoder_hidden_states"].data_ptr()
        if step == 0:
            if last:
                self.series.clear()
            self.series[call], self.extrapolated = _Series(self.order), []
        series = self.series.setdefault(call, _Series(self.order))
        if self.mask[step:step + 1] == "0" and series.factors:
            if step not in self.extrapolated:  # by the first of two calls
                self.extrapolated.append(step)
            return series.at(step),
        sample, = self.module(**kwargs)
        series.add(step, sample)
        return sample,


class _Series:
    """What one call gave in the computed steps, as divided differences in float32: the last result, and estimates of
    its derivatives by the step."""

    def __init__(self, order: int):
        self.order, self.step, self.factors = order, 0, []

    def add(self, step: int, sample: Tensor) -> None:
        if self.factors and step == self.step:  # a negative prompt that is the prompt: the same result once more
            return
        factors = [sample.float()]
        for before in self.factors[:self.order]:
            factors.append((factors[-1] - before) / (step - self.step))
        self.step, self.factors, self.dtype = step, factors, sample.dtype

    def at(self, step: int) -> Tensor:
        away = step - self.step
        return sum(factor * (away ** k / factorial(k)) for k, factor in enumerate(self.factors)).to(self.dtype)
