"""tiny-flux's three presets from one set of weights, like FLUX.1-schnell, FLUX.1-dev and FLUX.1-Kontext-dev."""

from pathlib import Path

import torch
from diffusers import FlowMatchEulerDiscreteScheduler, FluxKontextPipeline, FluxPipeline, FluxTransformer2DModel

from utils.random_weights import FIXED_SHIFT

CHECKPOINT = Path(__file__).parent.parent / "tiny_flux" / "checkpoint"
NAMES = ("tiny-flux", "tiny-flux-dev", "tiny-kontext")
FOLDED_GUIDANCE = 3.5
TRAINED_LENGTH = 64  # T5's tokens in training; FLUX gives T5 no mask, so that the padding counts as well


def configs_for(name: str, configs: dict) -> dict:
    """Returns the checkpoint's configs changed as `as_preset` changes the pipeline, before any weights load.

    Args:
        name: of `NAMES`.
        configs: of tiny-flux's checkpoint, from `utils.checkpoint.read_configs`.
    """
    if name == "tiny-flux":
        return configs | {"transformer": configs["transformer"] | {"guidance_embeds": False}}
    return configs | {"pipeline_class": "FluxKontextPipeline"} if name == "tiny-kontext" else configs


def as_preset(pipeline: FluxPipeline, name: str, keep_transformer: bool = False) -> FluxPipeline | FluxKontextPipeline:
    """Returns a preset's pipeline with the weights of `pipeline`.

    Args:
        pipeline: of tiny-flux's checkpoint, which is tiny-flux-dev.
        name: of `NAMES`.
        keep_transformer: whether the transformer is not the checkpoint's, so that its guidance is not folded.
    """
    parts = {key: part for key, part in pipeline.components.items() if part is not None}
    if name == "tiny-flux":
        if not keep_transformer:
            parts["transformer"] = fold_guidance(pipeline.transformer, FOLDED_GUIDANCE)
        parts["scheduler"] = FlowMatchEulerDiscreteScheduler.from_config(pipeline.scheduler.config, **FIXED_SHIFT)
    return FluxKontextPipeline(**parts) if name == "tiny-kontext" else FluxPipeline(**parts)


@torch.no_grad()
def fold_guidance(transformer: FluxTransformer2DModel, guidance: float) -> FluxTransformer2DModel:
    """Returns a transformer without a guidance input, like FLUX.1-schnell, that computes `transformer` at `guidance`.

    The conditioning is the sum of the timestep, guidance and text embeddings. At one guidance scale the guidance
    embedding is constant, and it moves into the bias of the timestep embedding.
    """
    embed = transformer.time_text_embed
    bias = embed.timestep_embedder.linear_2.bias
    scale = torch.tensor([guidance * 1000], dtype=torch.float32, device=bias.device)
    constant = embed.guidance_embedder(embed.time_proj(scale).to(bias.dtype))[0]
    weights = {key: value.clone() for key, value in transformer.state_dict().items() if "guidance_embedder" not in key}
    weights["time_text_embed.timestep_embedder.linear_2.bias"] += constant
    folded = FluxTransformer2DModel.from_config({**transformer.config, "guidance_embeds": False})
    folded.to(bias.device, bias.dtype).load_state_dict(weights)
    return folded.eval().requires_grad_(False)
