"""Checkpoints as people's disks hold them: all of it gets in, or one paragraph says what does not."""

import json
import os
import random
import re
import shutil
from types import SimpleNamespace

import diffusers.pipelines.pipeline_utils as diffusers_pipelines
import pytest
import torch
from safetensors.torch import load_file, save_file

from utils import checkpoint, random_weights, tiny_presets, weight_files
from utils.checkpoint import CONFIG_FILES, read_configs
from utils.common import RecipeError
from utils.pipeline_utils import load_checkpoint

FILES = {"transformer": "transformer/diffusion_pytorch_model.safetensors",
         "vae": "vae/diffusion_pytorch_model.safetensors",
         "text_encoder": "text_encoder/model.safetensors", "text_encoder_2": "text_encoder_2/model.safetensors"}


@pytest.fixture
def copy(tmp_path):
    """The shipped checkpoint in a folder of its own; its weights are hard links until a test writes them anew."""
    def link(source, target):
        try:
            os.link(source, target)
        except OSError:  # another file system
            shutil.copy(source, target)
    return shutil.copytree(tiny_presets.CHECKPOINT, tmp_path / "copy", copy_function=link)


def rewrite(path, data):
    path.unlink()
    path.write_bytes(data) if isinstance(data, bytes) else path.write_text(data)


def change_weights(path, change):
    tensors = {name: tensor.contiguous() for name, tensor in change(load_file(path)).items()}
    path.unlink()
    save_file(tensors, path, metadata={"format": "pt"})


def change_config(path, change):
    rewrite(path, json.dumps(change(json.loads(path.read_text()))))


def open_checkpoint(folder):
    return weight_files.find_checkpoint(str(folder), folder, None, read_configs(str(folder)))


def loaded(folder):
    pipeline = load_checkpoint(open_checkpoint(folder), torch.float32)
    return {f"{name}.{key}": value.clone() for name in FILES
            for key, value in getattr(pipeline, name).named_parameters()}


@pytest.fixture(scope="module")
def reference():
    return loaded(tiny_presets.CHECKPOINT)


def same(found, reference):
    return found.keys() == reference.keys() and all(torch.equal(found[name], reference[name]) for name in found)


@pytest.mark.parametrize("component", FILES)
@pytest.mark.parametrize("which", [0, -1])
def test_find_checkpoint_one_missing_tensor_is_refused_by_its_name(copy, component, which):
    removed = sorted(load_file(copy / FILES[component]))[which]
    change_weights(copy / FILES[component], lambda held: {k: v for k, v in held.items() if k != removed})
    with pytest.raises(RecipeError, match=component) as error:
        open_checkpoint(copy)
    assert "1" in str(error.value) and removed.removeprefix("text_model.") in str(error.value)


@pytest.mark.parametrize("component", FILES)
@pytest.mark.parametrize("change", [
    lambda held, name: held | {"something.else.weight": torch.zeros(3)},
    lambda held, name: held | {name: held[name].new_zeros(*held[name].shape, 2)},
    lambda held, name: held | {name: held[name].to(torch.int8)},
    lambda held, name: {k: v for k, v in held.items() if k != name} | {name + ".absmax": held[name]},
    lambda held, name: held | {name.replace("weight", "weight_scale"): torch.ones(())},
    lambda held, name: {"model.diffusion_model." + k: v for k, v in held.items()},
], ids=["unknown", "shape", "int8", "bitsandbytes", "scaled fp8", "prefix"])
def test_find_checkpoint_tensors_of_another_model_are_refused(copy, component, change):
    change_weights(copy / FILES[component],
                   lambda held: change(held, next(name for name in sorted(held) if name.endswith("weight"))))
    with pytest.raises(RecipeError, match=component):
        open_checkpoint(copy)


@pytest.mark.parametrize("component, change", [
    ("text_encoder", lambda held: {k.removeprefix("text_model."): v for k, v in held.items()}),
    ("text_encoder", lambda held: held | {"text_projection.weight": torch.ones(128, 128)}),
    ("text_encoder_2", lambda held: held | {"encoder.embed_tokens.weight": held["shared.weight"].clone()}),
    ("text_encoder_2", lambda held: held | {"lm_head.weight": torch.ones(8, 8)}),
], ids=["clip without text_model", "clip with its projection", "t5 with both names", "t5 with a head"])
def test_load_checkpoint_spellings_of_published_files_give_the_same_model(copy, component, change, reference):
    change_weights(copy / FILES[component], change)
    assert same(loaded(copy), reference)


