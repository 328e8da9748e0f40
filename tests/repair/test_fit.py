"""One layer's fit, against modules that are run and rows that are there."""

import copy

import pytest
import torch
from torch import nn

from secateur.calibrate.moments import Moments
from secateur.repair.fit import Affine, bias_only, folded, least_squares, written, written_plainly
from secateur.repair.layers import find_layers, norm_names
from secateur.repair.rectified import Rows, rectified, rectified_error
from secateur.trace import trace
from secateur.trace.call import bind
from tests.repair.networks import lively


class Normed(nn.Module):
    def __init__(self, layer, norm=None):
        super().__init__()
        self.layer, self.norm = layer, norm or nn.Identity()

    def forward(self, x):
        return self.norm(self.layer(x)) * 1.0


CASES = {
    "conv": (lambda: Normed(nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4)), (3, 5, 5)),
    "conv without bias": (lambda: Normed(nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4, eps=1e-2)), (3, 5, 5)),
    "grouped": (lambda: Normed(nn.Conv2d(6, 4, 3, groups=2), nn.BatchNorm2d(4)), (6, 5, 5)),
    "depthwise": (lambda: Normed(nn.Conv2d(4, 4, 3, groups=4, bias=False), nn.BatchNorm2d(4)), (4, 5, 5)),
    "linear": (lambda: Normed(nn.Linear(5, 4), nn.BatchNorm1d(4)), (5,)),
    "no norm": (lambda: Normed(nn.Linear(5, 4)), (5,)),
    "grouped, no norm": (lambda: Normed(nn.Conv1d(6, 4, 3, groups=2)), (6, 7)),
}


class Given:
    """A model of one layer, its trace, and all its rows."""

    def __init__(self, name, samples=40):
        torch.manual_seed(0)
        build, shape = CASES[name]
        self.model = lively(build())
        self.x = torch.randn(samples, *shape)
        self.graph = trace(self.model, (self.x,))
        (self.layer,) = find_layers(self.graph)
        self.names = norm_names(self.graph, self.layer.norm) if self.layer.norm else None
        self.eps = float(bind(self.layer.norm)["eps"]) if self.layer.norm else 0.0
        self.state = {n: t.detach() for n, t in self.model.state_dict().items()}
        self.rows = self.layer.rows(self.x, None)

    def out(self, model, train=False):
        model = copy.deepcopy(model).train(train)
        with torch.no_grad():
            return self.layer.outputs(model(self.x), None)

    def moments(self, t):
        m = Moments(self.layer.groups, self.rows.shape[2], t.shape[2])
        m.add(self.rows, t)
        return m

    def put(self, state):
        model = copy.deepcopy(self.model)
        model.load_state_dict(state)
        return model

    def of(self, fit):
        return (self.rows.double() @ fit.w.mT + fit.b[:, None]).float()

    def arbitrary(self):
        w = self.layer.matrix(self.state[self.layer.weight])
        return Affine(torch.randn(w.shape, dtype=torch.float64), torch.randn(w.shape[:2], dtype=torch.float64))


