"""How tensors of a folder lie in memory: as they did where that can be, and otherwise one after another; values come back either way."""

import json

import nets
import pytest
import torch
from torch import nn

import secateur as sc
from secateur.errors import FormatError
from secateur.models import folder
from secateur.models.verify import verify

X = torch.randn(4, 16, generator=torch.Generator().manual_seed(0))


class Held(nn.Module):
    """Buffers whose elements share places, or lie in the window of a larger tensor, or with their dimensions in another order."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b = nn.Linear(16, 32), nn.Linear(32, 8)
        self.register_buffer("bias", torch.arange(8.0).expand(4, 8))
        self.register_buffer("window", torch.arange(64.0).reshape(4, 16)[:, 3:11])
        self.register_buffer("turned", torch.arange(32.0).reshape(8, 4).t())

    def forward(self, x):
        return self.b(torch.relu(self.a(x))) + self.bias + self.window + self.turned


@pytest.fixture(scope="module")
def held():
    return sc.prune(Held(), (X,), sc.MACs(at_most="60%"))


@pytest.fixture
def saved(held, tmp_path):
    return sc.save(held, tmp_path / "out")


def resealed(out, change):
    """The folder with another document, whose hash is right."""
    document = json.loads((out / "plan.json").read_text())
    document.pop("sha256")
    change(document)
    (out / "plan.json").write_text(folder._sealed(document))
    return out


def test_layout_frozen_parameters_and_modes_come_back(tmp_path):
    model = nets.net().to(memory_format=torch.channels_last)
    model.head.weight.requires_grad_(False)
    result = sc.prune(model, (torch.randn(2, 1, 8, 8),), sc.MACs(at_most="60%"))
    result.model.train()
    result.model.bn.eval()
    expected = result.model.b.weight.stride()
    loaded = sc.load(sc.save(result, tmp_path / "out"), nets.net)
    assert loaded.b.weight.stride() == expected
    assert not loaded.head.weight.requires_grad and loaded.a.weight.requires_grad
    assert loaded.training and loaded.a.training and not loaded.bn.training


def test_expanded_buffers_and_windows_come_back(held, saved):
    assert held.model.bias.stride() == (0, 1) and held.model.window.stride() == (16, 1)
    loaded = sc.load(saved)
    assert torch.equal(loaded(X), held.model(X)) and torch.equal(sc.load(saved, Held)(X), held.model(X))
    strides = {name: facts.get("stride") for name, facts in json.loads((saved / "plan.json").read_text())["tensors"].items()}
    assert (strides["bias"], strides["window"], strides["turned"]) == (None, None, [1, 4])
    assert loaded.bias.stride() == loaded.window.stride() == (8, 1) and loaded.turned.stride() == (1, 4)


@pytest.mark.parametrize("stride", [[0, 1], [16, 1], [1 << 40, 1], [1 << 70, 1], [-8, 1], [0, 0], []])
def test_strides_that_no_memory_of_its_own_can_have_are_passed_over(stride, held, saved):
    """Earlier versions wrote them."""
    loaded = sc.load(resealed(saved, lambda document: document["tensors"]["bias"].update(stride=stride)))
    assert loaded.bias.stride() == (8, 1) and torch.equal(loaded(X), held.model(X))


@pytest.mark.parametrize("name, stride", [("bias", [8]), ("bias", "81"), ("bias", [8.0, 1.0]), ("bias", ["8", 1]), ("bias", 8), ("one", [1 << 70])])
def test_what_is_no_list_of_strides_is_refused(name, stride, tmp_path):
    class One(nn.Sequential):
        def __init__(self):
            super().__init__(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 8))
            self.register_buffer("bias", torch.zeros(4, 8))
            self.register_buffer("one", torch.zeros(1))

    out = sc.save(sc.prune(One(), (X,), sc.MACs(at_most="60%")), tmp_path / "out")
    with pytest.raises(FormatError, match=r"plan.json has not the form that secateur writes: (?s:.*)\n  It was changed"):
        sc.load(resealed(out, lambda document: document["tensors"][name].update(stride=stride)), One)


def test_a_mask_of_a_shape_below_zero_is_refused(tmp_path):
    result = sc.sparsify(nn.Sequential(nn.Linear(16, 32)), (X,), sc.Sparse(keep="50%", refit=False))
    out = sc.save(result, tmp_path / "out", packed=False)
    (name,) = result.plan.weights
    with pytest.raises(FormatError, match=r"holds no plan: (?s:.*)says \[-32, -16\]"):
        verify(resealed(out, lambda document: document["plan"]["weights"][name].update(shape=[-32, -16])))
