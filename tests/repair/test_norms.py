"""Norms in the repair: one scale and one shift per channel, against a fit by numpy channel by channel."""

import numpy as np
import pytest
import torch
from torch import nn

import secateur as sc
from secateur.repair.layers import find_layers
from secateur.repair.least_squares import Repair, Settings
from secateur.repair.norms import Channels, find_norms
from secateur.surgery.cut import state_of


@pytest.mark.parametrize("with_bias", [True, False])
def test_scale_and_shift_are_the_least_squares_ones(with_bias):
    random = np.random.default_rng(0)
    y, t = random.normal(size=(3, 50, 4)) + 2, random.normal(size=(3, 50, 4))
    t = 0.5 * y + 0.3 * t + 1
    channels = Channels()
    for i in range(3):
        channels.add(torch.from_numpy(y[i : i + 1]), torch.from_numpy(t[i : i + 1]), 2)
    a, c, before, after = channels.fitted(with_bias)
    for j in range(4):
        u, v = y[..., j].ravel(), t[..., j].ravel()
        design = np.stack([u, np.ones_like(u)], 1) if with_bias else u[:, None]
        best = np.linalg.lstsq(design, v, rcond=None)[0]
        assert float(a[j]) == pytest.approx(best[0]) and float(c[j]) == pytest.approx(best[1] if with_bias else 0.0)
        assert float(before[j]) == pytest.approx(((v - u) ** 2).mean())
        assert float(after[j]) == pytest.approx(((v - design @ best) ** 2).mean())


class PostNorm(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b, self.norm, self.act = nn.Linear(8, 32), nn.Linear(32, 8), nn.LayerNorm(8), nn.Tanh()

    def forward(self, x):
        return self.act(self.norm(x + self.b(torch.relu(self.a(x)))))


def test_a_norm_behind_a_cut_gives_the_nearest_values_to_the_dense_ones():
    torch.manual_seed(0)
    model = PostNorm().eval()
    with torch.no_grad():
        model.norm.bias.uniform_(-2, 2)
    data = [torch.randn(64, 8) for _ in range(6)]
    graph = sc.trace(model, (data[0],))
    keep = {"a:out": torch.arange(32) < 10}
    repair = Repair(graph, keep, state_of(model), [((x,), {}) for x in data], Settings())
    (row,) = [r for r in repair.run() if r.layer == "norm"]
    assert row.used == "least squares" and row.repaired < row.plain
    x = torch.cat(data)
    seen = {}
    trial = PostNorm()
    trial.load_state_dict(repair.state)
    for m in (model, trial):
        m.norm.register_forward_hook(lambda norm, _, out: seen.__setitem__(norm, out.detach().double()))
        with torch.no_grad():
            m(x)
    y, t = seen[trial.norm], seen[model.norm]
    residual = t - y  # of a least-squares fit: no mean left, and nothing that y could still explain
    assert residual.mean(0).abs().max() < 1e-5
    assert ((residual * (y - y.mean(0))).mean(0).abs() < 1e-4).all()


def test_a_norm_that_is_fitted_with_its_layer_is_no_norm_of_its_own():
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.BatchNorm2d(8), nn.Flatten(), nn.Linear(8 * 36, 4)).eval()
    graph = sc.trace(model, (torch.randn(2, 3, 8, 8),))
    assert [n.name for n in find_norms(graph, find_layers(graph))] == ["3"]
