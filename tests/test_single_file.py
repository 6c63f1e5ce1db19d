"""Transformers from single files: each name and storage gives the folder's weights, and each fault is one line before
weights load."""

import fnmatch
import inspect
import json
import re
import shutil
import weakref
from types import SimpleNamespace

import diffusers.pipelines.pipeline_utils as diffusers_pipelines
import pytest
import torch
from diffusers.loaders import single_file_utils
from safetensors.torch import load_file, save_file

from utils import gguf_file, many_prompts, random_weights, single_file, tiny_presets, weight_files
from utils.benchmark_utils import check_args
from utils.checkpoint import read_configs
from utils.common import RecipeError
from utils.images import image_parameters
from utils.output_checks import inputs_of
from utils.pipeline_utils import call_kwargs, load_pipeline, optimize

DOUBLE, SINGLE, WIDTH = 2, 3, 256
E4M3, E5M2, BF16 = torch.float8_e4m3fn, torch.float8_e5m2, torch.bfloat16
TRANSFORMER = "transformer/diffusion_pytorch_model.safetensors"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A checkpoint like FLUX.1-dev with 2 + 3 blocks, in bf16."""
    path = tmp_path_factory.mktemp("checkpoint")
    configs = random_weights.architecture("tiny-flux-dev", f"{DOUBLE}+{SINGLE}")
    random_weights.build(configs, "cpu", BF16).save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def reference(folder):
    """The folder's transformer, under diffusers' names."""
    return load_file(folder / TRANSFORMER)


@pytest.fixture(scope="module")
def original(reference):
    return to_original(reference)


def to_original(state: dict) -> dict:
    """The weights under Black Forest Labs' names: written out, as a reference for the tables."""
    held, made = dict(state), {}

    def move(name, *names):
        for kind in ("weight", "bias"):
            if f"{names[0]}.{kind}" in held:
                made[f"{name}.{kind}"] = torch.cat([held.pop(f"{one}.{kind}") for one in names])

    for ours, theirs in (("timestep", "time"), ("guidance", "guidance"), ("text", "vector")):
        for i, layer in enumerate(("in_layer", "out_layer")):
            move(f"{theirs}_in.{layer}", f"time_text_embed.{ours}_embedder.linear_{i + 1}")
    move("img_in", "x_embedder")
    move("txt_in", "context_embedder")
    for n in range(DOUBLE):
        new, old = f"double_blocks.{n}", f"transformer_blocks.{n}"
        move(f"{new}.img_mod.lin", f"{old}.norm1.linear")
        move(f"{new}.txt_mod.lin", f"{old}.norm1_context.linear")
        move(f"{new}.img_attn.qkv", *(f"{old}.attn.to_{i}" for i in "qkv"))
        move(f"{new}.txt_attn.qkv", *(f"{old}.attn.add_{i}_proj" for i in "qkv"))
        move(f"{new}.img_attn.proj", f"{old}.attn.to_out.0")
        move(f"{new}.txt_attn.proj", f"{old}.attn.to_add_out")
        for stream, ff in (("img", "ff"), ("txt", "ff_context")):
            move(f"{new}.{stream}_mlp.0", f"{old}.{ff}.net.0.proj")
            move(f"{new}.{stream}_mlp.2", f"{old}.{ff}.net.2")
        for stream, added in (("img", ""), ("txt", "added_")):
            for kind, i in (("query", "q"), ("key", "k")):
                made[f"{new}.{stream}_attn.norm.{kind}_norm.scale"] = held.pop(f"{old}.attn.norm_{added}{i}.weight")
    for n in range(SINGLE):
        new, old = f"single_blocks.{n}", f"single_transformer_blocks.{n}"
        move(f"{new}.modulation.lin", f"{old}.norm.linear")
        move(f"{new}.linear1", *(f"{old}.attn.to_{i}" for i in "qkv"), f"{old}.proj_mlp")
        move(f"{new}.linear2", f"{old}.proj_out")
        for kind, i in (("query", "q"), ("key", "k")):
            made[f"{new}.norm.{kind}_norm.scale"] = held.pop(f"{old}.attn.norm_{i}.weight")
    move("final_layer.linear", "proj_out")
    for kind in ("weight", "bias"):
        scale, shift = held.pop(f"norm_out.linear.{kind}").chunk(2)
        made[f"final_layer.adaLN_modulation.1.{kind}"] = torch.cat([shift, scale])
    assert not held
    return {name: tensor.contiguous() for name, tensor in made.items()}


