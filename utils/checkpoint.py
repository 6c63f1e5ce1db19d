"""Reads and checks a checkpoint's configs before any weights load: which FLUX.1 it is, its sizes, and access to it."""

import functools
import inspect
import json
import math
from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers import AutoencoderKL, FluxTransformer2DModel
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from transformers import CLIPTextConfig, CLIPTextModel, T5Config, T5EncoderModel

from utils import random_weights, tasks, tiny_presets
from utils.benchmark_utils import computed_steps
from utils.common import RecipeError, reading

CLASSES = {"transformer": "FluxTransformer2DModel", "vae": "AutoencoderKL", "text_encoder": "CLIPTextModel",
           "text_encoder_2": "T5EncoderModel", "tokenizer": None, "tokenizer_2": None, "scheduler": None}
# If a key is absent, the library takes a default that is not FLUX.1's. The shapes of the weights do not show the error.
REQUIRED = {"vae": ("scaling_factor", "shift_factor", "norm_num_groups", "sample_size"),
            "text_encoder": ("num_attention_heads", "hidden_act", "eos_token_id"),
            "text_encoder_2": ("num_heads", "feed_forward_proj"),
            "scheduler": ("use_dynamic_shifting", "shift", "base_shift", "max_shift")}
# What a component's own config calls its model: diffusers' class, transformers' type.
KINDS = {"transformer": ("_class_name", "FluxTransformer2DModel"), "vae": ("_class_name", "AutoencoderKL"),
         "text_encoder": ("model_type", "clip_text_model"), "text_encoder_2": ("model_type", "t5")}
DIFFUSERS_CLASSES = {"transformer": FluxTransformer2DModel, "vae": AutoencoderKL}
CONFIG_FILES = {
    "scheduler": "scheduler/scheduler_config.json",
    "transformer": "transformer/config.json",
    "vae": "vae/config.json",
    "text_encoder": "text_encoder/config.json",
    "text_encoder_2": "text_encoder_2/config.json",
    "tokenizer_2": "tokenizer_2/tokenizer_config.json",
}


@dataclass(frozen=True)
class Model:
    """The default settings of one FLUX.1 model, from its model card, and the tasks that it serves."""
    name: str
    num_inference_steps: int
    guidance_scale: float
    max_sequence_length: int
    tasks: tuple[tasks.Task, ...]


OF_TEXT = (tasks.FROM_TEXT, tasks.FROM_IMAGE, tasks.INPAINTING)
OF_KONTEXT = (tasks.EDITING, tasks.EDITING_A_PART)
MODELS = {model.name: model for model in (
    Model("schnell", num_inference_steps=4, guidance_scale=0.0, max_sequence_length=256, tasks=OF_TEXT),
    Model("dev", num_inference_steps=28, guidance_scale=3.5, max_sequence_length=512, tasks=OF_TEXT),
    Model("krea", num_inference_steps=28, guidance_scale=4.5, max_sequence_length=512, tasks=OF_TEXT),
    Model("kontext", num_inference_steps=28, guidance_scale=2.5, max_sequence_length=512, tasks=OF_KONTEXT),
    Model("fill", num_inference_steps=50, guidance_scale=30.0, max_sequence_length=512, tasks=(tasks.FILLING,)),
    Model("depth", num_inference_steps=30, guidance_scale=10.0, max_sequence_length=512, tasks=(tasks.CONTROL,)),
    Model("canny", num_inference_steps=50, guidance_scale=30.0, max_sequence_length=512, tasks=(tasks.CONTROL,)),
)}


