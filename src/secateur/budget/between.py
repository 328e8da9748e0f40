"""A plan between two others: the smaller one with some of the units that the larger one keeps besides."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor

from secateur.budget.align import finite
from secateur.plan import Plan
from secateur.trace import Graph


def between(graph: Graph, smaller: Plan, larger: Plan, scores: Mapping[str, Tensor], t: float) -> Plan:
    """`smaller` with the first share `t` (0..1) of the units that only `larger` keeps; 1 gives the units of both.

    Units come back group by group, the group that gains most score per multiply-accumulate first, and within a group the highest
    scores first, so that plans of a larger `t` keep all that plans of a smaller one keep.

    Args:
        graph: the trace that both plans were made for.
        scores: per group a number for each unit; groups without are worth nothing.
    """
    extra = {n: larger.keep[n] & ~m for n, m in smaller.keep.items()}
    extra = {n: m for n, m in extra.items() if bool(m.any())}
    nothing = torch.zeros(1, dtype=torch.float64)
    worth = {n: finite(scores.get(n, nothing.expand(len(m)))) for n, m in extra.items()}
    macs = {n: graph.cost({**smaller.keep, n: smaller.keep[n] | m}).macs - smaller.after.macs for n, m in extra.items()}
    first = sorted(extra, key=lambda n: (-float(worth[n][extra[n]].sum()) / max(1, macs[n]), n))
    left = round(t * sum(int(m.sum()) for m in extra.values()))
    keep = {n: m.clone() for n, m in smaller.keep.items()}
    for n in first:
        units = extra[n].nonzero()[:, 0]
        units = units[torch.argsort(worth[n][units], descending=True, stable=True)][:left]
        keep[n][units] = True
        left -= len(units)
    return replace(smaller, keep=keep, after=graph.cost(keep), why={**smaller.why, "between": round(t, 4)})
