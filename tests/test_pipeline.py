"""The recipe on small pipelines: every pair of switches against the plain pipeline, on a CPU."""

import functools
import itertools

import numpy as np
import PIL.Image
import pytest
import torch
from conftest import relative, skip_without_float8_products
from torch._dynamo.utils import counters

from bench.quality import capture_step, latent_recorder
from utils import attention, machine, pipeline_utils, plan, random_weights
from utils.aoti import export
from utils.aoti.inductor import write_package
from utils.benchmark_utils import create_parser
from utils.cache import dbcache
from utils.checkpoint import configs_of
from utils.common import RecipeError, StageLog
from utils.compilation import TUNING_FLAGS, compile_pipeline, use_packages
from utils.hardware import Hardware
from utils.images import image_parameters
from utils.pipeline_utils import call_kwargs, fuse_projections, optimize
from utils.random_weights import architecture

NAMES = ["tiny-flux", "tiny-flux-dev", "tiny-kontext"]
LAYERS = "1+2"  # of the models on which switches meet each other


@pytest.fixture(scope="module")
def reference_image(tmp_path_factory):
    path = tmp_path_factory.mktemp("image") / "reference.png"
    pixels = np.random.default_rng(0).integers(0, 255, (60, 90, 3), dtype=np.uint8)
    PIL.Image.fromarray(pixels).save(path)
    return str(path)


@pytest.fixture
def args_for(make_args, reference_image):
    def make(name, *argv):
        image = ["--image", reference_image] if name == "tiny-kontext" else []
        return make_args("--ckpt", name, "--num_inference_steps", "2", "--compile_export_mode", "compile", *image,
                         *argv)
    return make


def latents(pipeline, args):
    return pipeline(**call_kwargs(pipeline, args), output_type="latent").images


def image(pipeline, args):
    return pipeline(**call_kwargs(pipeline, args)).images


def covering(*factors: list) -> list[tuple]:
    """Rows of one value of each factor, in which every two values of two factors meet. Greedy, so not the fewest."""
    every = list(itertools.product(*(range(len(values)) for values in factors)))
    pairs = {row: set(itertools.combinations(enumerate(row), 2)) for row in every}
    left, rows = set().union(*pairs.values()), []
    while left:
        rows.append(max(every, key=lambda row: len(left & pairs[row])))
        left -= pairs[rows[-1]]
    return [tuple(values[i] for values, i in zip(factors, row, strict=True)) for row in rows]


PROJECTIONS = [[], ["--disable_fused_projections"]]
OTHERS = [[], ["--disable_channels_last"], ["--text_encoder_quant"]]  # the decoder's and the encoder's
NUMBERS = [["--disable_quant"], ["float8"], ["int8"], ["--disable_quant", "--disable_bf16"], ["int8", "--disable_bf16"]]
SHAPES = [(1, 64, 64), (2, 48, 80), (1, 80, 48)]  # batch, height, width

# Relative error of the pixels, in [-1, 1], against the plain pipeline in the same dtype; beside each bound the largest
# seen. A tiny random model moves its latents little in two steps: these bounds notice what is broken, they do not grade
# a technique.
BOUNDS = {
    ("", torch.float32): 5e-4,         # 1.2e-4, with T5 in int8
    ("int8", torch.float32): 3e-3,     # 9.5e-4
    ("", torch.bfloat16): 0.05,        # 2.7e-2: the decoder in another memory format
    ("int8", torch.bfloat16): 0.05,    # 2.9e-2
    ("float8", torch.bfloat16): 0.05,  # 2.9e-2
}


@functools.cache
def plain_pixels(name, dtype, shape, reference_image):
    """Pixels of the untouched pipeline, made once for all combinations."""
    pipeline = random_weights.build(random_weights.architecture(name, LAYERS), "cpu", dtype)
    pipeline.set_progress_bar_config(disable=True)
    image = ["--image", reference_image] if name == "tiny-kontext" else []
    args = create_parser().parse_args(["--ckpt", name, "--num_inference_steps", "2", *image, *shape])
    return pixels(pipeline, args)


