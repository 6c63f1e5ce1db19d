"""All-to-all between the GPUs of one host through PyTorch's symmetric memory.

Every GPU has mailboxes that the other GPUs write into. Then a barrier, a kernel of one thread block, signals that all
parts have arrived.

Copy engines copy q, k and v on a second CUDA stream. In a single block, every SM (streaming multiprocessor) meanwhile
computes the MLP's first GEMM. NCCL's collectives are kernels of several thread blocks: they would wait for that GEMM to
end, or the GEMM would wait for them. Attention's result has nothing to overlap with on its way back. The kernel that
casts it therefore writes directly into the memory of the other GPUs. On two H100s, both exchanges are also faster by
themselves: results/h100/2026-11/gpus_2_link.json.
"""

import os
from collections.abc import Callable
from contextlib import suppress

import torch
import torch.distributed as dist
import torch.distributed._symmetric_memory as symmetric_memory
from torch import Tensor

from utils.kernels.casts import send_attention
from utils.kernels.formats import E4M3


class SymmetricAllToAll:
    """All-to-all with one mailbox for each kind of exchange and each size.

    All GPUs must create their mailboxes in the same order, and never while a CUDA graph is recorded.

    Two kinds of exchange must alternate, and the result of an exchange must be read before the next exchange starts.
    Then no GPU writes into a mailbox too early. A GPU that starts the next exchange of a kind has passed the barrier of
    the other kind in between. Every GPU reaches that barrier only after it has read the previous result.
    """

    def __init__(self):
        self.stream = torch.cuda.Stream()
        self.boxes: dict[tuple, tuple] = {}

    def box(self, kind: str, size: int) -> tuple:
        """The mailbox for a kind of exchange and a size, created at the first call.

        Args:
            kind: name of the exchange.
            size: bytes that each GPU sends to each GPU.

        Returns:
            This GPU's memory, (N * size,) uint8, for N GPUs; the handle to the memory of all GPUs; the addresses of
            that memory, (N,) int64.
        """
        if (kind, size) not in self.boxes:
            gpus = dist.get_world_size()
            mine = symmetric_memory.empty(gpus * size, dtype=torch.uint8, device=self.stream.device)
            handle = symmetric_memory.rendezvous(mine, dist.group.WORLD)
            addresses = [handle.get_buffer(i, mine.shape, torch.uint8).data_ptr() for i in range(gpus)]
            self.boxes[kind, size] = mine, handle, torch.tensor(addresses, device=mine.device)
        return self.boxes[kind, size]

    def start(self, x: Tensor, kind: str) -> Callable[[], Tensor]:
        """Starts to send part i of x to GPU i, on a second CUDA stream.

        Args:
            x: (N, ...), contiguous, any dtype.
            kind: name of the exchange.

        Returns:
            A function that makes the current stream wait for all parts and returns them, (N, ...), part i from GPU i.
            They must be read before anything else is sent.
        """
        gpus, size, rank = len(x), x[0].numel() * x.element_size(), dist.get_rank()
        mine, handle, _ = self.box(kind, size)
        self.stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self.stream):
            # Each GPU starts with a different peer, so that the GPUs do not all write into the same one at once.
            for peer in ((rank + i) % gpus for i in range(1, gpus + 1)):
                handle.get_buffer(peer, (size,), torch.uint8, rank * size).copy_(x[peer].view(torch.uint8).view(-1))
            handle.barrier()

        def wait() -> Tensor:  # holds x until then: no other tensor may reuse its memory
            torch.cuda.current_stream().wait_stream(self.stream)
            return mine.view(x.dtype).view(x.shape)

        return wait

    def send_attention(self, attention: Tensor, scale: Tensor) -> Tensor:
        """Casts attention's result to e4m3 and writes each GPU's tokens into its mailbox.

        Args:
            attention: (B, S, D / N) bf16: all tokens and this GPU's heads.
            scale: (B,) float32, the scale of each batch item.

        Returns:
            (N, B, S / N, D / N) e4m3: this GPU's tokens, where part i holds the heads of GPU i. It must be read before
            anything else is sent.
        """
        gpus, (B, tokens, width) = dist.get_world_size(), attention.shape
        mine, handle, addresses = self.box("attention", B * tokens // gpus * width)
        send_attention(attention, scale, addresses, dist.get_rank())
        handle.barrier()
        return mine.view(E4M3).view(gpus, B, tokens // gpus, width)


def mailboxes() -> SymmetricAllToAll | None:
    """A `SymmetricAllToAll` on the current GPU, or None if the GPUs cannot write into each other's memory.

    All processes must run on one host, and every GPU must have peer access to all others.
    """
    own, mine = torch.device("cuda", torch.cuda.current_device()), None
    others = [i for i in range(dist.get_world_size()) if i != own.index]
    if (os.environ.get("LOCAL_WORLD_SIZE") == os.environ.get("WORLD_SIZE")
            and all(torch.cuda.can_device_access_peer(own, i) for i in others)):
        with suppress(RuntimeError):  # a container may forbid symmetric memory
            mine = symmetric_memory.empty(16, dtype=torch.uint8, device=own)
    if not _of_all(mine is not None):
        return None
    try:
        symmetric_memory.rendezvous(mine, dist.group.WORLD)
        works = True
    except RuntimeError:
        works = False
    return SymmetricAllToAll() if _of_all(works) else None


def _of_all(fine: bool) -> bool:
    """Whether `fine` holds in every process.

    All processes must take part in a rendezvous, so no process may go on alone.
    """
    found = torch.tensor(int(fine), device="cuda")
    dist.all_reduce(found, dist.ReduceOp.MIN)
    return bool(found.item())
