"""The step cache: cache-dit's DBCache (https://github.com/vipshop/cache-dit). It is lossy: it changes the image.

The blocks' residuals change little between two denoising steps. DBCache computes the first F blocks and compares their
residual with the residual of the last computed step. If the residual changed by less than a threshold, DBCache reuses
the result of the middle blocks and computes only the last B blocks. This module checks the options before models load.

The steps computation mask has one character per step. A step with 1 is computed. With the policy "dynamic" the residual
decides about a step with 0; with the policy "static" every step with 0 is cached.
"""

import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from pathlib import Path

import torch
import yaml

from utils.benchmark_utils import STEP_CACHES
from utils.cache.piecewise import PiecewiseTransformer
from utils.cache.taylorseer import TaylorSeerTransformer
from utils.common import RecipeError, reading


@dataclass(frozen=True)
class CacheOptions:
    """Options of DBCache and of TaylorSeer, which predicts a skipped residual. The names are cache-dit 1.x's."""
    Fn_compute_blocks: int = 12
    Bn_compute_blocks: int = 12
    max_warmup_steps: int = 8
    warmup_interval: int = 1
    max_cached_steps: int = 8
    max_continuous_cached_steps: int = -1
    residual_diff_threshold: float = 0.12
    enable_taylorseer: bool = False
    enable_encoder_taylorseer: bool = True
    taylorseer_order: int = 1
    steps_computation_mask: str = ""  # one 0 or 1 per step; empty: no mask
    steps_computation_policy: str = "dynamic"

    def __str__(self) -> str:
        """Describes all options that change the image. The metadata of an image file has this text."""
        static = self.steps_computation_policy == "static"
        parts = [f"DBCache F{self.Fn_compute_blocks}B{self.Bn_compute_blocks}"]
        if not static:
            every = f" by {self.warmup_interval}" if self.warmup_interval != 1 else ""
            parts.append(f"warm-up {self.max_warmup_steps}{every}")
            if self.max_cached_steps >= 0:
                parts.append(f"at most {self.max_cached_steps} cached")
            if self.max_continuous_cached_steps >= 0:
                parts.append(f"{self.max_continuous_cached_steps} in a row")
            parts.append(f"threshold {self.residual_diff_threshold}")
        if self.enable_taylorseer:
            text = "" if self.enable_encoder_taylorseer else ", not for text tokens"
            parts.append(f"TaylorSeer order {self.taylorseer_order}{text}")
        if self.steps_computation_mask:
            parts.append(f"mask {self.steps_computation_mask}")
        if static:
            parts.append("whatever the residuals")
        return ", ".join(parts)


DEFAULT = CacheOptions()
FLUX_BLOCKS = 19 + 38

# From the smallest to the largest share of cached blocks. The masks are cache-dit's for 28 steps (its steps_mask: slow,
# medium, fast, ultra). They compute the last step and the first steps, which lay out the picture. F and the thresholds
# are those of cache-dit's published runs on FLUX.1-dev: F8B0 0.08, F1B0 0.08 to 0.12, F1B0 0.20, F1B0 0.30, all with
# TaylorSeer of order 1.
PRESETS = {name: CacheOptions(Fn_compute_blocks=first, Bn_compute_blocks=0, max_warmup_steps=warm_up,
                              max_cached_steps=-1, residual_diff_threshold=threshold, enable_taylorseer=True,
                              steps_computation_mask=mask)
           for name, first, warm_up, threshold, mask in (
               ("safe", 8, 8, 0.08, "1111111101110011100110010001"),
               ("balanced", 1, 6, 0.12, "1111110110001100011000110001"),
               ("fast", 1, 6, 0.2, "1111110100010000100000100001"),
               ("extreme", 1, 4, 0.3, "1111001000001000000100000001"))}

# {name in cache-dit before 1.0: name in 1.x}. cache-dit 1.x ignores the old names silently.
RENAMED = {"warmup_steps": "max_warmup_steps"}


