"""Optimal Brain Damage with the Fisher diagonal (LeCun et al. 1990; Theis et al. 2018, "Faster gaze prediction").

    s_u = 1/2 sum_w w^2 E_b[g_b^2]

w runs over all trainable weights of unit u, g_b is the gradient of the mean loss of batch b. OBD expands the loss to second
order around a minimum and keeps the diagonal of the Hessian, for which the Fisher matrix E[g^2] stands in. The gradients are
those of batches: with batches of one row E_b[g_b^2] is the empirical Fisher diagonal itself.
"""

from __future__ import annotations

from torch import nn

from secateur.calibrate import Calibration
from secateur.score.criterion import Criterion, Scores, normalised
from secateur.score.magnitude import state_of, summed
from secateur.trace import Graph


def fisher(graph: Graph, model: nn.Module, calibration: Calibration) -> Scores:
    """1/2 sum_w w^2 E_b[g_b^2], every group divided by its mean. Returns {group: float64 (units,)}.

    Raises:
        DataError: no labels and no loss, or a loss or gradient that is not finite.
    """
    square, state = calibration.gradients.mean_square, state_of(model)
    harm = {n: 0.5 * state[n].detach().abs().double().square() * g.double() for n, g in square.items()}
    return {n: normalised(s) for n, s in summed(graph, harm, matrices=False).items()}


FISHER = Criterion(
    name="fisher",
    function=fisher,
    formula="s_u = 1/2 sum_w w^2 E_batches[g^2], g = d loss / d w, divided by the group's mean",
    needs="labels",
    cost="one forward and one backward pass over the data; batches of one row give the true Fisher diagonal",
    when="Converged networks, where first-order terms cancel.",
    paper="LeCun et al. 1990, Optimal Brain Damage; Theis et al. 2018, Faster gaze prediction with dense networks and Fisher pruning",
)
