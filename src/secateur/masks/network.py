"""The layers of a traced network made sparse one after the other, each with the inputs that the sparse layers before it give.

The target of a layer is the dense network's value at the next addition minus what already arrives there by the other branch
(`secateur.repair.target`), so each layer also makes up for the errors before it. With A the moments of the layer's inputs and
G the dense least-squares fit to that target, the mask and its weights minimise tr((W - G) A (W - G)^T).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from fractions import Fraction
from typing import Any

import torch
from torch import Tensor, fx

from secateur.calibrate.moments import Moments
from secateur.masks.methods import Solve
from secateur.masks.problem import Problem, masked
from secateur.masks.refit import refit
from secateur.measure.run import at_rest
from secateur.pattern import FREE, NM, Block, Pattern, spread, whole
from secateur.repair.fit import Affine, bias_only, folded, least_squares, written
from secateur.repair.flow import Flow, Runner, sources
from secateur.repair.layers import Layer, find_layers, norm_names
from secateur.repair.least_squares import Feeds, Repair, Sample, Settings
from secateur.repair.study import FEW, Study
from secateur.repair.target import Target
from secateur.trace import Graph
from secateur.trace.call import bind
from secateur.trace.tracer import named_by


@dataclass(frozen=True)
class Asked:
    """What is asked of one layer: how much of it stays, in which pattern; or `stays`, the mask itself, in the shape of the weight."""

    pattern: Pattern = FREE
    keep: Fraction = Fraction(1)
    stays: Tensor | None = None


@dataclass(frozen=True)
class Means:
    """How masks are found.

    Attributes:
        solve: of `secateur.masks.methods`; None where all masks are given.
        refit: fit the weights that stay, once the mask is known.
        corrected: aim at what the dense network has at the next addition; else at the layer's own output, with its own weights.
    """

    solve: Solve | None
    refit: bool = True
    corrected: bool = True


@dataclass(frozen=True)
class LayerMask:
    """What became of one layer. Errors are relative to the variance of the target, on held-out calibration rows: `plain` with the mask
    alone, `repaired` with the weights that the method or the refit gave.

    Attributes:
        layer: its name; shape: of its weight; kept: weights that stay; pattern: as it is written.
        rows: calibration rows; used: "plain" or "fit". damped: what was added to the diagonal of H, relative to its mean.
        dense: weights that stayed because the pattern does not divide the layer.
        why: why it is not what was asked for, '' where it is.
    """

    layer: str
    shape: tuple[int, ...]
    kept: int
    pattern: str
    rows: int = 0
    plain: float = 0.0
    repaired: float = 0.0
    used: str = "plain"
    damped: float = 0.0
    dense: int = 0
    why: str = ""

    @property
    def size(self) -> int:
        return math.prod(self.shape)

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


class MaskedNetwork(Repair):
    """`run()` finds all masks; `stays` holds them by weight name, in the shapes of the weights, `state` the new tensors, and
    `masks_of` what became of each layer."""

    def __init__(self, graph: Graph, dense: Mapping[str, Tensor], feeds: Feeds, asked: Mapping[str, Asked], means: Means, settings: Settings):
        super().__init__(graph, {}, dense, feeds, settings)
        self.asked, self.means = dict(asked), means
        self.stays: dict[str, Tensor] = {}
        self.masks_of: list[LayerMask] = []
        self.affected = _behind(self)
        if not means.corrected:  # each layer against its own output: nothing else is fitted
            for x in self.layers:
                x.norm = None
            self.targets = {x.node: Target() for x in self.layers if not x.why_not}
            self.norms, self.by_node = [], {x.node: x for x in self.layers if x.weight in self.asked}
            self.upstream = {n: [x for x in above if x in self.by_node] for n, above in self.upstream.items()}

    def _wanted(self, layer: Layer) -> bool:
        if layer.weight in self.asked:
            return True
        return layer.source in self.affected and not named_by(layer.weight, self.graph.ignored)

    def _decide(self, layer: Layer, sample: Sample) -> None:
        if layer.weight not in self.asked:
            super()._decide(layer, sample)
            return
        names = norm_names(self.graph, layer.norm) if layer.norm else None
        eps = float(bind(layer.norm)["eps"]) if layer.norm else 0.0
        before = folded(layer, self.state, names, eps)
        solved, stays, level = self._solved(layer, sample.fit, before, bool(names or layer.bias))
        plain = Affine(torch.where(stays, before.w, torch.zeros((), dtype=before.w.dtype)), before.b)
        outputs = torch.ones(before.b.shape, dtype=torch.bool)
        if self.means.corrected and bool(names or layer.bias):
            solved = bias_only(sample.fit, solved)
        errors = {"plain": sample.error(plain, outputs), "fit": sample.error(solved, outputs)}
        used = "fit" if errors["fit"] < errors["plain"] and not torch.equal(solved.w, plain.w) else "plain"
        old, asked = self.state[layer.weight], self.asked[layer.weight]
        self.stays |= self.processes.lent("a mask", {layer.weight: layer.stored(stays, old).bool()})
        if used == "fit":
            written(layer, self.state, solved, names, (sample.fit, eps, outputs))
        self.state[layer.weight] = torch.where(self.stays[layer.weight], self.state[layer.weight], torch.zeros((), dtype=old.dtype)) + 0.0  # no -0
        self.masks_of.append(LayerMask(
            layer.name, tuple(old.shape), int(self.stays[layer.weight].sum()), str(asked.pattern), sample.fit.rows,
            errors["plain"], errors["fit"], used, level, left_over(asked.pattern, stays),
        ))  # fmt: skip

    def _solved(self, layer: Layer, m: Moments, before: Affine, with_bias: bool) -> tuple[Affine, Tensor, float]:
        """The masked map, its mask (groups, outputs, features), and the damping."""
        asked, means = self.asked[layer.weight], self.means
        a = m.central()[0] if with_bias and means.corrected else m.raw()[0]
        everything = torch.ones(a.shape[-1], dtype=torch.bool)
        goal = least_squares(m, before, everything, with_bias, self.settings.ridge) if means.corrected else before
        order = columns(layer, asked.pattern, a.shape[-1])
        back = order.argsort()
        given = None if asked.stays is None else layer.matrix(asked.stays)
        there = layer.matrix(self.dense.runner.state[layer.weight]) != 0
        own = None if bool(there.all()) else there  # zeros that were there stay
        w, stays, level = torch.zeros_like(before.w), torch.zeros(before.w.shape, dtype=torch.bool), 0.0
        for g in range(len(a)):
            h = a[g][order][:, order]
            may = own[g][:, order] if own is not None else None
            p = Problem(goal.w[g][:, order], h, asked.pattern, asked.keep, may, name=layer.name)
            if given is not None:
                found = masked(p.w, given[g][:, order])
            else:
                assert means.solve is not None
                found = means.solve(p)
            level = max(level, found.damped)
            new = refit(p.w, _ridged(h, self.settings.ridge), found.w, found.stays) if means.refit else found.w
            w[g], stays[g] = new[:, back], spread(asked.pattern, found.stays)[:, back]  # zeros within a block that stays are part of it
        return Affine(w, before.b.clone()), stays, level


def _ridged(h: Tensor, ridge: float) -> Tensor:
    h = h.clone()
    h.diagonal().add_(ridge * float(h.diagonal().mean()))
    return h


def _behind(network: MaskedNetwork) -> set[fx.Node]:
    """Nodes whose value is not the dense one any more."""
    found: set[fx.Node] = set()
    masked_nodes = {x.node for x in network.layers if x.weight in network.asked}
    for node in network.graph.capture.graph.nodes:
        if node in masked_nodes or any(r in found for r in network.dense.reads[node].values()):
            found.add(node)
    return found


def columns(layer: Layer, pattern: Pattern, features: int) -> Tensor:
    """The order of a layer's columns in which a pattern counts inputs in a row: input channels at one place of the kernel."""
    if layer.window and (isinstance(pattern, NM) or (isinstance(pattern, Block) and pattern.cols > 1)):
        return torch.arange(features).reshape(-1, layer.kernel).t().reshape(-1)
    return torch.arange(features)