def test_load_checkpoint_t5_embedding_under_its_other_name_gets_in_or_is_refused(copy, reference):
    change_weights(copy / FILES["text_encoder_2"], lambda held: {
        "encoder.embed_tokens.weight" if k == "shared.weight" else k: v for k, v in held.items()})
    try:
        found = loaded(copy)
    except RecipeError as error:
        assert "shared.weight" in str(error)
    else:
        assert same(found, reference)


def test_load_checkpoint_float8_weights_without_scales_have_their_own_values(copy, reference):
    change_weights(copy / FILES["vae"], lambda held: {k: v.to(torch.float8_e4m3fn) for k, v in held.items()})
    found = loaded(copy)
    assert all(torch.equal(value, reference[name].to(torch.float8_e4m3fn).float() if name.startswith("vae.")
                           else reference[name]) for name, value in found.items())


def shard(folder):
    held = load_file(folder / FILES["transformer"])
    names, mapped = sorted(held), {}
    for i in range(2):
        file = f"diffusion_pytorch_model-0000{i + 1}-of-00002.safetensors"
        part = {name: held[name] for name in names[i::2]}
        save_file(part, folder / "transformer" / file, metadata={"format": "pt"})
        mapped |= dict.fromkeys(part, file)
    index = folder / "transformer/diffusion_pytorch_model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": mapped}))
    return index


def test_load_checkpoint_shards_are_one_model(copy, reference):
    shard(copy)
    with pytest.raises(RecipeError, match="transformer"):  # beside the whole file: libraries differ in what they load
        open_checkpoint(copy)
    (copy / FILES["transformer"]).unlink()
    assert same(loaded(copy), reference)


def test_find_checkpoint_fuzzed_index_is_refused(copy):
    index = shard(copy)
    (copy / FILES["transformer"]).unlink()
    right = json.loads(index.read_text())
    source = random.Random(0)
    for _ in range(60):
        wrong = json.loads(json.dumps(right))
        name = source.choice(sorted(wrong["weight_map"]))
        kind = source.randrange(7)
        if kind == 0:
            del wrong["weight_map"][name]
        elif kind == 1:
            wrong["weight_map"][name + "x"] = wrong["weight_map"].pop(name)
        elif kind == 2:
            wrong["weight_map"][name] = source.choice(["gone.safetensors", "../vae/config.json", "", 3, None, [1]])
        elif kind == 3:
            wrong["weight_map"][name] = source.choice([*{*wrong["weight_map"].values()} - {wrong["weight_map"][name]}])
        elif kind == 4:
            wrong["weight_map"] = source.choice([[], {}, None, "x", 3])
        elif kind == 5:
            wrong.pop("weight_map")
        text = json.dumps(wrong)
        index.write_text(text[:source.randrange(len(text))] if kind == 6 else text)
        with pytest.raises(RecipeError):
            open_checkpoint(copy)


@pytest.mark.parametrize("data", [b"", b"version https://git-lfs.github.com/spec/v1\n", b"<!doctype html>", b"GGUF",
                                  b"\x80\x02}q\x00", b"PK\x03\x04"])
def test_find_checkpoint_files_of_another_kind_are_refused_by_name(copy, data):
    rewrite(copy / FILES["vae"], data)
    with pytest.raises(RecipeError, match=r"vae/diffusion_pytorch_model\.safetensors"):
        open_checkpoint(copy)


@pytest.mark.parametrize("component", FILES)
def test_find_checkpoint_truncated_absent_or_pickled_files_are_refused(copy, component):
    path = copy / FILES[component]
    data = path.read_bytes()
    rewrite(path, data[:-1000])
    with pytest.raises(RecipeError, match=component):
        open_checkpoint(copy)
    path.unlink()
    with pytest.raises(RecipeError, match=component):
        open_checkpoint(copy)
    path.with_suffix(".bin").write_bytes(b"\x80\x02")
    with pytest.raises(RecipeError, match=r"\.bin"):
        open_checkpoint(copy)


def test_load_checkpoint_variant_loads_when_all_files_have_it(copy, reference):
    paths = [copy / file for file in FILES.values()]
    for i, path in enumerate(paths):
        path.rename(path.with_suffix(".fp16.safetensors"))
        if i + 1 < len(paths):
            with pytest.raises(RecipeError, match="fp16"):
                open_checkpoint(copy)
    assert same(loaded(copy), reference)


@pytest.mark.parametrize("file", ["tokenizer/tokenizer.json", "tokenizer_2/tokenizer.json"])
def test_find_checkpoint_tokenizer_without_vocabulary_is_refused(copy, file):
    (copy / file).unlink()
    with pytest.raises(RecipeError, match=file.split("/")[0]):
        open_checkpoint(copy)


