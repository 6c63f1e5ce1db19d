"""Draws tiny-flux's pictures with diffusers' own step caches: results/NAME/diffusers_caches.json.

    python results/diffusers_caches.py cpu    # a quarter of an hour on two cores

The prompts, seeds and reference (eager bf16) of `tiny_flux.pictures`, 28 steps, to be read beside the rows of
results/NAME/tiny. Each cache at several settings, which compute 10 to 22 steps' worth of the blocks; MagCache and
TaylorSeer warm up for as many steps as utils/extrapolation.py, FirstBlockCache knows no warm-up. MagCache's ratios are
of the checkpoint: they are taken by its own calibration, from prompts that are not among those that count.
"""

import ast
import contextlib
import io
import re
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from diffusers import FirstBlockCacheConfig, MagCacheConfig, TaylorSeerCacheConfig

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

from experiments import EAGER, OFF  # noqa: E402
from tiny_flux import pictures  # noqa: E402
from utils.benchmark_utils import create_parser, environment  # noqa: E402
from utils.extrapolation import WARM_UP  # noqa: E402
from utils.outputs import write_json  # noqa: E402
from utils.pipeline_utils import call_kwargs, load_pipeline, optimize  # noqa: E402

STEPS, COUNT, CALIBRATED_ON = 28, 100, 10


def settings(ratios: list[float]) -> dict[str, object]:
    """{name: what `enable_cache` takes}, in each cache's own terms."""
    taylor = {"disable_cache_before_step": WARM_UP, "disable_cache_after_step": STEPS - 1, "use_lite_mode": True,
              "taylor_factors_dtype": torch.float32}
    return (
        {f"FirstBlockCache, threshold {x}": FirstBlockCacheConfig(threshold=x) for x in (0.08, 0.12, 0.16, 0.2)}
        | {f"MagCache, threshold {x}, at most {most} in a row":
           MagCacheConfig(threshold=x, max_skip_steps=most, retention_ratio=WARM_UP / STEPS, num_inference_steps=STEPS,
                          mag_ratios=ratios)
           for x, most in ((0.06, 1), (0.06, 3), (0.24, 3), (0.5, 5))}
        | {f"TaylorSeer, order {order}, every {interval} steps":
           TaylorSeerCacheConfig(cache_interval=interval, max_order=order, **taylor)
           for interval, order in ((2, 1), (3, 1), (3, 2), (4, 1))})


def counting(transformer: torch.nn.Module) -> Callable[[], float]:
    """Counts what runs of the blocks' linear layers, by their weights; the call gives it in steps that run all."""
    layers = [layer for blocks in (transformer.transformer_blocks, transformer.single_transformer_blocks)
              for layer in blocks.modules() if isinstance(layer, torch.nn.Linear)]
    ran = []
    for layer in layers:
        layer.register_forward_pre_hook(lambda layer, _: ran.append(layer.weight.numel()))
    return lambda: sum(ran) / sum(layer.weight.numel() for layer in layers)


def calibrated(args) -> list[float]:
    """MagCache's ratios of each step: the mean over `CALIBRATED_ON` pictures."""
    pipeline = optimize(load_pipeline(args), args)
    pipeline.transformer.enable_cache(MagCacheConfig(calibrate=True, num_inference_steps=STEPS))
    texts, _ = pictures.prompts(COUNT + 2 * CALIBRATED_ON)
    found = []
    for i, text in enumerate(texts[COUNT // 2:COUNT // 2 + CALIBRATED_ON]):
        with contextlib.redirect_stdout(io.StringIO()) as told:  # where it says them, and nowhere else
            pipeline(**call_kwargs(pipeline, args, prompt=text, seed=1000 + i), output_type="latent")
        found.append(ast.literal_eval(re.search(r"\[[\d., e+-]+\]", told.getvalue())[0]))
    return np.mean(found, axis=0).tolist()


@torch.no_grad()
def main():
    if len(sys.argv) != 2 or not (ROOT / "results" / sys.argv[1]).is_dir():
        sys.exit(__doc__)
    argv = [*EAGER, *OFF]
    args = create_parser().parse_args(["--ckpt", "tiny-flux-dev", "--quiet", *argv])
    texts, _ = pictures.prompts(COUNT)
    reference, _ = pictures.draw(args, texts)
    ratios, rows = calibrated(args), {}
    for name, config in settings(ratios).items():
        counted = []

        def prepare(pipeline, config=config, counted=counted):
            counted.append(counting(pipeline.transformer))
            pipeline.transformer.enable_cache(config)

        drawn, facts = pictures.draw(args, texts, prepare)
        rows[name] = {"computed_steps": counted[0]() / COUNT, "seconds": facts["seconds"],
                      **pictures.compare(drawn, reference)}
        print(name, rows[name]["computed_steps"], rows[name]["given"], rows[name]["open"], flush=True)
    write_json(str(ROOT / "results" / sys.argv[1] / "diffusers_caches.json"),
               {"argv": argv, "prompts": COUNT, "mag_ratios": ratios, "rows": rows,
                "environment": environment(args.device)})


if __name__ == "__main__":
    main()
