"""Distance to the geometric median (He et al. 2019, "Filter Pruning via Geometric Median").

    s_u = sum over units v of ||W_u - W_v||_2

W_u is the filter that makes unit u: its weights in the layers that produce the group, one behind the other. A filter close to
all others can be expressed by them; how large it is does not matter.
"""

from __future__ import annotations

import torch

from secateur.calibrate.sites import contracted_slots
from secateur.score.criterion import Criterion, Scores, normalised
from secateur.score.magnitude import state_of, weights_of
from secateur.trace import Graph, Group


def fpgm(graph: Graph, model: torch.nn.Module, seed: int = 0) -> Scores:
    """Sum of distances from a unit's weights to those of every other unit, every group divided by its mean.

    Only the weights that produce a unit count, not those of the layers that take it in. A group that no matrix produces
    is compared by all its matrices, and one without matrices by its vectors. Returns {group: float64 (units,)}.

    Raises:
        ModelError: the model is on the meta device.
    """
    state, taken_in = state_of(model), contracted_slots(graph)
    return {n: normalised(_distances(graph, g, state, taken_in)) for n, g in graph.groups.items()}


def _distances(graph: Graph, group: Group, state: dict[str, torch.Tensor], taken_in: set[tuple[str, int]]) -> torch.Tensor:
    slots = weights_of(graph, group, state)
    slots = [s for s in slots if (s.tensor, s.dim) not in taken_in] or slots
    square = torch.zeros(group.size, group.size, dtype=torch.float64)
    for s in slots:
        w = state[s.tensor].detach()
        rows = (w.abs() if w.is_complex() else w).double().cpu().movedim(s.dim, 0)[s.positions].flatten(1)
        rows = rows - rows.mean(0)  # distances stay, and less is lost where the squares are subtracted
        inner = rows @ rows.T
        square += (inner.diagonal()[:, None] + inner.diagonal() - 2 * inner).clamp_min(0.0)
    return square.sqrt().sum(1)


FPGM = Criterion(
    name="fpgm",
    function=fpgm,
    formula="s_u = sum_v ||W_u - W_v||_2, W_u the weights that produce unit u, divided by the group's mean",
    needs="weights",
    cost="units^2 x weights of a unit, for each group",
    when="Layers whose filters are much alike in size, so that magnitude says little; it removes what others can replace.",
    paper="He et al. 2019, Filter Pruning via Geometric Median for Deep Convolutional Neural Networks Acceleration",
)