def test_load_checkpoint_tokenizer_of_another_model_is_refused(copy):
    change_config(copy / "text_encoder_2/config.json", lambda held: held | {"vocab_size": 8})
    change_weights(copy / FILES["text_encoder_2"], lambda held: held | {"shared.weight": held["shared.weight"][:8]})
    with pytest.raises(RecipeError, match="tokenizer_2"):
        loaded(copy)


def test_refuse_non_finite_names_the_weight(copy):
    change_weights(copy / FILES["transformer"], lambda held: held | {
        "proj_out.weight": held["proj_out.weight"] * torch.nan})
    pipeline = load_checkpoint(open_checkpoint(copy), torch.float32)
    with pytest.raises(RecipeError, match=r"transformer\.proj_out\.weight"):
        weight_files.refuse_non_finite("copy", pipeline)


def test_compare_loaded_weights_that_did_not_get_in_are_refused(copy):
    found = open_checkpoint(copy)
    pipeline = load_checkpoint(found, torch.float32)
    with torch.no_grad():
        pipeline.text_encoder_2.shared.weight.normal_()  # as a library leaves what it did not find
    with pytest.raises(RecipeError, match=r"shared\.weight"):
        weight_files.compare_loaded(found, pipeline)


@pytest.mark.parametrize("change", [
    {"transformer": ["nunchaku", "NunchakuFluxTransformer2dModel"]}, {"text_encoder_2": [None, None]},
    {"scheduler": None}, {"vae": ["diffusers", "AutoencoderTiny"]}, {"_class_name": ["mine", "Flux"]},
    {"_class_name": None}, {"_class_name": "FluxFillPipeline"}, {"text_encoder": "CLIPTextModel"}])
def test_read_configs_of_another_pipeline_is_refused(copy, change):
    change_config(copy / "model_index.json", lambda held: held | change)
    with pytest.raises(RecipeError, match="copy"):
        read_configs(str(copy))


@pytest.mark.parametrize("component, change", [
    ("transformer", {"_class_name": "SD3Transformer2DModel"}), ("vae", {"_class_name": "AutoencoderTiny"}),
    ("text_encoder", {"model_type": "siglip_text_model"}), ("text_encoder_2", {"model_type": "umt5"}),
    ("text_encoder", {"hidden_size": 64}), ("text_encoder_2", {"d_model": 64})])
def test_read_configs_of_a_component_of_another_model_is_refused_by_its_name(copy, component, change):
    change_config(copy / component / "config.json", lambda held: held | change)
    with pytest.raises(RecipeError, match=f"{component}.* of (a {next(iter(change.values()))}|width)"):
        read_configs(str(copy))


@pytest.mark.parametrize("component", FILES)
def test_read_configs_without_a_component_says_that_the_folder_is_incomplete(copy, component):
    shutil.rmtree(copy / component)
    with pytest.raises(RecipeError, match=rf"is incomplete: it has no {component}/config\.json"):
        read_configs(str(copy))


def test_find_checkpoint_names_the_shard_that_was_not_downloaded(copy):
    shard(copy)
    (copy / FILES["transformer"]).unlink()
    (copy / "transformer/diffusion_pytorch_model-00002-of-00002.safetensors").rename(copy / "2.incomplete")
    with pytest.raises(RecipeError, match=r"model-00002-of-00002\.safetensors: No such file"):
        open_checkpoint(copy)


@pytest.mark.parametrize("suffix", [".fp16.safetensors", ".bin"])
def test_find_checkpoint_on_the_hub_with_other_files_says_which(monkeypatch, tmp_path, suffix):
    names = ["model_index.json", *(name.replace(".safetensors", suffix) for name in FILES.values())]
    monkeypatch.setattr(diffusers_pipelines, "model_info", lambda *args, **kwargs: SimpleNamespace(
        siblings=[SimpleNamespace(rfilename=name) for name in names], sha="abc"))
    monkeypatch.setattr(diffusers_pipelines, "hf_hub_download",
                        lambda *args, **kwargs: shutil.copy(tiny_presets.CHECKPOINT / "model_index.json", tmp_path))
    with pytest.raises(RecipeError, match=r"me/model has pickled files, or files of one variant"):
        weight_files.find_checkpoint("me/model", tmp_path / "none", None, read_configs("tiny-flux-dev"))


@pytest.mark.parametrize("component", ["transformer", "text_encoder_2"])
@pytest.mark.parametrize("method", ["bitsandbytes", "gguf", "torchao", "quanto", "modelopt"])
def test_read_configs_of_a_quantised_checkpoint_is_refused_by_its_method(copy, component, method):
    change_config(copy / component / "config.json", lambda held: held | {
        "quantization_config": {"quant_method": method}})
    with pytest.raises(RecipeError, match=method):
        read_configs(str(copy))


