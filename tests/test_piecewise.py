"""The step cache over segments against cache-dit on the whole transformer: the same images, bit by bit.

A CPU has no CUDA graphs. What stands in for them does with tensors what they do: inputs are copied into buffers of its
own, the same ones for each kind of input, and what the caller gets are copies.
"""

import pytest
import torch
from conftest import pretend_hopper, relative
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map_only, tree_unflatten

from utils import pipeline_utils
from utils.cache import dbcache
from utils.cache.dbcache import CacheOptions, forced, preset
from utils.cache.piecewise import PiecewiseTransformer
from utils.cuda_graph import ModuleProxy, signature
from utils.pipeline_utils import call_kwargs, fuse_projections, load_pipeline

STEPS = 6
SMALL = ["--ckpt", "tiny-flux-dev", "--height", "64", "--width", "64"]
TWO_CALLS = ["--negative_prompt", "red", "--true_cfg_scale", "2"]
slow = pytest.mark.slow
TAYLOR = {"enable_taylorseer": True, "taylorseer_order": 1}
DYNAMIC = {
    "F1B0": CacheOptions(1, 0, 2, 1, -1, 2, 0.4),
    "F1B0, TaylorSeer": CacheOptions(1, 0, 3, 1, -1, 2, 0.4, **TAYLOR),
    "F2B2": CacheOptions(2, 2, 2, 1, -1, 2, 0.4),
    "F2B2, TaylorSeer, a mask": CacheOptions(2, 2, 2, 1, -1, 2, 0.4, **TAYLOR, steps_computation_mask="111001"),
}


class Buffered(ModuleProxy):
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
    return latents, dbcache.cached_steps(pipeline), dbcache.residual_diffs(pipeline)


def same(a, b):
    return torch.equal(a[0], b[0]) and a[1:] == b[1:]


def both_ways(load, options, *argv, prepare=lambda pipeline: None, ways=(None, Buffered)):
    """The same image by cache-dit alone and over segments; the last pipeline and its arguments."""
    found = []
    for wrap in ways:
        pipeline, args = load(*argv)
        prepare(pipeline)
        dbcache.enable(pipeline, options, args.true_cfg_scale > 1, wrap)
        if hasattr(pipeline.transformer.time_text_embed, "prepare"):
            from utils.kernels.modulation import attach_modulation_hook
            attach_modulation_hook(pipeline)
        found.append(image(pipeline, args))
    assert all(same(one, found[0]) for one in found)
    return found[0], pipeline, args


def calls(pipeline):
    """How often each segment ran, in their order; all of them saw one kind of input."""
    transformer = pipeline.transformer
    parts = [transformer.before, *(segment.blocks for segment in transformer.segments), transformer.after]
    assert all(len(part.calls) == 1 for part in parts), "a CUDA graph would have been recorded twice"
    return [count for part in parts for count in part.calls.values()]


@pytest.mark.parametrize("name, argv", [
    ("F2B2", []), *(pytest.param(*case, marks=slow) for case in (
        ("F1B0", []), ("F1B0, TaylorSeer", ["--num_images_per_prompt", "2"]),
        ("F2B2", ["--num_images_per_prompt", "2"]), ("F2B2, TaylorSeer, a mask", [])))])
def test_segmented_image_is_that_of_the_whole_transformer(load, name, argv):
    options = DYNAMIC[name]
    found, pipeline, args = both_ways(load, options, *SMALL, *argv)
    assert same(image(pipeline, args), found), "repeats differ"
    _, cached, diffs = found
    assert cached and diffs and len(cached) < STEPS - 2
    middle = 2 * (STEPS - len(cached))
    last = [2 * STEPS] * (options.Bn_compute_blocks > 0)
    assert calls(pipeline) == [2 * STEPS, 2 * STEPS, middle, *last, 2 * STEPS]


@pytest.mark.slow
@pytest.mark.parametrize("argv", [[*SMALL, *TWO_CALLS], ["--ckpt", "tiny-kontext"]],
                         ids=["negative prompt", "kontext"])
def test_segmented_two_calls_a_step_and_kontext_are_as_of_the_whole_transformer(load, argv):
    found, pipeline, args = both_ways(load, DYNAMIC["F2B2, TaylorSeer, a mask"], *argv)
    assert same(image(pipeline, args), found), "repeats differ"
    assert found[1] and calls(pipeline)[0] == 2 * STEPS * (2 if "--true_cfg_scale" in argv else 1)


