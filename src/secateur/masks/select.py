"""Which layers of a traced network are made sparse, and how much of each stays."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from fractions import Fraction

import torch
from torch import Tensor

from secateur.errors import InputError, PlanError
from secateur.masks.budgets import BUDGETS, Budget, Weight
from secateur.masks.network import Asked, columns
from secateur.masks.problem import Problem
from secateur.pattern import NM, Kernels, Pattern, of_kernel, share, whole
from secateur.repair.layers import Layer, find_layers
from secateur.trace import Graph
from secateur.trace.tracer import named_by

SEARCH = "search"  # `secateur.masks.search`


@dataclass
class Selection:
    """Layers to be made sparse, by the name of their weight, and why others are not."""

    layers: dict[str, Layer]
    left: dict[str, str] = field(default_factory=dict)

    def notes(self) -> list[str]:
        """One sentence for each reason."""
        reasons: dict[str, list[str]] = {}
        for name, why in self.left.items():
            reasons.setdefault(why, []).append(name)
        return [f"{len(names)} layers stay dense ({', '.join(names[:3])}{' ...' if len(names) > 3 else ''}): {why}" for why, names in reasons.items()]


def select(graph: Graph, state: Mapping[str, Tensor], pattern: Pattern) -> Selection:
    """Linear layers and convolutions with a weight of their own into which the pattern fits; embeddings, norms, recurrences and
    transposed convolutions stay dense.

    Raises:
        PlanError: there is none.
    """
    chosen = Selection({})
    for layer in find_layers(graph):
        rows, cols = (int(s) for s in layer.matrix(state[layer.weight]).shape[1:])
        places = cols // layer.kernel if layer.window else cols
        if named_by(layer.weight, graph.ignored):
            continue
        if layer.why_not:
            chosen.left[layer.name] = layer.why_not
        elif isinstance(pattern, Kernels):
            chosen.layers[layer.weight] = layer  # whole in every convolution
        elif not all(whole(pattern, (rows, cols))) or (pattern.unit[1] > places):
            r, c = pattern.unit
            chosen.left[layer.name] = f"the pattern {pattern} needs {r} outputs and {c} inputs in a row at least"
        elif layer.window and pattern.unit[1] > 1 and places % pattern.unit[1]:
            chosen.left[layer.name] = f"its inputs cannot be divided by {pattern.unit[1]}"
        else:
            chosen.layers[layer.weight] = layer
    known = {x.weight for x in find_layers(graph)}
    for name in sorted(graph.capture.trainable - known - set(graph.capture.aliases)):
        if name in state and state[name].dim() > 1 and not named_by(name, graph.ignored):
            chosen.left[name] = "they are no linear layers or convolutions whose inputs can be followed"
    if not chosen.layers:
        said = "; ".join(chosen.notes()) or "it has no linear layer and no convolution with a weight of its own"
        raise PlanError(f"no layer can be made sparse with the pattern {pattern}: {said}.\n  Choose another pattern, or ignore fewer layers.")
    return chosen


def spread(
    chosen: Selection, state: Mapping[str, Tensor], pattern: Pattern, keep: Fraction, budget: str | Mapping[str, Fraction] = "uniform",
    mean_squares: Mapping[str, Tensor] | None = None,
) -> dict[str, Asked]:  # fmt: skip
    """What is asked of each layer. `budget`: a name of `BUDGETS`, or {weight: share}. N:M patterns have one share for all.

    Raises:
        InputError: an unknown budget, or one that names other layers.
    """
    if isinstance(budget, str) and budget not in (*BUDGETS, SEARCH):
        raise InputError(f"unknown budget {budget!r}.\n  There are: {', '.join((*BUDGETS, SEARCH))}.")
    if isinstance(pattern, NM):
        return {n: Asked(pattern, Fraction(pattern.n, pattern.of)) for n in chosen.layers}
    if isinstance(budget, str):
        seen = mean_squares or {}
        weights = {}
        for n, x in chosen.layers.items():
            w = x.matrix(state[n].detach().double())
            weights[n] = Weight(w.reshape(-1, w.shape[-1]), tuple(state[n].shape), seen.get(n))
        found: Budget = BUDGETS[budget](weights, keep)
    else:
        found = {n: share(given, dense=True) for n, given in budget.items()}
    if odd := sorted(found.keys() ^ chosen.layers.keys()):
        raise InputError(
            f"the budget says nothing of {odd[0]!r}, or it is no layer that can be made sparse.\n"
            f"  Give a share for each of the {len(chosen.layers)} layers."
        )
    return {n: Asked(of_kernel(pattern, chosen.layers[n].kernel), part) for n, part in found.items()}


def mask_alone(layer: Layer, weight: Tensor, asked: Asked) -> Tensor:
    """The mask that keeps the largest weights: bool, of the shape of the weight."""
    w = layer.matrix(weight.detach().double())  # squares of half precision overflow
    order = columns(layer, asked.pattern, w.shape[-1])
    stays = torch.zeros(w.shape, dtype=torch.bool)
    for g in range(len(w)):
        stays[g][:, order] = Problem(w[g][:, order], None, asked.pattern, asked.keep, name=layer.name).choose(w[g][:, order].square())
    return layer.stored(stays, stays.new_empty(weight.shape))
