"""One phase of a training: optimisers, schedule, average of the weights, budget, checkpoint, log."""

import json
import math
import os
import random
import time
from collections import defaultdict
from dataclasses import dataclass, field
from pathlib import Path

import torch
from tqdm import tqdm

EMA = 0.999
LEARNING_RATES = {"vae": 2e-3, "flow": 2e-3, "guidance": 3e-4}


@dataclass(frozen=True)
class Settings:
    """What a CPU needs smaller. A flow batch has about `tokens` tokens, text and pictures together."""
    minutes: dict = field(default_factory=lambda: {"vae": 3.8, "flow": 8.0, "guidance": 1.4})
    steps: float = math.inf
    emoji: int | None = None
    poses: dict = field(default_factory=lambda: {128: 6, 256: 1})
    pictures: int = 128
    tokens: int = 24_576
    log_every: int = 100
    save_every_s: float = 60.0


SMOKE = Settings(steps=20, emoji=12, poses={128: 2, 256: 1}, pictures=8, tokens=1024, log_every=5)


class Muon(torch.optim.Optimizer):
    """torch.optim.Muon with adjust_lr_fn="match_rms_adamw", where matrices of one shape are orthogonalised together:
    some 10 batched products a step instead of 100 chains of small ones, which would wait for the CPU to launch them.
    """

    def __init__(self, params, lr: float, momentum: float = 0.95, weight_decay: float = 0.01):
        super().__init__(params, dict(lr=lr, momentum=momentum, weight_decay=weight_decay))

    @torch.no_grad()
    def step(self) -> None:
        for group in self.param_groups:
            by_shape = defaultdict(list)
            for parameter in group["params"]:
                if parameter.grad is not None:
                    by_shape[parameter.shape].append(parameter)
            for shape, parameters in by_shape.items():
                gradients = [p.grad for p in parameters]
                buffers = [self.state[p].setdefault("momentum_buffer", torch.zeros_like(p)) for p in parameters]
                torch._foreach_lerp_(buffers, gradients, 1 - group["momentum"])
                update = orthogonalize(torch.stack(torch._foreach_lerp(gradients, buffers, group["momentum"])))
                torch._foreach_mul_(parameters, 1 - group["lr"] * group["weight_decay"])
                torch._foreach_add_(parameters, list(update.float() * (-group["lr"] * 0.2 * max(shape) ** 0.5)))


def orthogonalize(matrices: torch.Tensor) -> torch.Tensor:
    """(N, rows, columns) -> the same with all singular values near 1: five Newton-Schulz steps in bf16 (Muon)."""
    x = matrices.bfloat16()
    if tall := x.shape[1] > x.shape[2]:
        x = x.mT
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)
    for _ in range(5):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=-4.7750, alpha=2.0315), x, beta=3.4445)
    return x.mT if tall else x


def optimizers(module: torch.nn.Module, lr: torch.Tensor) -> list[torch.optim.Optimizer]:
    """Muon for the matrices of the blocks, AdamW for embeddings, in- and output, norms and biases.

    All share the tensor `lr` (), which a CUDA graph reads anew at every replay.
    """
    trained = {name: p for name, p in module.named_parameters() if p.requires_grad}
    hidden = {name for name, p in trained.items()
              if p.ndim == 2 and ("block" in name or "layers" in name) and "relative_attention_bias" not in name}
    rest = [p for name, p in trained.items() if name not in hidden]
    on_gpu = rest[0].is_cuda
    adamw = torch.optim.AdamW(rest, lr=lr, betas=(0.9, 0.98), weight_decay=0.01, fused=on_gpu, capturable=on_gpu)
    return [adamw, *([Muon([trained[name] for name in sorted(hidden)], lr=lr)] if hidden else [])]


def lr_factor(step: int, progress: float, warmup: int = 100) -> float:
    """Warm-up, stable for 60 % of the budget, then linear decay to 2 %."""
    return min(1.0, (step + 1) / warmup) * min(1.0, max(0.02, (1 - progress) / 0.4))


def ema_weight(step: int) -> float:
    """What the newest weights count for in their average; a young one forgets faster."""
    return 1 - min(EMA, (1 + step) / (10 + step))


def ema_update(averages: list[torch.Tensor], parameters: list[torch.Tensor], weight: torch.Tensor) -> None:
    """In place; weight: ()."""
    change = torch._foreach_sub(parameters, averages)
    torch._foreach_mul_(change, weight)
    torch._foreach_add_(averages, change)


class Steps:
    """Runs `function` on batches (name to tensor), each kind of batch in a CUDA graph of its own after two eager calls.

    A step is some 700 small kernels: launched one by one they take 75 ms on an H100, whatever the batch.
    """

    def __init__(self, function, graphs: bool):
        self.function, self.graphs = function, graphs
        self.calls: dict[str, int] = defaultdict(int)
        self.recorded: dict[str, tuple] = {}
        self.stream = torch.cuda.Stream() if graphs else None

    def __call__(self, kind: str, batch: dict[str, torch.Tensor]) -> tuple[torch.Tensor, ...]:
        self.calls[kind] += 1
        if not self.graphs:
            return self.function(batch)
        if kind not in self.recorded:
            # Compilation, autotuning and the optimisers' state belong before the recording, on the recording's stream.
            self.stream.wait_stream(torch.cuda.current_stream())
            if self.calls[kind] <= 2:
                with torch.cuda.stream(self.stream):
                    outputs = self.function(batch)
                torch.cuda.current_stream().wait_stream(self.stream)
                return outputs
            graph = torch.cuda.CUDAGraph()
            inputs = {name: x.clone() for name, x in batch.items()}
            with torch.cuda.graph(graph, stream=self.stream):
                outputs = self.function(inputs)
            self.recorded[kind] = graph, inputs, outputs
        graph, inputs, outputs = self.recorded[kind]
        torch._foreach_copy_(list(inputs.values()), [batch[name] for name in inputs])
        graph.replay()
        return tuple(x.clone() for x in outputs)


