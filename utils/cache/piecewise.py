"""Piecewise CUDA graphs for a step cache: FLUX's transformer in segments, each of which can be one CUDA graph.

    before   embedders, modulations, RoPE
    first    the first F blocks, whose residual decides whether the step is cached
    middle   the other blocks, which a cached step skips
    last     the last B blocks, if B > 0
    after    the last norm and the output projection

cache-dit sees first, middle and last as a transformer of two or three blocks. It reads only the inputs and outputs of a
segment (CachedBlocks_Pattern_Base of cache-dit 1.5.3). Between steps it keeps differences of them, in its own tensors.
An image's first step runs all segments, so one image records all graphs.

The decision compares the first blocks' residual with the residual of the last computed step. The CPU waits for one
number from the GPU, and the GPU is idle until the next launch. If the mask or a limit decides a step, cache-dit
compares nothing, and the CPU does not wait.
"""

from collections.abc import Callable

import torch
from diffusers import FluxTransformer2DModel
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from torch import Tensor

from utils.cuda_graph import ModuleProxy


class _Before(torch.nn.Module):
    """The part of FluxTransformer2DModel.forward before the blocks."""

    def __init__(self, transformer: FluxTransformer2DModel):
        super().__init__()
        self.x_embedder, self.context_embedder = transformer.x_embedder, transformer.context_embedder
        self.time_text_embed, self.pos_embed = transformer.time_text_embed, transformer.pos_embed

    def forward(self, image: Tensor, text: Tensor, pooled: Tensor, timestep: Tensor, guidance: Tensor | None,
                image_ids: Tensor, text_ids: Tensor) -> tuple:
        """Embeds the inputs.

        Args:
            image: (B, S, C). text: (B, T, E). pooled: (B, P). timestep, guidance: (B,). image_ids: (S, 3).
            text_ids: (T, 3).

        Returns:
            The image (B, S, D), the text (B, T, D), temb (B, D) and RoPE's (cosine, sine). Fused blocks have their own
            forms of temb and RoPE (utils/kernels/fused_blocks.py).
        """
        image = self.x_embedder(image)
        conditions = [x.to(image.dtype) * 1000 for x in (timestep, guidance) if x is not None]
        temb = self.time_text_embed(*conditions, pooled)
        return image, self.context_embedder(text), temb, self.pos_embed(torch.cat((text_ids, image_ids)))


class _Blocks(torch.nn.Module):
    """Consecutive blocks, called like one block.

    The last block may leave out unused tokens (`prune_unused_tokens` of utils/kernels/fused_blocks.py). The output then
    has the input's values of these tokens, because a step cache subtracts the input from the output.
    """

    def __init__(self, blocks: list[torch.nn.Module]):
        super().__init__()
        self.blocks = torch.nn.ModuleList(blocks)

    def forward(self, image: Tensor, text: Tensor, *common) -> tuple[Tensor, Tensor]:
        """image (B, S, D) and text (B, T, D) to (text, image). `common` are the further arguments of every block."""
        input_text, input_image = text, image
        for block in self.blocks:
            text, image = block(image, text, *common)
        return _completed(text, input_text), _completed(image, input_image)


def _completed(output: Tensor, source: Tensor) -> Tensor:
    """Appends the last tokens of `source` (B, S, D) to `output` (B, R, D), R <= S, and returns (B, S, D)."""
    left_out = source[:, output.shape[1]:]
    return torch.cat((output, left_out), dim=1) if left_out.shape[1] else output


class _Segment(torch.nn.Module):
    """Wrapped `_Blocks`, called with the argument names that cache-dit looks for in a block's signature."""

    def __init__(self, blocks: torch.nn.Module):
        super().__init__()
        self.blocks = blocks

    def forward(self, hidden_states: Tensor, encoder_hidden_states: Tensor, temb: Tensor, image_rotary_emb: tuple,
                joint_attention_kwargs: dict | None) -> tuple[Tensor, Tensor]:
        """The image (B, S, D) and the text (B, T, D) to (text, image)."""
        return self.blocks(hidden_states, encoder_hidden_states, temb, image_rotary_emb, joint_attention_kwargs)


class _After(torch.nn.Module):
    """The part of FluxTransformer2DModel.forward after the blocks."""

    def __init__(self, transformer: FluxTransformer2DModel):
        super().__init__()
        self.norm_out, self.proj_out = transformer.norm_out, transformer.proj_out

    def forward(self, image: Tensor, temb: Tensor) -> Tensor:
        """image (B, S, D) and temb (B, D) to (B, S, C)."""
        return self.proj_out(self.norm_out(image, temb))


class PiecewiseTransformer(ModuleProxy):
    """Replaces a transformer and runs it in segments.

    cache-dit replaces the list of blocks by its own list during a call, and restores the original only if the
    transformer has no attribute of that name. The list is therefore called `segments`, a name that FLUX's transformer
    does not have.

    Args:
        first: F, the number of blocks in the first segment, 1 or more.
        last: B, the number of blocks in the last segment, 0 or more. F + B is less than the number of blocks.
        wrap: wraps each segment, for example `CUDAGraphModule`.
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
        """FluxTransformer2DModel.forward, without its options for ControlNet.

        Args:
            hidden_states: (B, S, C), the image tokens.
            encoder_hidden_states: (B, T, E), the text tokens.
            pooled_projections: (B, P), CLIP's pooled embedding.
            timestep: (B,), in [0, 1]. guidance: (B,), for models with embedded guidance.
            img_ids: (S, 3). txt_ids: (T, 3).

        Returns:
            Transformer2DModelOutput of the sample (B, S, C), or (sample,) without `return_dict`.
        """
        image, text, temb, rotation = self.before(hidden_states, encoder_hidden_states, pooled_projections, timestep,
                                                  guidance, img_ids, txt_ids)
        for segment in self.segments:
            text, image = segment(image, text, temb, rotation, joint_attention_kwargs)
        sample = self.after(image, temb)
        return Transformer2DModelOutput(sample) if return_dict else (sample,)
