"""The step cache's options are checked by us: cache-dit ignores keys it does not know and accepts what cannot work."""

import random
import warnings
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import relative

from utils import step_cache
from utils.benchmark_utils import RecipeError
from utils.pipeline_utils import call_kwargs, load_pipeline, optimize
from utils.step_cache import PRESETS, CacheOptions, check, computed_share, forced, from_yaml, pattern, preset, scaled

ALWAYS = "Fn_compute_blocks: 1\nBn_compute_blocks: 1\nmax_warmup_steps: 2\nresidual_diff_threshold: 100.0\n"


# flux-faster's own cache_config.yaml.
PREDECESSORS = """cache_type: DBCache
warmup_steps: 0
max_cached_steps: -1
Fn_compute_blocks: 1
Bn_compute_blocks: 0
residual_diff_threshold: 0.12
enable_taylorseer: true
enable_encoder_taylorseer: true
taylorseer_cache_type: residual
taylorseer_kwargs:
  n_derivatives: 2
"""


def write(tmp_path, text):
    path = tmp_path / "cache.yaml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return str(path)


def test_the_flag_is_the_seeds_setting():
    default = step_cache.DEFAULT
    assert (default.Fn_compute_blocks, default.Bn_compute_blocks, default.max_warmup_steps, default.max_cached_steps,
            default.residual_diff_threshold) == (12, 12, 8, 8, 0.12)


def test_the_shipped_file_is_what_it_says():
    found = from_yaml(str(Path(__file__).parent.parent / "cache_config.yaml"))
    assert found == CacheOptions(1, 0, 0, 1, -1, -1, 0.12, True, True, 2)


def test_the_predecessors_file_is_the_shipped_one(tmp_path):
    found = from_yaml(write(tmp_path, PREDECESSORS))
    assert found == from_yaml(str(Path(__file__).parent.parent / "cache_config.yaml"))


@pytest.mark.parametrize("codec", ["utf-8-sig", "utf-16"])
def test_marks_of_encodings_are_no_keys(tmp_path, codec):
    assert from_yaml(write(tmp_path, "Fn_compute_blocks: 3\r\n".encode(codec))).Fn_compute_blocks == 3


@pytest.mark.parametrize("text", ["warmup_steps: 3\ntaylorseer_kwargs: {n_derivatives: 2}",
                                  "cache_config:\n  max_warmup_steps: 3\n  taylorseer_order: 2",
                                  "cache_type: DBCache\nmax_warmup_steps: 3\ntaylorseer_order: 2"])
def test_old_names_and_both_layouts_mean_what_they_say(tmp_path, text):
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        found = from_yaml(write(tmp_path, text))
    assert (found.max_warmup_steps, found.taylorseer_order) == (3, 2)
    assert [str(one.message).split(": ", 1)[1] for one in told] == ([
        "taylorseer_kwargs: n_derivatives is called taylorseer_order since cache-dit 1.0, and was read as that.",
        "warmup_steps is called max_warmup_steps since cache-dit 1.0, and was read as that."]
        if "kwargs" in text else [])


