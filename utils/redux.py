"""--redux: a picture beside the prompt, by FLUX.1-Redux-dev, as diffusers' FluxPriorReduxPipeline joins them.

SigLIP encodes the picture, and Redux's two Linears turn its patches into 729 tokens for the transformer, which follow
T5's. That happens once a start. Then the encoder's 1.0 GB are freed: a step sees longer text and nothing else is new.
"""

import hashlib
import json
from argparse import Namespace
from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers import FluxPriorReduxPipeline
from huggingface_hub import hf_hub_download, snapshot_download
from torch import Tensor

from utils import random_weights, weight_files
from utils.benchmark_utils import redux_parts
from utils.checkpoint import hub_errors
from utils.common import RecipeError, reading
from utils.reference_image import load_reference


@dataclass(frozen=True)
class Redux:
    """The picture of --redux.

    Attributes:
        weight: multiplies the picture's tokens; the prompt keeps its own. 1 is diffusers' default.
        tokens: the number of tokens that the picture adds to the prompt's.
    """
    path: str
    weight: float
    tokens: int


def read_redux(args: Namespace, configs: dict) -> Redux | None:
    """Checks --redux before any weights load: the picture, and whether Redux's tokens fit the model.

    Raises:
        RecipeError: one of them does not fit, or the Hub does not give --redux_ckpt.
    """
    if not args.redux:
        return None
    path, weight = redux_parts(args.redux)
    if args.true_cfg_scale > 1:
        raise RecipeError("--redux joins the picture with each prompt, and a negative prompt must not have it: drop "
                          "--true_cfg_scale and --negative_prompt.")
    load_reference(path, "--redux")
    width = configs["transformer"]["joint_attention_dim"]
    if args.random_weights:
        return Redux(path, weight, random_weights.redux_tokens(width))
    encoder, embedder = (_config(args.redux_ckpt, f"{part}/config.json") for part in ("image_encoder",
                                                                                        "image_embedder"))
    if embedder.get("txt_in_features") != width:
        raise RecipeError(f"--redux: {args.redux_ckpt} makes tokens of {embedder.get('txt_in_features')} values, and "
                          f"{args.ckpt} reads tokens of {width}. Use FLUX.1-dev or -schnell, or drop --redux.")
    vision = encoder.get("vision_config", encoder)
    return Redux(path, weight, (vision.get("image_size", 384) // vision.get("patch_size", 14)) ** 2)


def _config(ckpt: str, filename: str) -> dict:
    path = Path(ckpt).expanduser() / filename
    with reading(f"--redux_ckpt {ckpt}: {filename}", "Give the folder of FLUX.1-Redux-dev, or drop the flag."):
        if not Path(ckpt).expanduser().is_dir():
            with hub_errors("--redux_ckpt", ckpt):
                path = hf_hub_download(ckpt, filename)
        return json.loads(Path(path).read_text(encoding="utf-8"))


def redux_folder(ckpt: str) -> Path:
    """The folder of --redux_ckpt, downloaded if it is on the Hub."""
    folder = Path(ckpt).expanduser()
    if folder.is_dir():
        return folder
    with hub_errors("--redux_ckpt", ckpt):
        return Path(snapshot_download(ckpt, allow_patterns=["model_index.json", "*/*.json", "*/*.safetensors"]))


@torch.no_grad()
def add_redux(pipeline, redux: Redux, args: Namespace, dtype: torch.dtype) -> None:
    """Encodes the picture, and appends its tokens to every prompt that the pipeline encodes from now on.

    `pipeline.redux` identifies the picture and Redux's weights, for the metadata of images.

    Raises:
        RecipeError: the weights cannot be read, or are broken.
    """
    if args.random_weights:
        prior, contents = random_weights.build_redux(pipeline.transformer.config.joint_attention_dim, dtype), "random"
    else:
        folder = redux_folder(args.redux_ckpt)
        with reading(f"--redux_ckpt {args.redux_ckpt}", "Download it again."):
            prior = FluxPriorReduxPipeline.from_pretrained(str(folder), dtype=dtype, use_safetensors=True)
        contents = weight_files.identity(folder)
    prior.to(args.device)
    picture = load_reference(redux.path, "--redux")
    patches = prior.encode_image(picture, torch.device(args.device), 1)
    tokens = prior.image_embedder(patches).image_embeds * redux.weight
    if tokens.shape[1] != redux.tokens or not tokens.isfinite().all():
        raise RecipeError(f"--redux_ckpt {args.redux_ckpt}: it makes {tokens.shape[1]} tokens, some of them not "
                          f"finite, where {redux.tokens} were expected. Download it again.")
    append_tokens(pipeline, tokens.to(dtype))
    pipeline.redux = {"redux_weight": redux.weight, "redux_contents": contents,
                      "redux_sha256": hashlib.sha256(f"{picture.size}".encode() + picture.tobytes()).hexdigest()}


def append_tokens(pipeline, tokens: Tensor) -> None:
    """Appends tokens (1, N, E) to T5's embeddings (B, T, E) of each prompt. The pipelines make ids for all of them."""
    encode = pipeline._get_t5_prompt_embeds

    def with_picture(*args, **kwargs) -> Tensor:
        embeds = encode(*args, **kwargs)
        return torch.cat([embeds, tokens.to(embeds).expand(len(embeds), -1, -1)], dim=1)

    pipeline._get_t5_prompt_embeds = with_picture
