"""Criteria: graph and weights -> one number per unit; what scores lowest goes first. They know nothing of budgets."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch

from secateur.calibrate import Calibration
from secateur.errors import InputError
from secateur.score.activity import ACTIVATION_MEAN, APOZ, activation_mean, apoz
from secateur.score.bn_scale import BN_SCALE, bn_scale
from secateur.score.chance import RANDOM, random
from secateur.score.criterion import Criterion
from secateur.score.depth import blocks
from secateur.score.fisher import FISHER, fisher
from secateur.score.fpgm import FPGM, fpgm
from secateur.score.grasp import GRASP, grasp
from secateur.score.lamp import LAMP, lamp
from secateur.score.magnitude import L1, L2, l1, l2
from secateur.score.obs import OBS, obs
from secateur.score.snip import SNIP, snip
from secateur.score.synflow import SYNFLOW, synflow
from secateur.score.taylor import TAYLOR, TAYLOR_SQUARED, taylor, taylor_squared
from secateur.score.wanda import FLAP, WANDA, flap, wanda
from secateur.trace import Graph

CRITERIA: dict[str, Criterion] = {
    "l1": L1,
    "l2": L2,
    "bn_scale": BN_SCALE,
    "random": RANDOM,
    "fpgm": FPGM,
    "lamp": LAMP,
    "synflow": SYNFLOW,
    "activation_mean": ACTIVATION_MEAN,
    "apoz": APOZ,
    "wanda": WANDA,
    "flap": FLAP,
    "taylor": TAYLOR,
    "taylor_squared": TAYLOR_SQUARED,
    "fisher": FISHER,
    "snip": SNIP,
    "grasp": GRASP,
    "obs": OBS,
}


def score(
    graph: Graph,
    model: torch.nn.Module,
    by: str | Callable | Mapping[str, torch.Tensor] = "l2",
    seed: int = 0,
    calibration: Calibration | None = None,
):
    """Scores by the name of a criterion, by a function `(graph, model, seed)`, or as given.

    Raises:
        InputError: an unknown name, a criterion that needs data where there is none, or scores that do not fit the groups,
            name others, or hold NaN.
        DataError: data that does not serve the criterion.
    """
    criterion = find(by) if isinstance(by, str) else next((c for c in CRITERIA.values() if by is c or by is c.function), None)
    if criterion is not None:
        given: object = criterion.function(graph, model, seed if criterion.needs == "weights" else _asked_for(criterion, calibration))
    else:
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


def find(name: str) -> Criterion:
    """The criterion of that name.

    Raises:
        InputError: there is none.
    """
    if name not in CRITERIA:
        raise InputError(f"unknown criterion {name!r}.\n  There are: {', '.join(CRITERIA)}.")
    return CRITERIA[name]


def _asked_for(criterion: Criterion, calibration: Calibration | None) -> Calibration:
    if calibration is None:
        what = "batches with labels (or loss=)" if criterion.needs == "labels" else "batches of inputs"
        raise InputError(
            f"score={criterion.name!r} needs data, {what}, and none was given.\n"
            f"  Pass data=, or use score='l2', which needs {CRITERIA['l2'].needs} only."
        )
    return calibration


def _numbers(name: str, value: object) -> torch.Tensor:
    """Scores as they came (a tensor of any dtype, a list, an array) as float64 on the CPU."""
    try:
        return torch.as_tensor(value).detach().to("cpu", torch.float64)
    except (TypeError, ValueError, RuntimeError) as error:
        raise InputError(f"the scores of group {name!r} are a {type(value).__name__}, not numbers.\n  Give one number per unit.") from error


__all__ = [
    "CRITERIA",
    "Criterion",
    "activation_mean",
    "apoz",
    "blocks",
    "bn_scale",
    "find",
    "fisher",
    "flap",
    "fpgm",
    "grasp",
    "l1",
    "l2",
    "lamp",
    "obs",
    "random",
    "score",
    "snip",
    "synflow",
    "taylor",
    "taylor_squared",
    "wanda",
]
