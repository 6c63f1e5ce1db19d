"""One image on several processes is that of one process; a dead one ends them all.

On a CPU: quick tests exchange among the threads of one process, slow ones among processes, over gloo.
"""

import faulthandler
import gc
import json
import os
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
import torch
import torch.distributed as dist
from conftest import pretend_hopper, pretend_world_size, relative
from shared_image import draw, draw_case

from bench import link
from bench.link import bytes_sent, expected_step
from bench.quality import capture_step
from utils import context_parallel, many_prompts, pipeline_utils, random_weights
from utils.benchmark_utils import check_args
from utils.common import RecipeError
from utils.images import read_parameters
from utils.pipeline_utils import call_kwargs, load_pipeline
from utils.random_weights import architecture
from utils.reference_image import reference_tokens

ROOT = Path(__file__).parent.parent
EAGER = ["--device", "cpu", "--quiet", "--compile_export_mode", "disabled", "--num_inference_steps", "2"]
FLOAT32 = [*EAGER, "--disable_bf16"]
FUSED = ["attention", "quantization", "fused_kernels"]
# The trained checkpoint has 3 heads, which two processes cannot divide; with random weights it has 4.
SCHNELL = ["--ckpt", "tiny-flux", "--random_weights"]
DEV = ["--ckpt", "tiny-flux-dev", "--random_weights"]
KONTEXT = ["--ckpt", "tiny-kontext", "--random_weights", "--image", "PICTURE"]
MASKED = ["--image", "PICTURE", "--mask_image", "MASK"]
# Of the trained model residuals are small; of random weights they are half of what they are compared with.
CACHE = "Fn_compute_blocks: 2\nBn_compute_blocks: 2\nmax_warmup_steps: 2\nmax_continuous_cached_steps: 2\n" \
        "residual_diff_threshold: 0.7\n"
# What is lost to products of other heights, in float32; and in e4m3, where a rounding can cross to the next of 16
# values in an octave. Measured: 1e-7, and 0.0065 at most. In int8, 0.003.
CASES = {
    "schnell, ulysses": (dict(argv=[*SCHNELL, *FLOAT32, "--context_parallel", "auto"]), 1e-5),
    "dev, ring, batch of 3": (dict(argv=[*DEV, *FLOAT32, "--num_images_per_prompt", "3", "--context_parallel", "ring"]),
                              1e-5),
    "dev, ulysses, batch, negative prompt": (dict(
        argv=[*DEV, *FLOAT32, "--num_images_per_prompt", "2", "--negative_prompt", "red", "--true_cfg_scale", "2",
              "--context_parallel", "ulysses"]), 1e-5),
    "kontext, ulysses": (dict(argv=[*KONTEXT, *FLOAT32, "--context_parallel", "ulysses"]), 1e-5),
    "inpainting, ulysses": (dict(argv=[*DEV, *FLOAT32, *MASKED, "--context_parallel", "ulysses"]), 1e-5),
    "kontext, inpainting, ring": (dict(argv=[*KONTEXT, *FLOAT32, *MASKED[2:], "--context_parallel", "ring"]), 1e-5),
    "fused, fill, ulysses": (dict(argv=["--ckpt", "tiny-fill", "--random_weights", *EAGER, *MASKED,
                                        "--context_parallel", "ulysses"], as_on_hopper=FUSED), 0.015),
    "redux, ulysses": (dict(argv=[*DEV, *FLOAT32, "--redux", "PICTURE", "--context_parallel", "ulysses"]), 1e-5),
    "trained, auto is ring": (dict(argv=["--ckpt", "tiny-flux", *FLOAT32, "--context_parallel", "auto"]), 1e-5),
    "fp8 attention, ulysses": (dict(argv=[*SCHNELL, *EAGER, "--context_parallel", "auto"],
                                    as_on_hopper=["attention"]), 0.015),
    "fp8 attention, ring": (dict(argv=[*SCHNELL, *EAGER, "--context_parallel", "ring"],
                                 as_on_hopper=["attention"]), 0.015),
    "fused, schnell, ulysses": (dict(argv=[*SCHNELL, *EAGER, "--context_parallel", "auto"], as_on_hopper=FUSED), 0.015),
    "fused, dev, batch of 2, ulysses": (dict(
        argv=[*DEV, *EAGER, "--num_images_per_prompt", "2", "--context_parallel", "ulysses"], as_on_hopper=FUSED),
        0.015),
    "trained, step cache": (dict(
        argv=[*DEV[:2], *FLOAT32, "--num_inference_steps", "10", "--cache_preset", "extreme", "--context_parallel",
              "ring"]), 1e-5),
    "fused, extrapolated, negative prompt": (dict(
        argv=[*DEV, *EAGER, "--num_inference_steps", "10", "--step_cache", "taylorseer", "--negative_prompt", "red",
              "--true_cfg_scale", "2", "--context_parallel", "ulysses"], as_on_hopper=[*FUSED, "cuda_graphs"]), 0.015),
    "fused, step cache, batch, negative prompt": (dict(
        argv=[*DEV, *EAGER, "--num_inference_steps", "6", "--cache_dit_config", "CACHE", "--num_images_per_prompt", "2",
              "--negative_prompt", "red", "--true_cfg_scale", "2", "--context_parallel", "ulysses"],
        as_on_hopper=[*FUSED, "cuda_graphs"]), 0.015),
    "fused, kontext, ring": (dict(argv=[*KONTEXT, *EAGER, "--context_parallel", "ring"], as_on_hopper=FUSED), 0.015),
    "int8, dev, batch of 2, ulysses": (dict(
        argv=[*DEV, *EAGER, "--quality", "high", "--num_images_per_prompt", "2", "--context_parallel", "ulysses"],
        as_on_hopper=FUSED), 0.007),
    "int8, kontext, ring": (dict(argv=[*KONTEXT, *EAGER, "--quality", "high", "--context_parallel", "ring"],
                                 as_on_hopper=FUSED), 0.007),
}
COMPILED = [*SCHNELL[:2], "--random_weights", "1+1", "--device", "cpu", "--quiet", "--disable_quant",
            "--disable_inductor_tuning_flags"]


