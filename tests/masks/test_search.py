"""Budgets found by trying: sums stay, nothing gets worse, and the output is nearer to the dense one."""

import random
from fractions import Fraction

import pytest
import torch

import secateur as sc
from secateur.errors import InputError
from secateur.masks.budgets import BUDGETS, LEAST
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
