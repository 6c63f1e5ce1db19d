"""Does fp8 hold on these weights? One step in fp8 against the same step in bf16, at every start.

A recipe in fp8 that holds on one checkpoint may fail on another one, whose activations have other outliers, and a
picture alone does not tell. The reference is the model as it was loaded, in bf16, on the inputs of the real call. It
makes two steps of it, the first one and one from the middle of the schedule. The same inputs go through the quantized
blocks before these are compiled, recorded or cached, and those of the first step once more through the finished recipe.
"""

import sys
from contextlib import contextmanager

import torch
from torch import Tensor

from utils.common import RecipeError

# On full-width weights shaped as trained ones are (bench/trained_like.py), a step differs by 1 to 12 % where a recipe
# holds: results/h200/2026-11/fp8_error. Fused per-tensor scales, from bounds, failed with 21 to 34 %. tiny-flux has
# short rows, and its steps amplify what came before: its pictures are right with up to 18 %.
BOUND = 0.2
# What helps, in the order of what it costs.
CURES = {"fused": "--disable_fused_kernels (per-row float8 by torchao)",
         "fp8 attention": "--attention_backend fa3_bf16 (attention in bf16)",
         "float8": "--quant_dtype int8",
         "any": "--disable_quant --disable_fa3 (bf16 throughout)"}


class Fp8Check:
    """The reference of a pipeline that is not quantized yet, and the errors found since.

    Args:
        pipeline: as loaded, its unquantized transformer on the GPU.
        kwargs: of a call of it that makes one image.
    """

    def __init__(self, pipeline, kwargs: dict):
        calls = []

        def keep(module, args, named, output):
            calls.append(({name: value.clone() if isinstance(value, Tensor) else value
                           for name, value in named.items()}, output[0].clone()))

        handle = pipeline.transformer.register_forward_hook(keep, with_kwargs=True)
        try:
            pipeline(**kwargs | dict(num_inference_steps=2, output_type="latent"))
        finally:
            handle.remove()
        self.tokens = (kwargs["height"] // 16) * (kwargs["width"] // 16)
        # True classifier-free guidance makes two calls a step: the first of each step.
        self.steps = {"first": calls[0], "middle": calls[len(calls) // 2]}
        self.errors: dict[str, float] = {}

    def measure(self, transformer: torch.nn.Module) -> None:
        """Both steps through a transformer that is quantized, and not compiled yet."""
        for name, (inputs, expected) in self.steps.items():
            self._compare(name, run_step(transformer, inputs), expected)

    @contextmanager
    def measure_next_call(self, transformer: torch.nn.Module):
        """The finished recipe: the next call of `transformer` gets the first step's inputs in the place of its own."""
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
        # Kontext's reference tokens lie behind the picture's, and the pipeline drops what is made of them.
        self.errors[name] = relative_error(found[:, :self.tokens], expected[:, :self.tokens])

    @property
    def difference(self) -> float:
        """The mean of both steps, or the finished recipe's first step if that is larger; NaN if any is."""
        steps = [self.errors[name] for name in self.steps if name in self.errors]
        finished = [self.errors["finished"]] if "finished" in self.errors else []
        return torch.tensor([*([sum(steps) / len(steps)] if steps else []), *finished]).amax().item()

    @property
    def holds(self) -> bool:
        return self.difference <= BOUND

    def line(self) -> str:
        return f"a step differs from bf16's by {100 * self.difference:.1f} %"

    def record(self) -> dict:
        """For the benchmark's JSON."""
        return {"difference": self.difference, "errors": self.errors, "bound": BOUND, "holds": self.holds}

    def report(self, lossy: set[str], strict: bool) -> None:
        """Warns on stderr, whatever --quiet says, if fp8 does not hold.

        Args:
            lossy: which of `CURES` is on, so that only flags that change something are named.

        Raises:
            RecipeError: with `strict`, instead of the warning.
        """
        if self.holds:
            return
        cures = [flags for name, flags in CURES.items() if name in lossy | {"any"}]
        text = (f"fp8 check: {self.line()}, and {100 * BOUND:.0f} % is the most that fp8 has where it holds. The "
                f"picture may be wrong. What helps, in this order: {'; '.join(cures)}.")
        if strict:
            raise RecipeError(f"--strict: {text}")
        stars = "*" * 80
        print(f"{stars}\nWARNING: {text}\n{stars}", file=sys.stderr, flush=True)


@torch.no_grad()
def run_step(transformer: torch.nn.Module, inputs: dict) -> Tensor:
    """The output (B, S, C) of a captured step, outside a denoising loop. Fused blocks need their modulations first."""
    if hasattr(transformer.time_text_embed, "prepare"):
        transformer.time_text_embed.prepare(inputs["timestep"], inputs.get("guidance"), inputs["pooled_projections"])
    return transformer(**inputs)[0]


def relative_error(found: Tensor, reference: Tensor) -> float:
    """||found - reference|| / ||reference||, in float64; NaN if anything is NaN."""
    return ((found.double() - reference.double()).norm() / reference.double().norm()).item()
