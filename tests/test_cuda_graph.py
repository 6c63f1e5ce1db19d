"""When two calls may share a CUDA graph. That replays equal the module, tests/test_gpu.py shows."""

import pytest
import torch

from utils import cuda_graph
from utils.cuda_graph import CUDAGraphModule, recording_is_an_error, signature

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


def test_cuda_graphed_more_signatures_than_graphs_are_noted_once(monkeypatch, capsys):
    """A file of prompts may have more sizes than a module keeps graphs."""
    recorded = []

    class Recording:
        def __init__(self, module, args, *_):
            recorded.append(len(args[0]))

        def replay(self, args, kwargs):
            return len(args[0])

    monkeypatch.setattr(cuda_graph, "_Recording", Recording)
    monkeypatch.setattr(torch.cuda, "Stream", lambda: None)
    modules = [CUDAGraphModule(torch.nn.Linear(4, 3), max_graphs=3) for _ in range(2)]
    for module in modules:
        assert [module(torch.zeros(size, 4)) for size in (1, 2, 3, 1, 4, 5, 1, 2)] == [1, 2, 3, 1, 4, 5, 1, 2]
        assert len(module.recordings) == 3
    assert recorded == [1, 2, 3, 4, 5, 2] * 2
    assert len(capsys.readouterr().err.splitlines()) == 2
