"""A model as one exported program, and the operator that a runtime's error means with the layer it stands in."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.export import ExportedProgram
from torch.export.graph_signature import InputKind
from torch.utils._pytree import tree_leaves, tree_map_only

from secateur.errors import CaptureError, InputError, ModelError
from secateur.export.runner import Call
from secateur.measure.run import at_rest, batch_of, forward, inputs_on, shapes
from secateur.measure.runtimes import rows
from secateur.measure.runtimes.onnx_file import TOLERANCE, deviation
from secateur.models.recipe import captured as free
from secateur.trace.capture import export

_OPERATOR = re.compile(r"\b(aten|torchvision|secateur)(?:::|\.|_)(\w+)")


@dataclass(frozen=True)
class Captured:
    """An exported program, the names of its inputs in order, whether its batch is free, and how long rows of tokens must and may be (0: as they
    are)."""

    program: ExportedProgram
    inputs: tuple[str, ...]
    dynamic: bool
    lengths: tuple[int, float]
    name: str


def capture(model: nn.Module, args: tuple, kwargs: Mapping[str, Any] | None = None, *, fixed: bool = False) -> Captured:
    """The model in evaluation mode as one graph; any number of rows, and of tokens in inputs of whole numbers (rows, tokens), where `torch.export`
    can follow that and the graph is the model for other numbers of them too, else (and if `fixed`) those given.

    Raises:
        ModelError: it has sparse layers, is not on the CPU, or is in a dtype that runtimes do not share.
        CaptureError: `torch.export` cannot follow it.
    """
    args, kwargs = inputs_on(model, args, kwargs)
    exportable(model)
    described = _captured(model, args, kwargs, fixed, lengths=not isinstance(model, fx.GraphModule))  # which may hold a length as a number
    if described.lengths[1] and not _holds(described.program, model, of_other_lengths((args, kwargs), *described.lengths)):
        described = _captured(model, args, kwargs, fixed, lengths=False)
    have = batch_of(args, kwargs)
    if described.dynamic and not _holds(described.program, model, [rows(args, kwargs, n) for n in sorted({have, 1, 2 * have, 3 * have}) if n]):
        return capture(model, args, kwargs, fixed=True)
    return described


def _captured(model: nn.Module, args: tuple, kwargs: Mapping[str, Any], fixed: bool, lengths: bool) -> Captured:
    hook = model.register_forward_hook(lambda module, given, output: plain(output))
    try:
        found, why = (export(model, args, kwargs), "") if fixed else free(model, args, kwargs, lengths)
    finally:
        hook.remove()
    if found is None:
        raise CaptureError(
            f"{type(model).__name__} could not be captured: {why}.\n  Check that it runs on these inputs, or export a part that can be."
        )
    return _described(found, type(model).__name__)


def of_other_lengths(call: Call, fewest: int, most: float) -> list[Call]:
    """The call with half of the tokens of its inputs (rows, tokens), and with half as many again, as far as there may be so few or so many. With
    the very fewest something within may have one element, which torch.export takes for another case."""
    least = fewest + 1 if fewest > 2 else 2

    def changed(t: Tensor, many: bool) -> Tensor:
        if not has_tokens(t):
            return t
        n = t.shape[1]
        return torch.cat([t, t.flip(1)], 1)[:, : int(max(n, min(n + n // 2, most)) if many else min(n, max(n // 2, least)))]

    made = (tree_map_only(Tensor, partial(changed, many=many), (call[0], dict(call[1]))) for many in (False, True))
    return [other for other in made if shapes(*other) != shapes(*call)]


def has_tokens(tensor: Tensor) -> bool:
    """Whether it is (rows, tokens)."""
    return tensor.dim() == 2 and not tensor.is_floating_point()


def _holds(program: ExportedProgram, model: nn.Module, calls: Sequence[Call]) -> bool:
    """Whether a program with free sizes is the model for these calls of other ones, as far as the model itself runs on those: a branch of forward()
    on a size, a division of it, and a number made of it may have been decided while capturing."""
    module = program.module()
    with at_rest(model):  # the program's tensors are the model's
        for call in calls:
            with suppress(InputError):
                wanted = _leaves(model, call)
                try:
                    found = _leaves(module, call)
                except InputError:  # a guard
                    return False
                pairs = [(a, b) for a, b in zip(wanted, found, strict=True) if isinstance(a, Tensor)]
                if not all(a.shape == b.shape and deviation(a, b)[1] <= TOLERANCE for a, b in pairs):
                    return False
    return True


def _leaves(model: nn.Module, call: Call) -> list[Any]:
    with at_rest(model):
        return tree_leaves(plain(forward(model, *call)))


def plain(output: Any) -> Any:
    """Outputs of a class of its own as a dictionary: whoever loads the program would have to have that class."""
    return dict(output) if isinstance(output, Mapping) and type(output) is not dict else output


def _described(program: ExportedProgram, name: str) -> Captured:
    nodes = {node.name: node for node in program.graph.nodes}
    specs = [spec for spec in program.graph_signature.input_specs if spec.kind == InputKind.USER_INPUT]
    values = [(nodes[spec.arg.name], nodes[spec.arg.name].meta.get("val")) for spec in specs if spec.arg.name in nodes]
    tensors = [(node, value) for node, value in values if isinstance(value, Tensor)]
    free_rows = [_range(value.shape[0], program) for _, value in tensors if value.dim()]
    dynamic = any(fewest <= 2 and most > 2**31 for fewest, most in free_rows)
    lengths = [_range(value.shape[1], program) for _, value in tensors if has_tokens(value)]
    fewest, most = max((a for a, _ in lengths), default=0), min((b for _, b in lengths), default=0)
    return Captured(program, tuple(node.name for node, _ in tensors), dynamic, (fewest, most) if most else (0, 0), name)


def _range(size: Any, program: ExportedProgram) -> tuple[int, float]:
    """The smallest and the largest that a dimension may be; 0 and 0 where only one number will do, which torch.export may keep as a symbol."""
    if not isinstance(size, torch.SymInt) or size.node.maybe_as_int() is not None:
        return 0, 0
    bounds = program.range_constraints.get(size.node.expr)
    if bounds is None:
        return 0, math.inf
    return (0, 0) if bounds.lower == bounds.upper else (int(bounds.lower), float(bounds.upper))


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
    if batch_of(args, kwargs) == 0:
        raise InputError(f"the inputs have no rows ({shapes(args, kwargs)}): an export is checked by running it.\n  Pass one row at least.")


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
