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
    """One CUDA graph, its static input buffers, and the output tensors that each replay overwrites.

    Attributes:
        pool_bytes: memory that the recording added to its pool.
        input_bytes: memory of the static inputs, which are outside the pool.
    """

    def __init__(self, module: torch.nn.Module, args: tuple, kwargs: dict, pool: tuple, stream: torch.cuda.Stream):
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
        try:
            with torch.cuda.graph(self.graph, pool=pool, stream=stream, capture_error_mode="thread_local"):
                before = torch.cuda.memory_reserved()
                outputs = module(*static_args, **static_kwargs)
                self.pool_bytes = torch.cuda.memory_reserved() - before
        except torch.AcceleratorError as error:  # to end a failed recording fails too, which would hide the reason
            raise (error.__context__ or error) from None
        self.input_bytes = sum(x.nbytes for x in self.inputs)
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


def _free_bytes() -> int:
    """GPU memory that this process may still allocate, within --gpu_memory_limit."""
    torch.cuda.empty_cache()
    free, total = torch.cuda.mem_get_info()
    allowed = torch.cuda.get_per_process_memory_fraction() * total - torch.cuda.memory_reserved()
    return int(min(free, allowed))


class GraphPool:
    """GPU memory that the CUDA graphs of several modules share, and the order in which the graphs were last used.

    Graphs of one pool reuse each other's memory, so no two of them may run at once. All are recorded on one stream,
    because torch's allocator does not reuse memory across streams. A size that needs no more memory than an earlier
    size adds little: its inputs and outputs.

    The graphs may hold half of the memory that the weights leave free. Before a recording, graphs beyond this limit
    are dropped, least recently used first. A dropped graph frees its inputs at once, and torch frees the pool's memory
    with the pool's last graph. So if the pool itself is too large, all graphs go, and the sizes still in use are
    recorded again. This also mends a pool that sizes in ascending order have left in pieces. The largest recording may
    exceed the limit; if it does not fit at all, it is tried once more without the other graphs.

    Args:
        bounded: False keeps all graphs. It is for several GPUs that share an image: a recording exchanges data, so all
            GPUs must record at the same calls, and their free memory differs.
    """

    def __init__(self, bounded: bool = True):
        self.bounded, self.has_dropped = bounded, False
        self.recordings: OrderedDict[tuple[object, tuple], _Recording] = OrderedDict()  # by module, signature
        self.handle = self.stream = None
        self.pool_bytes = 0

    def held_bytes(self) -> int:
        """Memory of the pool and of the graphs' inputs. The driver's memory for the graphs is not counted."""
        return self.pool_bytes + sum(recording.input_bytes for recording in self.recordings.values())

    def get(self, key: tuple[object, tuple]) -> _Recording | None:
        """The recording of a module and a signature, which becomes the most recently used."""
        if key in self.recordings:
            self.recordings.move_to_end(key)
        return self.recordings.get(key)

    def record(self, key: tuple[object, tuple], module: torch.nn.Module, args: tuple, kwargs: dict) -> _Recording:
        """Records a call of `module` and keeps the recording under `key`.

        Raises:
            torch.OutOfMemoryError: the recording does not fit, even without other graphs.
        """
        if self.bounded and self.recordings:
            held = self.held_bytes()
            self._drop_beyond((held + _free_bytes()) // 2)
        try:
            return self._record(key, module, args, kwargs)
        except torch.OutOfMemoryError:
            if not (self.bounded and self.recordings):
                raise
        self._drop_beyond(0)  # outside the except block, where the error no longer holds the failed call's tensors
        return self._record(key, module, args, kwargs)

    def _record(self, key, module, args, kwargs) -> _Recording:
        if not self.recordings:
            # torch refuses a handle whose graphs are all gone.
            self.handle, self.pool_bytes = torch.cuda.graph_pool_handle(), 0
        # Each pool has its own stream: cuBLAS has one workspace per stream, and T5 and CLIP run concurrently.
        self.stream = self.stream or torch.cuda.Stream()
        recording = _Recording(module, args, kwargs, self.handle, self.stream)
        self.recordings[key] = recording
        self.pool_bytes += recording.pool_bytes
        return recording

    def _drop_beyond(self, limit: int) -> None:
        """Drops the least recently used graphs until the others hold at most `limit` bytes."""
        held, count = self.held_bytes(), len(self.recordings)
        while self.recordings and self.held_bytes() > limit:
            self.recordings.popitem(last=False)
            if not self.recordings:
                self.pool_bytes = 0
        if len(self.recordings) < count and not self.has_dropped:
            self.has_dropped = True
            print(f"CUDA graphs: {count} graphs hold {held / 2**30:.1f} GiB, too much beside what is free. From now on "
                  "the least recently used graphs are dropped; to record one again takes about a second.",
                  file=sys.stderr)


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
        pool: the memory of the graphs, which several modules may share. Sharing is safe, because the outputs are copied
            before another graph can be replayed on the stream. None: a pool of this module's own.
    """

    may_record = True  # False within `recording_is_an_error`

    def __init__(self, module: torch.nn.Module, pool: GraphPool | None = None):
        super().__init__(module)
        self.pool = pool or GraphPool()
        self.owner = object()  # stands for this module in the pool, which must not keep the module alive

    @property
    def signatures(self) -> list[tuple]:
        """The signatures of this module's graphs, least recently used first."""
        return [key for owner, key in self.pool.recordings if owner is self.owner]

    def forward(self, *args, **kwargs):
        """Replays the graph of this call's `signature`; the first call of a signature records it (about one second).

        Args:
            args, kwargs: the module's arguments. Tensors may have any strides. Other arguments must be hashable.

        Returns:
            The module's outputs, as copies that later replays do not overwrite.

        Raises:
            RuntimeError: the call would record a graph within `recording_is_an_error`.
            torch.OutOfMemoryError: the graph does not fit, even without the pool's other graphs.
            TypeError: an argument is neither a tensor nor hashable.
        """
        key = signature(args, kwargs)
        recording = self.pool.get((self.owner, key))
        if recording is None:
            if not self.may_record:
                raise RuntimeError(f"{type(self.module).__name__} would record a CUDA graph within "
                                   f"recording_is_an_error: none of its {len(self.signatures)} recordings has the "
                                   f"signature {key}")
            recording = self.pool.record((self.owner, key), self.module, args, kwargs)
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
