"""Compiles every Triton and Gluon kernel for Hopper, without a GPU, as FLUX.1's launches ask for it.

The launching code runs on meta tensors of FLUX.1's shapes. A launch is recorded instead of started, and Triton compiles
it for sm_90a. `pytest tests/test_sm90.py -m "" -n 0 -rP` lists the registers and the shared memory of each kernel.
"""

import ast
import re
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from diffusers import AutoencoderKL
from interpreter import INTERPRETED
from torch import Tensor

pytest.importorskip("triton", reason="Triton is not installed: pip install triton")
pytest.importorskip("triton.backends.nvidia.compiler", reason="this Triton has no NVIDIA backend")

import triton
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import get_ptxas
from triton.runtime.jit import JITFunction

from utils import random_weights
from utils.kernels import casts, fused_vae, gemm, int8_gemm, layer_norm


def has_ptxas() -> bool:
    """Whether Triton finds the assembler that it would run for Hopper."""
    try:
        return bool(get_ptxas(90).path)
    except RuntimeError:
        return False


pytestmark = [pytest.mark.skipif(INTERPRETED, reason="Triton's interpreter compiles nothing"),
              pytest.mark.skipif(not has_ptxas(), reason="this Triton ships no ptxas")]

SHARED_MEMORY = 227 * 1024  # bytes that a thread block can have on sm_90
MULTIPROCESSORS = 132  # of an H100 SXM or H200
D, HEADS, MLP = 3072, 24, 12288
TABLE = (19 * 12 + 38 * 3 + 2) * D  # the modulations of all blocks and of the last norm
E4M3, F32, F16, INT64, INT8 = torch.float8_e4m3fn, torch.float32, torch.float16, torch.int64, torch.int8


class Pointer:
    """A tensor as far as Triton reads it when it compiles. PyTorch aligns memory to more than Triton asks about."""

    def __init__(self, tensor: Tensor):
        self.dtype, self.offset = tensor.dtype, tensor.storage_offset() * tensor.element_size()

    def data_ptr(self) -> int:
        return self.offset


class Hopper:
    """The part of Triton's driver that compiling needs. No GPU has its index, so none gets kernels compiled here."""

    def get_current_device(self) -> str:
        return "sm_90"

    def get_current_stream(self, device: str) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)


