"""Ridge regression and elimination against numpy's least squares on the rows themselves."""

import math
from itertools import combinations

import numpy as np
import pytest
import torch

from secateur.errors import DataError
from secateur.repair.solve import Problem, eliminate, factor, solve

TINY = 1e-13


def rows(features, outputs, count=200, seed=0):
    """Correlated rows and a linear target with noise, both centred."""
    random = torch.Generator().manual_seed(seed)
    x = torch.randn(count, features, generator=random, dtype=torch.float64)
    x = x @ torch.randn(features, features, generator=random, dtype=torch.float64)
    t = x @ torch.randn(features, outputs, generator=random, dtype=torch.float64)
    t = t + torch.randn(count, outputs, generator=random, dtype=torch.float64)
    return x - x.mean(0), t - t.mean(0)


def fitted(x, t, columns):
    """numpy's least squares on some columns: weights, and squared error per row over all outputs."""
    w, *_ = np.linalg.lstsq(x[:, columns].numpy(), t.numpy(), rcond=None)
    return torch.from_numpy(w), float(((t - x[:, columns] @ torch.from_numpy(w)) ** 2).sum() / len(x))


def problem(x, t, columns, scale=1.0):
    every = list(range(x.shape[1]))
    return Problem(x.T @ x / len(x), fitted(x, t, every)[0], columns, scale)


def added(parts, gone):
    """What the errors of all parts (x, t, columns, scale) rise by when the units `gone` are left out and all is fitted anew."""
    total = 0.0
    for x, t, columns, scale in parts:
        lost = set(columns[list(gone)].reshape(-1).tolist()) if gone else set()
        left = [c for c in range(x.shape[1]) if c not in lost]
        total += scale * (fitted(x, t, left)[1] - fitted(x, t, list(range(x.shape[1])))[1])
    return total


@pytest.mark.parametrize("ridge", [1e-6, 1e-3, 0.5])
@pytest.mark.parametrize("batch", [(), (3,)])
def test_solution_is_that_of_least_squares_on_more_rows(ridge, batch):
    """The ridge and what it holds on to, written as rows: sqrt(lambda) w = sqrt(lambda) w0."""
    pairs = [rows(6, 4, seed=s) for s in range(math.prod(batch) or 1)]
    random = torch.Generator().manual_seed(9)
    priors = [torch.randn(6, 4, generator=random, dtype=torch.float64) for _ in pairs]
    a = torch.stack([x.T @ x / len(x) for x, _ in pairs]).reshape(*batch, 6, 6)
    b = torch.stack([x.T @ t / len(x) for x, t in pairs]).reshape(*batch, 6, 4)
    got = solve(a, b, torch.stack(priors).reshape(*batch, 6, 4), ridge).reshape(-1, 6, 4)
    lam = ridge * float(a.diagonal(dim1=-2, dim2=-1).mean())
    for (x, t), prior, found in zip(pairs, priors, got, strict=True):
        more = math.sqrt(lam * len(x)) * torch.eye(6, dtype=torch.float64)
        want = torch.linalg.lstsq(torch.cat([x, more]), torch.cat([t, more @ prior])).solution
        torch.testing.assert_close(found, want, rtol=1e-8, atol=1e-9)


def test_where_the_data_says_nothing_the_weights_stay():
    a, b = torch.zeros(3, 3, dtype=torch.float64), torch.zeros(3, 2, dtype=torch.float64)
    prior = torch.arange(6, dtype=torch.float64).reshape(3, 2)
    torch.testing.assert_close(solve(a, b, prior), prior)


def test_the_ridge_is_raised_until_it_helps_and_no_further():
    a = torch.ones(4, 4, dtype=torch.float64)  # of rank one
    lower, lam = factor(a, 1e-20)
    assert 1e-20 < lam <= 1e-14
    torch.testing.assert_close(lower @ lower.T, a, rtol=1e-6, atol=1e-6)
    _, same = factor(torch.eye(4, dtype=torch.float64), 1e-3)
    assert same == pytest.approx(1e-3)


def test_what_is_no_moment_is_refused():
    with pytest.raises(DataError, match="not finite"):
        factor(torch.full((2, 2), float("nan"), dtype=torch.float64), 1e-3)
    with pytest.raises(DataError, match="invertible"):
        factor(torch.diag(torch.tensor([1.0] * 399 + [-200.0], dtype=torch.float64)), 1e-3)


