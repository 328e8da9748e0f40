"""The captured graph run on batches of any size, op by op, for someone who looks on."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import fx, nn
from torch.utils._pytree import tree_flatten

from secateur.calibrate.batches import Batch, does_not_run
from secateur.errors import CaptureError, DataError
from secateur.measure.run import at_rest, untouched
from secateur.trace import Graph
from secateur.trace.call import op_name
from secateur.trace.capture import Capture, capture

MOST_CAPTURES = 8  # kept at a time; texts of many lengths would fill the memory

See = Callable[[fx.Node, Any, Callable[[fx.Node], Any]], None]


class Replay:
    """Runs the graph of `model` on batches. The sizes of the example inputs are written into a captured graph, so a batch
    of other sizes is captured anew; the nodes of that graph are told to the onlooker as those of the traced one."""

    def __init__(self, model: nn.Module, graph: Graph, args: tuple, kwargs: Mapping[str, Any]):
        self.model, self.graph = model, graph
        self.keywords = frozenset(kwargs)
        self.captures = {_signature(args, kwargs): (graph.capture, {n: n for n in graph.capture.graph.nodes})}

    def run(self, batch: Batch, see: See) -> None:
        """Calls `see(node, value, of)` after every op; `of(other node)` is the value of one that this op takes in.

        Raises:
            DataError: the model does not run on the batch, or computes something else on its sizes than on the example's.
        """
        kwargs = {k: v for k, v in batch.kwargs.items() if k != "labels" or k in self.keywords}
        with at_rest(self.model):
            captured, names = self._captured(batch, kwargs)
            named = {**dict(self.model.named_parameters(remove_duplicate=False)), **dict(self.model.named_buffers(remove_duplicate=False))}
            flat, _ = tree_flatten((batch.args, kwargs))
            feed, inputs = iter(flat), []
            for node in captured.graph.nodes:
                if node.op == "placeholder":
                    name = captured.tensors.get(node.name)
                    inputs.append(next(feed) if name is None else named.get(name, captured.values.get(name)))
            with untouched(batch.args, kwargs):
                try:
                    _Shown(captured.graph, names, see).run(*inputs)
                except DataError:
                    raise
                except Exception as error:  # an op may raise anything on values it was not traced with
                    said = (str(error).strip().splitlines() or [type(error).__name__])[0]
                    raise does_not_run(batch.number, batch.args, kwargs, said) from error

    def _captured(self, batch: Batch, kwargs: dict[str, Any]) -> tuple[Capture, dict[fx.Node, fx.Node]]:
        key = _signature(batch.args, kwargs)
        if key not in self.captures:
            try:
                made = capture(self.model, batch.args, kwargs)
            except CaptureError as error:
                said = next((line.strip() for line in str(error).splitlines()[2:]), str(error))
                raise does_not_run(batch.number, batch.args, kwargs, said) from error
            names = _same_nodes(self.graph.capture, made)
            if names is None:
                raise DataError(
                    f"on {batch}, forward() runs other ops than on the example inputs.\n"
                    "  Pass batches of one size, and args= of that size."
                )
            if len(self.captures) >= MOST_CAPTURES:
                self.captures.pop(list(self.captures)[1])  # the first is the trace itself
            self.captures[key] = made, names
        return self.captures[key]


def _signature(args: tuple, kwargs: Mapping[str, Any]) -> tuple:
    leaves, spec = tree_flatten((tuple(args), dict(kwargs)))
    return (str(spec), *((tuple(v.shape), v.dtype) if isinstance(v, torch.Tensor) else repr(v) for v in leaves))


def _same_nodes(old: Capture, new: Capture) -> dict[fx.Node, fx.Node] | None:
    """Every node of `new` -> the one of `old` that does the same; None where the two are not the same list of ops."""

    def listed(captured: Capture) -> list[fx.Node]:
        return [n for n in captured.graph.nodes if n.op != "placeholder" or n.name in captured.tensors]

    def what(captured: Capture, node: fx.Node) -> Any:
        return captured.tensors[node.name] if node.op == "placeholder" else node.target

    a, b = listed(old), listed(new)
    if len(a) != len(b) or any(what(old, x) != what(new, y) for x, y in zip(a, b, strict=True)):
        return None
    return dict(zip(b, a, strict=True))


class _Shown(fx.Interpreter):
    def __init__(self, graph: fx.Graph, names: Mapping[fx.Node, fx.Node], see: See):
        super().__init__(fx.GraphModule({}, graph))
        self.names, self.see = names, see
        self.now = {old: new for new, old in names.items()}

    def run_node(self, n: fx.Node) -> Any:
        if op_name(n) == "_assert_tensor_metadata":
            return None  # it asserts what was so when the graph was captured
        value = super().run_node(n)
        if n.op == "call_function":
            self.see(self.names[n], value, lambda node: self.env[self.now[node]])
        return value
