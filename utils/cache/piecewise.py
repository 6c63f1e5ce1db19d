"""FLUX's transformer in segments, for a step cache that decides between them: each can be a CUDA graph of its own.

    before   embedders, modulations, rotation
    first    the first F blocks: by what they change, the cache decides
    middle   the other blocks, which a cached step skips
    last     the last B blocks, if there are any
    after    the last norm and product

To cache-dit first, middle and last are a transformer of two or three blocks. Of a segment it reads the inputs and the
outputs alone (CachedBlocks_Pattern_Base of cache-dit 1.5.3): what it keeps from step to step are differences of them,
tensors of its own. All segments run in an image's first step, so that one image records them all.

The decision compares the first blocks' residual with that of the last computed step and reads one number, for which the
CPU waits: the GPU then has nothing to do until the next launch arrives. Steps that the mask or a limit decides compare
nothing and wait for nothing.
"""

from collections.abc import Callable

import torch
from diffusers import FluxTransformer2DModel
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from torch import Tensor

from utils.cuda_graph import ModuleProxy


class _Before(torch.nn.Module):
    """What FluxTransformer2DModel.forward does before its blocks."""

    def __init__(self, transformer: FluxTransformer2DModel):
        super().__init__()
        self.x_embedder, self.context_embedder = transformer.x_embedder, transformer.context_embedder
        self.time_text_embed, self.pos_embed = transformer.time_text_embed, transformer.pos_embed

    def forward(self, image: Tensor, text: Tensor, pooled: Tensor, timestep: Tensor, guidance: Tensor | None,
                image_ids: Tensor, text_ids: Tensor) -> tuple:
        image = self.x_embedder(image)
        conditions = [x.to(image.dtype) * 1000 for x in (timestep, guidance) if x is not None]
        temb = self.time_text_embed(*conditions, pooled)
        return image, self.context_embedder(text), temb, self.pos_embed(torch.cat((text_ids, image_ids)))


class _Blocks(torch.nn.Module):
    """Blocks in a row: image (B, S, D) and text (B, T, D) to text and image, as one of them does. Tokens that the last
    one leaves out (`prune_unused_tokens` of utils/kernels/fused_blocks.py) stay as they were: a step cache subtracts
    the input from the output."""

    def __init__(self, blocks: list[torch.nn.Module]):
        super().__init__()
        self.blocks = torch.nn.ModuleList(blocks)

    def forward(self, image: Tensor, text: Tensor, *common) -> tuple[Tensor, Tensor]:
        given_text, given_image = text, image
        for block in self.blocks:
            text, image = block(image, text, *common)
        return _completed(text, given_text), _completed(image, given_image)


def _completed(made: Tensor, given: Tensor) -> Tensor:
    left_out = given[:, made.shape[1]:]
    return torch.cat((made, left_out), dim=1) if left_out.shape[1] else made


class _Segment(torch.nn.Module):
    """`_Blocks`, whatever was put around them, under the names that cache-dit looks for in a block's signature."""

    def __init__(self, blocks: torch.nn.Module):
        super().__init__()
        self.blocks = blocks

    def forward(self, hidden_states: Tensor, encoder_hidden_states: Tensor, temb: Tensor, image_rotary_emb: tuple,
                joint_attention_kwargs: dict | None) -> tuple[Tensor, Tensor]:
        return self.blocks(hidden_states, encoder_hidden_states, temb, image_rotary_emb, joint_attention_kwargs)


class _After(torch.nn.Module):
    """What FluxTransformer2DModel.forward does after its blocks."""

    def __init__(self, transformer: FluxTransformer2DModel):
        super().__init__()
        self.norm_out, self.proj_out = transformer.norm_out, transformer.proj_out

    def forward(self, image: Tensor, temb: Tensor) -> Tensor:
        return self.proj_out(self.norm_out(image, temb))


class PiecewiseTransformer(ModuleProxy):
    """A transformer in segments, in its place.

    Its list of blocks is called `segments`, a name that the transformer does not have: cache-dit puts its own list
    there for the time of a call, and what it took away it restores only where the name is then unknown.

    Args:
        first, last: F, one or more, and B, together fewer than there are blocks.
        wrap: what to put around each segment, such as `CUDAGraphModule`.
    """

    def __init__(self, transformer: FluxTransformer2DModel, first: int, last: int,
                 wrap: Callable[[torch.nn.Module], torch.nn.Module]):
        super().__init__(transformer)
        blocks = [*transformer.transformer_blocks, *transformer.single_transformer_blocks]
        end = len(blocks) - last
        parts = [blocks[:first], blocks[first:end], *([blocks[end:]] if last else [])]
        self.before, self.after = wrap(_Before(transformer)), wrap(_After(transformer))
        self.segments = torch.nn.ModuleList(_Segment(wrap(_Blocks(part))) for part in parts)

    def forward(self, hidden_states: Tensor, encoder_hidden_states: Tensor, pooled_projections: Tensor,
                timestep: Tensor, img_ids: Tensor, txt_ids: Tensor, guidance: Tensor | None = None,
                joint_attention_kwargs: dict | None = None, return_dict: bool = True):
        image, text, temb, rotation = self.before(hidden_states, encoder_hidden_states, pooled_projections, timestep,
                                                  guidance, img_ids, txt_ids)
        for segment in self.segments:
            text, image = segment(image, text, temb, rotation, joint_attention_kwargs)
        sample = self.after(image, temb)
        return Transformer2DModelOutput(sample) if return_dict else (sample,)
