"""The step cache's options are checked by us: cache-dit ignores keys it does not know and accepts what cannot work."""

import random
import re
import warnings
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import relative

from utils.benchmark_utils import STEP_CACHES, create_parser
from utils.cache import dbcache
from utils.cache.dbcache import PRESETS, CacheOptions, check, computed_share, forced, from_yaml, preset, scaled
from utils.common import RecipeError
from utils.pipeline_utils import call_kwargs, optimize

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


@pytest.mark.parametrize("argv, chosen", [
    ([], None), (["--step_cache", "fast"], "fast"), (["--step-cache=cache.yaml"], "cache.yaml"),
    (["--enable_cache_dit"], "f12b12"), (["--enable-cache-dit", "--step_cache", "f12b12"], "f12b12"),
    (["--cache_preset", "safe"], "safe"), (["--cache-dit-config", "cache.yaml"], "cache.yaml"),
])
def test_step_cache_flag_and_its_aliases_set_one_attribute(argv, chosen):
    assert create_parser().parse_args(argv).step_cache == chosen


def test_step_cache_flag_two_caches_are_refused_by_name():
    with pytest.raises(RecipeError, match=r"f12b12.*fast"):
        create_parser().parse_args(["--enable_cache_dit", "--cache_preset", "fast"])


def test_step_cache_flag_names_are_the_presets_and_two_more():
    assert set(STEP_CACHES) == {*PRESETS, "taylorseer", "f12b12"}


def test_default_options_are_flux_fasts():
    default = dbcache.DEFAULT
    assert (default.Fn_compute_blocks, default.Bn_compute_blocks, default.max_warmup_steps, default.max_cached_steps,
            default.residual_diff_threshold) == (12, 12, 8, 8, 0.12)


@pytest.mark.parametrize("changed", [
    {"Fn_compute_blocks": 2}, {"Bn_compute_blocks": 2}, {"max_warmup_steps": 2}, {"warmup_interval": 2},
    {"max_cached_steps": 2}, {"max_continuous_cached_steps": 2}, {"residual_diff_threshold": 0.2},
    {"enable_taylorseer": False}, {"enable_encoder_taylorseer": False}, {"taylorseer_order": 2},
    {"steps_computation_mask": "1110"}, {"steps_computation_policy": "static"}], ids=str)
def test_options_as_text_any_option_changed_differs(changed):
    """By this text a picture's metadata tell two caches apart."""
    options = CacheOptions(1, 0, 4, enable_taylorseer=True, steps_computation_mask="1100")
    assert str(replace(options, **changed)) != str(options)


@pytest.mark.filterwarnings("ignore::UserWarning")  # of the renamed keys
def test_from_yaml_shipped_file_is_the_predecessors(tmp_path):
    shipped = from_yaml(str(Path(__file__).parent.parent / "cache_config.yaml"))
    assert shipped == CacheOptions(1, 0, 0, 1, -1, -1, 0.12, True, True, 2)
    assert from_yaml(write(tmp_path, PREDECESSORS)) == shipped


@pytest.mark.parametrize("codec", ["utf-8-sig", "utf-16"])
def test_from_yaml_byte_order_mark_is_no_key(tmp_path, codec):
    assert from_yaml(write(tmp_path, "Fn_compute_blocks: 3\r\n".encode(codec))).Fn_compute_blocks == 3


@pytest.mark.parametrize("text, renamed", [
    ("warmup_steps: 3\ntaylorseer_kwargs: {n_derivatives: 2}", ["taylorseer_order", "max_warmup_steps"]),
    ("cache_config:\n  max_warmup_steps: 3\n  taylorseer_order: 2", []),
    ("cache_type: DBCache\nmax_warmup_steps: 3\ntaylorseer_order: 2", [])])
