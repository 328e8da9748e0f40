"""Methods against the golden errors and against slow references."""

from dataclasses import replace
from fractions import Fraction

import pytest
import torch

from secateur.errors import DataError, PlanError
from secateur.masks.methods import METHODS
from secateur.masks.obc import obc
from secateur.masks.problem import Problem, error, masked
from secateur.masks.ranked import relative
from secateur.masks.refit import refit
from secateur.masks.sparsegpt import sparsegpt
from secateur.pattern import NM, Block, Free, Kernels, kept, legal
from tests.masks import reference
from tests.masks.golden import COLUMNS, GOLDEN, asked, problem

WITHIN = 0.10


def found(name, p):
    if name == "sparsegpt, 32 columns":
        return sparsegpt(p, 32).w
    if name == "sparsegpt, mask alone":
        return masked(p.w, sparsegpt(p).stays).w
    if name == "obc per row":
        return obc(replace(p, pattern=Free("row")) if isinstance(p.pattern, Free) else p).w
    method, _, after = name.partition(", ")
    solution = METHODS[method].function(p)
    return refit(p.w, p.h, solution.w, solution.stays) if after else solution.w


@pytest.fixture(scope="module")
def errors():
    w, h = problem()
    return {name: [error(w, found(name, Problem(w, h, *asked(c))), h) for c in COLUMNS] for name in GOLDEN}


@pytest.mark.parametrize("name", GOLDEN)
def test_golden_errors(name, errors):
    for column, got, wanted in zip(COLUMNS, errors[name], GOLDEN[name], strict=True):
        assert abs(got / wanted - 1) <= WITHIN, (name, column, got, wanted)


def test_the_order_of_the_methods(errors):
    ranked = ("magnitude", "wanda", "sparsegpt", "sparsegpt, refit", "alps")
    for column in range(len(COLUMNS)):
        each = [errors[name][column] for name in ranked]
        assert each == sorted(each, reverse=True)
        assert abs(errors["obc per row"][column] / errors["alps"][column] - 1) < 0.15


# ------------------------------------------------------------ small problems
def small(rows=3, cols=8, seed=0, pattern=Free(), keep=Fraction(1, 2), damp=0.0):  # noqa: B008
    random = torch.Generator().manual_seed(seed)
    x = torch.randn(200, cols, generator=random, dtype=torch.float64) @ torch.randn(cols, cols, generator=random, dtype=torch.float64)
    return Problem(torch.randn(rows, cols, generator=random, dtype=torch.float64), x.T @ x / 200, pattern, keep, damp=damp)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("at_once", [4, 8])
def test_sparsegpt_is_column_by_column_elimination(seed, at_once):
    p = small(seed=seed)
    got = sparsegpt(p, at_once)
    w, stays = reference.sparsegpt(p.w, p.h, 0.5, at_once)
    assert torch.equal(got.stays, stays)
    assert torch.allclose(got.w, w, atol=1e-8)


@pytest.mark.parametrize("seed", range(4))
def test_refit_is_least_squares_on_the_support(seed):
    p = small(rows=5, cols=12, seed=seed)
    stays = torch.rand(5, 12, generator=torch.Generator().manual_seed(seed)) < 0.5
    got = refit(p.w, p.h, masked(p.w, stays).w, stays, tolerance=1e-12)
    assert torch.allclose(got, reference.least_squares_on(p.w, p.h, stays), atol=1e-7)
    assert not got[~stays].any()


def test_refit_takes_rows_without_weights_and_inputs_that_are_always_zero():
    p = small(rows=4, cols=6)
    h = p.h.clone()
    h[2], h[:, 2] = 0.0, 0.0
    stays = torch.ones(4, 6, dtype=torch.bool)
    stays[0] = False
    got = refit(p.w, h, masked(p.w, stays).w, stays)
    assert bool(torch.isfinite(got).all()) and not got[0].any()
    assert error(p.w[1:], got[1:], h) < 1e-9


@pytest.mark.parametrize("seed", range(4))
def test_obc_removes_what_a_search_over_all_would(seed):
    p = small(rows=2, cols=9, seed=seed, pattern=Free("row"), keep=Fraction(4, 9))
    got = obc(p)
    for r in range(2):
        gone = reference.greedy(p.w[r], p.h, 5)
        assert sorted(gone) == (~got.stays[r]).nonzero()[:, 0].tolist()
    assert torch.allclose(got.w, reference.least_squares_on(p.w, p.h, got.stays), atol=1e-4)


def test_obc_follows_rows_after_their_columns_were_gathered():
    """Wide enough for the working copy to be made smaller on the way."""
    p = small(rows=3, cols=60, seed=5, pattern=Free("row"), keep=Fraction(1, 5))
    got = obc(p)
    for r in range(3):
        assert sorted(reference.greedy(p.w[r], p.h, 48)) == (~got.stays[r]).nonzero()[:, 0].tolist()


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("pattern", [Free(), Free("row"), NM(2, of=4), NM(1, of=4), Block(4), Block(2, 2)], ids=str)
def test_every_method_obeys_every_pattern_exactly(name, pattern):
    keep = Fraction(pattern.n, pattern.of) if isinstance(pattern, NM) else Fraction(2, 5)
    p = small(rows=9, cols=22, pattern=pattern, keep=keep, damp=0.01)  # 9 and 22 leave something over
    got = METHODS[name].function(p)
    assert legal(pattern, got.stays) and not got.w[~got.stays].any()
    assert not (torch.signbit(got.w) & (got.w == 0)).any()
    most = kept(pattern, (9, 22), keep)
    by_sets = name in ("wanda", "ria") and not isinstance(pattern, NM)  # each row rounds down for itself
    assert int(got.stays.sum()) == most if not by_sets else most - 9 <= int(got.stays.sum()) <= most


