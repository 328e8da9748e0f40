"""How much error each group costs at every count of its units, from one pass over the dense network.

For every layer that reads a group the moments of its input are collected once; the group's units are then eliminated
one after the other from all of its readers together (`secateur.repair.solve.eliminate`). The error of a reader is counted
relative to the variance of what it feeds: the value at the next addition, or its own output.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, fx

from secateur.axes import Axis, axes_of
from secateur.budget.curves import Curve
from secateur.calibrate.moments import Moments, begun, shared
from secateur.processes import ALONE, Alone
from secateur.repair.attention import Attention, find_attentions, per_score, score_problem
from secateur.repair.fit import Affine, folded
from secateur.repair.flow import Flow, Runner, sources
from secateur.repair.layers import Layer, features_of, find_layers, norm_names
from secateur.repair.solve import RIDGE, Problem, eliminate, solve
from secateur.repair.target import find_target
from secateur.trace import Graph
from secateur.trace.call import Call, bind, shape_of, tensors_in

_RECURRENT = frozenset("lstm gru rnn_tanh rnn_relu lstm_cell gru_cell rnn_tanh_cell rnn_relu_cell".split())


@dataclass
class Reader:
    """A layer that reads units, what it computes, and the moments of its input."""

    layer: Layer
    map: Affine
    norm: dict[str, str] | None
    eps: float
    a: Tensor
    mean: Tensor
    scale: float
    columns: dict[str, Tensor] = field(default_factory=dict)

    def stitched(self, kept: Tensor) -> Affine:
        """The layer's best weights when only the features `kept` stay, fitted to its own dense output."""
        s = torch.nonzero(kept)[:, 0]
        w = self.map.w[0]
        new = torch.zeros_like(w)
        new[:, s] = solve(self.a[s][:, s], (self.a[s] @ w.mT), w[:, s].mT.contiguous(), RIDGE).mT
        b = self.map.b + ((w - new) @ self.mean)[None] if self.norm or self.layer.bias else self.map.b
        return Affine(new[None], b)


def readers_of(graph: Graph) -> dict[str, list[Layer]]:
    """The layers that sum over each group, in the order in which the groups are first read. Groups that anything else sums
    over as well (attention scores, a recurrence, a grouped convolution) are left out: their cost would be told too low."""
    layers = [x for x in find_layers(graph) if x.groups == 1]
    by_name = {name: [x for x in layers if features_of(graph, x, g) is not None] for name, g in graph.groups.items()}
    others = _summed_elsewhere(graph, {x.node for x in layers})
    scored = scored_axes(graph, find_attentions(graph, layers))
    found = {n: some for n, some in by_name.items() if (some or graph.axes[n] in scored) and graph.axes[n] not in others - set(scored)}
    place = {n: i for i, n in enumerate(graph.capture.graph.nodes)}
    first = {n: min([x.node for x in some] + [a.node for a in scored.get(graph.axes[n], [])], key=place.__getitem__) for n, some in found.items()}
    return {n: found[n] for n in sorted(found, key=lambda n: place[first[n]])}


def in_running_order(graph: Graph, curves: Mapping[str, Curve]) -> dict[str, Curve]:
    """Curves of groups and of residual blocks in the order in which they are read and added."""
    place = {n: i for i, n in enumerate(graph.capture.graph.nodes)}
    groups = {n: place[some[0].node] for n, some in readers_of(graph).items() if some}
    at = {n: place[graph.blocks[n].join] if n in graph.blocks else groups.get(n, 0) for n in curves}
    return {n: curves[n] for n in sorted(curves, key=at.__getitem__)}


def scored_axes(graph: Graph, attentions: Sequence[Attention]) -> dict[Axis, list[Attention]]:
    """Axes of the dimensions that queries and keys are multiplied over, where their repair is known."""
    found: dict[Axis, list[Attention]] = {}
    for a in attentions:
        for axis in dict.fromkeys(axes_of(a.dims(graph)[1])):
            if axis.reason is None:
                found.setdefault(axis, []).append(a)
    return found


