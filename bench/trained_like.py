"""Reshapes the weights of a FLUX transformer, random or trained, so that they resemble trained DiTs' weights.

An fp8 recipe that works on random weights may fail on trained weights: if a few channels, neurons or heads are much
stronger than the rest, they set the scale, and the rest rounds to zero. Each family is one such case at three
strengths. A mixture combines several families. Families multiply existing weights, so that they work with
--random_weights at any size and with the trained tiny-flux.

    mixture = parse("massive=500,spread=0.5,neuron=300")
    inputs = capture_step(pipeline, kwargs)
    reshape(pipeline.transformer, mixture, inputs)  # before `optimize`
    reference = float32_step(pipeline.transformer, step_inputs(inputs, mixture))
"""

import argparse
import math
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import torch
from diffusers import FluxTransformer2DModel
from torch import Generator, Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers import T5EncoderModel

from utils.common import RecipeError, finite_float


@dataclass(frozen=True)
class Family:
    """One way in which trained weights differ from random weights, with its source."""
    strengths: tuple[float, float, float]  # weak, middle, strong
    meaning: str
    source: str


# `reshape` applies the families in this order: massive ones compensate for the rows' length after all others.
FAMILIES = {
    "zero_rows": Family(
        (0.01, 0.1, 0.5), "This share of the text tokens and of the image tokens enters the first block as zeros.",
        "fp8 scales of zero gave NaN: vipshop/cache-dit pull 1097, huggingface/kernels-community pull 680"),
    "heavy_rows": Family(
        (0.1, 0.2, 0.4), "Every output row of the blocks' Linears, modulations apart, is exp(strength * t) times as "
        "large, with t from Student's t distribution.", "long-tailed weights of DiTs: arXiv 2508.03485"),
    "spread": Family(
        (0.3, 0.6, 0.9), "AdaLN's 1 + scale gets a lognormal spread over the channels with this sigma.",
        "salient channels in DiTs: arXiv 2405.16005"),
    "gates": Family((2, 4, 8), "AdaLN's gates are this many times larger.", "stress test"),
    "qk_norm": Family(
        (3, 10, 30), "A few channels of q's RMSNorm weights are this many times larger and k's as many times smaller, "
        "and a few others the other way round: the same function.",
        "outlier channels in language models' keys: arXiv 2401.18079"),
    "neuron": Family(
        (30, 300, 3000), "One neuron of each MLP is this many times stronger and fires in about 0.1 % of the tokens; "
        "the column that reads it is as many times weaker.",
        "MLP activations of 6.6e4 broke Z-Image's per-tensor fp8: unslothai/unsloth pull 6772"),
    "neuron_kept": Family(
        (3, 10, 30), "As neuron, but the column that reads it keeps its strength.",
        "stress test, after unslothai/unsloth pull 6772"),
    "head": Family(
        (30, 300, 3000), "In each attention one head's v is this many times larger, and the columns that read the head "
        "are as many times smaller: the same function.", "stress test"),
    "head_inverse": Family(
        (30, 300, 3000), "In each attention one head's v is this many times smaller, and the columns that read the "
        "head are as many times larger: the same function.", "stress test"),
    "massive": Family(
        (100, 500, 2000), "Three channels of the residual stream carry up to this many times its rms in every token, "
        "and AdaLN's scales undo it.",
        "arXiv 2505.18584, 2510.11538; 91,648 in FLUX.1-dev's stream: black-forest-labs/flux issue 472"),
    "massive_by_weights": Family(
        (100, 500, 2000), "As massive, but the columns of the Linears that read the normed row undo it, so that the "
        "row itself has outlier channels.", "stress test"),
}
MIXTURES = (
    "massive=500,spread=0.5,neuron=300",
    "massive=2000,spread=0.9,neuron=3000,head=300",
    "heavy_rows=0.2,neuron=300,gates=4",
    "head=300,neuron=300,qk_norm=10",
    "massive_by_weights=500,spread=0.5",
    "spread=0.9,gates=4,neuron_kept=10,head_inverse=300",
    "zero_rows=0.1,heavy_rows=0.2,spread=0.6",
    "massive=500,heavy_rows=0.2,qk_norm=10,head=3000",
)
EXCLUDED = (("massive", "massive_by_weights"), ("zero_rows", "massive"), ("zero_rows", "massive_by_weights"))
UNDONE = 0.02  # the factor on the weights that read a massive channel


