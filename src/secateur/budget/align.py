"""Widths that fill vector registers: the same plan with every group's width rounded to a multiple, no worse a plan by score."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from math import gcd

import torch
from torch import Tensor

from secateur.errors import InputError
from secateur.plan import Plan
from secateur.trace import Graph


def align(graph: Graph, plan: Plan, scores: Mapping[str, Tensor], multiple: int = 8) -> Plan:
    """The plan with the width of every group a multiple of `multiple`, and at least as much score kept in all.

    First every group is rounded down (a group that has less than one multiple left: up). Then groups are rounded up
    again, the one that gains most score per multiply-accumulate first, until the sum of the kept scores is that of
    `plan`. Within a group the units that `plan` keeps come first, then the highest scores. A width is units times channels per
    unit, so heads of 16 channels are aligned as they are; a group with fewer channels than one multiple keeps the count
    that `plan` gave it, and whole residual blocks stay as planned.

    Args:
        graph: the trace that `plan` was made for.
        scores: per group a number for each unit, comparable across groups, as the plan was made from.
        multiple: channels; 1 gives the plan back.

    Raises:
        InputError: `multiple` below 1, or a group without scores.
    """
    if isinstance(multiple, bool) or not isinstance(multiple, int) or multiple < 1:
        raise InputError(f"multiple={multiple!r}: widths are rounded to a whole number of channels.\n  Pass 8, 16 or another.")
    missing = [name for name in plan.keep if name in graph.groups and name not in scores]
    if missing:
        raise InputError(f"group {missing[0]!r} has no scores, so which of its units go is not known.\n  Pass scores for every group.")
    names = [n for n in plan.keep if n in graph.groups]
    ranked = {n: _ranked(scores[n], plan.keep[n]) for n in names}
    worth = {n: finite(scores[n])[ranked[n]].cumsum(0) for n in names}
    have = {n: int(plan.keep[n].sum()) for n in names}
    steps = {n: multiple // gcd(multiple, _channels(graph, n)) for n in names}
    steps = {n: step if step <= graph.groups[n].size else 1 for n, step in steps.items()}
    count = {n: _down(have[n], steps[n], graph.groups[n].size, int(scores[n].isposinf().sum())) for n in names}
    keep = {**plan.keep, **{n: _mask(ranked[n], count[n]) for n in names}}

    def more(n: str) -> int:
        return min(count[n] + steps[n] - count[n] % steps[n], graph.groups[n].size)

    def gain(n: str) -> float:
        """Score for each multiply-accumulate of the next multiple."""
        cost = graph.cost({**keep, n: _mask(ranked[n], more(n))}).macs - graph.cost(keep).macs
        return float(worth[n][more(n) - 1] - worth[n][count[n] - 1]) / max(1, cost)

    gains = {n: gain(n) for n in names if count[n] < graph.groups[n].size and steps[n] > 1}
    wanted = sum(float(worth[n][have[n] - 1]) for n in names)
    while gains and sum(float(worth[n][count[n] - 1]) for n in names) < wanted - 1e-9 * abs(wanted):
        best = max(gains, key=lambda n: gains[n])
        count[best] = more(best)
        keep[best] = _mask(ranked[best], count[best])
        if count[best] < graph.groups[best].size:
            gains[best] = gain(best)
        else:
            del gains[best]
    return replace(plan, keep=keep, after=graph.cost(keep), why={**plan.why, "aligned": multiple})


def _ranked(score: Tensor, keep: Tensor) -> Tensor:
    """Units: those kept, then the others, each with the highest score first and ties by index."""
    order = torch.argsort(score.double(), descending=True, stable=True)
    return order[torch.argsort((~keep[order]).int(), stable=True)]


def finite(score: Tensor) -> Tensor:
    """Infinite scores keep a unit whatever happens, so they count nothing; of minus infinity no other unit is worth less."""
    numbers = score[score.isfinite()].double()
    least = float(numbers.min()) if len(numbers) else 0.0
    return score.double().nan_to_num(posinf=0.0, neginf=min(least, 0.0))


def _mask(order: Tensor, n: int) -> Tensor:
    keep = torch.zeros(len(order), dtype=torch.bool)
    keep[order[:n]] = True
    return keep


def _channels(graph: Graph, name: str) -> int:
    """Channels of one unit where the group is produced: positions in the first tensor that it is dimension 0 of."""
    slots = graph.groups[name].slots
    first = next((s for s in slots if s.dim == 0), slots[0])
    return max(1, first.positions.shape[1])


def _up(n: int, step: int) -> int:
    return -(-n // step) * step


def _down(n: int, step: int, size: int, least: int) -> int:
    """`n` rounded down to a multiple of the step, not below one step nor below `least`, and not above `size`."""
    return min(max(n // step * step, step, _up(least, step)), size)
