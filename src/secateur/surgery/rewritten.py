"""A graph as a module that goes on as it is: in copies, in files, and with the inputs that it was made for."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import fx, nn
from torch.fx import _pytree as fx_pytree
from torch.fx.graph import _PyTreeCodeGen, _PyTreeInfo  # the one way to give a graph its calling convention
from torch.utils._pytree import TreeSpec

from secateur.errors import InputError


class Rewritten(fx.GraphModule):
    """torch.fx pickles the code of a graph and traces it when it is read, which fails where a size is one number among others (`zeros([2, rows])`),
    and its copies make tensors beside the state dict a part of it. This writes the nodes, and copies what is there."""

    def __reduce__(self) -> tuple[Any, ...]:
        rows = [(n.op, n.name, _named(n.target), *fx.node.map_aggregate((n.args, n.kwargs), _named)) for n in self.graph.nodes]
        return _again, (self._beside(), rows, self.graph._codegen)

    def __deepcopy__(self, memo: dict[int, Any]) -> Rewritten:
        memo[id(self)] = made = Rewritten.__new__(Rewritten)
        return made._filled(copy.deepcopy(self._beside(), memo), copy.deepcopy(self.graph, memo))

    def _apply(self, fn: Any, recurse: bool = True) -> Rewritten:
        super()._apply(fn, recurse)
        for name in dict.fromkeys(str(n.target) for n in self.graph.nodes if n.op == "get_attr"):  # constants go where the model goes
            path, _, leaf = name.rpartition(".")
            held = vars(self.get_submodule(path))
            if isinstance(held.get(leaf), torch.Tensor):
                held[leaf] = fn(held[leaf])
        return self

    def _beside(self) -> dict[str, Any]:
        """All but the graph."""
        return {name: value for name, value in self.__dict__.items() if name != "_graph"}

    def _filled(self, body: dict[str, Any], graph: fx.Graph) -> Rewritten:
        self.__dict__.update(body)
        self.__class__.__name__ = "GraphModule"  # as torch.fx names them
        self.graph = graph
        return self


class _Name(tuple):
    """How a node or an operator stands in a pickle: its kind, and its name."""


def _named(value: Any) -> Any:
    if isinstance(value, fx.Node):
        return _Name(("node", value.name))
    if isinstance(value, torch._ops.OpOverload):
        return _Name(("op", *value._schema.name.split("::"), value._overloadname))
    if isinstance(value, torch._ops.HigherOrderOperator):
        return _Name(("region", value.name()))
    return value


def _again(body: dict[str, Any], rows: Sequence[tuple], codegen: Any) -> Rewritten:
    graph, env = fx.Graph(), dict[str, fx.Node]()

    def meant(value: Any) -> Any:
        if not isinstance(value, _Name):
            return value
        kind, name, *rest = value
        if kind == "node":
            return env[name]
        return getattr(torch.ops.higher_order, name) if kind == "region" else getattr(getattr(getattr(torch.ops, name), rest[0]), rest[1])

    def filled(value: Any) -> Any:  # not map_aggregate, which would look into the names
        if isinstance(value, _Name):
            return meant(value)
        if isinstance(value, (list, tuple)):
            return type(value)(filled(v) for v in value)
        if isinstance(value, Mapping):
            return {k: filled(v) for k, v in value.items()}
        return slice(filled(value.start), filled(value.stop), filled(value.step)) if isinstance(value, slice) else value

    for op, name, target, args, kwargs in rows:
        env[name] = graph.create_node(op, meant(target), filled(args), filled(kwargs), name=name)
    graph.set_codegen(codegen)
    return Rewritten.__new__(Rewritten)._filled(body, graph)


def unregister(module: fx.GraphModule, names: Iterable[str]) -> None:
    """Constants of the user's forward were no buffers of the model and do not become some: plain attributes again."""
    for owner, leaf in _buffers(module, names):
        object.__setattr__(owner, leaf, owner._buffers.pop(leaf))


def hide(module: fx.GraphModule, names: Iterable[str]) -> None:
    """Leave these buffers out of the state dict, as the model did."""
    for owner, leaf in _buffers(module, names):
        owner._non_persistent_buffers_set.add(leaf)


def _buffers(module: fx.GraphModule, names: Iterable[str]) -> Iterator[tuple[nn.Module, str]]:
    for name in names:
        *path, leaf = name.split(".")
        owner: nn.Module = module
        for part in path:
            owner = owner._modules.get(part) or owner
        if leaf in owner._buffers:
            yield owner, leaf


# ---------------------------------------------------------------- how it is called
class _Exact(_PyTreeCodeGen):
    """Reads the inputs by `flat_inputs`."""

    def additional_globals(self) -> list[tuple[str, Any]]:
        return [*super().additional_globals(), ("secateur_flat_inputs", flat_inputs)]

    def gen_fn_def(self, *args: Any, **kwargs: Any) -> str:
        return super().gen_fn_def(*args, **kwargs).replace("fx_pytree.tree_flatten_spec(", "secateur_flat_inputs(")


def called_with(arguments: list[str], in_spec: TreeSpec, out_spec: TreeSpec | None) -> _PyTreeCodeGen:
    """The calling convention of a graph with these arguments."""
    return _Exact(_PyTreeInfo(arguments, in_spec, out_spec))


def flat_inputs(inputs: tuple[list, dict], spec: TreeSpec) -> list[Any]:
    """The inputs in a row. Raises InputError where lists have other lengths or dicts other keys than they had: torch.fx would take out what it knows
    and ignore the rest."""
    for number, (given, child) in enumerate(zip(inputs[0], spec.child(0).children(), strict=True)):
        _same(given, child, f"input {number}")
    for name, child in zip(spec.child(1).context or (), spec.child(1).children(), strict=True):
        _same(inputs[1][name], child, name)
    return fx_pytree.tree_flatten_spec(inputs, spec)


def _same(given: Any, spec: TreeSpec, where: str) -> None:
    if spec.is_leaf() or spec.type not in (dict, list, tuple):  # torch.fx compares the others itself
        return
    wanted = list(spec.context) if spec.type is dict else spec.num_children
    if spec.type is dict:
        found: Any = list(given) if isinstance(given, Mapping) else None
        same = found is not None and set(found) == set(wanted)
    else:
        found = len(given) if isinstance(given, (list, tuple)) else None
        same = found == wanted
    if not same:
        told = f"a {type(given).__name__}" if found is None else f"a {type(given).__name__} of {found}"
        raise InputError(f"{where} is {told}, a {spec.type.__name__} of {wanted} when this graph was captured, which reads no more and no less.\n"
                         "  Call it like that, or prune the model as called otherwise.")  # fmt: skip
    for key, child in zip(wanted if spec.type is dict else range(spec.num_children), spec.children(), strict=True):
        _same(given[key], child, f"{where}[{key!r}]")
