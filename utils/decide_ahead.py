"""A step cache's decision without a wait for the GPU: by the residual of the step before.

cache-dit compares a step's residual of the first blocks with the last computed step's and reads the number, while the
GPU has nothing to do until what follows arrives. Here each step's comparison goes to the CPU while the GPU goes on, and
is read in the next step. Residuals move from step to step by about as much, and away from the last computed one about
in proportion to the steps since, so that what was measured d away from a computed step gives

    predicted difference = measured difference / d * steps since the last computed one

How near that comes: the residual differences of the rows `ahead_*` and `cache_*` of results/cpu/tiny.
"""

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor


@dataclass
class _Past:
    """What is known of an image's steps so far, of one of the calls of the transformer in a step."""
    computed: int = 0  # the last computed step
    distance: int = 0  # from the computed step to the measured one
    difference: Tensor | None = None  # measured, on the CPU as soon as `arrived` says so
    arrived: torch.cuda.Event | None = None

    def measure(self, before: Tensor, now: Tensor, step: int, shared: bool) -> None:
        """Starts to measure mean |now - before| over mean |before|, as cache-dit does, for `predict`."""
        change, size = (now - before).abs().mean(), before.abs().mean()
        if shared:
            for mean in (change, size):
                dist.all_reduce(mean, op=dist.ReduceOp.AVG)
        # Pinned, as PyTorch makes the result of a copy to the CPU that nobody waits for.
        self.difference, self.distance = (change / size).to("cpu", non_blocking=True), step - self.computed
        if now.is_cuda:
            self.arrived = torch.cuda.Event()
            self.arrived.record()

    def predict(self, step: int) -> float | None:
        """This step's difference, or None if none has been measured yet."""
        if self.difference is None:
            return None
        if self.arrived:
            # Behind it the GPU has the rest of the last step to do, unless that was cached, and the start of this one.
            self.arrived.synchronize()
        return self.difference.item() / self.distance * (step - self.computed)


def decide_ahead(manager, mask: str, shared: bool) -> None:
    """Lets cache-dit's context manager (1.5.3) decide by predicted differences. What it records as a step's residual
    difference is then the predicted one; a step before which nothing could be measured is computed.

    Args:
        mask: the steps computation mask, 1 for a step that is computed whatever it says; empty: none.
        shared: each process has its part of an image's tokens, and all decide by the mean of their residuals.
    """
    pasts: dict[bool, _Past] = {}
    can_cache = manager.can_cache

    def decide(before: Tensor, now: Tensor, *, threshold: float, **_) -> bool:
        predicted = pasts[manager.is_separate_cfg_step()].predict(manager.get_current_step())
        if predicted is None:
            return False
        manager.add_residual_diff(predicted)
        return predicted < threshold

    def decide_and_measure(residual: Tensor, prefix: str = "Fn", **kwargs) -> bool:
        step, call = manager.get_current_step(), manager.is_separate_cfg_step()
        if step == 0:
            pasts[call] = _Past()
        past = pasts[call]
        cached = can_cache(residual, prefix=prefix, **kwargs)
        if step and (not mask or mask[step + 1:step + 2] == "0"):  # the next step may ask
            past.measure(manager.get_Fn_buffer(prefix), residual, step, shared)
        if not cached:
            past.computed = step
        return cached

    manager.similarity, manager.can_cache = decide, decide_and_measure
