"""The fused blocks against diffusers' own, in a trained model: on a CPU through the kernels' references."""

from itertools import pairwise

import PIL.Image
import pytest
import torch
from conftest import pretend_hopper, relative, skip_without_float8_products
from torch.utils._pytree import tree_map_only

pytest.importorskip("triton", reason="Triton is not installed: pip install triton")

from bench.quality import capture_step, float32_step
from utils import attention, pipeline_utils
from utils.aoti import export
from utils.benchmark_utils import create_parser
from utils.cache import dbcache
from utils.cuda_graph import signature
from utils.fp8_check import relative_error
from utils.kernels import fused_blocks, gemm
from utils.kernels.formats import E4M3_MAX
from utils.kernels.fused_blocks import (
    FusedDoubleBlock,
    FusedSingleBlock,
    defer_residuals,
    fuse_blocks,
    prune_unused_tokens,
)
from utils.kernels.int8_blocks import Int8DoubleBlock, Int8SingleBlock
from utils.kernels.int8_gemm import int8_gemm
from utils.kernels.modulation import Modulations, QuantizedLinear, attach_modulation_hook
from utils.pipeline_utils import call_kwargs, fuse_projections, load_pipeline
from utils.quantization import quantize_transformer

CPU = torch.device("cpu")
CASES = {
    "schnell": ["--ckpt", "tiny-flux"],
    "dev, batch 2, another size": ["--ckpt", "tiny-flux-dev", "--num_images_per_prompt", "2", "--height", "96",
                                   "--width", "160"],
    "kontext": ["--ckpt", "tiny-kontext"],
}


@pytest.fixture(scope="module")
def picture(tmp_path_factory):
    """The path of a picture that tiny-flux draws."""
    args = create_parser().parse_args(["--ckpt", "tiny-flux", "--device", "cpu", "--quiet"])
    path = tmp_path_factory.mktemp("picture") / "x.png"
    pipeline = load_pipeline(args)
    pipeline(**call_kwargs(pipeline, args)).images[0].save(path)
    return str(path)


@pytest.fixture
def load(make_args, picture):
    """A pipeline of trained weights in bf16, its arguments."""
    def make(*argv):
        args = make_args(*argv, *(["--image", picture] if "tiny-kontext" in argv else []))
        pipeline = load_pipeline(args)
        pipeline.set_progress_bar_config(disable=True)
        return pipeline, args
    return make


def fuse(pipeline, int8=False):
    fuse_projections(pipeline.transformer)
    count = fuse_blocks(pipeline.transformer, CPU, int8=int8)
    attach_modulation_hook(pipeline)
    return count


def cases(*quick: str, **more: list[str]):
    """CASES and `more`, slow but for the `quick` ones."""
    return pytest.mark.parametrize("argv", [
        pytest.param(argv, id=name, marks=() if name in quick else pytest.mark.slow)
        for name, argv in (CASES | more).items()])


@cases("small", small=["--ckpt", "tiny-flux-dev", "--height", "64", "--width", "64"])
@torch.no_grad()
def test_fuse_blocks_is_as_near_to_float32_as_unfused_fp8(load, argv, float8_on_cpu):
    """Same weights, same inputs, of every step of two images: per-row float8 and scaled fp8 attention are the measure.
    (Measured over three: 0.14 both, 0.14 both, and 0.084 against 0.087 for Kontext.) int8 has 0.29 to 0.33 of the fused
    float8's error."""
    skip_without_float8_products()
    pipeline, args = load(*argv)
    inputs = []
    handle = pipeline.transformer.register_forward_pre_hook(
        lambda module, _, kwargs: inputs.append(tree_map_only(torch.Tensor, torch.Tensor.clone, kwargs)),
        with_kwargs=True)
    for prompt in ("flat rocket", "in 3d"):
        pipeline(**call_kwargs(pipeline, args, prompt=prompt, num_inference_steps=4), output_type="latent")
    handle.remove()
    references = [float32_step(pipeline.transformer, one) for one in inputs]

    def error(pipeline):
        found = [relative_error(pipeline.transformer(**one)[0], reference)
                 for one, reference in zip(inputs, references, strict=True)]
        return sum(found) / len(found)

    fuse_projections(pipeline.transformer)
    attention.use_attention_library(pipeline.transformer, "fa3")
    quantize_transformer(pipeline.transformer, "float8", "row", CPU)
    unfused = error(pipeline)
    pipeline, _ = load(*argv)
    count = fuse(pipeline)
    fused = error(pipeline)
    pipeline, _ = load(*argv)
    counts = count, fuse(pipeline, int8=True)
    in_int8 = error(pipeline)
    assert 0.03 < unfused < 0.25 and fused < 1.1 * unfused and in_int8 < 0.4 * fused, (fused, unfused, in_int8)
    # 8 Linears a double block, 3 a single one; of diffusers' blocks nothing is left.
    config = pipeline.transformer.config
    assert counts == (8 * config.num_layers + 3 * config.num_single_layers,) * 2
    assert not [name for name, module in pipeline.transformer.named_modules()
                if isinstance(module, torch.nn.Linear) and "transformer_blocks." in name]


