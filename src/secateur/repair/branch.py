"""The stretch of a network that leads to one value and that nothing else looks into: what can be fitted as one.

Going up from its end, a node belongs to a branch where everything that reads it does, and where at most `LAYERS` layers that
are not grouped lie on any way down. The end is the addition that a layer's output goes into, or the layer's own output where
none follows: three residual blocks in a row, one and a half transformer blocks, six layers of a chain.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from secateur.axes import mask
from secateur.repair.flow import Flow
from secateur.repair.layers import Layer
from secateur.surgery.predict import predict
from secateur.trace.call import bind

LAYERS = 6


@dataclass(frozen=True)
class Branch:
    """`nodes` in running order up to `end`; `boundary`: values from outside that they read."""

    end: fx.Node
    layers: list[Layer]
    nodes: list[fx.Node]
    boundary: list[fx.Node]


def find_branch(flow: Flow, end: fx.Node, layers: Mapping[fx.Node, Layer], limit: int = LAYERS) -> Branch | None:
    """The branch that leads to `end`; None where it holds fewer than two layers that can be fitted."""
    below: dict[fx.Node, int] = {end: 0}  # how many layers that are not grouped lie between a node and the end
    for node in reversed(flow.needed):
        readers = flow.readers.get(node, ())
        if node is end or node.op != "call_function" or not readers or any(r not in below for r in readers):
            continue
        n = max(below[r] + (r in layers and layers[r].groups == 1) for r in readers)
        if n < limit:
            below[node] = n
    nodes = [n for n in flow.needed if n in below]
    inside = [layers[n] for n in nodes if n in layers and not layers[n].why_not]
    outside = list({r: None for n in nodes for r in flow.inputs(n).values() if r not in below and not flow.constant(r)})
    plain = all(isinstance(r.meta.get("val"), Tensor) for r in (*outside, end))
    return Branch(end, inside, nodes, outside) if len(inside) > 1 and plain else None


class Narrow:
    """A branch at the widths that stay, as a function of its tensors. Values are keyed by the nodes of the dense graph.

    Args:
        flow: of the masked network, whose values at the boundary are cut.
        keep: masks by group.
    """

    def __init__(self, flow: Flow, branch: Branch, keep: Mapping[str, Tensor]):
        self.flow, self.branch, self.graph = flow, branch, flow.runner.traced
        self.by_axis = self.graph.keep_axes(keep)
        prediction = predict(self.graph, keep, flow.runner.state)
        self.image = prediction.nodes
        self.origin: dict[fx.Node, fx.Node] = {}
        for old, new in self.image.items():
            self.origin.setdefault(new, old)
        self.renumbered = {n: t for n, t in prediction.module.named_buffers() if n.startswith("renumbered_")}
        self._state: dict[str, Tensor] = {}
        self._boundary: dict[int, dict[fx.Node, Tensor]] = {}

    def layer_groups(self, layer: Layer) -> int:
        """Groups of the layer that stay."""
        return int(bind(self.image[layer.node])["groups"]) if layer.window else layer.groups

    def tensor(self, name: str) -> Tensor:
        """A tensor of the state, cut; as it was when it was first asked for."""
        if name not in self._state:
            self._state[name] = self.cut(self.flow.runner.state[name].detach(), self.graph.tensors[name])
        return self._state[name]

    def cut(self, value: Tensor, dims: tuple) -> Tensor:
        for i, kept in enumerate(self._masks(dims)):
            if not bool(kept.all()):
                value = value.index_select(i, kept.nonzero()[:, 0].to(value.device))
        return value

    def spread(self, name: str, value: Tensor) -> Tensor:
        """The tensor of the state in its dense shape, with new values where something stays."""
        new = self.flow.runner.state[name].detach().clone()
        where = [kept.nonzero()[:, 0] for kept in self._masks(self.graph.tensors[name])]
        new[torch.meshgrid(*where, indexing="ij")] = value.to(new.dtype)
        return new

    def _masks(self, dims: tuple) -> list[Tensor]:
        return [torch.from_numpy(mask(d, self.by_axis).copy()) for d in dims]

    def run(self, chunk: int, weights: Mapping[str, Tensor], added: Mapping[fx.Node, Tensor] | None = None) -> dict[fx.Node, Any]:
        """Every value of the branch. `weights`: tensors that stand in for those of the state. `added`: goes on top of a node's value."""
        if chunk not in self._boundary:
            self._boundary[chunk] = {b: self.cut(self.flow.value(chunk, b), self.graph.env[b]) for b in self.branch.boundary}
        values: dict[fx.Node, Any] = dict(self._boundary[chunk])
        for node in self.branch.nodes:
            values[node] = self._step(node, values, weights)
            if added and node in added:
                values[node] = values[node] + added[node]
        return values

    def _step(self, node: fx.Node, values: Mapping[fx.Node, Any], weights: Mapping[str, Tensor]) -> Any:
        new, reads = self.image[node], self.flow.inputs(node)
        if node in self.flow.runner.bypass:
            (stream,) = reads.values()
            return values[stream]
        env = {}
        for a in new.all_input_nodes:
            old = self.origin.get(a)
            if old is None:
                env[a] = self.renumbered[str(a.target)]
            else:
                real = reads.get(old, old)
                name = self.flow.constant_name(real)
                env[a] = values[real] if name is None else weights[name] if name in weights else self.tensor(name)
        for spec, value in zip(getattr(getattr(new.target, "_schema", None), "arguments", ()), new.args, strict=False):
            if spec.alias_info is not None and spec.alias_info.is_write and isinstance(value, fx.Node):
                env[value] = env[value].clone()
        args, kwargs = fx.map_arg((new.args, new.kwargs), env.__getitem__)
        return new.target(*args, **kwargs)  # type: ignore[operator]


