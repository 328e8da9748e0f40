"""Patterns: exact counts, ties by index, legal for every seed, what cannot be divided stays whole."""

from dataclasses import replace
from fractions import Fraction

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from secateur.errors import InputError, PlanError
from secateur.pattern import NM, Block, Free, Kernels, choose, kept, legal, parse_pattern, share, top, whole, written

PATTERNS = [Free(), Free("row"), NM(2, of=4), NM(1, of=3), NM(4, of=8), Block(4), Block(2, 3), Block(4, 1, "row"), Kernels(size=9), Kernels("row", 4)]
ROWS, COLS = 13, 26
shares = st.integers(1, 99).map(lambda n: Fraction(n, 100))


def scores(seed, levels):
    """Few levels give many ties."""
    return torch.randint(0, levels, (ROWS, COLS), generator=torch.Generator().manual_seed(seed)).double()


@given(st.sampled_from(PATTERNS), shares, st.integers(0, 50), st.sampled_from([2, 5, 1000]))
def test_a_mask_is_exact_legal_and_whole_where_nothing_divides(pattern, keep, seed, levels):
    stays = choose(pattern, scores(seed, levels), keep)
    assert int(stays.sum()) == kept(pattern, (ROWS, COLS), keep)
    assert legal(pattern, stays)
    rows, cols = whole(pattern, (ROWS, COLS))
    assert stays[rows:].all() and stays[:, cols:].all()
    if isinstance(pattern, Free) and pattern.per == "layer":
        assert int(stays.sum()) == int(ROWS * COLS * keep)


@pytest.mark.parametrize("size", [1, 7, 64, 65, 150])
@given(seed=st.integers(0, 99), k=st.integers(-1, 160))
def test_top_is_the_first_of_a_stable_sort(size, seed, k):
    score = torch.randint(0, 5, (size,), generator=torch.Generator().manual_seed(seed)).double()
    values = score.tolist()
    wanted = sorted(range(len(values)), key=lambda i: (-values[i], i))[: max(0, k)]
    assert top(score, k).nonzero()[:, 0].tolist() == sorted(wanted)
    both = torch.stack([score, score.flip(0)])
    assert torch.equal(top(both, k), torch.stack([top(score, k), top(score.flip(0), k)]))


@given(st.sampled_from(PATTERNS), shares, st.integers(0, 20))
def test_what_stays_scores_no_less_than_what_goes(pattern, keep, seed):
    score = scores(seed, 1000)
    stays = choose(pattern, score, keep)
    rows, cols = whole(pattern, (ROWS, COLS))
    stays, score = stays[:rows, :cols], score[:rows, :cols]
    if isinstance(pattern, NM):
        for s, k in zip(score.reshape(-1, pattern.of), stays.reshape(-1, pattern.of), strict=True):
            assert s[k].min() >= s[~k].max()
        return
    r, c = pattern.unit
    score, stays = score.reshape(rows // r, r, cols // c, c).sum((1, 3)), stays[::r, ::c]
    for s, k in zip(score, stays, strict=True) if pattern.per == "row" else [(score, stays)]:
        if k.any() and not k.all():
            assert s[k].min() >= s[~k].max()


def test_a_tighter_share_never_revives_a_weight():
    score = scores(3, 7)
    for pattern in (Free(), Free("row"), Block(4)):
        before = choose(pattern, score, Fraction(1, 2))
        assert not (choose(pattern, score, Fraction(1, 5)) & ~before).any()


def test_an_illegal_mask_is_seen():
    stays = torch.ones(4, 8, dtype=torch.bool)
    assert not legal(NM(2, of=4), stays) and legal(Free(), stays) and legal(Block(4), stays)
    stays[1, 3] = False
    assert not legal(Block(4), stays)


@pytest.mark.parametrize("pattern", PATTERNS)
def test_written_and_read_again(pattern):
    pattern = replace(pattern, size=1) if isinstance(pattern, Kernels) else pattern  # that is of each layer
    assert parse_pattern(written(pattern)) == parse_pattern(written(pattern, groups=3)) == pattern
    assert parse_pattern(written(pattern, transposed=True)) == pattern


@pytest.mark.parametrize("text", ["", "4:2", "0:4", "2:4:8", "4x", "0x1", "free/column", "half"])
def test_a_pattern_that_cannot_be_meant(text):
    with pytest.raises(InputError):
        parse_pattern(text)


@pytest.mark.parametrize(("given_share", "value"), [("10%", Fraction(1, 10)), (0.1, Fraction(1, 10)), ("12.5 %", Fraction(1, 8))])
def test_a_share_is_an_exact_number(given_share, value):
    assert share(given_share) == value


@pytest.mark.parametrize("given_share", ["0%", "100%", 0, 1, -0.1, 1.5, "much", True, None, "nan", "1/0"])
def test_a_share_that_cannot_be_meant(given_share):
    with pytest.raises(InputError):
        share(given_share)


def test_a_matrix_smaller_than_a_unit_is_refused():
    with pytest.raises(PlanError, match="needs 4 outputs and 1 inputs at least, and the layer has 3 x 9"):
        choose(Block(4), torch.ones(3, 9), Fraction(1, 2))
    with pytest.raises(PlanError, match="1 of 4 scores are NaN"):
        choose(Free(), torch.tensor([[1.0, 2.0], [float("nan"), 0.0]]), Fraction(1, 2))
