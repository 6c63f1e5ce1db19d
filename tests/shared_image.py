"""What the processes of tests/test_parallel.py run: `torchrun tests/shared_image.py CASES.json OUT.pt`.

A case is {"argv": [...], "as_on_hopper": [...]}: the command line, and the techniques to switch on as `plan` does on a
Hopper GPU; on a CPU the kernels' references stand in for them. OUT.pt holds each case's latents by its name, and by
(name, "residuals") the residual differences by which a step cache decided. A case with "fails_on" makes that process
fail in the middle of its image; "how" says in which way.
"""

import faulthandler
import gc
import json
import os
import signal
import sys
import time
from datetime import timedelta
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent.parent))

from conftest import pretend_hopper

from utils import context_parallel
from utils.benchmark_utils import check_args, create_parser
from utils.cache import dbcache
from utils.common import run_cli
from utils.pipeline_utils import call_kwargs, load_pipeline, optimize
from utils.plan import describe


class Drawn(NamedTuple):
    """One image by its latents, and what the recipe did for it."""
    latents: torch.Tensor
    other_seed: torch.Tensor  # the latents of --seed 1
    context_parallel: str  # the technique's line
    cached: list[int]  # the steps that a step cache skipped
    residuals: dict  # the residual differences by which it decided


def draw(argv: list[str], fails_on: int | None = None, how: str = "") -> Drawn:
    """Draws the image of a command line, among other processes with --context_parallel.

    Args:
        fails_on: the rank that fails in the middle of its image, while the others wait for it in an exchange.
        how: in which way, see `fail`.
    """
    args = create_parser(measure=True).parse_args(argv)
    check_args(args)
    if args.context_parallel and not torch.distributed.is_initialized():
        context_parallel.init_distributed(args)
    pipeline = load_pipeline(args)
    pipeline.vae.decoder.compile = lambda **_: None  # latents are all that counts here
    pipeline = optimize(pipeline, args)
    if fails_on is not None and torch.distributed.get_rank() == fails_on:
        pipeline.transformer.register_forward_pre_hook(lambda *_: fail(how))

    def latents(**changes):
        return pipeline(**call_kwargs(pipeline, args, **changes), output_type="latent").images.cpu()

    found, cached, residuals = latents(), [], {}
    if pipeline.plan.step_cache.on:
        cached, residuals = dbcache.cached_steps(pipeline), dbcache.residual_diffs(pipeline)
    for _ in range(20 * torch.cuda.is_available()):  # one GPU that reads before another has written shows now and then
        assert torch.equal(latents(), found)
    other_seed = latents(seed=1)
    torch._dynamo.reset()  # each case is compiled for itself
    faulthandler.cancel_dump_traceback_later()  # which would end this process half an hour after its last step
    return Drawn(found, other_seed, describe(pipeline.plan.context_parallel), cached, residuals)


def draw_case(argv: list[str], as_on_hopper: list[str] | tuple = (), **failure) -> Drawn:
    """`draw` as on a Hopper GPU; afterwards this process is as it was."""
    with pytest.MonkeyPatch.context() as patch:
        pretend_hopper(patch, as_on_hopper)
        if failure:
            patch.setattr(context_parallel, "TIMEOUT", timedelta(seconds=10))
        return draw(argv, **failure)


def fail(how: str) -> None:
    if how == "raises":
        raise RuntimeError("this process has had enough")
    if how == "is killed":
        os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(3600)


def main() -> None:
    cases, out = json.loads(Path(sys.argv[1]).read_text()), {}
    for name, case in cases.items():
        drawn = draw_case(**case)
        # Of the first process, for its own part if they did not share.
        out[name], out[name, "residuals"] = drawn.latents, drawn.residuals
        if context_parallel.is_main_process():
            print(f"{name}: {drawn.context_parallel}", file=sys.stderr)
        gc.collect()
    if context_parallel.is_main_process():
        torch.save(out, sys.argv[2])


if __name__ == "__main__":
    if not torch.cuda.is_available():
        torch.set_num_threads(1)
    run_cli(main)
