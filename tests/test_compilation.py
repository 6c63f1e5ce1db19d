"""Which shapes torch.compile compiles. What it makes of them, tests/test_pipeline.py shows."""

import pytest
import torch

from utils.compilation import CompiledOnce

SHAPES = [(8, 8), (8, 12), (12, 8), (8, 8), (20, 4)]


@pytest.fixture
def compiled():
    """A module whose code depends on its input's shape, and the list of the shapes that were compiled."""
    torch._dynamo.reset()
    shapes = []

    def backend(graph, inputs):
        shapes.append(tuple(next(x.shape for x in inputs if isinstance(x, torch.Tensor) and x.dim() == 2)))
        return graph.forward

    class Parts(torch.nn.Linear):
        def forward(self, x):
            return torch.cat([part * self.weight[0, 0] for part in x.split(4)])

    module = Parts(2, 2)
    module.compile(fullgraph=True, backend=backend)
    yield module, shapes
    torch._dynamo.reset()


@torch.no_grad()
def test_compiled_once_compiles_the_first_shape_alone(compiled):
    module, shapes = compiled
    once = CompiledOnce(module)
    for shape in SHAPES:
        x = torch.randn(shape)
        assert torch.allclose(once(x), x * module.weight[0, 0])
    assert shapes == [(8, 8)]


@torch.no_grad()
def test_compiled_once_takes_more_shapes_than_torch_compiles(compiled):
    """Beyond its limit, torch raises an error about a module that must be one graph."""
    module, shapes = compiled
    sizes = [4 * i for i in range(1, 13)]
    with pytest.raises(Exception, match="fullgraph"):
        for size in sizes:
            module(torch.randn(size, 3))
    torch._dynamo.reset()
    shapes.clear()
    once = CompiledOnce(module)
    assert [len(once(torch.randn(size, 3))) for size in sizes] == sizes and len(shapes) == 1