# What is on by default on a Hopper GPU, at full width, but for packages.
FULL_WIDTH = ["--ckpt", "FLUX.1-schnell", "--random_weights", "1+2", "--height", "256", "--width", "384", "--quiet",
              "--disable_inductor_tuning_flags", "--compile_export_mode", "compile"]


two_gpus = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")


def torchrun(folder, *command, processes=2, timeout=240):
    return subprocess.run([sys.executable, "-m", "torch.distributed.run", "--standalone",
                           f"--nproc_per_node={processes}", *map(str, command)], cwd=folder, capture_output=True,
                          text=True, timeout=timeout, env=os.environ | {"OMP_NUM_THREADS": "1"})


def run_cases(folder, cases: dict, **options):
    (folder / "cases.json").write_text(json.dumps(cases))
    return torchrun(folder, ROOT / "tests" / "shared_image.py", "cases.json", "out.pt", **options)


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """What stands for files in the cases, and their paths."""
    folder = tmp_path_factory.mktemp("files")
    found = {"PICTURE": str(folder / "x.png"), "CACHE": str(folder / "cache.yaml")}
    PIL.Image.fromarray(np.random.default_rng(0).integers(0, 255, (60, 90, 3), dtype=np.uint8)).save(found["PICTURE"])
    found["MASK"] = str(folder / "mask.png")
    PIL.Image.linear_gradient("L").resize((90, 60)).save(found["MASK"])
    Path(found["CACHE"]).write_text(CACHE)
    return found


@pytest.fixture(scope="module")
def shared(tmp_path_factory, files):
    """{case: latents of two processes}; all cases in one start of them."""
    pytest.importorskip("triton", reason="Triton is not installed: pip install triton")
    cases = {name: case | {"argv": [files.get(a, a) for a in case["argv"]]}
             for name, (case, _) in CASES.items()}
    folder = tmp_path_factory.mktemp("shared")
    done = run_cases(folder, cases)
    assert done.returncode == 0, done.stderr[-3000:]
    return torch.load(folder / "out.pt")


def compare_with_one(name: str, shared: torch.Tensor, residuals: dict, argv: list[str]) -> None:
    """The latents that several ranks drew for the case `name` are those of one rank, whose command line is `argv`."""
    case, bound = CASES[name]
    alone = draw_case(argv, case.get("as_on_hopper", ()))
    assert shared.shape == alone.latents.shape and relative(shared, alone.latents) < bound
    assert relative(shared, alone.other_seed) > 0.1
    if "step cache" in name:
        # One process's part alone is up to 5 % off. In bf16 means of 8 bits are compared.
        rounding = 1e-3 if "--disable_bf16" in argv else 0.02
        assert alone.cached and residuals == pytest.approx(alone.residuals, rel=rounding)


