"""Penalties against loops over units and weights, and what they do to a network."""

import copy

import pytest
import torch
from torch import nn

import secateur as sc
from secateur.errors import InputError, PlanError
from secateur.recover.penalties import Growth, bn_l1, group_lasso, growing


class Net(nn.Module):
    """A residual block: its outer channels live in two convolutions, two norms and the columns of three layers."""

    def __init__(self):
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 6, 3, padding=1, bias=False), nn.BatchNorm2d(6)
        self.inner, self.norm2 = nn.Conv2d(6, 4, 3, padding=1), nn.BatchNorm2d(4, affine=False)
        self.back = nn.Conv2d(4, 6, 1)
        self.fc = nn.Linear(6 * 4, 5)
        self.head = nn.Linear(5, 2)

    def forward(self, x):
        x = torch.relu(self.norm(self.stem(x)))
        x = x + self.back(torch.relu(self.norm2(self.inner(x))))
        return self.head(torch.relu(self.fc(x.flatten(1))))


# Units by group: what goes with unit u, written down by hand.
COUPLED = {
    "stem": (6, lambda m, u: [m.stem.weight[u], m.norm.weight[u], m.norm.bias[u], m.inner.weight[:, u], m.back.weight[u], m.back.bias[u],
                              m.fc.weight[:, 4 * u : 4 * u + 4]]),
    "inner": (4, lambda m, u: [m.inner.weight[u], m.inner.bias[u], m.back.weight[:, u]]),
    "fc": (5, lambda m, u: [m.fc.weight[u], m.fc.bias[u], m.head.weight[:, u]]),
}  # fmt: skip
X = torch.randn(16, 3, 2, 2, generator=torch.Generator().manual_seed(0))


def net():
    torch.manual_seed(0)
    model = Net().eval()
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn(p.shape))
    return model


@pytest.fixture(scope="module")
def graph():
    return sc.trace(net(), (X,))


def norms(model):
    """{group: [||w_u||]} by loops, in double precision."""
    return {g: [sum(float((w.detach().double() ** 2).sum()) for w in of(model, u)) ** 0.5 for u in range(n)] for g, (n, of) in COUPLED.items()}


def test_lasso_is_the_sum_of_norms_of_all_that_goes_with_a_unit(graph):
    assert {n.split(".")[0].split(":")[0] for n in graph.groups} == set(COUPLED)
    model = net()
    found = group_lasso(graph, model)
    assert found.shape == () and float(found) == pytest.approx(sum(sum(v) for v in norms(model).values()), rel=1e-6)
    assert float(group_lasso(graph, torch.compile(model, backend="eager"))) == float(found)
    found.backward()
    lengths = norms(model)
    for u in range(5):  # a weight of two groups is drawn in by both
        row = model.fc.weight[u] / lengths["fc"][u] + model.fc.weight[u] / torch.tensor(lengths["stem"]).repeat_interleave(4)
        assert torch.allclose(model.fc.weight.grad[u], row, atol=1e-5)
    assert torch.allclose(model.norm.bias.grad, model.norm.bias / torch.tensor(lengths["stem"]), atol=1e-5)
    assert model.head.bias.grad is None  # it goes with no unit


def test_units_of_zeros_have_no_gradient(graph):
    model = net()
    with torch.no_grad():
        for w in COUPLED["inner"][1](model, 2):
            w.zero_()
    group_lasso(graph, model).backward()
    assert not model.inner.bias.grad[2] and not model.back.weight.grad[0, 2].isnan()
    assert all(bool(torch.isfinite(p.grad).all()) for p in model.parameters() if p.grad is not None)


def test_bn_l1_is_the_sum_of_scales():
    model = net()
    found = bn_l1(model)
    assert found.shape == () and float(found) == pytest.approx(sum(abs(float(v)) for v in model.norm.weight))
    found.backward()
    assert torch.equal(model.norm.weight.grad, model.norm.weight.sign())
    assert all(p.grad is None for n, p in model.named_parameters() if n != "norm.weight")
    tied = nn.ModuleList([model.norm, nn.BatchNorm2d(6)])
    tied[1].weight = model.norm.weight  # one scale in two norms counts once
    assert float(bn_l1(tied)) == float(found)