def pixels(pipeline, args):
    return pipeline(**call_kwargs(pipeline, args), output_type="pt").images * 2 - 1


@pytest.mark.parametrize("name, projections, others, numbers, shape",
                         covering(NAMES, PROJECTIONS, OTHERS, NUMBERS, SHAPES),
                         ids=lambda x: x if isinstance(x, str) else " ".join(map(str, x)))
def test_optimize_each_pair_of_switches_is_close_to_the_plain_pipeline(
        build, args_for, reference_image, float8_on_cpu, monkeypatch, name, projections, others, numbers, shape):
    """Not compiled: that is below."""
    flags = [*projections, *others, *numbers]
    argv = [flag for flag in flags if flag.startswith("--")]
    kind = next((k for k in ("float8", "int8") if k in flags), "")
    if kind == "float8":
        skip_without_float8_products()
    if kind:
        argv += ["--quant_dtype", kind]
        # int8 is refused uncompiled because it would be slow, not because it would be wrong.
        monkeypatch.setattr(machine, "compiler_obstacle", lambda: None)
        monkeypatch.setattr(pipeline_utils, "compile_pipeline", lambda *_: None)
    else:
        argv += ["--compile_export_mode", "disabled"]
    batch, height, width = shape
    shape = ("--num_images_per_prompt", str(batch), "--height", str(height), "--width", str(width))
    args = args_for(name, *argv, *shape)
    dtype = torch.float32 if args.disable_bf16 else torch.bfloat16
    expected = plain_pixels(name, dtype, shape, reference_image)

    found = pixels(optimize(build(name, dtype, LAYERS), args), args)
    assert found.shape == (batch, 3, height, width) and found.isfinite().all() and found.std() > 0.05
    assert relative(found, expected) < BOUNDS[kind, dtype]


EXTRAS = {
    "cfg": ["--negative_prompt", "blue", "--true_cfg_scale", "2"],
    "backend": ["--attention_backend", "_native_math"],
    "tiling": ["--vae_tiling"],
    "cache": ["--cache_dit_config", "CACHE"],
}


_plain_latents = {}


def plain_latents(name, guided, args):
    """Final latents of the untouched pipeline, made once for all combinations that share them."""
    if (name, guided) not in _plain_latents:
        pipeline = random_weights.build(random_weights.architecture(name, LAYERS), "cpu", torch.bfloat16)
        pipeline.set_progress_bar_config(disable=True)
        _plain_latents[name, guided] = latents(pipeline, args)
    return _plain_latents[name, guided]


@pytest.mark.parametrize("name, extras", [
    (name, tuple(filter(None, extras))) for name, *extras in covering(NAMES, *([None, extra] for extra in EXTRAS))],
    ids=lambda x: x if isinstance(x, str) else " ".join(x) or "none")
def test_optimize_each_pair_of_extras_goes_together(build, args_for, monkeypatch, tmp_path, name, extras):
    """Guidance, attention backend, tiling and step cache, with int8 and batch 2."""
    (tmp_path / "cache.yaml").write_text("Fn_compute_blocks: 1\nmax_warmup_steps: 2\nresidual_diff_threshold: 100.0\n")
    monkeypatch.setattr(pipeline_utils, "compile_pipeline", lambda *_: None)
    argv = [str(tmp_path / "cache.yaml") if flag == "CACHE" else flag for extra in extras for flag in EXTRAS[extra]]
    args = args_for(name, *argv, "--num_images_per_prompt", "2", "--num_inference_steps", "3")
    pipeline, steps = optimize(build(name, torch.bfloat16, LAYERS), args), []
    pictures = pipeline(**call_kwargs(pipeline, args), output_type="pil" if "tiling" in extras else "latent",
                        callback_on_step_end=latent_recorder(steps)).images
    found, expected = steps[-1], plain_latents(name, "cfg" in extras, args)
    if "cache" in extras:
        assert dbcache.cached_steps(pipeline) and not torch.equal(found, expected)
    else:
        assert relative(found, expected) < 0.012  # as above: int8 without the decoder
    if "tiling" in extras:
        assert [p.size for p in pictures] == [(128, 128)] * 2 and np.asarray(pictures[1]).std() > 1


