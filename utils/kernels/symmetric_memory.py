"""Exchanges between the GPUs of one host through each other's memory (PyTorch's symmetric memory). Every GPU has
mailboxes that the others write into; then a barrier, a kernel of one block, says that all have arrived.

q, k and v are copied, on a second stream: copy engines move them, and in a single block every multiprocessor goes on
with the MLP's first product. NCCL's exchanges are kernels of several blocks, which would wait for that product's end,
or it for theirs. On the way back nothing is left to do meanwhile: the kernel that casts attention's result writes it
right into the others' memory. On two H100s both are also faster by themselves: results/h100/2026-11/gpus_2_link.json.
"""

import os
from collections.abc import Callable
from contextlib import suppress

import torch
import torch.distributed as dist
import torch.distributed._symmetric_memory as symmetric_memory
from torch import Tensor

from utils.kernels.fused_kernels import E4M3, send_attention


class SymmetricAllToAll:
    """One for each kind of exchange and each size. All GPUs make theirs in the same order, and not while a CUDA graph
    is recorded.

    Two kinds have to take turns, and what an exchange gave has to be read before the next one starts. Then no mailbox
    is written into too early: whoever sends the next one of a kind has passed the barrier of the kind in between, which
    every GPU reaches only after it has read what it got before.
    """

    def __init__(self):
        self.stream = torch.cuda.Stream()
        self.boxes: dict[tuple, tuple] = {}

    def box(self, kind: str, size: int) -> tuple:
        """Memory of this GPU for `size` bytes from each; its handle, of everyone's; the addresses of everyone's."""
        if (kind, size) not in self.boxes:
            gpus = dist.get_world_size()
            mine = symmetric_memory.empty(gpus * size, dtype=torch.uint8, device=self.stream.device)
            handle = symmetric_memory.rendezvous(mine, dist.group.WORLD)
            addresses = [handle.get_buffer(i, mine.shape, torch.uint8).data_ptr() for i in range(gpus)]
            self.boxes[kind, size] = mine, handle, torch.tensor(addresses, device=mine.device)
        return self.boxes[kind, size]

    def start(self, x: Tensor, kind: str) -> Callable[[], Tensor]:
        """Sends part i of x (N, ...), contiguous, to GPU i. Returns what waits, on the current stream, for the part
        from each GPU, and gives them: (N, ...), to be read before anything else is sent."""
        gpus, size, rank = len(x), x[0].numel() * x.element_size(), dist.get_rank()
        mine, handle, _ = self.box(kind, size)
        self.stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self.stream):
            # Each begins with another one, so that no GPU is written into by all others at once.
            for peer in ((rank + i) % gpus for i in range(1, gpus + 1)):
                handle.get_buffer(peer, (size,), torch.uint8, rank * size).copy_(x[peer].view(torch.uint8).view(-1))
            handle.barrier()

        def wait() -> Tensor:  # keeps x until then: its memory must not become another tensor's meanwhile
            torch.cuda.current_stream().wait_stream(self.stream)
            return mine.view(x.dtype).view(x.shape)

        return wait

    def send_attention(self, attention: Tensor, scale: Tensor) -> Tensor:
        """Casts attention (B, S, D / N), of all tokens and this GPU's heads, to e4m3 over the scale (B,) of its item,
        and writes each GPU's tokens into its mailbox.

        Returns (N, B, S / N, D / N) e4m3, of this GPU's tokens and all heads, part by part, to be read before anything
        else is sent.
        """
        gpus, (B, tokens, width) = dist.get_world_size(), attention.shape
        mine, handle, addresses = self.box("attention", B * tokens // gpus * width)
        send_attention(attention, scale, addresses, dist.get_rank())
        handle.barrier()
        return mine.view(E4M3).view(gpus, B, tokens // gpus, width)


def mailboxes() -> SymmetricAllToAll | None:
    """A SymmetricAllToAll on the current GPU, if all processes are of this host and every GPU can write into the
    others' memory; else None."""
    own, mine = torch.device("cuda", torch.cuda.current_device()), None
    others = [i for i in range(dist.get_world_size()) if i != own.index]
    if (os.environ.get("LOCAL_WORLD_SIZE") == os.environ.get("WORLD_SIZE")
            and all(torch.cuda.can_device_access_peer(own, i) for i in others)):
        with suppress(RuntimeError):  # a container may forbid it
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
    """Whether it is so in every process: none may go on alone into what all have to take part in."""
    found = torch.tensor(int(fine), device="cuda")
    dist.all_reduce(found, dist.ReduceOp.MIN)
    return bool(found.item())
