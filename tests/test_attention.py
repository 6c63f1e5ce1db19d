"""fp8 attention against PyTorch's in float32, the op's contract, and both libraries' calling conventions."""

import sys
import types

import pytest
import torch
import torch.nn.functional as F
from conftest import relative
from diffusers.models.transformers.transformer_flux import FluxAttention, FluxPosEmbed

from utils import attention
from utils.attention import ScaledAttnProcessor, measured_scale, norm_scale, quantize_per_head

TEXT, IMAGE = 12, 40


def make_attention(double: bool, fused: bool, dtype=torch.float32):
    torch.manual_seed(0)
    module = FluxAttention(query_dim=64, dim_head=16, heads=4, out_dim=64, bias=True, eps=1e-6,
                           added_kv_proj_dim=64 if double else None, context_pre_only=False if double else None,
                           pre_only=not double).eval()
    for name, parameter in module.named_parameters():
        if "norm" in name:
            parameter.data.uniform_(0.5, 2.0)
    if fused:
        module.fuse_projections()
    return module.to(dtype)


def inputs(double: bool, batch: int, dtype=torch.float32):
    torch.manual_seed(1)
    tokens = TEXT + IMAGE
    rope = FluxPosEmbed(theta=10000, axes_dim=[4, 6, 6])(torch.randint(0, 50, (tokens, 3)).float())
    hidden = torch.randn(batch, IMAGE if double else tokens, 64, dtype=dtype)
    text = torch.randn(batch, TEXT, 64, dtype=dtype) if double else None
    return dict(hidden_states=hidden, encoder_hidden_states=text, image_rotary_emb=rope)


def run(module, precision, **kwargs):
    holder = torch.nn.Module()
    holder.attn, holder.set_attn_processor = module, module.set_processor
    attention.BACKENDS["a test"] = ("cpu reference", precision)
    try:
        attention.use_attention_library(holder, "a test")
    finally:
        del attention.BACKENDS["a test"]
    with torch.no_grad():
        out = module(**kwargs)
    return torch.cat(out, dim=1) if isinstance(out, tuple) else out


# Measured on these shapes: bf16 0.3 %, scaled fp8 up to 6.3 %.
@pytest.mark.parametrize("precision, bound", [("bf16", 0.01), ("fp8", 0.1)])
@pytest.mark.parametrize("batch", [1, 2, 3])
@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("double", [True, False])
def test_fused_processor_equals_diffusers(double, fused, batch, precision, bound):
    """Batch above one was lost by `[0]` on a tensor; unfused projections crashed."""
    kwargs = inputs(double, batch)
    with torch.no_grad():
        reference = make_attention(double, fused)(**kwargs)
    reference = torch.cat(reference, dim=1) if double else reference
    found = run(make_attention(double, fused), precision, **kwargs)
    assert found.shape == reference.shape and found.dtype == torch.float32
    assert relative(found, reference) < bound


def test_fused_processor_batch_items_do_not_mix():
    kwargs = inputs(False, 3)
    together = run(make_attention(False, True), "fp8", **kwargs)
    alone = run(make_attention(False, True), "fp8", hidden_states=kwargs["hidden_states"][1:2],
                image_rotary_emb=kwargs["image_rotary_emb"])
    torch.testing.assert_close(together[1:2], alone, rtol=0, atol=2e-2)


def test_fused_processor_values_beyond_448_are_scaled():
    """The predecessors' unscaled cast saturates there, or turns to NaN in eager mode on torch <= 2.11."""
    kwargs = inputs(False, 1)
    module = make_attention(False, False)
    module.to_v.weight.data.mul_(3000.0)
    module.to_v.bias.data.mul_(3000.0)
    with torch.no_grad():
        reference = module(**kwargs)
    assert reference.abs().max() > 448
    found = run(module, "fp8", **kwargs)
    assert found.isfinite().all() and relative(found, reference) < 0.1
    unscaled = run(module, "fp8_unscaled", **kwargs)
    assert unscaled.isfinite().all() and relative(unscaled, reference) > 0.3


