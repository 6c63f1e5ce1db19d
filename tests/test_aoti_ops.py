"""Packages that call this recipe's own ops: fp8 attention, fused products. On a CPU, by their references."""

import pytest
import torch
from conftest import relative

pytest.importorskip("triton", reason="Triton is not installed: pip install triton")

from utils import aoti, attention, fused_blocks, fused_kernels
from utils.pipeline_utils import call_kwargs


@pytest.fixture(autouse=True)
def quick_compiler(compiler):
    """The code around the kernels unoptimised: half the time to compile it."""
    with torch._inductor.config.patch({"aot_inductor.compile_wrapper_opt_level": "O0"}):
        yield


class Products(torch.nn.Module):
    """What of a fused double block the compiler does not look into."""

    def __init__(self, seed, width=128, mlp=256):
        super().__init__()
        torch.manual_seed(seed)
        for name, by_row, sizes in (("qkv", True, (width, 3 * width)), ("up", True, (width, mlp)),
                                    ("down", False, (mlp, width))):
            linears = [torch.nn.Linear(*sizes) for _ in range(2)]
            for linear in linears:
                linear.weight.data *= 1 + seed  # or scales would be almost the same, whatever the seed
            setattr(self, name, fused_blocks.Float8Linear(linears, by_row, torch.device("cpu")))
        self.register_buffer("norms", 0.5 + torch.rand(2, 3, 64))

    def forward(self, x, x_scale, cos, sin, descale, scales):
        q, k, v = fused_kernels.qkv_product(x, x_scale, *self.qkv.operands(), self.norms, cos, sin, descale, 32,
                                            2).unbind()
        hidden = fused_kernels.gelu_product(x, x_scale, *self.up.operands(), scales, 32, 2, 0)
        return (attention.attention(q, k, v, *descale.unbind(1), "fa3"),
                fused_kernels.products(hidden, scales, [1, 2], *self.down.operands(), 32))


@pytest.mark.slow
def test_one_package_calls_the_fused_products_with_each_blocks_weights(tmp_path):
    """Lists of weights, scales and numbers go through; none of the first block's is compiled in."""
    x, x_scale = fused_kernels.quantize_rows(torch.randn(1, 96, 128))
    unit = aoti.Unit("products", [Products(0), Products(1)], dict(
        x=x, x_scale=x_scale, cos=torch.rand(96, 32).half(), sin=torch.rand(96, 32).half(),
        descale=torch.full((1, 3, 2), 0.03), scales=torch.tensor([0.02, 0.03, 0.04])[:, None].repeat(1, 4)))
    aoti.export([unit], tmp_path, "k")
    aoti.bind([unit], tmp_path, "k")
    with torch.no_grad():
        for module in unit.modules:
            for found, expected in zip(module(**unit.arguments), Products.forward(module, **unit.arguments),
                                       strict=True):
                assert relative(found, expected) < 2e-3


@pytest.mark.slow
@pytest.mark.skipif(torch.__version__ < "2.12", reason="torch 2.11's packages for a CPU cannot name e4m3")
def test_packages_hold_fp8_attention(build, make_args, tmp_path):
    """As on a Hopper GPU without the fused kernels, with the op's CPU kernel in FlashAttention's place."""
    pipeline, args = build("tiny-flux", torch.bfloat16), make_args("--ckpt", "tiny-flux", "--num_inference_steps", "2")
    attention.use_attention_library(pipeline.transformer, "fa3")

    def latents():
        return pipeline(**call_kwargs(pipeline, args), output_type="latent").images

    expected = latents()
    units = aoti.capture(aoti.packaged(pipeline, True, False, False, False), latents)
    aoti.export(units, tmp_path, "k")
    aoti.bind(units, tmp_path, "k")
    assert relative(latents(), expected) < 0.02