@pytest.mark.parametrize("step", [0, 9, 10, 57, 10**7])
def test_growing_presses_what_the_plan_removes(graph, step):
    model = net()
    keep = {n: torch.ones(g.size, dtype=torch.bool) for n, g in graph.groups.items()}
    name = next(n for n in keep if n.startswith("inner"))
    keep[name][[0, 3]] = False
    plan = sc.Plan(keep, graph.cost(), graph.cost(keep))
    found = growing(graph, model, step, plan, Growth(rate=0.01, every=10, most=0.3))
    factor = {0: 0.0, 9: 0.0, 10: 0.01, 57: 0.05, 10**7: 0.3}[step]
    lengths = norms(model)["inner"]
    assert float(found) == pytest.approx(factor / 2 * (lengths[0] ** 2 + lengths[3] ** 2), rel=1e-6)
    found.backward()
    assert torch.allclose(model.inner.bias.grad, factor * model.inner.bias * ~keep[name], atol=1e-6)
    assert model.head.weight.grad is None


def test_growing_without_a_plan_presses_the_smallest_most(graph):
    model = net()
    found = growing(graph, model, 20, growth=Growth(rate=0.1, every=10))
    total = 0.0
    for values in norms(model).values():
        total += sum((max(values) - v) / (max(values) - min(values)) * v**2 for v in values)
    assert float(found) == pytest.approx(0.2 / 2 * total, rel=1e-5)
    found.backward()
    lengths = norms(model)["fc"]
    largest, smallest = lengths.index(max(lengths)), lengths.index(min(lengths))
    assert float(model.fc.bias.grad[largest]) == 0
    assert float(model.fc.bias.grad[smallest]) == pytest.approx(0.2 * float(model.fc.bias[smallest]), rel=1e-5)  # factors are constants


def trained(graph, penalty):
    model = net()
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(0.3)
    opt = torch.optim.SGD(model.parameters(), 0.02)
    for step in range(120):
        opt.zero_grad()
        (nn.functional.mse_loss(model(X), X[:, :2, 0, 0]) + penalty(model, step)).backward()
        opt.step()
    return norms(model)


def test_what_is_to_be_cut_has_become_small(graph):
    keep = {n: torch.arange(g.size) >= g.size // 2 for n, g in graph.groups.items()}
    plan = sc.Plan(keep, graph.cost(), graph.cost(keep))
    free = trained(graph, lambda model, step: 0.0)
    pressed = trained(graph, lambda model, step: growing(graph, model, step, plan, Growth(0.2, 10, 2.0)))
    lasso = trained(graph, lambda model, step: 0.6 * group_lasso(graph, model))
    for group, (n, _) in COUPLED.items():
        assert sum(pressed[group][: n // 2]) < 0.5 * sum(free[group][: n // 2])
        assert sum(pressed[group][n // 2 :]) > 0.5 * sum(free[group][n // 2 :])
        assert sum(sorted(lasso[group])[: n // 2]) < 0.5 * sum(sorted(free[group])[: n // 2])


def test_what_cannot_be_meant_is_refused(graph):
    model, plain = net(), nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
    whole = sc.Plan({n: torch.ones(g.size, dtype=torch.bool) for n, g in graph.groups.items()}, graph.cost(), graph.cost())
    other = sc.Plan({"nowhere": torch.tensor([True, False])}, graph.cost(), graph.cost())
    alone = sc.trace(nn.Linear(3, 2), (torch.zeros(1, 3),))
    narrow = copy.deepcopy(model)
    narrow.fc = nn.Linear(24, 7)
    for call, error, says in (
        (lambda: bn_l1(plain), InputError, "0 batch norms"),
        (lambda: bn_l1(net().norm2), InputError, "1 batch norms, none with a scale"),
        (lambda: bn_l1("model"), InputError, "model is a str"),
        (lambda: group_lasso(graph, plain), InputError, "missing in the model"),
        (lambda: group_lasso(graph, narrow), InputError, r"\(5, 24\) in the graph and \(7, 24\)"),
        (lambda: group_lasso(alone, nn.Linear(3, 2)), InputError, "0 groups"),
        (lambda: growing(graph, model, -1), InputError, "step=-1"),
        (lambda: growing(graph, model, 1.5), InputError, "step=1.5"),
        (lambda: growing(graph, model, 1, whole), PlanError, "removes no unit"),
        (lambda: growing(graph, model, 1, other), PlanError, "nowhere"),
        (lambda: Growth(rate=0), InputError, "rate=0"),
        (lambda: Growth(every=2.5), InputError, "every=2.5"),
        (lambda: Growth(most=float("nan")), InputError, "most=nan"),
    ):
        with pytest.raises(error, match=says):
            call()
    assert all(p.grad is None for p in model.parameters())