# {key: (test of a value, its description)}, beyond the type. yaml reads .nan and .inf as numbers.
_COUNT = (lambda value: value >= 0, "0 or more")
_LIMIT = (lambda value: value == -1 or value >= 1, "1 or more, or -1 for no limit")
RANGES = {
    "Fn_compute_blocks": (lambda value: value >= 1, "1 or more"), "Bn_compute_blocks": _COUNT,
    "max_warmup_steps": _COUNT, "warmup_interval": (lambda value: value >= 1, "1 or more"),
    "max_cached_steps": _LIMIT, "max_continuous_cached_steps": _LIMIT,
    "residual_diff_threshold": (lambda value: 0 <= value < math.inf, "a finite number of 0 or more"),
    "taylorseer_order": (lambda value: 0 <= value <= 9, "from 0 to 9"),
    "steps_computation_mask": (lambda value: set(value) <= {"0", "1"}, "one 0 or 1 per step"),
    "steps_computation_policy": (lambda value: value in ("dynamic", "static"), "dynamic or static"),
}


def from_yaml(path: str) -> CacheOptions:
    """Reads the options from a yaml file, whose keys are at the top level or below `cache_config:`.

    cache-dit's loader ignores unknown keys; this function refuses them.

    Raises:
        RecipeError: the file is not yaml, a key is unknown or repeated, or the value of a key is invalid.
    """
    with reading(f"--step_cache {path}", "Give a yaml file with one `key: value` per line, such as Fn_compute_blocks: "
                 f"8, or one of {', '.join(STEP_CACHES)}."):
        values = _from_yaml(Path(path).expanduser().read_bytes())
    if not isinstance(values, dict):
        raise RecipeError(f"--step_cache {path}: the file has no keys and values. Write one `key: value` per line, "
                          "such as Fn_compute_blocks: 8.")
    if "cache_config" in values:
        beside = [key for key in values if key != "cache_config"]
        if beside or not isinstance(values["cache_config"], dict):
            raise RecipeError(f"--step_cache {path}: write all keys below cache_config, indented"
                              f"{', and not beside it: ' + ', '.join(map(str, beside)) if beside else ''}.")
        values = values["cache_config"]
    values = dict(values)
    if values.pop("cache_type", "DBCache") not in ("DBCache", "dbcache"):
        raise RecipeError(f"--step_cache {path}: cache_type must be DBCache.")
    if "taylorseer_kwargs" in values:  # the order's place before cache-dit 1.0
        taylor = values.pop("taylorseer_kwargs")
        if not isinstance(taylor, dict) or set(taylor) != {"n_derivatives"}:
            raise RecipeError(f"--step_cache {path}: taylorseer_kwargs takes only n_derivatives. Use its new name, "
                              "taylorseer_order.")
        if "taylorseer_order" in values:
            raise RecipeError(f"--step_cache {path}: taylorseer_kwargs and taylorseer_order are the same option: "
                              "delete taylorseer_kwargs.")
        values["taylorseer_order"] = taylor["n_derivatives"]
        _tell_renamed(path, "taylorseer_kwargs: n_derivatives", "taylorseer_order")
    if values.pop("taylorseer_cache_type", "residual") != "residual":  # the predecessor's file has this key
        raise RecipeError(f"--step_cache {path}: taylorseer_cache_type must be residual. TaylorSeer does not predict "
                          "hidden states here.")
    known = {field.name: field.type for field in fields(CacheOptions)}
    options = {}
    for key, value in values.items():
        name = RENAMED.get(key, key)
        if name != key:
            _tell_renamed(path, key, name)
        if name in options:
            raise RecipeError(f"--step_cache {path}: {key} has both its old and its new name: delete one of them.")
        if name not in known:
            raise RecipeError(f"--step_cache {path}: unknown key '{key}'. Known keys: {', '.join(known)}.")
        if name == "steps_computation_mask" and isinstance(value, list):  # cache-dit's own form
            value = "".join(map(str, value))
        elif name == "steps_computation_mask" and isinstance(value, int):
            raise RecipeError(f"--step_cache {path}: {key} is a number in yaml: put the mask in quotes, or write a "
                              "list.")
        if type(value) is not known[name] and not (known[name] is float and type(value) is int):
            shown = f"a {type(value).__name__}" if isinstance(value, (dict, list)) else f"{value!r}"[:100]
            raise RecipeError(f"--step_cache {path}: {key}: {shown} is not of type {known[name].__name__}"
                              f"{': it takes ' + RANGES[name][1] if name in RANGES else ': true or false'}.")
        if name in RANGES and not RANGES[name][0](value):
            raise RecipeError(f"--step_cache {path}: {key}: {f'{value}'[:100]} is not {RANGES[name][1]}.")
        options[name] = value
    # A file's defaults are cache-dit's, not the defaults of `CacheOptions`.
    defaults = dict(Fn_compute_blocks=8, Bn_compute_blocks=0, max_cached_steps=-1, residual_diff_threshold=0.08)
    return CacheOptions(**defaults | options)