@pytest.mark.parametrize("name", METHODS)
def test_zeros_that_were_there_stay(name):
    p = small(rows=6, cols=24, damp=0.01)
    old = METHODS["magnitude"].function(replace(p, keep=Fraction(1, 2)))
    p = replace(p, w=old.w, keep=Fraction(1, 4), allowed=old.stays)
    got = METHODS[name].function(p)
    assert not (got.stays & ~old.stays).any()
    assert got.stays.sum() <= 36


@pytest.mark.parametrize("pattern", [Free(), Free("row"), Block(1, 64, "row"), Block(1, 32, "row"), Block(4, 16), Kernels("row", 9)], ids=str)
@pytest.mark.parametrize("keep", [Fraction(1, 10), Fraction(1, 50)])
def test_sparsegpt_keeps_as_many_over_all_sets_of_columns(pattern, keep):
    p = small(rows=16, cols=576, pattern=pattern, keep=keep, damp=0.01)
    got = sparsegpt(p).stays
    assert int(got.sum()) == kept(pattern, (16, 576), keep) and legal(pattern, got)


@pytest.mark.parametrize("pattern", [Free(), Free("row"), Kernels("row", 9), Block(2, 3)], ids=str)
def test_one_unit_at_least_stays(pattern):
    for name in METHODS:
        p = small(rows=4, cols=9, pattern=pattern, keep=Fraction(1, 100), damp=0.01)
        assert int(METHODS[name].function(p).stays.sum()) >= kept(pattern, (4, 9), Fraction(1, 100)) >= 1, name


@pytest.mark.parametrize("name", METHODS)
def test_a_zero_within_a_block_does_not_make_it_go_first(name):
    """What stays is chosen by what blocks are worth, and of blocks that are zero altogether none stays before another."""
    w = torch.tensor([[0.01, 5, 0.01, 3, 0], [0.01, 0, 0.01, 3, 0]], dtype=torch.float64)
    p = Problem(w, torch.eye(5, dtype=torch.float64), Block(2, 1), Fraction(2, 5), w != 0)
    assert METHODS[name].function(p).stays.tolist() == [[False, True, False, True, False], [False, False, False, True, False]]


@pytest.mark.parametrize("name", ["sparsegpt", "obc", "alps"])
def test_singular_moments_are_damped_and_the_damping_is_told(name):
    p = small(rows=4, cols=16)
    x = torch.randn(3, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    got = METHODS[name].function(replace(p, h=x.T @ x, damp=0.01))
    assert got.damped >= 0.01 and bool(torch.isfinite(got.w).all())


@pytest.mark.parametrize("name", [n for n in METHODS if n != "magnitude"])
def test_weights_of_inputs_that_are_always_zero_go_first(name):
    """Also where inputs are so small that anything added for the dead ones would outweigh them."""
    p = small(rows=4, cols=12, damp=0.01, pattern=Free("row"))
    h = 1e-6 * p.h
    h[:3], h[:, :3] = 0.0, 0.0
    got = METHODS[name].function(replace(p, h=h, keep=Fraction(3, 4)))
    assert not got.stays[:, :3].any() and got.stays[:, 3:].all()


def test_damping_is_raised_until_the_inverse_exists():
    p = small(rows=4, cols=16)
    h = p.h - 0.05 * p.h.diagonal().mean() * torch.eye(16, dtype=torch.float64)  # rounding may leave such moments
    assert sparsegpt(replace(p, h=h, damp=0.01)).damped in (pytest.approx(0.01), pytest.approx(0.1), pytest.approx(1.0))
    with pytest.raises(DataError, match="invertible"):
        sparsegpt(replace(p, h=-1e9 * p.h, damp=1e-9))


def test_what_cannot_be_solved_is_refused():
    p = small()
    with pytest.raises(DataError, match="needs to see what the layer takes in"):
        METHODS["wanda"].function(replace(p, h=None))
    with pytest.raises(DataError, match="not finite"):
        METHODS["alps"].function(replace(p, h=p.h * float("nan")))
    with pytest.raises(PlanError, match="third power"):
        obc(Problem(torch.ones(1, 3000), torch.eye(3000), Free(), Fraction(1, 2)))


def test_relative_importance():
    w = torch.tensor([[3.0, -1.0], [1.0, 0.0]])
    assert torch.allclose(relative(w), torch.tensor([[3 / 4 + 3 / 4, 1 / 1 + 1 / 4], [1 / 4 + 1 / 1, 0.0]]))


def test_weights_that_stay_are_as_they_were_even_of_inputs_that_were_always_zero():
    """N:M must keep some of a group whose inputs were all zero in the calibration; other data may not be."""
    p = small(rows=4, cols=8, pattern=NM(2, of=4), keep=Fraction(1, 2))
    h = p.h.clone()
    h[:4], h[:, :4] = 0.0, 0.0
    for name in ("wanda", "ria"):
        got = METHODS[name].function(replace(p, h=h))
        assert torch.equal(got.w[got.stays], p.w[got.stays]) and got.stays[:, :4].any()
