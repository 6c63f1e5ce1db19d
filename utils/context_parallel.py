"""Sequence parallelism: several GPUs draw one image. Each GPU computes its shard of the tokens.

All layers but attention process one token at a time, and every GPU has all weights. `SequenceParallel` gives each of N
GPUs 1/N of the text tokens and 1/N of the image tokens. It returns the output of all tokens on every GPU, so the
pipeline and the scheduler see one ordinary transformer. Attention needs all tokens, and there are two methods:

* **Ulysses** (DeepSpeed-Ulysses, arXiv 2309.14509): an all-to-all before attention gives each GPU all tokens of H / N
  heads. An all-to-all after attention gives each GPU all heads of its tokens again. Attention computes the same numbers
  as on one GPU.
* **Ring** (ring attention, arXiv 2310.01889): the queries stay on their GPU. Keys and values move round the GPUs in
  N - 1 steps while attention computes with the previous ones. The partial results are merged by their log-sum-exp. The
  ring is for a number of heads that N does not divide.

The order of the tokens does not matter, because this attention has no mask and RoPE is already applied to q and k. The
all-to-all therefore leaves the tokens as "text and image of GPU 0, text and image of GPU 1, ...".

With the fused kernels the exchanged tensors are e4m3. The scales of v, and with Ulysses the scales of attention's
result, are derived from the longest row. Each block therefore takes the maximum of the row lengths over all GPUs
(`all_reduce_max`, one small all-reduce), and all GPUs use the same scales.

torchrun starts one process per GPU. The processes communicate over NCCL, or over gloo on a CPU. An error ends its
process at once, and torchrun then ends the others. A process that hangs ends itself after `TIMEOUT`.

    torchrun --nproc_per_node=2 -m bench.link      # measures the exchanges, for the expected times in the docs
"""

import faulthandler
import os
from datetime import timedelta

import torch
import torch.distributed as dist
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from torch import Tensor

from utils.attention import attention, attention_with_lse, sdpa
from utils.common import RecipeError
from utils.cuda_graph import ModuleProxy
from utils.launchers import own_gpu, world_size

TIMEOUT = timedelta(minutes=30)  # one process may compile for minutes while the others wait
BACKENDS = ("fa3", "fa3_unscaled", "fa3_bf16", "aiter", "native")


def choose(wanted: str, config: dict, backend: str, gpus: int) -> str:
    """Chooses "ulysses" or "ring". "auto" is Ulysses if the world size divides the number of heads.

    Args:
        wanted: the value of --context_parallel: "auto", "ulysses" or "ring".
        config: the transformer's config.
        backend: the value of --attention_backend.
        gpus: the world size.

    Raises:
        RecipeError: the world size does not divide the heads, or the attention backend does not support the method.
    """
    heads = config["num_attention_heads"]
    if backend not in BACKENDS:
        raise RecipeError(f"--attention_backend {backend} does not work with --context_parallel: choose from "
                          f"{', '.join(BACKENDS)}.")
    if wanted == "ulysses" and heads % gpus:
        raise RecipeError(f"--context_parallel ulysses: the model has {heads} heads, and {gpus} GPUs do not divide "
                          "them. Use --context_parallel ring, or another --nproc_per_node.")
    kind = "ring" if wanted == "ring" or heads % gpus else "ulysses"
    if kind == "ring" and backend == "aiter":
        raise RecipeError("--context_parallel ring needs the log-sum-exp, and --attention_backend aiter does not "
                          "return it: use --context_parallel ulysses, or --attention_backend native.")
    return kind


def check_tokens(text_tokens: int, image_tokens: int, reference_tokens: int = 0) -> None:
    """Checks that the world size divides the text tokens, and the sum of the image and reference tokens (Kontext).

    Raises:
        RecipeError: the world size does not divide them.
    """
    gpus = world_size()
    if text_tokens % gpus:
        raise RecipeError(f"--context_parallel: the prompt has {text_tokens} text tokens, and {gpus} GPUs do not "
                          "divide them. Use another --nproc_per_node, such as 2, 4 or 8, or a --max_sequence_length "
                          f"that makes them {text_tokens // gpus * gpus} (--redux adds 729).")
    if (image_tokens + reference_tokens) % gpus:
        reference = f" and the reference has {reference_tokens}" if reference_tokens else ""
        raise RecipeError(f"--context_parallel: the image has {image_tokens} tokens{reference} (one per 16x16 pixels), "
                          f"and {gpus} GPUs do not divide them. Use another --nproc_per_node, --height or --width"
                          + (", or a reference of another aspect ratio." if reference_tokens else "."))


def init_distributed(args) -> None:
    """Joins torchrun's process group and makes this rank's GPU the current device. Ranks above 0 become quiet.

    Raises:
        RecipeError: the host has fewer GPUs than processes.
    """
    rank, device = int(os.environ["RANK"]), None
    if args.device == "cuda":
        device = torch.device("cuda", own_gpu())
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if device else "gloo", timeout=TIMEOUT, device_id=device)
    args.quiet = args.quiet or rank > 0


