"""The proof notices a cut model that is wrong, however little."""

import copy
import math

import pytest
import torch
from torch import nn

from secateur import MACs, Params, prune
from secateur.errors import ProofError
from secateur.measure.float64 import apart
from secateur.measure.proof import prove, require
from secateur.plan import Plan
from secateur.surgery import cut
from secateur.trace import trace


@pytest.fixture
def made():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 16, 5)).eval()
    with torch.no_grad():
        model[1].running_mean.normal_()
        model[1].running_var.uniform_(0.5, 1.5)
    graph = trace(model, (torch.randn(2, 3, 6, 6),))
    (name,) = graph.groups
    keep = {name: torch.tensor([True, False, True, True, False, False, True, True])}
    return model, graph, keep, cut(model, graph, Plan(keep, graph.cost(), graph.cost(keep), {})).model


def test_a_right_cut_is_proven(made):
    model, graph, keep, small = made
    proof = prove(model, graph, keep, small)
    assert proof.passed
    assert proof.max_error < 1e-12
    assert len(proof.outputs) == 1
    require(proof, "net")


@pytest.mark.parametrize("tensor", ["0.weight", "0.bias", "1.running_mean", "1.running_var", "1.weight", "4.weight"])
def test_one_wrong_tensor_is_noticed_and_refused(made, tensor):
    model, graph, keep, small = made
    wrong = copy.deepcopy(small)
    with torch.no_grad():
        wrong.state_dict()[tensor].add_(1e-3)
    proof = prove(model, graph, keep, wrong)
    assert not proof.passed
    assert proof.max_error > 1e-7
    with pytest.raises(ProofError, match="deviates"):
        require(proof, "net")


def test_units_in_the_wrong_order_are_noticed(made):
    model, graph, keep, small = made
    wrong = copy.deepcopy(small)
    with torch.no_grad():
        wrong[1].running_mean.copy_(small[1].running_mean.roll(1))
    assert not prove(model, graph, keep, wrong).passed


def test_another_plan_is_not_this_one(made):
    model, graph, keep, small = made
    other = {name: mask.roll(1) for name, mask in keep.items()}
    assert not prove(model, graph, other, small).passed


def test_wrong_shape_and_nan_are_noticed(made):
    model, graph, keep, small = made
    assert not prove(model, graph, keep, nn.Sequential(*small[:4])).passed
    broken = copy.deepcopy(small)
    with torch.no_grad():
        broken[4].bias[0] = float("nan")
    assert not prove(model, graph, keep, broken).passed


def test_a_proof_that_compared_zeros_says_so():
    class Silent(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.last = torch.nn.Linear(6, 8), torch.nn.Linear(8, 3)
            self.register_buffer("gate", torch.zeros(3))

        def forward(self, x):
            return self.last(self.first(x).relu()) * self.gate

    x = torch.ones(2, 6)
    result = prune(Silent(), (x,), MACs(at_most="50%"))
    assert result.proof.all_zero and any("compared zeros" in note for note in result.notes)
    with torch.no_grad():
        result.dense.gate.fill_(1.0)
    assert not prune(result.dense, (x,), MACs(at_most="50%")).proof.all_zero


class Scaled(nn.Module):
    """Divides by the root of a width that the class does not store, so that it cannot follow a cut."""

    def __init__(self, fill=None, zero=False):
        super().__init__()
        torch.manual_seed(0)
        self.i, self.a, self.b, self.o, self.fill = nn.Linear(8, 8), nn.Linear(8, 64), nn.Linear(64, 8), nn.Linear(8, 4), fill
        if zero:
            nn.init.zeros_(self.b.weight)
            nn.init.zeros_(self.b.bias)

    def forward(self, x):
        x = self.i(x)
        h = torch.relu(self.a(x))
        y = self.o(x + self.b(h / math.sqrt(h.shape[1])))
        return y if self.fill is None else y.masked_fill(torch.arange(4) == 2, self.fill)


def zeroed(model, result):
    """The dense model with the units that went at zero."""
    dense = copy.deepcopy(model)
    gone = ~result.plan.keep["a:out"]
    with torch.no_grad():
        dense.a.weight[gone], dense.a.bias[gone] = 0, 0
    return dense


@pytest.mark.parametrize("given", [{}, {"fill": -1e9}, {"fill": -1e30}, {"fill": -math.inf}, {"zero": True}], ids=str)
def test_neither_a_mark_in_the_output_nor_weights_at_zero_hide_a_difference(given):
    """The class deviates by a few percent; where nothing of that is to be seen it would be handed back."""
    model, x = Scaled(**given).eval(), torch.randn(3, 8)
    result = prune(model, (x,), Params(at_most="60%"), ignore=["i"])
    assert result.cut.how == "graph" and result.proof.passed
    dense = zeroed(model, result)
    for m in (dense, result.model):
        with torch.no_grad():
            m.get_parameter("b.weight").fill_(0.1)
            torch.testing.assert_close(m(x), dense(x), rtol=1e-4, atol=1e-5)


def test_an_error_is_relative_to_values_of_its_size():
    one = torch.tensor([1.0, 2.0, -1e9, 0.0], dtype=torch.float64)
    assert apart(one + torch.tensor([0.5, 0, 0, 0]), one) == 0.25 and apart(one * (1 + 1e-12), one) < 1e-11
    assert apart(one + torch.tensor([0, 0, 1e8, 0]), one) == pytest.approx(0.1)
    kinds = torch.tensor([math.inf, math.nan, 1.0])
    assert apart(kinds.clone(), kinds) == 0.0
    for other in ([-math.inf, math.nan, 1.0], [math.nan, math.inf, 1.0], [0.0, math.nan, 1.0]):
        assert apart(torch.tensor(other), kinds) == math.inf
    c = torch.fft.rfft(torch.arange(8.0, dtype=torch.float64))
    assert apart(c * (1 + 2e-16), c) < 1e-15 and apart(c.conj(), c) > 0.1 and apart(c.real, c) == math.inf


def test_complex_outputs_are_proven():
    class Spectrum(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(8, 97), nn.Linear(97, 16)

        def forward(self, x):
            return torch.fft.rfft(self.b(self.a(x).relu() * 1.37))

    assert prune(Spectrum().eval(), (torch.randn(33, 8),), MACs(at_most="50%")).proof.passed