def pieces(kind):
    """(x, t, columns of the units, scale) of one or two layers that read the same units."""
    x, t = rows(8, 5)
    single, pairs = torch.arange(8)[:, None], torch.randperm(8, generator=torch.Generator().manual_seed(3)).reshape(4, 2)
    if kind == "single":
        return [(x, t, single, 1.0)]
    if kind == "pairs":
        return [(x, t, pairs, 0.3)]
    y, u = rows(12, 3, seed=4)
    return [(x, t, pairs, 0.3), (y, u, torch.arange(12).reshape(4, 3), 2.0)]


@pytest.mark.parametrize("kind", ["single", "pairs", "two readers"])
def test_every_step_is_the_cheapest_and_its_error_is_the_true_one(kind):
    parts = pieces(kind)
    units = len(parts[0][2])
    order, error = eliminate([problem(*p) for p in parts], remove=units - 1, ridge=TINY)
    assert sorted(set(order.tolist())) == sorted(order.tolist()) and len(order) == len(error) == units - 1
    gone = []
    for unit, told in zip(order.tolist(), error.tolist(), strict=True):
        every = {u: added(parts, [*gone, u]) for u in range(units) if u not in gone}
        assert every[unit] <= min(every.values()) * (1 + 1e-6)
        gone.append(unit)
        assert told == pytest.approx(every[unit], rel=1e-7, abs=1e-12)


def test_the_first_removal_is_that_of_an_exhaustive_search():
    for seed in range(10):
        x, t = rows(7, 2, seed=seed)
        parts = [(x, t, torch.arange(7)[:, None], 1.0)]
        order, _ = eliminate([problem(*parts[0])], remove=1, ridge=TINY)
        best = min(combinations(range(7), 1), key=lambda gone: added(parts, gone))
        assert tuple(order.tolist()) == best


def test_all_units_may_go_and_then_everything_is_lost():
    x, t = rows(6, 2)
    _, error = eliminate([problem(x, t, torch.arange(6)[:, None])], ridge=TINY)
    lost = fitted(x, t, list(range(6)))[0]
    assert float(error[-1]) == pytest.approx(float(((x @ lost) ** 2).sum() / len(x)), rel=1e-8)
    assert bool((torch.diff(error) >= 0).all())


def test_columns_that_no_unit_has_stay():
    """Inputs that cannot go (a bias made of an input, another group's units) are refitted too and never leave."""
    x, t = rows(6, 3)
    parts = [(x, t, torch.tensor([[1], [4]]), 1.0)]
    order, error = eliminate([problem(*parts[0])], ridge=TINY)
    assert sorted(order.tolist()) == [0, 1]
    assert float(error[-1]) == pytest.approx(added(parts, [0, 1]), rel=1e-8)


def test_what_is_left_after_a_removal_is_the_least_squares_solution():
    from secateur.repair.solve import _downdate

    x, t = rows(7, 4)
    w, z = fitted(x, t, list(range(7)))[0], torch.linalg.inv(x.T @ x / len(x))
    for gone in ([2], [0, 5]):
        _downdate(z, w, torch.tensor(gone))
    left = [1, 3, 4, 6]
    torch.testing.assert_close(w[left], fitted(x, t, left)[0], rtol=1e-8, atol=1e-9)
    torch.testing.assert_close(z[left][:, left], torch.linalg.inv(x[:, left].T @ x[:, left] / len(x)), rtol=1e-8, atol=1e-9)
    assert not w[[0, 2, 5]].any()


@pytest.mark.parametrize("alike", [True, False])
def test_of_two_equal_units_in_a_wide_layer_one_stays(alike):
    """Wide layers lose several units per step; equal ones cost nothing alone and everything together."""
    random = torch.Generator().manual_seed(0)
    half = torch.randn(2000, 280, generator=random, dtype=torch.float64)
    a = (half.T @ half / 2000).repeat_interleave(2, 0).repeat_interleave(2, 1)  # units 2i and 2i + 1 are the same
    w = torch.randn(560, 3, generator=random, dtype=torch.float64)
    w = w[::2].repeat_interleave(2, 0) if alike else w
    order, error = eliminate([Problem(a, w, torch.arange(560)[:, None])], remove=280)
    whole = float(((half @ (w[::2] + w[1::2])) ** 2).sum() / 2000)
    assert len(set((order // 2).tolist())) == 280
    assert float(error[-1]) < 0.01 * whole


def test_a_wide_layer_tells_its_true_error():
    """Several units a step: the errors are still those of fitting anew, and close to the best order's."""
    x, t = rows(600, 2, count=1500)
    parts = [(x, t, torch.arange(600)[:, None], 1.0)]
    order, error = eliminate([problem(*parts[0])], remove=300, ridge=TINY)
    for n in (1, 9, 100, 300):
        assert float(error[n - 1]) == pytest.approx(added(parts, order[:n].tolist()), rel=1e-5)