def without_sharing(argv: list[str]) -> list[str]:
    at = argv.index("--context_parallel")
    return argv[:at] + argv[at + 2:]


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_two_processes_draw_the_picture_of_one(name, shared, files):
    argv = [files.get(a, a) for a in CASES[name][0]["argv"]]
    compare_with_one(name, shared[name], shared[name, "residuals"], without_sharing(argv))


class Threads:
    """torch.distributed's exchanges among threads of this process, each of which is a rank."""

    def __init__(self, ranks: int, patch: pytest.MonkeyPatch):
        self.ranks, self.own = ranks, threading.local()
        self.barrier, self.given = threading.Barrier(ranks, timeout=60), [None] * ranks
        for name in ("is_initialized", "get_world_size", "get_rank", "all_to_all_single", "all_reduce"):
            patch.setattr(dist, name, getattr(self, name))

    def run(self, function, *args) -> list:
        """What `function` returns on each rank."""
        def on(rank):
            self.own.rank = rank
            try:
                return function(*args)
            except BaseException:
                self.barrier.abort()
                raise

        with ThreadPoolExecutor(self.ranks) as pool:
            return list(pool.map(on, range(self.ranks)))

    def is_initialized(self):
        return True

    def get_world_size(self):
        return self.ranks

    def get_rank(self):
        return self.own.rank

    def all_to_all_single(self, received, x, by=None, to=None, async_op=False):
        self.given[self.own.rank] = x.split(to) if to else x.chunk(self.ranks)
        self.barrier.wait()
        received.copy_(torch.cat([parts[self.own.rank] for parts in self.given]))
        self.barrier.wait()
        return self

    def all_reduce(self, x, operation):
        assert operation == dist.ReduceOp.MAX
        self.given[self.own.rank] = x.clone()
        self.barrier.wait()
        x.copy_(torch.stack(self.given).amax(0))
        self.barrier.wait()

    def wait(self):
        pass


@pytest.mark.parametrize("name", ["dev, ulysses, batch, negative prompt", "fp8 attention, ring",
                                  "fused, dev, batch of 2, ulysses", "fused, kontext, ring"])
def test_two_threads_draw_the_picture_of_one(name, files, monkeypatch):
    """The cases above on a transformer of 1 + 1 blocks."""
    case, _ = CASES[name]
    argv = [part for a in case["argv"] for part in ([a, "1+1"] if a == "--random_weights" else [files.get(a, a)])]
    with monkeypatch.context() as patch:
        pretend_world_size(patch, 2)
        pretend_hopper(patch, case.get("as_on_hopper", ()))
        first, second = Threads(2, patch).run(draw, argv)
    assert torch.equal(first.latents, second.latents) and "2 processes" in first.context_parallel
    compare_with_one(name, first.latents, first.residuals, without_sharing(argv))


@pytest.mark.slow
def test_compiled_blocks_hold_the_exchanges(tmp_path, compiler):
    """Whole graphs (`fullgraph`), one kind of block each: no exchange falls out of them."""
    cases = {"ring": {"argv": [*COMPILED, "--disable_bf16", "--context_parallel", "ring"]},
             "fp8": {"argv": [*COMPILED, "--context_parallel", "ulysses"], "as_on_hopper": ["attention"]}}
    done = run_cases(tmp_path, cases, timeout=500)
    assert done.returncode == 0, done.stderr[-3000:]
    found = torch.load(tmp_path / "out.pt")
    for name, bound in (("ring", 1e-4), ("fp8", 0.015)):
        alone = cases[name] | {"argv": [*cases[name]["argv"][:-2], "--compile_export_mode", "disabled"]}
        assert relative(found[name], draw_case(**alone).latents) < bound, name


