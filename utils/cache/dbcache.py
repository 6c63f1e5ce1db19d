"""The step cache: cache-dit's DBCache, its options checked before anything loads.

Between two denoising steps the blocks' residuals change little. DBCache computes the first F blocks, compares their
residual with the last computed step's and, where it moved less than a threshold, reuses the middle blocks' result and
computes the last B blocks on top (https://github.com/vipshop/cache-dit). Lossy: it changes the image.

A steps computation mask says which steps may be cached at all: 1 is computed, 0 is decided by the residual ("dynamic")
or always cached ("static").
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
    """DBCache's options under cache-dit 1.x's names, and TaylorSeer's, which predicts a skipped residual."""
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
    steps_computation_mask: str = ""  # one 0 or 1 a step; empty: no mask
    steps_computation_policy: str = "dynamic"

    def __str__(self) -> str:
        """Tells options apart that make different images: a picture's file names the cache by it."""
        static = self.steps_computation_policy == "static"
        parts = [f"DBCache F{self.Fn_compute_blocks}B{self.Bn_compute_blocks}"]
        if not static:
            every = f" by {self.warmup_interval}" if self.warmup_interval != 1 else ""
            most = "any" if self.max_cached_steps < 0 else self.max_cached_steps
            parts += [f"warm-up {self.max_warmup_steps}{every}", f"at most {most} cached"]
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

# From nearly every block to hardly any. The masks are cache-dit's own for 28 steps (its steps_mask: slow, medium, fast,
# ultra), which compute the first steps, where the picture is laid out, and the last; F and thresholds are those of its
# published runs on FLUX.1-dev: F8B0 0.08, F1B0 0.08 to 0.12, F1B0 0.20, F1B0 0.30, all with TaylorSeer of order 1.
PRESETS = {
    "safe": CacheOptions(8, 0, 8, 1, -1, -1, 0.08, True, steps_computation_mask="1111111101110011100110010001"),
    "balanced": CacheOptions(1, 0, 6, 1, -1, -1, 0.12, True, steps_computation_mask="1111110110001100011000110001"),
    "fast": CacheOptions(1, 0, 6, 1, -1, -1, 0.2, True, steps_computation_mask="1111110100010000100000100001"),
    "extreme": CacheOptions(1, 0, 4, 1, -1, -1, 0.3, True, steps_computation_mask="1111001000001000000100000001"),
}

# Names of cache-dit before 1.0, which 1.x ignores in silence.
RENAMED = {"warmup_steps": "max_warmup_steps"}


# What each key takes beyond its type: a test and its name. nan and inf are numbers to yaml.
_COUNT = (lambda value: value >= 0, "0 or more")
_LIMIT = (lambda value: value == -1 or value >= 1, "1 or more, or -1 for no limit")
RANGES = {
    "Fn_compute_blocks": (lambda value: value >= 1, "1 or more"), "Bn_compute_blocks": _COUNT,
    "max_warmup_steps": _COUNT, "warmup_interval": (lambda value: value >= 1, "1 or more"),
    "max_cached_steps": _LIMIT, "max_continuous_cached_steps": _LIMIT,
    "residual_diff_threshold": (lambda value: 0 <= value < math.inf, "a finite number of 0 or more"),
    "taylorseer_order": (lambda value: 0 <= value <= 9, "from 0 to 9"),
    "steps_computation_mask": (lambda value: set(value) <= {"0", "1"}, "one 0 or 1 a step"),
    "steps_computation_policy": (lambda value: value in ("dynamic", "static"), "dynamic or static"),
}


