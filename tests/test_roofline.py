"""FLOPs of a step against other counts."""

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from bench import ceilings
from bench.quality import capture_step
from bench.roofline import record_token_counts, step_flops
from utils.common import RecipeError
from utils.pipeline_utils import call_kwargs
from utils.random_weights import architecture

ONE_OF_EACH = dict(num_layers=1, num_single_layers=1, attention_head_dim=1, num_attention_heads=2, in_channels=3,
                   joint_attention_dim=5, pooled_projection_dim=7, guidance_embeds=False)


def test_flops_by_hand():
    """Two channels, 10 image tokens of 3 channels, 4 text tokens of 5: every product written out."""
    double = 10 * (3 + 1 + 8) * 4 + 4 * (3 + 1 + 8) * 4 + 2 * (2 * 12)
    single = 14 * (2 * 14 + 10 * 2) + 2 * 6
    ends = 10 * 3 * 2 + 4 * 5 * 2 + (256 * 2 + 2 * 2) + (7 * 2 + 2 * 2) + 2 * 4 + 10 * 2 * 3
    assert step_flops(ONE_OF_EACH, 10, 4) == {"matmul": 2 * (double + single + ends), "attention": 2 * 4 * 14**2 * 2}
    assert step_flops(ONE_OF_EACH, 10, 4, batch=3)["matmul"] == 3 * step_flops(ONE_OF_EACH, 10, 4)["matmul"]


@pytest.mark.parametrize("name", ["tiny-flux", "tiny-flux-dev"])
def test_flops_are_those_that_torch_counts(name, build, make_args):
    pipeline = build(name)
    with record_token_counts(pipeline.transformer) as tokens:
        inputs = capture_step(pipeline, call_kwargs(pipeline, make_args("--ckpt", name)))
    assert tokens == {"image_tokens": 64, "text_tokens": 64, "batch": 1}
    assert not pipeline.transformer._forward_pre_hooks
    # The CPU's fused attention is unknown to torch's counter; written out it is two products.
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        pipeline.transformer(**inputs)
    assert sum(step_flops(pipeline.transformer.config, **tokens).values()) == counter.get_total_flops()


@pytest.mark.parametrize("name, image_tokens, text_tokens, expected", [
    ("FLUX.1-schnell", 4096, 256, 69.5), ("FLUX.1-dev", 4096, 512, 74.4), ("FLUX.1-Kontext-dev", 8192, 512, 165.5)])
def test_flops_of_the_real_models(name, image_tokens, text_tokens, expected):
    found = step_flops(architecture(name)["transformer"], image_tokens, text_tokens)
    assert round(sum(found.values()) / 1e12, 1) == expected


def test_ceilings_need_a_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(RecipeError):
        ceilings.measure()
