"""Steps extrapolated around the transformer, against diffusers' TaylorSeerCache, which does it inside each block."""

import re
from types import SimpleNamespace

import pytest
import torch
from diffusers import TaylorSeerCacheConfig
from PIL import Image

from utils.cache import dbcache
from utils.cache.taylorseer import WARM_UP, TaylorSeer, TaylorSeerTransformer
from utils.common import RecipeError
from utils.pipeline_utils import call_kwargs, load_pipeline, optimize

STEPS = 11
EAGER = ["--compile_export_mode", "disabled", "--disable_quant", "--disable_bf16", "--disable_fused_projections",
         "--disable_channels_last"]


def latents(pipeline, args, **kwargs):
    return pipeline(**call_kwargs(pipeline, args, **kwargs), output_type="latent").images


@pytest.fixture
def load(make_args):
    def make(*argv):
        args = make_args("--ckpt", "tiny-flux-dev", "--num_inference_steps", str(STEPS), "--height", "64", "--width",
                         "64", *EAGER, *argv)
        return load_pipeline(args), args
    return make


TWO_CALLS = ["--negative_prompt", "red", "--true_cfg_scale", "2"]


@pytest.mark.parametrize("interval, order, argv", [
    (3, 2, []), *(pytest.param(*case, marks=pytest.mark.slow) for case in (
        (3, 2, TWO_CALLS), (2, 1, []), (4, 3, ["--num_images_per_prompt", "2"]), (3, 0, [])))])
def test_extrapolated_image_is_that_of_diffusers_taylorseer(load, interval, order, argv):
    theirs, args = load(*argv)
    plain = latents(theirs, args)
    theirs.transformer.enable_cache(TaylorSeerCacheConfig(
        cache_interval=interval, max_order=order, disable_cache_before_step=WARM_UP,
        disable_cache_after_step=STEPS - 1, use_lite_mode=True, taylor_factors_dtype=torch.float32))
    ran = []
    theirs.transformer.single_transformer_blocks[2].proj_mlp.register_forward_pre_hook(lambda *_: ran.append(1))
    expected = latents(theirs, args)

    pipeline, args = load("--step_cache", f"taylorseer:{interval}:{order}", *argv)
    pipeline = optimize(pipeline, args)
    assert isinstance(pipeline.transformer, TaylorSeerTransformer)
    found = latents(pipeline, args)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    assert (found - plain).abs().max() > 1e-3

    mask = TaylorSeer(interval, order).mask(STEPS)
    assert len(ran) == mask.count("1") * (2 if argv == TWO_CALLS else 1)
    skipped = [step for step in range(STEPS) if mask[step] == "0"]
    assert dbcache.cached_steps(pipeline) == skipped and dbcache.residual_diffs(pipeline) == {}
    assert dbcache.last_image_steps(pipeline, STEPS) == mask.count("1")
    line = dbcache.cached_steps_line(pipeline, STEPS)
    assert list(map(int, re.findall(r"\d+", line))) == [len(skipped), STEPS, *skipped]


@pytest.mark.parametrize("stops, argv", [([0, 8], []), pytest.param([0, 4, 8], TWO_CALLS, marks=pytest.mark.slow)])
def test_extrapolated_image_after_one_that_was_broken_off_is_unchanged(load, stops, argv):
    pipeline, args = load("--step_cache", "taylorseer", *argv)
    transformer, ran = pipeline.transformer, []
    transformer.register_forward_pre_hook(lambda *_: ran.append(pipeline.scheduler.step_index or 0))
    pipeline = optimize(pipeline, args)
    expected = latents(pipeline, args)
    assert list(dict.fromkeys(ran)) == [0, 1, 2, 3, 4, 5, 7, 10]
    for stops_at in stops:
        def stop(pipeline, step, *_, last=stops_at):
            if step == last:
                raise KeyboardInterrupt
            return {}

        with pytest.raises(KeyboardInterrupt):
            pipeline(**call_kwargs(pipeline, args, prompt="another", seed=7), callback_on_step_end=stop)
        assert torch.equal(latents(pipeline, args), expected)
    assert len(pipeline.transformer.series) <= 2


