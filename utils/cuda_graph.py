"""Records what a module launches on the GPU once per kind of input, and replays it as one CUDA graph."""

import sys
from collections import OrderedDict
from contextlib import contextmanager
from itertools import chain

import torch
from torch.utils._pytree import tree_flatten, tree_unflatten


def signature(args: tuple, kwargs: dict) -> tuple:
    """What two calls must have in common to share a graph, compared exactly, never as a hash alone.

    The tree of arguments (positional and named), for each tensor its shape, dtype and device, for anything else its
    type and value. Strides do not count: inputs are copied into buffers of the recording's own.

    Raises:
        TypeError: an argument that is neither a tensor nor hashable.
    """
    leaves, tree = tree_flatten((args, kwargs))
    described = tuple((tuple(x.shape), x.dtype, x.device) if isinstance(x, torch.Tensor) else (type(x), x)
                      for x in leaves)
    hash(described)
    return repr(tree), described


class _Recording:
    """One CUDA graph with its static input buffers and the output tensors that it overwrites."""

    def __init__(self, module: torch.nn.Module, args: tuple, kwargs: dict, pool, stream: torch.cuda.Stream):
        leaves, tree = tree_flatten((args, kwargs))
        static = [x.clone(memory_format=torch.contiguous_format) if isinstance(x, torch.Tensor) else x for x in leaves]
        self.inputs = [x for x in static if isinstance(x, torch.Tensor)]
        static_args, static_kwargs = tree_unflatten(static, tree)

        # Compilation, autotuning and lazy library handles must not happen inside a recording, and nothing may run on
        # the default stream meanwhile: warm up, then record, on a stream of our own.
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
        leaves, _ = tree_flatten((args, kwargs))
        torch._foreach_copy_(self.inputs, [x for x in leaves if isinstance(x, torch.Tensor)])
        self.graph.replay()
        return self._copied_outputs()

    def _copied_outputs(self):
        # The next replay of this graph, or of another that shares its memory pool, overwrites these tensors.
        copies = [x.clone() if isinstance(x, torch.Tensor) else x for x in self.outputs]
        return tree_unflatten(copies, self.output_tree)


class ModuleProxy(torch.nn.Module):
    """Stands in the place of `module`: attributes that are not its own (config, cache_context, ...) are the module's.

    The module is no registered submodule: diffusers walks through all modules of all models about ten times an image
    to ask for their device, which takes longer than some of the work does once that is a single replay.
    """

    def __init__(self, module: torch.nn.Module):
        super().__init__()
        object.__setattr__(self, "module", module)
        weight = module if isinstance(module, ModuleProxy) else next(chain(module.parameters(), module.buffers()))
        self.device, self.dtype = weight.device, weight.dtype

    def _reset_stateful_cache(self, recurse: bool = True) -> None:
        """diffusers asks for this after each image, to clear hooks that a recorded module cannot have."""

    def __getattr__(self, name):
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.__dict__["module"], name)


class CUDAGraphModule(ModuleProxy):
    """`module` behind CUDA graphs, one for each `signature` that it is called with.

    Weights must stay where they are: a graph holds their addresses. Not for modules that wait for the GPU or decide by
    its results.

    Args:
        module: what to record. Its outputs may be any tree of tensors; the caller gets copies.
        pool: a memory pool to share (`torch.cuda.graph_pool_handle()`). Sharing is safe because outputs are copied
            out before anything else can be replayed on the stream.
        max_graphs: above it the least recently used recording is dropped, with a line on stderr.
    """

    may_record = True  # see `recording_is_an_error`

    def __init__(self, module: torch.nn.Module, pool=None, max_graphs: int = 8):
        super().__init__(module)
        self.pool = pool
        self.max_graphs = max_graphs
        self.stream = None  # to record on, its own: a stream has a workspace of cuBLAS, and T5 and CLIP run at once
        self.recordings: OrderedDict[tuple, _Recording] = OrderedDict()

    def forward(self, *args, **kwargs):
        key = signature(args, kwargs)
        recording = self.recordings.get(key)
        if recording is None:
            if not self.may_record:
                raise RuntimeError(f"a CUDA graph of {type(self.module).__name__} would be recorded here: its "
                                   f"{len(self.recordings)} recordings are of other inputs than {key}")
            if len(self.recordings) >= self.max_graphs:
                print(f"CUDA graphs of {type(self.module).__name__}: more than {self.max_graphs} kinds of input, "
                      "dropping the one unused for longest (recording again costs about a second)", file=sys.stderr)
                self.recordings.popitem(last=False)
            self.stream = self.stream or torch.cuda.Stream()
            recording = self.recordings[key] = _Recording(self.module, args, kwargs, self.pool, self.stream)
        self.recordings.move_to_end(key)
        return recording.replay(args, kwargs)


@contextmanager
def recording_is_an_error():
    """Within it `CUDAGraphModule` raises RuntimeError instead of recording, as `error_on_recompile` does for
    compilation: all that is timed was recorded before."""
    CUDAGraphModule.may_record = False
    try:
        yield
    finally:
        CUDAGraphModule.may_record = True