def identify(configs: dict, ckpt: str = "") -> Model:
    """Returns the `Model` of a checkpoint or pipeline, by its pipeline class and guidance embedding.

    Only the name tells Canny from Depth and Krea from dev: their configs are the same.

    Args:
        configs: from `read_configs` or `configs_of`.
        ckpt: the checkpoint's name or folder.
    """
    task, name = tasks.BY_CLASS[configs["pipeline_class"]], ckpt.lower()
    if task is tasks.CONTROL:
        return MODELS["canny" if "canny" in name else "depth"]
    if task is tasks.FILLING:
        return MODELS["fill"]
    if task in OF_KONTEXT:
        return MODELS["kontext"]
    if not configs["transformer"]["guidance_embeds"]:
        return MODELS["schnell"]
    return MODELS["krea" if "krea" in name else "dev"]


@dataclass(frozen=True)
class ImageSettings:
    """The settings of an image: the flags, and the model's defaults for absent flags. Height and width in pixels."""
    model: Model
    task: tasks.Task
    height: int
    width: int
    num_inference_steps: int
    guidance_scale: float
    max_sequence_length: int
    strength: float | None  # None where every step is computed

    @property
    def steps(self) -> int:
        """The number of steps that are computed: --strength skips the first ones."""
        return computed_steps(self.num_inference_steps, self.strength)

    @property
    def is_encoded(self) -> bool:
        """Whether the VAE's encoder runs."""
        return bool(self.task.pictures)


def image_settings(args, configs: dict) -> ImageSettings:
    """Returns the image settings: `args`, and the checkpoint's defaults for absent flags.

    Args:
        configs: from `read_configs`.

    Raises:
        RecipeError: the picture that gives the size cannot be loaded.
    """
    model = identify(configs, args.ckpt)
    task = tasks.choose(model.tasks, args)
    width, height = tasks.output_size(task, args, configs["vae"]["sample_size"])
    return ImageSettings(
        model, task, height, width, args.num_inference_steps or model.num_inference_steps,
        model.guidance_scale if args.guidance_scale is None else args.guidance_scale,
        args.max_sequence_length or most_text_tokens(configs),
        task.strength if args.strength is None else args.strength)


def most_text_tokens(configs: dict) -> int:
    """The number of T5's tokens that a model was trained with: the default and the limit of --max_sequence_length."""
    return min(identify(configs).max_sequence_length, configs["tokenizer_2"]["model_max_length"])


def read_configs(ckpt: str, revision: str | None = None, random_layers: str | None = None) -> dict:
    """Reads the configs of a checkpoint's components, without its weights.

    The configs come from a local folder, from the Hub (a few kB), or from the built-in architectures.

    Args:
        random_layers: "full" or "2+4" for random weights in the architecture that `ckpt` names; None for the
            checkpoint's own weights.

    Returns:
        The config of each component of `CONFIG_FILES`, and "pipeline_class".

    Raises:
        RecipeError: the checkpoint is unknown, gated or incomplete, or there is no network.
    """
    if random_layers:
        return random_weights.architecture(ckpt, random_layers)
    if ckpt in tiny_presets.NAMES:
        return tiny_presets.configs_for(ckpt, read_configs(str(tiny_presets.CHECKPOINT)))
    _refuse_what_is_no_folder(ckpt)
    index = _read_json(ckpt, "model_index.json", revision)
    if str(index.get("_class_name")) not in tasks.BY_CLASS:
        raise RecipeError(f"--ckpt {ckpt} is a {index.get('_class_name')}; this recipe runs FluxPipeline (schnell, dev "
                          "and their fine-tunes), FluxKontextPipeline, FluxFillPipeline and FluxControlPipeline (Depth "
                          "and Canny).")
    for name, expected in CLASSES.items():
        library, found = (index.get(name) if isinstance(index.get(name), list) and len(index[name]) == 2
                          else (None, None))
        if not found or (expected and found != expected):
            raise RecipeError(f"--ckpt {ckpt}: model_index.json names {found or 'nothing'}"
                              f"{f' of {library}' if library else ''} as {name}. This recipe needs a "
                              f"{expected or name} in bf16: it quantizes the model itself.")
    configs = {name: _read_json(ckpt, path, revision) for name, path in CONFIG_FILES.items()}
    _require(ckpt, configs)
    for name, config in configs.items():
        key, expected = KINDS.get(name, ("", None))
        if config.get(key, expected) != expected:
            raise RecipeError(f"--ckpt {ckpt}: {CONFIG_FILES[name]} is of a {config[key]}, and FLUX.1's {name} is a "
                              f"{expected}. Download this component of the original model again.")
        if how := config.get("quantization_config"):
            method = how.get("quant_method") if isinstance(how, dict) else how
            raise RecipeError(f"--ckpt {ckpt}: {name} is quantized by {method}. Give the checkpoint in bf16: this "
                              "recipe quantizes the model itself.")
        if name in DIFFUSERS_CLASSES:
            configs[name] = _with_defaults(f"--ckpt {ckpt}: {CONFIG_FILES[name]}", DIFFUSERS_CLASSES[name], config)
    _check_sizes(ckpt, configs)
    _check_configs(ckpt, configs, tasks.BY_CLASS[index["_class_name"]])
    # A tokenizer without a limit gets the length that the model was trained on.
    length = configs["tokenizer_2"].setdefault("model_max_length", 512)
    if isinstance(length, bool) or not isinstance(length, (int, float)) or length < 2:
        raise RecipeError(f"--ckpt {ckpt}: {CONFIG_FILES['tokenizer_2']} has the model_max_length {length!r}. It must "
                          "be a number of tokens, 2 or more.")
    return configs | {"pipeline_class": index["_class_name"]}


