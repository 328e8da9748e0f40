"""A captured graph as JSON, and back: the part of a saved folder that makes it loadable without the model's code.

`torch.export.save` pickles example inputs and constants, and its reader looks operators up by attribute from `torch`,
so a file made to harm can run code when it is loaded. This form holds names and numbers only: every operator is found
in the dispatcher or in the short table below, and nothing is evaluated. Tensors are not in it; they live once in
`model.safetensors`.
"""

from __future__ import annotations

import importlib
import json
import keyword
import math
import operator
import re
from collections import namedtuple
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import fx, nn
from torch.fx.graph import _PyTreeCodeGen
from torch.utils._pytree import TreeSpec, treespec_dumps, treespec_loads

from secateur.errors import FormatError
from secateur.surgery.rewritten import Rewritten, called_with, hide

_FUNCTIONS: dict[str, Callable] = {
    **{f"operator.{name}": getattr(operator, name) for name in (
        "getitem", "add", "sub", "mul", "truediv", "floordiv", "mod", "pow", "neg", "eq", "ne", "lt", "le", "gt", "ge",
        "and_", "or_", "not_", "is_",
    )},
    **{f"math.{name}": getattr(math, name) for name in ("ceil", "floor", "trunc", "sqrt")},
    **{f"torch.{name}": getattr(torch, name) for name in (
        "_assert", "sym_int", "sym_float", "sym_max", "sym_min", "sym_not", "sym_sum", "sym_ite",
    ) if hasattr(torch, name)},
}  # fmt: skip
_NAMES = {function: name for name, function in _FUNCTIONS.items()}
_REGIONS = {"wrap_with_set_grad_enabled", "wrap_with_autocast", "cond", "while_loop", "scan", "map_impl"}
_REFUSED = {"aten::from_file", "aten::save", "aten::print"}  # the operators that touch something other than tensors
_OWN = ("aten", "prims", "secateur")
_QUOTABLE = re.compile(r'[^"\\\x00-\x1f\x7f]+')  # what can stand between quotes of Python source and end nothing there
_SETTINGS = (torch.dtype, torch.layout, torch.memory_format)
_CONTAINERS = ("builtins.tuple", "builtins.list", "builtins.dict", "collections.OrderedDict", None)


class CannotWrite(Exception):
    """The graph holds something this form has no word for; the message names it."""


def to_json(module: fx.GraphModule) -> dict[str, Any]:
    """The graph of `module` (as `ExportedProgram.module()` gives it) as plain JSON values.

    Raises CannotWrite for calls into Python functions or modules and for arguments with no JSON form.
    """
    graph = module.graph
    nodes = [_node_to_json(module, node) for node in graph.nodes if not _is_guard(node)]
    out: dict[str, Any] = {"nodes": nodes, "regions": {}}
    for node in graph.nodes:
        if node.op == "get_attr" and isinstance(body := fetch(module, str(node.target)), fx.GraphModule):
            out["regions"][str(node.target)] = to_json(body)
    codegen = graph._codegen
    if isinstance(codegen, _PyTreeCodeGen):
        info = codegen.pytree_info
        try:
            out["call"] = {
                "arguments": list(info.orig_args),
                "in": treespec_dumps(info.in_spec),
                "out": treespec_dumps(_plain_outputs(info.out_spec)) if info.out_spec is not None else None,
            }
        except (NotImplementedError, TypeError) as error:
            raise CannotWrite(f"inputs or outputs of a type without a registered name: {error}") from error
    return out


def tensor_names(form: Mapping[str, Any]) -> set[str]:
    """Names of the tensors the graph reads, those inside its regions not included (regions take theirs as inputs)."""
    return {n["target"] for n in form["nodes"] if n["op"] == "get_attr"} - set(form.get("regions", ()))


def from_json(form: Mapping[str, Any], tensors: Mapping[str, torch.Tensor], hidden: Iterable[str] = ()) -> fx.GraphModule:
    """The module again. `tensors` holds every parameter and buffer by name (parameters as `nn.Parameter`); those of `hidden` are no part of its
    state dict.

    Raises FormatError for an operator this process does not have, or anything malformed.
    """
    try:
        module = _build(form, tensors)
        hide(module, hidden)
        return module
    except FormatError:
        raise
    except (KeyError, TypeError, ValueError, IndexError, AttributeError, RuntimeError, NotImplementedError) as error:
        raise FormatError(
            f"graph.json does not describe a graph: {type(error).__name__}: {error}.\n"
            "  It was changed, or written by another version of secateur. Load with a factory instead, or save again."
        ) from error


# ---------------------------------------------------------------- writing
def _is_guard(node: fx.Node) -> bool:
    """The input checks torch adds to an unlifted module: they hold Python code, and forward itself needs none."""
    return node.op == "call_module" and node.target == "_guards_fn"


def own_outputs(module: fx.GraphModule) -> list[str]:
    """Names of the classes among the outputs in whose place the written graph returns a plain container."""
    codegen = module.graph._codegen
    spec = codegen.pytree_info.out_spec if isinstance(codegen, _PyTreeCodeGen) else None
    return [] if spec is None else list(dict.fromkeys(_own(spec, _plain_outputs(spec))))


