"""A folded model with sparse layers is a file, a copy and a compiled graph like any other."""

import copy
import io

import pytest
import torch

from secateur.runtime import convert
from tests.runtime.test_layers import Stages


@pytest.fixture(scope="module")
def made(kernels):
    """(model, with chains and poolings, an input)."""
    torch.manual_seed(0)
    net, x = Stages().eval(), torch.randn(2, 3, 20, 22)
    chosen = {f"{n}_folded": "4x1" for n in ("one", "two", "three", "four", "down")}
    found = convert(net, (x,), chosen=chosen, fold=True).model
    assert any(type(m).__name__ == "Chain" for m in found.modules()) and "max_pool" in found.code
    return net, found, x


def check_same(found, net, x):
    with torch.no_grad():
        for a, b in zip(found(x), net(x), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


def test_it_is_saved_and_loaded(made):
    net, found, x = made
    for _ in range(2):  # what was loaded is saved again
        file = io.BytesIO()
        torch.save(found, file)
        file.seek(0)
        found = torch.load(file, weights_only=False)
        assert "max_pool" in found.code
        check_same(found, net, x)
    check_same(copy.deepcopy(found), net, x)


def test_it_is_compiled_as_one_graph(made):
    net, found, x = made
    torch._dynamo.reset()
    check_same(torch.compile(found, backend="aot_eager", fullgraph=True), net, x)
