"""What a checkpoint is, known from its configs before any weights load: which FLUX.1, how big, can it be had."""

import json
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

from tiny_flux import presets
from utils import random_weights
from utils.benchmark_utils import RecipeError

CONFIG_FILES = {
    "transformer": "transformer/config.json",
    "vae": "vae/config.json",
    "text_encoder": "text_encoder/config.json",
    "text_encoder_2": "text_encoder_2/config.json",
    "tokenizer_2": "tokenizer_2/tokenizer_config.json",
}


@dataclass(frozen=True)
class Model:
    """What a kind of FLUX.1 needs of its caller."""
    name: str
    num_inference_steps: int
    guidance_scale: float
    max_sequence_length: int
    needs_image: bool


MODELS = {
    "schnell": Model("schnell", num_inference_steps=4, guidance_scale=0.0, max_sequence_length=256, needs_image=False),
    "dev": Model("dev", num_inference_steps=28, guidance_scale=3.5, max_sequence_length=512, needs_image=False),
    "kontext": Model("kontext", num_inference_steps=28, guidance_scale=2.5, max_sequence_length=512, needs_image=True),
}


def identify(configs: dict) -> Model:
    """The `Model` of a checkpoint or pipeline: by its pipeline class and guidance embedding, never by its name."""
    if configs["pipeline_class"] == "FluxKontextPipeline":
        return MODELS["kontext"]
    return MODELS["dev" if configs["transformer"]["guidance_embeds"] else "schnell"]


@dataclass(frozen=True)
class ImageSettings:
    """What an image takes: the flags, and the model's defaults where they say nothing."""
    model: Model
    height: int
    width: int
    num_inference_steps: int
    guidance_scale: float
    max_sequence_length: int


def image_settings(args, configs: dict) -> ImageSettings:
    """`args` over the defaults of the checkpoint that `configs` (see `read_configs`) belong to."""
    model = identify(configs)
    size = configs["vae"]["sample_size"]
    return ImageSettings(
        model, args.height or size, args.width or size, args.num_inference_steps or model.num_inference_steps,
        model.guidance_scale if args.guidance_scale is None else args.guidance_scale,
        min(model.max_sequence_length, configs["tokenizer_2"]["model_max_length"]))


def read_configs(ckpt: str, revision: str | None = None, random_layers: str | None = None) -> dict:
    """The configs of a checkpoint's components, weights untouched: a few kB from the Hub, a folder, or built in.

    Args:
        random_layers: "full" or "2+4" for the architecture of `ckpt`'s name with random weights; None for its own.

    Raises:
        RecipeError: unknown, gated or incomplete checkpoint, or no network.
    """
    if random_layers:
        return random_weights.architecture(ckpt, random_layers)
    if ckpt in presets.NAMES:
        return presets.configs_for(ckpt, read_configs(str(presets.CHECKPOINT)))
    index = _read_json(ckpt, "model_index.json", revision)
    if index.get("_class_name") not in random_weights.PIPELINES:
        raise RecipeError(f"--ckpt {ckpt} is a {index.get('_class_name')}; this recipe runs FluxPipeline (schnell, dev "
                          "and their fine-tunes) and FluxKontextPipeline.")
    configs = {name: _read_json(ckpt, path, revision) for name, path in CONFIG_FILES.items()}
    # Tokenizers without a limit of their own are cut at what the model was trained on.
    configs["tokenizer_2"].setdefault("model_max_length", 512)
    return configs | {"pipeline_class": index["_class_name"]}


def configs_of(pipeline) -> dict:
    """The same dictionary as `read_configs`, from a pipeline that is already there."""
    configs = {name: dict(getattr(pipeline, name).config) for name in ("transformer", "vae")}
    configs |= {name: getattr(pipeline, name).config.to_dict() for name in ("text_encoder", "text_encoder_2")}
    configs["tokenizer_2"] = {"model_max_length": pipeline.tokenizer_2.model_max_length}
    return configs | {"pipeline_class": type(pipeline).__name__}


def _read_json(ckpt: str, filename: str, revision: str | None) -> dict:
    folder = Path(ckpt).expanduser()
    if folder.is_dir():
        path = folder / filename
        if not path.is_file():
            raise RecipeError(f"--ckpt {ckpt} is not a diffusers checkpoint: it has no {filename}. Give the folder "
                              "that holds model_index.json (a single .safetensors file has to be converted first).")
    else:
        with hub_errors("--ckpt", ckpt, revision):
            path = hf_hub_download(ckpt, filename, revision=revision)
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except ValueError as error:
        raise RecipeError(f"--ckpt {ckpt}: {filename} is damaged ({error}). Download it again.") from error


class hub_errors:
    """Turns what the Hub client raises into a sentence that says what to do."""

    def __init__(self, flag: str, repo: str, revision: str | None = None):
        self.flag, self.repo, self.revision = flag, repo, revision

    def __enter__(self):
        return self

    def __exit__(self, kind, error, traceback):
        if error is None:
            return
        here = f"{self.flag} {self.repo}"
        if isinstance(error, GatedRepoError):
            text = (f"{here} is gated. Accept its licence at https://huggingface.co/{self.repo} while logged in, then "
                    "run `hf auth login` here (or set HF_TOKEN). --random_weights measures speed without it.")
        elif isinstance(error, RevisionNotFoundError):
            text = f"{here} has no revision '{self.revision}'. Give a branch, a tag or a full commit hash."
        elif isinstance(error, LocalEntryNotFoundError):
            text = (f"{here}: the Hub cannot be reached and the checkpoint is not in the local cache. Check the "
                    "network (or unset HF_HUB_OFFLINE), or give a local folder, --ckpt tiny-flux or --random_weights.")
        elif isinstance(error, EntryNotFoundError):
            text = f"{here} is not a diffusers checkpoint: {error}"
        elif isinstance(error, (RepositoryNotFoundError, HFValidationError)):
            text = (f"{here}: neither a local folder nor a checkpoint on the Hub (private ones need `hf auth login`). "
                    "Known ones: black-forest-labs/FLUX.1-schnell, -dev, -Kontext-dev; built in: tiny-flux.")
        elif isinstance(error, HfHubHTTPError):
            text = f"{here}: the Hub answered with an error: {str(error).splitlines()[0]}"
        else:
            return
        raise RecipeError(text) from error


def weight_counts(configs: dict) -> dict[str, int]:
    """Parameters of each component; of the Linears in the transformer's blocks ("blocks"), which float8 quantises; and
    of those among them that int8 leaves alone ("modulation").

    Counted on the meta device, from the configs: no memory, half a second for 17 B parameters.
    """
    transformer, vae, clip, t5 = ({k: v for k, v in configs[name].items() if not k.startswith("_") and k != "dtype"}
                                  for name in ("transformer", "vae", "text_encoder", "text_encoder_2"))
    with torch.device("meta"):
        modules = {"transformer": FluxTransformer2DModel(**transformer),
                   "vae": AutoencoderKL(**vae),
                   "text_encoder": CLIPTextModel(CLIPTextConfig(**clip)),
                   "text_encoder_2": T5EncoderModel(T5Config(**t5))}
    counts = {name: sum(p.numel() for p in module.parameters()) for name, module in modules.items()}
    in_blocks = {name: part.weight.numel() for name, part in modules["transformer"].named_modules()
                 if isinstance(part, torch.nn.Linear) and "transformer_blocks." in name}
    counts["blocks"] = sum(in_blocks.values())
    counts["modulation"] = sum(size for name, size in in_blocks.items() if ".norm" in name)
    return counts