def parse(text: str) -> dict[str, float]:
    """Parses a mixture such as "massive=500,spread=0.5" into {family: strength}. "plain" and "" are the empty mixture.

    Raises:
        RecipeError: a family is unknown, a strength is out of range, or families exclude each other.
    """
    mixture = {}
    for part in text.split(",") if text.strip() not in ("", "plain") else ():
        name, _, strength = (piece.strip() for piece in part.partition("="))
        try:
            value = finite_float(strength)
        except argparse.ArgumentTypeError:
            raise RecipeError(f"'{part}' in the mixture '{text}' has no finite number. Write FAMILY=STRENGTH, "
                              "separated by commas, such as massive=500,spread=0.5.") from None
        if name in mixture:
            raise RecipeError(f"The mixture '{text}' names {name} twice. Give each family one strength.")
        mixture[name] = value
    _check(mixture)
    return mixture


def cases() -> list[tuple[str, dict[str, float]]]:
    """Returns (name, mixture) for every family at its three strengths, then for `MIXTURES`. `parse` reads the names."""
    names = [f"{name}={strength:g}" for name, family in FAMILIES.items() for strength in family.strengths]
    return [(name, parse(name)) for name in (*names, *MIXTURES)]


@torch.no_grad()
def reshape(transformer: FluxTransformer2DModel, mixture: dict[str, float], inputs: dict | None = None,
            seed: int = 1) -> None:
    """Reshapes the weights in place. Call it before projections are fused and weights are quantized.

    Args:
        mixture: {family: strength}, from `parse`.
        inputs: the transformer's named arguments, from `bench.quality.capture_step`. The families of `MEASURED` run
            this step to measure the neurons' inputs and the residual stream.
        seed: of all random numbers. The CPU draws them, so that CPU and GPU agree.

    Raises:
        RecipeError: as `parse`; also if the weights are fused or quantized, or `inputs` is missing.
    """
    _check(mixture)
    blocks = (*transformer.transformer_blocks, *transformer.single_transformer_blocks)
    if any(hasattr(block.attn, "to_qkv") or type(block.attn.to_q.weight.data) is not Tensor for block in blocks):
        raise RecipeError("The weights are fused or quantized and cannot be reshaped. Call reshape before optimize.")
    if inputs is None and (measured := [name for name in mixture if name in MEASURED]):
        raise RecipeError(f"{' and '.join(measured)} need a step to measure. Pass inputs=capture_step(pipeline, "
                          "kwargs), from bench.quality.")
    parts = _flux_parts(transformer, inputs)
    for name in (name for name in FAMILIES if name in mixture):
        # The two massive families draw the same channels, so that both models compute the same function.
        FLUX_STEPS[name](parts, mixture[name], _generator(seed, name.removesuffix("_by_weights")))


@torch.no_grad()
def reshape_text_encoder(t5: T5EncoderModel, mixture: dict[str, float], seed: int = 1) -> None:
    """Reshapes a T5 in place, by the families of the mixture that are in `T5_STEPS`.

    All families except heavy_rows keep T5's function. A neuron is a row of the gated GELU's linear branch.
    massive_by_weights multiplies three weights of each RMSNorm and divides the columns that read them.

    Raises:
        RecipeError: as `parse`.
    """
    _check(mixture)
    parts = _t5_parts(t5)
    for name in (name for name in T5_STEPS if name in mixture):
        T5_STEPS[name](parts, mixture[name], _generator(seed, name))


def step_inputs(inputs: dict, mixture: dict[str, float]) -> dict:
    """Returns the transformer's named arguments, with zero rows if the mixture has zero_rows.

    Then this share of the image tokens (B, S, C) and of the text tokens (B, T, C), at least one of each, is zero. Every
    call chooses the same rows.
    """
    if "zero_rows" not in mixture:
        return inputs
    zeroed = {}
    for name in ("hidden_states", "encoder_hidden_states"):
        tokens = inputs[name].shape[1]
        order = torch.randperm(tokens, generator=_generator(1, name))
        chosen = order[:, None] < max(1, round(mixture["zero_rows"] * tokens))
        zeroed[name] = inputs[name].masked_fill(chosen.to(inputs[name].device), 0.0)
    return inputs | zeroed