def _require(ckpt: str, configs: dict) -> None:
    for name, keys in REQUIRED.items():
        if absent := [key for key in keys if key not in configs[name]]:
            raise RecipeError(f"--ckpt {ckpt}: {CONFIG_FILES[name]} lacks {', '.join(absent)}. Compare it with the "
                              "config of the original model.")


def _refuse_what_is_no_folder(ckpt: str) -> None:
    path = Path(ckpt).expanduser()
    if path.is_file():
        kind = "a GGUF file, which is quantized" if path.suffix.lower() == ".gguf" else "a single file"
        raise RecipeError(f"--ckpt {ckpt} is {kind}. Give a diffusers folder, which holds model_index.json, and "
                          "a single file of its transformer with --transformer.")
    if not path.exists() and (ckpt.startswith((".", "/", "~")) or ckpt.count("/") != 1 or "\\" in ckpt):
        raise RecipeError(f"--ckpt {ckpt}: there is no such folder, and the name is not OWNER/NAME, as on the Hub. "
                          "Known checkpoints: black-forest-labs/FLUX.1-schnell, -dev, -Kontext-dev, -Fill-dev; built "
                          "in: tiny-flux.")


def _with_defaults(where: str, model: type, config: dict) -> dict:
    """Completes a config with the model's defaults, as diffusers does.

    Raises:
        RecipeError: a value has another type than its default.
    """
    known = {name: one.default for name, one in inspect.signature(model).parameters.items()}
    for name, default in known.items():
        value = config.get(name, default)
        if not _alike(value, default):
            raise RecipeError(f"{where} has the {name} {value!r}; expected a value like {default!r}. Compare the file "
                              "with the config of the original model.")
    return {name: config.get(name, default) for name, default in known.items()} | {
        name: value for name, value in config.items() if name.startswith("_")}


def _alike(value, default) -> bool:
    if default is None or value is None:
        return default is None
    if isinstance(default, tuple):
        return isinstance(value, (list, tuple)) and bool(value) and all(_alike(one, default[0]) for one in value)
    if isinstance(default, bool) or isinstance(value, bool):
        return isinstance(default, bool) and isinstance(value, bool)
    if isinstance(default, (int, float)):
        return isinstance(value, int if isinstance(default, int) else (int, float)) and value >= 0
    return isinstance(value, type(default))


