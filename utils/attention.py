"""Attention of a FLUX block in fp8: one custom op over FlashAttention-3 (NVIDIA) or AITER (AMD), and its processor.

Layout is (B, S, H, D) throughout, text tokens before image tokens, as diffusers' Flux processor has it.

FlashAttention-3 multiplies e4m3 tensors and takes one descale factor per batch item and head. Its fp8 kernel was
published with unscaled casts in flux-fast: values over 448 then saturate, or, in eager mode on torch <= 2.11, become
NaN and the image black. Here

* q and k get a *static* scale. RMSNorm gives each head vector the length sqrt(D), so after the norm's weight w and a
  rotation no element exceeds sqrt(D) * max|w|. e4m3 is a floating-point format: its relative precision is the same
  anywhere between 2^-6 and 448, so a bound that is a few times too wide costs nothing, and no pass over the data.
* v gets its measured maximum, per batch item and head.

AITER quantizes by itself and is handed q, k, v in high precision.
"""

import importlib
import inspect
from collections.abc import Callable

import torch
import torch.nn.functional as F
from diffusers.models.embeddings import apply_rotary_emb
from torch import Tensor

E4M3_MAX = 448.0

FA3_MODULES = ("flash_attn_interface", "fa3_fwd_interface")
AITER_MODULES = ("aiter.ops.triton.attention.mha", "aiter.ops.triton.mha")  # since 2026, and before

# What each name of --attention_backend hands to the op: (library, precision).
BACKENDS = {
    "fa3": ("fa3", "fp8"),
    "fa3_unscaled": ("fa3", "fp8_unscaled"),
    "fa3_bf16": ("fa3", "bf16"),
    "aiter": ("aiter", "bf16"),
}

# FlashAttention-3's tile of queries for e4m3 heads of 128; a tile is one multiprocessor's work at a time.
QUERY_TILE = 128
MOST_KEY_PARTS = 6  # dividing keys further costs more to merge than it saves (H100, 4,352 tokens)

_functions: dict[str, Callable] = {}


def find_library(library: str) -> tuple[Callable | None, str]:
    """The attention function of "fa3" or "aiter", and where it came from; or None, and how to get or mend it.

    FlashAttention-3's own build installs `flash_attn_interface`; the `fa3-fwd` wheel (CUDA 13) `fa3_fwd_interface`.
    """
    modules, function = ((FA3_MODULES, "flash_attn_func") if library == "fa3" else
                         (AITER_MODULES, "flash_attn_fp8_func"))
    for module in modules:
        try:
            return getattr(importlib.import_module(module), function), module
        except ModuleNotFoundError:
            continue
        except Exception as error:  # an undefined symbol, another CUDA, a missing driver: installed, but not usable
            return None, f"{module} is installed but cannot be used ({type(error).__name__}: {error})"
    if library == "fa3":
        return None, ("FlashAttention-3 is not installed: `pip install fa3-fwd==0.0.3` (CUDA 13), or build "
                      "flash-attention's hopper/ folder, or `--attention_backend _flash_3_hub` (bf16; downloads it)")
    return None, "AITER is not installed: `pip install amd-aiter`"


def register_library(library: str, function: Callable) -> None:
    """Makes `function` what the op calls for `library`. Its signature is read here, once, not in every call."""
    accepted = inspect.signature(function).parameters
    any_keyword = any(p.kind is inspect.Parameter.VAR_KEYWORD for p in accepted.values())
    fixed = {"causal": False, "return_lse": False, "return_attn_probs": False}
    fixed = {name: value for name, value in fixed.items() if name in accepted}
    # FlashAttention-3's older builds always return the log-sum-exp.
    for_lse = {name: True for name in ("return_lse", "return_attn_probs") if name in accepted}
    takes_descale = any_keyword or "q_descale" in accepted
    op = _op_under(function)

    def call(q, k, v, q_descale, k_descale, v_descale, with_lse=False):
        descale = dict(q_descale=q_descale, k_descale=k_descale, v_descale=v_descale) if takes_descale else {}
        if op and not with_lse and q.dtype == torch.float8_e4m3fn and q.shape[3] == 128:
            first, parts = two_launches(q.shape[1], q.shape[0] * q.shape[2], _multiprocessors(q.device))
            if parts > 1:
                out = torch.empty(q.shape, dtype=torch.bfloat16, device=q.device)
                op(q[:, :first], k, v, out=out[:, :first], num_splits=1, **descale)
                op(q[:, first:], k, v, out=out[:, first:], num_splits=parts, **descale)
                return out
        found = function(q, k, v, **fixed | (for_lse if with_lse else {}), **descale)
        # Some builds return the output alone, some (output, log-sum-exp): never index a tensor's batch.
        out, *rest = found if isinstance(found, (tuple, list)) else (found,)
        if with_lse and not rest:
            raise RuntimeError(f"this build of {library} does not give the log-sum-exp that a ring of GPUs merges by: "
                               "use --context_parallel ulysses or --attention_backend native")
        out = out.to(torch.bfloat16).contiguous()
        return (out, rest[0]) if with_lse else out

    _functions[library] = call


