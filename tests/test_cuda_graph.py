"""When two calls may share a CUDA graph; on a GPU, that replays equal the module."""

import pytest
import torch

from utils.cuda_graph import CUDAGraphed, recording_is_an_error, signature

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
def test_signatures_differ(other):
    assert signature((X,), {"a": X, "flag": None}) != signature(*other)


def test_zero_is_not_false():
    assert signature((0,), {}) != signature((False,), {})


def test_signatures_agree_on_values_and_strides():
    same = torch.zeros(3, 2).t()
    assert signature((X,), {"a": X, "k": {"b": 1}}) == signature((same,), {"a": same, "k": {"b": 1}})
    assert hash(signature((X,), {})) == hash(signature((same,), {}))


def test_an_argument_that_cannot_be_compared_is_refused():
    with pytest.raises(TypeError):
        signature((bytearray(b"x"),), {})


def test_attributes_are_the_modules_own():
    module = torch.nn.Linear(4, 3)
    module.config = {"a": 1}
    wrapped = CUDAGraphed(module)
    assert wrapped.config == {"a": 1} and wrapped.weight is module.weight and wrapped.in_features == 4
    assert wrapped.device == module.weight.device and wrapped.dtype == torch.float32
    assert list(wrapped.modules()) == [wrapped]
    with pytest.raises(AttributeError):
        wrapped.nothing_of_this_name  # noqa: B018


def test_a_module_of_buffers_alone():
    assert CUDAGraphed(torch.nn.BatchNorm1d(3, affine=False)).dtype == torch.float32


def test_recording_can_be_an_error():
    wrapped = CUDAGraphed(torch.nn.Linear(4, 3))
    with recording_is_an_error(), pytest.raises(RuntimeError, match="CUDA graph of Linear would be recorded"):
        wrapped(torch.zeros(2, 4))
    assert CUDAGraphed.may_record
