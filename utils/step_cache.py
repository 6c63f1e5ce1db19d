"""The step cache: cache-dit's DBCache, its options checked before anything loads.

Between two denoising steps the blocks' residuals change little. DBCache computes the first F blocks, compares their
residual with the last computed step's and, where it moved less than a threshold, reuses the middle blocks' result and
computes the last B blocks on top (https://github.com/vipshop/cache-dit). Lossy: it changes the image.
"""

from dataclasses import dataclass, fields, replace
from pathlib import Path

import yaml

from utils.benchmark_utils import RecipeError


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

    def __str__(self) -> str:
        taylor = f", TaylorSeer order {self.taylorseer_order}" if self.enable_taylorseer else ""
        return (f"DBCache F{self.Fn_compute_blocks}B{self.Bn_compute_blocks}, warm-up {self.max_warmup_steps}, at most "
                f"{'any' if self.max_cached_steps < 0 else self.max_cached_steps} cached, threshold "
                f"{self.residual_diff_threshold}{taylor}")


DEFAULT = CacheOptions()
FLUX_BLOCKS = 19 + 38

# Names of cache-dit before 1.0, which 1.x ignores in silence.
RENAMED = {"warmup_steps": "max_warmup_steps"}


def from_yaml(path: str) -> CacheOptions:
    """Reads a yaml file, flat or below `cache_config:`. Unlike cache-dit's own loader it ignores no key.

    Raises:
        RecipeError: not yaml, an unknown key, or a value of the wrong type.
    """
    try:
        found = yaml.safe_load(Path(path).expanduser().read_text())
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise RecipeError(f"--cache_dit_config {path} is not yaml: {error}") from error
    if not isinstance(found, dict):
        raise RecipeError(f"--cache_dit_config {path}: expected keys and values, such as Fn_compute_blocks: 8.")
    if "cache_config" in found:
        beside = [key for key in found if key != "cache_config"]
        if beside or not isinstance(found["cache_config"], dict):
            raise RecipeError(f"--cache_dit_config {path}: all keys belong below cache_config, indented"
                              f"{': not ' + ', '.join(map(str, beside)) if beside else ''}.")
        found = found["cache_config"]
    found = dict(found)
    if found.pop("cache_type", "DBCache") not in ("DBCache", "dbcache"):
        raise RecipeError(f"--cache_dit_config {path}: cache_type must be DBCache.")
    if "taylorseer_kwargs" in found:  # before 1.0 the order hid in here
        taylor = found.pop("taylorseer_kwargs")
        if not isinstance(taylor, dict) or set(taylor) != {"n_derivatives"}:
            raise RecipeError(f"--cache_dit_config {path}: taylorseer_kwargs knows n_derivatives alone; "
                              "today's name is taylorseer_order.")
        found["taylorseer_order"] = taylor["n_derivatives"]
    known = {field.name: field.type for field in fields(CacheOptions)}
    options = {}
    for key, value in found.items():
        name = RENAMED.get(key, key)
        if name not in known:
            raise RecipeError(f"--cache_dit_config {path}: unknown key '{key}'. Known keys: {', '.join(known)}.")
        if type(value) is not known[name] and not (known[name] is float and type(value) is int):
            raise RecipeError(f"--cache_dit_config {path}: {key}: {value!r} is not of type {known[name].__name__}.")
        options[name] = value
    # cache-dit's own defaults, not those of the flag without a file.
    defaults = dict(Fn_compute_blocks=8, Bn_compute_blocks=0, max_cached_steps=-1, residual_diff_threshold=0.08)
    return CacheOptions(**defaults | options)


def scaled(options: CacheOptions, blocks: int) -> CacheOptions:
    """`options` with F and B in proportion to a model of fewer than FLUX.1's blocks, where as given they leave none."""
    if options.Fn_compute_blocks + options.Bn_compute_blocks < blocks:
        return options
    return replace(options, **{name: max(1, round(getattr(options, name) * blocks / FLUX_BLOCKS))
                               for name in ("Fn_compute_blocks", "Bn_compute_blocks")})


def check(options: CacheOptions, steps: int, blocks: int) -> None:
    """Refuses options with which nothing could be cached, or blocks would be computed twice (cache-dit accepts both).

    Args:
        steps: denoising steps of an image.
        blocks: double and single blocks of the transformer together.
    """
    if options.Fn_compute_blocks < 1 or options.Bn_compute_blocks < 0 or options.max_warmup_steps < 0:
        raise RecipeError("the step cache needs Fn_compute_blocks of 1 or more (it decides by them), and "
                          "Bn_compute_blocks and max_warmup_steps of 0 or more.")
    if options.max_cached_steps == 0 or options.max_continuous_cached_steps == 0:
        raise RecipeError("max_cached_steps and max_continuous_cached_steps of 0 cache nothing: -1 is no limit.")
    if steps <= options.max_warmup_steps:
        raise RecipeError(
            f"the step cache warms up for {options.max_warmup_steps} steps and the image takes {steps}: nothing could "
            "be cached. Drop --enable_cache_dit (for schnell's 4 steps there is nothing to gain), or use a model of "
            "more steps, or a --cache_dit_config with a smaller max_warmup_steps.")
    computed = options.Fn_compute_blocks + options.Bn_compute_blocks
    if computed >= blocks:
        raise RecipeError(
            f"the step cache computes the first {options.Fn_compute_blocks} and the last {options.Bn_compute_blocks} "
            f"blocks in every step and this model has {blocks}: nothing is left to cache. Use a --cache_dit_config "
            f"whose Fn_compute_blocks + Bn_compute_blocks is below {blocks}, such as "
            f"Fn_compute_blocks: 1 and Bn_compute_blocks: 0.")


def enable(pipeline, options: CacheOptions, separate_cfg: bool) -> None:
    """Switches cache-dit on for this pipeline alone.

    Args:
        separate_cfg: the pipeline calls the transformer twice a step (true classifier-free guidance): the two need
            caches of their own.
    """
    import cache_dit

    # cache-dit patches the pipeline's *class*; a class of its own keeps other pipelines of the process untouched.
    own = type(pipeline)
    pipeline.__class__ = type(own.__name__, (own,), {"__module__": own.__module__})
    names = ("Fn_compute_blocks", "Bn_compute_blocks", "max_warmup_steps", "warmup_interval", "max_cached_steps",
             "max_continuous_cached_steps", "residual_diff_threshold")
    config = cache_dit.DBCacheConfig(**{name: getattr(options, name) for name in names},
                                     enable_separate_cfg=separate_cfg)
    calibrator = None
    if options.enable_taylorseer:
        calibrator = cache_dit.TaylorSeerCalibratorConfig(
            taylorseer_order=options.taylorseer_order, enable_encoder_calibrator=options.enable_encoder_taylorseer)
    cache_dit.enable_cache(pipeline, cache_config=config, calibrator_config=calibrator)


def cached_steps(pipeline) -> list[int]:
    """The steps of the last image whose middle blocks were taken from the cache."""
    import cache_dit

    return [int(step) for step in cache_dit.summary(pipeline, logging=False)[0].cached_steps]
