"""Ties that let the user's own class follow a cut.

The algebra finds every freedom there is; a class may have less. `chunk(2)` always halves, and one attribute `head_dim`
serves queries, keys and values alike. With these ties such dimensions lose the same units, so that attributes can say
what is left and the class need not be replaced by a rewritten graph.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping

from torch import nn

from secateur.axes import Axis, Dim, Prod, axes_of, freeze, is_frozen, resolve, same, unify
from secateur.trace.call import Call, Dims, Value, bind, module_of, op_name
from secateur.trace.capture import Capture

_EVEN = ("chunk", "split", "tensor_split", "unsafe_chunk", "unsafe_split")
_SIZES = {"view": "size", "_unsafe_view": "size", "reshape": "shape"}


def tie(captured: Capture, env: dict, model: nn.Module, tensors: Mapping[str, Dims]) -> None:
    """Unify what the class of each module cannot tell apart."""
    in_parameters = {axis for dims in tensors.values() for d in dims for axis in axes_of(d)}
    modules = dict(model.named_modules())
    written: dict[tuple[str, int], list[Dim]] = defaultdict(list)
    for node in captured.graph.nodes:
        if node.op != "call_function" or not hasattr(node.target, "_schema"):
            continue
        op, out = op_name(node), env.get(node)
        if op in _EVEN and isinstance(out, list):
            _tie_pieces(Call(node, env), out)
        for size, dim in _written(op, bind(node), out):
            path, dim = module_of(node), resolve(dim)
            counts_units = any(axis in in_parameters for axis in axes_of(dim))  # a batch may have the same size by chance
            plain = not isinstance(dim, Prod) or is_frozen(dim)
            if counts_units and plain and size in numbers(modules.get(path)):
                written[path, size].append(dim)
    users: dict[Axis, set[str]] = defaultdict(set)
    for (path, _), dims in written.items():
        for axis in {axis for d in dims for axis in axes_of(d)}:
            users[axis].add(path)
    for (path, size), dims in written.items():
        shared = any(len(users[axis]) > 1 for d in dims for axis in axes_of(d))
        _tie_number(dims, shared, f"{path!r} has one number {size} for several axes")


def _tie_number(dims: list[Dim], shared: bool, reason: str) -> None:
    """Axes that one module writes one number for become one axis. Where another module writes one of them as well
    (rotary frequencies serve all layers) the tie would spread to it: then the number stays as it is."""
    if not shared:
        for d in dims[1:]:
            unify(dims[0], d)
    elif not all(same(resolve(dims[0]), resolve(d)) for d in dims[1:]):
        for d in dims:
            freeze(d, reason)


def _tie_pieces(c: Call, out: list[Value]) -> None:
    d = c["dim"] % len(out[0])
    pieces = [p[d] for p in out if isinstance(p, tuple) and p[d].size == out[0][d].size]
    if not all(is_frozen(p) for p in pieces):
        for p in pieces[1:]:
            unify(pieces[0], p)


def _written(op: str, args: dict, out: Value) -> Iterable[tuple[int, Dim]]:
    """Sizes spelled out in an op, each with the dimension it is the size of."""
    if op in _SIZES and isinstance(out, tuple):
        sizes = args[_SIZES[op]]
        return [(s, d) for s, d in zip(sizes, out, strict=True) if isinstance(s, int) and s > 1]
    if op == "unflatten" and isinstance(out, tuple):
        start = args["dim"] % (len(out) - len(args["sizes"]) + 1)
        return [(s, d) for s, d in zip(args["sizes"], out[start:], strict=False) if isinstance(s, int) and s > 1]
    return []


def numbers(module: nn.Module | None) -> set[int]:
    """Integers among the attributes of a module."""
    found: set[int] = set()
    for value in vars(module).values() if module is not None else ():
        for v in value if isinstance(value, (list, tuple)) else (value,):
            if isinstance(v, int) and not isinstance(v, bool):
                found.add(v)
    return found