def _op_under(function: Callable) -> Callable | None:
    """FlashAttention-3's operator below its Python function, if this build has one that writes where it is told and can
    divide the keys among several programs."""
    module = inspect.getmodule(function)
    for name in ("flash_attn_3_cuda", "fa3_fwd_cuda"):
        op = getattr(getattr(module, name, None), "fwd", None)
        if isinstance(op, torch._ops.OpOverloadPacket) and {"out", "num_splits", "q_descale"} <= {
                argument.name for argument in op.default._schema.arguments}:
            return op
    return None


def _multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


def two_launches(tokens: int, heads: int, units: int) -> tuple[int, int]:
    """How many queries to attend to first, and among how many programs the keys of the others are divided then.

    A tile of queries of one head takes one of `units` multiprocessors as long as any other, so that few tiles beyond a
    whole number of rounds take a round of their own in which the others idle: schnell's 34 x 24 tiles are 6.2 rounds of
    132 and take seven. The queries of those few are left to a second launch, in which several multiprocessors share
    each tile's keys. So with Kontext's 12.4 rounds; dev's 6.5 stay as they are. (bench/kernels.py times attention.)

    Args:
        heads: of all batch items together.

    Returns:
        (tokens, 1) if one launch is best.
    """
    rows = -(-tokens // QUERY_TILE)
    left = rows * heads % units
    last = -(-left // heads)  # whole rows of tiles
    if not 0 < last < rows or units // (last * heads) < 2:
        return tokens, 1
    return (rows - last) * QUERY_TILE, min(MOST_KEY_PARTS, units // (last * heads))


@torch.library.custom_op("flux_faster::attention", mutates_args=(), device_types=("cuda",))
def attention(q: Tensor, k: Tensor, v: Tensor, q_descale: Tensor | None, k_descale: Tensor | None,
              v_descale: Tensor | None, library: str) -> Tensor:
    """softmax(q k^T / sqrt(D)) v, not causal, no mask.

    Args:
        q, k, v: (B, S, H, D), e4m3 with descale factors, e4m3 without (unscaled), or bf16.
        q_descale, k_descale, v_descale: (B, H) float32, or None for 1: q * q_descale is the true value.
        library: a name given to `register_library`.

    Returns:
        (B, S, H, D), bf16, contiguous, whatever the inputs' dtype.
    """
    return _functions[library](q, k, v, q_descale, k_descale, v_descale)


@attention.register_fake
def _(q, k, v, q_descale, k_descale, v_descale, library):
    return torch.empty(q.shape, dtype=torch.bfloat16, device=q.device)


@attention.register_kernel("cpu")
def reference_attention(q, k, v, q_descale, k_descale, v_descale, library=""):
    """The same function in float32 through PyTorch: what the GPU kernels are tested against, and the CPU's kernel."""
    q, k, v = (x.float() if descale is None else x.float() * descale[:, None, :, None]
               for x, descale in ((q, q_descale), (k, k_descale), (v, v_descale)))
    out = F.scaled_dot_product_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2))
    return out.transpose(1, 2).to(torch.bfloat16).contiguous()


def sdpa(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """PyTorch's own attention, in the inputs' dtype. (B, S, H, D), all of them."""
    return F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v))).transpose(1, 2)


def attention_with_lse(q: Tensor, k: Tensor, v: Tensor, q_descale: Tensor | None, k_descale: Tensor | None,
                       v_descale: Tensor | None, library: str) -> tuple[Tensor, Tensor]:
    """`attention`, or with "sdpa" as library PyTorch's in the inputs' dtype, of some of the keys; with what it takes to
    merge it with that of the others: the log-sum-exp of each row of q k^T / sqrt(D), (B, H, S) float32."""
    if q.device.type == "cpu":
        dtype = q.dtype if library == "sdpa" else torch.bfloat16
        q, k, v = (x.float() if descale is None else x.float() * descale[:, None, :, None]
                   for x, descale in ((q, q_descale), (k, k_descale), (v, v_descale)))
        scores = torch.einsum("bshd,bthd->bhst", q, k) * q.shape[-1] ** -0.5
        return torch.einsum("bhst,bthd->bshd", scores.softmax(-1), v).to(dtype), scores.logsumexp(-1)
    if library != "sdpa":
        return _functions[library](q, k, v, q_descale, k_descale, v_descale, with_lse=True)
    heads = [x.transpose(1, 2) for x in (q, k, v)]
    if q.dtype == torch.float32:
        out, lse, *_ = torch.ops.aten._scaled_dot_product_efficient_attention(*heads, None, True)
    else:
        out, lse, *_ = torch.ops.aten._scaled_dot_product_flash_attention(*heads)
    return out.transpose(1, 2), lse[..., :q.shape[1]]  # padded to whole tiles


def measured_scale(x: Tensor) -> Tensor:
    """(B, H) float32: the largest |x| of each batch item and head of x (B, S, H, D) over e4m3's largest, never zero."""
    return x.abs().amax(dim=(1, 3)).float().clamp(min=1e-12) / E4M3_MAX


