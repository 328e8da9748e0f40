"""The error that a unit's removal causes, after the best correction of what stays ("optimal brain surgeon").

    e_u = tr(W_u^T ((A^-1)_uu)^-1 W_u)

A is the Gram matrix of the inputs of a layer that reads the unit, W_u the layer's weights on it, and both are brought up to
date after every removal, so units that stand in for one another do not all go at once. The sum over all layers that read the
unit, each relative to the variance of what it feeds, is the score.
"""

from __future__ import annotations

import torch

from secateur.calibrate import Calibration
from secateur.errors import InputError
from secateur.score.criterion import Criterion, Scores
from secateur.trace import Graph


def obs(graph: Graph, model: torch.nn.Module, calibration: Calibration) -> Scores:
    """The card of a criterion that is computed elsewhere: the elimination is part of the repair, which stands above the
    criteria.

    Raises:
        InputError: always; `prune(score="obs", data=...)` and `Study(...).scores()` compute it.
    """
    raise InputError(
        "score='obs' comes from the layers that are repaired, and score() knows of none.\n"
        "  Use prune(..., data=..., score='obs'), whose result holds a study: result.study.scores()."
    )


OBS = Criterion(
    name="obs",
    function=obs,
    formula="e_u = sum over readers of tr(W_u^T ((A^-1)_uu)^-1 W_u) / var,  A = X^T X;  A^-1 and W follow every removal",
    needs="inputs",
    cost="one pass of a few hundred rows, a Gram matrix and its inverse for each layer, one rank-one update for each unit",
    when="The default with data, and what error curves and least-squares repair are made for; 128 rows or more, no labels.",
    paper="Hassibi & Stork 1993, Optimal Brain Surgeon; Kurtic et al. 2023, ZipLM; Meng et al. 2024, OSSCAR",
)
