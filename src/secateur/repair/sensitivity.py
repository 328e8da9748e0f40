"""What the output says when one group alone loses units: divergence and cost at a few counts.

Each point is a real evaluation: the group's readers get their best weights for the units that stay, everything else is
dense, and the outputs on a small batch are compared with the dense network's.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils._pytree import tree_leaves

from secateur.budget.curves import Curve
from secateur.errors import InputError
from secateur.processes import ALONE, Alone
from secateur.repair.curves import Reader, readers_of
from secateur.repair.fit import written_plainly
from secateur.repair.flow import Flow, Runner, sources
from secateur.repair.layers import features_of, find_layers
from secateur.trace import Graph
from secateur.trace.call import op_name, shape_of

LEVELS = (0.25, 0.5, 0.75)
_LOGITS = frozenset("linear addmm matmul mm".split())


@dataclass(frozen=True)
class Point:
    """A group with `removed` units gone: the error of its curve, the output's divergence, MACs of the whole network."""

    removed: int
    error: float
    divergence: float
    macs: int

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


class Output:
    """The dense outputs on a few chunks, and how far others are from them.

    The divergence is KL(dense || other) of the softmax, averaged over rows, where the first output comes straight out of a
    linear map (class scores, next-token scores); else E|y - y'|^2 / E|y - mean y|^2.
    """

    def __init__(self, graph: Graph, state: Mapping[str, Tensor], feeds: Sequence[tuple[tuple, Mapping]]):
        self.graph, self.feeds, self.reads = graph, feeds, sources(graph.capture.graph)
        self.is_scores = gives_scores(graph)
        self.dense = [self._run({}, state, f) for f in feeds]

    def _run(self, keep: Mapping[str, Tensor], state: Mapping[str, Tensor], feed: tuple[tuple, Mapping]) -> Tensor:
        flow = Flow(Runner(self.graph, keep, dict(state)), [feed], self.reads)  # which writes into nobody's tensors
        flow.runner.zeroed_weights = {x.node for x in find_layers(self.graph)}
        (output,) = [n for n in self.graph.capture.graph.nodes if n.op == "output"]
        out = flow.value(0, output)
        found = next((v for v in tree_leaves(out) if isinstance(v, Tensor) and v.is_floating_point()), None)
        if found is None:
            raise InputError("outputs are to be compared, and the model returns none of floating point.\n  Let it return scores, not decisions.")
        return found.float()

    def divergence(self, keep: Mapping[str, Tensor], state: Mapping[str, Tensor]) -> float:
        total = sum(self.apart(d, self._run(keep, state, f)) for d, f in zip(self.dense, self.feeds, strict=True))
        return total / len(self.dense)

    def apart(self, dense: Tensor, other: Tensor) -> float:
        if self.is_scores:
            p, q = dense.flatten(0, -2).log_softmax(-1), other.flatten(0, -2).log_softmax(-1)
            return float((p.exp() * (p - q)).sum(-1).mean())
        flat = dense.flatten(0, -2) if dense.dim() > 1 else dense[None]
        scale = float(flat.var(0, correction=0).mean()) or 1.0
        return float(((dense - other) ** 2).mean()) / scale


def gives_scores(graph: Graph) -> bool:
    """Whether the first output comes straight out of a linear map: scores of classes, or of next tokens. One number for a row is none:
    its softmax is 1, whatever it is."""
    (output,) = [n for n in graph.capture.graph.nodes if n.op == "output"]
    first = next((n for n in tree_leaves(output.args[0]) if isinstance(n, fx.Node)), None)
    return first is not None and first.op == "call_function" and op_name(first) in _LOGITS and shape_of(first.meta["val"])[-1] > 1


def stitched(graph: Graph, state: Mapping[str, Tensor], readers: Mapping[fx.Node, Reader], keep: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The dense tensors with every reader of the cut groups at its best weights for the units of `keep`."""
    new = dict(state)
    lost: dict[fx.Node, Tensor] = {}
    for name, layers in readers_of(graph).items():
        if name in keep and not bool(keep[name].all()):
            for layer in layers:
                columns = features_of(graph, layer, graph.groups[name])
                assert columns is not None
                kept = lost.setdefault(layer.node, torch.ones(layer.features(state[layer.weight]), dtype=torch.bool))
                kept[columns[~keep[name]].reshape(-1)] = False
    for node, kept in lost.items():
        r = readers[node]
        if r.layer.why_not:  # a shared weight: what went is cut out of it, and it stays as it is
            w = r.layer.matrix(new[r.layer.weight].detach())
            new[r.layer.weight] = r.layer.stored(torch.where(kept, w, torch.zeros((), dtype=w.dtype)), new[r.layer.weight])
            continue
        written_plainly(r.layer, new, r.stitched(kept), r.norm, r.eps)
    return new


def sensitivity(
    graph: Graph,
    state: Mapping[str, Tensor],
    readers: Mapping[fx.Node, Reader],
    curves: Mapping[str, Curve],
    output: Output,
    processes: Alone = ALONE,
) -> dict[str, list[Point]]:
    """Points of every group that has a curve, at `LEVELS` of its units. Every process measures some groups, and has all."""
    apart = _apart(graph, state, readers, {n: c for i, (n, c) in enumerate(curves.items()) if processes.mine(i)}, output)
    apart = processes.gathered("sensitivity of the output", apart)
    found: dict[str, list[Point]] = {}
    for name, curve in curves.items():
        for n in _counts(curve):
            macs = graph.cost({name: curve.keep(n)}).macs
            found.setdefault(name, []).append(Point(n, float(curve.error[n]), float(apart[f"{name} {n}"]), macs))
    return found


def _counts(curve: Curve) -> list[int]:
    """How many units go at the points of a curve."""
    size = len(curve.order)
    return sorted({max(1, min(size - 1, round(level * size))) for level in LEVELS}) if size > 1 else []


def _apart(
    graph: Graph, state: Mapping[str, Tensor], readers: Mapping[fx.Node, Reader], curves: Mapping[str, Curve], output: Output
) -> dict[str, Tensor]:
    """The divergence of the output at every point of these curves."""
    found = {}
    for name, curve in curves.items():
        for n in _counts(curve):
            keep = {name: curve.keep(n)}
            found[f"{name} {n}"] = torch.tensor(output.divergence(keep, stitched(graph, state, readers, keep)), dtype=torch.float64)
    return found


def calibrated(curve: Curve, points: Sequence[Point]) -> Curve:
    """The error curve in units of the output's divergence: multiplied by divergence/error, log-linear between the points."""
    usable = [(p.removed, max(p.divergence, 1e-12) / p.error) for p in points if p.error > 0]
    if not usable:
        return curve
    n = torch.arange(len(curve.error), dtype=torch.float64)
    x = torch.tensor([u[0] for u in usable], dtype=torch.float64)
    y = torch.tensor([u[1] for u in usable], dtype=torch.float64).log()
    i = (torch.searchsorted(x, n).clamp(1, max(1, len(x) - 1)) - 1) if len(x) > 1 else torch.zeros(len(n), dtype=torch.long)
    if len(x) > 1:
        share = ((n - x[i]) / (x[i + 1] - x[i])).clamp(0, 1)
        log = y[i] + share * (y[i + 1] - y[i])
    else:
        log = y[0].expand(len(n))
    return curve.scaled(log.exp())
