"""Packages that call this recipe's own ops: fp8 attention, the fused blocks' GEMMs. On a CPU, by their references."""

import pytest
import torch
from conftest import relative

pytest.importorskip("triton", reason="Triton is not installed: pip install triton")

from utils import attention
from utils.aoti import export
from utils.kernels import casts, fused_blocks, gemm
from utils.kernels.formats import quantize_rows
from utils.pipeline_utils import call_kwargs


@pytest.fixture(autouse=True)
def quick_compiler(compiler):
    """The code around the kernels unoptimised: half the time to compile it."""
    with torch._inductor.config.patch({"aot_inductor.compile_wrapper_opt_level": "O0"}):
        yield


class Gemms(torch.nn.Module):
    """The custom ops of a fused double block, which the compiler does not look into."""

    def __init__(self, seed, width=128, mlp=256):
        super().__init__()
        torch.manual_seed(seed)
        for name, sizes in {"qkv": (width, 3 * width), "up": (width, mlp), "down": (mlp, width)}.items():
            linears = [torch.nn.Linear(*sizes) for _ in range(2)]
            # As strong as their seed, or scales would be almost the same, whatever the seed.
            parts = zip(*(((1 + seed) * linear.weight.data, linear.bias.data) for linear in linears), strict=True)
            setattr(self, name, fused_blocks.QuantizedLinear(*map(list, parts), gated=name == "down"))
        self.register_buffer("columns", 0.5 + torch.rand(2 * mlp))
        self.register_buffer("norms", 0.5 + torch.rand(2, 3, 64))
        self.register_buffer("qk_scale", 0.02 + 0.02 * torch.rand(2))
        self.register_buffer("bounds", fused_blocks.gemm_bounds(self.up, self.columns, self.qkv, 2))
        self.register_buffer("one", torch.ones(()))

    def forward(self, x, x_scale, cos, sin, lengths, scale):
        qkv, descale, shared = gemm.qkv_gemm(x, x_scale, *self.qkv.operands(), self.norms, cos, sin, self.qk_scale,
                                             lengths, self.bounds, 32, 2)
        attended = attention.attention(*qkv.unbind(), *descale.unbind(1), "fa3").flatten(2)
        beside = x.new_empty(*x.shape[:2], x.shape[2] + self.down.weight.shape[1])
        placed = casts.place_attention(attended, scale, beside)
        hidden = x.new_empty(*x.shape[:2], self.down.weight.shape[1])
        gemm.gelu_gemm(x, x_scale, *self.up.operands(), self.columns, scale, hidden, 32, 2)
        y = gemm.fp8_gemm(hidden, self.down.weight, self.one, 32, 2)
        return beside[..., :x.shape[2]].float() * placed[..., None], shared, y * scale[..., None]


@pytest.mark.slow
def test_one_package_calls_the_fused_gemms_with_each_blocks_weights(tmp_path):
    """Weights, scales, numbers and output tensors reach the ops. No value of the first block is compiled in."""
    x, x_scale = quantize_rows(torch.randn(1, 96, 128))
    unit = export.Unit("gemms", [Gemms(0), Gemms(1)], dict(
        x=x, x_scale=x_scale, cos=torch.rand(96, 32).half(), sin=torch.rand(96, 32).half(),
        lengths=x_scale * x.float().norm(dim=-1), scale=0.01 + 0.02 * torch.rand(1, 96)))
    export.export([unit], tmp_path, "k")
    packaged = export.load([unit], tmp_path, "k")
    with torch.no_grad():
        for module in unit.modules:
            for found, expected in zip(packaged[module](**unit.arguments), module(**unit.arguments), strict=True):
                assert found.float().std() > 1e-6 and relative(found, expected) < 2e-3


@pytest.mark.slow
@pytest.mark.skipif(torch.__version__ < "2.12", reason="torch 2.11's packages for a CPU cannot name e4m3")
def test_packages_hold_fp8_attention(build, make_args, tmp_path):
    """As on a Hopper GPU without the fused kernels, with the op's CPU kernel in FlashAttention's place."""
    pipeline, args = build("tiny-flux", torch.bfloat16), make_args("--ckpt", "tiny-flux", "--num_inference_steps", "2")
    attention.use_attention_library(pipeline.transformer, "fa3")

    def latents():
        return pipeline(**call_kwargs(pipeline, args), output_type="latent").images

    expected = latents()
    units = export.capture(export.packaged(pipeline, True, False, False, False), latents)
    export.export(units, tmp_path, "k")
    export.put_in_place(pipeline, export.load(units, tmp_path, "k"))
    assert relative(latents(), expected) < 0.02