@pytest.mark.parametrize("text, said", [
    ("Fn_blocks: 3", "unknown key 'Fn_blocks'"),
    ("Fn_compute_blocks: many", "not of type int"),
    ("enable_taylorseer: 1", "not of type bool"),
    ("- 1", "expected keys and values"),
    ("a: [", "not yaml"),
    ("cache_type: DBPrune", "must be DBCache"),
    ("cache_config:\n  Fn_compute_blocks: 1\nmax_warmup_steps: 2", "not max_warmup_steps"),
    ("cache_config:", "belong below cache_config"),
    ("taylorseer_kwargs: {order: 3}", "n_derivatives alone"),
    ("taylorseer_kwargs: [1]", "n_derivatives alone"),
    ("steps_computation_mask: 1100", "reads as a number"), ("steps_computation_mask: [1, 2]", "0 or 1 a step"),
    ("steps_computation_policy: medium", "dynamic or static"),
    ("residual_diff_threshold: .nan", "nan.*finite"), ("residual_diff_threshold: .inf", "inf.*finite"),
    ("residual_diff_threshold: -0.5", "0 or more"), ("residual_diff_threshold: '0.1'", "type float"),
    ("residual_diff_threshold: 8e-2", "type float"), ("residual_diff_threshold: true", "type float"),
    ("Fn_compute_blocks: true", "type int"), ("Fn_compute_blocks: 0", "1 or more"), ("Fn_compute_blocks:", "type int"),
    ("Bn_compute_blocks: -1", "0 or more"), ("max_warmup_steps: -1", "0 or more"), ("warmup_interval: 0", "1 or more"),
    ("max_cached_steps: 0", "-1 for no limit"), ("max_continuous_cached_steps: -2", "-1 for no limit"),
    ("taylorseer_order: -1", "from 0"), ("taylorseer_order: 1000000000", "to 9"),
    ("taylorseer_kwargs: {n_derivatives: 1.5}", "type int"), ("taylorseer_cache_type: hidden_states", "residual"),
    ("Fn_compute_blocks: [1]", "a list"), ("", "keys and values"), ("# only a comment", "keys and values"),
    ("Fn_compute_blocks 3", "keys and values"), ("\tFn_compute_blocks: 3", "not yaml.*line 1"),
    ("Fn_compute_blocks: 1\nBn_compute_blocks: 2\nFn_compute_blocks: 3", "twice"),
    ("cache_config:\n  Fn_compute_blocks: 1\n  Fn_compute_blocks: 1", "twice"),
    ("warmup_steps: 1\nmax_warmup_steps: 2", "drop one"),
    ("taylorseer_order: 1\ntaylorseer_kwargs: {n_derivatives: 2}", "drop"),
    ("a: 1\n---\nb: 2", "not yaml"), ("? [a]\n: 1", "not yaml"), ("a: *b", "not yaml"), ("&a [*a]", "keys and values"),
    ("x: !!python/name:os.system", "not yaml"), ("a: 2024-99-99", "cache.yaml"), (b"a: \xe9", "cache.yaml"),
    (b"\0\1\2", "cache.yaml"),
])
def test_files_that_cannot_be_meant(tmp_path, text, said):
    with pytest.raises(RecipeError, match=said) as refused:
        from_yaml(write(tmp_path, text))
    assert "cache.yaml" in str(refused.value) and "\n" not in str(refused.value)


def test_mutated_files_mean_what_they_say_or_are_refused(tmp_path):
    """An independent reading: each `key: value` line of the file by itself, behind the names of before 1.0."""
    rng, outcomes = random.Random(0), {"read": 0, "refused": 0}
    lines = PREDECESSORS.replace("taylorseer_kwargs:\n  n_derivatives", "taylorseer_order").splitlines()
    defaults = from_yaml(write(tmp_path, "Fn_compute_blocks: 8"))
    for _ in range(60):
        changed, at = list(lines), rng.randrange(len(lines))
        key, _, value = changed[at].partition(": ")
        kind = rng.choice(["drop", "double", "retype", "number", "flip", "cut"])
        if kind == "drop":
            del changed[at]
        elif kind == "double":
            changed.insert(rng.randrange(len(lines)), changed[at])
        elif kind == "retype":
            changed[at] = f"{key}: {rng.choice(['.nan', '.inf', 'true', '[1]', '{a: 1}', 'null', 'text', '1.5', ''])}"
        elif kind == "number":
            changed[at] = f"{key}: {rng.choice([-2, -1, 0, 1, 3, 10**30])}"
        text = "\n".join(changed)
        if kind == "flip":
            i = rng.randrange(len(text))
            text = text[:i] + chr(ord(text[i]) ^ 1 << rng.randrange(7)) + text[i + 1:]
        elif kind == "cut":
            text = text[:rng.randrange(len(text))]
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                found = from_yaml(write(tmp_path, text))
        except RecipeError as error:
            assert "cache.yaml" in str(error) and "\n" not in str(error)
            outcomes["refused"] += 1
            continue
        said = dict(line.split("#")[0].rstrip().split(": ") for line in text.splitlines() if line.split("#")[0].strip())
        said["max_warmup_steps"] = said.pop("warmup_steps", defaults.max_warmup_steps)
        for key, value in said.items():
            if key not in ("cache_type", "taylorseer_cache_type"):
                assert str(getattr(found, key)).lower() == str(value), text
        assert {name for name, value in vars(found).items() if value != getattr(defaults, name)} <= set(said), text
        outcomes["read"] += 1
    assert min(outcomes.values()) >= 10


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


@pytest.mark.parametrize("text", ["'110100'", "[1, 1, 0, 1, 0, 0]"])
def test_masks_in_files(tmp_path, text):
    found = from_yaml(write(tmp_path, f"max_warmup_steps: 2\nsteps_computation_mask: {text}\n"
                                      "steps_computation_policy: static"))
    assert found.steps_computation_mask == "110100" and found.steps_computation_policy == "static"
    check(found, 6, 57)