@pytest.mark.slow
@pytest.mark.parametrize("name, argv", [
    ("tiny-flux", ["--quant_dtype", "int8"]),
    ("tiny-kontext", ["--text_encoder_quant", "--num_images_per_prompt", "2", "--height", "96", "--width", "160",
                      "--negative_prompt", "", "--true_cfg_scale", "2"]),
    ("tiny-flux", ["--disable_quant", "--compile_scope", "whole"]),
])
def test_optimize_compiled_is_close_and_compiles_once(build, args_for, compiler, name, argv):
    """The predecessors warmed up at another sequence length: the first real call compiled again."""
    args = args_for(name, *argv)
    expected = latents(build(name, torch.bfloat16), args)
    pipeline = optimize(build(name, torch.bfloat16), args)
    assert pipeline.plan.compile.on
    compiled = counters["stats"]["unique_graphs"]
    assert compiled > 0
    with torch._dynamo.config.patch(error_on_recompile=True):
        found = latents(pipeline, args)
        pictures = image(pipeline, args)
    assert counters["stats"]["unique_graphs"] == compiled, "the real call compiled something new"
    # Measured: 2.9e-3 to 5.4e-3; compiled code rounds to bf16 less often.
    assert relative(found, expected) < 0.012
    assert len(pictures) == args.num_images_per_prompt and np.asarray(pictures[0]).std() > 1


@pytest.mark.parametrize("mode", ["export_aoti", "compile"])
def test_optimize_patches_no_method_of_the_models(build, args_for, tmp_path, monkeypatch, mode):
    """The predecessors replaced `forward` and `decode` on instances and kept the weights twice. Nothing is compiled
    here: each package's code is the module itself."""
    monkeypatch.setattr(pipeline_utils, "compile_pipeline", lambda *_: None)
    monkeypatch.setattr(export, "machine", lambda device: {})
    monkeypatch.setattr(export, "export", lambda *_, **__: None)
    monkeypatch.setattr(export, "load_code", lambda unit, module, *_: module)
    args = args_for("tiny-flux", "--compile_export_mode", mode, "--cache-dir", str(tmp_path))
    pipeline = optimize(build("tiny-flux", torch.bfloat16), args)
    for name in ("transformer", "vae", "text_encoder", "text_encoder_2"):
        for module in getattr(pipeline, name).modules():
            assert not {"forward", "decode", "encode"} & set(module.__dict__), name
    for module in (pipeline.transformer.transformer_blocks[0], pipeline.vae.decoder):
        assert isinstance(module, export.PackagedModule) == (mode == "export_aoti")


@pytest.mark.parametrize("name", NAMES)
def test_use_attention_library_in_the_whole_pipeline_is_close(build, args_for, name):
    """As on a Hopper GPU, with the op's CPU kernel in FlashAttention's place."""
    args = args_for(name, "--compile_export_mode", "disabled", "--num_images_per_prompt", "2")
    noise = torch.randn(2, 64, 64)  # torch 2.11 draws another one, and other weights, in another dtype

    def drawn(pipeline):
        return pipeline(**call_kwargs(pipeline, args), latents=noise, output_type="latent").images

    expected = drawn(build(name, torch.bfloat16, LAYERS).to(torch.float32))
    pipeline = build(name, torch.bfloat16, LAYERS)
    fuse_projections(pipeline.transformer)
    attention.use_attention_library(pipeline.transformer, "fa3")
    assert relative(drawn(pipeline), expected) < 0.04  # measured: 3.7e-3 to 2.4e-2