@pytest.mark.parametrize("name", CASES)
def test_layer_and_norm_are_one_affine_map(name):
    g = Given(name)
    fit = folded(g.layer, g.state, g.names, g.eps)
    torch.testing.assert_close(g.of(fit), g.out(g.model), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", CASES)
def test_what_is_written_is_what_was_fitted(name):
    """In eval mode exactly, in train mode on the calibration data as well: the norm's statistics are those of its new input."""
    g = Given(name)
    fit, before = g.arbitrary(), dict(g.state)
    outputs = torch.ones(fit.b.shape, dtype=torch.bool)
    written(g.layer, g.state, fit, g.names, (g.moments(g.of(fit)), g.eps, outputs))
    model = g.put(g.state)
    torch.testing.assert_close(g.out(model), g.of(fit), rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(g.out(model, train=True), g.of(fit), rtol=1e-3, atol=1e-3)
    assert all(g.state[n].dtype == t.dtype and g.state[n].shape == t.shape for n, t in before.items())
    if g.names:
        inside = copy.deepcopy(model).eval()
        with torch.no_grad():
            y = g.layer.outputs(inside.layer(g.x), None)
        torch.testing.assert_close(model.norm.running_mean.reshape(fit.b.shape), y.mean(1), rtol=1e-3, atol=1e-4)
        torch.testing.assert_close(model.norm.running_var.reshape(fit.b.shape), y.var(1, correction=0), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("name", CASES)
def test_only_outputs_that_stay_are_written(name):
    g = Given(name)
    fit, before = g.arbitrary(), {n: t.clone() for n, t in g.state.items()}
    outputs = torch.arange(fit.b.numel()).reshape(fit.b.shape) % 2 == 0
    tensors = dict(g.state)
    written(g.layer, g.state, fit, g.names, (g.moments(g.of(fit)), g.eps, outputs))
    assert all(torch.equal(tensors[n], before[n]) for n in before)  # the old tensors are somebody else's
    stay, new, old = outputs.reshape(-1), g.out(g.put(g.state)), g.out(g.model)
    new, old, want = (v.transpose(1, 2).reshape(len(stay), -1) for v in (new, old, g.of(fit)))
    torch.testing.assert_close(new[stay], want[stay], rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(new[~stay], old[~stay])


@pytest.mark.parametrize("name", CASES)
def test_a_trial_computes_the_same(name):
    g = Given(name)
    fit = g.arbitrary()
    written_plainly(g.layer, g.state, fit, g.names, g.eps)
    torch.testing.assert_close(g.out(g.put(g.state)), g.of(fit), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("name", CASES)
def test_the_corrected_bias_makes_the_mean_error_zero(name):
    g = Given(name)
    before = folded(g.layer, g.state, g.names, g.eps)
    t = torch.randn_like(g.out(g.model)) + 3
    fit = bias_only(g.moments(t), before)
    assert fit.w is before.w
    assert (g.of(fit) - t).mean(1).abs().max() < 1e-4


@pytest.mark.parametrize("with_bias", [True, False])
@pytest.mark.parametrize("name", CASES)
def test_the_fit_is_least_squares_over_the_inputs_that_stay(name, with_bias):
    g = Given(name)
    before = folded(g.layer, g.state, g.names, g.eps)
    t = g.out(g.model) + 0.3 * torch.randn_like(g.out(g.model)) + 0.5
    inputs = torch.arange(g.rows.shape[2]) % 3 != 1
    m = g.moments(t)
    fit = least_squares(m, before, inputs, with_bias, ridge=1e-10)
    assert not fit.w[:, :, ~inputs].any()
    errors = []
    for x, y, w, b, old in zip(g.rows.double(), t.double(), fit.w, fit.b, before.b, strict=True):
        x = torch.cat([x[:, inputs], torch.ones(len(x), 1)], 1) if with_bias else x[:, inputs]
        want = torch.linalg.lstsq(x, y, driver="gelsd").solution
        torch.testing.assert_close(w[:, inputs].T, want[: int(inputs.sum())], rtol=1e-3, atol=1e-4)
        torch.testing.assert_close(b, want[-1] if with_bias else old, rtol=1e-3, atol=1e-4)
        errors.append(((g_of(x, w[:, inputs], b, with_bias) - y) ** 2).mean(0) if with_bias else None)
    if with_bias:
        assert fit.error(m, torch.ones(fit.b.shape, dtype=torch.bool)) == pytest.approx(float(torch.stack(errors).sum()), rel=1e-3)


def g_of(x, w, b, with_bias):
    return x[:, : w.shape[1]] @ w.T + b


def test_the_error_told_is_the_error_of_the_rows():
    g = Given("grouped")
    fit, t = g.arbitrary(), g.out(g.model)
    each = ((g.of(fit) - t) ** 2).mean(1)
    some = torch.tensor([[True, False], [True, True]])
    assert fit.error(g.moments(t), some) == pytest.approx(float(each[some].sum()), rel=1e-4)


# ---------------------------------------------------------------- through a ReLU
def constructed(groups=1, count=3000, other=False, offset=0.0):
    random = torch.Generator().manual_seed(0)
    x = torch.randn(groups, count, 8, generator=random)
    t = x @ torch.randn(groups, 8, 5, generator=random) + torch.randn(groups, count, 5, generator=random) - offset
    o = torch.randn(groups, count, 5, generator=random) if other else None
    return x, t, o


def sampled(x, t, o):
    m, rows = Moments(x.shape[0], x.shape[2], t.shape[2]), Rows()
    for i in range(0, x.shape[1], 1000):
        m.add(x[:, i : i + 1000], t[:, i : i + 1000])
        rows.add(x[:, i : i + 1000], t[:, i : i + 1000], None if o is None else o[:, i : i + 1000], 1.0)
    return m, rows


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("other", [False, True])
@pytest.mark.parametrize("offset", [0.0, 2.0])
def test_every_round_lowers_the_bound_on_the_error_after_the_relu(groups, other, offset):
    x, t, o = constructed(groups, other=other, offset=offset)
    m, rows = sampled(x, t, o)
    inputs, every = torch.arange(8) < 5, torch.ones(groups, 5, dtype=torch.bool)
    start = least_squares(m, Affine(torch.zeros(groups, 5, 8, dtype=torch.float64), torch.zeros(groups, 5, dtype=torch.float64)), inputs, True, 1e-9)

    def after_relu(fit):
        """E|relu(y + o) - relu(t + o)|^2 row by row: `t` is what the layer itself should give."""
        there = 0 if o is None else o.double()
        y = x.double() @ fit.w.mT + fit.b[:, None] + there
        return float(((y.relu() - (t.double() + there).relu()) ** 2).mean(1).sum())

    def bound(fit):
        there = 0 if o is None else o.double()
        y, wanted = x.double() @ fit.w.mT + fit.b[:, None] + there, t.double() + there
        return float(torch.where(wanted > 0, (y - wanted) ** 2, y.clamp_min(0) ** 2).mean(1).sum())

    last = bound(start)
    for rounds in range(1, 9):
        fit = rectified(m, start, inputs, rows, 1e-9, rounds)
        assert not fit.w[:, :, ~inputs].any()
        assert bound(fit) <= last * (1 + 1e-6)
        last = bound(fit)
        assert rectified_error(fit, *rows.joined(), every) == pytest.approx(after_relu(fit), rel=1e-3)
    assert after_relu(fit) < 0.98 * after_relu(start)


@pytest.mark.parametrize("side", [4, 8, 16])
@pytest.mark.parametrize("share", [1 / 11.5, 1 / 22, 1 / 44])
def test_thinned_rows_are_of_all_places_of_an_image(side, share):
    places = (torch.arange(64.0 * side * side) % (side * side))[None, :, None]
    rows = Rows()
    rows.add(places, torch.zeros_like(places), None, share)
    columns, lines = rows.joined()[0] % side, rows.joined()[0] // side
    assert len(columns.unique()) == len(lines.unique()) == side


def test_rows_are_thinned_and_never_to_nothing(monkeypatch):
    x, t, o = constructed(2, 1000, other=True)
    rows = Rows()
    rows.add(x, t, o, 0.26)
    kept = rows.joined()
    at = [int((x[0] == row).all(1).nonzero()) for row in kept[0][0]]
    assert len(at) == 250 and at == sorted(set(at))
    assert torch.equal(kept[0], x[:, at]) and torch.equal(kept[1], (t + o)[:, at]) and torch.equal(kept[2], o[:, at])
    for share in (0.9, 0.7, 0.3, 0.01):  # the share that fits into the memory for rows
        monkeypatch.setattr("secateur.repair.rectified.BYTES", int(share * 4 * (x.numel() + 2 * t.numel())))
        few = Rows()
        few.add(x, t, None, share)
        assert len(few.x) == 1