def _from_yaml(data: bytes):
    """Parses a yaml file. yaml would silently take the last value of a repeated key; this function refuses it.

    Raises:
        ValueError: the data is not yaml, or has a key twice.
    """
    try:
        root = yaml.compose(data, Loader=yaml.SafeLoader)
        below = [value for _, value in root.value] if isinstance(root, yaml.MappingNode) else []
        for mapping in (root, *below):
            entries = mapping.value if isinstance(mapping, yaml.MappingNode) else []
            keys = [key.value for key, _ in entries if isinstance(key, yaml.ScalarNode)]
            for key in keys:
                if keys.count(key) > 1:
                    raise ValueError(f"the key {key} occurs twice")
        return yaml.safe_load(data)
    except yaml.MarkedYAMLError as error:
        line = f" in line {error.problem_mark.line + 1}" if error.problem_mark else ""
        raise ValueError(f"not yaml ({error.problem}{line})") from error


def _tell_renamed(path: str, old: str, new: str) -> None:
    # `warnings` and not a print: a program that reads the file several times shows the warning once.
    warnings.warn(f"--step_cache {path}: cache-dit 1.0 renamed {old} to {new}. The old name was accepted.",
                  stacklevel=3)


def scaled(options: CacheOptions, blocks: int) -> CacheOptions:
    """`options`, with F and B reduced by `in_proportion` if they leave no block of the model to cache."""
    fits = options.Fn_compute_blocks + options.Bn_compute_blocks < blocks
    return options if fits else in_proportion(options, blocks)


def in_proportion(options: CacheOptions, blocks: int) -> CacheOptions:
    """`options` with F and B scaled from FLUX.1's 57 blocks to `blocks` blocks. A nonzero count stays at least 1."""
    first, last = (max(1, round(count * blocks / FLUX_BLOCKS)) if count else 0
                   for count in (options.Fn_compute_blocks, options.Bn_compute_blocks))
    return replace(options, Fn_compute_blocks=first, Bn_compute_blocks=last)


