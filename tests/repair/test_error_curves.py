"""Error curves and the output's sensitivity, against networks in which the units are really taken out."""

import copy
from functools import partial

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from secateur.budget.curves import Curve
from secateur.mend import study_of
from secateur.repair.curves import collect, readers_of
from secateur.repair.sensitivity import Output, Point, calibrated, stitched
from secateur.repair.solve import eliminate
from secateur.surgery.cut import state_of
from secateur.trace import trace
from tests.repair.networks import Sequenced, linear, lively, seen


def study(model, data):
    return study_of(model, trace(model, (data[:2],)), list(data.split(64)))


def two_readers():
    def does(m, x):
        y = m.a(x).relu()
        return m.c(m.b1(y) + m.b2(y))

    return Sequenced(does, a=linear(6, 10), b1=linear(10, 5), b2=nn.Linear(10, 5, bias=False), c=linear(5, 3))


def with_norm():
    first, second = (nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)), (nn.Conv2d(8, 6, 3, bias=False), nn.BatchNorm2d(6))
    return nn.Sequential(*first, nn.ReLU(), *second, nn.Flatten(), linear(96, 3))


def refitted(x, y, kept, with_bias):
    """Squared error of the best map from the columns `kept` to `y`, by lstsq on the rows."""
    x = x.double()[:, kept]
    x = torch.cat([x, torch.ones(len(x), 1)], 1) if with_bias else x
    w = torch.linalg.lstsq(x, y.double(), driver="gelsd").solution
    return float(((x @ w - y) ** 2).sum())


def test_a_curve_is_the_error_of_the_best_reader_without_the_units(monkeypatch):
    torch.manual_seed(0)
    model = lively(with_norm())
    data = torch.randn(256, 3, 8, 8)
    s = study(model, data)
    (name,) = [n for n in s.graph.groups if n.startswith("0")]
    monkeypatch.setattr("secateur.repair.curves.eliminate", partial(eliminate, ridge=1e-10))
    curve = s.curves[name]
    x, _ = seen(model, "3", data)
    _, y = seen(model, "4", data)
    rows = F.unfold(x, 3).transpose(1, 2).reshape(-1, 8, 9)
    y = y.flatten(2).transpose(1, 2).reshape(-1, 6)
    whole = float(((y - y.mean(0)) ** 2).sum())
    for n in (1, 3, 6, 7):
        kept = curve.keep(n)
        want = refitted(rows.flatten(1), y, kept.repeat_interleave(9), True) / whole
        assert float(curve.error[n]) == pytest.approx(want, rel=1e-3)
        others = [torch.arange(8) != u for u in range(8)]
    best = min(refitted(rows.flatten(1), y, k.repeat_interleave(9), True) for k in others) / whole
    assert float(curve.error[1]) == pytest.approx(best, rel=1e-3)


def test_errors_of_two_readers_add_up_each_by_what_it_feeds():
    torch.manual_seed(0)
    model = two_readers().eval()
    data = torch.randn(256, 6)
    s = study(model, data)
    (name,) = [n for n in s.graph.groups if n.startswith("a")]
    assert [x.name for x in readers_of(s.chunks.graph)[name]] == ["b1", "b2"]
    x, one = seen(model, "b1", data)
    _, two = seen(model, "b2", data)
    joined = one + two
    whole = float(((joined - joined.mean(0)) ** 2).sum())
    for n in (1, 4, 8):
        kept = s.curves[name].keep(n)
        want = (refitted(x, one, kept, True) + refitted(x, two, kept, False)) / whole
        assert float(s.curves[name].error[n]) == pytest.approx(want, rel=0.05)


def test_scores_rise_in_the_order_in_which_units_go():
    torch.manual_seed(0)
    s = study(two_readers().eval(), torch.randn(256, 6))
    for name, curve in s.curves.items():
        assert bool((torch.diff(curve.error) >= 0).all()) and float(curve.error[0]) == 0.0
        scores = s.scores()[name]
        assert bool((torch.diff(scores[curve.order]) >= 0).all())
        assert sorted(curve.order.tolist()) == list(range(s.graph.groups[name].size))


