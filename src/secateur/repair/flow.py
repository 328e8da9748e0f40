"""Values of the nodes of a captured graph, chunk by chunk of the data, on demand, each computed once and dropped after
its last use.

Two flows run side by side in a repair: the dense network and the masked one, whose weights change while it runs. What is
held is the frontier between what has been computed and what has not, not the activations of the whole network.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils._pytree import tree_flatten

from secateur.errors import InputError
from secateur.measure.masked import MaskedOriginal
from secateur.trace import Graph
from secateur.trace.call import op_name

_PLAIN = ("linear", "conv1d", "conv2d", "conv3d", "addmm", "convolution")


class Runner(MaskedOriginal):
    """The masked original at working precision. Layers whose weights hold zeros where inputs went run as they are."""

    def __init__(self, graph: Graph, keep: Mapping[str, Tensor], state: dict[str, Tensor]):
        super().__init__(graph, keep, state)
        self.zeroed_weights: set[fx.Node] = set()

    def run_node(self, n: fx.Node) -> Any:
        if n in self.zeroed_weights and n not in self.bypass:
            return fx.Interpreter.run_node(self, n)
        return super().run_node(n)


def sources(graph: fx.Graph) -> dict[fx.Node, dict[fx.Node, fx.Node]]:
    """For every node its inputs, each with the node whose value it really reads: an op in place hands its result to all
    later readers of what it wrote to.

    Raises:
        InputError: an op writes through a view.
    """
    now: dict[fx.Node, fx.Node] = {}
    views: set[fx.Node] = set()
    found = {}
    for node in graph.nodes:
        found[node] = {a: now.get(a, a) for a in node.all_input_nodes}
        schema = getattr(node.target, "_schema", None)
        if schema is None:
            continue
        for spec, value in zip(schema.arguments, node.args, strict=False):
            if spec.alias_info is None or not isinstance(value, fx.Node):
                continue
            if not spec.alias_info.is_write:
                views |= {node, value}
                continue
            if value in views:
                raise InputError(
                    f"{op_name(node)} ({node.name}) writes in place into a view, so its value cannot be followed out of order.\n"
                    "  Write it as an expression, or rank by the weights alone: prune(score='l2'), sparsify() without data."
                )
            for reader, real in list(now.items()):
                if real is now.get(value, value):
                    now[reader] = node
            now[value] = node
    return found


class Flow:
    """`value(chunk, node)`: the value of a node for one chunk of the data. What is asked for is announced by `hold`."""

    def __init__(self, runner: Runner, feeds: Sequence[tuple[tuple, Mapping]], reads: dict[fx.Node, dict[fx.Node, fx.Node]]):
        self.runner = runner
        self.reads = reads
        self.values: list[dict[fx.Node, Any]] = []
        self.left: list[dict[fx.Node, int]] = []
        self.ran: list[set[fx.Node]] = []
        self.needed = _needed(runner, reads)
        self.readers: dict[fx.Node, list[fx.Node]] = {}
        uses: dict[fx.Node, int] = {}
        for node in self.needed:
            for real in self.inputs(node).values():
                uses[real] = uses.get(real, 0) + 1
                self.readers.setdefault(real, []).append(node)
        for args, kwargs in feeds:
            flat, _ = tree_flatten((tuple(args), dict(kwargs)))
            feed = dict(zip((n for n in runner.traced.capture.graph.nodes if n.op == "placeholder"), runner.inputs(flat), strict=True))
            tensors = runner.traced.capture.tensors
            self.values.append({n: v for n, v in feed.items() if n.name not in tensors})
            self.left.append(dict(uses))
            self.ran.append(set())

    def inputs(self, node: fx.Node) -> dict[fx.Node, fx.Node]:
        if node in self.runner.bypass:
            stream = self.runner.bypass[node]
            return {stream: self.reads[node].get(stream, stream)}
        return self.reads[node]

    def hold(self, node: fx.Node) -> None:
        """The value will be asked for: it is not dropped before `release`."""
        for left in self.left:
            left[node] = left.get(node, 0) + 1

    def release(self, node: fx.Node) -> None:
        """The end of one `hold`."""
        for chunk in range(len(self.left)):
            self._used(chunk, node)

    def once(self, chunk: int, node: fx.Node) -> Any:
        """The value of a node as it would be now, without keeping it; its inputs are kept, so they must be held."""
        for real in self.inputs(node).values():
            if not self.constant(real):
                self.value(chunk, real)
        return self._run(chunk, node)

    def _used(self, chunk: int, node: fx.Node) -> None:
        left = self.left[chunk]
        left[node] = left.get(node, 1) - 1
        if left[node] <= 0:
            self.values[chunk].pop(node, None)

    def value(self, chunk: int, node: fx.Node) -> Any:
        """The value of a node, computed now if it is not there."""
        done = self.values[chunk]
        todo = [node]
        while todo:
            n = todo[-1]
            if n in done or self.constant(n):
                todo.pop()
                continue
            waiting = [r for r in self.inputs(n).values() if r not in done and not self.constant(r)]
            if waiting:
                todo += waiting
                continue
            done[n] = self._run(chunk, n)
            todo.pop()
            self._has_run(chunk, n)
        return self._constant_value(node) if self.constant(node) else done[node]

    def constant(self, node: fx.Node) -> bool:
        return node.op == "placeholder" and node.name in self.runner.traced.capture.tensors

    def constant_name(self, node: fx.Node) -> str | None:
        """The state name of a node that stands for a tensor of the network."""
        capture = self.runner.traced.capture
        name = capture.tensors[node.name] if self.constant(node) else None
        return None if name is None else capture.aliases.get(name, name)

    def _constant_value(self, node: fx.Node) -> Tensor:
        return self.runner.state[str(self.constant_name(node))]

    def _has_run(self, chunk: int, node: fx.Node) -> None:
        """Its inputs have served it; a second run does not use them up again."""
        if node not in self.ran[chunk]:
            self.ran[chunk].add(node)
            for real in self.inputs(node).values():
                if not self.constant(real):
                    self._used(chunk, real)

    def run_again(self, chunk: int, nodes: Sequence[fx.Node], boundary: Sequence[fx.Node]) -> None:
        """Values of a stretch of nodes, in running order, whose weights changed; those that nobody will ask for are dropped."""
        values = {n: self.value(chunk, n) for n in boundary}
        with torch.no_grad():
            for node in nodes:
                values[node] = self.step(node, values)
        for node in nodes:
            self._has_run(chunk, node)
        for node in nodes:
            self.values[chunk].pop(node, None)
            if self.left[chunk].get(node, 0) > 0:
                self.values[chunk][node] = values[node]

    def _run(self, chunk: int, node: fx.Node) -> Any:
        with torch.no_grad():
            return self.step(node, self.values[chunk])

    def step(self, node: fx.Node, values: Mapping[fx.Node, Any]) -> Any:
        """The value of one node from those of its inputs."""
        env = {a: self._constant_value(r) if self.constant(r) else values[r] for a, r in self.inputs(node).items()}
        schema = getattr(node.target, "_schema", None)
        if schema is not None and node not in self.runner.bypass:
            for spec, value in zip(schema.arguments, node.args, strict=False):
                if spec.alias_info is not None and spec.alias_info.is_write and isinstance(value, fx.Node):
                    env[value] = env[value].clone()  # other readers of the old value may still come
        self.runner.env = env
        return self.runner.run_node(node)


def _needed(runner: Runner, reads: dict[fx.Node, dict[fx.Node, fx.Node]]) -> list[fx.Node]:
    """Nodes that the output depends on."""
    seen: set[fx.Node] = set()
    todo = [n for n in runner.traced.capture.graph.nodes if n.op == "output"]
    while todo:
        node = todo.pop()
        if node not in seen:
            seen.add(node)
            if node in runner.bypass:
                stream = runner.bypass[node]
                todo.append(reads[node].get(stream, stream))
            else:
                todo += reads[node].values()
    return [n for n in runner.traced.capture.graph.nodes if n in seen]
