"""Weights times the inputs they meet, per unit, in the layers that take the unit in.

    wanda:  s_u = sum_j sum_o |W_oj| rms(x_j)         (Sun et al. 2024, "A Simple and Effective Pruning Approach for LLMs")
    flap:   s_u = sum_j var(x_j) ||W_:j||^2           (An et al. 2024, "Fluctuation-based Adaptive Structured Pruning for LLMs")

j runs over the input positions of unit u in every layer that contracts it: the channels of a convolution (|W| then summed over
the kernel), the features of a linear layer. rms is the root of the mean square over rows and positions: the norm of Wanda but
for the number of rows. var is E[x^2] - E[x]^2: what a bias cannot make up for when the unit goes.
"""

from __future__ import annotations

import torch
from torch import nn

from secateur.calibrate import Calibration
from secateur.score.criterion import Criterion, Scores, normalised, staying
from secateur.trace import Graph


def wanda(graph: Graph, model: nn.Module, calibration: Calibration) -> Scores:
    """sum_j |W_:j| rms(x_j), every group divided by its mean. Returns {group: float64 (units,)}.

    A group that no layer's weight contracts (queries and keys, which meet each other) is scored by rms(x) where it is
    produced, as if by weights of one; a group that no tensor shows scores infinity and stays whole. Recurrences, einsum and
    bilinear forms do not count among the layers that take a unit in.

    Raises:
        DataError: a batch that does not run, or activations that are not finite.
    """
    return _scores(graph, calibration, lambda row: row.column_abs * row.mean_square.sqrt(), lambda seen: seen.mean_square.sqrt())


def flap(graph: Graph, model: nn.Module, calibration: Calibration) -> Scores:
    """sum_j var(x_j) ||W_:j||^2, every group divided by its mean. Groups that no layer's weight contracts are scored by
    var(x) where they are produced; otherwise as `wanda`. Returns {group: float64 (units,)}.

    Raises:
        DataError: a batch that does not run, or activations that are not finite.
    """

    def variance(row) -> torch.Tensor:
        return (row.mean_square - row.mean.square()).clamp_min(0.0)

    return _scores(graph, calibration, lambda row: row.column_square * variance(row), variance)


def _scores(graph: Graph, calibration: Calibration, of_inputs, of_outputs) -> Scores:
    taken_in, seen = calibration.inputs, calibration.activations
    out = {}
    for name, group in graph.groups.items():
        if name in taken_in:
            out[name] = normalised(torch.stack([row.per_unit(of_inputs(row)) for row in taken_in[name]]).sum(0))
        else:
            out[name] = normalised(of_outputs(seen[name])) if name in seen else staying(group.size)
    return out


WANDA = Criterion(
    name="wanda",
    function=wanda,
    formula="s_u = sum over input positions j of u: sum_o |W_oj| sqrt(E[x_j^2]), divided by the group's mean",
    needs="inputs",
    cost="one forward pass over the data",
    when="Without labels; transformers, whose activations differ much more in size than their weights.",
    paper="Sun et al. 2024, A Simple and Effective Pruning Approach for Large Language Models",
)
FLAP = Criterion(
    name="flap",
    function=flap,
    formula="s_u = sum over input positions j of u: (E[x_j^2] - E[x_j]^2) sum_o W_oj^2, divided by the group's mean",
    needs="inputs",
    cost="one forward pass over the data",
    when="Together with a repair that gives biases, which makes up for what is constant in the unit.",
    paper="An et al. 2024, Fluctuation-based Adaptive Structured Pruning for Large Language Models",
)
