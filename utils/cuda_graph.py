"""CUDA graphs: records a module's GPU work once per input signature (shapes, dtypes, values), then replays it."""

import sys
from collections import OrderedDict
from contextlib import contextmanager
from itertools import chain

import torch
from torch.utils._pytree import tree_flatten, tree_unflatten


def signature(args: tuple, kwargs: dict) -> tuple:
    """The key of a call: calls with equal keys share a CUDA graph.

    The key has the tree of positional and named arguments, the shape, dtype and device of each tensor, and the type and
    value of every other argument. Strides do not count, because each recording copies its inputs into its own buffers.
    Keys must be compared exactly, not as hashes alone.

    Raises:
        TypeError: an argument is neither a tensor nor hashable.
    """
    leaves, tree = tree_flatten((args, kwargs))
    described = tuple((tuple(x.shape), x.dtype, x.device) if isinstance(x, torch.Tensor) else (type(x), x)
                      for x in leaves)
    hash(described)
    return repr(tree), described


class _Recording:
    """One CUDA graph, its static input buffers, and the output tensors that each replay overwrites."""

    def __init__(self, module: torch.nn.Module, args: tuple, kwargs: dict, pool, stream: torch.cuda.Stream):
        leaves, tree = tree_flatten((args, kwargs))
        static = [x.clone(memory_format=torch.contiguous_format) if isinstance(x, torch.Tensor) else x for x in leaves]
        self.inputs = [x for x in static if isinstance(x, torch.Tensor)]
        static_args, static_kwargs = tree_unflatten(static, tree)

        # A recording must not include compilation, autotuning or the creation of library handles, so the module runs
        # twice first. Warm-up and recording use their own stream, because nothing may run on the default stream.
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(2):
                module(*static_args, **static_kwargs)
        torch.cuda.current_stream().wait_stream(stream)
        torch.cuda.synchronize()
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph, pool=pool, stream=stream, capture_error_mode="thread_local"):
            outputs = module(*static_args, **static_kwargs)
        self.outputs, self.output_tree = tree_flatten(outputs)

    def replay(self, args: tuple, kwargs: dict):
        """Copies the inputs into the static buffers, replays the graph, and returns copies of the outputs."""
        leaves, _ = tree_flatten((args, kwargs))
        torch._foreach_copy_(self.inputs, [x for x in leaves if isinstance(x, torch.Tensor)])
        self.graph.replay()
        return self._copied_outputs()

    def _copied_outputs(self):
        # The next replay of this graph, or of another that shares its memory pool, overwrites these tensors.
        copies = [x.clone() if isinstance(x, torch.Tensor) else x for x in self.outputs]
        return tree_unflatten(copies, self.output_tree)


class ModuleProxy(torch.nn.Module):
    """Replaces `module` in a pipeline and forwards unknown attributes (config, cache_context, ...) to it.

    The module is not registered as a submodule. diffusers walks through all submodules of all models about ten times
    per image to find their device. Once a model is a single graph replay, this walk takes longer than some of the work.
    """

    def __init__(self, module: torch.nn.Module):
        super().__init__()
        object.__setattr__(self, "module", module)
        weight = module if isinstance(module, ModuleProxy) else next(chain(module.parameters(), module.buffers()))
        self.device, self.dtype = weight.device, weight.dtype

    def _reset_stateful_cache(self, recurse: bool = True) -> None:
        """Does nothing. diffusers calls it after each image to clear hooks, which a recorded module cannot have."""

    def __getattr__(self, name):
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.__dict__["module"], name)


class CUDAGraphModule(ModuleProxy):
    """Runs `module` as CUDA graphs, one for each `signature` of its calls.

    The weights must not move, because a graph holds their addresses. The module must not wait for the GPU or branch on
    its results.

    Args:
        module: the module to record. Its outputs may be any tree of tensors; the caller gets copies.
        pool: a memory pool that several modules share (`torch.cuda.graph_pool_handle()`). Sharing is safe, because the
            outputs are copied before another graph can be replayed on the stream.
        max_graphs: beyond this number the least recently used recording is dropped. The first time, a line on stderr
            says so.
    """

    may_record = True  # False within `recording_is_an_error`

    def __init__(self, module: torch.nn.Module, pool=None, max_graphs: int = 8):
        super().__init__(module)
        self.pool = pool
        self.max_graphs = max_graphs
        self.has_dropped = False
        # Each module records on its own stream: cuBLAS has one workspace per stream, and T5 and CLIP run concurrently.
        self.stream = None
        self.recordings: OrderedDict[tuple, _Recording] = OrderedDict()

    def forward(self, *args, **kwargs):
        """Replays the graph of this call's `signature`; the first call of a signature records it (about one second).

        Args:
            args, kwargs: the module's arguments. Tensors may have any strides. Other arguments must be hashable.

        Returns:
            The module's outputs, as copies that later replays do not overwrite.

        Raises:
            RuntimeError: the call would record a graph within `recording_is_an_error`.
            TypeError: an argument is neither a tensor nor hashable.
        """
        key = signature(args, kwargs)
        recording = self.recordings.get(key)
        if recording is None:
            if not self.may_record:
                raise RuntimeError(f"{type(self.module).__name__} would record a CUDA graph within "
                                   f"recording_is_an_error: none of its {len(self.recordings)} recordings has the "
                                   f"signature {key}")
            if len(self.recordings) >= self.max_graphs:
                if not self.has_dropped:
                    print(f"CUDA graphs of {type(self.module).__name__}: more than {self.max_graphs} input signatures. "
                          "From now on the least recently used graph is dropped; to record it again takes about a "
                          "second.", file=sys.stderr)
                self.has_dropped = True
                self.recordings.popitem(last=False)
            self.stream = self.stream or torch.cuda.Stream()
            recording = self.recordings[key] = _Recording(self.module, args, kwargs, self.pool, self.stream)
        self.recordings.move_to_end(key)
        return recording.replay(args, kwargs)


@contextmanager
def recording_is_an_error():
    """Within this context, a `CUDAGraphModule` raises RuntimeError instead of recording a graph.

    Benchmarks use it to prove that no timed call includes a recording. torch's `error_on_recompile` is the equivalent
    for compilation.
    """
    CUDAGraphModule.may_record = False
    try:
        yield
    finally:
        CUDAGraphModule.may_record = True
