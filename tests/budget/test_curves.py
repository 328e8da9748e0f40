"""Allocation by error curves against all plans there are."""

from itertools import product

import pytest
import torch
from torch import nn

from secateur.budget import MACs, Params
from secateur.budget.curves import Curve, allocate
from secateur.errors import TargetError
from secateur.trace import trace


@pytest.fixture(scope="module")
def graph():
    """Three groups in a row, so that what a unit costs depends on its neighbours."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 12), nn.ReLU(), nn.Linear(12, 20), nn.ReLU(), nn.Linear(20, 9), nn.ReLU(), nn.Linear(9, 4))
    return trace(model.eval(), (torch.randn(1, 5),))


def convex(graph, seed, power=2.0):
    """Convex curves of different heights and shapes."""
    random = torch.Generator().manual_seed(seed)
    curves = {}
    for name, g in graph.groups.items():
        n = torch.arange(g.size + 1, dtype=torch.float64) / g.size
        height, bend = 10 ** float(2 * torch.rand((), generator=random) - 1), power + 2 * float(torch.rand((), generator=random))
        curves[name] = Curve(torch.randperm(g.size, generator=random), height * n**bend)
    return curves


def limits_of(graph, *targets):
    return [(t, t.limit(graph.cost())) for t in targets]


def cost_of(graph, curves, removed):
    return graph.cost({n: c.keep(removed[n]) for n, c in curves.items()})


def met(graph, curves, removed, limits):
    cost = cost_of(graph, curves, removed)
    return all(getattr(cost, t.figure) <= n for t, n in limits)


def best(graph, curves, limits, floor=0.1):
    """The least error over all counts; a tenth of each group stays."""
    sizes = {n: len(c.order) for n, c in curves.items()}
    counts = [range(size - max(1, -(-size // 10)) + 1) for size in sizes.values()]
    plans = (dict(zip(sizes, row, strict=True)) for row in product(*counts))
    return min(error_of(curves, p) for p in plans if met(graph, curves, p, limits))


def error_of(curves, removed):
    return sum(float(c.error[removed[n]]) for n, c in curves.items())


@pytest.mark.parametrize("percent", [80, 60, 40, 25])
@pytest.mark.parametrize("seed", range(4))
def test_no_plan_of_all_is_much_better(graph, percent, seed):
    curves = convex(graph, seed)
    limits = limits_of(graph, MACs(at_most=f"{percent}%"))
    removed = allocate(graph, curves, limits)
    assert met(graph, curves, removed, limits)
    assert all(0 <= n < len(curves[name].order) for name, n in removed.items())
    assert error_of(curves, removed) <= 1.1 * best(graph, curves, limits)


def test_nothing_that_fits_is_left_out(graph):
    for percent in range(95, 15, -6):
        curves = convex(graph, percent)
        limits = limits_of(graph, MACs(at_most=f"{percent}%"))
        removed = allocate(graph, curves, limits)
        for name, n in removed.items():
            assert not n or not met(graph, curves, {**removed, name: n - 1}, limits)


def test_two_targets_are_met_together(graph):
    for macs, params in ((80, 30), (30, 80), (50, 50)):
        curves = convex(graph, 1)
        limits = limits_of(graph, MACs(at_most=f"{macs}%"), Params(at_most=f"{params}%"))
        removed = allocate(graph, curves, limits)
        assert met(graph, curves, removed, limits)
        assert error_of(curves, removed) <= 1.15 * best(graph, curves, limits)


def test_what_costs_no_error_goes_first(graph):
    """Curves that are flat up to some count: a budget that these units meet costs nothing."""
    curves = {}
    for name, g in graph.groups.items():
        n = torch.arange(g.size + 1, dtype=torch.float64)
        curves[name] = Curve(torch.arange(g.size), (n - g.size // 2).clamp_min(0))
    removed = allocate(graph, curves, limits_of(graph, MACs(at_most="45%")))
    assert error_of(curves, removed) == 0.0


def test_a_tenth_stays_until_nothing_else_helps(graph):
    curves = convex(graph, 3)
    lowest = graph.cost({n: c.keep(len(c.order) - 1) for n, c in curves.items()})
    removed = allocate(graph, curves, limits_of(graph, MACs(at_most="12%")))
    assert all(len(c.order) - removed[n] >= max(1, -(-len(c.order) // 10)) for n, c in curves.items())
    removed = allocate(graph, curves, limits_of(graph, MACs(at_most=lowest.macs)))
    assert all(len(c.order) - removed[n] == 1 for n, c in curves.items())
    with pytest.raises(TargetError, match=f"still has {lowest.macs}"):
        allocate(graph, curves, limits_of(graph, MACs(at_most=lowest.macs - 1)))


def test_groups_without_a_curve_stay_whole(graph):
    curves = convex(graph, 0)
    left_out = next(iter(curves))
    del curves[left_out]
    limits = limits_of(graph, MACs(at_most="60%"))
    removed = allocate(graph, curves, limits)
    assert left_out not in removed
    assert met(graph, curves, removed, limits)


def test_units_go_in_the_order_of_the_curve():
    curve = Curve(torch.tensor([2, 0, 3, 1]), torch.arange(5.0))
    assert curve.keep(0).tolist() == [True] * 4
    assert curve.keep(2).tolist() == [False, True, False, True]
    assert curve.scaled(torch.tensor([1.0, 3.0, 1.0, 0.5, 2.0])).error.tolist() == [0, 3, 3, 3, 8]
