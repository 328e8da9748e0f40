"""A rewritten graph that takes any batch size.

Capture writes the batch size of the example inputs into every `view`. Which numbers count the batch is known from the
axes, so they are read off the first input at run time instead. That it worked is tried out, not assumed.
"""

from __future__ import annotations

import operator
from collections.abc import Mapping

import torch
from torch import fx, nn
from torch.utils._pytree import tree_leaves, tree_map

from secateur.axes import BATCH, Dim, axes_of, resolve
from secateur.measure.run import at_rest, untouched
from secateur.trace import Graph
from secateur.trace.call import Call

_SIZES = {"view": "size", "_unsafe_view": "size", "reshape": "shape", "expand": "size", "broadcast_to": "size"}
_SIZES.update({"repeat": "repeats", "tile": "dims"})
_SIZES.update(dict.fromkeys(("zeros", "ones", "full", "empty", "new_zeros", "new_ones", "new_full", "new_empty"), "size"))
_RECURRENT = frozenset(f"aten::{n}" for n in ("lstm", "gru", "rnn_tanh", "rnn_relu"))
_INFERRED = ("view", "_unsafe_view", "reshape")  # ops that work a size of -1 out for themselves


def counts_batch(dim: Dim) -> bool:
    """Whether a dimension is the batch, or the batch times something."""
    dim = resolve(dim)
    factors = getattr(dim, "factors", (dim,))
    return sum(getattr(f, "kind", None) == BATCH for f in factors) == 1 and sum(a.kind == BATCH for a in axes_of(dim)) == 1


def _batch_size(dim: Dim) -> int:
    return next(a.size for a in axes_of(dim) if a.kind == BATCH)


def free_the_batch(graph: Graph, new: fx.Graph, env: dict[fx.Node, fx.Node]) -> None:
    """Rewrite the sizes in `new` (whose nodes are `env` of the captured ones) that count the batch."""
    first = next(
        (n for n in graph.capture.graph.nodes if n.op == "placeholder" and n.name in graph.capture.inputs and _leads(graph, n)), None
    )
    if first is None:
        return
    last_input = [n for n in new.nodes if n.op == "placeholder"][-1]
    with new.inserting_after(last_input):
        batch = new.call_function(torch.ops.aten.sym_size.int, (env[first], 0))
    for node, copy in list(env.items()):
        if node.op == "call_function" and hasattr(node.target, "_schema"):
            _rewrite(Call(node, graph.env), copy, batch, new)


def _leads(graph: Graph, node: fx.Node) -> bool:
    dims = graph.env.get(node)
    return bool(dims) and counts_batch(dims[0])


def _rewrite(c: Call, copy: fx.Node, batch: fx.Node, new: fx.Graph) -> None:
    name = _SIZES.get(c.op)
    out = c.env.get(c.node)
    if name is None or not isinstance(out, tuple):
        return
    position = next(i for i, a in enumerate(c.node.target._schema.arguments) if a.name == name)
    sizes = list(copy.args[position]) if position < len(copy.args) else list(copy.kwargs[name])
    sizes = [1] * (len(out) - len(sizes)) + sizes  # of `repeat` and `tile`, which may leave out the first
    ours = [i for i, d in enumerate(out) if sizes[i] > 0 and counts_batch(d) and sizes[i] % _batch_size(d) == 0]
    if not ours:
        return
    if len(ours) == 1 and c.op in _INFERRED and -1 not in sizes:
        sizes[ours[0]] = -1
    else:
        for i in ours:
            rest = sizes[i] // _batch_size(out[i])
            with new.inserting_before(copy):
                sizes[i] = batch if rest == 1 else new.call_function(operator.mul, (batch, rest))
    if position < len(copy.args):
        copy.update_arg(position, sizes)
    else:
        copy.update_kwarg(name, sizes)


class _SameBatch(fx.Interpreter):
    """Stops before a recurrent op whose states have another batch than its input: torch does not check, it crashes."""

    def call_function(self, target, args, kwargs):
        if getattr(target, "_schema", None) is not None and target._schema.name in _RECURRENT:
            x, hx, first = args[0], args[1], args[-1]
            states = hx if isinstance(hx, (list, tuple)) else [hx]
            if x.dim() == 3 and any(h.shape[1] != x.shape[0 if first is True else 1] for h in states):
                raise ValueError("the states of a recurrent layer keep the batch size of the example inputs")
        return super().call_function(target, args, kwargs)


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
            nodes = model.graph.nodes if isinstance(model, fx.GraphModule) else ()
            if any(getattr(getattr(n.target, "_schema", None), "name", "") in _RECURRENT for n in nodes):
                _SameBatch(model).run(*tree_leaves(tree_map(others, (args, dict(kwargs)))), enable_io_processing=False)
            given = tree_leaves(model(*tree_map(others, args), **tree_map(others, dict(kwargs))))
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
