"""TaylorSeer over whole steps: some steps compute the transformer, and the other steps extrapolate its output.

The formula and the schedule are those of diffusers' TaylorSeerCache with `use_lite_mode`
(https://huggingface.co/papers/2503.06923). diffusers extrapolates inside each block; this module extrapolates the
output of the transformer. So a computed step stays one CUDA graph, and an extrapolated step is a few sums over earlier
outputs. No residuals are compared, and the CPU does not wait for the GPU.
"""

from dataclasses import dataclass
from math import factorial

import torch
from torch import Tensor

from utils.common import RecipeError
from utils.cuda_graph import ModuleProxy
from utils.tasks import current_step

WARM_UP = 6  # the first steps lay out the picture, so they are computed, as in the presets of the step cache


@dataclass(frozen=True)
class TaylorSeer:
    """The schedule: the first `WARM_UP` steps, then every `interval`-th step, and the last step are computed.

    The other steps are extrapolated by a polynomial of degree `order`.
    """
    interval: int = 3
    order: int = 2

    def mask(self, steps: int) -> str:
        """One character per step: 1 for a computed step, 0 for an extrapolated step."""
        computed = (step < WARM_UP or (step - WARM_UP - 1) % self.interval == 0 or step == steps - 1
                    for step in range(steps))
        return "".join("1" if computes else "0" for computes in computed)

    def check(self, steps: int) -> None:
        """Refuses an image of so few steps that none would be extrapolated.

        Args:
            steps: the number of denoising steps of the image.

        Raises:
            RecipeError: the mask has no 0.
        """
        if "0" not in self.mask(steps):
            raise RecipeError(
                f"--step_cache taylorseer computes the first {WARM_UP} steps and the last step, and the image takes "
                f"{steps} steps: no step would be extrapolated. Drop --step_cache (it gains nothing in schnell's 4 "
                "steps), or use a model of more steps.")


class TaylorSeerTransformer(ModuleProxy):
    """A pipeline's transformer that computes only the steps of a mask and extrapolates the others.

    The scheduler's counter, which is on the CPU, gives the step. True classifier-free guidance makes two calls per
    step. The address of the prompt's tensor distinguishes them, since it is the same in all steps of an image. Step 0
    clears the series of the previous image, so an interrupted image does not affect the next one.

    Args:
        transformer: a module that is called by keywords with `return_dict=False`, as FLUX's pipelines do.
        scheduler: the pipeline's scheduler.
        mask: a string with 1 for each step to compute. Steps beyond its end, and steps of a prompt without a computed
            step, are computed too. The attribute `mask` may be replaced between two images.
        order: the largest degree of the polynomial. The degree is lower until order + 1 steps have been computed.
    """

    def __init__(self, transformer: torch.nn.Module, scheduler, mask: str, order: int):
        super().__init__(transformer)
        self.scheduler, self.mask, self.order = scheduler, mask, order
        self.step, self.series, self.extrapolated = 0, {}, []

    def forward(self, **kwargs) -> tuple[Tensor]:
        """Computes or extrapolates one step.

        Args:
            kwargs: the arguments of FluxTransformer2DModel.forward, with `return_dict=False`. The `data_ptr()` of
                `encoder_hidden_states` (B, T, E) is the key of the call's `_Series`, so the tensor must stay the same
                in all steps of an image.

        Returns:
            (sample,), of shape (B, S, C), in the dtype of the transformer's output.
        """
        last, self.step = self.step, current_step(self.scheduler)
        step, call = self.step, kwargs["encoder_hidden_states"].data_ptr()
        if step == 0:
            if last:
                self.series.clear()
            self.series[call], self.extrapolated = _Series(self.order), []
        series = self.series.setdefault(call, _Series(self.order))
        if self.mask[step:step + 1] == "0" and series.factors:
            if step not in self.extrapolated:  # the first of two calls added it
                self.extrapolated.append(step)
            return series.at(step),
        sample, = self.module(**kwargs)
        series.add(step, sample)
        return sample,


class _Series:
    """The outputs of one call in the computed steps, as float32 estimates of a Taylor series around the last of them.

    `factors[k]` estimates the k-th derivative of the output by the step; `factors[0]` is the last output.
    """

    def __init__(self, order: int):
        self.order, self.step, self.factors = order, 0, []

    def add(self, step: int, sample: Tensor) -> None:
        """Adds the output of a computed step.

        With n steps since the previous computed step: f_0 = sample, f_k = (f_(k-1) - previous f_(k-1)) / n.

        Args:
            step: the index of the step, which increases from call to call.
            sample: (B, S, C), any floating-point dtype.
        """
        if self.factors and step == self.step:  # the negative prompt equals the prompt, and so do their outputs
            return
        factors = [sample.float()]
        for before in self.factors[:self.order]:
            factors.append((factors[-1] - before) / (step - self.step))
        self.step, self.factors, self.dtype = step, factors, sample.dtype

    def at(self, step: int) -> Tensor:
        """Extrapolates to `step`, n steps after the last computed step, by the Taylor series sum_k f_k n^k / k!.

        Returns:
            (B, S, C), in the dtype of the samples.
        """
        away = step - self.step
        return sum(factor * (away ** k / factorial(k)) for k, factor in enumerate(self.factors)).to(self.dtype)
