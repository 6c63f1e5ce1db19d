"""fp8 attention of a FLUX block: one custom op over FlashAttention-3 (NVIDIA) or AITER (AMD), and its processor.

The layout is (B, S, H, D) throughout, with the text tokens before the image tokens, as in diffusers' Flux processor.

FlashAttention-3 multiplies e4m3 tensors and takes one descale factor per batch item and head. flux-fast used this
kernel with unscaled casts. Values over 448 then saturate; in eager mode on torch <= 2.11 they become NaN and the image
is black. `ScaledAttnProcessor`, which diffusers' blocks call, scales them. (Fused blocks bring their own scales: see
utils/kernels/formats.py.)

* q and k get a *static* scale. RMSNorm gives each head vector the length sqrt(D). After the norm's weight w and RoPE,
  therefore, no element exceeds sqrt(D) * max|w|. A bound that is a few times too wide costs no precision: e4m3 is a
  floating-point format with the same relative precision anywhere between 2^-6 and 448. The static scale also needs no
  pass over the data.
* v gets the measured maximum of each batch item and head.

AITER quantizes by itself, so it gets q, k and v in high precision.
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
AITER_MODULES = ("aiter.ops.triton.attention.mha", "aiter.ops.triton.mha")  # AITER since 2026, and before 2026

# {--attention_backend: (library that the op calls, precision of its inputs)}
BACKENDS = {
    "fa3": ("fa3", "fp8"),
    "fa3_unscaled": ("fa3", "fp8_unscaled"),
    "fa3_bf16": ("fa3", "bf16"),
    "aiter": ("aiter", "bf16"),
}

# FlashAttention-3's number of queries in a tile, for e4m3, bf16 and a head dimension of 128. An SM (streaming
# multiprocessor) computes one tile of one head at a time.
QUERY_TILE = 128
MOST_KEY_PARTS = 6  # with more parts of the keys, the merge costs more than it saves (H100, 4,352 tokens)

_functions: dict[str, Callable] = {}


def find_library(library: str) -> tuple[Callable | None, str]:
    """Imports the attention function of a library.

    A build of FlashAttention-3 from source installs `flash_attn_interface`. The `fa3-fwd` wheel (CUDA 13) installs
    `fa3_fwd_interface`.

    Args:
        library: "fa3" or "aiter".

    Returns:
        The function and the name of its module; or None and a sentence that says how to install or repair the library.
    """
    modules, function = ((FA3_MODULES, "flash_attn_func") if library == "fa3" else
                         (AITER_MODULES, "flash_attn_fp8_func"))
    for module in modules:
        try:
            return getattr(importlib.import_module(module), function), module
        except ModuleNotFoundError:
            continue
        except Exception as error:  # an undefined symbol, another CUDA version, a missing driver
            return None, f"{module} is installed but cannot be used ({type(error).__name__}: {error})"
    if library == "fa3":
        return None, ("FlashAttention-3 is not installed: `pip install fa3-fwd==0.0.3` (CUDA 13), or build "
                      "flash-attention's hopper/ folder, or `--attention_backend _flash_3_hub` (bf16; downloads it)")
    return None, "AITER is not installed: `pip install amd-aiter`"


def register_library(library: str, function: Callable) -> None:
    """Makes the op call `function` for `library`. The signature of `function` is read once, here, not in every call."""
    accepted = inspect.signature(function).parameters
    any_keyword = any(p.kind is inspect.Parameter.VAR_KEYWORD for p in accepted.values())
    fixed = {"causal": False, "return_lse": False, "return_attn_probs": False}
    fixed = {name: value for name, value in fixed.items() if name in accepted}
    # Older builds of FlashAttention-3 have no such option and always return the log-sum-exp.
    for_lse = {name: True for name in ("return_lse", "return_attn_probs") if name in accepted}
    takes_descale = any_keyword or "q_descale" in accepted
    op = _op_under(function)

    def call(q, k, v, q_descale, k_descale, v_descale, with_lse=False):
        descale = dict(q_descale=q_descale, k_descale=k_descale, v_descale=v_descale) if takes_descale else {}
        if op and not with_lse and q.dtype in (torch.float8_e4m3fn, torch.bfloat16) and q.shape[3] == 128:
            first, parts = two_launches(q.shape[1], q.shape[0] * q.shape[2], _multiprocessors(q.device))
            if parts > 1:
                out = torch.empty(q.shape, dtype=torch.bfloat16, device=q.device)
                op(q[:, :first], k, v, out=out[:, :first], num_splits=1, **descale)
                op(q[:, first:], k, v, out=out[:, first:], num_splits=parts, **descale)
                return out
        result = function(q, k, v, **fixed | (for_lse if with_lse else {}), **descale)
        # Some builds return the output, others (output, log-sum-exp). `result[0]` of a tensor would be a batch item.
        out, *rest = result if isinstance(result, (tuple, list)) else (result,)
        if with_lse and not rest:
            raise RuntimeError(f"--context_parallel ring needs the log-sum-exp, and this build of {library} does not "
                               "return it: use --context_parallel ulysses or --attention_backend native")
        out = out.to(torch.bfloat16).contiguous()
        return (out, rest[0]) if with_lse else out

    _functions[library] = call


def _op_under(function: Callable) -> Callable | None:
    """The torch operator that FlashAttention-3's Python function calls.

    Returns:
        None if this build's operator has no `out` (a tensor to write to), `num_splits` (into how many parts the keys
        are split) or `q_descale`.
    """
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
    """Splits the queries into two launches if the last wave of one launch would leave most SMs idle.

    All tiles of queries take equally long, and each SM computes one at a time. A few tiles beyond a whole number of
    waves therefore cost a whole wave: schnell's 34 x 24 tiles are 6.2 waves on 132 SMs and take seven. A second launch
    computes the queries of these few tiles and splits the keys of each tile among several SMs. Kontext's 12.4 waves are
    split in the same way; dev's 6.5 waves stay one launch. bench/kernels.py times attention.

    Args:
        tokens: the number of queries per batch item.
        heads: the number of heads of all batch items together.
        units: the number of SMs.

    Returns:
        The number of queries in the first launch, and the number of parts into which the second launch splits the
        keys. (tokens, 1) if one launch is best.
    """
    rows = -(-tokens // QUERY_TILE)
    left = rows * heads % units
    last = -(-left // heads)  # a row of tiles has the same queries of all heads
    if not 0 < last < rows or units // (last * heads) < 2:
        return tokens, 1
    return (rows - last) * QUERY_TILE, min(MOST_KEY_PARTS, units // (last * heads))


@torch.library.custom_op("flux_faster::attention", mutates_args=(), device_types=("cuda",))
def attention(q: Tensor, k: Tensor, v: Tensor, q_descale: Tensor | None, k_descale: Tensor | None,
              v_descale: Tensor | None, library: str) -> Tensor:
    """softmax(q k^T / sqrt(D)) v, not causal, no mask.

    Args:
        q, k, v: (B, S, H, D), e4m3 with descale factors, e4m3 without descale factors (unscaled), or bf16.
        q_descale, k_descale, v_descale: (B, H) float32, or None for 1. q * q_descale is the true value.
        library: a name given to `register_library`.

    Returns:
        (B, S, H, D), bf16 for every dtype of the inputs, contiguous.
    """
    return _functions[library](q, k, v, q_descale, k_descale, v_descale)


@attention.register_fake
def _(q, k, v, q_descale, k_descale, v_descale, library):
    return torch.empty(q.shape, dtype=torch.bfloat16, device=q.device)


@attention.register_kernel("cpu")
def reference_attention(q, k, v, q_descale, k_descale, v_descale, library=""):
    """`attention` in float32 through PyTorch: the CPU's kernel, and the reference in the tests of the GPU kernels."""
    q, k, v = (x.float() if descale is None else x.float() * descale[:, None, :, None]
               for x, descale in ((q, q_descale), (k, k_descale), (v, v_descale)))
    out = F.scaled_dot_product_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2))
    return out.transpose(1, 2).to(torch.bfloat16).contiguous()


