"""What was zero stays zero while a sparse layer learns, and what was frozen stays frozen."""

import copy

import pytest
import torch
from torch import nn

from secateur.runtime import convert, sparse
from tests.runtime.test_layers import zeroed

LAYERS = {"linear": (lambda: nn.Linear(30, 21), (5, 30)), "convolution": (lambda: nn.Conv2d(6, 11, 3, padding=1), (2, 6, 7, 5))}
WAYS = {
    "kernels": lambda layer, x: layer(x),
    "another dtype": lambda layer, x: layer(x.bfloat16()).float(),
    "torch.func": lambda layer, x: torch.func.vmap(layer)(x[None])[0],
}  # fmt: skip


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("r", [1, 4, 8, None])
@pytest.mark.parametrize("name", LAYERS)
def test_zeros_that_blocks_bring_with_them_stay_zero(kernels, name, r, way):
    torch.manual_seed(0)
    make, shape = LAYERS[name]
    layer, x = sparse(zeroed(make(), 0.3, r=1), r), torch.randn(shape)
    before = layer.weight.detach()
    assert r in (1, None) or (layer.values == 0).any()
    for kind, more in ((torch.optim.AdamW, {}), (torch.optim.SGD, {"momentum": 0.9})):
        layer = copy.deepcopy(layer)
        optimizer = kind(layer.parameters(), lr=0.02, weight_decay=0.1, **more)
        for _ in range(3):
            optimizer.zero_grad()
            (WAYS[way](layer, x) - 1).square().mean().backward()
            optimizer.step()
    after = layer.weight.detach()
    assert torch.equal(after == 0, before == 0) and (after != before)[before != 0].float().mean() > 0.9


def test_a_derivative_that_is_not_finite_makes_no_zero_a_number(kernels):
    layer = sparse(zeroed(nn.Linear(6, 8), 0.5, r=1), 8)
    for x in (torch.full((1, 6), torch.inf), torch.full((1, 6), torch.inf, dtype=torch.float64)):
        layer.values.grad = None
        layer(x).sum().backward()
        assert layer.values.grad.isinf().any() and (layer.values.grad[layer.values == 0] == 0).all()


@pytest.mark.parametrize("layer", [nn.Linear(8, 8), nn.Conv1d(4, 8, 3), nn.Conv2d(4, 8, 3, bias=False)], ids=lambda m: type(m).__name__)
def test_what_was_frozen_stays_frozen(layer):
    assert all(p.requires_grad for p in sparse(layer).parameters())
    layer.weight.requires_grad_(False)
    made = sparse(layer)
    assert not made.values.requires_grad and (layer.bias is None or made.bias.requires_grad)
    assert not any(p.requires_grad for p in sparse(layer.requires_grad_(False)).parameters())


def test_a_frozen_model_is_converted_frozen(kernels):
    net = nn.Sequential(zeroed(nn.Linear(16, 16)), nn.ReLU(), nn.Linear(16, 4)).eval()
    net[0].requires_grad_(False)
    made = convert(net, (torch.randn(2, 16),), chosen={"0": "4x1"}).model
    assert {n for n, p in made.named_parameters() if p.requires_grad} == {"2.weight", "2.bias"}