def is_main_process() -> bool:
    """True on rank 0, which alone writes files and stdout. True without a process group."""
    return not dist.is_initialized() or dist.get_rank() == 0


def start_watchdog(transformer: torch.nn.Module) -> None:
    """Ends this process `TIMEOUT` after its last denoising step began, and prints a traceback of each thread.

    NCCL's timeout is not enough: it does not see collectives that a CUDA graph launches.
    """
    transformer.register_forward_pre_hook(
        lambda *_: faulthandler.dump_traceback_later(TIMEOUT.total_seconds(), exit=True))


# --- collectives and layouts ---

@torch.library.custom_op("flux_faster::all_to_all", mutates_args=())
def all_to_all(x: Tensor) -> Tensor:
    """Sends x[i] to rank i and returns y (N, ...), of which y[i] came from rank i.

    Args:
        x: (N, ...), any dtype, since the bytes are sent as uint8. N is the world size.
    """
    x = x.contiguous()
    received = torch.empty_like(x)
    dist.all_to_all_single(received.view(torch.uint8), x.view(torch.uint8))
    return received


@all_to_all.register_fake
def _(x):
    return torch.empty_like(x, memory_format=torch.contiguous_format)


@torch.library.custom_op("flux_faster::all_reduce_max", mutates_args=())
def all_reduce_max(x: Tensor) -> Tensor:
    """The elementwise maximum of x (any shape, float32) over all ranks."""
    x = x.clone()
    dist.all_reduce(x, dist.ReduceOp.MAX)
    return x


@all_reduce_max.register_fake
def _(x):
    return torch.empty_like(x)


def all_gather(x: Tensor) -> Tensor:
    """x of every rank, as (N, *x.shape).

    This sends few bytes next to attention's exchanges, so it reuses `all_to_all` and needs no collective of its own.
    """
    return all_to_all(x.expand(dist.get_world_size(), *x.shape))


def shard(x: Tensor, dim: int) -> Tensor:
    """This rank's part of x (..., S, ...): part `rank` of N equal parts along `dim`, (..., S / N, ...). A view."""
    return x.chunk(dist.get_world_size(), dim)[dist.get_rank()]


def all_tokens(x: Tensor) -> Tensor:
    """Joins x (N, B, S / N, ...), of which x[i] came from rank i, to (B, S, ...). No copy if B is 1."""
    return x.transpose(0, 1).flatten(1, 2)


def token_parts(x: Tensor) -> Tensor:
    """Splits x (B, S, ...) into (N, B, S / N, ...), contiguous, part i for rank i. No copy if B is 1."""
    return x.unflatten(1, (dist.get_world_size(), -1)).transpose(0, 1).contiguous()


# --- attention over all tokens, with the arguments of `utils.attention.attention` ---

def ulysses_attention(q: Tensor, k: Tensor, v: Tensor, q_descale: Tensor | None, k_descale: Tensor | None,
                      v_descale: Tensor | None, library: str, boxes=None) -> Tensor:
    """`attention` of this rank's queries to all tokens by the Ulysses method (arXiv 2309.14509).

    Args:
        q, k, v: (B, S / N, H, D), this rank's tokens. N, the world size, divides H. The dtype is any that `library`
            takes.
        q_descale, k_descale, v_descale: (B, H) float32, the same on all ranks, or None.
        library: a name given to `register_library`, or "sdpa" for PyTorch's attention in the inputs' dtype.
        boxes: a `utils.kernels.symmetric_memory.SymmetricAllToAll` that exchanges the tokens in NCCL's place, or None.

    Returns:
        (B, S / N, H, D): bf16, or q's dtype with "sdpa".
    """
    def exchange(x: Tensor, kind: str) -> Tensor:
        return boxes.start(x, kind)() if boxes else all_to_all(x)

    # The layout is made here and not in `all_to_all`: compiled code fuses it with the cast.
    heads = torch.stack([q, k, v], dim=2).unflatten(3, (dist.get_world_size(), -1)).movedim(3, 0).contiguous()
    own_q, own_k, own_v = all_tokens(exchange(heads, "qkv")).unbind(2)
    if library == "sdpa":
        attended = sdpa(own_q, own_k, own_v)
    else:
        descale = (x if x is None else shard(x, 1) for x in (q_descale, k_descale, v_descale))
        attended = attention(own_q, own_k, own_v, *descale, library)
    return exchange(token_parts(attended.flatten(2)), "attention").permute(1, 2, 0, 3).reshape(q.shape)


def ring_attention(q: Tensor, k: Tensor, v: Tensor, q_descale: Tensor | None, k_descale: Tensor | None,
                   v_descale: Tensor | None, library: str) -> Tensor:
    """`attention` of this rank's queries to all tokens by the ring method. See `ring`.

    Args:
        q, k, v: (B, S / N, H, D), this rank's tokens. H may be any number.
        q_descale, k_descale, v_descale: (B, H) float32, the same on all ranks, or None.
        library: a name given to `register_library`, or "sdpa" for PyTorch's attention in the inputs' dtype.

    Returns:
        (B, S / N, H, D): bf16, or q's dtype with "sdpa".
    """
    return ring(q, torch.stack([k, v]), q_descale, k_descale, v_descale, library)


