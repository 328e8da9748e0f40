"""SynFlow (Tanaka et al. 2020, "Pruning neural networks without any data by iteratively conserving synaptic flow").

    R = sum of the outputs for an input of ones, all parameters replaced by |w|;    s_u = sum_w |w| dR/d|w|

Computed once, without the paper's iterations, on a copy in float64 (R grows with the product of all layers). Biases count as
|b|; running means of batch norms are 0 in the copy, so that no path is cut off by an offset. Inputs that are whole numbers
(tokens) stay those of the trace. Meant for networks of linear layers, ReLU and batch norm: behind a LayerNorm or softmax the flow
hardly depends on what comes before.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_leaves, tree_map

from secateur.errors import InputError
from secateur.measure.float64 import InFloat64, double, doubled
from secateur.measure.run import at_rest
from secateur.score.criterion import Criterion, Scores, normalised
from secateur.score.magnitude import summed
from secateur.trace import Graph


def synflow(graph: Graph, model: nn.Module, seed: int = 0) -> Scores:
    """sum_w |w| dR/d|w| over the matrices and kernels of each unit, every group divided by its mean.

    Returns {group: float64 (units,)}. The model given is not touched: a copy is changed.

    Raises:
        InputError: the model does not run in float64, or R is not finite.
    """
    copy = doubled(model)
    with torch.no_grad():
        for p in copy.parameters():
            p.copy_(p.abs())
        for name, b in copy.named_buffers():
            if name.rpartition(".")[2] == "running_mean":
                b.zero_()
    parameters = {n: p.requires_grad_() for n, p in copy.named_parameters() if p.is_floating_point()}
    total = _flow(graph, copy, type(model).__name__)
    found = torch.autograd.grad(total, list(parameters.values()), allow_unused=True) if total.requires_grad else ()
    flow = {n: p.detach() * g for (n, p), g in zip(parameters.items(), found, strict=False) if g is not None}
    if not math.isfinite(float(total.detach())) or not all(bool(torch.isfinite(f).all()) for f in flow.values()):
        raise InputError(
            f"the synaptic flow of {type(model).__name__} is not finite in float64 (R = {float(total.detach()):.2e}).\n"
            "  Use score='l2' or score='snip'."
        )
    return {n: normalised(s) for n, s in summed(graph, flow).items()}


def _flow(graph: Graph, copy: nn.Module, name: str) -> torch.Tensor:
    inputs: Any = graph.capture.program.example_inputs or ((), {})
    args, kwargs = tree_map(lambda v: torch.ones_like(v) if isinstance(v, torch.Tensor) and v.is_floating_point() else v, double(inputs))
    try:
        with at_rest(copy), torch.inference_mode(False), torch.enable_grad(), InFloat64():
            outputs = copy(*args, **kwargs)
    except Exception as error:  # a user's forward may raise anything
        said = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise InputError(f"{name} does not run on ones in float64: {said}\n  Use score='l2' or score='snip'.") from error
    values = [v for v in tree_leaves(outputs) if isinstance(v, torch.Tensor) and v.is_floating_point()]
    return sum((v.sum() for v in values), torch.zeros((), dtype=torch.float64))


SYNFLOW = Criterion(
    name="synflow",
    function=synflow,
    formula="R = sum of f(ones; |w|);  s_u = sum_w |w| dR/d|w|, divided by the group's mean",
    needs="weights",
    cost="a copy in float64, one forward and one backward pass of one input",
    when="Untrained networks of convolutions, ReLU and batch norm, without data; not for transformers.",
    paper="Tanaka et al. 2020, Pruning neural networks without any data by iteratively conserving synaptic flow",
)
