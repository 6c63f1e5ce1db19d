"""Marks the stages of a pipeline call as named regions, for profiler traces and stage times."""

import time
from contextlib import contextmanager

import torch


@contextmanager
def annotate(pipeline, region):
    """Context manager: `pipeline` runs each stage inside `region(name)`. The pipeline is restored afterwards.

    Args:
        region: makes a context manager from a name, such as `torch.profiler.record_function`. The names are
            prompt_encoding, denoising_step, decoding, postprocessing, pil_conversion, and image_encoding for
            pictures that the VAE encodes.
    """
    def inside(function, name):
        def wrapped(*args, **kwargs):
            with region(name):
                return function(*args, **kwargs)
        return wrapped

    methods = [(pipeline, "encode_prompt", "prompt_encoding"), (pipeline.vae, "encode", "image_encoding"),
               (pipeline.vae, "decode", "decoding"), (pipeline.image_processor, "postprocess", "postprocessing"),
               (pipeline.image_processor, "numpy_to_pil", "pil_conversion")]
    before = [vars(owner).get(method) for owner, method, _ in methods]  # None: the class has the method
    for owner, method, name in methods:
        setattr(owner, method, inside(getattr(owner, method), name))

    # Hooks instead of a patched forward leave a compiled or recorded forward unchanged.
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
        for (owner, method, _), original in zip(methods, before, strict=True):
            delattr(owner, method)
            if original is not None:
                setattr(owner, method, original)


class StageTimes:
    """Times stages in milliseconds, on a GPU with events, which do not make the CPU wait.

    Pass `timer` to `annotate` as its `region`, and call `milliseconds` at the end.
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
        """Context manager: times one span of the stage `name`."""
        start = self._now()
        yield
        self.spans.setdefault(name, []).append((start, self._now()))

    def milliseconds(self) -> dict[str, list[float]]:
        """Returns the milliseconds of every span, in order, by stage. Waits for the GPU."""
        if self.use_events:
            torch.cuda.synchronize()
            return {name: [start.elapsed_time(end) for start, end in spans] for name, spans in self.spans.items()}
        return {name: [(end - start) * 1e3 for start, end in spans] for name, spans in self.spans.items()}