def _check_sizes(ckpt: str, configs: dict) -> None:
    """Refuses sizes with which building the model would take hours. FLUX.1 has at most 38 layers of a kind."""
    for component in ("transformer", "vae", "text_encoder", "text_encoder_2"):
        for name, value in configs[component].items():
            sizes = [one for one in (value if isinstance(value, (list, tuple)) else [value])
                     if isinstance(one, (int, float)) and not isinstance(one, bool)]
            if sizes and max(sizes) > (1000 if "layers" in name else 10**6):
                raise RecipeError(f"--ckpt {ckpt}: {CONFIG_FILES[component]} has the {name} {value}, larger than any "
                                  "FLUX.1. Compare the file with the config of the original model.")


def _check_configs(ckpt: str, configs: dict, task: tasks.Task) -> None:
    """Refuses values that no FLUX.1 has. The shapes of the weights alone do not show them."""
    transformer, vae, channels = configs["transformer"], configs["vae"], tasks.INPUT_CHANNELS.get(task, 64)
    clip, t5 = configs["text_encoder"].get("hidden_size"), configs["text_encoder_2"].get("d_model")
    faults = {
        f"in_channels {transformer['in_channels']} and out_channels {transformer['out_channels']} (a "
        f"{task.pipeline.__name__} has {channels} and 64; FLUX.1 has 64, Depth and Canny have 128, Fill has 384)":
            transformer["in_channels"] != channels or (transformer["out_channels"] or channels) != 64,
        "axes_dims_rope that do not add up to attention_head_dim":
            sum(transformer["axes_dims_rope"]) != transformer["attention_head_dim"]
            or any(dim <= 0 or dim % 2 for dim in transformer["axes_dims_rope"]),
        "no attention heads or no blocks": not all(
            transformer[name] for name in ("num_attention_heads", "num_layers", "num_single_layers", "patch_size")),
        f"latent_channels {vae['latent_channels']} (FLUX.1's VAE has 16)": vae["latent_channels"] != 16,
        f"a text_encoder of width {clip} for a transformer that takes {transformer['pooled_projection_dim']}":
            clip is not None and clip != transformer["pooled_projection_dim"],
        f"a text_encoder_2 of width {t5} for a transformer that takes {transformer['joint_attention_dim']}":
            t5 is not None and t5 != transformer["joint_attention_dim"],
        "a scaling_factor or sample_size of 0": not (vae["scaling_factor"] and vae["sample_size"]),
    }
    if present := [fault for fault, wrong in faults.items() if wrong]:
        raise RecipeError(f"--ckpt {ckpt}: its configs are not FLUX.1's: {'; '.join(present)}. Compare them with the "
                          "configs of the original model.")


def configs_of(pipeline) -> dict:
    """Returns the dictionary of `read_configs` from a loaded pipeline."""
    configs = {name: dict(getattr(pipeline, name).config) for name in ("transformer", "vae")}
    configs |= {name: getattr(pipeline, name).config.to_dict() for name in ("text_encoder", "text_encoder_2")}
    configs["tokenizer_2"] = {"model_max_length": pipeline.tokenizer_2.model_max_length}
    return configs | {"pipeline_class": type(pipeline).__name__}


def _read_json(ckpt: str, filename: str, revision: str | None) -> dict:
    folder = Path(ckpt).expanduser()
    if folder.is_dir():
        path = folder / filename
        if not path.is_file() and filename != "model_index.json" and (folder / "model_index.json").is_file():
            raise RecipeError(f"--ckpt {ckpt} is incomplete: it has no {filename}. Download the folder again.")
        if not path.is_file():
            raise RecipeError(f"--ckpt {ckpt} is not a diffusers checkpoint: it has no {filename}. Give the folder "
                              "that holds model_index.json. --transformer takes a single file.")
    else:
        with hub_errors("--ckpt", ckpt, revision):
            path = hf_hub_download(ckpt, filename, revision=revision)
    def refuse(constant):
        raise ValueError(f"it holds {constant}, which is not a number")

    with reading(f"--ckpt {ckpt}: {filename}", "Download it again."):
        found = json.loads(Path(path).read_text(encoding="utf-8"), parse_constant=refuse)
        if not isinstance(found, dict):
            raise ValueError("it holds no JSON object")
        if any(isinstance(value, float) and not math.isfinite(value) for value in found.values()):
            raise ValueError("it holds a number too large for float64")
        return found


