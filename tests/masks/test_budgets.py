"""How much of each layer stays: sums are exact, and each rule does what its paper says."""

from fractions import Fraction

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from secateur.errors import InputError
from secateur.masks.budgets import BUDGETS, Weight, erk, lamp, owl

SHAPES = {"first": (16, 3, 3, 3), "middle": (16, 16, 3, 3), "wide": (64, 64, 1, 1), "head": (10, 64)}


def layers(seed=0):
    random = torch.Generator().manual_seed(seed)
    found = {}
    for n, shape in SHAPES.items():
        w = torch.randn(*shape, generator=random).flatten(1)
        found[n] = Weight(w, shape, torch.rand(w.shape[1], generator=random))
    return found


@given(st.sampled_from(sorted(BUDGETS)), st.integers(1, 99), st.integers(0, 5))
def test_what_stays_adds_up(name, percent, seed):
    weights, keep = layers(seed), Fraction(percent, 100)
    budget = BUDGETS[name](weights, keep)
    counts = {n: int(x.size * budget[n]) for n, x in weights.items()}
    total = sum(x.size for x in weights.values())
    assert all(0 < budget[n] <= 1 for n in weights)
    most = int(total * keep)
    assert most - len(weights) <= sum(counts.values()) <= most + sum(c == 1 for c in counts.values())  # one at least of each layer


def test_erk_by_hand():
    """Two layers, neither full: densities are as 7/10 (5 x 2) to 14/40 (10 x 4), which is 2 to 1; of 50 weights 25 stay."""
    two = {"a": Weight(torch.ones(5, 2), (5, 2)), "b": Weight(torch.ones(10, 4), (10, 4))}
    found = erk(two, Fraction(1, 2))
    assert found == {"a": Fraction(8, 10), "b": Fraction(16, 40)}  # 25 / (0.7 * 10 + 0.35 * 40) = 1.19; 0.833 and 0.417


def test_lamp_is_one_threshold():
    found = lamp({"a": Weight(torch.tensor([[1.0, 2.0]]), (1, 2)), "b": Weight(torch.tensor([[3.0, 3.1, 3.2]]), (1, 3))}, Fraction(3, 5))
    # a: 1/5, 1; b: 9/28.85 = 0.31, 9.61/19.85 = 0.48, 1: the three highest are 1, 1 and 0.48
    assert found == {"a": Fraction(1, 2), "b": Fraction(2, 3)}


def test_owl_gives_more_to_outliers_and_needs_data():
    random = torch.Generator().manual_seed(0)
    tame, wild = torch.rand(20, 20, generator=random) + 1, torch.rand(20, 20, generator=random) + 1
    wild[:, 3] = 100.0
    seen = torch.ones(20)
    found = owl({"tame": Weight(tame, (20, 20), seen), "wild": Weight(wild, (20, 20), seen)}, Fraction(1, 2))
    assert float(found["wild"] - found["tame"]) == pytest.approx(0.16, abs=0.006)
    with pytest.raises(InputError, match="take in"):
        owl({"tame": Weight(tame, (20, 20))}, Fraction(1, 2))
