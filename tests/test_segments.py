"""The step cache over segments against cache-dit on the whole transformer: the same images, bit by bit.

A CPU has no CUDA graphs. What stands in for them does with tensors what they do: inputs are copied into buffers of its
own, the same ones for each kind of input, and what the caller gets are copies.
"""

import pytest
import torch
from torch.utils._pytree import tree_flatten, tree_map_only, tree_unflatten

from utils import step_cache
from utils.cuda_graph import InPlaceOf, signature
from utils.pipeline_utils import call_kwargs, fuse_projections, load_pipeline
from utils.segments import Segmented
from utils.step_cache import CacheOptions, forced, preset

STEPS = 10
TAYLOR = {"enable_taylorseer": True, "taylorseer_order": 1}
DYNAMIC = {
    "F1B0": CacheOptions(1, 0, 2, 1, -1, 2, 0.25),
    "F1B0, TaylorSeer": CacheOptions(1, 0, 3, 1, -1, 2, 0.25, **TAYLOR),
    "F2B2": CacheOptions(2, 2, 2, 1, -1, 2, 0.25),
    "F2B2, TaylorSeer, a mask": CacheOptions(2, 2, 2, 1, -1, 2, 0.25, **TAYLOR, steps_computation_mask="1110001001"),
}


class Buffered(InPlaceOf):
    """`module` on copies of its inputs, as in a replay; counts its calls by kind of input."""

    def __init__(self, module):
        super().__init__(module)
        self.buffers_of, self.calls = {}, {}

    def forward(self, *args, **kwargs):
        leaves, tree = tree_flatten((args, kwargs))
        key = signature(args, kwargs)
        static = self.buffers_of.setdefault(key, [x.clone() if isinstance(x, torch.Tensor) else x for x in leaves])
        for buffer, x in zip(static, leaves, strict=True):
            if isinstance(x, torch.Tensor):
                buffer.copy_(x)
        self.calls[key] = self.calls.get(key, 0) + 1
        static_args, static_kwargs = tree_unflatten(static, tree)
        return tree_map_only(torch.Tensor, torch.Tensor.clone, self.module(*static_args, **static_kwargs))


@pytest.fixture
def load(make_args, tmp_path):
    """A pipeline of trained weights in bf16, its arguments."""
    def make(*argv):
        if "tiny-kontext" in argv:
            drawer = make_args("--ckpt", "tiny-flux")
            pipeline = load_pipeline(drawer)
            picture = pipeline(**call_kwargs(pipeline, drawer)).images[0]
            picture.save(tmp_path / "x.png")
            argv += ("--image", str(tmp_path / "x.png"))
        args = make_args("--num_inference_steps", str(STEPS), *argv)
        return load_pipeline(args), args
    return make


def image(pipeline, args, **kwargs):
    """The final latents, the cached steps and the residual differences."""
    latents = pipeline(**call_kwargs(pipeline, args, **kwargs), output_type="latent").images
    return latents, step_cache.cached_steps(pipeline), step_cache.residual_diffs(pipeline)


def same(a, b):
    return torch.equal(a[0], b[0]) and a[1:] == b[1:]


def both_ways(load, options, *argv, prepare=lambda pipeline: None):
    """The same image by cache-dit alone and over segments, and the second pipeline."""
    found = []
    for wrap in (None, Buffered):
        pipeline, args = load(*argv)
        prepare(pipeline)
        step_cache.enable(pipeline, options, args.true_cfg_scale > 1, wrap)
        if hasattr(pipeline.transformer.time_text_embed, "prepare"):
            from utils.fused_blocks import follow_schedule
            follow_schedule(pipeline)
        found.append(image(pipeline, args))
        assert same(image(pipeline, args), found[-1]), "repeats differ"
    assert same(*found)
    return found[1], pipeline, args


def calls(pipeline):
    """How often each segment ran, in their order; all of them saw one kind of input."""
    transformer = pipeline.transformer
    parts = [transformer.before, *(segment.blocks for segment in transformer.segments), transformer.after]
    assert all(len(part.calls) == 1 for part in parts), "a CUDA graph would have been recorded twice"
    return [count for part in parts for count in part.calls.values()]


@pytest.mark.parametrize("argv", [[], ["--num_images_per_prompt", "2"]], ids=["one image", "batch 2"])
@pytest.mark.parametrize("options", DYNAMIC.values(), ids=DYNAMIC)
def test_images_of_segments_are_those_of_the_whole(load, options, argv):
    (_, cached, diffs), pipeline, _ = both_ways(load, options, "--ckpt", "tiny-flux-dev", *argv)
    assert cached and diffs and len(cached) < STEPS - 2
    middle = 2 * (STEPS - len(cached))
    last = [2 * STEPS] * (options.Bn_compute_blocks > 0)
    assert calls(pipeline) == [2 * STEPS, 2 * STEPS, middle, *last, 2 * STEPS]


@pytest.mark.parametrize("argv", [["--ckpt", "tiny-flux-dev", "--negative_prompt", "red", "--true_cfg_scale", "2"],
                                  ["--ckpt", "tiny-kontext"]], ids=["negative prompt", "kontext"])
def test_two_calls_a_step_and_a_reference_image(load, argv):
    (_, cached, _), pipeline, _ = both_ways(load, DYNAMIC["F2B2, TaylorSeer, a mask"], *argv)
    assert cached and calls(pipeline)[0] == 2 * STEPS * (2 if "--true_cfg_scale" in argv else 1)