def _summed_elsewhere(graph: Graph, layers: set[fx.Node]) -> set[Axis]:
    """Axes that an op other than those layers multiplies and sums over."""
    found: set[Axis] = set()
    for term in graph.terms:
        if term.node is None or term.node in layers:
            continue
        inside = {a for n in term.node.all_input_nodes for dims in tensors_in(graph.env.get(n)) for d in dims for a in axes_of(d)}
        outside = {a for dims in tensors_in(graph.env.get(term.node)) for d in dims for a in axes_of(d)}
        found |= inside if term.op in _RECURRENT else inside - outside
        if term.op == "scaled_dot_product_attention":  # q k^T sums over its last dimension, which v may share
            c = Call(term.node, graph.env)
            found |= {a for name in ("query", "key") for a in axes_of((c.dims(name) or ())[-1])}
    return found


def collect(graph: Graph, dense: Mapping[str, Tensor], feeds, rows: int, processes: Alone = ALONE) -> dict[fx.Node, Reader]:
    """Moments of the input of every reader, by its node."""
    wanted = {x.node: x for some in readers_of(graph).values() for x in some}
    flow = Flow(Runner(graph, {}, dict(dense)), feeds, sources(graph.capture.graph))
    flow.runner.zeroed_weights = {x.node for x in find_layers(graph)}
    for x in wanted.values():
        flow.hold(x.source)
        flow.hold(find_target(x).join or x.end)
    out = {}
    for x in wanted.values():
        out[x.node] = _reader(graph, x, flow, rows, processes)
        flow.release(x.source)
        flow.release(find_target(x).join or x.end)
    return out