def norm_scale(*norms: torch.nn.RMSNorm) -> Tensor:
    """() float32: a scale that no output of any of these RMSNorms, rotated or not, exceeds. See the module's text."""
    bound = max(norm.normalized_shape[-1] ** 0.5 * norm.weight.detach().abs().max().float() for norm in norms)
    return bound.clamp(min=1e-12) / E4M3_MAX


def quantize_per_head(x: Tensor, scale: Tensor) -> Tensor:
    """x (B, S, H, D) over its scale (B, H), as e4m3. Values stay below 464, where a cast would turn to NaN."""
    return (x.float() / scale[:, None, :, None]).to(torch.float8_e4m3fn)


class FusedAttnProcessor:
    """Flux attention through `flux_faster::attention`, with fused or separate q, k, v projections.

    Args:
        attend, agree: on several GPUs, what to call in the op's place, and what makes scales of each GPU's tokens those
            of all.
    """

    def __init__(self, library: str, precision: str, attend: Callable = attention, agree: Callable | None = None):
        self.library = library
        self.precision = precision
        self.attend = attend
        self.agree = agree

    def __call__(self, attn, hidden_states: Tensor, encoder_hidden_states: Tensor | None = None,
                 attention_mask: Tensor | None = None,
                 image_rotary_emb: tuple[Tensor, Tensor] | None = None) -> Tensor | tuple[Tensor, Tensor]:
        if attention_mask is not None:
            raise ValueError("this attention takes no mask: use --disable_fa3 for pipelines that pass one")
        q, k, v = _project(attn, hidden_states, ("to_q", "to_k", "to_v"), "to_qkv")
        q, k = attn.norm_q(q), attn.norm_k(k)
        if encoder_hidden_states is not None:
            text_q, text_k, text_v = _project(attn, encoder_hidden_states,
                                              ("add_q_proj", "add_k_proj", "add_v_proj"), "to_added_qkv")
            q = torch.cat([attn.norm_added_q(text_q), q], dim=1)
            k = torch.cat([attn.norm_added_k(text_k), k], dim=1)
            v = torch.cat([text_v, v], dim=1)
        if image_rotary_emb is not None:
            q = apply_rotary_emb(q, image_rotary_emb, sequence_dim=1)
            k = apply_rotary_emb(k, image_rotary_emb, sequence_dim=1)

        out = self._attend(attn, q, k, v).flatten(2, 3).to(hidden_states.dtype)

        if encoder_hidden_states is None:
            return out
        text, image = out.split([encoder_hidden_states.shape[1], hidden_states.shape[1]], dim=1)
        return attn.to_out[1](attn.to_out[0](image.contiguous())), attn.to_add_out(text.contiguous())

    def _attend(self, attn, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if self.precision != "fp8":
            if self.precision == "bf16":
                q, k, v = (x.bfloat16() for x in (q, k, v))
            elif self.precision == "fp8_unscaled":
                q, k, v = (x.float().clamp(-E4M3_MAX, E4M3_MAX).to(torch.float8_e4m3fn) for x in (q, k, v))
            return self.attend(q, k, v, None, None, None, self.library)
        batch, _, heads, _ = q.shape
        q_scale, k_scale = (s.expand(batch, heads).contiguous() for s in (attn.fp8_q_scale, attn.fp8_k_scale))
        v_scale = self.agree(measured_scale(v)) if self.agree else measured_scale(v)
        return self.attend(quantize_per_head(q, q_scale), quantize_per_head(k, k_scale), quantize_per_head(v, v_scale),
                           q_scale, k_scale, v_scale, self.library)


def _project(attn, x: Tensor, separate: tuple[str, str, str], fused: str) -> list[Tensor]:
    """q, k, v of x (B, S, C), each (B, S, H, D), through one fused Linear or three."""
    parts = (getattr(attn, fused)(x).chunk(3, dim=-1) if attn.fused_projections else
             [getattr(attn, name)(x) for name in separate])
    return [part.unflatten(-1, (-1, attn.head_dim)) for part in parts]


def use_attention_library(transformer: torch.nn.Module, backend: str, attend: Callable = attention,
                          agree: Callable | None = None) -> None:
    """Puts the processor of BACKENDS[backend], or of "native", on every attention of a FluxTransformer2DModel. `attend`
    and `agree` are the processor's; "native" is for an `attend` that knows the library "sdpa".

    The static scales of q and k become buffers of each attention module: they follow it to other devices, and one
    compiled block serves all layers. Call it after LoRA weights are fused.
    """
    library, precision = ("sdpa", "as it is") if backend == "native" else BACKENDS[backend]
    for module in transformer.modules():
        if hasattr(module, "norm_q") and hasattr(module, "norm_k"):
            added = hasattr(module, "norm_added_q")
            for name in ("q", "k"):
                norms = [getattr(module, f"norm_{name}")] + ([getattr(module, f"norm_added_{name}")] if added else [])
                module.register_buffer(f"fp8_{name}_scale", norm_scale(*norms), persistent=False)
    transformer.set_attn_processor(FusedAttnProcessor(library, precision, attend, agree))