def test_from_yaml_old_names_and_both_layouts_are_read(tmp_path, text, renamed):
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        options = from_yaml(write(tmp_path, text))
    assert (options.max_warmup_steps, options.taylorseer_order) == (3, 2)
    assert len(told) == len(renamed)
    assert all(name in str(warning.message) for name, warning in zip(renamed, told, strict=True))


@pytest.mark.parametrize("text, named", [
    ("Fn_blocks: 3", "Fn_blocks"), ("Fn_compute_blocks: many", "Fn_compute_blocks.*int"),
    ("enable_taylorseer: 1", "enable_taylorseer.*bool"), ("- 1", ""), ("a: [", ""),
    ("cache_type: DBPrune", "cache_type.*DBCache"),
    ("cache_config:\n  Fn_compute_blocks: 1\nmax_warmup_steps: 2", "max_warmup_steps"),
    ("cache_config:", "cache_config"),
    ("taylorseer_kwargs: {order: 3}", "n_derivatives"), ("taylorseer_kwargs: [1]", "n_derivatives"),
    ("steps_computation_mask: 1100", "steps_computation_mask"),
    ("steps_computation_mask: [1, 2]", "steps_computation_mask.*12"),
    ("steps_computation_policy: medium", "medium.*dynamic.*static"),
    ("residual_diff_threshold: .nan", "residual_diff_threshold.*nan"),
    ("residual_diff_threshold: .inf", "residual_diff_threshold.*inf"),
    ("residual_diff_threshold: -0.5", "residual_diff_threshold.*-0.5"),
    ("residual_diff_threshold: '0.1'", "residual_diff_threshold.*float"),
    ("residual_diff_threshold: 8e-2", "residual_diff_threshold.*float"),
    ("residual_diff_threshold: true", "residual_diff_threshold.*float"),
    ("Fn_compute_blocks: true", "Fn_compute_blocks.*int"), ("Fn_compute_blocks: 0", "Fn_compute_blocks"),
    ("Fn_compute_blocks:", "Fn_compute_blocks.*int"), ("Bn_compute_blocks: -1", "Bn_compute_blocks.*-1"),
    ("max_warmup_steps: -1", "max_warmup_steps.*-1"), ("warmup_interval: 0", "warmup_interval"),
    ("max_cached_steps: 0", "max_cached_steps.*-1"), ("max_continuous_cached_steps: -2", "max_continuous.*-2"),
    ("taylorseer_order: -1", "taylorseer_order.*-1"), ("taylorseer_order: 1000000000", "taylorseer_order.*1000000000"),
    ("taylorseer_cache_type: hidden_states", "taylorseer_cache_type.*residual"),
    ("Fn_compute_blocks: [1]", "Fn_compute_blocks.*list"), ("", ""), ("# only a comment", ""),
    ("Fn_compute_blocks 3", ""), ("\tFn_compute_blocks: 3", ""),
    ("Fn_compute_blocks: 1\nBn_compute_blocks: 2\nFn_compute_blocks: 3", "Fn_compute_blocks"),
    ("cache_config:\n  Fn_compute_blocks: 1\n  Fn_compute_blocks: 1", "Fn_compute_blocks"),
    ("taylorseer_order: 1\ntaylorseer_kwargs: {n_derivatives: 2}", "taylorseer_kwargs.*taylorseer_order"),
    ("a: 1\n---\nb: 2", ""), ("? [a]\n: 1", ""), ("a: *b", ""), ("&a [*a]", ""),
    ("x: !!python/name:os.system", ""), ("a: 2024-99-99", ""), (b"a: \xe9", ""), (b"\0\1\2", ""),
])
def test_from_yaml_unusable_file_is_refused_in_one_line(tmp_path, text, named):
    with pytest.raises(RecipeError, match=f"cache.yaml.*{named}") as refused:
        from_yaml(write(tmp_path, text))
    assert "\n" not in str(refused.value)


@pytest.mark.filterwarnings("ignore::UserWarning")  # of the renamed keys
@pytest.mark.parametrize("text, named", [
    ("taylorseer_kwargs: {n_derivatives: 1.5}", "taylorseer_order.*int"),
    ("warmup_steps: 1\nmax_warmup_steps: 2", "max_warmup_steps")])
