"""When two calls may share a CUDA graph. That replays equal the module, tests/test_gpu.py shows."""

import weakref

import pytest
import torch

from utils import cuda_graph
from utils.cuda_graph import CUDAGraphModule, GraphPool, recording_is_an_error, signature

X = torch.randn(2, 3)


@pytest.mark.parametrize("other", [
    ((torch.randn(3, 2),), {"a": X, "flag": None}),          # positional shape: flux-fast's key ignored it
    ((X,), {"a": torch.randn(2, 4), "flag": None}),          # shape of a named input
    ((X,), {"a": X.double(), "flag": None}),                 # dtype
    ((X,), {"a": X.to("meta"), "flag": None}),               # device
    ((X,), {"b": X, "flag": None}),                          # name
    ((X,), {"a": X, "flag": X}),                             # None against a tensor
    ((X,), {"a": X, "flag": False}),                         # None against another value
    ((X,), {"a": X, "flag": 0}),                             # False and 0 are equal, and yet not the same
    ((X,), {"a": [X], "flag": None}),                        # tree
    ((X,), {"a": X}),                                        # missing
    ((X, X), {"a": X, "flag": None}),                        # one more
])
def test_signature_other_inputs_differs(other):
    assert signature((X,), {"a": X, "flag": None}) != signature(*other)


def test_signature_zero_and_false_differ():
    assert signature((0,), {}) != signature((False,), {})


def test_signature_other_values_and_strides_is_the_same():
    same = torch.zeros(3, 2).t()
    assert signature((X,), {"a": X, "k": {"b": 1}}) == signature((same,), {"a": same, "k": {"b": 1}})
    assert hash(signature((X,), {})) == hash(signature((same,), {}))


def test_signature_unhashable_argument_is_refused():
    with pytest.raises(TypeError):
        signature((bytearray(b"x"),), {})


def test_cuda_graphed_attributes_are_the_modules():
    module = torch.nn.Linear(4, 3)
    module.config = {"a": 1}
    wrapped = CUDAGraphModule(module)
    assert wrapped.config == {"a": 1} and wrapped.weight is module.weight and wrapped.in_features == 4
    assert wrapped.device == module.weight.device and wrapped.dtype == torch.float32
    assert list(wrapped.modules()) == [wrapped]
    with pytest.raises(AttributeError):
        wrapped.nothing_of_this_name  # noqa: B018


def test_cuda_graphed_module_of_buffers_alone_has_their_dtype():
    assert CUDAGraphModule(torch.nn.BatchNorm1d(3, affine=False)).dtype == torch.float32


def test_recording_is_an_error_unknown_input_names_the_module():
    wrapped = CUDAGraphModule(torch.nn.Linear(4, 3))
    with recording_is_an_error(), pytest.raises(RuntimeError, match="Linear"):
        wrapped(torch.zeros(2, 4))
    assert CUDAGraphModule.may_record


class Graphs:
    """Stands in for recordings: a call with an input of n rows adds n bytes to its pool and holds 100 bytes of inputs.

    Attributes:
        free: bytes of GPU memory that are free.
        recorded: the rows of each recording, and the handle of its pool.
        error_at: numbers of recordings that run out of memory.
    """

    def __init__(self, monkeypatch, free):
        self.free, self.recorded, self.error_at, handles = free, [], (), iter("abcdefgh")
        graphs = self

        class Recording:
            def __init__(self, module, args, kwargs, pool, stream):
                graphs.recorded.append((len(args[0]), pool))
                if len(graphs.recorded) in graphs.error_at:
                    raise torch.OutOfMemoryError("x")
                self.pool_bytes, self.input_bytes = len(args[0]), 100

            def replay(self, args, kwargs):
                return len(args[0])

        monkeypatch.setattr(cuda_graph, "_Recording", Recording)
        monkeypatch.setattr(cuda_graph, "_free_bytes", lambda: self.free)
        monkeypatch.setattr(torch.cuda, "Stream", lambda: None)
        monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: next(handles))


def modules_of(pool, count=2):
    return [CUDAGraphModule(torch.nn.Linear(4, 3), pool) for _ in range(count)]