def test_fused_processor_with_a_mask_is_refused():
    with pytest.raises(ValueError, match="mask"):
        run(make_attention(True, True), "fp8", attention_mask=torch.ones(1, 52), **inputs(True, 1))


@pytest.mark.parametrize("weight", [0.1, 1.0, 7.0])
def test_norm_scale_bounds_every_rotated_output(weight):
    """One-hot inputs are the worst case: RMSNorm puts sqrt(D) into one element, a rotation can only split it."""
    norm = torch.nn.RMSNorm(16, eps=1e-6)
    norm.weight.data.uniform_(-weight, weight)
    x = torch.cat([torch.eye(16) * 1e3, torch.randn(5000, 16)])
    pairs = norm(x).view(-1, 8, 2)
    worst_rotation = pairs.norm(dim=-1).max()
    assert worst_rotation / norm_scale(norm) <= attention.E4M3_MAX * (1 + 1e-5)


def test_measured_scale_is_per_item_and_head_and_never_zero():
    x = torch.randn(2, 30, 4, 16)
    x[1, :, 2] = 0
    scale = measured_scale(x)
    for b in range(2):
        for h in range(4):
            assert scale[b, h] == max(x[b, :, h].abs().max() / 448, 1e-12 / 448)
    quantized = quantize_per_head(x, scale)
    assert quantized.dtype == torch.float8_e4m3fn and quantized.float().isfinite().all()
    assert relative(quantized.float() * scale[:, None, :, None], x) < 0.04


@pytest.mark.parametrize("descale", [True, False])
@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.bfloat16, torch.float32])
def test_attention_op_keeps_its_contract(dtype, descale):
    """opcheck compares the fake kernel with the real one: dtype (it was q's own in flux-fast), shape, strides."""
    q, k, v = (torch.randn(2, 10, 4, 16).to(dtype) for _ in range(3))
    scales = [torch.rand(2, 4) + 0.5 for _ in range(3)] if descale else [None] * 3
    # The schema test multiplies its inputs, which PyTorch cannot do in e4m3.
    tests = ("test_faketensor",) if dtype == torch.float8_e4m3fn else ("test_schema", "test_faketensor")
    torch.library.opcheck(attention.attention, (q, k, v, *scales, "cpu reference"), test_utils=tests)
    assert attention.attention(q, k, v, *scales, "cpu reference").dtype == torch.bfloat16


def test_attention_op_compiles_without_a_graph_break():
    module, kwargs = make_attention(True, True), inputs(True, 2)
    eager = run(module, "fp8", **kwargs)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        found = torch.cat(compiled(**kwargs), dim=1)
    assert relative(found, eager) < 0.02


def sdpa(q, k, v):
    return F.scaled_dot_product_attention(*(x.float().transpose(1, 2) for x in (q, k, v))).transpose(1, 2)


def call_registered(library, q, k, v, *scales):
    return attention._functions[library](q, k, v, *(scales or [None] * 3))


def aiter_fp8(q, k, v, dropout_p=0.0, softmax_scale=None, causal=False, window_size=(-1, -1), alibi_slopes=None,
              deterministic=False, return_lse=False, return_attn_probs=False, config=None):
    """The signature of aiter.ops.triton.mha.flash_attn_fp8_func: high precision in, float32 out."""
    assert q.dtype == torch.bfloat16 and not causal and not return_lse
    return sdpa(q, k, v)


def aiter_fp8_v3(q, k, v, softmax_scale=None, causal=False, qv=None, window_size=(-1, -1), attention_chunk=0,
                 softcap=0.0, num_splits=1, pack_gqa=None, deterministic=False, sm_margin=0):
    """The signature of aiter.ops.triton.attention.mha_v3.flash_attn_fp8_func."""
    return sdpa(q, k, v)


