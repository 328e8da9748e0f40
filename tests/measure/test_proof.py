"""The proof notices a cut model that is wrong, however little."""

import copy

import pytest
import torch
from torch import nn

from secateur import MACs, prune
from secateur.errors import ProofError
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
            torch.nn.init.zeros_(self.last.weight)
            torch.nn.init.zeros_(self.last.bias)

        def forward(self, x):
            return self.last(self.first(x).relu())

    x = torch.ones(2, 6)
    result = prune(Silent(), (x,), MACs(at_most="50%"))
    assert result.proof.all_zero and any("compared zeros" in note for note in result.notes)
    with torch.no_grad():
        result.dense.last.bias.fill_(1.0)
    assert not prune(result.dense, (x,), MACs(at_most="50%")).proof.all_zero
