"""Budgets found by trying: sums stay, nothing gets worse, and the output is nearer to the dense one."""

import random
from fractions import Fraction

import pytest
import torch

import secateur as sc
from secateur.errors import DataError, InputError
from secateur.masks.budgets import BUDGETS, LEAST
from secateur.masks.problem import finite
from secateur.masks.search import evolved, moved
from tests.masks.test_budgets import layers
from tests.masks.test_permute import net  # noqa: F401  # a fixture
from tests.masks.test_sparsify import ARGS, batches

QUIET = (0, lambda stage: None)


@pytest.mark.parametrize("seed", range(5))
def test_a_child_has_as_many_weights(seed):
    sizes, least = {"a": 100, "b": 50, "c": 1000}, {"a": 5, "b": 5, "c": 50}
    parent, draw, changed = {"a": 10, "b": 49, "c": 60}, random.Random(seed), 0
    for _ in range(200):
        child = moved(parent, sizes, least, 7, draw)
        assert sum(child.values()) == sum(parent.values())
        assert all(least[n] <= child[n] <= sizes[n] for n in sizes)
        changed += child != parent
        parent = child
    assert changed > 50


def test_what_is_wanted_is_found():
    """The divergence is the distance from a budget that is far from every rule."""
    weights, keep = layers(), Fraction(3, 10)
    sizes = {n: x.size for n, x in weights.items()}
    total = sum(int(s * keep) for s in sizes.values())
    wanted = {"first": sizes["first"], "middle": 200, "head": 30}
    wanted["wide"] = total - sum(wanted.values())

    def apart(counts, batches):
        return sum(abs(counts[n] - wanted[n]) for n in sizes)

    found = evolved(weights, keep, apart, 2, QUIET)
    rules = [apart({n: int(sizes[n] * d) for n, d in rule(weights, keep).items()}, 2) for rule in BUDGETS.values()]
    assert apart(found, 2) < 0.35 * min(rules)
    assert sum(found.values()) <= int(sum(sizes.values()) * keep)
    assert all(found[n] >= int(LEAST * float(keep) * sizes[n]) for n in sizes)
    assert found == evolved(weights, keep, apart, 2, QUIET)


def test_the_output_is_nearer_with_the_budget_that_was_found(net):  # noqa: F811
    data = batches()

    def divergence(budget):
        how = sc.Sparse("25%", by="sparsegpt", budget=budget, refit=False, corrected=False)
        result = sc.sparsify(net, ARGS, how, data)
        assert result.plan.why["kept"] <= 0.25 * result.plan.why["of_weights"]
        with torch.no_grad():
            x = torch.cat(data)
            p, q = net(x).log_softmax(-1), result.model(x).log_softmax(-1)
        return float((p.exp() * (p - q)).sum(-1).mean())

    assert divergence("search") < 0.9 * divergence("uniform")


def test_a_search_needs_data(net):  # noqa: F811
    with pytest.raises(InputError, match="compares outputs on data"):
        sc.sparsify(net, ARGS, sc.Sparse("25%", budget="search"))


@pytest.mark.parametrize("best", sorted(BUDGETS))
def test_the_best_rule_is_where_it_begins(best, monkeypatch):
    monkeypatch.setattr("secateur.masks.search.GENERATIONS", 0)
    weights, keep = layers(), Fraction(3, 10)
    wanted = {n: max(1, int(weights[n].size * d)) for n, d in BUDGETS[best](weights, keep).items()}
    assert evolved(weights, keep, lambda counts, batches: float(counts != wanted), 2, QUIET) == wanted


def test_all_batches_decide(monkeypatch):
    """What is better on the first batch alone is never taken."""
    weights, keep = layers(), Fraction(3, 10)
    start = evolved(weights, keep, lambda counts, batches: 1.0, 2, QUIET)
    assert evolved(weights, keep, lambda counts, batches: 1.0 if batches == 2 else counts["head"] / 1e6, 2, QUIET) == start


def test_outputs_that_are_not_finite_are_refused_and_such_children_passed_over():
    weights, keep = layers(), Fraction(3, 10)
    with pytest.raises(DataError, match="not finite"):
        evolved(weights, keep, lambda counts, batches: float("nan"), 2, QUIET)
    start = evolved(weights, keep, lambda counts, batches: 1.0, 2, QUIET)
    found = evolved(weights, keep, lambda counts, batches: 1.0 if counts == start else float("nan"), 2, QUIET)
    assert found == start


@pytest.mark.parametrize("how", [sc.Sparse("50%", pattern=sc.Kernels(), budget="search"), sc.Sparse("50%", pattern=sc.Block(4, 1), budget="search"),
                                 sc.Sparse("30%", by="wanda", budget="search")], ids=lambda h: str(h.pattern))  # fmt: skip
def test_patterns_and_convolutions_are_searched_too(net, how, monkeypatch):  # noqa: F811
    monkeypatch.setattr("secateur.masks.search.GENERATIONS", 4)
    result = sc.sparsify(net, ARGS, how, batches())
    assert result.proof.passed and 0.4 * float(how.share()) < result.plan.why["kept"] / result.plan.why["of_weights"] <= float(how.share()) + 0.05


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_searched(dtype, monkeypatch):
    monkeypatch.setattr("secateur.masks.search.GENERATIONS", 2)
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.ReLU(), torch.nn.Linear(16, 4)).to(dtype).eval()
    data = [torch.randn(32, 8).to(dtype) for _ in range(4)]
    assert sc.sparsify(model, (data[0],), sc.Sparse("50%", by="sparsegpt", budget="search"), data).proof.passed


def test_decisions_cannot_be_compared():
    class Decides(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = torch.nn.Linear(8, 16), torch.nn.Linear(16, 4)

        def forward(self, x):
            return self.b(torch.relu(self.a(x))).argmax(1)

    data = [torch.randn(32, 8) for _ in range(4)]
    with pytest.raises(InputError, match="none of floating point"):
        sc.sparsify(Decides().eval(), (data[0],), sc.Sparse("50%", by="sparsegpt", budget="search"), data)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_finite_is_what_isfinite_says(dtype):
    for bad in (torch.nan, torch.inf, -torch.inf, 3.0):
        t = torch.randn(7, 5).to(dtype)
        t[3, 2] = bad
        assert finite(t) == bool(torch.isfinite(t).all()) == (bad == 3.0)
        assert finite(t.t()[:, 3:]) == (bad == 3.0)
    assert finite(torch.zeros(0, 4, dtype=dtype))