def fa3_tensor(q, k, v, softmax_scale=None, causal=False, qv=None, q_descale=None, k_descale=None, v_descale=None,
               window_size=(-1, -1)):
    scaled = (x.float() if s is None else x.float() * s[:, None, :, None]
              for x, s in ((q, q_descale), (k, k_descale), (v, v_descale)))
    return sdpa(*scaled)


def fa3_tuple(q, k, v, q_descale=None, k_descale=None, v_descale=None, causal=False, return_attn_probs=False):
    return fa3_tensor(q, k, v, q_descale=q_descale, k_descale=k_descale, v_descale=v_descale), torch.zeros(2, 4, 10)


@pytest.mark.parametrize("function, quantized", [(aiter_fp8, False), (aiter_fp8_v3, False), (fa3_tensor, True),
                                                 (fa3_tuple, True)], ids=lambda x: getattr(x, "__name__", ""))
def test_register_library_calls_each_by_its_own_convention(monkeypatch, function, quantized):
    monkeypatch.setitem(attention._functions, "stand-in", None)
    attention.register_library("stand-in", function)
    q, k, v = (torch.randn(2, 10, 4, 16) for _ in range(3))
    reference = sdpa(q, k, v)
    if quantized:
        scales = [measured_scale(x) for x in (q, k, v)]
        found = call_registered("stand-in", *(quantize_per_head(x, s) for x, s in zip((q, k, v), scales, strict=True)),
                                *scales)
    else:
        found = call_registered("stand-in", q.bfloat16(), k.bfloat16(), v.bfloat16())
    assert found.shape == (2, 10, 4, 16) and found.dtype == torch.bfloat16 and found.is_contiguous()
    assert relative(found, reference) < (0.08 if quantized else 0.01)


def test_register_library_asks_for_the_log_sum_exp_where_it_is_an_option(monkeypatch):
    def fa3_newer(q, k, v, q_descale=None, k_descale=None, v_descale=None, return_attn_probs=False):
        return (q, "lse") if return_attn_probs else q

    q = torch.zeros(1, 2, 1, 4)
    for function, found in ((fa3_newer, "lse"), (fa3_tuple, torch.zeros(2, 4, 10))):
        monkeypatch.setitem(attention._functions, "stand-in", None)
        attention.register_library("stand-in", function)
        out, lse = attention._functions["stand-in"](q, q, q, None, None, None, with_lse=True)
        assert out.shape == q.shape and str(lse) == str(found)
        assert torch.is_tensor(call_registered("stand-in", q, q, q))
    attention.register_library("stand-in", fa3_tensor)
    with pytest.raises(RuntimeError, match="--context_parallel ulysses"):
        attention._functions["stand-in"](q, q, q, None, None, None, with_lse=True)


@pytest.mark.parametrize("library, path, function", [
    ("aiter", "aiter.ops.triton.attention.mha", "flash_attn_fp8_func"),
    ("aiter", "aiter.ops.triton.mha", "flash_attn_fp8_func"),
    ("fa3", "flash_attn_interface", "flash_attn_func"),
    ("fa3", "fa3_fwd_interface", "flash_attn_func"),
])
def test_find_library_finds_each_place_of_installation(monkeypatch, library, path, function):
    """flux-fast imported FA3 from a module that never existed; AITER moved its own."""
    parts = path.split(".")
    for i in range(1, len(parts) + 1):
        monkeypatch.setitem(sys.modules, ".".join(parts[:i]), types.ModuleType(".".join(parts[:i])))
    setattr(sys.modules[path], function, aiter_fp8)
    assert attention.find_library(library) == (aiter_fp8, path)


@pytest.mark.parametrize("library, cure", [("fa3", "pip install fa3-fwd"), ("aiter", "pip install amd-aiter")])
def test_find_library_missing_names_the_package(monkeypatch, library, cure):
    for module in (*attention.FA3_MODULES, *attention.AITER_MODULES):
        monkeypatch.setitem(sys.modules, module, None)
    function, text = attention.find_library(library)
    assert function is None and cure in text


