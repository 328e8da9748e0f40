"""GraSP (Wang et al. 2020, "Picking Winning Tickets Before Training by Preserving Gradient Flow").

    s_u = sum_w w (H g)_w

Removing w changes the squared norm of the gradient by S = -2 w (H g)_w to first order. The paper removes the weights with the
largest S (its factor 2 and the softening of the logits by a temperature left out): those are the lowest of w (H g)_w. The score
is signed. Connections only, as in `snip`.
"""

from __future__ import annotations

from torch import nn

from secateur.calibrate import Calibration
from secateur.score.criterion import Criterion, Scores, normalised
from secateur.score.magnitude import state_of, summed
from secateur.trace import Graph


def grasp(graph: Graph, model: nn.Module, calibration: Calibration) -> Scores:
    """sum_w w (H g)_w, every group divided by the mean of its absolute scores. Returns {group: float64 (units,)}.

    Raises:
        DataError: no labels and no loss, a loss or gradient that is not finite, or an op without a second derivative.
    """
    curved, state = calibration.hessian_gradient, state_of(model)
    flow = {n: (state[n].detach().real if h.shape != state[n].shape else state[n].detach()).double() * h.double() for n, h in curved.items()}
    return {n: normalised(s) for n, s in summed(graph, flow).items()}


GRASP = Criterion(
    name="grasp",
    function=grasp,
    formula="s_u = sum_w w (H g)_w, g the gradient and H the Hessian of the mean loss, divided by the group's mean |s|",
    needs="labels",
    cost="two passes over the data, the second with two backward passes",
    when="Networks at initialisation that must still train after a deep cut.",
    paper="Wang et al. 2020, Picking Winning Tickets Before Training by Preserving Gradient Flow",
)
