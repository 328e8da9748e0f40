"""A model as one exported program, and the operator that a runtime's error means with the layer it stands in."""

from __future__ import annotations

import re
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.export import ExportedProgram
from torch.export.graph_signature import InputKind
from torch.utils._pytree import tree_leaves

from secateur.errors import CaptureError, InputError, ModelError
from secateur.measure.run import inputs_on
from secateur.models.recipe import captured as free
from secateur.trace.capture import export

_OPERATOR = re.compile(r"\b(aten|torchvision|secateur)(?:::|\.|_)(\w+)")


@dataclass(frozen=True)
class Captured:
    """An exported program, the names of its inputs in order, whether its batch is free, and whether the length of token inputs is."""

    program: ExportedProgram
    inputs: tuple[str, ...]
    dynamic: bool
    lengths: bool
    name: str


def capture(model: nn.Module, args: tuple, kwargs: Mapping[str, Any] | None = None, *, fixed: bool = False) -> Captured:
    """The model in evaluation mode as one graph; any number of rows, and of tokens in inputs of whole numbers (rows, tokens), where `torch.export`
    can follow that, else (and if `fixed`) those given.

    Raises:
        ModelError: it has sparse layers, is not on the CPU, or is in a dtype that runtimes do not share.
        CaptureError: `torch.export` cannot follow it.
    """
    args, kwargs = inputs_on(model, args, kwargs)
    exportable(model)
    if fixed:
        program = export(model, args, kwargs)
    else:
        found, why = free(model, args, kwargs, lengths=True)
        if found is None:
            raise CaptureError(
                f"{type(model).__name__} could not be captured: {why}.\n  Check that it runs on these inputs, or export a part that can be."
            )
        program = found
    nodes = {node.name: node for node in program.graph.nodes}
    specs = [spec for spec in program.graph_signature.input_specs if spec.kind == InputKind.USER_INPUT]
    values = [(nodes[spec.arg.name], nodes[spec.arg.name].meta.get("val")) for spec in specs if spec.arg.name in nodes]
    tensors = [(node, value) for node, value in values if isinstance(value, Tensor)]
    dynamic = any(value.dim() and _is_free(value.shape[0], program) for _, value in tensors)
    lengths = any(value.dim() == 2 and not value.is_floating_point() and _is_free(value.shape[1], program) for _, value in tensors)
    return Captured(program, tuple(node.name for node, _ in tensors), dynamic, lengths, type(model).__name__)


def _is_free(size: Any, program: ExportedProgram) -> bool:
    """Whether a dimension may be any number: torch.export keeps a symbol also where it has found that only one will do."""
    if not isinstance(size, torch.SymInt) or size.node.maybe_as_int() is not None:
        return False
    bounds = program.range_constraints.get(size.node.expr)
    return bounds is None or (bounds.lower <= 2 and bounds.upper > 2**31)


def exportable(model: nn.Module) -> None:
    """Raises ModelError for what no format can hold: sparse layers of our own, another device, bfloat16."""
    for name, module in model.named_modules():
        if type(module).__module__.startswith("secateur.runtime"):
            raise ModelError(
                f"{name or 'the model'} is a {type(module).__name__}: sparse layers run kernels of secateur, which no other runtime has.\n"
                "  Export the model as it was before runtime.convert(); its zeros go along, stored densely."
            )
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if tensor.device.type != "cpu":
            raise ModelError(f"{name} is on {tensor.device.type}; files are written from the CPU.\n  Move a copy there: model.cpu().")
        if tensor.dtype == torch.bfloat16:
            raise ModelError(f"{name} is bfloat16, which not every runtime takes and numpy cannot hold.\n  Convert a copy first: model.float().")


def check_inputs(args: tuple, kwargs: Mapping[str, Any]) -> None:
    """Raises InputError if there is nothing to run the file on."""
    if not any(isinstance(leaf, Tensor) for leaf in tree_leaves((args, dict(kwargs)))):
        raise InputError("no tensor among the inputs: an export is checked by running it.\n  Pass args=(x,).")


def named(error: str, program: ExportedProgram) -> str:
    """The operators of the program that an error text speaks of, each with the layer of its first node: "aten.foo in 'layer3.0'"; '' for none."""
    said: dict[str, str] = {}
    wanted = {match[2].removesuffix("_out") for match in _OPERATOR.finditer(error)}
    for node in program.graph.nodes:
        if node.op == "call_function" and isinstance(node.target, torch._ops.OpOverload):
            space, _, base = node.target._schema.name.partition("::")
            if (base in wanted or f"{base}_{node.target._overloadname}" in wanted) and base not in said:
                said[base] = f"{space}.{base} in {layer_of(node, program)!r}"
    return ", ".join(said.values())


def named_within(error: str, program: ExportedProgram) -> str:
    """The same for operators that others are made of: converters take them apart before they refuse one."""
    with suppress(Exception):  # what cannot be taken apart cannot be searched
        return named(error, program.run_decompositions())
    return ""


def layer_of(node: fx.Node, program: ExportedProgram) -> str:
    """The module a node stands in; where a graph has forgotten that, the parameter it reads, else its own name."""
    stack = node.meta.get("nn_module_stack") or {}
    paths = [str(value[0]) for value in stack.values() if value[0]]
    if paths:
        return paths[-1]
    tensors = {**program.graph_signature.inputs_to_parameters, **program.graph_signature.inputs_to_buffers}
    return next((tensors[held.name] for held in node.all_input_nodes if held.name in tensors), node.name)