def new(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def adaln(residual: bool, text: int, image: int, int8: bool = False) -> None:
    """The LayerNorm of a block, with or without the residual add of the block before."""
    tokens, table, offsets = text + image, new(1, TABLE), new(2, dtype=INT64)
    bounds = new(2, 2 if int8 else 2 + 2 * HEADS, dtype=F32)
    streams = new(1, text, D, dtype=F16), new(1, image, D, dtype=F16)
    if residual:
        y = new(1, tokens, D), new(1, tokens, dtype=F32), new(1, D).expand(2, -1)
        layer_norm.residual_adaln._init_fn(*streams, *y, offsets, table, offsets, bounds, 0, 1, int8)
    else:
        layer_norm.adaln._init_fn(*streams, table, offsets, bounds, 0, 1, int8)


def gated_residual(text: int, image: int) -> None:
    layer_norm.gated_residual._init_fn(
        new(1, text, D, dtype=F16), new(1, image, D, dtype=F16), new(1, text + image, D),
        new(1, text + image, dtype=F32), new(2, D), new(2, dtype=INT64), new(1, TABLE))


def place_attention(tokens: int) -> None:
    casts.place_attention._init_fn(new(1, tokens, D), new(1, tokens, dtype=F32), new(1, tokens, D + MLP, dtype=E4M3))


def cast_int8(tokens: int, *widths: int) -> None:
    """Attention's and GELU's results, of which one may be 0 columns wide."""
    casts.cast_int8._init_fn(*(new(1, tokens, width) if width else None for width in widths))


def send_attention(tokens: int, gpus: int) -> None:
    casts.send_attention(new(1, tokens, D // gpus), new(1, dtype=F32), new(gpus, dtype=INT64), 1)


def gelu_gemm(text: int, image: int, streams: int) -> None:
    """The MLP's first GEMM. In a single block, attention's result lies beside its result."""
    tokens, rows = text + image, streams * MLP
    hidden = new(1, tokens, MLP + D * (streams == 1), dtype=E4M3)
    gemm.gelu_gemm._init_fn(
        new(1, tokens, D, dtype=E4M3), new(1, tokens, dtype=F32), new(rows, D, dtype=E4M3), new(rows, dtype=F32),
        new(rows), new(rows, dtype=F32), new(1, tokens, dtype=F32), hidden, text, streams)


def qkv_gemm(text: int, image: int, streams: int, gpus: int = 1) -> None:
    """The GEMM of q, k and v. Each of several GPUs has its share of the tokens."""
    text, tokens, rows, head = text // gpus, (text + image) // gpus, streams * 3 * D, D // HEADS
    gemm.qkv_gemm._init_fn(
        new(1, tokens, D, dtype=E4M3), new(1, tokens, dtype=F32), new(rows, D, dtype=E4M3), new(rows, dtype=F32),
        new(rows), new(streams, 3, head, dtype=F32), new(tokens, head // 2, dtype=F16),
        new(tokens, head // 2, dtype=F16), new(2, dtype=F32), new(1, tokens, dtype=F32),
        new(2, 2 + 2 * HEADS, dtype=F32), text, streams, gpus)


def gemm_in_int8(text: int, image: int, op, streams: int, rows: int, columns: int) -> None:
    """A GEMM of `columns` input columns, and `rows` output columns of each stream."""
    tokens, rows, head = text + image, streams * rows, D // HEADS
    vectors = {int8_gemm.int8_gemm: [new(rows, dtype=F32)],
               int8_gemm.int8_gelu_gemm: [new(rows), new(rows, dtype=F32)],
               int8_gemm.int8_qkv_gemm: [new(rows), new(streams, 3, head, dtype=F32),
                                         *(new(tokens, head // 2, dtype=F16) for _ in range(2))]}
    op._init_fn(new(1, tokens, columns, dtype=INT8), new(1, tokens, dtype=F32), new(rows, columns, dtype=INT8),
                new(rows, dtype=F32), *vectors[op], text, streams)


def vae(size: int) -> None:
    """Encoder and decoder."""
    with torch.device("meta"), torch.no_grad():
        model = AutoencoderKL(**random_weights.FLUX_VAE).to(torch.bfloat16).eval()
        fused_vae.fuse_vae(model)
        model.decode(model.encode(new(1, 3, size, size)).latent_dist.mean)


# Text and image tokens at 1024x1024, and at 1040x1040 a number of rows that 16 does not divide. Kontext and larger
# pictures are launched with the same kernels as dev. With 300 tokens of text each stream has a launch of its own.
SCHNELL, DEV, ODD, SHORT = (256, 4096), (512, 4096), (512, 65 * 65), (300, 4096)
# {name: op, streams, output and input columns}
INT8_GEMMS = {
    "int8_gelu_gemm-single": (int8_gemm.int8_gelu_gemm, 1, MLP, D),
    "int8_qkv_gemm-single": (int8_gemm.int8_qkv_gemm, 1, 3 * D, D),
    "int8_gemm-single": (int8_gemm.int8_gemm, 1, D, D + MLP),
    "int8_gelu_gemm-double": (int8_gemm.int8_gelu_gemm, 2, MLP, D),
    "int8_qkv_gemm-double": (int8_gemm.int8_qkv_gemm, 2, 3 * D, D),
    "int8_gemm-double-out": (int8_gemm.int8_gemm, 2, D, D),
    "int8_gemm-double-down": (int8_gemm.int8_gemm, 2, D, MLP)}



def case(name: str, launch, *args, slow: bool = True):
    return pytest.param(launch, args, id=name, marks=[pytest.mark.slow] if slow else [])


CASES = [
    case("adaln", adaln, False, *DEV, slow=False),
    case("residual_adaln", adaln, True, *DEV, slow=False),
    case("gated_residual", gated_residual, *DEV, slow=False),
    case("cast_attention", lambda tokens: casts.cast_attention._init_fn(new(1, tokens, D)), sum(DEV), slow=False),
    case("place_attention", place_attention, sum(DEV), slow=False),
    case("send_attention-2_gpus", send_attention, sum(DEV), 2, slow=False),
    case("gelu_gemm-single", gelu_gemm, *SCHNELL, 1, slow=False),
    case("qkv_gemm-single", qkv_gemm, *SCHNELL, 1, slow=False),
    case("gelu_gemm-double-dev", gelu_gemm, *DEV, 2),
    case("gelu_gemm-double-odd", gelu_gemm, *ODD, 2),
    case("gelu_gemm-single-odd", gelu_gemm, *ODD, 1),
    case("qkv_gemm-single-odd", qkv_gemm, *ODD, 1),
    *(case(f"qkv_gemm-double-{name}", qkv_gemm, *size, 2) for name, size in {"dev": DEV, "odd": ODD}.items()),
    *(case(f"qkv_gemm-double-{gpus}_gpus", qkv_gemm, *DEV, 2, gpus) for gpus in (2, 8)),
    *(case(f"send_attention-{gpus}_gpus", send_attention, sum(DEV), gpus) for gpus in (4, 8)),
    case("adaln-int8", adaln, False, *DEV, True),
    case("residual_adaln-int8", adaln, True, *DEV, True, slow=False),
    *(case(f"cast_int8-{name}", cast_int8, sum(DEV), *widths, slow=name != "both")
      for name, widths in {"both": (D, MLP), "attention": (D, 0), "mlp": (0, MLP)}.items()),
    *(case(f"{name}-{size}", gemm_in_int8, *tokens, *shape, slow=size != "schnell" or shape[1] == 2)
      for name, shape in INT8_GEMMS.items()
      for size, tokens in {"schnell": SCHNELL, "odd": ODD}.items()),
    case("int8_qkv_gemm-double-short", gemm_in_int8, *SHORT, *INT8_GEMMS["int8_qkv_gemm-double"]),
    case("vae", vae, 1024),
    case("vae-odd", vae, 1040),
]
FIGURES = {}  # of the kernels compiled in this process, by their hash: Triton reports them only when it compiles


def k_loops(ptx: str) -> list[str]:
    """The innermost loops that multiply on the tensor cores."""
    branches = [(ptx.find(f"\n{branch[1]}:"), branch.end()) for branch in re.finditer(r"\bbra\S*\s+(\$\w+);", ptx)]
    loops = [ptx[start:end] for start, end in branches if "wgmma.mma_async" in ptx[start:end]]
    return [loop for loop in loops if not any(other != loop and other in loop for other in loops)]


@pytest.fixture
def record(monkeypatch):
    """record(launch, arguments): the (kernel, arguments, options) that a Hopper GPU would be given."""
    launches = []

    def run(kernel, *args, grid, warmup, **options):
        launches.append((kernel, [Pointer(x) if isinstance(x, Tensor) else x for x in args], options))

    def recorded(launch, args):
        with monkeypatch.context() as patch:
            patch.setattr(JITFunction, "run", run)
            launch(*args)
        return launches

    tiles, shares = gemm._tiles, int8_gemm._shares
    monkeypatch.setattr(gemm, "_tiles", lambda *args: tiles(*args[:-1], torch.device("cuda")))
    monkeypatch.setattr(int8_gemm, "_shares", lambda *args: shares(*args[:-1], torch.device("cuda")))
    monkeypatch.setattr(torch.cuda, "get_device_properties",
                        lambda device: SimpleNamespace(multi_processor_count=MULTIPROCESSORS))
    for module in (layer_norm, casts):
        monkeypatch.setattr(module, "wrap_triton", lambda kernel: kernel)
    monkeypatch.setattr(fused_vae, "group_norm", fused_vae.group_norm._init_fn)
    return recorded


@pytest.mark.parametrize("launch, args", CASES)
@pytest.mark.filterwarnings("ignore:TRITON_DEFAULT_FP_FUSION")
def test_kernel_for_hopper_spills_no_register_and_fits_into_shared_memory(launch, args, record, tmp_path, monkeypatch):
    """And each loop over K of a GEMM has one instruction of the tensor cores in flight while it issues the next."""
    launches = record(launch, args)
    monkeypatch.setattr(triton.runtime.driver, "_active", Hopper())
    for name, value in dict(TRITON_CACHE_DIR=tmp_path, TRITON_ALWAYS_COMPILE=1, TRITON_DUMP_PTXAS_LOG=1).items():
        monkeypatch.setenv(name, str(value))
    assert launches
    kinds = {}
    for kernel, arguments, options in launches:
        with redirect_stdout(StringIO()) as log:
            compiled = kernel.run(*arguments, grid=(1,), warmup=True, **options)
        if text := log.getvalue():
            FIGURES[compiled.hash] = (
                int(re.search(r"Used (\d+) registers", text)[1]),
                sum(int(count) for count in re.findall(r"(\d+) bytes spill", text)), compiled.metadata.shared)
        in_flight = {int(count) for loop in k_loops(compiled.asm["ptx"])
                     for count in re.findall(r"wgmma\.wait_group\S* (\d+)", loop)}
        kinds[compiled.hash] = compiled.metadata.name, *FIGURES[compiled.hash], in_flight
    for name, registers, spilled, shared, _ in kinds.values():
        print(f"{name}: {registers} registers, {spilled} bytes spilled, {shared / 1024:g} KiB shared")
    assert not [kind for kind in kinds.values() if kind[2] or kind[3] > SHARED_MEMORY]
    assert all(in_flight == ({1} if "gemm" in name else set()) for name, *_, in_flight in kinds.values())


def test_every_kernel_of_the_project_is_compiled_here(record):
    """Kernels that other kernels call are compiled with their callers."""
    defined, called = set(), set()
    for path in sorted(Path(gemm.__file__).parents[1].rglob("*.py")):
        for function in ast.walk(ast.parse(path.read_text())):
            if isinstance(function, ast.FunctionDef) and (
                    {"triton.jit", "gluon.jit"} & set(map(ast.unparse, function.decorator_list))):
                defined.add((path.stem, function.name))
                called |= {node.id for node in ast.walk(function) if isinstance(node, ast.Name)}
    for launch, args in (param.values for param in CASES):
        launches = record(launch, args)
    assert {(kernel.fn.__module__.rpartition(".")[2], kernel.fn.__name__) for kernel, *_ in launches} == {
        (module, name) for module, name in defined if name not in called}
