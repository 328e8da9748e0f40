"""SNIP (Lee et al. 2019, "SNIP: Single-shot Network Pruning based on Connection Sensitivity").

    s_u = sum_w |w g|,    g = d loss / d w over all the data

The paper scores connections and keeps the largest |w g|; a unit has the sum of its connections: the weights of its matrices
and kernels, no biases and norms (a group that has nothing else is scored by those).
"""

from __future__ import annotations

from torch import nn

from secateur.calibrate import Calibration
from secateur.score.criterion import Criterion, Scores, normalised
from secateur.score.magnitude import state_of, summed
from secateur.trace import Graph


def snip(graph: Graph, model: nn.Module, calibration: Calibration) -> Scores:
    """sum_w |w g|, g the gradient of the mean loss of all rows, every group divided by its mean.

    Returns {group: float64 (units,)}.

    Raises:
        DataError: no labels and no loss, or a loss or gradient that is not finite.
    """
    mean, state = calibration.gradients.mean, state_of(model)
    saliency = {n: state[n].detach().abs().double() * g.abs().double() for n, g in mean.items()}
    return {n: normalised(s) for n, s in summed(graph, saliency).items()}


SNIP = Criterion(
    name="snip",
    function=snip,
    formula="s_u = sum_w |w g|, g = d (mean loss of all data) / d w, divided by the group's mean",
    needs="labels",
    cost="one forward and one backward pass over the data",
    when="Networks at initialisation, before training.",
    paper="Lee et al. 2019, SNIP: Single-shot Network Pruning based on Connection Sensitivity",
)