@pytest.mark.slow
def test_scripts_of_two_processes_write_once(tmp_path):
    """Two pictures, which each process decodes one of, and one line of JSON."""
    argv = [*SCHNELL, *FLOAT32, "--num_images_per_prompt", "2", "--context_parallel", "auto"]
    argv.remove("--quiet")
    done = torchrun(tmp_path, ROOT / "gen_image.py", *argv)
    assert done.returncode == 0, done.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["output_000_42.png", "output_001_43.png"]
    assert read_parameters(tmp_path / "output_000_42.png")["techniques"]["context parallel"]["kind"] == "ulysses"
    assert done.stderr.count("wrote output_000_42.png") == 1 and done.stderr.count("  context parallel ") == 1
    alone = subprocess.run([sys.executable, ROOT / "gen_image.py", *argv[:-2], "--output-file", "alone.png"],
                           cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert alone.returncode == 0, alone.stderr
    for i, seed in ((0, 42), (1, 43)):
        one, two = (np.asarray(PIL.Image.open(tmp_path / f"{name}_{i:03d}_{seed}.png")).astype(int)
                    for name in ("alone", "output"))
        assert np.abs(one - two).max() <= 1

    done = torchrun(tmp_path, ROOT / "run_benchmark.py", *argv, "--runs", "2", "--warmup", "1", "--output-json",
                    "r.json", "--trace-file", "t.json", "--step_error")
    assert done.returncode == 0, done.stderr
    record = json.loads(done.stdout.splitlines()[-1])
    assert record == json.loads((tmp_path / "r.json").read_text()) and (tmp_path / "t.json").exists()
    assert sum(line.startswith("{") for line in done.stdout.splitlines()) == 1
    assert record["environment"]["processes"] == 2 and record["techniques"]["context parallel"]["on"]
    assert 0.5 < record["cold_start_s"]["imports"] < 60
    assert record["roofline"]["image_tokens"] == 64 and record["step_relative_error"] < 1e-5


@pytest.mark.parametrize("argv", [
    pytest.param([*SCHNELL, *EAGER], id="cpu", marks=pytest.mark.slow),
    pytest.param(FULL_WIDTH, id="gpu", marks=[pytest.mark.gpu, two_gpus])])
@pytest.mark.parametrize("how, text", [("raises", "this process has had enough"), ("is killed", "Signal 9 (SIGKILL)"),
                                       ("is stuck", "Timeout (0:00:10)")])
def test_dead_process_ends_all_others(tmp_path, argv, how, text):
    start = time.monotonic()
    done = run_cases(tmp_path, {"x": {"argv": [*argv, "--context_parallel", "auto"], "fails_on": 1, "how": how}})
    assert done.returncode != 0 and text in done.stderr and not (tmp_path / "out.pt").exists()
    assert time.monotonic() - start < 200


@pytest.mark.gpu
@pytest.mark.parametrize("kind", ["ulysses", "ring"])
@pytest.mark.parametrize("gpus", [pytest.param(2, marks=two_gpus), pytest.param(4, marks=pytest.mark.skipif(
    torch.cuda.device_count() < 4, reason="needs four GPUs"))])
def test_gpus_draw_the_picture_of_one(tmp_path, gpus, kind):
    """1 + 2 blocks of full width with all that is on by default, CUDA graphs among it; without the fused kernels,
    whose blocks are then compiled; PyTorch's attention; a step cache that decides; and extrapolated steps.
    The bound is that of one GPU against eager bf16."""
    dev = ["--ckpt", "FLUX.1-dev", "--num_inference_steps", "10"]
    cache = ["--cache_dit_config", str(tmp_path / "cache.yaml")]
    variants = [[kind, *more] for more in (
        [], ["--quality", "high"], ["--disable_fused_kernels"], ["--attention_backend", "native"],
        ["--num_images_per_prompt", "2", "--negative_prompt", "red", "--true_cfg_scale", "2"],
        [*dev, *cache], [*dev, "--step_cache", "taylorseer"])]
    # Random weights' residuals are large, and are to be below it.
    (tmp_path / "cache.yaml").write_text(
        "Fn_compute_blocks: 1\nBn_compute_blocks: 0\nmax_warmup_steps: 2\nresidual_diff_threshold: 0.999\n")
    cases = {" ".join(argv): {"argv": [*FULL_WIDTH, "--cache-dir", str(tmp_path), "--context_parallel", *argv]}
             for argv in variants}
    done = run_cases(tmp_path, cases, processes=gpus, timeout=900)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stderr.count(", through each other's memory") == (5 if kind == "ulysses" else 0)  # on the fused kernels
    found, errors = torch.load(tmp_path / "out.pt"), {}
    for name, case in cases.items():
        alone = draw_case(without_sharing(case["argv"]))
        errors[name] = relative(found[name], alone.latents)
        if "FLUX.1-dev" in name:
            assert alone.cached and found[name, "residuals"].keys() == alone.residuals.keys()
            assert alone.residuals or "taylorseer" in name
        gc.collect()
    assert max(errors.values()) < 0.03, errors


REFUSED = [
    ([], 1, "torchrun --nproc_per_node=2 .*--context_parallel auto"),
    (["--prompts-file", "README.md"], 2, "--context_parallel auto.*--prompts-file"),
    (["--compile_scope", "whole"], 2, "--compile_scope whole.*--context_parallel auto"),
    (["--compile_export_mode", "export_aoti"], 2, "--compile_export_mode export_aoti.*--context_parallel"),
]


@pytest.mark.parametrize("argv, processes, text", REFUSED, ids=lambda x: " ".join(x) if isinstance(x, list) else "")
def test_check_args_context_parallel_with_what_it_excludes_is_refused(make_args, monkeypatch, argv, processes, text):
    pretend_world_size(monkeypatch, processes)
    with pytest.raises(RecipeError, match=f"(?s){text}"):
        check_args(make_args("--context_parallel", "auto", *argv))


def test_check_args_several_processes_without_work_to_share_are_refused(make_args, monkeypatch):
    pretend_world_size(monkeypatch, 2)
    with pytest.raises(RecipeError, match=r"\b2 .*--prompts-file.*--context_parallel auto"):
        check_args(make_args())
    check_args(make_args("--context_parallel", "auto"))
    check_args(make_args("--prompts-file", "README.md"))
    assert many_prompts.join_processes(make_args("--context_parallel", "auto")) is None


@pytest.mark.parametrize("argv, processes, text", [
    (["--ckpt", "tiny-flux", "--context_parallel", "ulysses"], 2,
     r"--context_parallel ulysses.*\b3 .*\b2 .*--context_parallel ring"),
    (["--ckpt", "tiny-flux", "--context_parallel", "auto"], 3, r"\b64 .*\b3 .*--nproc_per_node"),
    (["--ckpt", "tiny-flux", "--height", "80", "--width", "144", "--context_parallel", "auto"], 2,
     r"\b45 .*\b2 .*--height"),
    ([*KONTEXT, "--context_parallel", "auto"], 16, r"\b64 .*\b70 .*\b16 .*--height"),
    (["--ckpt", "tiny-flux", "--attention_backend", "flex", "--context_parallel", "auto"], 2,
     "--attention_backend flex.*--context_parallel.*fa3, .*native"),
], ids=lambda x: " ".join(x) if isinstance(x, list) else "")
def test_load_pipeline_indivisible_tokens_or_heads_are_refused(make_args, monkeypatch, files, argv, processes, text):
    for module, name in ((random_weights, "build"), (pipeline_utils.DiffusionPipeline, "from_pretrained")):
        monkeypatch.setattr(module, name, lambda *_, **__: pytest.fail("weights were loaded first"))
    pretend_world_size(monkeypatch, processes)
    with pytest.raises(RecipeError, match=f"(?s){text}"):
        load_pipeline(make_args(*[files.get(a, a) for a in argv]))


def test_join_more_processes_than_gpus_is_refused(make_args, monkeypatch):
    pretend_world_size(monkeypatch, 4, rank=2)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    args = make_args("--context_parallel", "auto")
    args.device = "cuda"
    with pytest.raises(RecipeError, match=r"\b4 .*\b2 "):
        context_parallel.init_distributed(args)


@pytest.mark.parametrize("size", [(60, 90), (1024, 1024), (1000, 700)])
def test_reference_tokens_are_the_pipelines(build, make_args, tmp_path, size):
    PIL.Image.new("RGB", size).save(tmp_path / "x.png")
    args = make_args("--ckpt", "tiny-kontext", "--image", str(tmp_path / "x.png"))
    inputs = capture_step(build("tiny-kontext"), call_kwargs(build("tiny-kontext"), args))
    assert inputs["hidden_states"].shape[1] == 64 + reference_tokens(PIL.Image.open(tmp_path / "x.png"), 128 * 128)
    # At a megapixel it is one of Kontext's own sizes: 1184 x 880 for 4:3.
    assert reference_tokens(PIL.Image.new("RGB", (800, 600)), 1024 * 1024) == 74 * 55


@pytest.fixture
def alone():
    """A group of this process alone."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def test_ops_on_one_process_keep_their_contracts(alone):
    x = torch.randn(1, 2, 8, 3, 4, 16)
    q, k, v = x[0].unbind(2)
    for op, args in ((context_parallel.all_to_all, (x,)), (context_parallel.all_reduce_max, (x,)),
                     (context_parallel.ring, (q, torch.stack([k, v]), None, None, None, "sdpa"))):
        torch.library.opcheck(op, args, test_utils=("test_schema", "test_faketensor"))
    expected = torch.nn.functional.scaled_dot_product_attention(*(one.transpose(1, 2) for one in (q, k, v)))
    for attend in context_parallel.ATTENTION.values():
        torch.testing.assert_close(attend(q, k, v, None, None, None, "sdpa"), expected.transpose(1, 2))


class Exchanges:
    """Counts the bytes that leave a process in the place of torch.distributed, for one that knows no others."""

    def __init__(self, gpus, monkeypatch):
        self.sent, self.gpus = 0, gpus
        for name, function in (("get_world_size", lambda: gpus), ("get_rank", lambda: 0),
                               ("all_to_all_single", self.all_to_all)):
            monkeypatch.setattr(dist, name, function)

    def all_to_all(self, received, x, by=None, to=None, async_op=False):
        sizes = to or [x[0].numel()] * self.gpus
        assert sum(sizes) == x.numel() and sum(by or sizes) == x.numel()
        self.sent += sum(sizes[1:]) * x.element_size()
        received.copy_(x)
        return self

    def wait(self):
        pass


@pytest.mark.parametrize("gpus", [2, 4])
@pytest.mark.parametrize("kind", ["ulysses", "ring"])
@pytest.mark.parametrize("as_on_hopper, sizes", [(FUSED, (1, 1)), (["attention"], (1, 2)), ([], (4, 4))])
@torch.no_grad()
def test_bytes_sent_are_those_that_a_step_sends(make_args, monkeypatch, kind, gpus, as_on_hopper, sizes):
    pretend_world_size(monkeypatch, gpus)
    seen = Exchanges(gpus, monkeypatch)
    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(dist, "all_reduce", lambda *_: None)  # a number a head
    argv = [*DEV, "1+1", *EAGER[:-1], "1", *(["--disable_bf16"] if not as_on_hopper else []),
            "--num_images_per_prompt", "2", "--context_parallel", kind]
    draw_case(argv, as_on_hopper)  # one step of two seeds
    expected = bytes_sent(kind, architecture("tiny-flux-dev", "1+1")["transformer"], 64, 64, gpus, 2, *sizes)
    output = expected["output"] * (1 if as_on_hopper else 2)  # float32
    assert seen.sent == 2 * (expected["attention"] + output)


def test_ulysses_attention_through_boxes_is_that_through_nccl(monkeypatch):
    seen, sent, q, k, v = Exchanges(2, monkeypatch), [], *torch.randn(3, 2, 6, 4, 8).unbind()

    class Boxes:
        @staticmethod
        def start(x, kind):
            sent.append((kind, x.shape))
            return lambda: context_parallel.all_to_all(x)

    found = [context_parallel.ulysses_attention(q, k, v, None, None, None, "sdpa", boxes) for boxes in (None, Boxes)]
    assert torch.equal(*found) and seen.sent
    # For each of two GPUs: half of the heads of this GPU's tokens, and back.
    assert sent == [("qkv", (2, 2, 6, 3, 2, 8)), ("attention", (2, 2, 6, 16))]


def test_bytes_sent_of_flux_are_those_by_hand():
    """FLUX.1-dev at 1024x1024 on two GPUs: each keeps half of its half of q, k, v and of the result."""
    config = architecture("FLUX.1-dev")["transformer"]
    half = 4608 // 2 * 3072
    assert bytes_sent("ulysses", config, 4096, 512, 2)["attention"] == 57 * (3 * half // 2 + half // 2)
    assert bytes_sent("ring", config, 4096, 512, 2)["attention"] == 57 * 2 * half
    assert bytes_sent("ring", config, 4096, 512, 8)["attention"] == 57 * 7 * 2 * (4608 // 8) * 3072
    assert bytes_sent("ulysses", config, 4096, 512, 2)["output"] == 2048 * 64 * 2
    assert expected_step({"shared": 0.08, "fixed": 0.001}, 10**9, 2, 2e11, 114 * 1e-5) == pytest.approx(
        0.04 + 0.001 + 0.005 + 0.00114)


def test_end_when_stuck_each_step_starts_the_timeout_anew(monkeypatch):
    """A real timeout, in a process of its own, is in `test_dead_process_ends_all_others`."""
    armed, transformer = [], torch.nn.Identity()
    monkeypatch.setattr(faulthandler, "dump_traceback_later", lambda seconds, exit: armed.append((seconds, exit)))
    context_parallel.start_watchdog(transformer)
    assert not armed
    for _ in range(2):
        transformer(torch.zeros(1))
    assert armed == [(context_parallel.TIMEOUT.total_seconds(), True)] * 2


def test_measurement_without_gpus_names_the_command(monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    with pytest.raises(RecipeError, match=r"torchrun --nproc_per_node=2 -m bench\.link"):
        link.main()