def sdpa(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """PyTorch's attention. q, k, v and the result are (B, S, H, D) in the inputs' dtype."""
    return F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v))).transpose(1, 2)


def attention_with_lse(q: Tensor, k: Tensor, v: Tensor, q_descale: Tensor | None, k_descale: Tensor | None,
                       v_descale: Tensor | None, library: str) -> tuple[Tensor, Tensor]:
    """`attention` to one part of the keys, and the log-sum-exp that merges it with the results of the other parts.

    Args:
        q, k, v, q_descale, k_descale, v_descale: as for `attention`; k and v may have another length than q.
        library: a name given to `register_library`, or "sdpa" for PyTorch's attention in the inputs' dtype.

    Returns:
        The result (B, S, H, D), bf16 or, with "sdpa", in the inputs' dtype; and the log-sum-exp of each row of
        q k^T / sqrt(D), (B, H, S) float32.
    """
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
    return out.transpose(1, 2), lse[..., :q.shape[1]]  # the kernel pads it to whole tiles


def measured_scale(x: Tensor) -> Tensor:
    """The scale of each batch item and head of x (B, S, H, D): max|x| / 448, (B, H) float32, never zero."""
    return x.abs().amax(dim=(1, 3)).float().clamp(min=1e-12) / E4M3_MAX


