"""What the processes of tests/test_parallel.py run: `torchrun tests/shared_image.py CASES.json OUT.pt`.

A case is {"argv": [...], "as_on_hopper": [...]}: the command line, and the techniques to switch on as `plan` does on a
Hopper GPU; on a CPU the kernels' references stand in for them. OUT.pt holds each case's latents by its name, and by
(name, "decided") the residual differences by which a step cache decided. A case with "fails_on" makes that process fail
in the middle of its image; "how" says in which way.
"""

import gc
import json
import os
import signal
import sys
import time
from datetime import timedelta
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent.parent))

from utils import parallel, pipeline_utils, step_cache
from utils.benchmark_utils import create_parser, exit_with_reason
from utils.checks import check_args
from utils.pipeline_utils import call_kwargs, load_pipeline, optimize
from utils.techniques import Decision

PLAN = pipeline_utils.plan


def latents(argv: list[str], as_on_hopper: tuple | list = (), **failure) -> torch.Tensor:
    args = create_parser().parse_args(argv)
    check_args(args)
    if args.context_parallel and not torch.distributed.is_initialized():
        parallel.join(args)

    def plan(*given):
        chosen = PLAN(*given)
        for name in as_on_hopper:
            chosen.decisions[name] = Decision(True, "")
        if "attention" in as_on_hopper:
            chosen.attention_backend = "fa3"
        if "quantisation" in as_on_hopper:
            chosen.quant = ("float8", "row")
        if "CUDA graphs" in as_on_hopper:  # of which a step cache makes one a segment
            pipeline_utils.CUDAGraphed, torch.cuda.graph_pool_handle = lambda module, pool=None: module, lambda: None
        return chosen

    pipeline_utils.plan = plan
    pipeline = load_pipeline(args)
    pipeline.vae.decoder.compile = lambda **_: None  # latents are all that counts here
    pipeline = optimize(pipeline, args)
    if failure:
        parallel.TIMEOUT = timedelta(seconds=10)
        if torch.distributed.get_rank() == failure["fails_on"]:  # while the others wait for it in an exchange
            pipeline.transformer.register_forward_pre_hook(lambda *_: fail(failure["how"]))
    latents.how = pipeline.techniques["context parallel"].how
    found = pipeline(**call_kwargs(pipeline, args), output_type="latent").images.cpu()
    latents.cached = latents.decided = None
    if pipeline.techniques["step cache"].on:
        latents.cached, latents.decided = step_cache.cached_steps(pipeline), step_cache.residual_diffs(pipeline)
    for _ in range(20 * torch.cuda.is_available()):  # one GPU that reads before another has written shows now and then
        assert torch.equal(pipeline(**call_kwargs(pipeline, args), output_type="latent").images.cpu(), found)
    torch._dynamo.reset()  # each case is compiled for itself
    return found


def fail(how: str) -> None:
    if how == "raises":
        raise RuntimeError("this process has had enough")
    if how == "is killed":
        os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(3600)


def main() -> None:
    cases, out = json.loads(Path(sys.argv[1]).read_text()), {}
    for name, case in cases.items():
        out[name] = latents(**case)
        out[name, "decided"] = latents.decided  # by the first process, for its own part if they did not share
        if parallel.is_first():
            print(f"{name}: {latents.how}", file=sys.stderr)
        gc.collect()
    if parallel.is_first():
        torch.save(out, sys.argv[2])


if __name__ == "__main__":
    if not torch.cuda.is_available():
        torch.set_num_threads(1)
    exit_with_reason(main)