def converted_by_diffusers(state: dict) -> dict:
    """diffusers' own converter, whose width is fixed to FLUX.1's, at the width of the small model."""
    source = inspect.getsource(single_file_utils.convert_flux_transformer_checkpoint_to_diffusers)
    assert source.count("inner_dim = 3072") == 1
    space = dict(vars(single_file_utils))
    exec(source.replace("inner_dim = 3072", f"inner_dim = {WIDTH}"), space)
    return space["convert_flux_transformer_checkpoint_to_diffusers"](dict(state))


def prefixed(state: dict, prefix: str = "model.diffusion_model.") -> dict:
    return {prefix + name: tensor for name, tensor in state.items()}


@pytest.fixture
def write(tmp_path):
    def save(state, name="transformer.safetensors", metadata=None):
        save_file({key: tensor.contiguous() for key, tensor in state.items()}, tmp_path / name, metadata=metadata)
        return str(tmp_path / name)
    return save


def found(path, folder):
    return single_file.find(path, read_configs(str(folder)))[1]


def loaded(path, folder, dtype=BF16):
    return single_file.load(found(path, folder), "cpu", dtype).state_dict()


def same(state, expected):
    return state.keys() == expected.keys() and all(
        state[name].dtype == expected[name].dtype and torch.equal(state[name], expected[name]) for name in expected)


# --- names and storage ---

@pytest.mark.parametrize("storage", [BF16, torch.float16, torch.float32, E4M3, E5M2], ids=str)
@pytest.mark.parametrize("names", ["diffusers", "original", "ComfyUI"])
def test_load_every_name_and_storage_gives_the_stored_values(folder, reference, original, write, names, storage):
    state = {"diffusers": reference, "original": original, "ComfyUI": prefixed(original)}[names]
    path = write({name: tensor.to(storage) for name, tensor in state.items()})
    assert same(loaded(path, folder), {name: tensor.to(storage).to(BF16) for name, tensor in reference.items()})


def test_load_places_tensors_as_the_converter_of_diffusers_does(folder, original, write):
    state = {name: torch.randn(tensor.shape) for name, tensor in original.items()}
    assert same(loaded(write(state), folder, torch.float32), converted_by_diffusers(state))


def test_load_rms_norm_weights_have_two_names(folder, reference, original, write):
    path = write({re.sub(r"_norm\.scale$", "_norm.weight", name): tensor for name, tensor in original.items()})
    assert same(loaded(path, folder), reference)


def scaled(original, kind, dtype=E4M3):
    """The float8 tensors of a scaled file, and its weights in float32."""
    state, values = {}, {}
    for name, tensor in original.items():
        if not name.endswith(".weight"):
            state[name] = values[name] = tensor
            continue
        scale = tensor.float().abs().amax(1, keepdim=True) if kind == "rows" else tensor.float().abs().max()
        scale = scale / torch.finfo(dtype).max
        state[name] = (tensor / scale).to(dtype)
        values[name] = state[name].float() * scale
        layer = name.removesuffix(".weight")
        state[f"{layer}.{'scale_weight' if kind == 'marker' else 'weight_scale'}"] = scale
        if kind == "marker":
            state[f"{layer}.scale_input"] = torch.ones(())
        elif kind == "comfy_quant":
            text = json.dumps({"format": "float8_e4m3fn", "full_precision_matrix_mult": True})
            state[f"{layer}.comfy_quant"] = torch.tensor(list(text.encode()), dtype=torch.uint8)
            state[f"{layer}.input_scale"] = torch.ones(1)
    if kind == "marker":
        state["scaled_fp8"] = torch.zeros(2, dtype=dtype)
    return state, {name: value.to(BF16) for name, value in values.items()}


