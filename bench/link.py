"""What sequence parallelism costs: bytes sent, the expected time of a step, and the rate between this host's GPUs.

    torchrun --nproc_per_node=2 -m bench.link
"""

import argparse
import json
import statistics

import torch
import torch.distributed as dist

from utils.common import RecipeError, run_cli
from utils.context_parallel import _pass_on, all_to_all, init_distributed, is_main_process
from utils.machine import world_size


def bytes_sent(kind: str, config: dict, image_tokens: int, text_tokens: int, gpus: int, batch: int = 1,
               qkv_bytes: int = 1, back_bytes: int = 1) -> dict[str, int]:
    """Bytes that each GPU sends in a step, {"attention", "output"}; it receives as many.

    A GPU has t = S / N tokens of D channels. With Ulysses it keeps 1/N of q, k and v and sends the rest, and the same
    of what attention made: (N - 1) / N t D (3 qkv_bytes + back_bytes) a block. In a ring k and v, its own and N - 2
    others', go on: (N - 1) t D 2 qkv_bytes. The output, bf16, goes to the N - 1 others.

    Args:
        config: of the transformer; qkv_bytes, back_bytes: of an element of q, k, v and of attention's result: 1 with
            the fused kernels; 1 and 2 with fp8 attention without them.
    """
    width = config["attention_head_dim"] * config["num_attention_heads"]
    blocks = config["num_layers"] + config["num_single_layers"]
    elements = batch * (image_tokens + text_tokens) * width * (gpus - 1) // gpus
    block = elements * (3 * qkv_bytes + back_bytes) // gpus if kind == "ulysses" else elements * 2 * qkv_bytes
    output = batch * image_tokens * (config.get("out_channels") or config["in_channels"]) * 2 * (gpus - 1) // gpus
    return {"attention": blocks * block, "output": output}


def expected_step(one_gpu: dict[str, float], sent: int, gpus: int, rate: float, latencies: float) -> float:
    """Seconds of a step on `gpus` GPUs, if products of fewer rows took their share of the time. They fill a GPU less.

    Args:
        one_gpu: seconds of a step on one GPU, {"shared", "fixed"}: what is shared out, and what each GPU does anyway.
        sent: bytes that each GPU sends (`bytes_sent`), without what nothing waits for: q, k and v of a single block
            with `utils.kernels.symmetric_memory`, and what attention hides in a ring.
        rate: bytes a second. latencies: seconds, of all exchanges together, that they take whatever they move: two a
            block with Ulysses, N - 1 in a ring. Both follow from what `measure` finds.
    """
    return one_gpu["shared"] / gpus + one_gpu["fixed"] + sent / rate + latencies


def measure() -> dict:
    """What this machine's exchanges take, in a CUDA graph as in a step: q, k, v and the way back of one block of
    FLUX.1-dev at 1024x1024 on the fused kernels, and next to nothing, by NCCL and, where that can be, through each
    other's memory (`utils.kernels.symmetric_memory`; the way back with its cast); a shift of the ring by NCCL. Medians
    of milliseconds; bytes that each GPU sends, and GB a second."""
    from utils.kernels.symmetric_memory import mailboxes

    gpus, heads, head = dist.get_world_size(), 24, 128
    own = (4096 + 512) // gpus
    keys = torch.empty(2, 1, own, heads, head, dtype=torch.uint8, device="cuda")

    qkv, back, nothing = (torch.empty(gpus, size, dtype=torch.uint8, device="cuda")
                          for size in (keys[0].numel() * 3 // gpus, keys[0].numel() // gpus, 16))
    sizes = {"qkv": qkv.numel() - qkv[0].numel(), "back": back.numel() - back[0].numel(), "nothing": 16 * (gpus - 1)}
    calls = {"nccl": {
        "qkv": lambda: all_to_all(qkv), "back": lambda: all_to_all(back), "nothing": lambda: all_to_all(nothing),
        "ring": lambda: _pass_on(keys, torch.empty_like(keys)).wait()}}
    if boxes := mailboxes():
        attended = torch.randn(1, own * gpus, heads * head // gpus, dtype=torch.bfloat16, device="cuda")
        scale = torch.ones(1, device="cuda")
        calls["peer memory"] = {  # one kind after itself, which is safe where nobody reads
            "qkv": lambda: boxes.start(qkv, "qkv")(), "back": lambda: boxes.send_attention(attended, scale),
            "nothing": lambda: boxes.start(nothing, "nothing")()}
    found = {"gpu": torch.cuda.get_device_name(), "gpus": gpus}
    for way, named in calls.items():
        found[way] = {}
        for name, call in named.items():
            milliseconds, sent = _replayed_ms(call), sizes.get(name, keys.numel())
            found[way][name] = {"ms": milliseconds, "bytes": sent, "gb_s": sent / milliseconds / 1e6}
    return found


def _replayed_ms(call, times: int = 100, replays: int = 11) -> float:
    """Of one of `times` calls in a graph. As many calls on every GPU: a timer that decides by itself would not end."""
    stream, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
    with torch.cuda.stream(stream):
        for _ in range(3):
            call()
    torch.cuda.synchronize()
    with torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
        for _ in range(times):
            call()
    found = []
    for _ in range(replays):
        events = [torch.cuda.Event(enable_timing=True) for _ in range(2)]
        events[0].record()
        graph.replay()
        events[1].record()
        torch.cuda.synchronize()
        found.append(events[0].elapsed_time(events[1]) / times)
    return statistics.median(found)


def main() -> None:
    if world_size() == 1 or not torch.cuda.is_available():
        raise RecipeError("this measures what moves between GPUs: torchrun --nproc_per_node=2 -m bench.link")
    init_distributed(argparse.Namespace(device="cuda", quiet=True))
    found = measure()
    if is_main_process():
        print(json.dumps(found))


if __name__ == "__main__":
    run_cli(main)