class Waits(TorchDispatchMode):
    """Counts the numbers that are asked of tensors, for which a GPU's caller would wait, while `inside`."""

    def __init__(self):
        super().__init__()
        self.inside, self.count = False, 0

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        self.count += self.inside and op is torch.ops.aten._local_scalar_dense.default
        return op(*args, **kwargs or {})


@pytest.mark.parametrize("policy", ["static", "dynamic"])
def test_segmented_step_waits_only_to_compare_residuals(load, policy):
    options = preset("extreme", STEPS, 8)
    pipeline, args = load(*SMALL)
    dbcache.enable(pipeline, forced(options, STEPS) if policy == "static" else options, False, Buffered)
    with Waits() as waits:
        pipeline.transformer.register_forward_pre_hook(lambda *_: setattr(waits, "inside", True))
        pipeline.transformer.register_forward_hook(lambda *_: setattr(waits, "inside", False))
        _, cached, diffs = image(pipeline, args)
    assert cached and waits.count == len(diffs) and (policy == "static") == (not diffs)


@pytest.mark.parametrize("name, static, argv", [
    ("F2B2", False, []), *(pytest.param(*case, marks=slow) for case in (
        ("F2B2", True, []), ("F1B0, TaylorSeer", False, []), ("F1B0, TaylorSeer", True, []),
        ("F2B2", False, ["--num_images_per_prompt", "2", *TWO_CALLS]),
        ("F1B0, TaylorSeer", True, ["--num_images_per_prompt", "2", *TWO_CALLS])))])
def test_fused_blocks_leave_their_sums_within_a_segment_alone(load, name, static, argv):
    pytest.importorskip("triton", reason="Triton is not installed: pip install triton")
    from utils.kernels.fused_blocks import defer_residuals, fuse_blocks

    options = forced(DYNAMIC[name], STEPS) if static else DYNAMIC[name]
    first, last = options.Fn_compute_blocks, options.Bn_compute_blocks
    left = []

    def fuse(pipeline):
        transformer = pipeline.transformer
        fuse_projections(transformer)
        fuse_blocks(transformer, torch.device("cpu"))
        if left:
            defer_residuals(transformer, first, last)
        left.append([block.defers_residual for block in [*transformer.transformer_blocks,
                                                    *transformer.single_transformer_blocks]])

    (_, cached, _), pipeline, _ = both_ways(load, options, *SMALL, *argv, prepare=fuse, ways=(None, None, Buffered))
    assert cached and len(set(calls(pipeline))) == 2
    ends = {first - 1, 7 - last, 7}
    assert left == [[False] * 8, *[[i not in ends for i in range(8)]] * 2]


@pytest.mark.parametrize("name, argv", [
    ("F2B2, TaylorSeer, a mask", SMALL), *(pytest.param(*case, marks=slow) for case in (
        ("F1B0, TaylorSeer", SMALL), ("F2B2, TaylorSeer, a mask", ["--ckpt", "tiny-kontext"]),
        ("F1B0, TaylorSeer", ["--ckpt", "tiny-kontext"]),
        ("F1B0, TaylorSeer", ["--ckpt", "tiny-kontext", "--num_images_per_prompt", "2", *TWO_CALLS])))])
@torch.no_grad()
def test_drop_unread_under_a_cache_leaves_the_picture(load, name, argv):
    """The last block makes the picture's tokens alone; the same steps are cached and the picture stays as it is."""
    pytest.importorskip("triton", reason="Triton is not installed: pip install triton")
    from utils.kernels.fused_blocks import defer_residuals, fuse_blocks, prune_unused_tokens
    from utils.kernels.modulation import attach_modulation_hook

    options, found, made = DYNAMIC[name], [], []
    for drop in (False, True):
        pipeline, args = load(*argv)
        fuse_projections(pipeline.transformer)
        fuse_blocks(pipeline.transformer, torch.device("cpu"))
        defer_residuals(pipeline.transformer, options.Fn_compute_blocks, options.Bn_compute_blocks)
        dbcache.enable(pipeline, options, args.true_cfg_scale > 1, Buffered)
        attach_modulation_hook(pipeline)
        if drop:
            prune_unused_tokens(pipeline)
            pipeline.transformer.single_transformer_blocks[-1].register_forward_hook(
                lambda module, given, found: made.append([x.shape[1] for x in found]))
        found.append(image(pipeline, args))
    (latents, cached, diffs), (expected, *decided) = found[1], found[0]
    assert relative(latents, expected) < 1e-3
    assert cached and cached == decided[0] and diffs == pytest.approx(decided[1], rel=1e-3)
    steps = STEPS * (2 if "--true_cfg_scale" in argv else 1)
    # With a negative prompt each of a step's two calls decides for itself.
    skipped = len(cached) + len(dbcache._summary(pipeline).cfg_cached_steps)
    assert made == [[0, latents.shape[1]]] * (steps if options.Bn_compute_blocks else steps - skipped)
    assert calls(pipeline)[-1] == steps