@pytest.mark.parametrize("name", NAMES)
def test_optimize_warms_up_with_the_shapes_and_dtypes_of_the_real_call(build, args_for, monkeypatch, name):
    monkeypatch.setattr(pipeline_utils, "compile_pipeline", lambda *_: None)
    args, pipeline, calls = args_for(name, "--num_images_per_prompt", "2"), build(name, torch.bfloat16, "1+1"), []

    def record(module, positional, named):
        assert not positional
        calls.append({key: (tuple(value.shape), value.dtype) for key, value in named.items()
                      if isinstance(value, torch.Tensor)})

    pipeline.transformer.register_forward_pre_hook(record, with_kwargs=True)
    optimize(pipeline, args)
    warm_up = calls.copy()
    pipeline(**call_kwargs(pipeline, args, prompt="another", seed=7))
    assert len(warm_up) == 1 and len(calls) == 3 and all(call == warm_up[0] for call in calls)
    assert warm_up[0]["encoder_hidden_states"][0][:2] == (2, 64)


def test_call_kwargs_guidance_reaches_the_model_in_float32(build, args_for):
    """flux-fast exported it as bf16 while diffusers passes float32."""
    pipeline = build("tiny-flux-dev", torch.bfloat16)
    inputs = capture_step(pipeline, call_kwargs(pipeline, args_for("tiny-flux-dev", "--guidance_scale", "2.25")))
    assert inputs["guidance"].dtype == torch.float32 and inputs["guidance"].item() == 2.25


@pytest.mark.parametrize("size, tokens", [((64, 64), 16 + 16), ((96, 160), 60 + 60), ((160, 96), 60 + 60)])
def test_call_kwargs_kontext_takes_any_size(build, args_for, size, tokens):
    """diffusers alone returns a megapixel whatever was asked for. The reference is 3:2."""
    height, width = size
    pipeline = build("tiny-kontext")
    args = args_for("tiny-kontext", "--height", str(height), "--width", str(width))
    inputs = capture_step(pipeline, call_kwargs(pipeline, args))
    output, reference = height * width // 256, inputs["hidden_states"].shape[1] - height * width // 256
    assert output <= tokens and abs(reference - output) <= 0.35 * output
    assert image(pipeline, args)[0].size == (width, height)


def test_call_kwargs_fewer_text_tokens_reach_the_model_and_the_metadata(build, args_for):
    pipeline = build("tiny-flux")
    for flags, tokens in (([], 64), (["--max_sequence_length", "32"], 32)):
        args = args_for("tiny-flux", *flags, "--compile_export_mode", "disabled", "--disable_bf16")
        kwargs = call_kwargs(pipeline, args)
        assert capture_step(pipeline, kwargs)["encoder_hidden_states"].shape[1] == tokens
        optimized = optimize(build("tiny-flux"), args)
        parameters = image_parameters(args, optimized, call_kwargs(optimized, args), "a cat", 1)
        assert parameters.get("max_sequence_length", 64) == tokens


def test_call_kwargs_each_image_of_a_batch_has_its_own_seed(build, args_for):
    pipeline = build("tiny-flux")
    batch = latents(pipeline, args_for("tiny-flux", "--num_images_per_prompt", "2", "--seed", "5"))
    alone = latents(pipeline, args_for("tiny-flux", "--seed", "6"))
    assert relative(batch[1:], alone) < 1e-5 and relative(batch[:1], alone) > 0.1


def test_fuse_projections_frees_the_separate_ones(build):
    pipeline = build("tiny-flux")
    before = sum(p.numel() for p in pipeline.transformer.parameters())
    fuse_projections(pipeline.transformer)
    fuse_projections(pipeline.vae)
    assert sum(p.numel() for p in pipeline.transformer.parameters()) == before
    assert not [name for name, _ in pipeline.transformer.named_modules() if name.endswith(("to_q", "add_k_proj"))]


def test_compile_pipeline_tunes_the_transformer_alone(build, args_for, tmp_path, monkeypatch):
    """Tuning the VAE's norms takes many minutes."""
    assert TUNING_FLAGS.keys() <= set(torch._inductor.list_options())
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    seen = {}
    monkeypatch.setattr(torch.nn.Module, "compile", lambda module, **given: seen.update({type(module).__name__: given}))
    chosen = plan.make_plan(args_for("tiny-flux"), architecture("tiny-flux"), Hardware("cpu"))
    chosen.inductor_flags.on = True  # as on a GPU
    compile_pipeline(chosen, build("tiny-flux", torch.float32), str(tmp_path))
    tuned = {name for name, given in seen.items() if given.get("options") == TUNING_FLAGS}
    assert tuned == {"FluxTransformerBlock", "FluxSingleTransformerBlock"} and "Decoder" in seen