ATTENTION = {"ulysses": ulysses_attention, "ring": ring_attention}


@torch.library.custom_op("flux_faster::ring", mutates_args=())
def ring(q: Tensor, kv: Tensor, q_descale: Tensor | None, k_descale: Tensor | None, v_descale: Tensor | None,
         library: str) -> Tensor:
    """Attention of this rank's queries to the keys and values of all ranks, one rank's after another's.

    The source is arXiv 2310.01889. l is the log-sum-exp of a row of q k^T / sqrt(D), so e^l is the softmax's
    denominator. Let a and b be the results of two parts of the keys, with log-sum-exp la and lb. They merge to
    (e^la a + e^lb b) / (e^la + e^lb) = a + sigmoid(lb - la) (b - a), with the log-sum-exp log(e^la + e^lb).

    Args:
        q: (B, S / N, H, D).
        kv: (2, B, S / N, H, D), this rank's keys and values.
        q_descale, k_descale, v_descale: (B, H) float32, the same on all ranks, or None.
        library: a name given to `register_library`, or "sdpa" for PyTorch's attention in the inputs' dtype.

    Returns:
        (B, S / N, H, D): bf16, or q's dtype with "sdpa"; contiguous.
    """
    gpus, kv = dist.get_world_size(), kv.contiguous()
    for i in range(gpus):
        if i + 1 < gpus:
            coming = torch.empty_like(kv)
            moving = _pass_on(kv, coming)
        part, part_lse = attention_with_lse(q, *kv.unbind(), q_descale, k_descale, v_descale, library)
        if i == 0:
            out, lse = part.float(), part_lse
        else:
            weight = torch.sigmoid(part_lse - lse).transpose(1, 2)[..., None]
            out, lse = torch.lerp(out, part.float(), weight), torch.logaddexp(lse, part_lse)
        if i + 1 < gpus:
            moving.wait()
            kv = coming
    return out.to(part.dtype).contiguous()


def _pass_on(sent: Tensor, received: Tensor) -> dist.Work:
    """Starts to send `sent` to the next rank and to receive `received`, of the same size, from the previous rank.

    The caller waits for the returned work. This is an all-to-all with one non-empty part, because CUDA graphs have
    supported the capture of all-to-alls for longer than that of sends and receives.
    """
    rank, gpus = dist.get_rank(), dist.get_world_size()
    sent, received = (x.view(torch.uint8).view(-1) for x in (sent, received))
    to, by = ([len(sent) * (i == (rank + step) % gpus) for i in range(gpus)] for step in (1, -1))
    return dist.all_to_all_single(received, sent, by, to, async_op=True)


@ring.register_fake
def _(q, kv, q_descale, k_descale, v_descale, library):
    return torch.empty_like(q, dtype=torch.bfloat16 if q.dtype == torch.float8_e4m3fn else q.dtype,
                            memory_format=torch.contiguous_format)


# --- modules that the pipeline calls ---

class SequenceParallel(ModuleProxy):
    """A FluxTransformer2DModel whose blocks compute this rank's shard of the tokens.

    Its inputs and its output have all tokens and are the same on every rank.
    """

    def forward(self, *, hidden_states: Tensor, encoder_hidden_states: Tensor, img_ids: Tensor, txt_ids: Tensor,
                return_dict: bool = True, **kwargs):
        """FluxTransformer2DModel.forward. N, the world size, divides S and T.

        Args:
            hidden_states: (B, S, C), the image tokens (Kontext: and the reference's tokens).
            encoder_hidden_states: (B, T, E), the text tokens.
            img_ids: (S, 3). txt_ids: (T, 3).
            kwargs: further arguments of the transformer, for which each rank passes the same values.

        Returns:
            Transformer2DModelOutput of the sample (B, S, C), or (sample,) without `return_dict`.
        """
        out = self.module(hidden_states=shard(hidden_states, 1),
                          encoder_hidden_states=shard(encoder_hidden_states, 1),
                          img_ids=shard(img_ids, 0), txt_ids=shard(txt_ids, 0), return_dict=False, **kwargs)[0]
        out = all_gather(out).transpose(0, 1).flatten(1, 2)
        return Transformer2DModelOutput(sample=out) if return_dict else (out,)


class DataParallelDecoder(torch.nn.Module):
    """A VAE decoder that decodes this rank's shard of a batch.

    If the world size does not divide the batch, every rank decodes the whole batch. One image is not divided, because
    GroupNorm and attention read the whole image.
    """

    def __init__(self, module: torch.nn.Module):
        super().__init__()
        self.module = module

    def forward(self, z: Tensor, *args, **kwargs) -> Tensor:
        """Latents z (B, C, H, W), the same on every rank, to images (B, 3, 8 H, 8 W) on every rank."""
        if len(z) % dist.get_world_size():
            return self.module(z, *args, **kwargs)
        return all_gather(self.module(shard(z, 0), *args, **kwargs)).flatten(0, 1)