def test_from_yaml_unusable_value_of_an_old_name_is_refused(tmp_path, text, named):
    with pytest.raises(RecipeError, match=f"cache.yaml.*{named}"):
        from_yaml(write(tmp_path, text))


def test_from_yaml_mutated_file_is_read_as_written_or_refused(tmp_path):
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


@pytest.mark.parametrize("steps, blocks, named", [(8, 57, "8 steps.*8"), (4, 57, "8 steps.*4"),
                                                  (28, 24, "12.*12.*24"), (28, 8, "12.*12.*8")])
def test_check_nothing_left_to_cache_is_refused(steps, blocks, named):
    with pytest.raises(RecipeError, match=named):
        check(dbcache.DEFAULT, steps, blocks)


def test_check_default_of_enough_steps_and_blocks_passes():
    check(dbcache.DEFAULT, 9, 25)


def test_scaled_default_fits_small_models():
    assert scaled(dbcache.DEFAULT, 57) == dbcache.DEFAULT == scaled(dbcache.DEFAULT, 25)
    for blocks in (24, 12, 8, 5, 3):
        options = scaled(dbcache.DEFAULT, blocks)
        assert options.Fn_compute_blocks == options.Bn_compute_blocks == max(1, round(12 * blocks / 57))
        assert options.residual_diff_threshold == 0.12
        check(options, 28, blocks)


@pytest.mark.parametrize("name, value", [
    ("Fn_compute_blocks", 0), ("Bn_compute_blocks", -1), ("max_warmup_steps", -1), ("max_cached_steps", 0),
    ("max_continuous_cached_steps", 0), ("steps_computation_policy", "medium"), ("steps_computation_mask", "12" * 14)])
def test_check_value_out_of_range_is_refused_by_name(name, value):
    with pytest.raises(RecipeError, match=f"{name}.*{value}"):
        check(CacheOptions(**{name: value}), 28, 57)


@pytest.mark.parametrize("options, named", [
    ({"steps_computation_mask": "110"}, "3 steps.*28"),
    ({"steps_computation_mask": "0" + "1" * 27}, "0" + "1" * 27),
    ({"steps_computation_mask": "1" * 28}, "1" * 28),
    ({"steps_computation_policy": "static"}, "static.*steps_computation_mask"),
])
def test_check_mask_of_no_use_is_refused(options, named):
    with pytest.raises(RecipeError, match=named):
        check(CacheOptions(**options), 28, 57)


@pytest.mark.parametrize("text", ["'110100'", "[1, 1, 0, 1, 0, 0]"])
def test_from_yaml_mask_as_text_or_list_is_read(tmp_path, text):
    options = from_yaml(write(tmp_path, f"max_warmup_steps: 2\nsteps_computation_mask: {text}\n"
                                        "steps_computation_policy: static"))
    assert options.steps_computation_mask == "110100" and options.steps_computation_policy == "static"
    check(options, 6, 57)


def test_presets_computed_shares_are_those_of_help_and_readme():
    assert [round(100 * computed_share(options, 57)) for options in PRESETS.values()] == [69, 54, 40, 30]
    assert all(preset(name, 28, 57) == PRESETS[name] for name in PRESETS)


@pytest.mark.parametrize("name", PRESETS)
def test_preset_other_steps_and_blocks_fits_them(name):
    for steps, blocks in ((50, 57), (20, 57), (9, 8), (28, 8), (28, 3)):
        options = preset(name, steps, blocks)
        assert len(options.steps_computation_mask) == steps and options.steps_computation_mask[-1] == "1"
        assert options.Bn_compute_blocks == 0 and options.Fn_compute_blocks == max(
            1, round(PRESETS[name].Fn_compute_blocks * blocks / 57))
        check(options, steps, blocks)
    with pytest.raises(RecipeError, match="4"):
        check(preset(name, 4, 57), 4, 57)