def test_optimize_on_hopper_fuses_the_blocks(load, monkeypatch):
    """`optimize` as on a Hopper GPU, down to the pictures: near eager's, and the same the second time."""
    pipeline, args = load("--ckpt", "tiny-flux", "--compile_export_mode", "disabled")
    latents = [pipeline(**call_kwargs(pipeline, args), output_type="latent").images]
    pretend_hopper(monkeypatch)
    pipeline.plan = None  # it was made for a CPU
    pipeline = pipeline_utils.optimize(pipeline, args)
    assert all(type(block) is FusedDoubleBlock for block in pipeline.transformer.transformer_blocks)
    latents += [pipeline(**call_kwargs(pipeline, args), output_type="latent").images for _ in range(2)]
    assert 0.001 < relative(latents[1], latents[0]) < 0.2 and torch.equal(*latents[1:])
    assert pipeline.plan.quantization.on


@pytest.mark.parametrize("int8", [False, True])
@torch.no_grad()
def test_leave_sums_to_the_next_block_keeps_the_output(load, int8):
    """Bit by bit, and only the last block makes its own."""
    pipeline, args = load("--ckpt", "tiny-flux-dev")
    fuse(pipeline, int8)
    inputs = capture_step(pipeline, call_kwargs(pipeline, args))
    expected = pipeline.transformer(**inputs)[0]
    defer_residuals(pipeline.transformer)
    left = []
    for block in [*pipeline.transformer.transformer_blocks, *pipeline.transformer.single_transformer_blocks]:
        block.register_forward_hook(lambda module, given, found: left.append(isinstance(found[0], tuple)))
    assert torch.equal(pipeline.transformer(**inputs)[0], expected)
    assert all(left[:-1]) and not left[-1] and len(left) > 2


GUIDED = ["--negative_prompt", "red", "--true_cfg_scale", "2"]


@cases("kontext", guided=[*CASES["kontext"], "--num_images_per_prompt", "2", *GUIDED])
@pytest.mark.parametrize("int8", [False, pytest.param(True, marks=pytest.mark.slow)])
@torch.no_grad()
def test_drop_unread_keeps_every_picture(load, argv, int8):
    """Every picture stays as it is, of another size too, while the last block makes its tokens alone; called by others
    it makes all."""
    pipeline, args = load(*argv, "--num_inference_steps", "2")
    fuse(pipeline, int8)
    defer_residuals(pipeline.transformer)
    inputs = capture_step(pipeline, call_kwargs(pipeline, args))
    sizes = [{}, {"height": 80, "width": 48, **({"max_area": 80 * 48} if "tiny-kontext" in argv else {})}]

    def latents(size):
        return pipeline(**call_kwargs(pipeline, args) | size, output_type="latent").images

    expected = [latents(size) for size in sizes]
    made = []
    pipeline.transformer.single_transformer_blocks[-1].register_forward_hook(
        lambda module, given, found: made.append([x.shape[1] for x in found]))
    prune_unused_tokens(pipeline)
    for size, picture in zip(sizes, expected, strict=True):
        assert relative(latents(size), picture) < 1e-3
        assert made == [[0, picture.shape[1]]] * (4 if GUIDED[0] in argv else 2)
        made.clear()
    everything = pipeline.transformer(**inputs)[0]
    assert made == [[inputs["encoder_hidden_states"].shape[1], inputs["hidden_states"].shape[1]]]
    assert everything.shape[1] == expected[0].shape[1] * (2 if "tiny-kontext" in argv else 1)


