"""Who goes: one elimination order over all units, and as long a prefix of it as the budget demands.

The order does not know the budget, so a tighter target removes a superset of what a looser one removes. Only where the
last unit of the prefix was so costly that the result falls more than 1 % below the budget, units are put back
(latest removed first) as far as they fit.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass

import numpy as np
import torch

from secateur.budget.measured import MeasuredTarget
from secateur.budget.targets import Target
from secateur.errors import InputError, TargetError
from secateur.plan import Cost, Plan
from secateur.trace import Graph

FLOOR = 0.1  # of each group stays as long as anything else can go: a layer cut to one unit cuts the network in two
CLOSE = 0.99
ALLOCATIONS = ("global", "uniform")


def plan(graph: Graph, scores: Mapping[str, torch.Tensor], *targets: Target, allocation: str = "global", fill: bool = True) -> Plan:
    """Choose who stays so that every target is met.

    Args:
        graph: a trace.
        scores: one number per unit and group; the lowest go first, infinity never goes. Residual blocks (`graph.blocks`)
            that have a score, one number, may go as a whole.
        targets: all are met at once.
        allocation: "global" ranks all units together, "uniform" takes the same share of every group.
        fill: put units back where the result is more than 1 % below the budget.

    Raises:
        InputError: no target, an unknown allocation, or a budget that is not between 0 and the dense model.
        TargetError: the targets cannot be met; the message names the nearest reachable and what stands in the way.
    """
    if not targets:
        raise InputError("no target was given.\n  Pass one, such as MACs(at_most='50%').")
    for t in targets:
        if isinstance(t, MeasuredTarget):
            raise InputError(f"{t} has to be measured on a cut model, and plan() makes none.\n  Pass it to prune().")
        if not isinstance(t, Target):
            raise InputError(f"{t!r} is no target.\n  Pass MACs(at_most='50%'), Params(...) or Bytes(...).")
    dense = graph.cost()
    limits = [(t, t.limit(dense)) for t in targets]
    order = elimination_order(scores, allocation, graph.blocks)

    def reached(n: int) -> bool:
        return _fits(graph.cost(order.keep(scores, n)), limits)

    if not reached(len(order)):
        raise _out_of_reach(graph, scores, order, limits)
    low, high = 0, len(order)
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if reached(middle) else (middle + 1, high)
    keep = order.keep(scores, low)
    if fill:
        _put_back(graph, keep, order, low, limits)
    after = graph.cost(keep)
    why = {"targets": [str(t) for t in targets], "limits": [n for _, n in limits], "allocation": allocation}
    return Plan(keep, dense, after, why)


def elimination_order(scores: Mapping[str, torch.Tensor], allocation: str, blocks: Collection[str] = ()) -> Order:
    """All removable units, first to go first; at least one of each group is never listed, but whole `blocks` are. Ties go
    by group and index.

    A tenth of each group goes only after everything else: a layer cut to one unit cuts the network in two.
    """
    if allocation not in ALLOCATIONS:
        raise InputError(f"unknown allocation {allocation!r}.\n  There are: {', '.join(ALLOCATIONS)}.")
    last: list[np.ndarray] = [np.zeros(0)]
    keys, groups, units = list(last), list(last), list(last)
    for g, (name, score) in enumerate(scores.items()):
        value = score.numpy().astype(np.float64)
        if np.isnan(value).any():
            raise InputError(f"the scores of group {name!r} hold NaN.\n  Give every unit a number; infinity keeps it.")
        removable = len(value) - (name not in blocks)
        ranked = np.argsort(value, kind="stable")[:removable]
        ranked = ranked[~np.isposinf(value[ranked])]
        rank = np.arange(len(ranked))
        last.append(rank >= len(value) - max(1, int(np.ceil(FLOOR * len(value)))) + (name in blocks))
        keys.append(value[ranked] if allocation == "global" else (rank + 1) / len(value))
        groups.append(np.full(len(ranked), g))
        units.append(ranked)
    by = [np.concatenate(column) for column in (units, groups, keys, last)]
    order = np.lexsort(by)
    return Order(list(scores), by[1][order].astype(int), by[0][order].astype(int))


@dataclass(frozen=True)
class Order:
    """Units in the order in which they go: `names[groups[i]]`, unit `units[i]`."""

    names: list[str]
    groups: np.ndarray
    units: np.ndarray

    def __len__(self) -> int:
        return len(self.units)

    def keep(self, scores: Mapping[str, torch.Tensor], n: int) -> dict[str, torch.Tensor]:
        """Masks after the first `n` units went."""
        masks = {}
        gone, units = self.groups[:n], self.units[:n]
        by_group = np.argsort(gone, kind="stable")
        bounds = np.searchsorted(gone[by_group], np.arange(len(self.names) + 1))
        for g, name in enumerate(self.names):
            mask = np.ones(len(scores[name]), bool)
            mask[units[by_group[bounds[g] : bounds[g + 1]]]] = False
            masks[name] = torch.from_numpy(mask)
        return masks


def _fits(cost: Cost, limits: list[tuple[Target, int]]) -> bool:
    return all(getattr(cost, t.figure) <= limit for t, limit in limits)


def _close(cost: Cost, limits: list[tuple[Target, int]]) -> bool:
    return any(getattr(cost, t.figure) >= CLOSE * limit for t, limit in limits)


def _put_back(graph: Graph, keep: dict[str, torch.Tensor], order: Order, n: int, limits: list[tuple[Target, int]]) -> None:
    """Revive units, latest removed first, while the result is more than 1 % below the budget and they fit."""
    full: set[str] = set()  # a group whose next unit did not fit gets no further try: its units cost about the same
    for i in reversed(range(n)):
        name, unit = order.names[order.groups[i]], order.units[i]
        if _close(graph.cost(keep), limits):
            return
        if name in full:
            continue
        keep[name][unit] = True
        if not _fits(graph.cost(keep), limits):
            keep[name][unit] = False
            full.add(name)
        if len(full) == len(keep):
            return


def _out_of_reach(graph: Graph, scores: Mapping[str, torch.Tensor], order: Order, limits: list[tuple[Target, int]]) -> TargetError:
    keep = order.keep(scores, len(order))
    nearest, dense = graph.cost(keep), graph.cost()
    target, limit = next((t, n) for t, n in limits if getattr(nearest, t.figure) > n)
    have = getattr(nearest, target.figure)
    whole = max(1, getattr(dense, target.figure))
    by_axis = graph.keep_axes(keep)
    reachable = np.ceil(1000 * have / whole) / 10
    return TargetError(
        f"{target} = {limit:,} {target.figure} is out of reach: with one unit left in each of the {len(scores)} groups "
        f"the model still has {have:,} ({100 * have / whole:.1f} % of {whole:,}).\n"
        f"  What stands in the way: {'; '.join(graph.obstacles(by_axis)) or 'no axis of this model can be cut'}.\n"
        f"  The nearest reachable is {target.figure}={reachable:.1f}%; ask for that much or more, or drop entries of ignore=."
    )
