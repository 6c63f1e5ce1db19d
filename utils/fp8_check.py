"""The fp8 check: every start compares denoising steps in fp8 with the same steps in bf16.

fp8 that is accurate on one checkpoint may fail on another, because the activations have other outliers. A picture alone
does not show the failure. The reference is the loaded model in bf16 on the inputs of the real call. The check compares
two steps, the first and one from the middle of the schedule:

* The quantized blocks compute both steps, before the blocks are compiled, recorded as CUDA graphs or cached.
* The finished recipe computes the first step once more in its warm-up, unless a step cache or a batch gives the
  warm-up other inputs.
"""

import sys
from contextlib import contextmanager

import torch
from torch import Tensor

from utils.benchmark_utils import steps_that_compute_two
from utils.common import RecipeError

# The largest relative error of a step that passes. On full-width weights with the distribution of trained weights
# (bench/trained_like.py), a step of an accurate recipe differs by 1 to 12 %: results/h200/2026-11/fp8_error. Fused
# per-tensor scales, derived from bounds, failed with 21 to 34 %. tiny-flux has short rows, and its steps amplify
# earlier errors: its pictures are right with up to 18 %.
BOUND = 0.2
# Flags that replace each lossy technique, the cheapest first. {without} names given flags that win over --quality.
CURES = {"fp8": "--quality high{without} (int8 and bf16 in place of fp8)",
         "fused": "--disable_fused_kernels (quantization by torchao)",
         "fp8 attention": "--attention_backend fa3_bf16 (attention in bf16)",
         "any": "--quality exact{without} (no quantization, attention in bf16)"}


class Fp8Check:
    """Holds the bf16 reference steps of a pipeline, and the errors of the steps measured since.

    Args:
        pipeline: the loaded pipeline, with its unquantized transformer on the GPU.
        kwargs: the arguments of a pipeline call that makes one image.
    """

    def __init__(self, pipeline, kwargs: dict):
        calls = []

        def keep(module, args, named, output):
            calls.append(({name: value.clone() if isinstance(value, Tensor) else value
                           for name, value in named.items()}, output[0].clone()))

        handle = pipeline.transformer.register_forward_hook(keep, with_kwargs=True)
        try:
            steps = steps_that_compute_two(kwargs.get("strength"))
            pipeline(**kwargs | dict(num_inference_steps=steps, output_type="latent"))
        finally:
            handle.remove()
        self.tokens = (kwargs["height"] // 16) * (kwargs["width"] // 16)
        # True classifier-free guidance makes two calls per step. Both indices below are the first call of their step.
        self.steps = {"first": calls[0], "middle": calls[len(calls) // 2]}
        self.errors: dict[str, float] = {}

    def measure(self, transformer: torch.nn.Module) -> None:
        """Measures both steps of a transformer that is quantized and not yet compiled."""
        for name, (inputs, expected) in self.steps.items():
            self._compare(name, run_step(transformer, inputs), expected)

    @contextmanager
    def measure_next_call(self, transformer: torch.nn.Module):
        """Measures the finished recipe: the next call of `transformer` gets the first step's inputs, not its own.

        A call with inputs of another shape keeps its own inputs, and is not measured.
        """
        inputs, expected = self.steps["first"]
        replaced = {name: inputs[name] for name in ("hidden_states", "encoder_hidden_states")}
        handles = []

        def before(module, args, kwargs):
            same = all(kwargs[name].shape == value.shape for name, value in replaced.items())
            return (args, kwargs | replaced) if same and handles else None

        def after(module, args, kwargs, output):
            if handles and kwargs["hidden_states"] is replaced["hidden_states"]:
                self._compare("finished", output[0], expected)
            while handles:
                handles.pop().remove()

        handles += [transformer.register_forward_pre_hook(before, with_kwargs=True),
                    transformer.register_forward_hook(after, with_kwargs=True)]
        try:
            yield
        finally:
            while handles:
                handles.pop().remove()

    def _compare(self, name: str, found: Tensor, expected: Tensor) -> None:
        # Kontext's reference tokens come after the image tokens, and the pipeline drops their outputs.
        self.errors[name] = relative_error(found[:, :self.tokens], expected[:, :self.tokens])

    @property
    def difference(self) -> float:
        """The mean error of both steps, or the finished recipe's error if it is larger. NaN if any error is NaN."""
        steps = [self.errors[name] for name in self.steps if name in self.errors]
        finished = [self.errors["finished"]] if "finished" in self.errors else []
        return torch.tensor([*([sum(steps) / len(steps)] if steps else []), *finished]).amax().item()

    @property
    def holds(self) -> bool:
        """True if the error is at most `BOUND`. NaN fails."""
        return self.difference <= BOUND

    def line(self) -> str:
        """The measured error, for the log."""
        return f"a step differs from the unquantized model's by {100 * self.difference:.1f} %"

    def record(self) -> dict:
        """The check's result, for the benchmark's JSON."""
        return {"difference": self.difference, "errors": self.errors, "bound": BOUND, "holds": self.holds}

    def report(self, lossy: set[str], strict: bool, flags: list[str]) -> None:
        """Warns on stderr if the check failed, even with --quiet.

        Args:
            lossy: the keys of `CURES` whose technique is on. The warning names only their flags.
            strict: raise an error instead of the warning.
            flags: the given flags that win over --quality, from `utils.benchmark_utils.flags_over_quality`.

        Raises:
            RecipeError: the check failed, and `strict` is set.
        """
        if self.holds:
            return
        without = f" without {' and '.join(flags)}" if flags else ""
        cures = [text.format(without=without) for name, text in CURES.items() if name in lossy | {"any"}]
        text = (f"fp8 check: {self.line()}, and the limit is {100 * BOUND:.0f} %. The picture may be wrong. "
                f"Try these flags, in this order: {'; '.join(cures)}.")
        if strict:
            raise RecipeError(f"--strict: {text}")
        stars = "*" * 80
        print(f"{stars}\nWARNING: {text}\n{stars}", file=sys.stderr, flush=True)


@torch.no_grad()
def run_step(transformer: torch.nn.Module, inputs: dict) -> Tensor:
    """Computes one captured step outside a denoising loop. Fused blocks get their modulations first.

    Args:
        inputs: the arguments of the transformer's call.

    Returns:
        (B, S, C)
    """
    if hasattr(transformer.time_text_embed, "prepare"):
        transformer.time_text_embed.prepare(inputs["timestep"], inputs.get("guidance"), inputs["pooled_projections"])
    return transformer(**inputs)[0]


def relative_error(found: Tensor, reference: Tensor) -> float:
    """||found - reference|| / ||reference||, computed in float64. NaN if an element is NaN."""
    return ((found.double() - reference.double()).norm() / reference.double().norm()).item()
