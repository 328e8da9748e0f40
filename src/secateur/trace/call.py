"""One op of the captured graph as a rule sees it: arguments by their schema names, dimensions of tensors."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import fx

from secateur.axes import Dim, constant

Dims = tuple[Dim, ...]
Value = Any  # Dims for a tensor, a list of values for several outputs, None for what is no tensor


def op_name(node: fx.Node) -> str:
    """`aten::add_` and `aten::add` are both `add`; ops of other libraries keep their prefix (`mylib::add`)."""
    schema = getattr(node.target, "_schema", None)
    if schema is None:
        return getattr(node.target, "__name__", str(node.target))
    space, name = schema.name.split("::")
    if name.endswith("_") and not name.endswith("__"):
        name = name[:-1]
    return name if space == "aten" else f"{space}::{name}"


def module_of(node: fx.Node) -> str:
    """Dotted path of the innermost module whose forward made `node` ('' for the model itself)."""
    stack = node.meta.get("nn_module_stack") or {}
    path = ""
    for name, _ in stack.values():
        path = name
    return path.split("@")[0]


def shape_of(value: Any) -> list[int]:
    """Shape as integers; a size known only at run time counts as 0, which no rule can match."""
    return [s if isinstance(s, int) else s.node.hint or 0 for s in value.shape]


class Call:
    """`call['weight']` is the argument of that schema name (a node, a number, a list); `call.dims('weight')` its axes."""

    def __init__(self, node: fx.Node, env: dict[fx.Node, Value]):
        self.node = node
        self.env = env
        self.op = op_name(node)
        self.module = module_of(node)
        self.args = bind(node)

    def __getitem__(self, name: str) -> Any:
        return self.args.get(name)

    def dims(self, name: str) -> Dims | None:
        """Dimensions of the tensor argument, None where it was not given."""
        value = self.args.get(name)
        return self.env.get(value) if isinstance(value, fx.Node) else None

    def dims_list(self, name: str) -> list[Dims]:
        return [self.env[n] for n in self.args[name]]

    def tensors(self) -> Iterator[Dims]:
        """Dimensions of every tensor argument, those in lists included."""
        for node in self.node.all_input_nodes:
            yield from tensors_in(self.env.get(node))

    @property
    def shape(self) -> list[int]:
        """Of the first output where there are several."""
        value = self.node.meta["val"]
        return shape_of(value[0] if isinstance(value, (tuple, list)) else value)

    def reason(self, why: str) -> str:
        return f"{why} (op {self.op}" + (f" in {self.module!r})" if self.module else ")")

    def constants(self, why: str) -> Value:
        """The outputs of this op with dimensions that can never be cut."""

        def one(value: Any) -> Value:
            if isinstance(value, torch.Tensor):
                return tuple(constant(n, self.reason(why)) for n in shape_of(value))
            return [one(v) for v in value] if isinstance(value, (list, tuple)) else None

        return one(self.node.meta.get("val"))


def tensors_in(value: Value) -> Iterator[Dims]:
    if isinstance(value, tuple):
        yield value
    elif isinstance(value, list):
        for v in value:
            yield from tensors_in(v)


def bind(node: fx.Node) -> dict[str, Any]:
    """Arguments by schema name, defaults filled in."""
    schema = getattr(node.target, "_schema", None)
    if schema is None:
        return {**{str(i): a for i, a in enumerate(node.args)}, **node.kwargs}
    out = {}
    for i, spec in enumerate(schema.arguments):
        if i < len(node.args):
            out[spec.name] = node.args[i]
        elif spec.name in node.kwargs:
            out[spec.name] = node.kwargs[spec.name]
        elif spec.has_default_value():
            out[spec.name] = spec.default_value
    return out
