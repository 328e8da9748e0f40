"""Magnitude criteria: how large the weights of a unit are, over all tensors it lives in.

    L1:  s_u = sum over slots of |w|       (Li et al. 2017, "Pruning Filters for Efficient ConvNets")
    L2:  s_u = sqrt(sum over slots of w^2)
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch

from secateur.errors import ModelError
from secateur.score.criterion import Criterion, Scores, normalised
from secateur.trace import Graph, Group, Slot


def weights_of(graph: Graph, group: Group, state: Mapping[str, torch.Tensor], matrices: bool = True) -> list[Slot]:
    """The slots of a group in trainable tensors. Vectors (biases, norms) are left out where the group has a matrix or a
    kernel, unless `matrices` is False.

    Raises:
        ModelError: one of them is on the meta device.
    """
    slots = [s for s in group.slots if s.tensor in graph.capture.trainable and s.tensor in state]
    if matrices and any(state[s.tensor].dim() > 1 for s in slots):
        slots = [s for s in slots if state[s.tensor].dim() > 1]
    for s in slots:
        if state[s.tensor].device.type == "meta":
            raise ModelError(
                f"group {group.name!r} cannot be scored: {s.tensor!r} is on the meta device and has no values.\n"
                "  Load the weights, or use score='random'."
            )
    return slots


def per_unit(
    graph: Graph, group: Group, of: Callable[[torch.Tensor], torch.Tensor], state: Mapping[str, torch.Tensor], matrices: bool = True
) -> torch.Tensor:
    """Sum of `of(w)` over every weight of each unit (see `weights_of`): float64 (units,)."""
    total = torch.zeros(group.size, dtype=torch.float64)
    for s in weights_of(graph, group, state, matrices):
        w = state[s.tensor].detach()
        others = [d for d in range(w.dim()) if d != s.dim]
        each = of((w.abs() if w.is_complex() else w).double())  # squares of large float32 or of small integers overflow
        each = each.sum(others) if others else each
        total += each.cpu()[s.positions].sum(1)
    return total


def summed(graph: Graph, values: Mapping[str, torch.Tensor], matrices: bool = True) -> Scores:
    """For every group the sum of `values`, one per weight and by parameter name, over the weights of each unit."""
    return {n: per_unit(graph, g, lambda v: v, values, matrices) for n, g in graph.groups.items()}


def state_of(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Every parameter by every name it has."""
    return dict(model.named_parameters(remove_duplicate=False))


def l1(graph: Graph, model: torch.nn.Module, seed: int = 0) -> Scores:
    """Sum of absolute weights of each unit, every group divided by its mean. Returns {group: float64 (units,)}.

    Raises:
        ModelError: the model is on the meta device.
    """
    state = state_of(model)
    return {n: normalised(per_unit(graph, g, torch.abs, state)) for n, g in graph.groups.items()}


def l2(graph: Graph, model: torch.nn.Module, seed: int = 0) -> Scores:
    """Root of the sum of squared weights of each unit, every group divided by its mean.

    Raises:
        ModelError: the model is on the meta device.
    """
    state = state_of(model)
    return {n: normalised(per_unit(graph, g, torch.square, state).sqrt()) for n, g in graph.groups.items()}


L1 = Criterion(
    name="l1",
    function=l1,
    formula="s_u = sum_w |w|, over all matrices and kernels the unit lives in, divided by the group's mean",
    needs="weights",
    cost="one look at the weights",
    when="A first try without data. Close to l2; a little more tolerant of units with few large weights.",
    paper="Li et al. 2017, Pruning Filters for Efficient ConvNets",
)
L2 = Criterion(
    name="l2",
    function=l2,
    formula="s_u = sqrt(sum_w w^2), over all matrices and kernels the unit lives in, divided by the group's mean",
    needs="weights",
    cost="one look at the weights",
    when="The choice without data: hard to beat when the cut is followed by fine-tuning.",
    paper="Li et al. 2017, Pruning Filters for Efficient ConvNets; He et al. 2018, Soft Filter Pruning",
)
