"""The weighted layers of a captured graph as least squares sees them: rows of inputs times columns of a matrix."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, fx

from secateur.calibrate.moments import patches
from secateur.trace import Graph, Group
from secateur.trace.call import bind, op_name, shape_of

_CONVS = {"conv1d": 1, "conv2d": 2, "conv3d": 3}


@dataclass
class Layer:
    """One linear map with its own weight: `y = x W^T + b` for rows x.

    Attributes:
        node: the op in the captured graph; source: the node of its input.
        weight, bias: state names; `bias` is None where the layer has none.
        groups: of a grouped convolution, else 1.
        transposed: the weight is stored inputs first (addmm).
        norm: a batch norm with running statistics that directly follows and sees nothing else.
        why_not: why this layer keeps its weights, '' where it can be fitted.
    """

    node: fx.Node
    source: fx.Node
    weight: str
    bias: str | None
    groups: int = 1
    transposed: bool = False
    norm: fx.Node | None = None
    why_not: str = ""
    window: dict = field(default_factory=dict)

    @property
    def name(self) -> str:
        return self.weight.removesuffix(".weight")

    @property
    def end(self) -> fx.Node:
        """The node whose value is fitted: the layer's output, or that of its batch norm."""
        return self.norm or self.node

    def matrix(self, weight: Tensor) -> Tensor:
        """(groups, outputs, features) of the stored weight."""
        if self.transposed:
            return weight.t()[None]
        return weight.reshape(self.groups, weight.shape[0] // self.groups, -1)

    def stored(self, matrix: Tensor, like: Tensor) -> Tensor:
        """A matrix (groups, outputs, features) in the shape and dtype of the weight `like`."""
        w = matrix[0].t() if self.transposed else matrix
        return w.reshape(like.shape).to(like.dtype).contiguous()

    @property
    def kernel(self) -> int:
        """Entries of the window of a convolution, 1 for a linear layer."""
        n = 1
        for size in self.window["kernel"] if self.window else ():
            n *= size
        return n

    def features(self, weight: Tensor) -> int:
        """Columns of the matrix."""
        return self.matrix(weight).shape[2]

    @property
    def places(self) -> int:
        """Rows that one sample of the batch gives."""
        shape = shape_of(self.node.meta["val"])
        over = shape[2:] if self.window else shape[1:-1]
        n = 1
        for s in over:
            n *= s
        return n

    def rows(self, x: Tensor, at: Tensor | None) -> Tensor:
        """Inputs as (groups, rows, features); `at` picks positions of every sample, None takes all."""
        if not self.window:
            x = _many(x)
            x = x if at is None else x[:, at]
            return x.reshape(1, -1, x.shape[-1])
        r = patches(x, **self.window, at=at)
        r = r.reshape(len(r), self.groups, -1)
        return r.transpose(0, 1)

    def outputs(self, y: Tensor, at: Tensor | None) -> Tensor:
        """Outputs (or targets of the same shape) as (groups, rows, outputs), in the order of `rows`."""
        if self.window:
            y = y.flatten(2).transpose(1, 2)
        else:
            y = _many(y)
        y = y if at is None else y[:, at]
        return y.reshape(y.shape[0] * y.shape[1], self.groups, -1).transpose(0, 1)


def _many(x: Tensor) -> Tensor:
    """(samples, places, features) of the input or output of a linear layer; a lone vector is one sample."""
    return x.reshape(x.shape[0] if x.dim() > 1 else 1, -1, x.shape[-1])


def find_layers(graph: Graph) -> list[Layer]:
    """Every linear and convolution of the graph with a weight of its own, in the order in which they run."""
    uses: dict[str, int] = {}
    for node in graph.capture.graph.nodes:
        if node.op == "placeholder" and (name := state_name(graph, node)):
            uses[name] = uses.get(name, 0) + len(node.users)
    found = []
    for node in graph.capture.graph.nodes:
        layer = _layer(graph, node)
        if layer is not None:
            if uses[layer.weight] > 1 or (layer.bias and uses[layer.bias] > 1):
                layer.why_not = "its weight is used in more than one place"
            elif layer.weight not in graph.capture.trainable:
                layer.why_not = "its weight is not trained"
            elif not graph.capture.values[layer.weight].is_floating_point():
                layer.why_not = "its weight is not of a floating dtype"
            layer.norm = None if layer.why_not else _norm_after(graph, layer, uses)
            found.append(layer)
    return found


def state_name(graph: Graph, node: object) -> str | None:
    """The state name of a parameter or buffer, the first of tied ones; None for any other node."""
    if not isinstance(node, fx.Node) or node.op != "placeholder" or node.name not in graph.capture.tensors:
        return None
    name = graph.capture.tensors[node.name]
    return graph.capture.aliases.get(name, name)


def _layer(graph: Graph, node: fx.Node) -> Layer | None:
    if node.op != "call_function":
        return None
    op = op_name(node)
    if op not in ("linear", "addmm", *_CONVS):
        return None
    args = bind(node)
    if op == "addmm":
        weight, bias, source = (state_name(graph, args["mat2"]), state_name(graph, args["self"]), args["mat1"])
        plain = args.get("beta", 1) == 1 and args.get("alpha", 1) == 1 and bias is not None
        return Layer(node, source, weight, bias, transposed=True) if weight and plain else None
    weight, bias = state_name(graph, args["weight"]), state_name(graph, args.get("bias"))
    if weight is None or (args.get("bias") is not None and bias is None):
        return None  # computed weights (weight norm, standardisation) are no plain linear map of a parameter
    if op == "linear":
        return Layer(node, args["input"], weight, bias)
    return _convolution(graph, node, args, (weight, bias))


def _convolution(graph: Graph, node: fx.Node, args: dict, names: tuple[str, str | None]) -> Layer | None:
    n = _CONVS[op_name(node)]
    kernel = shape_of(args["weight"].meta["val"])[2:]

    def spread(value: object) -> list[int]:
        values: list = list(value) if isinstance(value, (list, tuple)) else [value]
        return [int(v) for v in (values * n if len(values) == 1 else values)]

    padding = args["padding"]
    dilation = spread(args["dilation"])
    if padding == "valid":
        padding = [0]
    elif padding == "same":
        total = [d * (k - 1) for d, k in zip(dilation, kernel, strict=True)]
        if any(t % 2 for t in total):
            return None
        padding = [t // 2 for t in total]
    if len(shape_of(args["input"].meta["val"])) != n + 2:
        return None  # without a batch dimension
    window = {"kernel": kernel, "stride": spread(args["stride"]), "padding": spread(padding), "dilation": dilation}
    return Layer(node, args["input"], *names, groups=args["groups"], window=window)


def _norm_after(graph: Graph, layer: Layer, uses: Mapping[str, int]) -> fx.Node | None:
    users = list(layer.node.users)
    if len(users) != 1 or op_name(users[0]) != "batch_norm":
        return None
    args = bind(users[0])
    if not layer.window and len(shape_of(layer.node.meta["val"])) != 2:
        return None  # it normalises the second dimension, and a linear layer writes the last
    names = [state_name(graph, args[k]) for k in ("weight", "bias", "running_mean", "running_var")]
    if args["input"] is not layer.node or args["training"] or any(n is None or uses[n] > 1 for n in names):
        return None
    return users[0]


def norm_names(graph: Graph, norm: fx.Node) -> dict[str, str]:
    """State names of weight, bias, running_mean and running_var of a batch norm."""
    args = bind(norm)
    return {k: str(state_name(graph, args[k])) for k in ("weight", "bias", "running_mean", "running_var")}


def features_of(graph: Graph, layer: Layer, group: Group) -> Tensor | None:
    """(units, features per unit): the columns of the layer's matrix that go with each unit of the group; None where the
    layer does not read it, or only together with what it writes (a depthwise convolution). Units may share columns."""
    dim = 0 if layer.transposed else 1
    slot = next((s for s in group.slots if s.tensor == layer.weight and s.dim == dim), None)
    if slot is None or layer.groups > 1:
        return None
    positions = slot.positions
    if len(positions.unique()) < positions.numel():  # a square of the group: row i and column i, which meet in one entry
        distinct = [p.unique() for p in positions]
        if len({len(p) for p in distinct}) > 1:
            return None
        positions = torch.stack(distinct)
    if not layer.window:
        return positions
    return (positions[:, :, None] * layer.kernel + torch.arange(layer.kernel)).reshape(group.size, -1)
