"""Exchanges between the GPUs of one host through each other's memory: copy engines move, and every multiprocessor goes
on computing.

NCCL's exchanges are kernels. Beside a product that fills the GPU they would wait for its end, or it for theirs. Here
each GPU has a mailbox, memory that the others write into by plain copies (PyTorch's symmetric memory, over NVLink or
PCIe), on a stream of its own, and a flag on each GPU says that all have arrived. On two H100s it is also faster:
results/h100/gpus_2_link.json.
"""

import os
from collections.abc import Callable

import torch
import torch.distributed as dist
import torch.distributed._symmetric_memory as symmetric_memory
from torch import Tensor


class Mailboxes:
    """One for each kind of exchange and each size. All GPUs make theirs in the same order, and not while a CUDA graph
    is recorded.

    A mailbox is written into again by the next exchange of its kind. Two kinds that take turns make that safe: whoever
    sends the next one has everyone's answer of the kind in between, sent after the last one was read.
    """

    def __init__(self):
        self.stream = torch.cuda.Stream()
        self.boxes: dict[tuple, tuple] = {}

    def start(self, x: Tensor, kind: str) -> Callable[[], Tensor]:
        """Sends part i of x (N, ...), contiguous, to GPU i. Returns what waits, on the current stream, for the part
        from each GPU, and gives them: (N, ...), until the next exchange of this kind."""
        gpus, size, rank = len(x), x[0].numel() * x.element_size(), dist.get_rank()
        if (kind, size) not in self.boxes:
            mine = symmetric_memory.empty(gpus * size, dtype=torch.uint8, device=x.device)
            self.boxes[kind, size] = mine, symmetric_memory.rendezvous(mine, dist.group.WORLD)
        mine, handle = self.boxes[kind, size]
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


def mailboxes() -> Mailboxes | None:
    """Mailboxes on the current GPU, if all processes are of this host and every GPU can write into the others' memory;
    else None."""
    own, here = torch.cuda.current_device(), os.environ.get("LOCAL_WORLD_SIZE") == os.environ.get("WORLD_SIZE")
    works = torch.zeros(1, device="cuda")
    if here and all(torch.cuda.can_device_access_peer(own, i) for i in range(dist.get_world_size()) if i != own):
        try:
            mine = symmetric_memory.empty(16, dtype=torch.uint8, device=torch.device("cuda", own))
            symmetric_memory.rendezvous(mine, dist.group.WORLD)
            works += 1
        except RuntimeError:
            pass  # a container may forbid it
    dist.all_reduce(works, dist.ReduceOp.MIN)
    return Mailboxes() if works.item() else None