def test_what_decides_nothing_decides_nothing_ahead(tmp_path):
    found = from_yaml(write(tmp_path, "max_warmup_steps: 2\ndecide_ahead: true"))
    assert found.decide_ahead and str(found).endswith("decided a step ahead")
    assert not forced(found, 6).decide_ahead and "ahead" not in str(forced(found, 6))


@pytest.mark.parametrize("options, said", [
    ({"steps_computation_mask": "110"}, "has 3 steps and the image takes 28"),
    ({"steps_computation_mask": "0" + "1" * 27}, "starts with 1"),
    ({"steps_computation_mask": "1" * 28}, "some of both"),
    ({"steps_computation_mask": "12" * 14}, "some of both"),
    ({"steps_computation_policy": "static"}, "give one"),
    ({"steps_computation_policy": "medium"}, "dynamic or static, not medium"),
    ({"steps_computation_policy": "static", "steps_computation_mask": "1" * 14 + "0" * 14, "decide_ahead": True},
     "decides nothing, neither now nor a step ahead"),
])
def test_masks_that_cannot_be_meant(options, said):
    with pytest.raises(RecipeError, match=said):
        check(CacheOptions(**options), 28, 57)


def test_presets_are_in_the_order_of_their_names():
    """The shares are those of --help and of the table in README.md."""
    assert [f"{computed_share(preset(name, 28, 57), 28, 57):.0%}" for name in PRESETS] == ["69%", "54%", "40%", "30%"]
    assert list(PRESETS) == ["safe", "balanced", "fast", "extreme"]
    assert all(preset(name, 28, 57) == PRESETS[name] for name in PRESETS)


@pytest.mark.parametrize("name", PRESETS)
def test_presets_fit_other_steps_and_blocks(name):
    for steps, blocks in ((50, 57), (20, 57), (9, 8), (28, 8), (28, 3)):
        found = preset(name, steps, blocks)
        assert len(found.steps_computation_mask) == steps and found.steps_computation_mask[-1] == "1"
        assert found.Bn_compute_blocks == 0 and found.Fn_compute_blocks == max(
            1, round(PRESETS[name].Fn_compute_blocks * blocks / 57))
        check(found, steps, blocks)
    with pytest.raises(RecipeError, match="4: nothing could be cached"):
        check(preset(name, 4, 57), 4, 57)


def test_the_cheapest_pattern_of_limits():
    assert pattern(step_cache.DEFAULT, 28) == "1" * 8 + "0" * 8 + "1" * 12
    assert pattern(CacheOptions(1, 0, 0, max_cached_steps=-1), 5) == "10000"
    assert pattern(CacheOptions(1, 0, 4, 2, -1, 2), 10) == "1010010010"
    masked = CacheOptions(1, 0, 8, max_cached_steps=2, steps_computation_mask="110100")
    assert pattern(masked, 6) == "110101" and pattern(forced(masked, 6), 6) == "110101"


def test_options_that_can():
    check(step_cache.DEFAULT, 9, 25)


def args_with_cache(make_args, tmp_path, *argv):
    return make_args("--ckpt", "tiny-flux-dev", "--num_inference_steps", "8",
                     "--compile_export_mode", "disabled", "--cache_dit_config", write(tmp_path, ALWAYS), *argv)


def final_latents(pipeline, args):
    return pipeline(**call_kwargs(pipeline, args), output_type="latent").images


@pytest.mark.parametrize("options", [
    CacheOptions(1, 0, 4, 2, -1, 2, 100.0), CacheOptions(1, 1, 2, 1, 3, -1, 100.0),
    CacheOptions(1, 0, 2, 1, -1, 1, 100.0, steps_computation_mask="1101001000"),
    forced(CacheOptions(2, 1, 3, 1, 4, 2, 0.0, True, taylorseer_order=2), 10)])
def test_the_pattern_is_what_cache_dit_does(build, make_args, options):
    pipeline = build("tiny-flux-dev")
    step_cache.enable(pipeline, options, separate_cfg=False)
    final_latents(pipeline, make_args("--ckpt", "tiny-flux-dev", "--num_inference_steps", "10"))
    cached = step_cache.cached_steps(pipeline)
    assert "".join("01"[step not in cached] for step in range(10)) == pattern(options, 10) and cached
    blocks, always = 8, options.Fn_compute_blocks + options.Bn_compute_blocks
    assert step_cache.last_image_steps(pipeline, 10) == pytest.approx(10 - len(cached) * (1 - always / blocks))
    assert step_cache.last_image(pipeline, 10) == f"cached {len(cached)} of 10 steps: {' '.join(map(str, cached))}"
    assert step_cache.residual_diffs(pipeline) == {}  # none decided


