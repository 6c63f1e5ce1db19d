"""Reshaped weights: each family changes what it says, the compensated ones keep the function, and bf16 holds on all."""

import copy
import math

import pytest
import torch
from conftest import relative
from torch import nn

from bench import trained_like
from bench.quality import capture_step, float32_step, picture_drift
from bench.trained_like import (
    FAMILIES,
    MIXTURES,
    attach,
    cases,
    parse,
    reshape,
    reshape_text_encoder,
    step_inputs,
)
from utils.common import RecipeError
from utils.fp8_check import relative_error
from utils.pipeline_utils import call_kwargs, fuse_projections, load_pipeline
from utils.random_weights import architecture
from utils.random_weights import build as random_pipeline


@pytest.fixture(scope="module")
def model():
    """A random transformer of 2 + 2 blocks in float32, and the arguments of one step: 64 text and 256 image tokens."""
    pipeline = random_pipeline(architecture("tiny-flux-dev", "2+2"), "cpu", torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline.transformer, capture_step(pipeline, dict(prompt="a red cup", height=256, width=256,
                                                             max_sequence_length=64))


def reshaped(model, text, seed=1):
    transformer = copy.deepcopy(model[0])
    reshape(transformer, parse(text), model[1], seed)
    return transformer


@torch.no_grad()
def output(transformer, inputs):
    return transformer(**inputs)[0]


@torch.no_grad()
def inputs_of(transformer, inputs, modules):
    """The first input of each module in one step."""
    seen, handles = {}, []
    for module in modules:
        handles.append(module.register_forward_pre_hook(lambda module, args: seen.update({module: args[0]})))
    transformer(**inputs)
    for handle in handles:
        handle.remove()
    return [seen[module] for module in modules]


def ups_of(transformer):
    return [*(ff.net[0].proj for block in transformer.transformer_blocks for ff in (block.ff, block.ff_context)),
            *(block.proj_mlp for block in transformer.single_transformer_blocks)]


def attentions_of(transformer):
    return [block.attn for block in (*transformer.transformer_blocks, *transformer.single_transformer_blocks)]


def changed_rows(before, after):
    """Which outputs of a Linear have other weights."""
    return (before.weight != after.weight).any(1).nonzero().flatten().tolist()


def test_families_have_ascending_strengths_and_a_step():
    assert set(FAMILIES) == set(trained_like.FLUX_STEPS) >= set(trained_like.T5_STEPS)
    for name, family in FAMILIES.items():
        assert 0 < family.strengths[0] < family.strengths[1] < family.strengths[2], name
        assert family.meaning.endswith(".") and family.source, name


def test_cases_are_the_families_then_the_mixtures():
    found = cases()
    assert len(found) == 3 * len(FAMILIES) + len(MIXTURES) and len(dict(found)) == len(found)
    assert found[1] == ("zero_rows=0.1", {"zero_rows": 0.1})
    assert found[-1][0] == MIXTURES[-1] and all(parse(name) == mixture for name, mixture in found)
    assert {name for text in MIXTURES for name in parse(text)} == set(FAMILIES)


def test_parse_reads_mixtures():
    assert parse("massive=500, spread=.5,neuron=3e2") == {"massive": 500, "spread": 0.5, "neuron": 300}
    assert parse("") == parse("plain") == {}


@pytest.mark.parametrize(("text", "words"), [
    ("masive=5", ("masive", "massive_by_weights")),
    ("massive", ("massive=500",)),
    ("massive=", ("massive=",)),
    ("spread=0.5,,gates=2", ("spread=0.5,,gates=2",)),
    ("gates=2,gates=4", ("gates",)),
    ("gates=-2", ("gates=-2", "2, 4, 8")),
    ("gates=nan", ("gates=nan",)),
    ("gates=inf", ("gates=inf",)),
    ("zero_rows=1.5", ("zero_rows=1.5", " 1")),
    ("massive=5,massive_by_weights=5", ("massive", "massive_by_weights")),
    ("zero_rows=0.1,massive=5", ("zero_rows", "massive")),
])
def test_parse_of_a_wrong_mixture_names_it(text, words):
    with pytest.raises(RecipeError) as error:
        parse(text)
    assert all(word in str(error.value) for word in words)


def test_reshape_without_a_step_or_of_fused_models_is_refused(model):
    transformer, inputs = copy.deepcopy(model[0]), model[1]
    with pytest.raises(RecipeError, match=r"neuron.*massive"):
        reshape(transformer, {"neuron": 30.0, "massive": 5.0, "gates": 2.0})
    with pytest.raises(RecipeError, match="nurse"):
        reshape(transformer, {"nurse": 1.0}, inputs)
    reshape(transformer, {"gates": 2.0})
    fuse_projections(transformer)
    with pytest.raises(RecipeError, match="optimize"):
        reshape(transformer, {"gates": 2.0})


def test_reshape_plain_changes_nothing(model):
    state = reshaped(model, "plain").state_dict()
    assert all(torch.equal(value, state[name]) for name, value in model[0].state_dict().items())


@pytest.mark.parametrize("text", ["head=300", "head_inverse=300", "qk_norm=30"])
def test_reshape_by_compensated_families_keeps_the_function(model, text):
    transformer, inputs = reshaped(model, text), model[1]
    assert relative(output(transformer, inputs), output(model[0], inputs)) < 1e-5


@pytest.mark.parametrize("text", ["head=300", "head_inverse=300"])
def test_reshape_head_strengthens_one_head_of_each_attention(model, text):
    transformer, factor, heads = reshaped(model, text), 300 if text == "head=300" else 1 / 300, set()
    size = transformer.config.attention_head_dim
    for before, after in zip(attentions_of(model[0]), attentions_of(transformer), strict=True):
        rows = changed_rows(before.to_v, after.to_v)
        assert len(rows) == size and rows[0] % size == 0
        torch.testing.assert_close(after.to_v.weight[rows], before.to_v.weight[rows] * factor)
        torch.testing.assert_close(after.to_v.bias[rows], before.to_v.bias[rows] * factor)
        heads.add(rows[0])
    assert len(heads) > 1


def test_reshape_qk_norm_makes_outliers_of_both(model):
    for before, after in zip(model[0].transformer_blocks, reshaped(model, "qk_norm=30").transformer_blocks,
                             strict=True):
        for q, k in (("norm_q", "norm_k"), ("norm_added_q", "norm_added_k")):
            ratio_q, ratio_k = (getattr(after.attn, name).weight / getattr(before.attn, name).weight for name in (q, k))
            assert (ratio_q > 29).sum() == (ratio_k > 29).sum() == 4
            torch.testing.assert_close(ratio_q * ratio_k, torch.ones_like(ratio_q))


def test_reshape_neuron_fires_in_a_tenth_of_a_percent_of_the_tokens(model):
    inputs = model[1] | {"hidden_states": torch.randn(1, 1024, 64), "img_ids": torch.rand(1024, 3).mul(32).round()}
    transformer = copy.deepcopy(model[0])
    reshape(transformer, {"neuron": 300.0}, inputs)
    fired = tokens = 0
    ups, before = ups_of(transformer), ups_of(model[0])
    for up, other, row in zip(ups, before, inputs_of(transformer, inputs, ups), strict=True):
        (j,) = changed_rows(other, up)
        torch.testing.assert_close(up.weight[j], other.weight[j] * 300)
        product = row @ up.weight[j]
        assert -up.bias[j].item() == pytest.approx((product.mean() + 3 * product.std()).item(), rel=0.1)
        fired += (product + up.bias[j] > 0).sum().item()
        tokens += row.shape[1]
    assert 0.0003 < fired / tokens < 0.004


def test_reshape_neuron_changes_the_mlp_by_that_neuron_alone(model):
    transformer = reshaped(model, "neuron=300").double()
    before, after = (part.transformer_blocks[0].ff.double() for part in (copy.deepcopy(model[0]), transformer))
    (j,) = changed_rows(before.net[0].proj, after.net[0].proj)
    row = torch.randn(1, 2000, transformer.inner_dim, dtype=torch.float64)
    gelu = nn.GELU("tanh")
    product = row @ before.net[0].proj.weight[j]
    threshold = after.net[0].proj.bias[j] / 300
    change = gelu(300 * (product + threshold)) / 300 - gelu(product + before.net[0].proj.bias[j])
    expected = before(row) + change[..., None] * before.net[2].weight[:, j]
    torch.testing.assert_close(after(row), expected, rtol=1e-6, atol=1e-7)


def test_reshape_neuron_of_each_strength_is_the_same_function(model):
    """Up to 0.17 / strength, by which GELU differs from ReLU."""
    found = [output(reshaped(model, f"neuron={strength}"), model[1]) for strength in (300, 3000)]
    assert relative(*found) < 1e-4


def test_reshape_neuron_kept_keeps_the_weights_that_read_it(model):
    for text, same in (("neuron=30", False), ("neuron_kept=30", True)):
        for before, after in zip(model[0].single_transformer_blocks,
                                 reshaped(model, text).single_transformer_blocks, strict=True):
            (j,) = changed_rows(before.proj_mlp, after.proj_mlp)
            columns = (before.proj_out.weight != after.proj_out.weight).any(0).nonzero().flatten().tolist()
            assert columns == ([] if same else [model[0].inner_dim + j])


@pytest.mark.parametrize("name", ["massive", "massive_by_weights"])
def test_reshape_massive_is_in_the_stream_at_every_norm(model, name):
    transformer, inputs = reshaped(model, f"{name}=500"), model[1]
    bias = transformer.x_embedder.bias - model[0].x_embedder.bias
    channels = bias.abs().topk(3).indices
    others = torch.ones(len(bias), dtype=torch.bool).index_fill(0, channels, False)
    norms = [module for module in transformer.modules() if isinstance(module, nn.LayerNorm)]
    blocks = transformer.transformer_blocks, transformer.single_transformer_blocks
    assert len(norms) == 4 * len(blocks[0]) + len(blocks[1]) + 1
    for row in inputs_of(transformer, inputs, norms):
        carried = row[..., channels].abs() / row[..., others].std(-1, keepdim=True)
        assert carried[..., 0].min() > 300 and carried[..., 0].max() < 900 and carried[..., 1:].min() > 150
        assert row.mean(-1).abs().max() < 0.3 * row[..., others].std()


def test_reshape_massive_is_undone_by_scales_or_by_weights(model):
    """Rows are as long as before, and the two ways are the same function."""
    by_scales, by_weights = reshaped(model, "massive=500"), reshaped(model, "massive_by_weights=500")
    plain, scaled, weighted = (inputs_of(part, model[1], ups_of(part)) for part in (model[0], by_scales, by_weights))
    for before, after, outlier in zip(plain, scaled, weighted, strict=True):
        assert 0.8 < (after.square().mean() / before.square().mean()).sqrt() < 1.25
        assert after.abs().max() < 3 * before.abs().max()
        assert outlier.abs().max() > 100 * outlier.abs().median()
    assert relative(output(by_weights, model[1]), output(by_scales, model[1])) < 1e-4
    assert relative(output(by_scales, model[1]), output(model[0], model[1])) < 0.25


def test_reshape_massive_has_scales_near_zero_in_its_channels(model):
    transformer = reshaped(model, "massive=500")
    channels = (transformer.x_embedder.bias - model[0].x_embedder.bias).abs().topk(3).indices
    width, norm = transformer.inner_dim, transformer.single_transformer_blocks[0].norm
    _, scale, gate = norm.linear(torch.randn(1, width)).view(3, width)
    assert (1 + scale[channels]).abs().max() < 0.2 and (gate[channels] == 0).all()
    assert 1 + scale.median() == pytest.approx(math.sqrt(1 + 1.5 * 500**2 / width), rel=0.2)


def test_reshape_zero_rows_are_zero_before_the_first_block(model):
    mixture, inputs = parse("zero_rows=0.1"), model[1]
    transformer, block = reshaped(model, "zero_rows=0.1"), []
    transformer.transformer_blocks[0].register_forward_pre_hook(
        lambda module, args, kwargs: block.append(kwargs), with_kwargs=True)
    handle = attach(transformer, mixture)
    attached = output(transformer, inputs)
    handle.remove()
    given = output(transformer, step_inputs(inputs, mixture))
    assert torch.equal(attached, given) and given.isfinite().all()
    for kwargs in block:
        for name, tokens in (("hidden_states", 256), ("encoder_hidden_states", 64)):
            assert (kwargs[name] == 0).all(-1).sum() == round(0.1 * tokens)
    assert step_inputs(inputs, parse("gates=2")) is inputs
    assert (step_inputs(inputs, {"zero_rows": 0.001})["encoder_hidden_states"] == 0).all(-1).sum() == 1


def test_reshape_spread_multiplies_one_plus_scale(model):
    transformer, width = reshaped(model, "spread=0.6"), model[0].inner_dim
    before, after = (part.transformer_blocks[0].norm1.linear for part in (model[0], transformer))
    embedding = torch.randn(1, width)
    parts, others = (linear(embedding).view(6, width) for linear in (before, after))
    ratio = (1 + others[[1, 4]]) / (1 + parts[[1, 4]])
    assert ratio.log().std() == pytest.approx(0.6, rel=0.2) and ratio.square().mean() == pytest.approx(1, rel=0.5)
    assert torch.equal(parts[[0, 2, 3, 5]], others[[0, 2, 3, 5]])
    assert not torch.equal(model[0].norm_out.linear.weight, transformer.norm_out.linear.weight)


def test_reshape_gates_multiplies_the_gates(model):
    transformer, width = reshaped(model, "gates=4"), model[0].inner_dim
    for block, other, parts, gates in (
            (model[0].transformer_blocks[1].norm1_context, transformer.transformer_blocks[1].norm1_context, 6, [2, 5]),
            (model[0].single_transformer_blocks[1].norm, transformer.single_transformer_blocks[1].norm, 3, [2])):
        embedding = torch.randn(1, width)
        expected = block.linear(embedding).view(parts, width).clone()
        expected[gates] *= 4
        torch.testing.assert_close(other.linear(embedding).view(parts, width), expected)


def test_reshape_heavy_rows_are_heavy_tailed_and_spare_modulations(model):
    transformer = reshaped(model, "heavy_rows=0.2")
    before, after = (part.single_transformer_blocks[0] for part in (model[0], transformer))
    ratio = after.proj_mlp.weight / before.proj_mlp.weight
    torch.testing.assert_close(ratio, ratio[:, :1].expand_as(ratio), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(after.proj_mlp.bias, before.proj_mlp.bias * ratio[:, 0])
    t = ratio[:, 0].log() / 0.2
    assert t.abs().max() <= 5.01 and t.abs().max() > 4 * t.abs().median()
    assert torch.equal(after.norm.linear.weight, before.norm.linear.weight)
    assert torch.equal(transformer.x_embedder.weight, model[0].x_embedder.weight)


def test_reshape_families_draw_by_the_seed_alone(model):
    text = "heavy_rows=0.2,neuron=300,massive=500"
    first, again, other = (reshaped(model, text, seed).state_dict() for seed in (1, 1, 2))
    assert all(torch.equal(value, again[name]) for name, value in first.items())
    weight = "single_transformer_blocks.0.proj_mlp.weight"
    assert not torch.equal(first[weight], other[weight])
    mixed, alone = (reshaped(model, mixture) for mixture in ("head=300,qk_norm=3", "head=300"))
    assert torch.equal(mixed.transformer_blocks[0].attn.to_v.weight, alone.transformer_blocks[0].attn.to_v.weight)


@pytest.mark.parametrize("names", [
    pytest.param([name for name, _ in cases()[:-len(MIXTURES)]], id="families", marks=pytest.mark.slow),
    pytest.param(MIXTURES, id="mixtures")])
def test_reshape_of_each_case_is_finite_and_close_in_bf16(names):
    pipeline = random_pipeline(architecture("tiny-flux-dev", "1+2"), "cpu", torch.bfloat16)
    pipeline.set_progress_bar_config(disable=True)
    inputs = capture_step(pipeline, dict(prompt="a red cup", height=64, width=64, max_sequence_length=64))
    for name in names:
        transformer, mixture = copy.deepcopy(pipeline.transformer), parse(name)
        reshape(transformer, mixture, inputs)
        given = step_inputs(inputs, mixture)
        found = output(transformer, given)
        assert found.isfinite().all(), name
        assert relative_error(found, float32_step(transformer, given)) < 0.03, name


@pytest.mark.slow
def test_reshape_of_the_trained_model_keeps_its_picture(make_args):
    args = make_args("--ckpt", "tiny-flux", "--prompt", "a red heart on a blue background")
    pipeline = load_pipeline(args)
    inputs, original = capture_step(pipeline, call_kwargs(pipeline, args)), pipeline.transformer
    plain = pipeline(**call_kwargs(pipeline, args)).images
    ssim = {}
    for name in ("head", "head_inverse", "qk_norm", "neuron", "massive"):
        pipeline.transformer = copy.deepcopy(original)
        reshape(pipeline.transformer, {name: FAMILIES[name].strengths[0]}, inputs)
        drift = picture_drift(pipeline(**call_kwargs(pipeline, args)).images, plain)
        ssim[name] = drift["ssim"]
        # Massive channels take the place of LayerNorm's division token by token: recognisable is all it can be.
        assert drift["psnr_min"] > (14 if name == "massive" else 25), (name, drift)
    assert ssim.pop("massive") > 0.5 and min(ssim.values()) > 0.9


@pytest.mark.parametrize("text", [
    *(pytest.param(text, marks=pytest.mark.slow) for text in ("neuron=300", "head=300", "head_inverse=300")),
    "massive_by_weights=500", "neuron=3000,head=300,massive_by_weights=100,spread=0.5"])
def test_reshape_text_encoder_keeps_the_function(build, text):
    t5 = build("tiny-flux").text_encoder_2
    tokens = torch.arange(40)[None] * 7 % 256
    with torch.no_grad():
        before = t5(tokens)[0]
    first = copy.deepcopy(t5)
    reshape_text_encoder(t5, parse(text))
    changed = [name for name, value in first.state_dict().items() if not torch.equal(value, t5.state_dict()[name])]
    assert changed and all(("block" in name and "wi_0" not in name) or "massive" in text for name in changed)
    with torch.no_grad():
        assert relative(t5(tokens)[0], before) < 1e-5


def test_reshape_text_encoder_with_heavy_rows_changes_it(build):
    t5 = build("tiny-flux").text_encoder_2
    before = copy.deepcopy(t5)
    reshape_text_encoder(t5, parse("gates=2"))
    assert all(torch.equal(value, t5.state_dict()[name]) for name, value in before.state_dict().items())
    reshape_text_encoder(t5, parse("heavy_rows=0.2"))
    block, other = before.encoder.block[0].layer[1].DenseReluDense, t5.encoder.block[0].layer[1].DenseReluDense
    ratio = other.wi_0.weight / block.wi_0.weight
    torch.testing.assert_close(ratio, ratio[:, :1].expand_as(ratio), rtol=1e-5, atol=1e-5)