def norm_scale(*norms: torch.nn.RMSNorm) -> Tensor:
    """The static scale of the outputs of these RMSNorms, () float32: the bound sqrt(D) * max|w| / 448.

    The bound holds with and without RoPE. The module docstring derives it.
    """
    bound = torch.stack([norm.normalized_shape[-1] ** 0.5 * norm.weight.detach().abs().max().float()
                         for norm in norms]).amax()
    return bound.clamp(min=1e-12) / E4M3_MAX


def quantize_per_head(x: Tensor, scale: Tensor) -> Tensor:
    """Divides x (B, S, H, D) by its scale (B, H) and casts the result to e4m3.

    The scale must keep the result below 464, where the cast would give NaN.
    """
    return (x.float() / scale[:, None, :, None]).to(torch.float8_e4m3fn)


class ScaledAttnProcessor:
    """Flux attention through `flux_faster::attention`, with fused or separate q, k and v projections.

    Args:
        library: a name given to `register_library`, or "sdpa" if `attend` takes it.
        precision: of the op's inputs: "fp8", "fp8_unscaled", "bf16" or, for any other name, as they are.
        attend: a function with the op's arguments. With --context_parallel it attends to the tokens of all GPUs.
        agree: with --context_parallel, makes the scales of this GPU's v, (B, H), the maximum over all GPUs.
    """

    def __init__(self, library: str, precision: str, attend: Callable = attention, agree: Callable | None = None):
        self.library = library
        self.precision = precision
        self.attend = attend
        self.agree = agree

    def __call__(self, attn, hidden_states: Tensor, encoder_hidden_states: Tensor | None = None,
                 attention_mask: Tensor | None = None,
                 image_rotary_emb: tuple[Tensor, Tensor] | None = None) -> Tensor | tuple[Tensor, Tensor]:
        """Attends, with the arguments of diffusers' FluxAttnProcessor.

        Args:
            attn: a FluxAttention.
            hidden_states: (B, S, C), the image tokens; in a single block, all tokens.
            encoder_hidden_states: (B, T, C), the text tokens of a double block.
            attention_mask: must be None.
            image_rotary_emb: cosine and sine of RoPE, each (S + T, D).

        Returns:
            (B, S, C) in a single block, without an output projection; (image, text) in a double block, projected.

        Raises:
            ValueError: there is an attention mask.
        """
        if attention_mask is not None:
            raise ValueError("this attention takes no mask, and the pipeline passes one: use --disable_fa3")
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
    """Projects x (B, S, C) to q, k and v, each (B, S, H, D), through one fused Linear or three separate ones."""
    parts = (getattr(attn, fused)(x).chunk(3, dim=-1) if attn.fused_projections else
             [getattr(attn, name)(x) for name in separate])
    return [part.unflatten(-1, (-1, attn.head_dim)) for part in parts]


def use_attention_library(transformer: torch.nn.Module, backend: str, attend: Callable = attention,
                          agree: Callable | None = None) -> None:
    """Puts a `ScaledAttnProcessor` on every attention of a FluxTransformer2DModel. Call it after LoRAs are merged.

    The static scales of q and k become buffers of each attention module. So they follow the module to other devices,
    and all layers can share one compiled block.

    Args:
        backend: a key of `BACKENDS`, or "native", which needs an `attend` that takes the library "sdpa".
        attend, agree: of the processor.
    """
    library, precision = ("sdpa", "as it is") if backend == "native" else BACKENDS[backend]
    for module in transformer.modules():
        if hasattr(module, "norm_q") and hasattr(module, "norm_k"):
            added = hasattr(module, "norm_added_q")
            for name in ("q", "k"):
                norms = [getattr(module, f"norm_{name}")] + ([getattr(module, f"norm_added_{name}")] if added else [])
                module.register_buffer(f"fp8_{name}_scale", norm_scale(*norms), persistent=False)
    transformer.set_attn_processor(ScaledAttnProcessor(library, precision, attend, agree))