def left_over(pattern: Pattern, stays: Tensor) -> int:
    """Weights of (groups, outputs, features) that the pattern does not divide."""
    rows, cols = whole(pattern, (stays.shape[1], stays.shape[2]))
    return stays.numel() - stays.shape[0] * rows * cols


def _sparse_already(study: Study, asked: Mapping[str, Asked]) -> dict[str, Asked]:
    """Other layers with zeros in them: they keep those, and are fitted around them."""
    found = {}
    for layer in find_layers(study.chunks.graph):
        zero = study.state[layer.weight] == 0
        left = layer.why_not or named_by(layer.weight, study.chunks.graph.ignored)
        if layer.weight not in asked and not left and bool(zero.any()):
            found[layer.weight] = Asked(FREE, stays=~zero)
    return found


def solved(study: Study, asked: Mapping[str, Asked], means: Means, seed: int, say: Callable[[str], None]) -> MaskedNetwork:
    """Masks and weights of all layers asked for, from the data of a study."""
    asked = {**(_sparse_already(study, asked) if means.corrected else {}), **asked}
    with at_rest(study.model):
        network = MaskedNetwork(study.chunks.graph, study.state, study.chunks.feeds, asked, means, Settings(seed=seed, processes=study.processes))
        network.run(lambda layer: say(f"mask {layer}"))
    return network


def mean_squares(study: Study, layers: Mapping[str, Layer]) -> dict[str, Tensor]:
    """E[x_j^2] of what each layer takes in, in the dense network: {weight: (columns,)}, float64."""
    return _averaged(study, layers, lambda rows: rows.double().square().mean((0, 1)))


def second_moments(study: Study, layers: Mapping[str, Layer]) -> dict[str, Tensor]:
    """E[x x^T] of what each layer takes in, in the dense network: {weight: (groups, columns, columns)}."""
    return _averaged(study, layers, lambda rows: rows.float().mT @ rows.float() / rows.shape[1])


def _averaged(study: Study, layers: Mapping[str, Layer], of: Callable[[Tensor], Tensor]) -> dict[str, Tensor]:
    """The mean of a function of the rows (groups, rows, columns) that each layer takes in, over a few chunks."""
    graph, feeds, processes = study.chunks.graph, study.chunks.feeds[:FEW], study.processes
    own = {x.weight: x for x in find_layers(graph)}
    found: dict[str, Tensor] = {}
    with at_rest(study.model):
        flow = Flow(Runner(graph, {}, dict(study.state)), feeds, sources(graph.capture.graph))
        for n in layers:
            flow.hold(own[n].source)
        for n in layers:
            x = own[n]
            for chunk in filter(processes.mine, range(len(feeds))):
                found[n] = found.get(n, 0) + of(x.rows(flow.value(chunk, x.source), None)) / len(feeds)
            flow.release(x.source)
    found = processes.total("moments of the dense model", found)
    return {n: found[n] for n in layers}
