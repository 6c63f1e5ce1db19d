import os
import sys
from collections.abc import Iterable

import pytest
import torch
import torchao.quantization.quant_api
from diffusers.models.autoencoders.vae import Decoder

from utils import attention, hardware, pipeline_utils, plan, random_weights, start
from utils.benchmark_utils import create_parser
from utils.common import run_cli

# Two OpenMP processes on two cores spin against each other: an image of 0.2 s can take 20.
torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _seed():
    """Random inputs that no bound was measured on would fail one run in many."""
    torch.manual_seed(0)


@pytest.fixture
def make_args():
    """Arguments as the command line gives them: make_args("--ckpt", "tiny-flux", ...)."""
    def make(*argv):
        return create_parser(measure=True).parse_args(["--device", "cpu", "--quiet", *argv])
    return make


@pytest.fixture(scope="session")
def _kernels(tmp_path_factory):
    """One folder for all workers, so that each kernel is compiled once a run."""
    of_worker = tmp_path_factory.getbasetemp()
    folder = (of_worker.parent if "PYTEST_XDIST_WORKER" in os.environ else of_worker) / "inductor"
    folder.mkdir(exist_ok=True)
    return str(folder)


@pytest.fixture
def compiler(_kernels, monkeypatch):
    """torch.compile with nothing traced yet, and compiled kernels shared by the tests of one run only."""
    monkeypatch.setitem(start.GIVEN, "TORCHINDUCTOR_CACHE_DIR", _kernels)
    for name in ("TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR"):
        monkeypatch.setenv(name, _kernels)
    torch._dynamo.reset()
    with torch._inductor.config.patch({}):
        yield


@pytest.fixture
def without_vae(monkeypatch):
    """The VAE is not compiled, which takes longer than the blocks."""
    monkeypatch.setattr(Decoder, "compile", lambda *_, **__: None)


@pytest.fixture
def build():
    """A small pipeline with random weights, the same ones for the same name and dtype."""
    def make(name="tiny-flux", dtype=torch.float32, layers="full"):
        pipeline = random_weights.build(random_weights.architecture(name, layers), "cpu", dtype)
        pipeline.set_progress_bar_config(disable=True)
        return pipeline
    return make


@pytest.fixture
def float8_on_cpu(monkeypatch):
    """torchao refuses float8 on a CPU although PyTorch computes it there, slowly."""
    monkeypatch.setattr(torchao.quantization.quant_api, "_check_hardware_support", lambda *_: None)
    monkeypatch.setattr(hardware.Hardware, "has_float8", True)


def pretend_hopper(patch: pytest.MonkeyPatch, names: Iterable[str] = ("attention", "quantization", "fused_kernels")):
    """From now on `optimize` has these techniques on, as on a Hopper GPU; the kernels' references stand in for them.

    Blocks and attention are in fp8, or with --quality high or --quant_dtype int8 in int8 and bf16.
    """
    def planned(args, *given):
        chosen = plan.make_plan(args, *given)
        in_int8 = args.quality == "high" or args.quant_dtype == "int8"
        for name in names:
            getattr(chosen, name).on = True
        if "attention" in names:
            chosen.attention.backend = "fa3_bf16" if in_int8 else "fa3"
            patch.setattr(attention, "register_library", lambda *_: None)
        if "quantization" in names:
            chosen.quantization.dtype, chosen.quantization.granularity = "int8" if in_int8 else "float8", "row"
        if {"attention", "quantization"} & set(names) and not (args.skip_fp8_check or args.context_parallel):
            chosen.fp8_check = plan.Check()
        return chosen

    patch.setattr(pipeline_utils, "make_plan", planned)
    if "cuda_graphs" in names:
        patch.setattr(pipeline_utils, "CUDAGraphModule", lambda module, pool=None: module)


def exit_code_of(monkeypatch, script, *argv: str) -> int:
    """The exit code of gen_image or run_benchmark with these arguments, in this process."""
    monkeypatch.setattr(sys, "argv", [script.__name__, *argv])
    try:
        run_cli(script.main)
    except SystemExit as end:
        return end.code
    return 0


def pretend_world_size(monkeypatch, processes: int, rank: int = 0) -> None:
    """The variables that torchrun and accelerate launch set."""
    for name, value in dict(RANK=rank, LOCAL_RANK=rank, WORLD_SIZE=processes, LOCAL_WORLD_SIZE=processes,
                            MASTER_ADDR="127.0.0.1", MASTER_PORT=29500).items():
        monkeypatch.setenv(name, str(value))


def skip_without_float8_products() -> None:
    """torch 2.11 multiplies float8 on a CPU with one scale a tensor only, and compiles no such product."""
    if torch.__version__ < "2.12":
        pytest.skip("torch 2.11 lacks float8 products on a CPU")


def relative(found, reference):
    """||found - reference|| / ||reference||."""
    return ((found.double() - reference.double()).norm() / reference.double().norm()).item()