def _reader(graph: Graph, layer: Layer, flow: Flow, rows: int, processes: Alone) -> Reader:
    dense = flow.runner.state
    names = norm_names(graph, layer.norm) if layer.norm else None
    eps = float(bind(layer.norm)["eps"]) if layer.norm else 0.0
    target = find_target(layer)
    places, chunks = layer.places, len(flow.left)
    m = Moments(layer.groups, layer.features(dense[layer.weight]), 0)
    variance = 0.0
    random = torch.Generator().manual_seed(0)
    take = min(places, max(1, -(-rows // (chunks * shape_of(layer.source.meta["val"])[0]))))
    for chunk in range(chunks):
        at = None if take == places else torch.randperm(places, generator=random)[:take].sort()[0]  # the same for any number of processes
        if not processes.mine(chunk):
            continue
        x, t = layer.rows(flow.value(chunk, layer.source), at), target.pull(flow.value(chunk, target.join or layer.end))
        if not m.rows:
            begun(layer.name, processes, (x, x[:, :, :0]) if chunk == 0 else None, m)
        m.add(x, x[:, :, :0])
        t = t.flatten(2).transpose(1, 2) if layer.window else t
        variance += float(t.reshape(-1, t.shape[-1]).float().var(0, correction=0).sum())
    if not m.rows:  # more processes than chunks
        begun(layer.name, processes, None, m)
    shared(f"moments of {layer.name}", processes, m)
    variance = float(processes.total("variance", {"sum": torch.tensor(variance, dtype=torch.float64)})["sum"])
    m.check(layer.name)
    with_bias = bool(names or layer.bias)
    a = (m.central() if with_bias else m.raw())[0][0]
    return Reader(layer, folded(layer, dense, names, eps), names, eps, a, m.mean()[0][0], chunks / max(variance, 1e-12))


@dataclass
class Scored:
    """An attention, the moments of its queries and keys by head, and what an error of its scores counts."""

    attention: Attention
    q: Tensor
    k: Tensor
    weight: Tensor


def collect_scores(
    graph: Graph, dense: Mapping[str, Tensor], feeds, readers: Mapping[fx.Node, Reader], processes: Alone = ALONE
) -> dict[fx.Node, Scored]:
    """Moments of queries and keys of every attention whose dimensions can go, by its node; from one chunk, so in one process."""
    layers = [x for x in find_layers(graph) if x.groups == 1]
    wanted = {a.node: a for some in scored_axes(graph, find_attentions(graph, layers)).values() for a in some}
    if not wanted:
        return {}
    own = _scored(graph, dense, feeds, readers, wanted) if processes.mine(0) else {}
    found = processes.lent("moments of attention scores", own)
    return {node: Scored(a, *(found[f"{node.name} {part}"] for part in ("q", "k", "weight"))) for node, a in wanted.items()}


def _scored(
    graph: Graph, dense: Mapping[str, Tensor], feeds, readers: Mapping[fx.Node, Reader], wanted: Mapping[fx.Node, Attention]
) -> dict[str, Tensor]:
    """The tensors of every `Scored`."""
    flow = Flow(Runner(graph, {}, dict(dense)), feeds[:1], sources(graph.capture.graph))
    out: dict[str, Tensor] = {}
    values = {n: [bind(n)[k] for k in ("query", "key", "value")] for n in wanted}
    for several in values.values():
        for node in several:
            flow.hold(node)
    for node, attention in wanted.items():
        q, k, v = (flow.value(0, n) for n in values[node])
        each, total = per_score(q, k, v, attention)
        flat = [x.double().transpose(0, 1).flatten(1, 2) for x in (q, k)]
        flat[1] = flat[1] - flat[1].mean(1, keepdim=True)
        moments = [x.mT @ x / x.shape[1] for x in flat]
        relative = _relative_energy(readers, node)
        weight = each * attention.factor(q.shape[-1]) ** 2 / max(total, 1e-12) * relative
        out |= {f"{node.name} {part}": t for part, t in (("q", moments[0]), ("k", moments[1]), ("weight", weight))}
        for n in values[node]:
            flow.release(n)
    return out


def _relative_energy(readers: Mapping[fx.Node, Reader], attention: fx.Node) -> float:
    """Variance that the layer behind an attention contributes, relative to what it feeds; 1 where it is not known."""
    for r in readers.values():
        node = r.layer.source
        while node is not attention and node.op == "call_function" and len(node.all_input_nodes) == 1:
            (node,) = node.all_input_nodes
        if node is attention:
            w = r.map.w[0]
            return float(((w @ r.a) * w).sum()) * r.scale
    return 1.0


def error_curves(
    graph: Graph, readers: Mapping[fx.Node, Reader], scores: Mapping[fx.Node, Scored] | None = None, processes: Alone = ALONE
) -> dict[str, Curve]:
    """One curve for every group that has readers: the order in which units go and the relative error after each. Every process makes
    those of some groups, and has all."""
    own: dict[str, Tensor] = {}
    scored = scored_axes(graph, [s.attention for s in (scores or {}).values()])
    for number, (name, some) in enumerate(readers_of(graph).items()):
        if not processes.mine(number):
            continue
        problems = []
        for layer in some:
            r = readers[layer.node]
            columns = features_of(graph, layer, graph.groups[name])
            assert columns is not None
            problems.append(Problem(r.a, r.map.w[0].mT.contiguous(), columns, r.scale))
        axis = graph.axes[name]
        found = [(scores or {})[a.node] for a in scored.get(axis, [])]
        others = [score_problem(graph, x.attention, axis, (x.q, x.k), x.weight) for x in found]
        if problems or others:
            order, error = eliminate(problems, others=others)
            own |= {f"order {name}": order, f"error {name}": torch.cat([torch.zeros(1, dtype=torch.float64), error])}
    curves = processes.gathered("error curves", own)
    return {n: Curve(curves[f"order {n}"], curves[f"error {n}"]) for n in readers_of(graph) if f"order {n}" in curves}


def block_curves(graph: Graph, dense: Mapping[str, Tensor], feeds, processes: Alone = ALONE) -> dict[str, Curve]:
    """For every residual block the relative error of its addition when its branch is gone; from few chunks, so in one process."""
    lost = _lost(graph, dense, feeds) if graph.blocks and processes.mine(0) else {}
    found = processes.lent("residual blocks", lost)
    return {name: Curve(torch.zeros(1, dtype=torch.int64), error) for name, error in found.items()}


def _lost(graph: Graph, dense: Mapping[str, Tensor], feeds) -> dict[str, Tensor]:
    """The errors of the blocks' curves."""
    flow = Flow(Runner(graph, {}, dict(dense)), feeds, sources(graph.capture.graph))
    for b in graph.blocks.values():
        flow.hold(b.join)
        flow.hold(b.stream)
    out = {}
    for name, b in graph.blocks.items():
        lost = whole = 0.0
        for chunk in range(len(flow.left)):
            stream, join = flow.value(chunk, b.stream), flow.value(chunk, b.join)
            lost += float(((join - stream).double() ** 2).sum())
            whole += float(((join - join.mean(0)).double() ** 2).sum())
        flow.release(b.join)
        flow.release(b.stream)
        out[name] = torch.tensor([0.0, lost / max(whole, 1e-12)], dtype=torch.float64)
    return out