def preset(name: str, steps: int, blocks: int) -> CacheOptions:
    """A preset for a number of steps and blocks: the mask is stretched, the last step is computed, and F is scaled."""
    options = PRESETS[name]
    mask = options.steps_computation_mask
    mask = "".join(mask[i * len(mask) // steps] for i in range(steps - 1)) + "1"
    return replace(in_proportion(options, blocks), steps_computation_mask=mask)


def computed_share(options: CacheOptions, blocks: int) -> float:
    """The share of an image's blocks that is computed if every step that the mask allows is cached, from 0 to 1."""
    mask = options.steps_computation_mask
    always = (options.Fn_compute_blocks + options.Bn_compute_blocks) / blocks
    return (mask.count("1") + mask.count("0") * always) / len(mask)


def forced(options: CacheOptions, steps: int) -> CacheOptions:
    """`options` with the static policy and a mask that caches every step that mask, warm-up and limits allow.

    This is for timing with random weights, whose residuals mean nothing. A cached step takes as long as with `options`,
    except for the comparison of residuals and its wait for the GPU. The mask follows cache-dit's order of decisions.
    """
    mask, limited = "", options.steps_computation_policy == "dynamic"
    for step in range(steps):
        in_a_row = len(mask) - len(mask.rstrip("0"))
        warms_up = step < options.max_warmup_steps and step % options.warmup_interval == 0
        computed = (options.steps_computation_mask[step] == "1" if options.steps_computation_mask
                    else step == 0 or warms_up)
        computed |= limited and 0 <= options.max_cached_steps <= mask.count("0")
        computed |= limited and 0 <= options.max_continuous_cached_steps <= in_a_row
        mask += "1" if computed else "0"
    return replace(options, steps_computation_mask=mask, steps_computation_policy="static")


def check(options: CacheOptions, steps: int, blocks: int) -> None:
    """Refuses options that could cache nothing or would compute blocks twice. cache-dit accepts both.

    Args:
        steps: the number of denoising steps of an image.
        blocks: the number of double and single blocks of the transformer together.

    Raises:
        RecipeError: an option is out of range or does not fit the steps or blocks.
    """
    for name, (is_valid, meaning) in RANGES.items():
        if not is_valid(getattr(options, name)):
            raise RecipeError(f"--step_cache: {name} is {getattr(options, name)}: it takes {meaning}.")
    if steps <= options.max_warmup_steps:
        raise RecipeError(
            f"--step_cache warms up for {options.max_warmup_steps} steps, and the image's number of steps is {steps}: "
            "no step could be cached. Drop --step_cache (it gains nothing in schnell's 4 steps), use a model of more "
            "steps, or give a --step_cache FILE with a smaller max_warmup_steps.")
    mask = options.steps_computation_mask
    if options.steps_computation_policy == "static" and not mask:
        raise RecipeError("steps_computation_policy: static needs a mask: give steps_computation_mask.")
    if mask and (set(mask) != {"0", "1"} or mask[0] == "0"):
        raise RecipeError(f"steps_computation_mask {mask}: give one 1 (computed) or 0 (may be cached) per step. The "
                          "mask needs at least one of each, and starts with 1: the first step has no step to reuse.")
    if mask and len(mask) != steps:
        raise RecipeError(f"steps_computation_mask has {len(mask)} steps, and the image takes {steps} steps: give a "
                          f"mask of {steps}, or --num_inference_steps {len(mask)}.")
    computed = options.Fn_compute_blocks + options.Bn_compute_blocks
    if computed >= blocks:
        raise RecipeError(
            f"--step_cache computes the first {options.Fn_compute_blocks} and the last {options.Bn_compute_blocks} "
            f"blocks in every step, and this model's number of blocks is {blocks}: no block is left to cache. Give a "
            f"--step_cache FILE whose Fn_compute_blocks + Bn_compute_blocks is below {blocks}, such as "
            f"Fn_compute_blocks: 1 and Bn_compute_blocks: 0.")


def enable(pipeline, options: CacheOptions, separate_cfg: bool,
           wrap: Callable[[torch.nn.Module], torch.nn.Module] | None = None, shared: bool = False) -> None:
    """Enables cache-dit for this pipeline only.

    Args:
        separate_cfg: the pipeline calls the transformer twice per step (true classifier-free guidance), and each of the
            two calls gets its own cache.
        wrap: wraps each segment of the transformer (`PiecewiseTransformer`), for example `CUDAGraphModule`. The cache
            decides between the segments. Without `wrap` the transformer is not split.
        shared: each process has a shard of an image's tokens, and all decide by the mean of their residuals.
    """
    import cache_dit

    target = pipeline
    pipeline.cache_options = options
    # cache-dit patches the pipeline's *class*. This pipeline therefore gets a subclass, so that other pipelines of the
    # process are not patched.
    base = type(pipeline)
    pipeline.__class__ = type(base.__name__, (base,), {"__module__": base.__module__})
    if wrap:
        transformer = PiecewiseTransformer(pipeline.transformer, options.Fn_compute_blocks, options.Bn_compute_blocks,
                                           wrap)
        pipeline.transformer = transformer
        # cache-dit sees each segment as one block. The first segment decides.
        target = cache_dit.BlockAdapter(
            pipe=pipeline, transformer=transformer, blocks=transformer.segments, blocks_name="segments",
            forward_pattern=cache_dit.ForwardPattern.Pattern_1, check_forward_pattern=True)
        options = replace(options, Fn_compute_blocks=1, Bn_compute_blocks=min(1, options.Bn_compute_blocks))
    names = ("Fn_compute_blocks", "Bn_compute_blocks", "max_warmup_steps", "warmup_interval", "max_cached_steps",
             "max_continuous_cached_steps", "residual_diff_threshold")
    config = cache_dit.DBCacheConfig(**{name: getattr(options, name) for name in names},
                                     enable_separate_cfg=separate_cfg,
                                     steps_computation_mask=list(map(int, options.steps_computation_mask)) or None,
                                     steps_computation_policy=options.steps_computation_policy)
    calibrator = None
    if options.enable_taylorseer:
        calibrator = cache_dit.TaylorSeerCalibratorConfig(
            taylorseer_order=options.taylorseer_order, enable_encoder_calibrator=options.enable_encoder_taylorseer)
    cache_dit.enable_cache(target, cache_config=config, calibrator_config=calibrator)

    manager = pipeline._context_manager
    similarity, reset_context = manager.similarity, manager.reset_context

    def reset(context, *, cache_config, **kwargs):
        # cache-dit resets its contexts before each image. An image of another number of steps has another mask, and
        # the pipeline's options are then replaced.
        mask = list(map(int, pipeline.cache_options.steps_computation_mask)) or None
        return reset_context(context, cache_config=replace(cache_config, steps_computation_mask=mask), **kwargs)

    def decide(before, now, **kwargs) -> bool:
        # If there are several processes, cache-dit averages their residuals. With --prompts-file each process makes
        # other images and takes another number of steps, so the processes would wait for each other forever.
        return similarity(before, now, **kwargs | {"parallelized": shared})

    manager.similarity, manager.reset_context = decide, reset


def cached_steps(pipeline) -> list[int]:
    """The steps of the last image that were cached or extrapolated, counted from 0."""
    if isinstance(pipeline.transformer, TaylorSeerTransformer):
        return list(pipeline.transformer.extrapolated)
    return [int(step) for step in _summary(pipeline).cached_steps]


def residual_diffs(pipeline) -> dict[int, float]:
    """How much the first blocks' residual differed from the last computed step's, for the last image.

    With two calls per step, this is the difference of the first call.

    Returns:
        {step: mean |difference| / mean |residual|}, for each step that the residual decided.
    """
    if isinstance(pipeline.transformer, TaylorSeerTransformer):
        return {}
    # A negative value means that cache-dit compared nothing.
    return {int(step): value for step, value in _summary(pipeline).residual_diffs.items() if value >= 0}


def last_image_steps(pipeline, steps: int) -> float:
    """The cost of the last image in full steps: the number of computed blocks over the number of blocks per step.

    Args:
        steps: the number of denoising steps of the image.
    """
    if isinstance(pipeline.transformer, TaylorSeerTransformer):
        return steps - len(cached_steps(pipeline))
    blocks = len(pipeline.transformer.transformer_blocks) + len(pipeline.transformer.single_transformer_blocks)
    always = (pipeline.cache_options.Fn_compute_blocks + pipeline.cache_options.Bn_compute_blocks) / blocks
    return steps - len(cached_steps(pipeline)) * (1 - always)


def cached_steps_line(pipeline, steps: int) -> str:
    """One log line: which of the last image's `steps` steps were cached, or why none was."""
    cached, compared = cached_steps(pipeline), residual_diffs(pipeline)
    text = f"cached {len(cached)} of {steps} steps"
    if cached:
        return f"{text}: {' '.join(map(str, cached))}"
    if not compared:
        return text
    step = min(compared, key=compared.get)
    return (f"{text}: the smallest difference of residuals is {compared[step]:.3f} (step {step}), and the limit is "
            f"{pipeline.cache_options.residual_diff_threshold}. Raise residual_diff_threshold in a --step_cache FILE, "
            "or choose a faster preset")


def _summary(pipeline):
    import cache_dit

    return cache_dit.summary(pipeline, logging=False)[0]
