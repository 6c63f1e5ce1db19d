"""One image on several GPUs: each has its part of the tokens, and they meet in attention.

Everything but attention works on one token at a time, with weights that every GPU has. Of N GPUs each takes 1/N of the
text's and of the image's tokens at the transformer's entrance (`SequenceParallel`), and gives back the whole image's
output, so that pipeline and scheduler see one transformer, on every GPU the same. For attention

* **Ulysses** exchanges tokens for heads: all tokens of H / N heads on each GPU, and back (DeepSpeed-Ulysses,
  arXiv 2309.14509). Nothing else changes: attention is each GPU's own, with the very numbers of one GPU.
* **ring** keeps the queries where they are and hands keys and values round, N - 1 times, while the last ones are
  attended to; the parts are merged by their log-sum-exp (ring attention, arXiv 2310.01889). For heads that N does not
  divide.

Attention has neither mask nor order, rotations being in q and k already: text and image of GPU 0, then those of GPU 1,
are as good as text first. What is exchanged is what attention reads: e4m3 on the fused kernels. There the scales of v,
and with Ulysses those of attention's result, follow from the longest row. Each block therefore takes the largest row
lengths among all GPUs (`all_reduce_max`, one small all-reduce), and every GPU has the same scales.

Processes are torchrun's, one a GPU, over NCCL, or over gloo on a CPU. An error ends its process at once, and torchrun
then ends the others; one that is merely stuck ends itself after `TIMEOUT`.

    torchrun --nproc_per_node=2 -m utils.context_parallel      # what the exchanges take, for the estimate in the README
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
from utils.machine import own_gpu, world_size

TIMEOUT = timedelta(minutes=30)  # one process may compile for minutes while another waits for it
BACKENDS = ("fa3", "fa3_unscaled", "fa3_bf16", "aiter", "native")


def choose(wanted: str, config: dict, backend: str) -> str:
    """"ulysses" or "ring" for `wanted`, which may be "auto", and a transformer's config.

    Raises:
        RecipeError: heads that cannot be divided, or an attention backend that cannot take part.
    """
    heads, gpus = config["num_attention_heads"], world_size()
    if backend not in BACKENDS:
        raise RecipeError(f"--attention_backend {backend} does not go with --context_parallel, which attends through "
                          f"this recipe's own exchanges: choose from {', '.join(BACKENDS)}.")
    if wanted == "ulysses" and heads % gpus:
        raise RecipeError(f"--context_parallel ulysses: {heads} heads cannot be divided among {gpus} GPUs. Use "
                          "--context_parallel ring, or another --nproc_per_node.")
    kind = "ring" if wanted == "ring" or heads % gpus else "ulysses"
    if kind == "ring" and backend == "aiter":
        raise RecipeError("--context_parallel ring merges by log-sum-exp, which AITER's fp8 attention keeps to itself: "
                          "use ulysses, or --attention_backend native.")
    return kind


def check_tokens(text_tokens: int, image_tokens: int, reference_tokens: int = 0) -> None:
    """RecipeError if text or image, Kontext's reference included, cannot be divided among the GPUs."""
    gpus = world_size()
    if text_tokens % gpus:
        raise RecipeError(f"{text_tokens} text tokens cannot be divided among {gpus} GPUs: use another "
                          "--nproc_per_node, such as 2, 4 or 8.")
    if (image_tokens + reference_tokens) % gpus:
        reference = f" and {reference_tokens} of the reference" if reference_tokens else ""
        raise RecipeError(f"{image_tokens} tokens of the image{reference} (a token is 16x16 pixels) cannot be divided "
                          f"among {gpus} GPUs: use another --nproc_per_node, --height or --width"
                          + (", or a reference of another aspect ratio." if reference_tokens else "."))


def init_distributed(args) -> None:
    """Joins torchrun's other processes, with a GPU of its own as the current one. Only the first one talks.

    Raises:
        RecipeError: there are fewer GPUs than processes.
    """
    rank, device = int(os.environ["RANK"]), None
    if args.device == "cuda":
        device = torch.device("cuda", own_gpu())
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if device else "gloo", timeout=TIMEOUT, device_id=device)
    args.quiet = args.quiet or rank > 0


def is_main_process() -> bool:
    """Whether this is the process that writes: files, stdout."""
    return not dist.is_initialized() or dist.get_rank() == 0


def start_watchdog(transformer: torch.nn.Module) -> None:
    """Ends this process, with a traceback of each thread, `TIMEOUT` after its last step. NCCL's own timeout does not
    see what a CUDA graph launches."""
    transformer.register_forward_pre_hook(
        lambda *_: faulthandler.dump_traceback_later(TIMEOUT.total_seconds(), exit=True))


# --- what moves ---

@torch.library.custom_op("flux_faster::all_to_all", mutates_args=())
def all_to_all(x: Tensor) -> Tensor:
    """x (N, ...), of which part i is for GPU i: (N, ...), part i from GPU i. Bytes: any dtype."""
    x = x.contiguous()
    received = torch.empty_like(x)
    dist.all_to_all_single(received.view(torch.uint8), x.view(torch.uint8))
    return received


@all_to_all.register_fake
def _(x):
    return torch.empty_like(x, memory_format=torch.contiguous_format)


@torch.library.custom_op("flux_faster::all_reduce_max", mutates_args=())
def all_reduce_max(x: Tensor) -> Tensor:
    """The largest of each element of x, float32, among all GPUs."""
    x = x.clone()
    dist.all_reduce(x, dist.ReduceOp.MAX)
    return x


