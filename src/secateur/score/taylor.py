"""First-order Taylor criteria (Molchanov et al. 2019, "Importance Estimation for Neural Network Pruning").

    taylor:          s_u = E_b |sum_w w g_b|
    taylor_squared:  s_u = E_b (sum_w w g_b)^2

w runs over all trainable weights of unit u, in every tensor it lives in (biases and norms too), g_b is the gradient of the
mean loss of batch b, E_b the mean over batches weighted by their rows. The sum is, to first order, how much the loss changes
when all these weights become 0. The paper's equation 8 is the square; the absolute value is its common variant.
"""

from __future__ import annotations

from torch import nn

from secateur.calibrate import Calibration
from secateur.score.criterion import Criterion, Scores, normalised
from secateur.trace import Graph


def taylor(graph: Graph, model: nn.Module, calibration: Calibration) -> Scores:
    """E_b |sum_w w g_b|, every group divided by its mean. Returns {group: float64 (units,)}.

    Raises:
        DataError: no labels and no loss, or a loss or gradient that is not finite.
    """
    first = calibration.gradients.first
    return {n: normalised(first[n]) for n in graph.groups}


def taylor_squared(graph: Graph, model: nn.Module, calibration: Calibration) -> Scores:
    """E_b (sum_w w g_b)^2, every group divided by its mean. Raises as `taylor`."""
    second = calibration.gradients.second
    return {n: normalised(second[n]) for n in graph.groups}


TAYLOR = Criterion(
    name="taylor",
    function=taylor,
    formula="s_u = E_batches |sum_w w g|, g = d loss / d w, divided by the group's mean",
    needs="labels",
    cost="one forward and one backward pass over the data",
    when="Trained networks with labels at hand; small batches say more than large ones.",
    paper="Molchanov et al. 2019, Importance Estimation for Neural Network Pruning",
)
TAYLOR_SQUARED = Criterion(
    name="taylor_squared",
    function=taylor_squared,
    formula="s_u = E_batches (sum_w w g)^2, g = d loss / d w, divided by the group's mean",
    needs="labels",
    cost="one forward and one backward pass over the data",
    when="As taylor; units that matter on few batches weigh more.",
    paper="Molchanov et al. 2019, Importance Estimation for Neural Network Pruning, equation 8",
)