def test_mask_of_28_steps_is_the_schedule():
    assert [TaylorSeer(interval).mask(28).count("1") for interval in (2, 3, 4, 5)] == [17, 14, 12, 11]
    assert TaylorSeer().mask(28) == "1111110100100100100100100101"


@pytest.mark.parametrize("steps", [3, 6, 7, 8, 28])
def test_check_steps_of_which_none_is_extrapolated_are_refused(steps):
    if steps < 8:
        with pytest.raises(RecipeError, match=str(steps)):
            TaylorSeer().check(steps)
    else:
        TaylorSeer().check(steps)


@pytest.mark.slow
def test_extrapolated_kontext_with_two_calls_a_step_is_that_of_one(make_args, tmp_path):
    """Its pipeline names no call. With the prompt as the negative one guidance changes nothing, and the image is that
    of one call a step, which plain steps do not make."""
    Image.effect_noise((128, 128), 64).convert("RGB").save(tmp_path / "x.png")
    found = []
    for more in ([], ["--negative_prompt", "make it red", "--true_cfg_scale", "2"], None):
        args = make_args("--ckpt", "tiny-kontext", "--image", str(tmp_path / "x.png"), "--prompt", "make it red",
                         "--num_inference_steps", str(STEPS), *EAGER,
                         *(["--step_cache", "taylorseer", *more] if more is not None else []))
        pipeline = optimize(load_pipeline(args), args)
        found.append(latents(pipeline, args))
        assert more is None or dbcache.cached_steps(pipeline) == [6, 8, 9]
    torch.testing.assert_close(found[0], found[1], rtol=1e-4, atol=1e-4)
    assert (found[0] - found[2]).abs().max() > 1e-3


class Cube(torch.nn.Module):
    """Gives (B, 1): the step to the power of three, plus `hidden_states`."""

    def __init__(self, scheduler):
        super().__init__()
        self.scheduler, self.weight = scheduler, torch.nn.Parameter(torch.zeros(1))

    def forward(self, hidden_states, encoder_hidden_states):
        return hidden_states + float(self.scheduler.step_index or 0) ** 3,


def steps_of(mask, order, prompts):
    """The results of each step's calls, one for each of its prompts, to which the prompt is added."""
    scheduler = SimpleNamespace(step_index=None)
    transformer, found = TaylorSeerTransformer(Cube(scheduler), scheduler, mask, order), []
    for step, given in enumerate(prompts):
        scheduler.step_index = step or None
        found.append([transformer(hidden_states=prompt[None], encoder_hidden_states=prompt)[0].item()
                      for prompt in given])
    return found, transformer.extrapolated


def test_extrapolated_formula_is_the_taylor_series_of_divided_differences():
    one, other = torch.zeros(1), torch.ones(1)
    found, extrapolated = steps_of("1110010", 2, [[one]] * 7)
    # At step 2: 8, first difference 7, difference of first differences 6. At 5: 125, then (125 - 8) / 3 and so on.
    expected = [0, 1, 8, 8 + 7 + 6 / 2, 8 + 2 * 7 + 4 * 6 / 2, 125, 125 + 39 + (39 - 7) / 3 / 2]
    assert [value for value, in found] == pytest.approx(expected) and extrapolated == [3, 4, 6]
    found, extrapolated = steps_of("1110010", 2, [[one, other]] * 7)
    assert found == [pytest.approx([value, value + 1]) for value in expected] and extrapolated == [3, 4, 6]
    # The same prompt twice a step is the same call; a prompt that comes later has to be computed first.
    assert steps_of("1110010", 2, [[one, one]] * 7) == ([[value, value] for value in map(pytest.approx, expected)],
                                                        [3, 4, 6])
    found, _ = steps_of("1110010", 2, [[one]] * 3 + [[other]] * 4)
    assert [value for value, in found] == pytest.approx([0, 1, 8, 28, 28, 126, 126 + 49])
