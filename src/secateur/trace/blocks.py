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
    """A residual branch. Without it the addition `join` gives `stream`. `tensors` are the parameters that go with it: only it uses them, or what is
    computed for it alone; `shared`: those that others use too."""

    name: str
    join: fx.Node
    stream: fx.Node
    tensors: tuple[str, ...]
    shared: tuple[str, ...] = ()


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
            if stream.meta["val"].dtype != node.meta["val"].dtype:
                continue  # the addition makes another type of it
            nodes = _branch(stream, branch, node, place)
            layers = [n for n in nodes if op_name(n) in _WITH_WEIGHTS]
            if layers:
                name = _free_name(module_of(max(layers, key=place.__getitem__)), found)
                found[name] = Block(name, node, stream, *_tensors(capture, _with_it(nodes, stream)))
    return found


def _free_name(module: str, taken: Mapping[str, Block]) -> str:
    name, n = f"{module}:block", 2
    while name in taken:
        name, n = f"{module}:block#{n}", n + 1
    return name


def _branch(stream: fx.Node, branch: fx.Node, join: fx.Node, place: Mapping[fx.Node, int]) -> set[fx.Node]:
    """The ops by which `branch` comes from `stream`; empty where they are no branch of their own. What they take in besides, such as a mask that all
    blocks share, is not among them."""
    before: set[fx.Node] = set()
    todo = [branch]
    while todo:
        node = todo.pop()
        if node not in before and place[node] > place[stream] and node.op == "call_function":
            before.add(node)
            todo += node.all_input_nodes
    nodes: set[fx.Node] = set()
    for node in sorted(before, key=place.__getitem__):
        if any(n is stream or n in nodes for n in node.all_input_nodes):
            nodes.add(node)
    if branch not in nodes or not _users(nodes) <= {join, *nodes}:
        return set()
    whole = _with_it(nodes, stream)
    if any(_writes_outside(n, whole) for n in whole):
        return set()  # the branch changes the stream, or a view of it, in place
    return nodes


def _users(nodes: Iterable[fx.Node]) -> set[fx.Node]:
    return {user for n in nodes for user in n.users if op_name(user) != "_assert_tensor_metadata"}  # such as casts leave behind


def _with_it(nodes: set[fx.Node], stream: fx.Node) -> set[fx.Node]:
    """A branch, and what is computed for it alone: casts of its weights, or all of an encoder that nothing else reads."""
    whole = set(nodes)
    todo = [n for node in nodes for n in node.all_input_nodes]
    while todo:
        node = todo.pop()
        if node not in whole and node is not stream and node.op == "call_function" and _users([node]) <= whole:
            whole.add(node)
            todo += node.all_input_nodes
    return whole


def _writes_outside(node: fx.Node, nodes: set[fx.Node]) -> bool:
    """Whether an op writes into memory that was there before the branch."""
    for argument, value in _aliased(node):
        while argument.alias_info.is_write and isinstance(value, fx.Node):
            if value not in nodes:
                return True
            value = next(iter(_shared(value)), None)  # what it is a view of
    return False


def _aliased(node: fx.Node) -> list:
    schema = getattr(node.target, "_schema", None)
    pairs = zip(schema.arguments, node.args, strict=False) if schema is not None else ()
    return [(a, v) for a, v in pairs if a.alias_info is not None]


def _tensors(capture: Capture, nodes: set[fx.Node]) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The parameters that only these ops use, and those that others use too."""
    uses = {n: _users([n]) for n in capture.graph.nodes if n.op == "placeholder" and n.name in capture.tensors and not nodes.isdisjoint(n.users)}
    own, shared = (tuple(capture.tensors[n.name] for n, users in uses.items() if (users <= nodes) is alone) for alone in (True, False))
    return own, shared


def bypassed(blocks: Iterable[Block]) -> dict[fx.Node, fx.Node]:
    """join -> stream of the blocks that go."""
    return {b.join: b.stream for b in blocks}


def copied(graph: fx.Graph, bypass: Mapping[fx.Node, fx.Node]) -> set[fx.Node]:
    """The keys of `bypass` in whose place a copy has to pass: behind the stream something writes into the sum, or into what the stream shares its
    memory with. The sum was memory of its own, unless it was `stream += branch`."""
    place = {n: i for i, n in enumerate(graph.nodes)}
    written = {n: _roots(n) for n in graph.nodes if n not in bypass and _writes(n)}
    return {join for join, stream in bypass.items() if not (_writes(join) and join.args[0] is stream)
            and any(place[n] > place[stream] and roots & {join, stream, *_roots(stream)} for n, roots in written.items())}  # fmt: skip


def _writes(node: fx.Node) -> bool:
    return any(a.alias_info.is_write for a, _ in _aliased(node))


def live(graph: fx.Graph, bypass: Mapping[fx.Node, fx.Node]) -> set[fx.Node]:
    """Nodes that the outputs still depend on when every `join` of `bypass` is replaced by its `stream`: what they are
    computed from, and what writes in place into any of that, be it through views."""
    written = {n: _roots(n) for n in graph.nodes if _writes(n)}
    seen: set[fx.Node] = set()
    todo = [n for n in graph.nodes if n.op == "output"]
    while todo:
        node = todo.pop()
        if node not in seen:
            seen.add(node)
            todo += [bypass[node]] if node in bypass else node.all_input_nodes
        if not todo:
            todo = [n for n, roots in written.items() if n not in seen and roots & seen]
    return seen


def _roots(node: fx.Node) -> set[fx.Node]:
    """What an op may share memory with: its aliased arguments, what those are views of, and so on."""
    found: set[fx.Node] = set()
    todo = _shared(node)
    while todo:
        value = todo.pop()
        if value not in found:
            found.add(value)
            todo += _shared(value)
    return found


def _shared(node: fx.Node) -> list[fx.Node]:
    """The arguments whose memory the value of a node may be. At rest dropout hands back its input, and its schema does not say so."""
    values = node.args[:1] if node.op == "call_function" and "dropout" in op_name(node) else [v for _, v in _aliased(node)]
    return [v for v in values if isinstance(v, fx.Node)]
