"""Where in the captured graph the units of a group can be seen: what leaves them, and which layers take them in.

A *layer* is an op with a weight that contracts one dimension of the data with one of the weight. It *produces* the axes of the
weight's other dimensions and *consumes* those of the contracted one. Linear layers, convolutions and products with a matrix
of parameters are layers; recurrences, einsum and bilinear forms are not seen as such.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterator
from dataclasses import dataclass

from torch import fx

from secateur.axes import Axis, axes_of
from secateur.trace import Graph
from secateur.trace.call import Call, op_name, tensors_in

ACTIVATIONS = frozenset(
    "relu relu6 gelu silu elu celu selu leaky_relu hardswish hardtanh hardsigmoid sigmoid tanh softplus mish prelu threshold "
    "rrelu log_sigmoid hardshrink softshrink tanhshrink special_expit".split()
)
_BATCH_NORMS = frozenset("batch_norm native_batch_norm _native_batch_norm_legit_no_training cudnn_batch_norm".split())
# What may stand between a layer and the activation that follows it.
_BETWEEN = _BATCH_NORMS | frozenset(
    "group_norm layer_norm instance_norm rms_norm add sub dropout feature_dropout clone contiguous to _to_copy view _unsafe_view "
    "reshape flatten unflatten permute transpose squeeze unsqueeze getitem chunk split split_with_sizes unbind slice "
    "max_pool1d max_pool2d max_pool3d avg_pool1d avg_pool2d avg_pool3d adaptive_avg_pool1d adaptive_avg_pool2d".split()
)
_SAME = frozenset("to _to_copy clone contiguous detach alias".split())  # what changes no dimension of a weight
_FLIPPED = frozenset("t transpose permute numpy_T".split())


@dataclass(frozen=True)
class Layer:
    """`channel` is the dimension of `data` (counted from the end) that is contracted with dimension `contracted` of
    `weight`. In a grouped convolution each group of channels has its own rows of the weight: `grouped`."""

    node: fx.Node
    data: fx.Node
    weight: fx.Node
    channel: int
    contracted: int
    grouped: bool = False


_MATMUL = {"matmul": ("self", "other"), "mm": ("self", "mat2"), "addmm": ("mat1", "mat2")}
_CONVOLUTIONS = frozenset("conv1d conv2d conv3d conv_transpose1d conv_transpose2d conv_transpose3d convolution _convolution".split())


def layers(graph: Graph) -> list[Layer]:
    """Every op that contracts data with a weight: linear layers, convolutions, products with a matrix of parameters."""
    moving = dependent(graph)
    found = []
    for node in graph.capture.graph.nodes:
        if node.op != "call_function" or not hasattr(node.target, "_schema"):
            continue
        layer = _layer(Call(node, graph.env))
        if layer is not None and layer.data in moving and layer.weight not in moving:
            found.append(layer)
    return found


def _layer(c: Call) -> Layer | None:
    names = _MATMUL.get(c.op, ("input", "weight"))
    data, weight = c[names[0]], c[names[1]]
    x, w = c.dims(names[0]), c.dims(names[1])
    if not (isinstance(data, fx.Node) and isinstance(weight, fx.Node)) or x is None or w is None or len(w) < 2 or not x:
        return None
    if c.op == "linear":
        return Layer(c.node, data, weight, -1, 1)
    if c.op in _MATMUL:
        return Layer(c.node, data, weight, -1, 0) if len(w) == 2 else None
    if c.op in _CONVOLUTIONS:
        turned = "transpose" in c.op or bool(c["transposed"])
        return Layer(c.node, data, weight, 1 - len(w), 0 if turned else 1, not turned and c["groups"] > 1)
    return None


def dependent(graph: Graph) -> set[fx.Node]:
    """Nodes whose value depends on the user's inputs."""
    found: set[fx.Node] = set()
    for node in graph.capture.graph.nodes:
        if node.op == "placeholder":
            if node.name not in graph.capture.tensors:
                found.add(node)
        elif any(n in found for n in node.all_input_nodes):
            found.add(node)
    return found


