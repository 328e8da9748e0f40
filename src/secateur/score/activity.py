"""Criteria on what a unit gives: the mean size of its activations, and how often they are not zero.

    activation_mean:  s_u = E|x_u|       (Molchanov et al. 2017, "Pruning Convolutional Neural Networks for Resource Efficient Inference")
    apoz:             s_u = 1 - share of x_u == 0      (Hu et al. 2016, "Network Trimming")

x_u is looked at behind the activation that follows each layer that produces the unit, see `secateur.calibrate.sites`. Behind a
ReLU E|x| is the paper's mean of x; elsewhere a mean of signed values would say nothing about size.
"""

from __future__ import annotations

import torch
from torch import nn

from secateur.calibrate import Calibration
from secateur.errors import InputError
from secateur.score.criterion import Criterion, Scores, normalised, staying
from secateur.trace import Graph


def activation_mean(graph: Graph, model: nn.Module, calibration: Calibration) -> Scores:
    """E|x_u| over the data, every group divided by its mean. Groups whose units no tensor of the network shows score
    infinity: they stay whole. Returns {group: float64 (units,)}.

    Raises:
        DataError: a batch that does not run, or activations that are not finite.
    """
    seen = calibration.activations
    return {n: normalised(seen[n].mean_abs) if n in seen else staying(g.size) for n, g in graph.groups.items()}


def apoz(graph: Graph, model: nn.Module, calibration: Calibration) -> Scores:
    """1 - average percentage of zeros (as a share), every group divided by its mean. Groups in which no zero was seen (no
    ReLU follows) score infinity: nothing is known about them, so they stay whole. Returns {group: float64 (units,)}.

    Raises:
        InputError: no group has a zero anywhere.
        DataError: a batch that does not run, or activations that are not finite.
    """
    seen = calibration.activations
    out = {n: staying(g.size) for n, g in graph.groups.items()}
    for name in graph.groups.keys() & seen.keys():
        if bool((seen[name].zeros > 0).any()):
            out[name] = normalised(1.0 - seen[name].zeros)
    if out and not any(bool(torch.isfinite(v).all()) for v in out.values()):
        raise InputError(
            f"score='apoz' counts zeros behind activations, and none of the {len(out)} groups of {type(model).__name__} gives one.\n"
            "  It needs ReLU; use score='activation_mean' or 'wanda'."
        )
    return out


ACTIVATION_MEAN = Criterion(
    name="activation_mean",
    function=activation_mean,
    formula="s_u = E|x_u|, x_u behind the activation that follows, divided by the group's mean",
    needs="inputs",
    cost="one forward pass over the data",
    when="Without labels, to find units that hardly ever answer; it does not see what the next layer makes of them.",
    paper="Molchanov et al. 2017, Pruning Convolutional Neural Networks for Resource Efficient Inference",
)
APOZ = Criterion(
    name="apoz",
    function=apoz,
    formula="s_u = 1 - share of zeros among x_u behind the ReLU, divided by the group's mean",
    needs="inputs",
    cost="one forward pass over the data",
    when="ReLU networks with dead or nearly dead units, as in wide fully connected layers.",
    paper="Hu et al. 2016, Network Trimming: A Data-Driven Neuron Pruning Approach towards Efficient Deep Architectures",
)