@pytest.mark.parametrize("with_t5", [True, False])
def test_compile_pipeline_leaves_a_t5_whose_weights_travel(build, args_for, tmp_path, monkeypatch, with_t5):
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    pipeline, seen = build("tiny-flux", torch.float32), []
    monkeypatch.setattr(torch.nn.Module, "compile", lambda module, **given: seen.append(type(module).__name__))
    args = args_for("tiny-flux", "--offload", "none" if with_t5 else "text")
    chosen = plan.make_plan(args, architecture("tiny-flux"), Hardware("cuda", (9, 0), attention_source="fa3"))
    compile_pipeline(chosen, pipeline, str(tmp_path))
    assert ("T5Block" in seen) == with_t5 and "Decoder" in seen


def test_use_packages_tunes_the_blocks_alone(build, args_for, tmp_path, monkeypatch):
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    units, compiled = [], {}
    monkeypatch.setattr(export, "use_packages", lambda pipeline, given, *_: units.extend(given) or "")
    monkeypatch.setattr(torch._inductor, "aoti_compile_and_package", lambda program, package_path, inductor_configs:
                        compiled.update({package_path: inductor_configs}))
    for flags, tuned in ((["--disable_inductor_tuning_flags"], set()), ([], {"double", "single"})):
        units.clear()
        args, pipeline = args_for("tiny-flux", *flags), build("tiny-flux", layers="1+1")
        chosen = plan.make_plan(args, configs_of(pipeline), Hardware("cpu"))
        chosen.inductor_flags.on = not flags
        use_packages(chosen, pipeline, args, functools.partial(call_kwargs, pipeline, args), StageLog(quiet=True))
        assert {unit.name for unit in units if unit.settings} == tuned
        assert {unit.name for unit in units} == {"double", "single", "decoder"}
    for unit in units:
        if unit.name != "decoder":
            write_package(unit.modules[0], unit.arguments, tmp_path / unit.name, unit.settings, {})
            assert TUNING_FLAGS.items() <= compiled[str(tmp_path / unit.name)].items()


def make_lora(pipeline, folder, rank=4):
    """A LoRA on attention and MLP of both kinds of block, and the weights it should lead to at scale 0.5."""
    from peft import LoraConfig, get_peft_model_state_dict
    targets = ["to_q", "to_k", "to_v", "add_q_proj", "to_out.0", "proj_mlp", "proj_out", "ff.net.0.proj"]
    pipeline.transformer.add_adapter(LoraConfig(r=rank, lora_alpha=rank, target_modules=targets,
                                                init_lora_weights="gaussian"))
    for name, parameter in pipeline.transformer.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    layers = get_peft_model_state_dict(pipeline.transformer)
    type(pipeline).save_lora_weights(folder, transformer_lora_layers=layers)
    return {name.removesuffix(".lora_A.weight"): 0.5 * layers[name.replace("lora_A", "lora_B")] @ layers[name]
            for name in layers if "lora_A" in name}


@pytest.fixture
def plain(make_args):
    """tiny-flux without a LoRA, loaded anew."""
    return lambda: pipeline_utils.load_pipeline(make_args("--ckpt", "tiny-flux", "--disable_bf16"))