def from_yaml(path: str) -> CacheOptions:
    """Reads a yaml file, flat or below `cache_config:`. Unlike cache-dit's own loader it ignores no key.

    Raises:
        RecipeError: not yaml, an unknown key, a key that is there twice, or a value that the key does not take.
    """
    with reading(f"--step_cache {path}", "Give a yaml file with one `key: value` a line, such as Fn_compute_blocks: 8, "
                 f"or one of {', '.join(STEP_CACHES)}."):
        found = _from_yaml(Path(path).expanduser().read_bytes())
    if not isinstance(found, dict):
        raise RecipeError(f"--step_cache {path}: expected keys and values, such as Fn_compute_blocks: 8.")
    if "cache_config" in found:
        beside = [key for key in found if key != "cache_config"]
        if beside or not isinstance(found["cache_config"], dict):
            raise RecipeError(f"--step_cache {path}: all keys belong below cache_config, indented"
                              f"{': not ' + ', '.join(map(str, beside)) if beside else ''}.")
        found = found["cache_config"]
    found = dict(found)
    if found.pop("cache_type", "DBCache") not in ("DBCache", "dbcache"):
        raise RecipeError(f"--step_cache {path}: cache_type must be DBCache.")
    if "taylorseer_kwargs" in found:  # before 1.0 the order hid in here
        taylor = found.pop("taylorseer_kwargs")
        if not isinstance(taylor, dict) or set(taylor) != {"n_derivatives"}:
            raise RecipeError(f"--step_cache {path}: taylorseer_kwargs knows n_derivatives alone; "
                              "today's name is taylorseer_order.")
        if "taylorseer_order" in found:
            raise RecipeError(f"--step_cache {path}: taylorseer_kwargs and taylorseer_order are one option: drop "
                              "the former.")
        found["taylorseer_order"] = taylor["n_derivatives"]
        _tell_renamed(path, "taylorseer_kwargs: n_derivatives", "taylorseer_order")
    if found.pop("taylorseer_cache_type", "residual") != "residual":  # of its predecessor's file
        raise RecipeError(f"--step_cache {path}: taylorseer_cache_type must be residual: hidden states are not "
                          "predicted.")
    known = {field.name: field.type for field in fields(CacheOptions)}
    options = {}
    for key, value in found.items():
        name = RENAMED.get(key, key)
        if name != key:
            _tell_renamed(path, key, name)
        if name in options:
            raise RecipeError(f"--step_cache {path}: {key} and its other name are both there: drop one.")
        if name not in known:
            raise RecipeError(f"--step_cache {path}: unknown key '{key}'. Known keys: {', '.join(known)}.")
        if name == "steps_computation_mask" and isinstance(value, list):  # as cache-dit writes it
            value = "".join(map(str, value))
        elif name == "steps_computation_mask" and isinstance(value, int):
            raise RecipeError(f"--step_cache {path}: {key} reads as a number: put it in quotes, or in brackets.")
        if type(value) is not known[name] and not (known[name] is float and type(value) is int):
            shown = f"a {type(value).__name__}" if isinstance(value, (dict, list)) else f"{value!r}"[:100]
            raise RecipeError(f"--step_cache {path}: {key}: {shown} is not of type {known[name].__name__}"
                              f"{': it takes ' + RANGES[name][1] if name in RANGES else ': true or false'}.")
        if name in RANGES and not RANGES[name][0](value):
            raise RecipeError(f"--step_cache {path}: {key}: {f'{value}'[:100]} is not {RANGES[name][1]}.")
        options[name] = value
    # cache-dit's own defaults, not those of the flag without a file.
    defaults = dict(Fn_compute_blocks=8, Bn_compute_blocks=0, max_cached_steps=-1, residual_diff_threshold=0.08)
    return CacheOptions(**defaults | options)