class hub_errors:
    """Context manager: turns errors of the Hub client into a RecipeError that says how to proceed.

    Args:
        flag: "--ckpt", "--lora" or "--transformer", which decides the advice.
        repo: OWNER/NAME on the Hub.
        revision: branch, tag or commit; None for the default branch.
    """

    def __init__(self, flag: str, repo: str, revision: str | None = None):
        self.flag, self.repo, self.revision = flag, repo, revision

    def __enter__(self):
        return self

    def __exit__(self, kind, error, traceback):
        if error is None:
            return
        here = f"{self.flag} {self.repo}"
        is_file = self.flag != "--ckpt"
        if isinstance(error, GatedRepoError):
            text = (f"{here} is gated. Accept its licence at https://huggingface.co/{self.repo} while logged in, then "
                    "run `hf auth login` here (or set HF_TOKEN)."
                    + ("" if is_file else " --random_weights measures speed without it."))
        elif isinstance(error, RevisionNotFoundError):
            text = f"{here} has no revision '{self.revision}'. Give a branch, a tag or a full commit hash."
        elif isinstance(error, LocalEntryNotFoundError):
            text = (f"{here}: there is no such local folder, the Hub cannot be reached, and the Hub's local cache does "
                    "not have it. Check the network (or unset HF_HUB_OFFLINE), or give a local "
                    + ("file." if is_file else "folder, --ckpt tiny-flux or --random_weights."))
        elif isinstance(error, EntryNotFoundError):
            text = f"{here}: {error}" if is_file else f"{here} is not a diffusers checkpoint: {error}"
        elif isinstance(error, (RepositoryNotFoundError, HFValidationError)):
            text = (f"{here}: neither a local folder nor a {'file' if is_file else 'checkpoint'} on the Hub (a private "
                    "repository needs `hf auth login`)." + (
                        "" if is_file else " Known checkpoints: black-forest-labs/FLUX.1-schnell, -dev, -Kontext-dev; "
                                           "built in: tiny-flux."))
        elif isinstance(error, HfHubHTTPError):
            text = f"{here}: the Hub answered with an error: {str(error).splitlines()[0]}"
        else:
            return
        raise RecipeError(text) from error


def meta_models(configs: dict) -> dict[str, torch.nn.Module]:
    """Builds the components with weights on the meta device, without memory (0.3 s for 17 B parameters).

    The models are cached and shared: do not change them.

    Args:
        configs: from `read_configs`.

    Returns:
        "transformer", "vae", "text_encoder" and "text_encoder_2".
    """
    return _meta_models_of(json.dumps({name: configs[name] for name in ("transformer", "vae", "text_encoder",
                                                                        "text_encoder_2")}, sort_keys=True))


@functools.lru_cache(maxsize=2)
def _meta_models_of(text: str) -> dict[str, torch.nn.Module]:
    configs = json.loads(text)
    transformer, vae, clip, t5 = ({k: v for k, v in configs[name].items() if not k.startswith("_") and k not in (
                                   "dtype", "torch_dtype")}
                                  for name in ("transformer", "vae", "text_encoder", "text_encoder_2"))
    with torch.device("meta"):
        return {"transformer": FluxTransformer2DModel(**transformer),
                "vae": AutoencoderKL(**vae),
                "text_encoder": CLIPTextModel(CLIPTextConfig(**clip)),
                "text_encoder_2": T5EncoderModel(T5Config(**t5))}


def model_shapes(configs: dict) -> dict[str, dict[str, tuple[int, ...]]]:
    """Returns the shape of each parameter: {component: {parameter name: shape}}."""
    return {name: {key: tuple(parameter.shape) for key, parameter in module.named_parameters()}
            for name, module in meta_models(configs).items()}