def test_load_pipeline_puts_a_lora_into_the_weights(plain, make_args, tmp_path):
    """On a fused or quantized model a LoRA silently does nothing."""
    torch.manual_seed(3)
    updates, without = make_lora(plain(), tmp_path), plain()
    base = without.transformer.state_dict()
    args = make_args("--ckpt", "tiny-flux", "--disable_bf16", "--compile_export_mode", "disabled",
                     "--num_inference_steps", "1", "--lora", f"{tmp_path / 'pytorch_lora_weights.safetensors'}:0.5")
    pipeline = pipeline_utils.load_pipeline(args)
    merged = pipeline.transformer.state_dict()
    assert merged.keys() == base.keys() and len(updates) > 30
    for name, weight in base.items():
        update = updates.get(name.removesuffix(".weight"), 0.0)
        torch.testing.assert_close(merged[name], weight + update, rtol=1e-4, atol=1e-5)
    expected = latents(pipeline, args)
    assert relative(latents(optimize(pipeline, args), args), expected) < 1e-5
    assert relative(latents(without, args), expected) > 0.05


def test_load_pipeline_puts_a_text_encoders_lora_into_the_weights(plain, make_args, tmp_path):
    from peft import LoraConfig, get_peft_model_state_dict
    pipeline = plain()
    pipeline.text_encoder.add_adapter(LoraConfig(r=4, target_modules=["q_proj", "fc1"], init_lora_weights=False))
    layers = get_peft_model_state_dict(pipeline.text_encoder)
    type(pipeline).save_lora_weights(tmp_path, text_encoder_lora_layers=layers)
    loaded = pipeline_utils.load_pipeline(make_args("--ckpt", "tiny-flux", "--disable_bf16", "--lora", str(tmp_path)))
    base = plain().text_encoder.state_dict()
    found = loaded.text_encoder.state_dict()
    changed = {name for name, weight in found.items() if not torch.equal(weight, base[name])}
    assert len(changed) == 4 and all("q_proj" in name or "fc1" in name for name in changed)


@pytest.mark.parametrize("flags, dtype", [([], torch.bfloat16), (["--disable_bf16"], torch.float32)])
def test_optimize_casts_a_pipeline_of_ones_own_to_the_plans_dtype(build, args_for, flags, dtype):
    other = torch.float32 if dtype == torch.bfloat16 else torch.bfloat16
    args = args_for("tiny-flux", *flags, "--compile_export_mode", "disabled")
    pipeline = optimize(build("tiny-flux", other, LAYERS), args)
    assert {p.dtype for p in pipeline.transformer.parameters()} == {dtype} and pipeline.plan.dtype == dtype


def test_optimize_refuses_what_only_load_pipeline_does_for_a_pipeline_of_ones_own(build, args_for):
    """Its weights are as they are, and the metadata would name a LoRA that nothing merged."""
    for flags in (["--lora", "x"], ["--keep_quantized"]):
        with pytest.raises(RecipeError, match=" ".join(flags)):
            optimize(build("tiny-flux"), args_for("tiny-flux", *flags))


def test_optimize_uncompiled_fuses_projections_and_leaves_int8_off(build, args_for):
    pipeline = optimize(build("tiny-flux", torch.bfloat16), args_for("tiny-flux", "--compile_export_mode", "disabled"))
    assert not pipeline.plan.compile.on and not pipeline.plan.quantization.on
    assert pipeline.plan.fused_projections.on and pipeline.transformer.transformer_blocks[0].attn.to_qkv


def test_enable_tiling_at_the_default_size_is_nearly_the_same_picture(build, args_for):
    """With diffusers' default tile an image of the model's own size is one tile: nothing is saved."""
    size = ["--compile_export_mode", "disabled", "--disable_bf16"]
    whole_args = args_for("tiny-flux", *size)
    whole = np.asarray(image(optimize(build("tiny-flux"), whole_args), whole_args)[0])
    tiled_args = args_for("tiny-flux", *size, "--vae_tiling")
    tiled_pipeline = optimize(build("tiny-flux"), tiled_args)
    decoded = []
    tiled_pipeline.vae.decoder.register_forward_pre_hook(lambda module, args: decoded.append(args[0].shape[-1]))
    tiled = np.asarray(image(tiled_pipeline, tiled_args)[0])
    assert len(decoded) == 9 and max(decoded) == 8
    assert tiled.shape == whole.shape and np.corrcoef(tiled.ravel(), whole.ravel())[0, 1] > 0.8
