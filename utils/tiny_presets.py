"""tiny-flux in its three forms, from one set of weights: FLUX.1-schnell's, -dev's and -Kontext-dev's."""

from pathlib import Path

import torch
from diffusers import FlowMatchEulerDiscreteScheduler, FluxKontextPipeline, FluxPipeline, FluxTransformer2DModel

from utils.random_weights import FIXED_SHIFT

CHECKPOINT = Path(__file__).parent.parent / "tiny_flux" / "checkpoint"
NAMES = ("tiny-flux", "tiny-flux-dev", "tiny-kontext")
FOLDED_GUIDANCE = 3.5
TRAINED_LENGTH = 64  # T5's tokens; it gets no mask, so that their number is part of what the model reads


def configs_for(name: str, configs: dict) -> dict:
    """What the configs of the checkpoint become in the form `name`, before any weights load; see `as_preset`."""
    if name == "tiny-flux":
        return configs | {"transformer": configs["transformer"] | {"guidance_embeds": False}}
    return configs | {"pipeline_class": "FluxKontextPipeline"} if name == "tiny-kontext" else configs


def as_preset(pipeline: FluxPipeline, name: str) -> FluxPipeline | FluxKontextPipeline:
    """The checkpoint's pipeline, which is tiny-flux-dev, in the form `name`."""
    parts = {key: part for key, part in pipeline.components.items() if part is not None}
    if name == "tiny-flux":
        parts["transformer"] = fold_guidance(pipeline.transformer, FOLDED_GUIDANCE)
        parts["scheduler"] = FlowMatchEulerDiscreteScheduler.from_config(pipeline.scheduler.config, **FIXED_SHIFT)
    return FluxKontextPipeline(**parts) if name == "tiny-kontext" else FluxPipeline(**parts)


@torch.no_grad()
def fold_guidance(transformer: FluxTransformer2DModel, guidance: float) -> FluxTransformer2DModel:
    """The same function at one guidance scale, without a guidance input, as FLUX.1-schnell has none.

    The conditioning is the sum of the embeddings of time, guidance and text; the middle one is now constant and moves
    into a bias of the first.
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
