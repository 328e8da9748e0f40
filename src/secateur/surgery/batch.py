"""A rewritten graph that takes any batch size.

Capture writes the batch size of the example inputs into every `view`. Which numbers count the batch is known from the
axes, so they are read off the inputs at run time instead. That it worked is tried out, not assumed.
"""

from __future__ import annotations

import operator
from collections.abc import Mapping
from typing import Any

import torch
from torch import fx, nn
from torch.utils._pytree import tree_leaves, tree_map

from secateur.axes import BATCH, Axis, Dim, axes_of, resolve
from secateur.measure.run import at_rest, untouched
from secateur.trace import Graph
from secateur.trace.call import Call

_VIEWS = {"view": "size", "_unsafe_view": "size", "reshape": "shape"}
_REPEATS = {"repeat": "repeats", "tile": "dims"}
_SIZES = {**_VIEWS, **_REPEATS, "expand": "size", "broadcast_to": "size"}
_SIZES.update(dict.fromkeys(("zeros", "ones", "full", "empty", "new_zeros", "new_ones", "new_full", "new_empty"), "size"))
_RECURRENT = frozenset(f"aten::{n}" for n in ("lstm", "gru", "rnn_tanh", "rnn_relu"))


def counts_batch(dim: Dim) -> bool:
    """Whether a dimension is the batch, or the batch times something."""
    dim = resolve(dim)
    factors = getattr(dim, "factors", (dim,))
    return sum(getattr(f, "kind", None) == BATCH for f in factors) == 1 and sum(a.kind == BATCH for a in axes_of(dim)) == 1


def _batch(dim: Dim) -> Axis:
    return next(a for a in axes_of(resolve(dim)) if a.kind == BATCH)


def free_the_batch(graph: Graph, new: fx.Graph, env: dict[fx.Node, fx.Node]) -> None:
    """Rewrite the sizes in `new` (whose nodes are `env` of the captured ones) that count the batch."""
    inputs = [n for n in graph.capture.graph.nodes if n.op == "placeholder" and n.name in graph.capture.inputs and _leads(graph, n)]
    rows = dict[int, fx.Node]()  # of a batch axis -> its size at run time, off the first input that it leads
    for node in inputs:
        axis = _batch(graph.env[node][0])
        if id(axis) not in rows:
            with new.inserting_after([n for n in new.nodes if n.op == "placeholder"][-1]):
                rows[id(axis)] = new.call_function(torch.ops.aten.sym_size.int, (env[node], 0))
    calls = [(Call(node, graph.env), copy) for node, copy in env.items() if node.op == "call_function" and hasattr(node.target, "_schema")]
    if not rows:
        _guess(graph, calls, new, env)
    for c, copy in calls if rows else ():
        _rewrite(c, copy, rows, new)
    for size in rows.values():
        if not size.users:
            new.erase_node(size)


def _guess(graph: Graph, calls: list[tuple[Call, fx.Node]], new: fx.Graph, env: dict[fx.Node, fx.Node]) -> None:
    """The same for a batch of one, which is no axis: a first size of one is the batch, in views of what comes of the inputs and in repeats of what
    does not. That it is has to be tried out."""
    inputs = [n for n in graph.capture.graph.nodes if n.op == "placeholder" and n.name in graph.capture.inputs]
    first = next((n for n in inputs if graph.env.get(n)), None)
    if first is None or graph.env[first][0].size != 1:
        return
    with new.inserting_after([n for n in new.nodes if n.op == "placeholder"][-1]):
        rows = new.call_function(torch.ops.aten.sym_size.int, (env[first], 0))
    fed = set(inputs)
    for c, copy in calls:
        if not fed.isdisjoint(c.node.all_input_nodes):
            fed.add(c.node)
        sizes = _sizes_of(c, copy)
        if sizes and sizes[0] == 1 and (c.node in fed if c.op in _VIEWS else c.node not in fed if c.op in _REPEATS else True):
            _put(c, copy, [rows, *sizes[1:]])
    if not rows.users:
        new.erase_node(rows)


def _leads(graph: Graph, node: fx.Node) -> bool:
    dims = graph.env.get(node)
    return bool(dims) and isinstance(resolve(dims[0]), Axis) and counts_batch(dims[0])