@pytest.mark.parametrize("prefix", ["", "model.diffusion_model."])
@pytest.mark.parametrize("kind, dtype", [("marker", E4M3), ("marker", E5M2), ("comfy_quant", E4M3), ("rows", E4M3)])
def test_load_scaled_float8_is_value_times_scale_in_float32_rounded_once(folder, original, write, kind, dtype, prefix):
    state, values = scaled(original, kind, dtype)
    path = write(prefixed(state, prefix))
    assert same(loaded(path, folder), converted_by_diffusers(values)) and not found(path, folder).notes


def test_find_float8_weights_without_a_scale_among_scaled_ones_are_said(folder, original, write):
    state, values = scaled(original, "marker")
    del state["img_in.scale_weight"]
    values["img_in.weight"] = state["img_in.weight"].to(BF16)
    path = write(state)
    assert same(loaded(path, folder), converted_by_diffusers(values))
    assert "img_in.weight" in " ".join(found(path, folder).notes)


def test_find_takes_the_transformer_of_an_all_in_one_file_and_says_so(folder, reference, original, write):
    others = {"vae.decoder.conv_in.weight": torch.ones(2), "text_encoders.t5xxl.transformer.shared.weight":
              torch.ones(2), "text_encoders.t5xxl.transformer.scaled_fp8": torch.ones(2).to(E4M3)}
    path = write(prefixed(original) | others)
    assert same(loaded(path, folder), reference)
    assert "3 tensors of text_encoders, vae" in " ".join(found(path, folder).notes)


def test_load_holds_one_tensor_of_the_file_at_a_time(folder, original, write, monkeypatch):
    alive, most = weakref.WeakSet(), []
    opened = single_file.safe_open

    class Counting:
        def __init__(self, *args):
            self.file = opened(*args)

        def __enter__(self):
            return self

        def __exit__(self, *error):
            pass

        def get_tensor(self, name):
            most.append(len(alive))
            tensor = self.file.get_tensor(name)
            alive.add(tensor)
            return tensor

    source = found(write(original), folder)
    monkeypatch.setattr(single_file, "safe_open", Counting)
    single_file.load(source, "cpu", BF16)
    assert len(most) == len(original) and max(most) <= 1  # the tensor before is still bound while the next is read


# --- depth and guidance ---

def without_blocks(state, double, single):
    """The state without the given blocks, whose numbers stay absent."""
    gone = [f"double_blocks.{n}." for n in double] + [f"single_blocks.{n}." for n in single]
    return {name: tensor for name, tensor in state.items() if not name.startswith(tuple(gone))}


@pytest.mark.parametrize("double, single", [([1], [2]), ([0], [0, 1]), ([0], [1])])
def test_find_counts_the_blocks_and_numbers_them_without_gaps(folder, reference, original, write, double, single):
    path = write(without_blocks(original, double, single))
    configs, file = single_file.find(path, read_configs(str(folder)))
    depths = DOUBLE - len(double), SINGLE - len(single)
    assert (configs["transformer"]["num_layers"], configs["transformer"]["num_single_layers"]) == depths
    expected = {name: tensor for name, tensor in reference.items() if "blocks." not in name}
    for kind, total, gone in (("transformer_blocks", DOUBLE, double), ("single_transformer_blocks", SINGLE, single)):
        for new, old in enumerate(n for n in range(total) if n not in gone):
            expected |= {f"{kind}.{new}.{name.removeprefix(f'{kind}.{old}.')}": tensor
                         for name, tensor in reference.items() if name.startswith(f"{kind}.{old}.")}
    assert same(single_file.load(file, "cpu", BF16).state_dict(), expected)
    assert len([note for note in file.notes if "blocks only" in note]) == (double == [0]) + (single != [2])


