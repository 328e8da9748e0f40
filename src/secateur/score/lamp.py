"""LAMP for units (Lee et al. 2021, "Layer-adaptive Sparsity for the Magnitude-based Pruning").

    m_u = sum_w w^2,    s_u = m_u / sum of m_v over the units v of the group with m_v >= m_u

The paper scores single weights of a layer; here the units of a group take their place. A unit is weighed against all that
would be left if it and everything smaller went. Units of equal size get equal scores.
"""

from __future__ import annotations

import torch

from secateur.score.criterion import Criterion, Scores
from secateur.score.magnitude import per_unit, state_of
from secateur.trace import Graph


def lamp(graph: Graph, model: torch.nn.Module, seed: int = 0) -> Scores:
    """m_u over what stays with it: in 0..1, the largest unit of every group alone has 1, so no group is emptied before the
    others. This is already a normalisation by group, so no mean is divided by. Returns {group: float64 (units,)}.

    Raises:
        ModelError: the model is on the meta device.
    """
    state = state_of(model)
    return {n: _adapted(per_unit(graph, g, torch.square, state)) for n, g in graph.groups.items()}


def _adapted(size: torch.Tensor) -> torch.Tensor:
    ordered, place = size.sort()
    left = ordered.flip(0).cumsum(0).flip(0)
    first = torch.searchsorted(ordered, ordered)  # of units of one size, the first: all of them are left with it
    score = torch.where(left[first] > 0, ordered / left[first].clamp_min(torch.finfo(torch.float64).tiny), 0.0)
    return torch.empty_like(score).scatter_(0, place, score)


LAMP = Criterion(
    name="lamp",
    function=lamp,
    formula="m_u = sum_w w^2;  s_u = m_u / sum_{v: m_v >= m_u} m_v",
    needs="weights",
    cost="one look at the weights, one sort per group",
    when="A global ranking without data that must not empty narrow or late layers.",
    paper="Lee et al. 2021, Layer-adaptive Sparsity for the Magnitude-based Pruning",
)