def _rewrite(c: Call, copy: fx.Node, rows: Mapping[int, fx.Node], new: fx.Graph) -> None:
    sizes, out = _sizes_of(c, copy), c.env.get(c.node)
    if not sizes:
        return
    ours = [i for i, d in enumerate(out) if sizes[i] > 0 and counts_batch(d) and id(_batch(d)) in rows and sizes[i] % _batch(d).size == 0]
    if not ours:
        return
    for i in ours:  # never as -1, into which an op would fold whatever else it is given too much of
        axis = _batch(out[i])
        rest = sizes[i] // axis.size
        with new.inserting_before(copy):
            sizes[i] = rows[id(axis)] if rest == 1 else new.call_function(operator.mul, (rows[id(axis)], rest))
    _put(c, copy, sizes)


def _place(c: Call) -> int:
    return next(i for i, a in enumerate(c.node.target._schema.arguments) if a.name == _SIZES[c.op])


def _sizes_of(c: Call, copy: fx.Node) -> list:
    """The sizes that a call of such an op is given, one for each dimension of what comes out; none of another op."""
    out = c.env.get(c.node)
    if c.op not in _SIZES or not isinstance(out, tuple):
        return []
    sizes = list(copy.args[_place(c)]) if _place(c) < len(copy.args) else list(copy.kwargs[_SIZES[c.op]])
    return [1] * (len(out) - len(sizes)) + sizes  # of `repeat` and `tile`, which may leave out the first


def _put(c: Call, copy: fx.Node, sizes: list) -> None:
    if _place(c) < len(copy.args):
        copy.update_arg(_place(c), sizes)
    else:
        copy.update_kwarg(_SIZES[c.op], sizes)


class _SameBatch(fx.Interpreter):
    """Stops before a recurrent op whose states have another batch than its input: torch does not check, it crashes."""

    def call_function(self, target, args, kwargs):
        if getattr(target, "_schema", None) is not None and target._schema.name in _RECURRENT:
            x, hx, first = args[0], args[1], args[-1]
            states = hx if isinstance(hx, (list, tuple)) else [hx]
            if x.dim() == 3 and any(h.shape[1] != x.shape[0 if first is True else 1] for h in states):
                raise ValueError("the states of a recurrent layer keep the batch size of the example inputs")
        return super().call_function(target, args, kwargs)


def run_safely(model: nn.Module, args: tuple, kwargs: Mapping) -> Any:
    """Outputs at sizes that it may not take; of a graph with recurrent layers in a row."""
    if not isinstance(model, fx.GraphModule):
        return model(*args, **kwargs)
    if any(getattr(getattr(n.target, "_schema", None), "name", "") in _RECURRENT for n in model.graph.nodes):
        return _SameBatch(model).run(*tree_leaves((args, dict(kwargs))), enable_io_processing=False)
    return model.forward(*args, **kwargs)  # not called, which would print where it stops


def batch_is_free(model: nn.Module, fixed: nn.Module, args: tuple, kwargs: Mapping) -> str:
    """Run `model` on about half of the example inputs, or a few of them repeated; '' where the rows come out as they do from `fixed`, else what
    went wrong. Much fewer or more rows, so that a number made of the batch size is off by far more than rounding."""
    tensors = [t for t in tree_leaves((args, dict(kwargs))) if isinstance(t, torch.Tensor) and t.dim()]
    if not tensors or tensors[0].shape[0] < 2:
        return "trace with a batch of two or more to free it"
    size = tensors[0].shape[0]

    def others(t):
        if not isinstance(t, torch.Tensor) or not t.dim() or t.shape[0] != size:
            return t
        return torch.cat([t, t, t[:1]]) if size < 5 else t[: size // 2 + 1]

    try:
        with at_rest(model), at_rest(fixed), untouched(args, kwargs):
            given = tree_leaves(run_safely(model, tree_map(others, args), tree_map(others, dict(kwargs))))
            same = tree_leaves(fixed(*args, **kwargs))
    except Exception as error:  # whatever it is, the batch is then not free
        return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
    for a, b in zip(given, same, strict=True):
        if isinstance(b, torch.Tensor) and b.dim() and b.shape[0] == size and b.device.type != "meta":
            wanted = others(b)
            loose = 1e-3 * float(wanted.double().nan_to_num(0.0, 0.0, 0.0).abs().max()) if wanted.numel() else 0.0
            if a.shape != wanted.shape or not torch.allclose(a.double(), wanted.double(), rtol=1e-2, atol=loose, equal_nan=True):
                return "an output depends on the size of the batch"
    return ""