def _from_yaml(data: bytes):
    """The values of a yaml file. ValueError: it is not yaml, or holds a key twice, of which yaml takes the last."""
    try:
        root = yaml.compose(data, Loader=yaml.SafeLoader)
        below = [value for _, value in root.value] if isinstance(root, yaml.MappingNode) else []
        for mapping in (root, *below):
            entries = mapping.value if isinstance(mapping, yaml.MappingNode) else []
            keys = [key.value for key, _ in entries if isinstance(key, yaml.ScalarNode)]
            for key in keys:
                if keys.count(key) > 1:
                    raise ValueError(f"the key {key} is there twice")
        return yaml.safe_load(data)
    except yaml.MarkedYAMLError as error:
        line = f" in line {error.problem_mark.line + 1}" if error.problem_mark else ""
        raise ValueError(f"not yaml ({error.problem}{line})") from error


def _tell_renamed(path: str, old: str, new: str) -> None:
    # A warning is shown once, however often a program reads the file.
    warnings.warn(f"--step_cache {path}: {old} is called {new} since cache-dit 1.0, and was read as that.",
                  stacklevel=3)


def scaled(options: CacheOptions, blocks: int) -> CacheOptions:
    """`options` with F and B in proportion to a model of fewer than FLUX.1's blocks, where as given they leave none."""
    fits = options.Fn_compute_blocks + options.Bn_compute_blocks < blocks
    return options if fits else in_proportion(options, blocks)


def in_proportion(options: CacheOptions, blocks: int) -> CacheOptions:
    """`options` with as large a share of a model's blocks in F and B as they are of FLUX.1's; what is there stays 1."""
    first, last = (max(1, round(count * blocks / FLUX_BLOCKS)) if count else 0
                   for count in (options.Fn_compute_blocks, options.Bn_compute_blocks))
    return replace(options, Fn_compute_blocks=first, Bn_compute_blocks=last)