def _own(spec: TreeSpec, plain: TreeSpec) -> Iterable[str]:
    if spec.type is not plain.type:
        yield spec.context.__name__ if spec.type is namedtuple else spec.type.__name__
    for i in range(spec.num_children):
        yield from _own(spec.child(i), plain.child(i))


def _plain_outputs(spec: TreeSpec) -> TreeSpec:
    """The same leaves in containers that any process has: a namedtuple as a tuple, fields of another class as a dict. A class that does not name
    its fields stays, and is refused."""
    if spec.type is None:
        return spec
    children = [_plain_outputs(spec.child(i)) for i in range(spec.num_children)]
    if spec.type is namedtuple:
        return TreeSpec(tuple, None, children)
    if f"{spec.type.__module__}.{spec.type.__name__}" not in _CONTAINERS and spec.type.__module__.split(".")[0] != "transformers":
        held = spec.context if isinstance(spec.context, list) else []
        for names in (held, *held):  # those of a dataclass stand beside the fields that are None, of a defaultdict beside its factory
            if isinstance(names, list) and len(names) == len(children) and all(isinstance(n, str) for n in names):
                return TreeSpec(dict, names, children)
    return TreeSpec(spec.type, spec.context, children)


def _node_to_json(module: fx.GraphModule, node: fx.Node) -> dict[str, Any]:
    if node.op == "call_function":
        target = _name_of(node.target)
    elif node.op in ("placeholder", "get_attr", "output"):
        target = str(node.target)
    else:
        raise CannotWrite(f"{node.op} of {node.target}")
    row: dict[str, Any] = {"op": node.op, "name": node.name, "target": target}
    if node.op != "get_attr":
        row["args"] = [encode(a) for a in node.args]
        row["kwargs"] = {k: encode(a) for k, a in node.kwargs.items()}
    return row


def _name_of(target: Any) -> str:
    if isinstance(target, torch._ops.OpOverload):
        return f"{target._schema.name}.{target._overloadname}"
    if isinstance(target, torch._ops.HigherOrderOperator) and target.name() in _REGIONS:
        return f"region::{target.name()}"
    if target in _NAMES:
        return _NAMES[target]
    raise CannotWrite(f"a call of {target}")


def encode(value: Any) -> Any:
    """`value` in JSON's own types; what JSON lacks becomes a dictionary with one key. Raises CannotWrite."""
    if value is None or isinstance(value, (bool, int, str)):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else {"float": str(value)}
    if isinstance(value, fx.Node):
        return {"node": value.name}
    if isinstance(value, _SETTINGS):
        return {"torch": str(value).removeprefix("torch.")}
    if isinstance(value, torch.device):
        return {"device": str(value)}
    if isinstance(value, slice):
        return {"slice": [encode(v) for v in (value.start, value.stop, value.step)]}
    if isinstance(value, tuple):
        return {"tuple": [encode(v) for v in value]}
    if isinstance(value, list):
        return [encode(v) for v in value]
    if isinstance(value, dict) and all(isinstance(k, str) for k in value):
        return {"dict": {k: encode(v) for k, v in value.items()}}
    if isinstance(value, complex):
        return {"complex": [value.real, value.imag]}
    raise CannotWrite(f"an argument of type {type(value).__name__}")


def fetch(module: nn.Module, name: str) -> Any:
    """What stands at dotted `name` below `module`; None if nothing does."""
    value: Any = module
    for part in name.split("."):
        value = getattr(value, part, None)
    return value


# ---------------------------------------------------------------- reading
def _build(form: Mapping[str, Any], tensors: Mapping[str, torch.Tensor]) -> fx.GraphModule:
    root = nn.Module()
    for name in tensor_names(form):
        if name not in tensors:
            raise FormatError(f"graph.json reads a tensor {name!r} that model.safetensors does not hold.\n"
                              "  The folder is incomplete: save it again.")  # fmt: skip
    for name, tensor in tensors.items():
        _plain(name, _QUOTABLE.fullmatch(name))
        install(root, name, tensor)
    for name, body in form.get("regions", {}).items():
        root.add_module(name, _build(body, {}))
    graph = fx.Graph()
    env: dict[str, fx.Node] = {}
    for row in form["nodes"]:
        _add_node(graph, row, env)
    if call := form.get("call"):
        out = _spec(call["out"]) if call["out"] is not None else None
        for name in call["arguments"]:
            _plain(name, _is_word(name.lstrip("*")))
        graph.set_codegen(called_with(list(call["arguments"]), _spec(call["in"]), out))
    graph.lint()
    module = Rewritten(root, graph)
    for name, tensor in tensors.items():  # GraphModule copies only what the graph reads
        if fetch(module, name) is not tensor:
            install(module, name, tensor)
    return module