@pytest.mark.parametrize("options, mask", [
    (dbcache.DEFAULT, "1" * 8 + "0" * 8 + "1" * 12),
    (CacheOptions(1, 0, 0, max_cached_steps=-1), "10000"),
    (CacheOptions(1, 0, 4, 2, -1, 2), "1010010010"),
    (CacheOptions(1, 0, 8, max_cached_steps=2, steps_computation_mask="110100"), "110101"),
    (CacheOptions(1, 0, 8, -1, 1, 1, steps_computation_mask="110100", steps_computation_policy="static"), "110100"),
    (PRESETS["fast"], PRESETS["fast"].steps_computation_mask)], ids=str)
def test_forced_mask_caches_all_that_warm_up_mask_and_limits_allow(options, mask):
    options = forced(options, len(mask))
    assert (options.steps_computation_mask, options.steps_computation_policy) == (mask, "static")
    assert forced(options, len(mask)) == options


STEPS = 6


def args_with_cache(make_args, tmp_path, *argv, text=ALWAYS):
    return make_args("--ckpt", "tiny-flux-dev", "--num_inference_steps", str(STEPS), "--height", "64", "--width", "64",
                     "--compile_export_mode", "disabled", "--step_cache", write(tmp_path, text), *argv)


def final_latents(pipeline, args):
    return pipeline(**call_kwargs(pipeline, args), output_type="latent").images


@pytest.mark.parametrize("options", [
    CacheOptions(1, 0, 4, 2, -1, 2, 100.0), CacheOptions(1, 1, 2, 1, 3, -1, 100.0),
    CacheOptions(1, 0, 2, 1, -1, 1, 100.0, steps_computation_mask="110100"),
    forced(CacheOptions(2, 1, 3, 1, 4, 2, 0.0, True, taylorseer_order=2), STEPS)], ids=str)
def test_forced_mask_is_the_pattern_of_cache_dit(build, make_args, tmp_path, options):
    """With a threshold that all residuals pass, cache-dit itself computes the steps of the mask."""
    pipeline = build("tiny-flux-dev")
    dbcache.enable(pipeline, options, separate_cfg=False)
    final_latents(pipeline, args_with_cache(make_args, tmp_path))
    cached = dbcache.cached_steps(pipeline)
    mask = forced(options, STEPS).steps_computation_mask
    assert cached == [step for step in range(STEPS) if mask[step] == "0"] != []
    always = (options.Fn_compute_blocks + options.Bn_compute_blocks) / 8
    assert dbcache.last_image_steps(pipeline, STEPS) == pytest.approx(STEPS - len(cached) * (1 - always))
    line = dbcache.cached_steps_line(pipeline, STEPS)
    assert list(map(int, re.findall(r"\d+", line))) == [len(cached), STEPS, *cached]
    assert dbcache.residual_diffs(pipeline) == {}  # none decided


@pytest.mark.parametrize("name", ["fast", *(pytest.param(name, marks=pytest.mark.slow) for name in PRESETS
                                            if name != "fast")])
def test_preset_next_image_starts_anew(build, make_args, name):
    """TaylorSeer's derivatives and the residuals of one image must not reach the next."""
    args = make_args("--ckpt", "tiny-flux-dev", "--num_inference_steps", "10", "--compile_export_mode", "disabled",
                     "--step_cache", name)
    pipeline = optimize(build("tiny-flux-dev"), args)
    first = final_latents(pipeline, args)
    compared = dbcache.residual_diffs(pipeline)
    assert compared and all(0 < value < 10 for value in compared.values())
    assert all(compared[step] < PRESETS[name].residual_diff_threshold for step in dbcache.cached_steps(pipeline))
    pipeline(**call_kwargs(pipeline, args, prompt="another", seed=7), output_type="latent")
    assert torch.equal(final_latents(pipeline, args), first) and dbcache.residual_diffs(pipeline) == compared


