"""The stages of one pipeline call as named regions: for the profiler's traces and for the stage times."""

import time
from contextlib import contextmanager

import torch


@contextmanager
def annotate(pipeline, region):
    """Within it, `pipeline` runs its stages inside `region(name)`; afterwards it is as it was.

    Args:
        region: makes a context manager from a name, such as `torch.profiler.record_function`. The names are those of
            the recipe's predecessors: prompt_encoding, denoising_step, decoding, postprocessing, pil_conversion; and
            image_encoding for Kontext's reference image.
    """
    def inside(function, name):
        def wrapped(*args, **kwargs):
            with region(name):
                return function(*args, **kwargs)
        return wrapped

    methods = [(pipeline, "encode_prompt", "prompt_encoding"), (pipeline.vae, "encode", "image_encoding"),
               (pipeline.vae, "decode", "decoding"), (pipeline.image_processor, "postprocess", "postprocessing"),
               (pipeline.image_processor, "numpy_to_pil", "pil_conversion")]
    before = [vars(owner).get(method) for owner, method, _ in methods]  # None where it is the class's
    for owner, method, name in methods:
        setattr(owner, method, inside(getattr(owner, method), name))

    # Hooks, not a patched forward: what is compiled or recorded lies below them and stays as it is.
    entered = []

    def enter(module, args):
        entered.append(region("denoising_step"))
        entered[-1].__enter__()

    def leave(module, args, output):
        entered.pop().__exit__(None, None, None)

    hooks = [pipeline.transformer.register_forward_pre_hook(enter), pipeline.transformer.register_forward_hook(leave)]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
        for (owner, method, _), own in zip(methods, before, strict=True):
            delattr(owner, method)
            if own is not None:
                setattr(owner, method, own)


class StageTimes:
    """Milliseconds of each stage, by GPU events where there is a GPU: they do not make the CPU wait.

    `timer` is the `region` that `annotate` wants; `milliseconds` is read once the GPU is done.
    """

    def __init__(self, device: str):
        self.use_events = device == "cuda"
        self.spans: dict[str, list[tuple]] = {}

    def _now(self):
        if not self.use_events:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    @contextmanager
    def timer(self, name: str):
        start = self._now()
        yield
        self.spans.setdefault(name, []).append((start, self._now()))

    def milliseconds(self) -> dict[str, list[float]]:
        """Every span of each stage, in order. Waits for the GPU."""
        if self.use_events:
            torch.cuda.synchronize()
            return {name: [start.elapsed_time(end) for start, end in spans] for name, spans in self.spans.items()}
        return {name: [(end - start) * 1e3 for start, end in spans] for name, spans in self.spans.items()}