@pytest.mark.parametrize("error", [ImportError("undefined symbol: x"), OSError("libcudart.so.12"), RuntimeError("x")])
def test_find_library_broken_passes_its_error_on(monkeypatch, error):
    def broken(name):
        raise error
    monkeypatch.setattr(attention.importlib, "import_module", broken)
    function, text = attention.find_library("fa3")
    assert function is None and "pip install" not in text and str(error) in text


def test_register_library_reads_the_signature_once(monkeypatch):
    monkeypatch.setitem(attention._functions, "stand-in", None)
    attention.register_library("stand-in", aiter_fp8)
    monkeypatch.setattr(attention.inspect, "signature", lambda *_: pytest.fail("inspected in a call"))
    call_registered("stand-in", *(torch.randn(1, 8, 4, 16).bfloat16() for _ in range(3)))


def test_use_attention_library_scales_are_buffers_outside_the_state():
    module = make_attention(True, True)
    run(module, "fp8", **inputs(True, 1))
    assert module.fp8_q_scale.device == module.norm_q.weight.device
    assert "fp8_q_scale" not in module.state_dict()
    assert isinstance(module.processor, ScaledAttnProcessor)
    larger = max(module.norm_q.weight.abs().max(), module.norm_added_q.weight.abs().max())
    assert module.fp8_q_scale == pytest.approx((4 * larger / 448).item())


@pytest.mark.parametrize("tokens, heads, found", [
    (4352, 24, (4224, 5)),   # schnell: 24 tiles beyond six rounds of 132
    (4608, 24, (4608, 1)),   # dev: 72, more than half of them would idle less than merging costs
    (8704, 24, (8448, 2)),   # Kontext: 48
    (4352, 48, (4224, 2)),   # batch 2
    (4352, 12, (4224, 6)),   # each of two GPUs
    (5632, 24, (5632, 1)),   # eight rounds exactly
    (256, 24, (256, 1)),     # less than one
    (4300, 24, (4224, 5))])  # the last tile is not whole
def test_two_launches_splits_off_few_tiles_beyond_whole_rounds(tokens, heads, found):
    assert attention.two_launches(tokens, heads, 132) == found


@pytest.mark.parametrize("batch, tokens", [(1, 300), (2, 520), (1, 256)])
def test_fa3_in_two_launches_is_the_same_attention(batch, tokens, monkeypatch):
    """Through an operator with FlashAttention-3's argument names: every query written once, its own scales with it."""
    library = torch.library.Library("flux_faster_test", "FRAGMENT")
    library.define("fwd(Tensor q, Tensor k, Tensor v, *, Tensor(a!)? out=None, Tensor? q_descale=None, "
                   "Tensor? k_descale=None, Tensor? v_descale=None, int num_splits=0) -> ()")
    calls = []

    def fwd(q, k, v, *, out=None, q_descale=None, k_descale=None, v_descale=None, num_splits=0):
        calls.append((q.shape[1], num_splits))
        out.copy_(attention.reference_attention(q, k, v, q_descale, k_descale, v_descale))

    library.impl("fwd", fwd, "CPU")
    def flash_attn_func(q, k, v, q_descale=None, k_descale=None, v_descale=None):
        return attention.reference_attention(q, k, v, q_descale, k_descale, v_descale)

    module = types.ModuleType("fa3_stand_in")
    module.fa3_fwd_cuda, flash_attn_func.__module__ = torch.ops.flux_faster_test, module.__name__
    monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setattr(attention, "_multiprocessors", lambda device: 4)
    attention.register_library("stand-in", flash_attn_func)

    torch.manual_seed(0)
    q, k, v = (torch.randn(batch, tokens, 3 - batch, 128) for _ in range(3))
    scales = [measured_scale(x) for x in (q, k, v)]
    given = [quantize_per_head(x, scale) for x, scale in zip((q, k, v), scales, strict=True)]
    found = attention._functions["stand-in"](*given, *scales)
    assert torch.equal(found, attention.reference_attention(*given, *scales))
    assert calls == {300: [(256, 1), (44, 2)], 520: [(512, 1), (8, 2)], 256: []}[tokens]