def attach(transformer: nn.Module, mixture: dict[str, float]) -> RemovableHandle:
    """Applies `step_inputs` to every call of the transformer, for drawing pictures. Remove the handle to undo it."""
    return transformer.register_forward_pre_hook(
        lambda module, args, kwargs: (args, step_inputs(kwargs, mixture)), with_kwargs=True)


class _AdaLN(NamedTuple):
    """A LayerNorm of the residual stream, its modulation, and the Linears that read the modulated row."""
    stream: str  # "text", "image", or "joint": text tokens, then image tokens
    norm: nn.LayerNorm
    modulation: nn.Linear  # its output is several parts of width D; the next three fields are indices of parts
    shift: int
    scale: int
    gate: int | None
    readers: tuple[nn.Linear, ...]

    def multiply(self, part: int, factor: Tensor, offset: float = 0.0) -> None:
        """Multiplies (offset + part) by `factor` (D,), through the weights and the bias."""
        width, linear, factor = len(factor), self.modulation, factor.to(self.modulation.weight.device)
        rows = slice(part * width, (part + 1) * width)
        linear.weight[rows] *= factor[:, None]
        linear.bias[rows] = ((offset + linear.bias[rows].float()) * factor - offset).to(linear.bias.dtype)


class _Attention(NamedTuple):
    """The Linears of an attention. A head's rows of values[i] are the head's columns of outputs[i]."""
    heads: int
    values: tuple[nn.Linear, ...]
    outputs: tuple[nn.Linear, ...]
    qk_norms: tuple[tuple[nn.RMSNorm, nn.RMSNorm], ...] = ()


class _MLP(NamedTuple):
    up: nn.Linear
    down: nn.Linear
    first: int = 0  # the column of `down` that reads the first neuron; a single block has attention's columns first


class _Parts(NamedTuple):
    model: nn.Module
    inputs: dict | None
    linears: list[nn.Linear]  # of the blocks, without modulations
    attentions: list[_Attention]
    mlps: list[_MLP]
    norms: list  # FLUX: _AdaLN. T5: (RMSNorm, the Linears that read it)


def _flux_parts(model: FluxTransformer2DModel, inputs: dict | None) -> _Parts:
    attentions, mlps, norms, linears = [], [], [], []
    for block in model.transformer_blocks:
        attn = block.attn
        attentions.append(_Attention(attn.heads, (attn.to_v, attn.add_v_proj), (attn.to_out[0], attn.to_add_out),
                                     ((attn.norm_q, attn.norm_k), (attn.norm_added_q, attn.norm_added_k))))
        qkv, added = (attn.to_q, attn.to_k, attn.to_v), (attn.add_q_proj, attn.add_k_proj, attn.add_v_proj)
        for stream, norm1, norm2, readers, ff in (("image", block.norm1, block.norm2, qkv, block.ff),
                                                  ("text", block.norm1_context, block.norm2_context, added,
                                                   block.ff_context)):
            mlps.append(_MLP(ff.net[0].proj, ff.net[2]))
            norms += [_AdaLN(stream, norm1.norm, norm1.linear, 0, 1, 2, readers),
                      _AdaLN(stream, norm2, norm1.linear, 3, 4, 5, (ff.net[0].proj,))]
    for block in model.single_transformer_blocks:
        attn = block.attn
        attentions.append(_Attention(attn.heads, (attn.to_v,), (block.proj_out,), ((attn.norm_q, attn.norm_k),)))
        mlps.append(_MLP(block.proj_mlp, block.proj_out, first=attn.inner_dim))
        readers = (attn.to_q, attn.to_k, attn.to_v, block.proj_mlp)
        norms.append(_AdaLN("joint", block.norm.norm, block.norm.linear, 0, 1, 2, readers))
    # AdaLayerNormContinuous has the scale before the shift, and no gate.
    norms.append(_AdaLN("image", model.norm_out.norm, model.norm_out.linear, 1, 0, None, (model.proj_out,)))
    for block in (*model.transformer_blocks, *model.single_transformer_blocks):
        linears += [part for name, part in block.named_modules() if isinstance(part, nn.Linear) and "norm" not in name]
    return _Parts(model, inputs, linears, attentions, mlps, norms)


