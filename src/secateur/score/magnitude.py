"""Magnitude criteria: how large the weights of a unit are, over all tensors it lives in.

    L1:  s_u = sum over slots of |w|       (Li et al. 2017, "Pruning Filters for Efficient ConvNets")
    L2:  s_u = sqrt(sum over slots of w^2)
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from secateur.errors import ModelError
from secateur.trace import Graph, Group

Scores = dict[str, torch.Tensor]


def per_unit(graph: Graph, group: Group, of: Callable[[torch.Tensor], torch.Tensor], state, matrices: bool = True) -> torch.Tensor:
    """Sum of `of(w)` over every trainable weight of each unit: float64 (units,). Vectors (biases, norms) are left out
    where the group has a matrix or a kernel."""
    slots = [s for s in group.slots if s.tensor in graph.capture.trainable]
    if matrices and any(state[s.tensor].dim() > 1 for s in slots):
        slots = [s for s in slots if state[s.tensor].dim() > 1]
    total = torch.zeros(group.size, dtype=torch.float64)
    for s in slots:
        w = state[s.tensor].detach()
        if w.device.type == "meta":
            raise ModelError(
                f"group {group.name!r} cannot be scored: {s.tensor!r} is on the meta device and has no values.\n"
                "  Load the weights, or use score='random'."
            )
        others = [d for d in range(w.dim()) if d != s.dim]
        each = of((w.abs() if w.is_complex() else w).double())  # squares of large float32 or of small integers overflow
        each = each.sum(others) if others else each
        total += each.cpu()[s.positions].sum(1)
    return total


def _state(graph: Graph, model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return dict(model.named_parameters(remove_duplicate=False))


def l1(graph: Graph, model: torch.nn.Module, seed: int = 0) -> Scores:
    """Sum of absolute weights of each unit, every group divided by its mean. Returns {group: float64 (units,)}.

    Raises:
        ModelError: the model is on the meta device.
    """
    state = _state(graph, model)
    return {n: normalised(per_unit(graph, g, torch.abs, state)) for n, g in graph.groups.items()}


def l2(graph: Graph, model: torch.nn.Module, seed: int = 0) -> Scores:
    """Root of the sum of squared weights of each unit, every group divided by its mean.

    Raises:
        ModelError: the model is on the meta device.
    """
    state = _state(graph, model)
    return {n: normalised(per_unit(graph, g, torch.square, state).sqrt()) for n, g in graph.groups.items()}


def normalised(score: torch.Tensor) -> torch.Tensor:
    """Divided by its mean over the group, so that groups of different width and scale can be ranked together."""
    mean = score.mean()
    return score / mean if mean > 0 else score
