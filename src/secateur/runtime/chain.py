"""Sparse convolutions that follow one another in a graph, called at once: on small images a call takes longer than what it computes."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, fx, nn
from torch.overrides import handle_torch_function, has_torch_function_unary

from secateur.runtime.layers import SparseConv2d
from secateur.runtime.ops import Window, lifted, lowered, takes


class Chain(nn.Module):
    """Convolutions one after the other. Values are counted: the inputs first, then what each layer gives.

    Attributes:
        steps: (source, plus) of every layer, numbers of values; plus is -1 where nothing is added.
        results: the values that are wanted, in a tuple.
    """

    def __init__(self, layers: Mapping[str, SparseConv2d], steps: list[tuple[int, int]], results: list[int]):
        super().__init__()
        for name, layer in layers.items():
            self.add_module(name, layer)
        self.steps, self.results = steps, results

    def forward(self, *given: Tensor) -> tuple[Tensor, ...]:
        layers: list[SparseConv2d] = [*self.children()]  # type: ignore[list-item]
        values = [lifted(x) for x in given]
        if not torch.is_grad_enabled() and all(x.dim() == 4 and takes(x, layers[0].values) for x in values):
            weights, steps = self._laid_out(layers)
            return tuple(lowered(y) for y in torch.ops.secateur.sparse_chain([x.contiguous() for x in values], weights, steps, self.results))
        for layer, (source, plus) in zip(layers, self.steps, strict=True):
            values.append(layer(values[source], None if plus < 0 else values[plus]))
        return tuple(values[i] for i in self.results)

    def _laid_out(self, layers: list[SparseConv2d]) -> tuple[list[Tensor], list[int]]:
        """Tensors and steps as the operator reads them."""
        weights: list[Tensor] = []  # written so, torch.compile can follow
        steps: list[int] = []
        for layer, (source, plus) in zip(layers, self.steps, strict=True):
            n, (values, index, starts, bias) = len(weights), layer.tensors()
            weights += [values, index, starts, *([] if bias is None else [bias])]
            steps += [source, plus, n, n + 1, n + 2, -1 if bias is None else n + 3]
            steps += [layer.rows, layer.columns, layer.r, layer.set, layer.relu, *layer.window]
        return weights, steps


def chained(module: fx.GraphModule) -> fx.GraphModule:
    """The graph with its runs of sparse convolutions as `Chain`s, in place. Their layers are `chain_0.NAME` then."""
    runs, run = list[list[fx.Node]](), list[fx.Node]()
    for node in module.graph.nodes:
        if node.op == "call_module" and type(module.get_submodule(str(node.target))) is SparseConv2d and not node.kwargs:
            run.append(node)
        elif node.op not in ("placeholder", "get_attr"):
            runs, run = [*runs, run], []
    for i, nodes in enumerate(r for r in runs if len(r) > 1 and len({n.target for n in r}) == len(r)):
        _joined(module, f"chain_{i}", nodes)
    module.delete_all_unused_submodules()
    module.recompile()
    return module


def pooled(module: fx.GraphModule) -> fx.GraphModule:
    """The graph with its plain `max_pool2d` computed by our kernel, in place: torch's also finds where the largest were."""
    for node in module.graph.nodes:
        if node.op == "call_function" and str(node.target).startswith("aten.max_pool2d.") and len(node.args) <= 5 and not node.kwargs:
            sizes = [*(list(a) for a in node.args[1:]), *[[], [0], [1]][len(node.args) - 2 :]]
            node.target, node.args = max_pool, (node.args[0], tuple(n for pair in _pairs(sizes) for n in pair))
    module.recompile()
    return module


def _pairs(sizes: list[list[int]]) -> list[list[int]]:
    """Kernel, stride (as large as the kernel where none is given), padding, dilation: (height, width) of each."""
    sizes[1] = sizes[1] or sizes[0]
    return [s if len(s) == 2 else s * 2 for s in sizes]


def max_pool(x: Tensor, window: Window) -> Tensor:
    if has_torch_function_unary(x):  # a graph that is loaded is traced again, and this is one node of it
        return handle_torch_function(max_pool, (x,), x, window)
    if x.dim() == 4 and takes(x) and not (torch.is_grad_enabled() and x.requires_grad):
        return torch.ops.secateur.max_pool2d(x.contiguous(), window)
    return nn.functional.max_pool2d(x, window[:2], window[2:4], window[4:6], window[6:])


def _joined(module: fx.GraphModule, name: str, nodes: list[fx.Node]) -> None:
    inside = set(nodes)
    given = list(dict.fromkeys(a for n in nodes for a in n.all_input_nodes if a not in inside))
    number = {n: i for i, n in enumerate([*given, *nodes])}
    wanted = [n for n in nodes if any(u not in inside for u in n.users)]
    steps = [(number[n.args[0]], number[n.args[1]] if len(n.args) > 1 else -1) for n in nodes]  # type: ignore[index]
    layers = {str(n.target).replace(".", "_"): module.get_submodule(str(n.target)) for n in nodes}
    module.add_module(name, Chain(layers, steps, [number[n] for n in wanted]))  # type: ignore[arg-type]
    with module.graph.inserting_after(nodes[-1]):
        call = module.graph.call_module(name, tuple(given))
    for i, node in enumerate(wanted):
        with module.graph.inserting_after(call):
            taken = module.graph.call_function(_taken, (call, i))
        node.replace_all_uses_with(taken, lambda user: user not in inside)
    for node in reversed(nodes):
        module.graph.erase_node(node)


def _taken(values: tuple[Tensor, ...], i: int) -> Tensor:
    return values[i]
