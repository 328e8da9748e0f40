"""The Pareto front against every pair of points."""

import pytest
import torch

from secateur.advise import front


def slow(points):
    """Straight from the definition: a point is on the front unless another is no more in every figure and less in one."""

    def beats(a, b):
        return all(x <= y for x, y in zip(a, b, strict=True)) and any(x < y for x, y in zip(a, b, strict=True))

    return [not any(beats(a, b) for a in points) for b in points]


@pytest.mark.parametrize("figures", [1, 2, 3, 4])
@pytest.mark.parametrize("levels", [2, 3, 50])
def test_is_what_the_definition_says(figures, levels):
    random = torch.Generator().manual_seed(10 * figures + levels)
    for points in range(0, 25, 3):  # few levels: many ties and equal points
        held = torch.randint(0, levels, (points, figures), generator=random).tolist()
        assert front(held) == slow(held)


def test_equal_points_are_both_on_it():
    assert front([(1, 2), (1, 2), (2, 2)]) == [True, True, False]
    assert front([(0.0, 1.0), (-0.0, 1.0)]) == [True, True], "and zero has no sign"


def test_it_stays_when_points_off_it_are_dropped_and_the_order_changes():
    random = torch.Generator().manual_seed(3)
    held = [tuple(p) for p in torch.rand(40, 3, generator=random).tolist()]
    best = {p for p, on in zip(held, front(held), strict=True) if on}
    assert all(front(sorted(best, reverse=True)))
    assert {p for p, on in zip(held[::-1], front(held[::-1]), strict=True) if on} == best