def test_find_more_blocks_than_the_checkpoint_has_are_counted(folder, original, write):
    more = {name.replace("single_blocks.0.", f"single_blocks.{SINGLE}."): tensor.clone()
            for name, tensor in original.items() if name.startswith("single_blocks.0.")}
    assert found(write(original | more), folder).config["num_single_layers"] == SINGLE + 1


def test_find_reads_the_guidance_embedding_from_the_names(folder, original, write):
    without = write({name: tensor for name, tensor in original.items() if not name.startswith("guidance_in.")})
    configs, file = single_file.find(without, read_configs(str(folder)))
    assert configs["transformer"]["guidance_embeds"] is False and "schnell" in " ".join(file.notes)
    configs["transformer"] = configs["transformer"] | {"num_layers": 1}  # --ckpt like schnell, of other depth
    file = single_file.find(write(original), configs)[1]
    assert file.config["guidance_embeds"] is True and "dev" in " ".join(file.notes)
    assert not found(write(original), folder).notes


# --- faults, each in one line ---

def changed(state, name, value):
    return state | {name: value}


FAULTS = {
    "missing": (lambda s: {n: t for n, t in s.items() if n != "img_in.bias"}, r"1 missing \(x_embedder\.bias\)"),
    "half a block": (lambda s: {n: t for n, t in s.items() if n != "double_blocks.1.img_mlp.0.weight"},
                     r"transformer_blocks\.1\.ff\.net\.0\.proj\.weight"),
    "unknown": (lambda s: changed(s, "something.weight", torch.ones(2)), r"unknown to FLUX\.1 \(something\.weight\)"),
    "shape": (lambda s: changed(s, "txt_in.weight", torch.ones(256, 8)),
              r"txt_in\.weight \[256, 8\] instead of \[256, 256\]"),
    "two names": (lambda s: changed(s, "x_embedder.bias", torch.ones(256)), "1 given twice"),
    "two prefixes": (lambda s: prefixed(s) | {"img_in.bias": torch.ones(256)}, "1 given twice"),
    "Fill": (lambda s: changed(s, "img_in.weight", torch.ones(256, 384)), "384 channels, as FLUX.1-Fill"),
    "Depth": (lambda s: changed(s, "img_in.weight", torch.ones(256, 128)), "128 channels, as FLUX.1-Depth"),
    "no single block": (lambda s: without_blocks(s, [], range(SINGLE)), "2 double and 0 single"),
    "LoRA": (lambda s: {"transformer.transformer_blocks.0.attn.to_q.lora_A.weight": torch.ones(4, 256)}, "with --lora"),
    "kohya's LoRA": (lambda s: {"lora_unet_double_blocks_0_img_attn_qkv.lora_down.weight": torch.ones(4, 4)},
                     "with --lora"),
    "VAE": (lambda s: {"decoder.conv_in.weight": torch.ones(2), "decoder.mid.block_1.conv1.weight": torch.ones(2)},
            "looks like a VAE"),
    "diffusers' VAE": (lambda s: {"encoder.mid_block.attentions.0.to_q.weight": torch.ones(2)}, "looks like a VAE"),
    "T5": (lambda s: {"encoder.block.0.layer.0.SelfAttention.q.weight": torch.ones(2)}, "looks like a text encoder"),
    "CLIP": (lambda s: {"text_model.encoder.layers.0.mlp.fc1.weight": torch.ones(2)}, "looks like a text encoder"),
    "ControlNet": (lambda s: changed(s, "controlnet_blocks.0.weight", torch.ones(2)), "looks like a ControlNet"),
    "Chroma": (lambda s: changed(s, "distilled_guidance_layer.in_proj.weight", torch.ones(2)), "looks like Chroma"),
    "SD3": (lambda s: {"joint_blocks.0.x_block.attn.qkv.weight": torch.ones(2)}, "looks like Stable Diffusion 3"),
    "nf4": (lambda s: changed(s, "img_in.weight.quant_state.bitsandbytes__nf4", torch.ones(2)), "by bitsandbytes"),
    "nunchaku": (lambda s: {"transformer_blocks.0.mlp_fc1.qweight": torch.ones(2), "transformer_blocks.0.mlp_fc1."
                            "lora_down": torch.ones(2)}, "SVDQuant, for nunchaku"),
    "torchao": (lambda s: {"transformer_blocks.0.ff.net.2._weight_qdata": torch.ones(2)}, "by torchao"),
    "quanto": (lambda s: {"transformer_blocks.0.ff.net.2.weight._data": torch.ones(2)}, "by quanto"),
    "NVFP4": (lambda s: changed(s, "txt_in.weight_scale_2", torch.ones(())), "by NVFP4"),
    "int8": (lambda s: changed(s, "txt_in.weight", torch.ones(256, 256, dtype=torch.int8)), r"txt_in\.weight in I8"),
    "rotated": (lambda s: changed(s, "txt_in.comfy_quant", torch.tensor(list(
        b'{"format": "float8_e4m3fn", "convrot": true}'), dtype=torch.uint8)), "convrot"),
    "comfy_quant": (lambda s: changed(s, "txt_in.comfy_quant", torch.tensor(list(b"{"), dtype=torch.uint8)),
                    "Download the file again"),
    "blocks of scales": (lambda s: changed(s, "txt_in.weight_scale", torch.ones(256, 2)),
                         r"one a row \(txt_in\.weight_scale F32 \[256, 2\]\)"),
    "two scales": (lambda s: s | {f"txt_in.{name}": torch.ones(()) for name in ("weight_scale", "scale_weight")},
                   "scales without a weight of their own"),
    "lone scale": (lambda s: changed(s, "gone.weight_scale", torch.ones(())), "scales without a weight of their own"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_find_names_the_fault_of_a_file_in_one_line(folder, original, write, fault):
    change, said = FAULTS[fault]
    with pytest.raises(RecipeError, match=said) as error:
        found(write(change(original)), folder)
    assert str(error.value).startswith("--transformer ") and "\n" not in str(error.value)


def test_find_refuses_formats_in_the_metadata(folder, original, write):
    layers = {"layers": {"txt_in": {"format": "int8_tensorwise"}, "vae.decoder": {"format": "nvfp4"}}}
    with pytest.raises(RecipeError, match=r"txt_in has the format .*int8_tensorwise"):
        found(write(original, metadata={"_quantization_metadata": json.dumps(layers)}), folder)
    layers["layers"]["txt_in"]["format"] = "float8_e4m3fn"
    assert found(write(original, metadata={"_quantization_metadata": json.dumps(layers)}), folder).tensors


def test_find_refuses_what_is_no_whole_file(folder, original, write, tmp_path):
    path = tmp_path / "transformer.safetensors"
    write(original)
    data = path.read_bytes()
    for cut, said in ((data[:-1000], "truncated"), (data[:100], "truncated"), (b"", "empty"),
                      (b"version https://git-lfs.github.com/spec/v1\n", "git-lfs"), (data[:9] + b"?" + data[10:],
                                                                                    "damaged")):
        path.write_bytes(cut)
        with pytest.raises(RecipeError, match=said):
            found(str(path), folder)
    write(original, "model-00001-of-00003.safetensors")
    for spec, said in ((str(folder), "is a folder"), (str(tmp_path / "x.safetensors"), "no such file"),
                       ("gone.safetensors", "no such file"), ("", "no such file"), ("me/model", "no such file"),
                       ("me/model/x.safetensors@", "no revision"), ("me/model/x.ckpt", "pickled"),
                       (str(tmp_path / "model-00001-of-00003.safetensors"), "one of several files")):
        with pytest.raises(RecipeError, match=said):
            found(spec, folder)


def test_load_refuses_weights_that_are_not_finite(folder, original, write):
    original = dict(original)
    for value in (float("nan"), float("inf")):
        original["single_blocks.1.linear1.bias"] = original["single_blocks.1.linear1.bias"].clone()
        original["single_blocks.1.linear1.bias"][-1] = value
        with pytest.raises(RecipeError, match=r"single_transformer_blocks\.1\.proj_mlp\.bias holds NaN or infinity\."):
            loaded(write(original), folder)


def test_load_accepts_finite_weights_whose_sum_is_not(folder, original, write):
    large = original | {"img_in.bias": torch.full((WIDTH,), 3e38)}
    assert loaded(write(large), folder, torch.float32)["x_embedder.bias"].isfinite().all()


# --- GGUF ---

def test_find_gguf_names_the_package_that_is_not_installed(folder, tmp_path, monkeypatch):
    path = tmp_path / "flux1-dev-Q8_0.gguf"
    path.write_bytes(b"GGUF" + bytes(100))
    monkeypatch.setattr(gguf_file, "find_spec", lambda _: None)
    with pytest.raises(RecipeError, match="pip install gguf"):
        found(str(path), folder)


def write_gguf(gguf, path, state, kinds=("Q8_0",), model="flux"):
    """Weights with rows of 256 values in blocks of a type in turn, all else in float32. Returns the values."""
    writer, values = gguf.GGUFWriter(path, model), {}
    for i, (name, tensor) in enumerate(state.items()):
        kind = gguf.GGMLQuantizationType[kinds[i % len(kinds)]]
        if tensor.dim() == 2 and tensor.shape[1] % 256 == 0:
            block, size = gguf.GGML_QUANT_SIZES[kind]
            data = torch.randint(0, 60, (tensor.shape[0], tensor.shape[1] // block * size), dtype=torch.uint8).numpy()
            if kind == gguf.GGMLQuantizationType.Q8_0:
                data = gguf.quants.quantize(tensor.float().numpy(), kind)
            writer.add_tensor(name, data, raw_dtype=kind)
            values[name] = torch.from_numpy(gguf.quants.dequantize(data, kind).copy()).reshape(tensor.shape)
        else:
            writer.add_tensor(name, tensor.float().numpy())
            values[name] = tensor.float()
    for step in (writer.write_header_to_file, writer.write_kv_data_to_file, writer.write_tensors_to_file, writer.close):
        step()
    return values


@pytest.mark.parametrize("prefix", ["", "model.diffusion_model."])
def test_load_gguf_has_the_values_of_the_gguf_package(folder, original, tmp_path, prefix):
    gguf = pytest.importorskip("gguf")
    kinds = ("Q8_0", "Q4_K", "Q5_K", "Q6_K", "Q4_0", "Q5_1", "Q3_K", "Q2_K", "IQ4_XS", "BF16", "F16")
    path = tmp_path / "flux1-dev.gguf"
    values = write_gguf(gguf, path, prefixed(original, prefix), kinds)
    values = {name.removeprefix(prefix): value for name, value in values.items()}
    state, expected = loaded(str(path), folder, torch.float32), converted_by_diffusers(values)
    assert state.keys() == expected.keys()
    for name in state:  # K types add in another order
        assert torch.allclose(state[name], expected[name], rtol=2e-6, atol=1e-6), name


def test_find_gguf_refuses_damaged_and_foreign_files(folder, original, tmp_path):
    gguf = pytest.importorskip("gguf")
    path = tmp_path / "flux1-dev.gguf"
    write_gguf(gguf, path, original, model="sd3")
    with pytest.raises(RecipeError, match="of the model sd3"):
        found(str(path), folder)
    write_gguf(gguf, path, original | {"txt_in.weight": torch.ones(256, 512)})
    with pytest.raises(RecipeError, match=r"txt_in\.weight \[256, 512\] instead of \[256, 256\]"):
        found(str(path), folder)
    write_gguf(gguf, path, original)
    data = path.read_bytes()
    for size in (len(data) - 1000, 5000, 20):
        path.write_bytes(data[:size])
        with pytest.raises(RecipeError, match="truncated or damaged"):
            found(str(path), folder)


# --- the pipeline ---

@pytest.fixture
def draw(make_args):
    """The pipeline of a command line, and its latents after two steps."""
    def call(*argv):
        args = make_args("--height", "64", "--width", "64", "--num_inference_steps", "2", *map(str, argv))
        check_args(args)
        pipeline = optimize(load_pipeline(args), args)
        return pipeline, pipeline(**call_kwargs(pipeline, args), output_type="latent").images
    return call


@pytest.fixture
def copy(folder, tmp_path):
    return shutil.copytree(folder, tmp_path / "copy")


def test_load_pipeline_with_the_folders_own_transformer_draws_the_same_bits(draw, folder, copy, original, write):
    _, expected = draw("--ckpt", folder)
    (copy / TRANSFORMER).unlink()  # neither needed nor read
    _, images = draw("--ckpt", copy, "--transformer", write(original))
    assert torch.equal(images, expected)


def test_image_parameters_name_the_transformer(make_args):
    pipeline = SimpleNamespace(plan=SimpleNamespace(parameters=dict))
    kwargs = dict(height=64, width=64, num_inference_steps=2, guidance_scale=1.0)
    parameters = image_parameters(make_args("--transformer", "me/model/x.gguf"), pipeline, kwargs, "a cat", 0)
    assert parameters["transformer"] == "me/model/x.gguf"


def test_of_the_picture_compares_contents_and_not_the_name():
    parameters = {"techniques": {}, "random_weights": False, "model": "x", "transformer": "a",
                  "contents": {"weights": "w"}}
    renamed, other = parameters | {"transformer": "b"}, parameters | {"contents": {"weights": "v"}}
    assert many_prompts._of_the_picture(parameters) == many_prompts._of_the_picture(renamed)
    assert many_prompts._of_the_picture(parameters) != many_prompts._of_the_picture(other)


def test_load_pipeline_identifies_the_weights_by_the_files_contents(draw, folder, original, write):
    first = draw("--ckpt", folder, "--transformer", write(original))[0].contents
    renamed = draw("--ckpt", folder, "--transformer", write(original, "other.safetensors"))[0].contents
    another = draw("--ckpt", folder, "--transformer", write({name: -tensor for name, tensor in original.items()}))[0]
    without = draw("--ckpt", folder)[0].contents
    assert first == renamed and len({one["weights"] for one in (first, another.contents, without)}) == 3


def test_load_pipeline_shallower_transformer_runs_and_says_what_it_took(draw, folder, original, write, capsys):
    pipeline, images = draw("--ckpt", folder, "--transformer", write(without_blocks(original, [0], [1])))
    assert (len(pipeline.transformer.transformer_blocks), len(pipeline.transformer.single_transformer_blocks)) == (1, 2)
    assert images.isfinite().all() and "blocks only 1 are there" in capsys.readouterr().err


def test_load_pipeline_lora_fits_the_files_depth(draw, folder, original, write):
    def lora(block):
        name = f"transformer.single_transformer_blocks.{block}.proj_out.lora_"
        return write({f"{name}A.weight": torch.randn(2, 5 * WIDTH), f"{name}B.weight": torch.randn(WIDTH, 2)},
                     f"lora_{block}.safetensors")

    argv = "--ckpt", folder, "--transformer", write(without_blocks(original, [], [1])), "--lora"
    pipeline, _ = draw(*argv, lora(1))
    assert not torch.equal(pipeline.transformer.single_transformer_blocks[1].proj_out.weight,
                           original["single_blocks.2.linear2.weight"])
    with pytest.raises(RecipeError, match=r"single_transformer_blocks\.2"):
        draw(*argv, lora(2))


def test_load_pipeline_presets_take_files_as_they_are(draw, write):
    state = load_file(tiny_presets.CHECKPOINT / TRANSFORMER)
    _, expected = draw("--ckpt", "tiny-flux-dev")
    assert torch.equal(draw("--ckpt", "tiny-flux-dev", "--transformer", write(state))[1], expected)
    pipeline, expected = draw("--ckpt", "tiny-flux")
    folded = {name: tensor.contiguous() for name, tensor in pipeline.transformer.state_dict().items()}
    folded = {name: tensor for name, tensor in folded.items() if name in state and "to_qkv" not in name}
    path = write({name: tensor for name, tensor in state.items() if "guidance" not in name} | {
        name: folded[name] for name in folded if "timestep_embedder" in name})
    assert torch.equal(draw("--ckpt", "tiny-flux", "--transformer", path)[1], expected)
    pipeline, _ = draw("--ckpt", "tiny-flux", "--transformer", write(state))
    assert pipeline.transformer.config.guidance_embeds  # of the file: not folded


def test_load_pipeline_reports_weights_that_are_not_finite_under_the_right_flag(draw, folder, original, write):
    with pytest.raises(RecipeError, match=r"^--transformer .* holds NaN"):
        draw("--ckpt", folder, "--transformer", write(original | {"img_in.bias": torch.full((WIDTH,), float("nan"))}))


def test_check_args_refuses_random_weights_with_a_transformer(make_args):
    with pytest.raises(RecipeError, match="drop one of the two"):
        check_args(make_args("--random_weights", "--transformer", "x.safetensors"))


def test_optimize_of_ones_own_pipeline_refuses_the_flag(build, make_args):
    with pytest.raises(RecipeError, match="only load_pipeline reads it"):
        optimize(build(), make_args("--transformer", "x.safetensors"))


def test_inputs_of_names_the_transformer_so_that_no_output_replaces_it(make_args):
    assert "--transformer" in dict(inputs_of(make_args("--transformer", "x.png")))


# --- the Hub ---

def test_locate_downloads_a_file_of_the_hub(monkeypatch, tmp_path):
    calls = []
    monkeypatch.setattr(single_file, "hf_hub_download",
                        lambda *args, **kwargs: calls.append((args, kwargs)) or str(tmp_path / "x"))
    assert single_file.locate("me/model/sub/x.safetensors@refs/pr/1") == tmp_path / "x"
    single_file.locate("me/model/x.gguf")
    assert calls == [(("me/model", "sub/x.safetensors"), {"revision": "refs/pr/1"}),
                     (("me/model", "x.gguf"), {"revision": None})]


def test_find_checkpoint_downloads_no_weights_of_the_replaced_transformer(monkeypatch, folder, tmp_path):
    """diffusers itself decides what it downloads; only the Hub is replaced."""
    files = [path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()]
    patterns = []
    monkeypatch.setattr(diffusers_pipelines, "model_info", lambda *args, **kwargs: SimpleNamespace(
        siblings=[SimpleNamespace(rfilename=file) for file in files], sha="abc"))
    monkeypatch.setattr(diffusers_pipelines, "hf_hub_download", lambda *args, **kwargs: shutil.copy(
        folder / "model_index.json", tmp_path))  # an empty snapshot
    monkeypatch.setattr(diffusers_pipelines, "snapshot_download",
                        lambda *args, **kwargs: patterns.append(kwargs) or str(folder))
    weights = [file for file in files if file.endswith(".safetensors")]
    for others in (set(), {"transformer"}):
        checkpoint = weight_files.find_checkpoint("me/model", folder / "none", None, read_configs(str(folder)), others)
        kwargs = patterns.pop()
        taken = {file for file in weights if any(fnmatch.fnmatch(file, one) for one in kwargs["allow_patterns"])
                 and not any(fnmatch.fnmatch(file, one) for one in kwargs["ignore_patterns"])}
        assert taken == {file for file in weights if file.split("/")[0] not in others}
        assert checkpoint.tensors.keys() == set(weight_files.STEMS) - others
