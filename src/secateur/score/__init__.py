"""Criteria: graph and weights -> one number per unit; what scores lowest goes first. They know nothing of budgets."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch

from secateur.errors import InputError
from secateur.score.bn_scale import bn_scale
from secateur.score.chance import random
from secateur.score.depth import blocks
from secateur.score.magnitude import l1, l2
from secateur.trace import Graph

CRITERIA: dict[str, Callable[..., dict[str, torch.Tensor]]] = {"l1": l1, "l2": l2, "bn_scale": bn_scale, "random": random}


def score(graph: Graph, model: torch.nn.Module, by: str | Callable | Mapping[str, torch.Tensor] = "l2", seed: int = 0):
    """Scores by the name of a criterion, by a function `(graph, model, seed)`, or as given.

    Raises:
        InputError: an unknown name, or scores that do not fit the groups, name others, or hold NaN.
    """
    if isinstance(by, str):
        if by not in CRITERIA:
            raise InputError(f"unknown criterion {by!r}.\n  There are: {', '.join(CRITERIA)}.")
        by = CRITERIA[by]
    given = by(graph, model, seed) if callable(by) else by
    if not isinstance(given, Mapping):
        raise InputError(f"scores are a {type(given).__name__}.\n  Give the name of a criterion, or one number per unit as {{group: tensor}}.")
    found = {name: _numbers(name, value) for name, value in given.items()}
    if others := [name for name in found if name not in graph.groups and name not in graph.blocks]:
        first = next(iter(graph.groups), "")
        raise InputError(f"there are scores for {others[0]!r}, which is no group of this model.\n  Groups are named like {first!r}.")
    for name, group in graph.groups.items():
        if name not in found or tuple(found[name].shape) != (group.size,):
            have = tuple(found[name].shape) if name in found else "none"
            raise InputError(f"group {name!r} has {group.size} units and its scores have shape {have}.\n  Give one number per unit.")
        if bool(torch.isnan(found[name]).any()):
            raise InputError(f"the scores of group {name!r} hold NaN.\n  Check the weights of {group.slots[0].tensor!r}.")
    return found


def _numbers(name: str, value: object) -> torch.Tensor:
    """Scores as they came (a tensor of any dtype, a list, an array) as float64 on the CPU."""
    try:
        return torch.as_tensor(value).detach().to("cpu", torch.float64)
    except (TypeError, ValueError, RuntimeError) as error:
        raise InputError(f"the scores of group {name!r} are a {type(value).__name__}, not numbers.\n  Give one number per unit.") from error


__all__ = ["CRITERIA", "blocks", "bn_scale", "l1", "l2", "random", "score"]
