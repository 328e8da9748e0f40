"""The Pareto front: what nothing else beats."""

from __future__ import annotations

from collections.abc import Sequence

Point = Sequence[float]


def front(points: Sequence[Point]) -> list[bool]:
    """For every point whether none dominates it; less is better in every figure. Of equal points none dominates another.

    a dominates b where it is no more in every figure and less in one. In lexicographic order a point can only be dominated by one before it, and
    then also by one of the front, so each is compared with the front so far (Kung, Luccio & Preparata 1975 sort alike).

    Args:
        points: finite figures, as many for each.
    """
    held = [tuple(p) for p in points]
    best: list[tuple[float, ...]] = []
    found = [False] * len(held)
    for n in sorted(range(len(held)), key=held.__getitem__):
        found[n] = not any(dominates(b, held[n]) for b in best)
        if found[n]:
            best.append(held[n])
    return found


def dominates(a: Point, b: Point) -> bool:
    return all(x <= y for x, y in zip(a, b, strict=True)) and tuple(a) != tuple(b)