@all_reduce_max.register_fake
def _(x):
    return torch.empty_like(x)


def all_gather(x: Tensor) -> Tensor:
    """x of every GPU: (N, *x.shape). Next to what attention exchanges it is nothing, and no collective of its own."""
    return all_to_all(x.expand(dist.get_world_size(), *x.shape))


def shard(x: Tensor, dim: int) -> Tensor:
    return x.chunk(dist.get_world_size(), dim)[dist.get_rank()]


def all_tokens(x: Tensor) -> Tensor:
    """x (N, B, S / N, ...), part i from GPU i, as (B, S, ...). Without a copy if B is 1."""
    return x.transpose(0, 1).flatten(1, 2)


def token_parts(x: Tensor) -> Tensor:
    """x (B, S, ...) as (N, B, S / N, ...), part i for GPU i, contiguous. Without a copy if B is 1."""
    return x.unflatten(1, (dist.get_world_size(), -1)).transpose(0, 1).contiguous()


# --- attention over all tokens, called as `attention` is: q, k, v (B, S / N, H, D), scales (B, H) or None ---

def ulysses_attention(q: Tensor, k: Tensor, v: Tensor, q_descale: Tensor | None, k_descale: Tensor | None,
                      v_descale: Tensor | None, library: str) -> Tensor:
    # Laid out here, where compiled code does it as it casts.
    heads = torch.stack([q, k, v], dim=2).unflatten(3, (dist.get_world_size(), -1)).movedim(3, 0).contiguous()
    own_q, own_k, own_v = all_tokens(all_to_all(heads)).unbind(2)
    if library == "sdpa":
        attended = sdpa(own_q, own_k, own_v)
    else:
        descale = (x if x is None else shard(x, 1) for x in (q_descale, k_descale, v_descale))
        attended = attention(own_q, own_k, own_v, *descale, library)
    return all_to_all(token_parts(attended.flatten(2))).permute(1, 2, 0, 3).reshape(q.shape)


def ring_attention(q: Tensor, k: Tensor, v: Tensor, q_descale: Tensor | None, k_descale: Tensor | None,
                   v_descale: Tensor | None, library: str) -> Tensor:
    return ring(q, torch.stack([k, v]), q_descale, k_descale, v_descale, library)


ATTENTION = {"ulysses": ulysses_attention, "ring": ring_attention}


@torch.library.custom_op("flux_faster::ring", mutates_args=())
def ring(q: Tensor, kv: Tensor, q_descale: Tensor | None, k_descale: Tensor | None, v_descale: Tensor | None,
         library: str) -> Tensor:
    """q (B, S / N, H, D) attends to the keys and values, (2, B, S / N, H, D), of every GPU, one GPU's after another's.

    With softmax's denominators e^l, l the log-sum-exp of a row of q k^T / sqrt(D), parts a and b of the keys give
    (e^la a + e^lb b) / (e^la + e^lb) = a + sigmoid(lb - la) (b - a).
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
    """To the next GPU and from the one before; under way until it is waited for. An exchange of which all goes to one,
    since CUDA graphs have recorded those for longer than sends and receives of their own."""
    rank, gpus = dist.get_rank(), dist.get_world_size()
    sent, received = (x.view(torch.uint8).view(-1) for x in (sent, received))
    to, by = ([len(sent) * (i == (rank + step) % gpus) for i in range(gpus)] for step in (1, -1))
    return dist.all_to_all_single(received, sent, by, to, async_op=True)


@ring.register_fake
def _(q, kv, q_descale, k_descale, v_descale, library):
    return torch.empty_like(q, dtype=torch.bfloat16 if q.dtype == torch.float8_e4m3fn else q.dtype,
                            memory_format=torch.contiguous_format)


# --- what the pipeline sees ---

class SequenceParallel(torch.nn.Module):
    """A FluxTransformer2DModel that works on its GPU's part of the tokens; the others have theirs. Arguments and output
    are those of all tokens. Attributes that are not its own are the module's."""

    def __init__(self, module: torch.nn.Module):
        super().__init__()
        self.module = module

    def forward(self, *, hidden_states: Tensor, encoder_hidden_states: Tensor, img_ids: Tensor, txt_ids: Tensor,
                return_dict: bool = True, **kwargs):
        out = self.module(hidden_states=shard(hidden_states, 1),
                          encoder_hidden_states=shard(encoder_hidden_states, 1),
                          img_ids=shard(img_ids, 0), txt_ids=shard(txt_ids, 0), return_dict=False, **kwargs)[0]
        out = all_gather(out).transpose(0, 1).flatten(1, 2)
        return Transformer2DModelOutput(sample=out) if return_dict else (out,)

    def __getattr__(self, name):
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("module"), name)


class DataParallelDecoder(torch.nn.Module):
    """A VAE decoder that decodes its GPU's images of a batch. A batch that cannot be divided, such as one image, every
    GPU decodes by itself: GroupNorm and attention look at a whole image."""

    def __init__(self, module: torch.nn.Module):
        super().__init__()
        self.module = module

    def forward(self, z: Tensor, *args, **kwargs) -> Tensor:
        if len(z) % dist.get_world_size():
            return self.module(z, *args, **kwargs)
        return all_gather(self.module(shard(z, 0), *args, **kwargs)).flatten(0, 1)