def preset(name: str, steps: int, blocks: int) -> CacheOptions:
    """A preset for another number of steps or blocks: its mask stretched, its last step computed, F in proportion."""
    options = PRESETS[name]
    mask = options.steps_computation_mask
    mask = "".join(mask[i * len(mask) // steps] for i in range(steps - 1)) + "1"
    return replace(in_proportion(options, blocks), steps_computation_mask=mask)


def computed_share(options: CacheOptions, blocks: int) -> float:
    """The share of an image's blocks that is computed when every step is cached that the mask allows."""
    mask = options.steps_computation_mask
    always = (options.Fn_compute_blocks + options.Bn_compute_blocks) / blocks
    return (mask.count("1") + mask.count("0") * always) / len(mask)


def forced(options: CacheOptions, steps: int) -> CacheOptions:
    """`options` under the static policy, with a mask that caches every step which mask, warm-up and limits allow.

    For timing on random weights, whose residuals mean nothing. A cached step costs as much as under `options`, without
    the comparison of residuals and its wait for the GPU. The mask follows cache-dit's order of decisions.
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
    """Refuses options with which nothing could be cached, or blocks would be computed twice (cache-dit accepts both).

    Args:
        steps: denoising steps of an image.
        blocks: double and single blocks of the transformer together.
    """
    for name, (is_valid, meaning) in RANGES.items():
        if not is_valid(getattr(options, name)):
            raise RecipeError(f"the step cache's {name} is {getattr(options, name)}: it takes {meaning}.")
    if steps <= options.max_warmup_steps:
        raise RecipeError(
            f"the step cache warms up for {options.max_warmup_steps} steps and the image takes {steps}: nothing could "
            "be cached. Drop the step cache (for schnell's 4 steps there is nothing to gain), or use a model of "
            "more steps, or a --step_cache FILE with a smaller max_warmup_steps.")
    mask = options.steps_computation_mask
    if options.steps_computation_policy == "static" and not mask:
        raise RecipeError("steps_computation_policy: static caches what steps_computation_mask says: give one.")
    if mask and (set(mask) != {"0", "1"} or mask[0] == "0"):
        raise RecipeError(f"steps_computation_mask {mask}: it takes one 1 (computed) or 0 (may be cached) a step, some "
                          "of both, and starts with 1, since the first step has nothing to reuse.")
    if mask and len(mask) != steps:
        raise RecipeError(f"steps_computation_mask has {len(mask)} steps and the image takes {steps}: give one of "
                          f"{steps}, or --num_inference_steps {len(mask)}.")
    computed = options.Fn_compute_blocks + options.Bn_compute_blocks
    if computed >= blocks:
        raise RecipeError(
            f"the step cache computes the first {options.Fn_compute_blocks} and the last {options.Bn_compute_blocks} "
            f"blocks in every step and this model has {blocks}: nothing is left to cache. Use a --step_cache FILE "
            f"whose Fn_compute_blocks + Bn_compute_blocks is below {blocks}, such as "
            f"Fn_compute_blocks: 1 and Bn_compute_blocks: 0.")


def enable(pipeline, options: CacheOptions, separate_cfg: bool,
           wrap: Callable[[torch.nn.Module], torch.nn.Module] | None = None, shared: bool = False) -> None:
    """Switches cache-dit on for this pipeline alone.

    Args:
        separate_cfg: the pipeline calls the transformer twice a step (true classifier-free guidance): the two need
            caches of their own.
        wrap: goes around each piece of the transformer (`PiecewiseTransformer`), between which the cache decides, such
            as `CUDAGraphModule`. Without it the transformer stays in one piece.
        shared: each process has its part of an image's tokens, and all decide by the mean of their residuals.
    """
    import cache_dit

    target = pipeline
    pipeline.cache_options = options
    # cache-dit patches the pipeline's *class*; a class of its own keeps other pipelines of the process untouched.
    own = type(pipeline)
    pipeline.__class__ = type(own.__name__, (own,), {"__module__": own.__module__})
    if wrap:
        transformer = PiecewiseTransformer(pipeline.transformer, options.Fn_compute_blocks, options.Bn_compute_blocks,
                                           wrap)
        pipeline.transformer = transformer
        # Each segment is a block to cache-dit, of which the first decides.
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
    similarity = manager.similarity

    def decide(before, now, **kwargs) -> bool:
        # cache-dit averages wherever there are several processes. With --prompts-file they make other images, in
        # numbers of their own, and would wait for each other for ever.
        return similarity(before, now, **kwargs | {"parallelized": shared})

    manager.similarity = decide


def cached_steps(pipeline) -> list[int]:
    """The steps of the last image whose middle blocks were taken from the cache, or that were extrapolated; from 0."""
    if isinstance(pipeline.transformer, TaylorSeerTransformer):
        return list(pipeline.transformer.extrapolated)
    return [int(step) for step in _summary(pipeline).cached_steps]


def residual_diffs(pipeline) -> dict[int, float]:
    """How far the first blocks' residual was from the last computed step's, of each step of the last image in which
    that decided: mean |difference| over mean |residual|. With two calls a step, of the first."""
    if isinstance(pipeline.transformer, TaylorSeerTransformer):
        return {}
    # Negative values stand for a comparison that was left out.
    return {int(step): value for step, value in _summary(pipeline).residual_diffs.items() if value >= 0}


def last_image_steps(pipeline, steps: int) -> float:
    """The blocks computed for the last image, in steps that compute them all."""
    if isinstance(pipeline.transformer, TaylorSeerTransformer):
        return steps - len(cached_steps(pipeline))
    blocks = len(pipeline.transformer.transformer_blocks) + len(pipeline.transformer.single_transformer_blocks)
    always = (pipeline.cache_options.Fn_compute_blocks + pipeline.cache_options.Bn_compute_blocks) / blocks
    return steps - len(cached_steps(pipeline)) * (1 - always)


def last_image(pipeline, steps: int) -> str:
    """One line on which of the last image's steps were cached."""
    found = cached_steps(pipeline)
    return f"cached {len(found)} of {steps} steps" + (f": {' '.join(map(str, found))}" if found else "")


def _summary(pipeline):
    import cache_dit

    return cache_dit.summary(pipeline, logging=False)[0]