def test_enable_pipelines_of_different_caches_do_not_disturb_each_other(build, make_args, tmp_path):
    args, alone = args_with_cache(make_args, tmp_path), {}
    for name in ("safe", "extreme"):
        pipeline = build("tiny-flux-dev")
        dbcache.enable(pipeline, forced(preset(name, STEPS, 8), STEPS), separate_cfg=False)
        alone[name] = pipeline, final_latents(pipeline, args), dbcache.cached_steps(pipeline)
    assert alone["safe"][2] != alone["extreme"][2]
    for pipeline, latents, cached in alone.values():
        assert torch.equal(final_latents(pipeline, args), latents) and dbcache.cached_steps(pipeline) == cached


@pytest.mark.parametrize("argv", [
    ["--negative_prompt", "x", "--true_cfg_scale", "2"],
    pytest.param([], marks=pytest.mark.slow),
    pytest.param(["--num_images_per_prompt", "2"], marks=pytest.mark.slow)], ids=" ".join)
def test_enable_cached_steps_skip_the_middle_blocks_and_repeat_exactly(build, make_args, tmp_path, argv):
    """A pipeline without the cache stays as it is."""
    args = args_with_cache(make_args, tmp_path, *argv)
    plain = build("tiny-flux-dev")
    expected = final_latents(plain, args)
    pipeline = optimize(build("tiny-flux-dev"), args)
    calls = []
    middle = pipeline.transformer.single_transformer_blocks[2]
    middle.register_forward_pre_hook(lambda *_: calls.append(1))

    first = final_latents(pipeline, args)
    skipped = dbcache.cached_steps(pipeline)
    passes = 2 if "--true_cfg_scale" in argv else 1
    assert skipped and len(calls) == passes * (STEPS - len(skipped))
    assert torch.equal(final_latents(pipeline, args), first)
    assert torch.equal(final_latents(plain, args), expected)
    assert first.isfinite().all() and not torch.equal(first, expected)


def test_enable_threshold_of_zero_is_the_plain_pipeline(build, make_args, tmp_path):
    args = args_with_cache(make_args, tmp_path, "--disable_bf16", text=ALWAYS.replace("100.0", "0.0"))
    expected = final_latents(build("tiny-flux-dev"), args)
    pipeline = optimize(build("tiny-flux-dev"), args)
    torch.testing.assert_close(final_latents(pipeline, args), expected, rtol=1e-4, atol=1e-5)
    assert dbcache.cached_steps(pipeline) == []


def test_cached_steps_line_without_a_cached_step_names_the_smallest_difference(build, make_args, tmp_path):
    args = args_with_cache(make_args, tmp_path, text=ALWAYS.replace("100.0", "0.0001"))
    pipeline = optimize(build("tiny-flux-dev"), args)
    final_latents(pipeline, args)
    compared = dbcache.residual_diffs(pipeline)
    smallest = min(compared.values())
    assert 0.0001 < smallest < 1
    line = dbcache.cached_steps_line(pipeline, STEPS)
    assert f"{smallest:.3f}" in line and "0.0001" in line and "residual_diff_threshold" in line


@pytest.mark.slow
def test_enable_with_compiled_blocks_recompiles_nothing(build, make_args, tmp_path, compiler, without_vae):
    """Both branches of the cache are compiled by the warm-up."""
    args = args_with_cache(make_args, tmp_path, "--disable_quant", "--disable_inductor_tuning_flags")
    eager = final_latents(optimize(build("tiny-flux-dev", torch.bfloat16), args), args)
    args.compile_export_mode = "compile"
    pipeline = optimize(build("tiny-flux-dev", torch.bfloat16), args)
    with torch._dynamo.config.patch(error_on_recompile=True):
        latents = final_latents(pipeline, args)
    assert dbcache.cached_steps(pipeline)
    assert relative(latents, eager) < 0.02
