"""A model as its captured graph, with batch norms, sums and rectifiers taken into the layers before them: for inference, in inputs of one shape."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, fx, nn

from secateur.repair.fit import Affine, folded
from secateur.repair.layers import Layer, find_layers, norm_names
from secateur.runtime.layers import Fused
from secateur.surgery.cut import state_of
from secateur.surgery.predict import predict
from secateur.trace import Graph, trace
from secateur.trace.call import bind, op_name

CONVS = {1: nn.Conv1d, 2: nn.Conv2d}


def fold(model: nn.Module, args: tuple, kwargs: Mapping[str, Any] | None = None) -> fx.GraphModule:
    """The model's graph with plain layers in it: `nn.Linear` and `nn.Conv1d` / `nn.Conv2d`, each with the batch norm that follows it in its
    weights, and as `Fused` with the ReLU that follows; a convolution also with the sum that follows, as residual networks have it. `model` is not
    changed.

    Args:
        args, kwargs: inputs of the shapes that it will be called with.

    Raises:
        CaptureError: torch.export cannot follow the model.
    """
    graph = trace(model, args, dict(kwargs or {}))
    state = {**graph.capture.values, **state_of(model)}
    prediction = predict(graph, {n: torch.ones(g.size, dtype=torch.bool) for n, g in graph.groups.items()}, state)
    module, nodes = prediction.module, prediction.nodes
    done = set[fx.Node]()
    for layer in find_layers(graph):
        weight = state[layer.weight]
        if layer.why_not or layer.transposed or weight.dim() not in (2, 3, 4) or weight.dtype != torch.float32:
            continue
        total, other = _sum(layer, done) if layer.window else (layer.end, None)
        last = _rectifier(total)
        made: nn.Module = _plain(layer, _affine(graph, layer, state))
        if last is not layer.end:
            made = Fused(made, relu=last is not total)
        name = _free(module, layer.name.replace(".", "_") + "_folded")
        module.add_module(name, made.eval())
        with module.graph.inserting_before(nodes[layer.node if other is None else last]):  # the other may be computed after the layer
            call = module.graph.call_module(name, tuple(nodes[n] for n in (layer.source, other) if n is not None))
        nodes[last].replace_all_uses_with(call)
        for node in dict.fromkeys((last, total, layer.end, layer.node)):
            module.graph.erase_node(nodes[node])
            nodes[node] = call
            done.add(node)
    module.graph.eliminate_dead_code()
    module.delete_all_unused_submodules()
    used = {str(n.target) for n in module.graph.nodes if n.op == "get_attr"}
    for name in [n for held in (module._parameters, module._buffers) for n in held if n not in used]:
        delattr(module, name)
    module.recompile()
    return module


def _free(module: nn.Module, name: str) -> str:
    """The name, with a number where it is taken."""
    taken = {n for n in dir(module)}
    return next(n for n in (name, *(f"{name}_{i}" for i in range(1, len(taken) + 2))) if n not in taken)


def _rectifier(node: fx.Node) -> fx.Node:
    """The ReLU that alone reads the node, or the node."""
    users = list(node.users)
    return users[0] if len(users) == 1 and op_name(users[0]) == "relu" else node


def _sum(layer: Layer, done: set[fx.Node]) -> tuple[fx.Node, fx.Node | None]:
    """The sum of the layer's output and another of the same kind, where that alone reads it, and the other; or the output, None. Not where the sum is
    written into the other, nor where anything is written to between the layer and the sum: the layer would then read it afterwards."""
    node = layer.end
    users = list(node.users)
    if len(users) != 1 or users[0] in done or op_name(users[0]) != "add" or users[0].kwargs or len(users[0].args) != 2:
        return node, None
    others = [n for n in users[0].args if n is not node]
    value = node.meta["val"]
    if len(others) != 1 or not isinstance(others[0], fx.Node):  # a number, or twice the node
        return node, None
    other, last = others[0].meta.get("val"), _rectifier(users[0])
    if not isinstance(other, Tensor) or (other.shape, other.dtype) != (value.shape, value.dtype):
        return node, None
    if _writes(users[0]) and users[0].args[0] is not node:
        return node, None
    between = layer.node.next
    while between is not last:
        if _writes(between) and between not in (node, users[0]):
            return node, None
        between = between.next
    return users[0], others[0]


def _writes(node: fx.Node) -> bool:
    """Whether the operator changes one of its inputs, or is one (of higher order) of which that cannot be told."""
    if isinstance(node.target, torch._ops.OpOverload):
        return node.target._schema.is_mutable
    return isinstance(node.target, torch._ops.HigherOrderOperator)


def _affine(graph: Graph, layer: Layer, state: Mapping[str, Tensor]) -> Affine:
    if layer.norm is None:
        return folded(layer, state, None, 0.0)
    return folded(layer, state, norm_names(graph, layer.norm), float(bind(layer.norm)["eps"]))


def _plain(layer: Layer, affine: Affine) -> nn.Linear | nn.Conv1d | nn.Conv2d:
    """One module for the map; its bias is left out where there is none."""
    w, b = affine.w.flatten(0, 1).float(), affine.b.flatten().float()
    has_bias = bool(layer.bias or layer.norm)
    made: nn.Linear | nn.Conv1d | nn.Conv2d
    if not layer.window:
        made = nn.utils.skip_init(nn.Linear, w.shape[1], len(w), bias=has_bias)
    else:
        window = {k: tuple(int(n) for n in layer.window[k]) for k in ("stride", "padding", "dilation")}
        kernel = tuple(int(n) for n in layer.window["kernel"])
        channels = w.shape[1] * layer.groups // layer.kernel
        made = nn.utils.skip_init(CONVS[len(kernel)], channels, len(w), kernel, groups=layer.groups, bias=has_bias, **window)
    with torch.no_grad():
        made.weight.copy_(w.view_as(made.weight))
        if made.bias is not None:
            made.bias.copy_(b)
    return made
