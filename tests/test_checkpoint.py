"""What is known of a checkpoint before its weights load, and the errors for all that the Hub can answer."""

import json
import shutil
import types

import pytest
import torch
from huggingface_hub import errors

from utils import checkpoint, random_weights, tiny_presets
from utils.checkpoint import configs_of, hub_errors, identify, image_settings, read_configs
from utils.common import RecipeError
from utils.pipeline_utils import load_pipeline


@pytest.mark.parametrize("name, expected", [("tiny-flux", "schnell"), ("tiny-flux-dev", "dev"),
                                            ("tiny-kontext", "kontext")])
def test_identify_a_local_folder_by_its_configs(build, tmp_path, make_args, name, expected):
    """flux-fast knew a model by its name in four different ways; a folder or fine-tune fell through all of them."""
    folder = tmp_path / "my-fine-tune"
    pipeline = build(name)
    pipeline.save_pretrained(folder)
    from_files = read_configs(str(folder))
    assert identify(from_files).name == expected == identify(configs_of(pipeline)).name
    settings = image_settings(make_args(), from_files)
    assert settings == image_settings(make_args(), configs_of(pipeline))
    assert (settings.height, settings.width, settings.max_sequence_length) == (128, 128, 64)
    assert settings.num_inference_steps == (4 if expected == "schnell" else 28)


def test_load_pipeline_of_a_local_folder_has_its_weights(build, tmp_path, make_args):
    pipeline = build("tiny-flux-dev", torch.bfloat16)
    pipeline.save_pretrained(tmp_path)
    loaded = load_pipeline(make_args("--ckpt", str(tmp_path)))
    assert type(loaded).__name__ == "FluxPipeline" and loaded.transformer.dtype == torch.bfloat16
    for (name, a), (_, b) in zip(pipeline.transformer.state_dict().items(), loaded.transformer.state_dict().items(),
                                 strict=True):
        assert torch.equal(a, b), name


def test_image_settings_flags_win_over_the_models_defaults(make_args):
    args = make_args("--height", "64", "--num_inference_steps", "7", "--guidance_scale", "0")
    settings = image_settings(args, random_weights.architecture("FLUX.1-dev"))
    assert (settings.height, settings.width, settings.num_inference_steps, settings.guidance_scale) == (64, 1024, 7, 0)


def test_read_configs_of_another_pipeline_is_refused(tmp_path):
    (tmp_path / "model_index.json").write_text(json.dumps({"_class_name": "StableDiffusionPipeline"}))
    with pytest.raises(RecipeError, match=r"StableDiffusionPipeline.*FluxPipeline"):
        read_configs(str(tmp_path))


def break_file(path, content):
    path.write_bytes(content) if content is not None else path.unlink()


@pytest.mark.parametrize("file, content, text", [
    ("vae/config.json", b"{", r"vae/config\.json"),
    ("transformer/diffusion_pytorch_model.safetensors", None, "transformer"),
    ("transformer/diffusion_pytorch_model.safetensors", b"junk", "transformer"),
    ("text_encoder_2/model.safetensors", None, "text_encoder_2"),
])
def test_load_pipeline_of_a_damaged_checkpoint_names_the_part(build, tmp_path, make_args, file, content, text):
    build("tiny-flux").save_pretrained(tmp_path)
    break_file(tmp_path / file, content)
    with pytest.raises(RecipeError, match=f"--ckpt.*{text}"):
        load_pipeline(make_args("--ckpt", str(tmp_path)))


def test_load_pipeline_expands_the_home_folder(build, tmp_path, make_args, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    build("tiny-flux").save_pretrained(tmp_path / "model")
    assert load_pipeline(make_args("--ckpt", "~/model")).transformer.config.num_layers == 2


def test_image_settings_of_a_tokenizer_without_a_limit_are_the_models(build, tmp_path, make_args):
    build("tiny-flux").save_pretrained(tmp_path)
    path = tmp_path / "tokenizer_2" / "tokenizer_config.json"
    path.write_text(json.dumps({k: v for k, v in json.loads(path.read_text()).items() if k != "model_max_length"}))
    assert image_settings(make_args(), read_configs(str(tmp_path))).max_sequence_length == 256


def test_read_configs_without_a_config_names_the_file(tmp_path):
    with pytest.raises(RecipeError, match=r"model_index\.json"):
        read_configs(str(tmp_path))
    shutil.copy(tiny_presets.CHECKPOINT / "model_index.json", tmp_path)
    with pytest.raises(RecipeError, match=r"\w+/\w+\.json"):
        read_configs(str(tmp_path))


def _answer(kind):
    if issubclass(kind, errors.HfHubHTTPError):
        return kind("the Hub's own words", response=types.SimpleNamespace(headers={}, request=None))
    return kind("the Hub's own words")


@pytest.mark.parametrize("kind, text", [
    (errors.GatedRepoError, "hf auth login"),
    (errors.RepositoryNotFoundError, "folder"),
    (errors.HFValidationError, "folder"),
    (errors.RevisionNotFoundError, "v9"),
    (errors.LocalEntryNotFoundError, "--random_weights"),
    (errors.HfHubHTTPError, "the Hub's own words"),
])
def test_read_configs_hub_error_names_the_cure(monkeypatch, kind, text):
    def download(*args, **kwargs):
        raise _answer(kind)
    monkeypatch.setattr(checkpoint, "hf_hub_download", download)
    with pytest.raises(RecipeError, match=f"(?s)--ckpt black-forest-labs/FLUX.1-dev.*{text}"):
        read_configs("black-forest-labs/FLUX.1-dev", revision="v9")


def test_read_configs_offline_names_the_flag_that_needs_no_network(monkeypatch):
    """With the real client, offline: nothing is in the cache, nothing can be fetched."""
    import huggingface_hub.constants
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(RecipeError, match="--random_weights"):
        read_configs("nobody/nothing-of-this-name")


def test_hub_errors_passes_other_errors_on():
    with pytest.raises(ZeroDivisionError), hub_errors("--ckpt", "a"):
        _ = 1 / 0
