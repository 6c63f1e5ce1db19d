"""The step cache's options are checked by us: cache-dit ignores keys it does not know and accepts what cannot work."""

from pathlib import Path

import pytest
import torch
from conftest import relative

from utils import step_cache
from utils.benchmark_utils import RecipeError
from utils.pipeline_utils import call_kwargs, optimize
from utils.step_cache import CacheOptions, check, from_yaml, scaled

ALWAYS = "Fn_compute_blocks: 1\nBn_compute_blocks: 1\nmax_warmup_steps: 2\nresidual_diff_threshold: 100.0\n"


def write(tmp_path, text):
    path = tmp_path / "cache.yaml"
    path.write_text(text)
    return str(path)


def test_the_flag_is_the_seeds_setting():
    default = step_cache.DEFAULT
    assert (default.Fn_compute_blocks, default.Bn_compute_blocks, default.max_warmup_steps, default.max_cached_steps,
            default.residual_diff_threshold) == (12, 12, 8, 8, 0.12)


def test_the_shipped_file_is_what_it_says():
    found = from_yaml(str(Path(__file__).parent.parent / "cache_config.yaml"))
    assert found == CacheOptions(1, 0, 0, 1, -1, -1, 0.12, True, True, 2)


@pytest.mark.parametrize("text", ["warmup_steps: 3\ntaylorseer_kwargs: {n_derivatives: 2}",
                                  "cache_config:\n  max_warmup_steps: 3\n  taylorseer_order: 2",
                                  "cache_type: DBCache\nmax_warmup_steps: 3\ntaylorseer_order: 2"])
def test_old_names_and_both_layouts_mean_what_they_say(tmp_path, text):
    found = from_yaml(write(tmp_path, text))
    assert (found.max_warmup_steps, found.taylorseer_order) == (3, 2)


@pytest.mark.parametrize("text, said", [
    ("Fn_blocks: 3", "unknown key 'Fn_blocks'"),
    ("Fn_compute_blocks: many", "not of type int"),
    ("enable_taylorseer: 1", "not of type bool"),
    ("- 1", "expected keys and values"),
    ("a: [", "is not yaml"),
    ("cache_type: DBPrune", "must be DBCache"),
    ("cache_config:\n  Fn_compute_blocks: 1\nmax_warmup_steps: 2", "not max_warmup_steps"),
    ("cache_config:", "belong below cache_config"),
    ("taylorseer_kwargs: {order: 3}", "n_derivatives alone"),
    ("taylorseer_kwargs: [1]", "n_derivatives alone"),
])
def test_files_that_cannot_be_meant(tmp_path, text, said):
    with pytest.raises(RecipeError, match=said):
        from_yaml(write(tmp_path, text))


@pytest.mark.parametrize("steps, blocks, said", [(8, 57, "nothing could be"), (4, 57, "nothing could be"),
                                                 (28, 24, "nothing is left"), (28, 8, "nothing is left")])
def test_options_that_cannot_cache(steps, blocks, said):
    with pytest.raises(RecipeError, match=said):
        check(step_cache.DEFAULT, steps, blocks)


def test_the_default_fits_small_models():
    assert scaled(step_cache.DEFAULT, 57) == step_cache.DEFAULT == scaled(step_cache.DEFAULT, 25)
    for blocks in (24, 12, 8, 5, 3):
        found = scaled(step_cache.DEFAULT, blocks)
        assert found.Fn_compute_blocks == found.Bn_compute_blocks == max(1, round(12 * blocks / 57))
        assert found.residual_diff_threshold == 0.12
        check(found, 28, blocks)


@pytest.mark.parametrize("options", [{"Fn_compute_blocks": 0}, {"Bn_compute_blocks": -1}, {"max_warmup_steps": -1},
                                     {"max_cached_steps": 0}, {"max_continuous_cached_steps": 0}])
def test_values_that_mean_nothing(options):
    with pytest.raises(RecipeError):
        check(CacheOptions(**options), 28, 57)


def test_options_that_can():
    check(step_cache.DEFAULT, 9, 25)


def args_with_cache(make_args, tmp_path, *argv):
    return make_args("--ckpt", "tiny-flux-dev", "--num_inference_steps", "8",
                     "--compile_export_mode", "disabled", "--cache_dit_config", write(tmp_path, ALWAYS), *argv)


def final_latents(pipeline, args):
    return pipeline(**call_kwargs(pipeline, args), output_type="latent").images


@pytest.mark.parametrize("argv", [[], ["--num_images_per_prompt", "2"],
                                  ["--negative_prompt", "x", "--true_cfg_scale", "2"]])
def test_it_caches_repeats_exactly_and_leaves_other_pipelines_alone(build, make_args, tmp_path, argv):
    args = args_with_cache(make_args, tmp_path, *argv)
    plain = build("tiny-flux-dev")
    expected = final_latents(plain, args)
    pipeline = optimize(build("tiny-flux-dev"), args)
    calls = []
    middle = pipeline.transformer.single_transformer_blocks[2]
    middle.register_forward_pre_hook(lambda *_: calls.append(1))

    first = final_latents(pipeline, args)
    skipped = step_cache.cached_steps(pipeline)
    passes = 2 if "--true_cfg_scale" in argv else 1
    assert skipped and len(calls) == passes * (8 - len(skipped)), "a cached step must not compute the middle blocks"
    assert torch.equal(final_latents(pipeline, args), first)
    assert torch.equal(final_latents(plain, args), expected)
    assert first.isfinite().all() and not torch.equal(first, expected)


def test_a_threshold_of_zero_is_the_plain_pipeline(build, make_args, tmp_path):
    args = args_with_cache(make_args, tmp_path)
    Path(args.cache_dit_config).write_text(ALWAYS.replace("100.0", "0.0"))
    expected = final_latents(build("tiny-flux-dev"), args)
    pipeline = optimize(build("tiny-flux-dev"), args)
    torch.testing.assert_close(final_latents(pipeline, args), expected, rtol=1e-4, atol=1e-5)
    assert step_cache.cached_steps(pipeline) == []


def test_with_compiled_blocks(build, make_args, tmp_path, compiler):
    """Both branches of the cache are compiled by the warm-up."""
    args = args_with_cache(make_args, tmp_path, "--disable_quant", "--disable_inductor_tuning_flags")
    eager = final_latents(optimize(build("tiny-flux-dev", torch.bfloat16), args), args)
    args.compile_export_mode = "compile"
    pipeline = optimize(build("tiny-flux-dev", torch.bfloat16), args)
    with torch._dynamo.config.patch(error_on_recompile=True):
        found = final_latents(pipeline, args)
    assert step_cache.cached_steps(pipeline)
    assert relative(found, eager) < 0.02