def consumers(graph: Graph) -> dict[str, list[Layer]]:
    """For every group the layers that contract its axis; empty for those of which no weight does (queries and keys)."""
    by_axis: dict[Axis, list[Layer]] = {}
    for layer in layers(graph):
        inside = set(axes_of(graph.env[layer.weight][layer.contracted]))
        for axis in dict.fromkeys(axes_of(graph.env[layer.data][layer.channel])):
            if axis in inside:
                by_axis.setdefault(axis, []).append(layer)
    return {name: by_axis.get(axis, []) for name, axis in graph.axes.items()}


def contracted_slots(graph: Graph) -> set[tuple[str, int]]:
    """(parameter, dimension) of every weight's dimension that a layer contracts: there units are taken in, not made."""
    found = set()
    for layer in layers(graph):
        node, dim = layer.weight, layer.contracted
        while op_name(node) in _SAME or (op_name(node) in _FLIPPED and node.meta["val"].dim() == 2):
            node, dim = node.all_input_nodes[0], 1 - dim if _flips(node) else dim
        name = graph.capture.tensors.get(node.name) if node.op == "placeholder" else None
        if name is not None:
            found.add((graph.capture.aliases.get(name, name), dim))
    return found


def _flips(node: fx.Node) -> bool:
    """Whether an op swaps the two dimensions of a matrix."""
    if op_name(node) == "permute":
        return [d % 2 for d in Call(node, {})["dims"]] == [1, 0]
    if op_name(node) == "transpose":
        return (Call(node, {})["dim0"] - Call(node, {})["dim1"]) % 2 == 1
    return op_name(node) in _FLIPPED


def sites(graph: Graph) -> dict[str, list[fx.Node]]:
    """For every group the tensors in which its units are looked at, one for each layer that produces them.

    That is the output of the first activation after the layer that still carries the axis (batch norm, additions and
    reshapes may stand between); where none follows, the output of the batch norm that follows, else that of the layer. A
    group that no layer produces (states of a recurrence) is seen in the first tensor that carries it.
    """
    carried = {n: {a for dims in tensors_in(graph.env.get(n)) for d in dims for a in axes_of(d)} for n in graph.capture.graph.nodes}
    place = {n: i for i, n in enumerate(graph.capture.graph.nodes)}
    names = {axis: name for name, axis in graph.axes.items()}
    found: dict[str, dict[fx.Node, None]] = {name: {} for name in graph.groups}
    for node, axes in _produced(graph):
        for axis in axes & carried[node] & names.keys():
            found[names[axis]][_site(node, axis, carried, place)] = None
    moving = dependent(graph)
    for axis, name in names.items():
        if not found[name]:
            plain = (n for n, axes in carried.items() if axis in axes and n in moving and isinstance(graph.env[n], tuple))
            found[name] = {n: None for n in list(plain)[:1]}
    return {name: list(nodes) for name, nodes in found.items()}


def _produced(graph: Graph) -> Iterator[tuple[fx.Node, set[Axis]]]:
    for layer in layers(graph):
        others = [d for i, d in enumerate(graph.env[layer.weight]) if i != layer.contracted]
        yield layer.node, {a for d in others for a in axes_of(d)}
    for node in graph.capture.graph.nodes:
        if node.op == "call_function" and op_name(node) == "embedding":
            yield node, set(axes_of(graph.env[node.args[0]][1]))


def _site(node: fx.Node, axis: Axis, carried: dict[fx.Node, set[Axis]], place: dict[fx.Node, int]) -> fx.Node:
    todo = [(place[u], u) for u in node.users]
    heapq.heapify(todo)
    seen = set()
    while todo:
        _, user = heapq.heappop(todo)
        if user in seen or axis not in carried[user]:
            continue
        seen.add(user)
        if op_name(user) in ACTIVATIONS:
            return user
        if op_name(user) in _BETWEEN:
            for u in user.users:
                heapq.heappush(todo, (place[u], u))
    users = list(node.users)
    return users[0] if len(users) == 1 and op_name(users[0]) in {"batch_norm"} else node