def rows_of(module):
    return [described[0][0][0] for _, described in module.signatures]


def test_graph_pool_with_free_memory_keeps_all_graphs(monkeypatch, capsys):
    graphs = Graphs(monkeypatch, free=10**6)
    step, decoder = modules_of(GraphPool())
    for _ in range(2):
        assert [module(torch.zeros(size, 4)) for size in range(1, 20) for module in (step, decoder)] == [
            size for size in range(1, 20) for _ in range(2)]
    assert len(graphs.recorded) == 38 and rows_of(step) == rows_of(decoder) == list(range(1, 20))
    assert {handle for _, handle in graphs.recorded} == {"a"} and not capsys.readouterr().err


def test_graph_pool_drops_the_least_recently_used_over_all_modules_and_says_so_once(monkeypatch, capsys):
    graphs = Graphs(monkeypatch, free=10**6)
    step, decoder = modules_of(GraphPool())
    for size in (1, 2):
        step(torch.zeros(size, 4)), decoder(torch.zeros(size, 4))
    step(torch.zeros(1, 4))  # is now the most recently used
    graphs.free = 50  # so the graphs, which hold 406 bytes, may hold 228
    step(torch.zeros(3, 4))
    assert (rows_of(step), rows_of(decoder)) == ([1, 3], [2])
    graphs.free = 0
    decoder(torch.zeros(4, 4))
    assert (rows_of(step), rows_of(decoder)) == ([3], [4])
    assert {handle for _, handle in graphs.recorded} == {"a"}
    assert len(capsys.readouterr().err.splitlines()) == 1


def test_graph_pool_too_large_starts_anew_with_another_handle(monkeypatch):
    """torch frees a pool's memory with its last graph, and refuses the handle after that."""
    graphs = Graphs(monkeypatch, free=1000)
    pool = GraphPool()
    step, decoder = modules_of(pool)
    for module in (step, decoder, step):
        module(torch.zeros(600, 4))
    assert pool.held_bytes() == 1400  # of 1200 that are allowed
    step(torch.zeros(8, 4))
    assert graphs.recorded == [(600, "a"), (600, "a"), (8, "b")] and pool.held_bytes() == 108
    assert (rows_of(step), rows_of(decoder)) == ([8], [])
    assert decoder(torch.zeros(600, 4)) == 600 and step(torch.zeros(8, 4)) == 8
    assert graphs.recorded[3:] == [(600, "b")]


def test_graph_pool_out_of_memory_records_again_without_the_others(monkeypatch):
    graphs = Graphs(monkeypatch, free=10**6)
    step, decoder = modules_of(GraphPool())
    graphs.error_at = (2, 4, 5)
    step(torch.zeros(1, 4))
    assert decoder(torch.zeros(2, 4)) == 2
    assert graphs.recorded == [(1, "a"), (2, "a"), (2, "b")] and not step.signatures
    with pytest.raises(torch.OutOfMemoryError):
        step(torch.zeros(9, 4))
    assert graphs.recorded[3:] == [(9, "b"), (9, "c")]
    assert step(torch.zeros(1, 4)) == 1 and graphs.recorded[-1] == (1, "d")


def test_graph_pool_unbounded_keeps_all_graphs(monkeypatch):
    """Several GPUs record at the same calls, whatever memory each has left."""
    graphs = Graphs(monkeypatch, free=0)
    step, decoder = modules_of(GraphPool(bounded=False))
    for size in (60, 8):
        step(torch.zeros(size, 4)), decoder(torch.zeros(size, 4))
    assert len(graphs.recorded) == 4 and rows_of(step) == [60, 8]
    graphs.error_at = (5,)
    with pytest.raises(torch.OutOfMemoryError):
        step(torch.zeros(1, 4))
    assert rows_of(step) == rows_of(decoder) == [60, 8]


def test_cuda_graphed_module_is_freed_while_its_pool_lives(monkeypatch):
    Graphs(monkeypatch, free=100)
    pool = GraphPool()
    kept, freed = modules_of(pool)
    freed(torch.zeros(1, 4))
    reference = weakref.ref(freed)
    del freed
    assert reference() is None and kept.pool is pool