@pytest.mark.parametrize("removed", [2, 5])
def test_the_outputs_divergence_is_that_of_a_network_without_the_units(removed):
    """A copy whose readers are refitted by lstsq on the calibration rows, its outputs compared by hand."""
    torch.manual_seed(0)
    model = two_readers().eval()
    data = torch.randn(256, 6)
    s = study(model, data)
    (name,) = [n for n in s.graph.groups if n.startswith("a")]
    keep = {name: s.curves[name].keep(removed)}
    small = copy.deepcopy(model)
    for layer in ("b1", "b2"):
        x, y = seen(model, layer, data)
        with_bias = layer == "b1"
        cols = torch.cat([x[:, keep[name]], torch.ones(len(x), int(with_bias))], 1).double()
        w = torch.linalg.lstsq(cols, y.double(), driver="gelsd").solution.float()
        module = getattr(small, layer)
        module.weight.data.zero_()
        module.weight.data[:, keep[name]] = w[: int(keep[name].sum())].T
        if with_bias:
            module.bias.data = w[-1]
    state = stitched(s.chunks.graph, s.state, s.readers, keep)
    for n, t in small.state_dict().items():
        torch.testing.assert_close(state[n], t, rtol=0.05, atol=0.02)
    fresh = torch.cat([args[0] for args, _ in s.chunks.feeds[-2:]])
    with torch.no_grad():
        p, q = model(fresh).log_softmax(-1), small(fresh).log_softmax(-1)
    want = float(F.kl_div(q, p, log_target=True, reduction="batchmean"))
    assert s.output.divergence(keep, state) == pytest.approx(want, rel=0.1)
    assert s.output.divergence({}, s.state) == pytest.approx(0.0, abs=1e-9)


def test_a_curve_in_units_of_the_output_goes_through_its_points():
    curve = Curve(torch.arange(8), torch.arange(9.0, dtype=torch.float64) ** 2)
    points = [Point(2, 4.0, 8.0, 0), Point(4, 16.0, 16.0, 0), Point(6, 36.0, 144.0, 0)]
    got = calibrated(curve, points).error
    assert [float(got[p.removed]) for p in points] == pytest.approx([8.0, 16.0, 144.0])
    assert float(got[1]) == pytest.approx(2.0) and float(got[8]) == pytest.approx(256.0)
    assert float(got[3]) == pytest.approx(9 * 2**0.5)  # log-linear in between
    assert bool((torch.diff(got) >= 0).all())
    assert calibrated(curve, []) is curve


def test_groups_that_something_else_sums_over_have_no_curve():
    def does(m, x):
        y, _ = m.r(m.a(x))
        return m.c(y[:, -1])

    torch.manual_seed(0)
    model = Sequenced(does, a=linear(6, 8), r=nn.LSTM(8, 7, batch_first=True), c=linear(7, 3)).eval()
    s = study(model, torch.randn(64, 4, 6))
    for name in s.graph.groups:
        assert name not in s.curves and bool(s.scores()[name].isinf().all())


def test_one_number_for_a_row_is_compared_by_its_error():
    """Its softmax is 1, whatever it is."""
    model, x = nn.Sequential(linear(4, 8), nn.ReLU(), linear(8, 1)).eval(), torch.randn(64, 4)
    graph, state = trace(model, (x,)), {n: t.detach() for n, t in state_of(model).items()}
    with torch.no_grad():
        dense = model(x)
    wrong = {**state, "2.weight": -state["2.weight"]}
    other = dense - 2 * (dense - model[2].bias.detach())
    wanted = float(((other - dense) ** 2).mean() / dense.var(correction=0))
    assert Output(graph, state, [((x,), {})]).divergence({}, wrong) == pytest.approx(wanted, rel=1e-4)


def test_an_error_is_relative_to_the_outputs_of_the_layer_also_behind_a_transposition():
    """In a mixer the addition has the channels last, and the layer the tokens."""
    def does(m, x):
        x = m.e(x)
        return m.h(x + m.d(m.u(x.transpose(1, 2)).relu()).transpose(1, 2))

    model, x = Sequenced(does, e=linear(6, 64), u=linear(4, 12), d=linear(12, 4), h=linear(64, 3)).eval(), torch.randn(32, 4, 6)
    graph = trace(model, (x,))
    (reader,) = [r for r in collect(graph, state_of(model), [((x,), {})], 10**6).values() if r.layer.name == "d"]
    with torch.no_grad():
        e = model.e(x)
        joined = e + model.d(model.u(e.transpose(1, 2)).relu()).transpose(1, 2)
    assert reader.scale == pytest.approx(1 / float(joined.transpose(1, 2).reshape(-1, 4).var(0, correction=0).sum()), rel=1e-4)
