"""BatchNorm scale |gamma| (Liu et al. 2017, "Learning Efficient Convolutional Networks through Network Slimming")."""

from __future__ import annotations

import torch
from torch import nn

from secateur.errors import InputError
from secateur.score.criterion import Criterion, Scores
from secateur.trace import Graph


def bn_scale(graph: Graph, model: nn.Module, seed: int = 0) -> Scores:
    """s_u = sum of |gamma_u| over the batch norms a unit passes. Groups without one score infinity: they stay whole.

    Raises:
        InputError: no group has a batch norm with a scale.
    """
    names = {
        f"{path}.weight" if path else "weight"
        for path, m in model.named_modules()
        if isinstance(m, nn.modules.batchnorm._BatchNorm) and m.weight is not None
    }
    state = dict(model.named_parameters(remove_duplicate=False))
    out: Scores = {}
    for name, group in graph.groups.items():
        slots = [s for s in group.slots if s.tensor in names]
        total = torch.full((group.size,), 0.0 if slots else torch.inf, dtype=torch.float64)
        for s in slots:
            total += state[s.tensor].detach().cpu().double().abs()[s.positions].sum(1)
        out[name] = total
    if all(bool(torch.isinf(v).all()) for v in out.values()):
        raise InputError(
            f"score='bn_scale' needs batch norms, and none of the {len(out)} groups of {type(model).__name__} passes one.\n"
            "  Use score='l2'."
        )
    return out


BN_SCALE = Criterion(
    name="bn_scale",
    function=bn_scale,
    formula="s_u = sum |gamma_u| over the batch norms the unit passes; not divided by a mean",
    needs="weights",
    cost="one look at the weights",
    when="Networks trained with a penalty on the scales of their batch norms; without that penalty it says little.",
    paper="Liu et al. 2017, Learning Efficient Convolutional Networks through Network Slimming",
)