def test_read_configs_without_guidance_embeds_has_none(copy):
    change_config(copy / "transformer/config.json",
                  lambda held: {k: v for k, v in held.items() if k != "guidance_embeds"})
    change_weights(copy / FILES["transformer"],
                   lambda held: {k: v for k, v in held.items() if "guidance_embedder" not in k})
    assert read_configs(str(copy))["transformer"]["guidance_embeds"] is False
    open_checkpoint(copy)


@pytest.mark.parametrize("component, key", [("text_encoder", "num_hidden_layers"), ("text_encoder_2", "num_layers"),
                                            ("transformer", "num_single_layers"), ("vae", "layers_per_block")])
@pytest.mark.parametrize("value", [10**4, 1e30])
def test_read_configs_of_more_layers_than_can_be_built_is_refused(copy, component, key, value):
    change_config(copy / component / "config.json", lambda held: held | {key: value})
    with pytest.raises(RecipeError, match=key):
        read_configs(str(copy))


@pytest.mark.parametrize("seed, count", [(1, 30), pytest.param(2, 120, marks=pytest.mark.slow)])
def test_load_checkpoint_of_fuzzed_configs_gives_the_same_weights_or_is_refused(copy, reference, seed, count):
    source = random.Random(seed)
    accepted = 0
    for _ in range(count):
        path = copy / source.choice([*CONFIG_FILES.values(), "model_index.json"])
        right = path.read_text()
        held = json.loads(right)
        key = source.choice(sorted(held))
        kind = source.randrange(6)
        if kind == 0:
            del held[key]
        elif kind == 1:
            held[key + "_"] = held.pop(key)
        elif kind == 2:
            held[key] = source.choice(["x", None, [], {}, True, [None], "NaN", -1, 0, 10**30, [10**30]])
        elif kind == 3:
            held[key] = held[key] * 2 if isinstance(held[key], (int, float, list, str)) else 3
        elif kind == 4:
            held[key] = source.choice([float("nan"), float("inf"), [float("nan")]])
        text = json.dumps(held)
        rewrite(path, text[:source.randrange(len(text))] if kind == 5 else text)
        try:
            found = loaded(copy)
        except RecipeError:
            found = None
        finally:
            rewrite(path, right)
        if found is not None:
            accepted += 1
            assert same(found, reference), (path.name, key, kind)
    assert 0.07 * count < accepted < 0.93 * count


def test_load_checkpoint_of_saved_random_weights_is_the_same_model(tmp_path):
    saved = random_weights.build(random_weights.architecture("tiny-flux-dev"), "cpu", torch.bfloat16)
    saved.save_pretrained(tmp_path)
    pipeline = load_checkpoint(open_checkpoint(tmp_path), torch.bfloat16)
    for name in FILES:
        wanted, found = (dict(getattr(one, name).named_parameters()) for one in (saved, pipeline))
        assert same(found, wanted)


def test_identity_follows_contents(copy):
    before = weight_files.identity(copy)
    assert before == weight_files.identity(tiny_presets.CHECKPOINT)
    change_weights(copy / FILES["vae"], lambda held: held | {"decoder.conv_in.bias": held["decoder.conv_in.bias"] + 1})
    assert weight_files.identity(copy) != before


def test_identity_of_a_large_file_changes_with_its_sampled_values(copy, monkeypatch):
    """Other weights in files of the same size and the same time of change."""
    monkeypatch.setattr(weight_files, "HASHED_BYTES", 2**10)
    path = copy / FILES["transformer"]
    before, times = weight_files.identity(copy), path.stat()
    change_weights(path, lambda held: {name: value * 0.9 for name, value in held.items()})
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert path.stat().st_size == times.st_size and weight_files.identity(copy) != before


@pytest.mark.parametrize("ckpt", ["./nothing", "/nothing/here", "~/nothing", "a/b/c", "nothing.safetensors"])
def test_read_configs_path_that_is_not_there_is_refused_and_no_hub_id(monkeypatch, ckpt):
    monkeypatch.setattr(checkpoint, "hf_hub_download", lambda *_, **__: pytest.fail("the Hub was asked"))
    with pytest.raises(RecipeError, match=re.escape(ckpt)):
        read_configs(ckpt)


@pytest.mark.parametrize("name", ["model.safetensors", "model-Q4_0.gguf"])
def test_read_configs_of_a_single_file_is_refused(tmp_path, name):
    (tmp_path / name).write_bytes(b"GGUF")
    with pytest.raises(RecipeError, match=re.escape(name)):
        read_configs(str(tmp_path / name))
