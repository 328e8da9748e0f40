"""Allocation by error curves: the budget is spent where error rises least per unit of cost.

    minimise  sum_g e_g(n_g) + lambda * cost(n),   n_g = units removed from group g

For a fixed lambda every group is decided alone, given what a unit of it costs while the others are as they are (costs
are products of counts); a few sweeps make both agree, and bisection on lambda meets the budget (Shoham & Gersho 1988).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from secateur.budget.targets import Target
from secateur.errors import TargetError
from secateur.plan import Cost
from secateur.trace import Graph

_SWEEPS = 4
_STEPS = 40


@dataclass(frozen=True)
class Curve:
    """`order`: units in the order in which they go. `error[n]`: after n of them went; error[0] is 0 and it never falls."""

    order: Tensor
    error: Tensor

    def keep(self, removed: int) -> Tensor:
        mask = torch.ones(len(self.order), dtype=torch.bool)
        mask[self.order[:removed]] = False
        return mask

    def scaled(self, factor: Tensor) -> Curve:
        return replace(self, error=torch.cummax(self.error * factor, 0)[0])


def allocate(graph: Graph, curves: Mapping[str, Curve], limits: Sequence[tuple[Target, int]], floor: float = 0.1) -> dict[str, int]:
    """Units to remove from each group so that every limit is met. A residual block (`graph.blocks`) that has a curve may go
    entirely, a group keeps one unit at least.

    Raises:
        TargetError: even with `floor` of each group left a limit is not met.
    """
    one = {n: int(n not in graph.blocks) for n in curves}  # what must stay
    most = {n: len(c.order) - max(one[n], int(np.ceil(floor * len(c.order))) * one[n]) for n, c in curves.items()}
    if not _met(graph, curves, most, limits):
        most = {n: len(c.order) - one[n] for n, c in curves.items()}
        if not _met(graph, curves, most, limits):
            have = graph.cost(_keep(curves, most))
            t, limit = next((t, n) for t, n in limits if getattr(have, t.figure) > n)
            raise TargetError(
                f"{t} = {limit:,} {t.figure} is out of reach: with one unit left in each of the {len(curves)} groups "
                f"that have an error curve the model still has {getattr(have, t.figure):,}.\n"
                "  Ask for more, or rank by another criterion (score='l2'), which reaches groups that no linear layer reads."
            )
    low, high = -30.0, 30.0  # log of lambda
    best = most
    start = {n: 0 for n in curves}
    for _ in range(_STEPS):
        middle = (low + high) / 2
        removed = _decide(graph, curves, most, (np.exp(middle), limits), start)
        if _met(graph, curves, removed, limits):
            best, high = removed, middle
        else:
            low = middle
    return _filled(graph, curves, best, limits)


def _keep(curves: Mapping[str, Curve], removed: Mapping[str, int]) -> dict[str, Tensor]:
    return {n: c.keep(removed[n]) for n, c in curves.items()}


def _met(graph: Graph, curves: Mapping[str, Curve], removed: Mapping[str, int], limits: Sequence[tuple[Target, int]]) -> bool:
    cost = graph.cost(_keep(curves, removed))
    return all(getattr(cost, t.figure) <= n for t, n in limits)


def _slopes(graph: Graph, curves: Mapping[str, Curve], removed: Mapping[str, int], limits: Sequence[tuple[Target, int]]) -> dict[str, float]:
    """What one unit of each group costs now, as a share of the budgets."""
    keep = _keep(curves, removed)
    now = graph.cost(keep)
    out = {}
    for name, c in curves.items():
        last = removed[name] >= len(c.order) - (name not in graph.blocks)
        other = graph.cost({**keep, name: c.keep(removed[name] + (-1 if last else 1))})  # at the end one unit more, else one fewer
        out[name] = abs(_share(now, limits) - _share(other, limits))
    return out


def _share(cost: Cost, limits: Sequence[tuple[Target, int]]) -> float:
    return sum(getattr(cost, t.figure) / n for t, n in limits)


def _decide(graph: Graph, curves: Mapping[str, Curve], most: Mapping[str, int], price, start: Mapping[str, int]) -> dict[str, int]:
    factor, limits = price
    removed = dict(start)
    for _ in range(_SWEEPS):
        slopes = _slopes(graph, curves, removed, limits)
        new = {}
        for name, c in curves.items():
            n = torch.arange(most[name] + 1, dtype=torch.float64)
            new[name] = int(torch.argmin(c.error[: most[name] + 1] - factor * slopes[name] * n))
        if new == removed:
            break
        removed = new
    return removed


def _filled(graph: Graph, curves: Mapping[str, Curve], removed: dict[str, int], limits: Sequence[tuple[Target, int]]) -> dict[str, int]:
    """Give units back, the one that saves most error per cost first, as long as the budget holds."""
    while True:
        slopes = _slopes(graph, curves, removed, limits)
        gains = []
        for name, n in removed.items():
            if n:
                gain = float(curves[name].error[n] - curves[name].error[n - 1])
                gains.append((gain / max(slopes[name], 1e-12), name))
        for _, name in sorted(gains, reverse=True):
            trial = {**removed, name: removed[name] - 1}
            if _met(graph, curves, trial, limits):
                removed = trial
                break
        else:
            return removed