def hold(pause: Path) -> float:
    """Waits while the file `pause` exists, which leaves the GPU to a measurement. Returns the seconds waited."""
    began = time.perf_counter()
    while pause.exists():
        time.sleep(0.1)
    return time.perf_counter() - began


class OutOfTime(Exception):
    """The time of this call is up, the phase is not done: its checkpoint is written."""


def run_phase(name: str, module: torch.nn.Module, draw_batch, loss_of, settings: Settings, args) -> None:
    """Trains `module` until its budget is spent and leaves its average in `args.run`.

    Args:
        draw_batch: (generator on the device, random.Random) -> (name to tensor, batch size, what the batch is like).
        loss_of: (name to tensor) -> loss; the same computation for every batch of one kind, since it is recorded.
    """
    parameters = [p for p in module.parameters() if p.requires_grad]
    averages = [p.detach().clone() for p in parameters]
    rate, weight = (torch.zeros((), device=args.device) for _ in range(2))
    optimizers_ = optimizers(module, rate)
    step, seconds = 0, 0.0
    if (state := load_state(args.run, name)) is not None:
        step, seconds = state["step"], state["seconds"]
        for own, saved in (*zip(parameters, state["parameters"], strict=True),
                           *zip(averages, state["averages"], strict=True)):
            own.data.copy_(saved)
        for optimizer, saved in zip(optimizers_, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
            for group in optimizer.param_groups:
                group["lr"] = rate

    def advance(batch: dict[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        for optimizer in optimizers_:
            optimizer.zero_grad(set_to_none=True)
        loss = loss_of(batch)
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        for optimizer in optimizers_:
            optimizer.step()
        ema_update(averages, [p.detach() for p in parameters], weight)
        return loss.detach(), norm.detach()

    def save(done: bool) -> None:
        saved = {"parameters": [p.detach() for p in parameters], "averages": averages, "step": step,
                 "seconds": seconds, "optimizers": [o.state_dict() for o in optimizers_], "done": done}
        torch.save(saved, args.run / f"{name}.tmp")
        os.replace(args.run / f"{name}.tmp", args.run / f"{name}.pt")

    steps = Steps(advance, args.device == "cuda" and not args.disable_cudagraphs)
    generator = torch.Generator(args.device)
    limit_s, losses, count, since, saved_at = settings.minutes[name] * 60, [], 0, time.perf_counter(), time.monotonic()
    with tqdm(total=100, desc=name, bar_format="{desc}: {percentage:3.0f}%|{bar}| {elapsed}{postfix}") as bar, \
            open(args.run / "log.jsonl", "a") as log:
        while True:
            since += hold(args.run / "pause")
            began = time.perf_counter()
            progress = max(seconds / limit_s, step / settings.steps)
            if progress >= 1:
                break
            generator.manual_seed(args.seed * 1_000_003 + step)
            batch, size, kind = draw_batch(generator, random.Random(f"{args.seed} {step}"))
            factor = lr_factor(step, progress)
            rate.fill_(LEARNING_RATES[name] * factor)
            weight.fill_(ema_weight(step))
            loss, norm = steps(kind, batch)
            losses.append(loss)
            step, count = step + 1, count + size
            if step % settings.log_every == 0:
                mean, now = torch.stack(losses).mean().item(), time.perf_counter()
                if not math.isfinite(mean):
                    raise RuntimeError(f"{name}: the loss is {mean} at step {step}.")
                line = {"phase": name, "step": step, "seconds": round(seconds + now - began, 1), "loss": round(mean, 5),
                        "lr_factor": round(factor, 4), "gradient": round(norm.item(), 3),
                        "samples_per_s": round(count / (now - since), 1), "bucket": kind}
                log.write(json.dumps(line) + "\n")
                log.flush()
                bar.set_postfix({key: line[key] for key in ("step", "loss", "samples_per_s")})
                losses, count, since = [], 0, now
            seconds += time.perf_counter() - began
            bar.update(min(100.0, 100 * max(seconds / limit_s, step / settings.steps)) - bar.n)
            if time.monotonic() > args.deadline:
                save(done=False)
                raise OutOfTime(f"{name}: step {step} saved; call again to go on.")
            if time.monotonic() - saved_at > settings.save_every_s:
                save(done=False)
                saved_at = time.monotonic()
    save(done=True)


def load_state(run: Path, name: str, done: bool = False) -> dict | None:
    """A phase's checkpoint, or None; with `done`, one that is finished or an error."""
    path = run / f"{name}.pt"
    state = torch.load(path, map_location="cpu") if path.exists() else None
    if done and not (state and state["done"]):
        raise SystemExit(f"Phase {name} is not done in {run}: run it first.")
    return state


def load_averages(run: Path, name: str, module: torch.nn.Module, done: bool = True) -> None:
    """Into what of `module` the phase trained, which is what still requires gradients."""
    trained = [p for p in module.parameters() if p.requires_grad]
    for own, saved in zip(trained, load_state(run, name, done)["averages"], strict=True):
        own.data.copy_(saved)