def _add_node(graph: fx.Graph, row: Mapping[str, Any], env: dict[str, fx.Node]) -> None:
    op, target = row["op"], row["target"]
    args = tuple(decode(a, env) for a in row.get("args", ()))
    kwargs = {k: decode(a, env) for k, a in row.get("kwargs", {}).items()}
    if op == "output":
        graph.output(args[0])
        return
    if op not in ("placeholder", "get_attr", "call_function"):
        raise FormatError(f"graph.json has a node of kind {op!r}, which secateur never writes. Save the folder again.")
    found = _function(target) if op == "call_function" else target
    for name in kwargs:
        _plain(name, _is_word(name))
    if op != "call_function":
        _plain(target, _QUOTABLE.fullmatch(target) if op == "get_attr" else _is_word(target.lstrip("*")))
    env[row["name"]] = graph.create_node(op, found, args, kwargs, name=row["name"])


def _is_word(name: str) -> bool:
    return name.isidentifier() and not keyword.iskeyword(name)


def _plain(name: str, fits: object) -> None:
    """torch.fx writes names into Python source as they are, and runs it."""
    if not fits:
        raise FormatError(f"graph.json holds the name {name[:80]!r}, which would run as code.\n  Do not load this folder; ask who made it.")


def opens_files(found: Callable) -> bool:
    """Whether an operator of another library takes text: a path, for all that is known (`image::write_file` of torchvision)."""
    schema = getattr(found, "_schema", None)
    return schema is not None and schema.name.split("::")[0] not in _OWN and any("str" in str(a.type) for a in schema.arguments)


def _function(name: str) -> Callable:
    if name in _FUNCTIONS:
        return _FUNCTIONS[name]
    space, _, rest = name.partition("::")
    if space == "region" and rest in _REGIONS:
        return getattr(torch.ops.higher_order, rest)
    base, _, overload = rest.rpartition(".")
    if f"{space}::{base}" not in _REFUSED and base.isidentifier() and overload.isidentifier():
        packet = getattr(getattr(torch.ops, space), base, None) if space.isidentifier() else None
        found = getattr(packet, overload, None)
        if isinstance(found, torch._ops.OpOverload) and not opens_files(found):
            return found
    raise FormatError(
        f"graph.json calls {name!r}, an operator that this process does not have (torch {torch.__version__}) or that may open files.\n"
        "  Import the library that registers it before loading, or load with a factory."
    )


def decode(value: Any, env: Mapping[str, fx.Node]) -> Any:
    """The value `encode` wrote; `env` holds the nodes it may name. Raises FormatError."""
    if isinstance(value, list):
        return [decode(v, env) for v in value]
    if not isinstance(value, dict):
        return value
    ((kind, held),) = value.items()
    if kind == "node":
        return env[held]
    if kind == "tuple":
        return tuple(decode(v, env) for v in held)
    if kind == "dict":
        return {k: decode(v, env) for k, v in held.items()}
    if kind == "slice":
        return slice(*(decode(v, env) for v in held))
    if kind == "torch":
        found = getattr(torch, held)
        if isinstance(found, _SETTINGS):
            return found
    if kind == "device":
        return torch.device(held)
    if kind == "float":
        return float(held)
    if kind == "complex":
        return complex(*held)
    raise FormatError(f"graph.json has an argument {value!r}, which secateur never writes. Save the folder again.")


def _spec(text: str) -> Any:
    """A tree spec whose containers are plain ones, or those transformers registers for its outputs."""
    for kind in _kinds(json.loads(text)[1]):
        if kind in _CONTAINERS:
            continue
        module = str(kind).rpartition(".")[0]
        if module.split(".")[0] != "transformers":
            raise FormatError(f"graph.json takes or returns a {kind}, which is no plain container.\n"
                              "  Load with a factory instead.")  # fmt: skip
        _import_outputs(module)
    return treespec_loads(text)


def _kinds(spec: Mapping[str, Any]) -> Iterable[str | None]:
    yield spec["type"]
    if "__enum__" in (spec["context"] or ""):  # torch would import the module an enum is said to live in
        raise FormatError("graph.json keys its inputs or outputs by an enum. Load with a factory instead.")
    for child in spec["children_spec"]:
        yield from _kinds(child)


def _import_outputs(module: str) -> None:
    try:
        importlib.import_module(module)
    except ImportError as error:
        raise FormatError(f"The saved graph returns a type of {module}, which is not installed.\n"
                          "  Install it: pip install transformers") from error  # fmt: skip


def install(root: nn.Module, name: str, tensor: torch.Tensor) -> None:
    """Put `tensor` at dotted `name` below `root`, making the modules on the way; parameters stay parameters."""
    *path, last = name.split(".")
    for part in path:
        if part not in root._modules:
            root.add_module(part, nn.Module())
        root = root._modules[part]  # type: ignore[assignment]
    if isinstance(tensor, nn.Parameter):
        root.register_parameter(last, tensor)
    elif last in root._buffers or not hasattr(root, last):
        root.register_buffer(last, tensor)
    else:
        setattr(root, last, tensor)
