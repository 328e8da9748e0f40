"""Aligned plans: multiples, never less score, subsets and supersets of what was planned."""

import pytest
import torch
from torch import nn

from secateur import score
from secateur.budget import MACs, plan
from secateur.budget.align import align, finite
from secateur.budget.allocate import elimination_order
from secateur.errors import InputError
from secateur.surgery import cut
from secateur.trace import trace


class Net(nn.Module):
    """Wide and narrow layers, a grouped and a depthwise convolution, attention heads."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 32, 3, padding=1)
        self.grouped = nn.Conv2d(32, 48, 3, padding=1, groups=4)
        self.deep = nn.Conv2d(48, 48, 3, padding=1, groups=48)
        self.narrow = nn.Conv2d(48, 6, 1)
        self.back = nn.Conv2d(6, 20, 1)
        self.attention = nn.MultiheadAttention(20, 4, batch_first=True)
        self.head = nn.Linear(20, 10)

    def forward(self, x):
        x = self.back(self.narrow(self.deep(self.grouped(self.stem(x).relu()).relu())).relu())
        x = x.flatten(2).transpose(1, 2)
        return self.head(self.attention(x, x, x, need_weights=False)[0].mean(1))


@pytest.fixture(scope="module")
def traced():
    torch.manual_seed(0)
    model = Net().eval()
    graph = trace(model, (torch.randn(1, 3, 6, 6),))
    return model, graph, score.l2(graph, model)


def width(graph, name, mask):
    slots = graph.groups[name].slots
    slot = next((s for s in slots if s.dim == 0), slots[0])
    return int(mask.sum()) * slot.positions.shape[1], len(mask) * slot.positions.shape[1]


@pytest.mark.parametrize("percent", [85, 60, 40, 20, 8])
@pytest.mark.parametrize("multiple", [4, 8, 16])
def test_widths_are_multiples_and_the_score_is_no_less(traced, percent, multiple):
    model, graph, scores = traced
    planned = plan(graph, scores, MACs(f"{percent}%"))
    made = align(graph, planned, scores, multiple)
    assert made.after == graph.cost(made.keep) and made.before == planned.before
    for name, mask in made.keep.items():
        now, full = width(graph, name, mask)
        assert int(mask.sum()) >= 1
        small = full < multiple or (full // len(mask)) * len(mask) < multiple
        assert now % multiple == 0 or now == full or small or steps_do_not_fit(full // len(mask), len(mask), multiple)
        both = planned.keep[name] & mask
        assert torch.equal(both, mask) or torch.equal(both, planned.keep[name])  # grown or shrunk, never exchanged
    total = {True: 0.0, False: 0.0}
    for name, value in scores.items():
        total[True] += float(value[made.keep[name]].sum())
        total[False] += float(value[planned.keep[name]].sum())
    assert total[True] >= total[False] * (1 - 1e-6)
    smaller = cut(model, graph, made).model
    assert smaller(torch.randn(1, 3, 6, 6)).shape == (1, 10)


def steps_do_not_fit(each, size, multiple):
    """Units of `each` channels reach a multiple only together with more units than there are."""
    return not any((n * each) % multiple == 0 for n in range(1, size + 1))


@pytest.fixture
def plain():
    return trace(nn.Sequential(nn.Conv2d(3, 32, 3), nn.ReLU(), nn.Conv2d(32, 24, 3), nn.ReLU(), nn.Conv2d(24, 5, 1)), (torch.zeros(1, 3, 8, 8),))


def test_the_highest_scores_are_put_back_first(plain):
    graph, name = plain, "0:out"
    scores = {n: torch.arange(1.0, g.size + 1) for n, g in graph.groups.items()}
    keep = {n: torch.ones(g.size, dtype=torch.bool) for n, g in graph.groups.items()}
    keep[name] = torch.arange(32) < 3  # the three lowest, by a planner with reasons of its own
    planned = plan(graph, scores, MACs("90%"))
    made = align(graph, type(planned)(keep, planned.before, graph.cost(keep)), scores, 8)
    assert sorted(torch.nonzero(made.keep[name]).flatten().tolist()) == [0, 1, 2, 27, 28, 29, 30, 31]


def test_multiple_of_one_gives_the_plan_back(traced):
    _, graph, scores = traced
    planned = plan(graph, scores, MACs("50%"))
    made = align(graph, planned, scores, 1)
    assert all(torch.equal(mask, planned.keep[name]) for name, mask in made.keep.items())


def test_units_of_infinite_score_stay(plain):
    graph, name = plain, "0:out"
    held = {n: torch.arange(1.0, g.size + 1) for n, g in graph.groups.items()}
    held[name][:13] = float("inf")
    keep = {n: torch.ones(g.size, dtype=torch.bool) for n, g in graph.groups.items()}
    keep[name] = torch.arange(32) < 13
    planned = plan(graph, held, MACs("90%"))
    made = align(graph, type(planned)(keep, planned.before, graph.cost(keep)), held, 8)
    assert made.keep[name][:13].all() and int(made.keep[name].sum()) == 16


def test_senseless_calls_are_refused(traced):
    _, graph, scores = traced
    planned = plan(graph, scores, MACs("50%"))
    for wrong in (0, -8, 2.5, True):
        with pytest.raises(InputError, match="multiple"):
            align(graph, planned, scores, wrong)
    with pytest.raises(InputError, match="no scores"):
        align(graph, planned, {}, 8)


def test_minus_infinity_goes_first_and_comes_back_last():
    scores = torch.tensor([-torch.inf, 1.0, torch.inf, -3.0])
    assert elimination_order({"g": scores}, "global").units.tolist() == [0, 3, 1]
    assert finite(scores).tolist() == [-3.0, 1.0, 0.0, -3.0]
    assert finite(torch.tensor([-torch.inf, 2.0])).tolist() == [0.0, 2.0]
    assert finite(torch.full((2,), -torch.inf)).tolist() == [0.0, 0.0]