def _t5_parts(t5: T5EncoderModel) -> _Parts:
    attentions, mlps, norms = [], [], []
    for block in t5.encoder.block:
        attn, mlp = block.layer[0].SelfAttention, block.layer[1].DenseReluDense
        attentions.append(_Attention(attn.n_heads, (attn.v,), (attn.o,)))
        mlps.append(_MLP(mlp.wi_1, mlp.wo))
        norms += [(block.layer[0].layer_norm, (attn.q, attn.k, attn.v)),
                  (block.layer[1].layer_norm, (mlp.wi_0, mlp.wi_1))]
    linears = [part for part in t5.encoder.block.modules() if isinstance(part, nn.Linear)]
    return _Parts(t5, None, linears, attentions, mlps, norms)


def _zero_rows(parts: _Parts, share: float, generator: Generator) -> None:
    for embedder in (parts.model.x_embedder, parts.model.context_embedder):
        embedder.bias.zero_()


def _heavy_rows(parts: _Parts, strength: float, generator: Generator) -> None:
    for linear in parts.linears:
        normal = torch.randn(4, linear.out_features, generator=generator)
        t = normal[0] / normal[1:].square().mean(0).sqrt()  # Student's t with 3 degrees of freedom
        _multiply_rows(linear, slice(None), torch.exp(strength * t.clamp(-5, 5)))


def _spread(parts: _Parts, sigma: float, generator: Generator) -> None:
    for adaln in parts.norms:
        normal = torch.randn(parts.model.inner_dim, generator=generator)
        # Its mean square is 1, so that rows keep their length.
        adaln.multiply(adaln.scale, torch.exp(sigma * normal - sigma**2), offset=1.0)


def _gates(parts: _Parts, strength: float, generator: Generator) -> None:
    for adaln in parts.norms[:-1]:
        adaln.multiply(adaln.gate, torch.full((parts.model.inner_dim,), strength))


