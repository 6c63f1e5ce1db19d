"""Measures the rate between this host's GPUs, and estimates sequence parallelism's bytes and step time.

    torchrun --nproc_per_node=2 -m bench.link
"""

import argparse
import json
import statistics

import torch
import torch.distributed as dist

from utils.common import RecipeError, run_cli
from utils.context_parallel import _pass_on, all_to_all, init_distributed, is_main_process
from utils.launchers import world_size


def bytes_sent(kind: str, config: dict, image_tokens: int, text_tokens: int, gpus: int, batch: int = 1,
               qkv_bytes: int = 1, back_bytes: int = 1) -> dict[str, int]:
    """Returns the bytes that each GPU sends in a step, {"attention", "output"}. Each GPU receives as many.

    Each of N GPUs has a shard of t = S / N tokens of D channels. With Ulysses, a GPU keeps 1/N of its q, k, v and
    attention result and sends the rest: (N - 1) / N t D (3 qkv_bytes + back_bytes) per block. In a ring, a GPU passes
    on k and v of N - 1 shards: (N - 1) t D 2 qkv_bytes per block. Each GPU sends its output, in bf16, to the N - 1
    other GPUs.

    Args:
        kind: "ulysses" or "ring".
        config: of the transformer.
        gpus: N.
        qkv_bytes: of an element of q, k and v: 1 with fp8 attention.
        back_bytes: of an element of attention's result: 1 with the fused kernels, else 2.
    """
    width = config["attention_head_dim"] * config["num_attention_heads"]
    blocks = config["num_layers"] + config["num_single_layers"]
    elements = batch * (image_tokens + text_tokens) * width * (gpus - 1) // gpus
    block = elements * (3 * qkv_bytes + back_bytes) // gpus if kind == "ulysses" else elements * 2 * qkv_bytes
    output = batch * image_tokens * (config.get("out_channels") or config["in_channels"]) * 2 * (gpus - 1) // gpus
    return {"attention": blocks * block, "output": output}


def expected_step(one_gpu: dict[str, float], sent: int, gpus: int, rate: float, latencies: float) -> float:
    """Returns the expected seconds of a step on `gpus` GPUs.

    It assumes that GEMMs scale with their rows. In fact smaller GEMMs use a GPU less well.

    Args:
        one_gpu: seconds of a step on one GPU: "shared" is divided among the GPUs, and "fixed" runs on each.
        sent: bytes that each GPU sends and waits for, from `bytes_sent`. Leave out transfers that overlap with compute:
            a single block's q, k and v with `utils.kernels.symmetric_memory`, and transfers behind attention in a ring.
        rate: bytes per second, from `measure`.
        latencies: seconds of all exchanges together, apart from their bytes, from `measure`. Ulysses has two exchanges
            per block, and a ring has N - 1.
    """
    return one_gpu["shared"] / gpus + one_gpu["fixed"] + sent / rate + latencies


def measure() -> dict:
    """Measures this host's exchanges between GPUs, in a CUDA graph as in a step.

    The exchanges are those of one block of FLUX.1-dev at 1024x1024 with the fused kernels: "qkv" is the all-to-all of
    q, k and v. "back" is the all-to-all of attention's result. "nothing" moves 16 bytes to each GPU and measures the
    latency. "ring" passes k and v on to the next GPU. All run by NCCL. The first three also run through peer memory, if
    the host supports it (`utils.kernels.symmetric_memory`), where "back" includes its cast.

    Returns:
        For "nccl" and "peer memory", by exchange: the median "ms", the "bytes" that each GPU sends, and "gb_s".
    """
    from utils.kernels.symmetric_memory import mailboxes

    gpus, heads, head = dist.get_world_size(), 24, 128
    shard_tokens = (4096 + 512) // gpus
    keys = torch.empty(2, 1, shard_tokens, heads, head, dtype=torch.uint8, device="cuda")

    qkv, back, nothing = (torch.empty(gpus, size, dtype=torch.uint8, device="cuda")
                          for size in (keys[0].numel() * 3 // gpus, keys[0].numel() // gpus, 16))
    sizes = {"qkv": qkv.numel() - qkv[0].numel(), "back": back.numel() - back[0].numel(), "nothing": 16 * (gpus - 1)}
    calls = {"nccl": {
        "qkv": lambda: all_to_all(qkv), "back": lambda: all_to_all(back), "nothing": lambda: all_to_all(nothing),
        "ring": lambda: _pass_on(keys, torch.empty_like(keys)).wait()}}
    if boxes := mailboxes():
        attended = torch.randn(1, shard_tokens * gpus, heads * head // gpus, dtype=torch.bfloat16, device="cuda")
        scale = torch.ones(1, device="cuda")
        calls["peer memory"] = {  # repeating one exchange overwrites its buffers, which is safe because no kernel reads
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
    """Returns the median milliseconds of one call, from `replays` of a CUDA graph with `times` calls.

    Every GPU must make the same number of calls, so that an adaptive timer such as Triton's would hang.
    """
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
        raise RecipeError("bench.link measures transfers between GPUs and needs at least two. Run torchrun "
                          "--nproc_per_node=2 -m bench.link")
    init_distributed(argparse.Namespace(device="cuda", quiet=True))
    found = measure()
    if is_main_process():
        print(json.dumps(found))


if __name__ == "__main__":
    run_cli(main)
