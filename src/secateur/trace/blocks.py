"""Whole residual blocks: `x + f(x)` can become `x`.

A block is a branch of the captured graph that starts at the same tensor it is added to and is used nowhere else. It is
decided on like a group of one unit that, unlike all others, may go entirely.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from torch import fx

from secateur.trace.call import module_of, op_name, shape_of
from secateur.trace.capture import Capture

_WITH_WEIGHTS = frozenset("linear conv1d conv2d conv3d conv_transpose2d matmul mm addmm bmm einsum lstm gru".split())


@dataclass(frozen=True)
class Block:
    """A residual branch. Without it the addition `join` gives `stream`. `tensors` are the parameters only it uses."""

    name: str
    join: fx.Node
    stream: fx.Node
    tensors: tuple[str, ...]


def find_blocks(capture: Capture) -> dict[str, Block]:
    """Every residual branch by name: `<module of its last weighted layer>:block`."""
    place = {n: i for i, n in enumerate(capture.graph.nodes)}
    found: dict[str, Block] = {}
    for node in capture.graph.nodes:
        if node.op != "call_function" or op_name(node) != "add" or node.kwargs.get("alpha", 1) != 1:
            continue
        ends = [a for a in node.args[:2] if isinstance(a, fx.Node)]
        if len(ends) < 2 or any(shape_of(e.meta["val"]) != shape_of(node.meta["val"]) for e in ends):
            continue
        for stream, branch in (ends, ends[::-1]):
            nodes = _branch(stream, branch, node, place)
            layers = [n for n in nodes if op_name(n) in _WITH_WEIGHTS]
            if layers:
                name = _free_name(module_of(max(layers, key=place.__getitem__)), found)
                found[name] = Block(name, node, stream, _own_tensors(capture, nodes))
    return found


def _free_name(module: str, taken: Mapping[str, Block]) -> str:
    name, n = f"{module}:block", 2
    while name in taken:
        name, n = f"{module}:block#{n}", n + 1
    return name


def _branch(stream: fx.Node, branch: fx.Node, join: fx.Node, place: Mapping[fx.Node, int]) -> set[fx.Node]:
    """The ops between `stream` and `branch`; empty where they are no branch of their own."""
    nodes: set[fx.Node] = set()
    todo, reached = [branch], False
    while todo:
        node = todo.pop()
        if node is stream:
            reached = True
        elif node not in nodes and place[node] > place[stream] and node.op == "call_function":
            nodes.add(node)
            todo += node.all_input_nodes
    if not reached or any(user is not join and user not in nodes for n in nodes for user in n.users):
        return set()
    writes = (n for n in nodes if getattr(n.target, "_schema", None) is not None and n.target._schema.is_mutable)
    if any(n.args and isinstance(n.args[0], fx.Node) and n.args[0] not in nodes for n in writes):
        return set()  # the branch changes the stream in place
    return nodes


def _own_tensors(capture: Capture, nodes: set[fx.Node]) -> tuple[str, ...]:
    uses = {n: set(n.users) for n in capture.graph.nodes if n.op == "placeholder" and n.name in capture.tensors and n.users}
    return tuple(capture.tensors[n.name] for n, users in uses.items() if users <= nodes)


def bypassed(blocks: Iterable[Block]) -> dict[fx.Node, fx.Node]:
    """join -> stream of the blocks that go."""
    return {b.join: b.stream for b in blocks}


def live(graph: fx.Graph, bypass: Mapping[fx.Node, fx.Node]) -> set[fx.Node]:
    """Nodes that the outputs still depend on when every `join` of `bypass` is replaced by its `stream`."""
    seen: set[fx.Node] = set()
    todo = [n for n in graph.nodes if n.op == "output"]
    while todo:
        node = todo.pop()
        if node in seen:
            continue
        seen.add(node)
        todo += [bypass[node]] if node in bypass else node.all_input_nodes
        todo += [u for u in node.users if _writes_into(u, node)]
    return seen


def _writes_into(user: fx.Node, node: fx.Node) -> bool:
    """In-place ops count for whoever reads the tensor later, also where nobody reads the op's own result."""
    schema = getattr(user.target, "_schema", None)
    return schema is not None and schema.is_mutable and bool(user.args) and user.args[0] is node and not user.users