@torch.no_grad()
def test_signature_tells_the_sizes_of_picture_and_reference_apart(load):
    """64 tokens of a picture before 16 of a reference are as many as 16 before 64: not the same CUDA graph."""
    pipeline, _ = load(*CASES["kontext"])
    fuse(pipeline)
    prune_unused_tokens(pipeline)
    seen = []
    pipeline.transformer.register_forward_pre_hook(lambda module, args, kwargs: seen.append(signature(args, kwargs)),
                                                   with_kwargs=True)
    for picture, reference in ((128, 64), (64, 128)):
        image = PIL.Image.new("RGB", (reference, reference))
        pipeline(image, "a rocket", height=picture, width=picture, max_area=picture**2, _auto_resize=False,
                 num_inference_steps=1, output_type="latent")
    of_tensors = [[leaf for leaf in leaves if isinstance(leaf[0], tuple)] for _, leaves in seen]
    assert of_tensors[0] == of_tensors[1] and seen[0] != seen[1]


@pytest.mark.parametrize("cached, graphs", [
    pytest.param((0, 0), ["double", "double-2", "single", "single-2"], marks=pytest.mark.slow),
    ((1, 1), ["double", "double-2", "double-3", "single", "single-2", "single-3"])])
@pytest.mark.parametrize("int8", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_capture_of_fused_blocks_exports_each_of_their_graphs(load, cached, graphs, int8):
    """As packages need it: one program serves all blocks of a graph, on their own weights. Compiling takes a GPU."""
    pipeline, args = load("--ckpt", "tiny-flux", "--num_inference_steps", "1")
    fuse_projections(pipeline.transformer)
    fuse_blocks(pipeline.transformer, CPU, int8=int8)
    defer_residuals(pipeline.transformer, *cached)
    with attach_modulation_hook(pipeline), torch.no_grad():
        units = export.capture(export.packaged(pipeline, True, False, False, False),
                             lambda: pipeline(**call_kwargs(pipeline, args)))
        assert [unit.name for unit in units] == graphs
        for unit in units:
            program = torch.export.export(unit.modules[0], (), kwargs=unit.arguments, strict=False)
            weights = export.constants_of(unit.modules[-1])
            program.state_dict.update({name: weights[name] for name in program.state_dict})
            found, expected = program.module()(**unit.arguments), unit.modules[-1](**unit.arguments)
            for a, b in zip(export._tensors(found), export._tensors(expected), strict=True):
                assert torch.equal(a, b)


@torch.no_grad()
def test_gemms_in_a_trained_model_do_not_saturate(load, monkeypatch):
    """No element reaches e4m3's largest: the scales made from bounds are bounds. Nor are they useless."""
    pipeline, args = load("--ckpt", "tiny-flux-dev")
    fuse(pipeline)
    largest = []

    def watched(name):
        def call(*operands):
            found = getattr(gemm, name)(*operands)
            written = operands[7] if name == "gelu_gemm" else found[0]
            largest.append(written.float().abs().max().item())
            return found
        return call

    for name in ("gelu_gemm", "qkv_gemm"):
        monkeypatch.setattr(fused_blocks, name, watched(name))
    pipeline(**call_kwargs(pipeline, args, num_inference_steps=3), output_type="latent")
    assert max(largest) < E4M3_MAX and min(largest) > E4M3_MAX / 200, largest


@cases("guided", guided=["--ckpt", "tiny-flux-dev", "--height", "64", "--width", "64", *GUIDED])
@torch.no_grad()
def test_modulations_of_all_steps_at_once_are_those_of_each_step(load, argv, monkeypatch):
    """In a real loop every step gets what diffusers' arguments of that step give alone, but for the rounding of bf16
    products of another height; one product is made for all steps, two with a negative prompt, and a new one for the
    next image."""
    pipeline, args = load(*argv)
    fuse(pipeline)
    modulations, made, seen = pipeline.transformer.time_text_embed, [], []
    table = modulations.table

    def counted(timesteps, *conditions):
        made.append(len(timesteps))
        return table(timesteps, *conditions)

    monkeypatch.setattr(modulations, "table", counted)
    for image in range(2):
        pipeline(**call_kwargs(pipeline, args, num_inference_steps=4), output_type="latent")
        assert made == [4] * len(made) and len(made) == (image + 1) * (1 + ("--true_cfg_scale" in argv))

    def checked(*conditions):
        found = Modulations.forward(modulations)[:, :len(modulations.weight)].clone()
        alone = modulations.gemm(torch.nn.functional.silu(modulations.embed(*conditions)))
        assert relative(found, alone) < 0.006
        seen.append(alone)
        return Modulations.forward(modulations)

    monkeypatch.setattr(modulations, "forward", checked)
    pipeline(**call_kwargs(pipeline, args, num_inference_steps=4), output_type="latent")
    assert min(relative(a, b) for a, b in pairwise(seen)) > 0.02, "steps do not differ"
    # A call outside a loop, as the benchmark's error of a step makes one.
    inputs = capture_step(pipeline, call_kwargs(pipeline, args, num_inference_steps=2))
    pipeline.transformer(**inputs | {"timestep": inputs["timestep"] / 3})


@pytest.mark.parametrize("in_float8, bound", [(False, 0.02), (True, 0.1)])
@torch.no_grad()
def test_modulations_hold_one_plus_scale_and_scaled_gates(load, in_float8, bound):
    pipeline, args = load("--ckpt", "tiny-flux-dev")
    inputs = capture_step(pipeline, call_kwargs(pipeline, args))
    transformer = pipeline.transformer
    double, single = transformer.transformer_blocks[1], transformer.single_transformer_blocks[1]
    linears = [double.norm1_context.linear, double.norm1.linear, single.norm.linear]
    kept = [(linear.weight.float().clone(), linear.bias.float().clone()) for linear in linears]
    # As AdaLN undoes a massive channel: bf16 keeps 1 + scale near zero as exactly as any other number.
    width = transformer.inner_dim
    linears[0].weight[width + 5], linears[0].bias[width + 5] = 0, -0.9903
    kept[0][0][width + 5], kept[0][1][width + 5] = 0, linears[0].bias[width + 5].float()
    fuse_projections(transformer)
    fuse_blocks(transformer, CPU, in_float8)
    double, single, modulations = (transformer.transformer_blocks[1], transformer.single_transformer_blocks[1],
                                   transformer.time_text_embed)
    conditions = [inputs["timestep"] * 1000, inputs["guidance"] * 1000, inputs["pooled_projections"]]
    x = torch.nn.functional.silu(modulations.embed(*conditions)).float()
    table = modulations.table(inputs["timestep"][None], inputs["guidance"], inputs["pooled_projections"])[0].float()
    factors = [*double.factors, *single.factors]
    assert torch.equal(factors[0][2], double.out.gate_factors()[0])
    assert torch.equal(factors[1][5], double.down.gate_factors()[1])
    assert torch.equal(factors[2][2], single.out.scale) and len({*factors[0][0].tolist()}) > 1
    for (weight, bias), at, own in zip(kept, (*double.offsets, single.offsets[0]), factors, strict=True):
        expected = (x @ weight.T + bias).view(-1, width)
        expected[1::3] += 1
        expected *= own
        found = table[0, at:at + len(weight)].view(-1, width)
        for a, b in zip(found, expected, strict=True):
            assert relative(a, b) < bound
    near_zero = (1 + kept[0][1][width + 5]) * factors[0][1][5]
    assert abs(table[0, double.offsets[0] + width + 5] / near_zero - 1) < 0.01


@pytest.mark.parametrize("int8, rounding", [(False, 0.04), (True, 0.01)])
@torch.no_grad()
def test_quantized_linear_equals_its_linears(int8, rounding):
    linears = [torch.nn.Linear(64, 32), torch.nn.Linear(64, 32)]
    linears[0].weight[3] = 0
    linears[1].weight *= torch.logspace(-4, 4, 32)[:, None]  # a scale a row
    for gated in (False, True):
        module = QuantizedLinear([one.weight for one in linears], [one.bias for one in linears], gated, int8)
        weights, scales, biases = (part.chunk(2) for part in module.operands())
        for linear, weight, scale, bias, factor in zip(linears, weights, scales, biases, module.gate_factors(),
                                                       strict=True):
            assert (scale.log2() == scale.log2().round()).all() == (gated and not int8)
            assert torch.equal(factor, scale if gated and not int8 else torch.ones(32))
            for a, b in zip(weight.float() * scale[:, None], linear.weight, strict=True):
                assert (a - b).norm() <= rounding * b.norm()
            assert relative(bias.float() * factor, linear.bias) < 0.004


@pytest.mark.parametrize("shifted_from", [None, 0, 24])
@torch.no_grad()
def test_int8_linear_sums_the_columns_with_a_zero_point(shifted_from):
    linears = [torch.nn.Linear(64, 32), torch.nn.Linear(64, 32)]
    module = QuantizedLinear([one.weight for one in linears], [one.bias for one in linears], True, True, shifted_from)
    x, zero_point, scale = torch.randint(-127, 128, (1, 5, 64)), -100.0, 0.01
    shifted = (x - zero_point * (torch.arange(64) >= (64 if shifted_from is None else shifted_from))) * scale
    y = int8_gemm(x.to(torch.int8), torch.full((1, 5), zero_point), module.weight, module.scale, module.sums, 2, 2)
    for rows, linear, bias in ((slice(2), linears[0], module.bias[:32]), (slice(2, 5), linears[1], module.bias[32:])):
        assert relative(y[:, rows] * scale + bias, linear(shifted[:, rows])) < 0.02


@pytest.mark.parametrize("kinds, rounding", [((FusedDoubleBlock, FusedSingleBlock), 0.05),
                                             ((Int8DoubleBlock, Int8SingleBlock), 0.015)])
@torch.no_grad()
def test_fused_blocks_fold_shares_into_the_weights(load, kinds, rounding):
    """Fused weights, multiplied out in float32, are the block's: v and out, GELU's columns and down."""
    pipeline, _ = load("--ckpt", "tiny-flux-dev")
    transformer = pipeline.transformer
    fuse_projections(transformer)
    block, single = transformer.transformer_blocks[0], transformer.single_transformer_blocks[0]
    fused, fused_single = kinds[0](block, 0, 0, CPU), kinds[1](single, 0, CPU)
    width, heads = block.attn.query_dim, block.attn.heads

    def weights(linear):
        return [weight.float() * scale[:, None] for weight, scale in zip(linear.weight.chunk(linear.count),
                                                                         linear.scale.chunk(linear.count), strict=True)]

    pairs = zip(weights(fused.qkv), weights(fused.out), (block.attn.to_added_qkv, block.attn.to_qkv),
                (block.attn.to_add_out, block.attn.to_out[0]), strict=True)
    pairs = [*pairs, (weights(fused_single.qkv)[0], weights(fused_single.out)[0][:, :width], single.attn.to_qkv,
                      single.proj_out)]
    read = [own[0] for own in (*fused.factors, *fused_single.factors)]
    for (qkv, out, first, second), by_qkv in zip(pairs, read, strict=True):
        found = out @ qkv[-width:] * by_qkv
        assert relative(found, second.weight[:, :width].float() @ first.weight[-width:].float()) < rounding
    for up, down, columns, mlp, own in zip(weights(fused.up), weights(fused.down), fused.columns.chunk(2),
                                           (block.ff_context, block.ff), fused.factors, strict=True):
        x = torch.randn(50, width)
        found = torch.nn.functional.gelu(x * own[3] @ up.T, approximate="tanh") * columns @ down.T
        expected = torch.nn.functional.gelu(x @ mlp.net[0].proj.weight.float().T, approximate="tanh") @ (
            mlp.net[2].weight.float().T)
        assert relative(found, expected) < rounding
    assert fused.int8 or (fused.bounds.shape == (2, 2 + 2 * heads) and torch.equal(*fused_single.bounds))


def test_step_cache_on_fused_blocks_skips_them(load):
    pipeline, args = load("--ckpt", "tiny-flux-dev", "--num_inference_steps", "8")
    fuse_projections(pipeline.transformer)
    fuse_blocks(pipeline.transformer, CPU)
    blocks = [*pipeline.transformer.transformer_blocks, *pipeline.transformer.single_transformer_blocks]
    calls = [0] * len(blocks)
    for i, block in enumerate(blocks):
        block.register_forward_hook(lambda *_, i=i: calls.__setitem__(i, calls[i] + 1))
    options = dbcache.CacheOptions(Fn_compute_blocks=2, Bn_compute_blocks=0, max_warmup_steps=2,
                                      residual_diff_threshold=100.0)
    dbcache.enable(pipeline, options, separate_cfg=False)
    attach_modulation_hook(pipeline)
    pipeline(**call_kwargs(pipeline, args), output_type="latent")
    cached = dbcache.cached_steps(pipeline)
    assert cached and calls[0] == 8 and calls[-1] == 8 - len(cached)