@pytest.mark.parametrize("more", [[], ["--cache_decide_ahead"]], ids=" ".join)
@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_starts_anew_with_every_image(build, make_args, name, more):
    """TaylorSeer's derivatives and the residuals of one image must not reach the next."""
    args = make_args("--ckpt", "tiny-flux-dev", "--num_inference_steps", "14", "--compile_export_mode", "disabled",
                     "--cache_preset", name, *more)
    pipeline = optimize(build("tiny-flux-dev"), args)
    first = final_latents(pipeline, args)
    compared = step_cache.residual_diffs(pipeline)
    assert compared and all(0 < value < 10 for value in compared.values())
    assert all(compared[step] < PRESETS[name].residual_diff_threshold for step in step_cache.cached_steps(pipeline))
    pipeline(**call_kwargs(pipeline, args, prompt="another", seed=7), output_type="latent")
    assert torch.equal(final_latents(pipeline, args), first) and step_cache.residual_diffs(pipeline) == compared


@pytest.mark.parametrize("options", [
    CacheOptions(1, 0, 3, 1, -1, -1, 0.25), CacheOptions(1, 1, 0, 1, 4, 2, 0.4),
    CacheOptions(1, 0, 2, 1, -1, -1, 0.25, True, steps_computation_mask="110100011000")], ids=str)
@pytest.mark.parametrize("passes", [1, 2], ids=["one call a step", "two calls a step"])
def test_a_step_is_decided_by_the_residuals_of_the_step_before(make_args, options, passes):
    """Against the rule worked out anew for each step, from the residuals of all of them."""
    options, steps = replace(options, decide_ahead=True), 12
    argv = ["--negative_prompt", "red", "--true_cfg_scale", "2"] if passes == 2 else []
    args = make_args("--ckpt", "tiny-flux-dev", "--num_inference_steps", str(steps), *argv)
    pipeline = load_pipeline(args)
    step_cache.enable(pipeline, options, separate_cfg=passes == 2)
    residuals, cached, can_cache = [], [], pipeline._context_manager.can_cache

    def recorded(residual, **kwargs):
        residuals.append(residual.clone())
        cached.append(can_cache(residual, **kwargs))
        return cached[-1]

    pipeline._context_manager.can_cache = recorded
    for _ in range(2):  # the second image must not see the first
        residuals.clear()
        cached.clear()
        final_latents(pipeline, args)
        for call in range(passes):
            residual, was_cached = residuals[call::passes], cached[call::passes]
            assert len(residual) == steps and not was_cached[0]
            predicted, mask = {}, options.steps_computation_mask or "0" * steps
            for step in range(1, steps):
                computed = [i for i in range(step) if not was_cached[i]]
                before = [i for i in computed if i < step - 1]
                if not before:  # nothing was measured yet
                    assert not was_cached[step]
                    continue
                change = (residual[step - 1] - residual[before[-1]]).abs().mean() / residual[before[-1]].abs().mean()
                predicted[step] = change.item() / (step - 1 - before[-1]) * (step - computed[-1])
                if was_cached[step]:
                    assert predicted[step] < options.residual_diff_threshold and mask[step] == "0"
            if call == 0:
                found = step_cache.residual_diffs(pipeline)
                assert found == pytest.approx({step: predicted[step] for step in found}) and found
                assert step_cache.cached_steps(pipeline) == [step for step in range(steps) if was_cached[step]] != []
                assert any(value >= options.residual_diff_threshold for value in found.values())
                assert all(was_cached[step] == (value < options.residual_diff_threshold)
                           for step, value in found.items())


def test_pipelines_with_different_caches_do_not_disturb_each_other(build, make_args):
    args = make_args("--ckpt", "tiny-flux-dev", "--num_inference_steps", "10")
    alone = {}
    for name in ("safe", "extreme"):
        pipeline = build("tiny-flux-dev")
        step_cache.enable(pipeline, forced(preset(name, 10, 8), 10), separate_cfg=False)
        alone[name] = pipeline, final_latents(pipeline, args), step_cache.cached_steps(pipeline)
    assert alone["safe"][2] != alone["extreme"][2]
    for pipeline, latents, cached in alone.values():
        assert torch.equal(final_latents(pipeline, args), latents) and step_cache.cached_steps(pipeline) == cached


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


@pytest.mark.slow
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