@pytest.mark.slow
def test_segmented_pipelines_of_different_caches_do_not_disturb_each_other(load):
    pipelines = []
    for name in ("F1B0", "F2B2, TaylorSeer, a mask"):
        pipeline, args = load(*SMALL)
        dbcache.enable(pipeline, DYNAMIC[name], False, Buffered)
        pipelines.append((pipeline, image(pipeline, args)))
    assert pipelines[0][1][1] != pipelines[1][1][1]
    plain, args = load(*SMALL)
    assert all(same(image(pipeline, args), found) for pipeline, found in pipelines * 2)
    latents = plain(**call_kwargs(plain, args), output_type="latent").images
    assert not any(torch.equal(latents, found[0]) for _, found in pipelines)


def test_segmented_image_after_another_kind_is_unchanged(load):
    """What one image leaves behind, in the cache or in a recording's buffers, does not reach another kind of image."""
    kinds = [{"prompt": "flat rocket", "seed": 3}, {"prompt": ["in 3d", "red"], "seed": [1, 2]}]
    found = []
    for wrap, order in ((None, kinds), (Buffered, [*kinds, kinds[0]])):
        pipeline, args = load(*SMALL)
        dbcache.enable(pipeline, DYNAMIC["F1B0, TaylorSeer"], False, wrap)
        found.append([image(pipeline, args, **kind) for kind in order])
    assert all(same(a, b) for a, b in zip([*found[0], found[0][0]], found[1], strict=True))
    assert all(len(part.calls) == 2 for part in (pipeline.transformer.before, pipeline.transformer.after))


def test_segmented_attributes_are_the_transformers(load):
    pipeline, args = load(*SMALL)
    transformer = pipeline.transformer
    dbcache.enable(pipeline, DYNAMIC["F2B2"], False, Buffered)
    segmented = pipeline.transformer
    assert type(segmented) is PiecewiseTransformer and segmented.config is transformer.config
    assert segmented.dtype == transformer.dtype and segmented.device == transformer.device
    assert transformer not in segmented.modules() and transformer.x_embedder not in segmented.modules()
    assert [len(segment.blocks.module.blocks) for segment in segmented.segments] == [2, 4, 2]
    _, cached, _ = image(pipeline, args)
    assert len(segmented.segments) == 3, "cache-dit did not put them back"
    assert dbcache.last_image_steps(pipeline, STEPS) == STEPS - len(cached) / 2


@pytest.mark.parametrize("fused", [False, pytest.param(True, marks=slow)], ids=["unfused", "fused"])
def test_optimize_with_cuda_graphs_segments_the_transformer(load, monkeypatch, fused):
    """`optimize` as on a GPU, with and without --disable_cudagraphs: the same image."""
    if fused:
        pytest.importorskip("triton", reason="Triton is not installed: pip install triton")
        pretend_hopper(monkeypatch)
    make_plan, found = pipeline_utils.make_plan, []
    monkeypatch.setattr(pipeline_utils, "CUDAGraphModule", lambda module, pool: Buffered(module))

    def on_a_gpu(args, *rest):
        chosen = make_plan(args, *rest)
        chosen.cuda_graphs.on = not args.disable_cudagraphs
        return chosen

    monkeypatch.setattr(pipeline_utils, "make_plan", on_a_gpu)
    for more in ([], ["--disable_cudagraphs"]):
        pipeline, args = load(*SMALL, "--compile_export_mode", "disabled", "--step_cache", "extreme", *more)
        pipeline = pipeline_utils.optimize(pipeline, args)
        assert isinstance(pipeline.transformer, PiecewiseTransformer) == (not more)
        assert isinstance(pipeline.text_encoder, Buffered) == (not more)
        found.append(image(pipeline, args))
        assert found[-1][1]
    assert same(*found)