def _qk_norm(parts: _Parts, strength: float, generator: Generator) -> None:
    for attention in parts.attentions:
        # RoPE mixes channels 2i and 2i + 1, so that both channels need the same factor. Text and image need the same
        # factors too, since attention multiplies q of the text with k of the image.
        pairs = torch.randperm(len(attention.qk_norms[0][0].weight) // 2, generator=generator)
        first, second = ((2 * pairs[chosen, None] + torch.arange(2)).flatten() for chosen in (slice(2), slice(2, 4)))
        for norm_q, norm_k in attention.qk_norms:
            for larger, smaller, channels in ((norm_q, norm_k, first), (norm_k, norm_q, second)):
                larger.weight[channels] *= strength
                smaller.weight[channels] /= strength


def _neuron(parts: _Parts, strength: float, generator: Generator, kept: bool = False) -> None:
    chosen = {mlp.up: int(torch.randint(mlp.up.out_features, (), generator=generator)) for mlp in parts.mlps}
    if parts.inputs is not None:  # FLUX: the bias makes the neuron fire rarely. T5's Linears have no bias.
        read = _observe(parts, list(chosen), lambda up, row: row @ up.weight[chosen[up]].float())
        for (up, j), products in zip(chosen.items(), read, strict=True):
            # On random weights this is about -3 |w_j|. Trained tokens resemble each other, so that it must be measured.
            up.bias[j] = -strength * (products.mean() + 3 * products.std())
    for mlp in parts.mlps:
        mlp.up.weight[chosen[mlp.up]] *= strength
        if not kept:
            mlp.down.weight[:, mlp.first + chosen[mlp.up]] /= strength


def _head(parts: _Parts, strength: float, generator: Generator) -> None:
    for attention in parts.attentions:
        size = attention.values[0].out_features // attention.heads
        start = size * int(torch.randint(attention.heads, (), generator=generator))
        head = slice(start, start + size)
        for value, output in zip(attention.values, attention.outputs, strict=True):
            _multiply_rows(value, head, torch.full((size,), strength))
            output.weight[:, head] /= strength


def _massive(parts: _Parts, strength: float, generator: Generator, by_weights: bool = False) -> None:
    """Adds strength * rms * (1, -1/2, -1/2) to three channels of each stream (B, S, D), by the embedders' biases.

    The sum is zero, so that LayerNorm's mean is unchanged. The rms of text and image are measured in the single blocks,
    because there one scale per channel has to compensate for both.
    """
    width, text = parts.model.inner_dim, parts.inputs["encoder_hidden_states"].shape[1]
    order = torch.randperm(width, generator=generator).to(parts.model.device)
    channels, others = order[:3], order[3:]
    log_rms = _observe(parts, [adaln.norm for adaln in parts.norms], lambda norm, rows: rows[..., others].std(-1).log())
    joint = torch.stack([rms for adaln, rms in zip(parts.norms, log_rms, strict=True) if adaln.stream == "joint"])
    level = {"text": joint[..., :text].mean(), "image": joint[..., text:].mean()}
    values = strength * torch.tensor([1.0, -0.5, -0.5], device=order.device)
    for stream, embedder in (("text", parts.model.context_embedder), ("image", parts.model.x_embedder)):
        embedder.bias[channels] = (values * level[stream].exp()).to(embedder.bias.dtype)
    for adaln, rms in zip(parts.norms, log_rms, strict=True):
        carried = (torch.cat([level["text"].expand(text), level["image"].expand(rms.shape[1] - text)])
                   if adaln.stream == "joint" else level[adaln.stream])
        # The factor by which a token's row has become longer. LayerNorm divides the other channels by it.
        longer = (1 + values.square().sum() / width * torch.exp(2 * (carried - rms))).sqrt().log().mean().exp()
        factor = longer.repeat(width)
        factor[channels] = UNDONE
        if by_weights:  # (factor * w)(normed * (1 + scale) + shift / factor), in place of a larger 1 + scale
            adaln.multiply(adaln.shift, 1 / factor)
            for reader in adaln.readers:
                reader.weight *= factor
        else:
            adaln.multiply(adaln.scale, factor, offset=1.0)
        if adaln.gate is not None:  # a gate of zero, so that no block changes the massive channels
            adaln.multiply(adaln.gate, torch.ones_like(factor).index_fill(0, channels, 0.0))


def _massive_norms(parts: _Parts, strength: float, generator: Generator) -> None:
    for norm, readers in parts.norms:
        channels = torch.randperm(len(norm.weight), generator=generator)[:3]
        norm.weight[channels] *= strength
        for reader in readers:
            reader.weight[:, channels] /= strength


FLUX_STEPS = {
    "zero_rows": _zero_rows, "heavy_rows": _heavy_rows, "spread": _spread, "gates": _gates, "qk_norm": _qk_norm,
    "neuron": _neuron, "neuron_kept": partial(_neuron, kept=True),
    "head": _head, "head_inverse": lambda parts, strength, generator: _head(parts, 1 / strength, generator),
    "massive": _massive, "massive_by_weights": partial(_massive, by_weights=True),
}
T5_STEPS = {name: FLUX_STEPS[name] for name in ("heavy_rows", "neuron", "head", "head_inverse")} | {
    "massive_by_weights": _massive_norms}
MEASURED = ("neuron", "neuron_kept", "massive", "massive_by_weights")


def _multiply_rows(linear: nn.Linear, rows: slice, factor: Tensor) -> None:
    factor = factor.to(linear.weight.device)
    linear.weight[rows] *= factor[:, None]
    if linear.bias is not None:
        linear.bias[rows] *= factor


def _observe(parts: _Parts, modules: list[nn.Module], of: Callable[[nn.Module, Tensor], Tensor]) -> list[Tensor]:
    """Runs one step, and returns of(module, the module's input in float32) for each module."""
    seen = {}

    def keep(module, args):
        seen[module] = of(module, args[0].float())

    handles = [module.register_forward_pre_hook(keep) for module in modules]
    try:
        parts.model(**parts.inputs)
    finally:
        for handle in handles:
            handle.remove()
    return [seen[module] for module in modules]


def _generator(seed: int, name: str) -> Generator:
    """Returns a generator for one family, so that it draws the same numbers alone and in a mixture."""
    return torch.Generator().manual_seed(zlib.crc32(f"{name} {seed}".encode()))


def _check(mixture: dict[str, float]) -> None:
    for name, strength in mixture.items():
        if name not in FAMILIES:
            raise RecipeError(f"There is no family '{name}'. Choose from {', '.join(FAMILIES)}.")
        largest = 1.0 if name == "zero_rows" else math.inf
        if not 0 < strength <= largest or math.isinf(strength):
            raise RecipeError(f"{name}={strength:g} is out of range. Give a number above 0"
                              f"{' and up to 1' if largest == 1 else ''}, such as "
                              f"{', '.join(f'{value:g}' for value in FAMILIES[name].strengths)}.")
    for first, second in EXCLUDED:
        if first in mixture and second in mixture:
            raise RecipeError(f"{first} and {second} exclude each other: both set the embedders' biases. Choose one.")
