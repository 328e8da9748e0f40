"""From a model and example inputs to one flat graph of ATen ops, by `torch.export` (non-strict).

Regions that only change a mode (`torch.no_grad`, `autocast(enabled=False)`) are inlined, so that everything after
sees one list of ops. The model is left as it was, its training flags included.
"""

from __future__ import annotations

import traceback
from collections.abc import Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import fx, nn
from torch.export import ExportedProgram
from torch.export.graph_signature import InputKind
from torch.utils._pytree import tree_map_only

from secateur.errors import CaptureError
from secateur.trace.kept import BORN_LATER, Kept

_REGIONS = {"wrap_with_set_grad_enabled": 1, "wrap_with_autocast": 4}  # position of the region among the arguments


@dataclass
class Capture:
    """A model as one flat graph.

    `tensors` maps a placeholder's name to the state-dict name of the parameter, buffer or constant it stands for;
    `inputs` are the placeholders of the user's inputs, in order.
    """

    program: ExportedProgram
    graph: fx.Graph
    tensors: dict[str, str]
    inputs: list[str]
    values: dict[str, torch.Tensor]
    trainable: frozenset[str]
    aliases: dict[str, str] = field(default_factory=dict)


@contextmanager
def evaluating(model: nn.Module):
    """`model` in eval mode inside; afterwards its modules are as they were (`Kept`): torch.export replaces lists and dicts by copies, and what a
    forward remembers of a capture is no number."""
    modules = list(model.modules())
    flags, kept = [(m, m.training) for m in modules], [Kept(m, whole=True) for m in modules if not isinstance(m, BORN_LATER)]
    try:
        for module in modules:  # not model.eval(): modules made by torch.export refuse it
            module.training = False
        yield model
    finally:
        for module, flag in flags:
            module.training = flag
        for state in kept:
            state.put_back()


def export(model: nn.Module, args: tuple, kwargs: Mapping | None = None) -> ExportedProgram:
    """`torch.export` in eval mode.

    Raises:
        CaptureError: the model cannot be captured; the message names the user's line where it stopped.
    """
    try:
        with evaluating(model):
            return torch.export.export(model, *_each_its_own(tuple(args), dict(kwargs or {})), strict=False)
    except Exception as error:  # torch.export raises many unrelated types; all of them mean the same to the user
        raise CaptureError(_why_not_captured(model, args, error)) from error


def _each_its_own(args: tuple, kwargs: dict) -> tuple[tuple, dict]:
    """Copies of a tensor that is passed more than once: torch.export would read one of the inputs in the place of all."""
    seen = set[int]()

    def own(t: torch.Tensor) -> torch.Tensor:
        if id(t) in seen:
            return t.detach().clone().requires_grad_(t.requires_grad)
        seen.add(id(t))
        return t

    return tree_map_only(torch.Tensor, own, (args, kwargs))


def _why_not_captured(model: nn.Module, args: tuple, error: Exception) -> str:
    frames = [f for f in traceback.extract_tb(error.__traceback__) if "/torch/" not in f.filename.replace("\\", "/")]
    frames = [f for f in frames if "secateur/trace" not in f.filename.replace("\\", "/")]
    where = f"{frames[-1].filename}:{frames[-1].lineno} in {frames[-1].name}: {frames[-1].line}" if frames else "unknown"
    shapes = ", ".join(str(tuple(a.shape)) if isinstance(a, torch.Tensor) else type(a).__name__ for a in args)
    first = (str(error).strip().splitlines() or [type(error).__name__])[0][:300]
    advice = (
        "Check that model(*inputs) runs with these shapes and that forward() does not branch on tensor values; "
        "if only a part can be captured (a detector's post-processing cannot), pass that sub-module instead."
    )
    if _packed(error):
        advice = (
            "A packed sequence has sizes that depend on its lengths: let forward() pack only where lengths are given and trace it "
            "with a padded batch and without them. The weights are the same, and the cut model packs as before."
        )
    scripted = next((name for name, m in model.named_modules() if isinstance(m, torch.jit.ScriptModule)), None)
    if scripted is not None:
        advice = f"{scripted!r} is TorchScript, which torch.export does not capture: put the Python module that it was made from there."
    return (
        f"{type(model).__name__} could not be captured with inputs ({shapes}).\n"
        f"  It stopped at {where}\n  {type(error).__name__}: {first}\n  {advice}"
    )


def _packed(error: Exception) -> bool:
    """Whether a recurrent layer stopped at the batch sizes of a packed sequence; wrong shapes raise other errors there."""
    inside = any(f.filename.replace("\\", "/").endswith("torch/nn/modules/rnn.py") for f in traceback.extract_tb(error.__traceback__))
    return inside and (isinstance(error, TypeError) or "DataDependent" in type(error).__name__)


def capture(model: nn.Module, args: tuple, kwargs: Mapping | None = None) -> Capture:
    """Capture `model` as called with `args` and `kwargs`. Accepts a model on the meta device.

    Raises:
        CaptureError: see `export`.
    """
    program = export(model, args, kwargs)
    graph = _copy(program)
    tensors, inputs = {}, []
    for spec in program.graph_signature.input_specs:
        name = getattr(spec.arg, "name", None)
        if spec.kind in (InputKind.PARAMETER, InputKind.BUFFER, InputKind.CONSTANT_TENSOR):
            tensors[name] = spec.target
        elif spec.kind == InputKind.USER_INPUT and name is not None:
            inputs.append(name)
    values = {**program.state_dict, **{k: v for k, v in program.constants.items() if isinstance(v, torch.Tensor)}}
    trainable = frozenset(name for name, _ in model.named_parameters(remove_duplicate=False))
    return Capture(program, graph, tensors, inputs, values, trainable, _aliases(model))


def _aliases(model: nn.Module) -> dict[str, str]:
    """Every state name that shares its tensor with an earlier one -> that earlier name (tied weights)."""
    first: dict[int, str] = {}
    out = {}
    named = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
    for name, tensor in named:
        if id(tensor) in first:
            out[name] = first[id(tensor)]
        else:
            first[id(tensor)] = name
    return out


# ---------------------------------------------------------------- inlining of regions
def _copy(program: ExportedProgram) -> fx.Graph:
    graph = fx.Graph()
    env: dict[fx.Node, fx.Node] = {}
    for node in program.graph.nodes:
        if node.op == "output":
            graph.output(fx.map_arg(node.args[0], lambda n: env[n]))
        else:
            _copy_node(program.graph_module, graph, node, env)
    graph.eliminate_dead_code()
    return graph


def _copy_node(owner: nn.Module, graph: fx.Graph, node: fx.Node, env: dict) -> None:
    region = _REGIONS.get(getattr(node.target, "__name__", "")) if node.op == "call_function" else None
    if region is not None:
        env[node] = _inline(owner, graph, node, env, region)
    elif node.op == "call_function" and getattr(node.target, "__name__", "") == "getitem" and isinstance(
        env[node.args[0]], (list, tuple)
    ):
        env[node] = env[node.args[0]][node.args[1]]
    elif node.op == "get_attr" and isinstance(getattr(owner, node.target, None), fx.GraphModule):
        env[node] = node  # a region's body: only `_inline` looks at it
    elif any(n.op == "get_attr" and isinstance(getattr(owner, n.target, None), fx.GraphModule) for n in node.all_input_nodes):
        raise CaptureError(
            f"forward() calls {getattr(node.target, '__name__', node.target)}, whose body is a graph of its own that runs "
            "depending on data.\n"
            "  Axes are followed through one flat graph only: pass the sub-modules around it instead."
        )
    elif isinstance(node.target, torch._ops.HigherOrderOperator):
        raise CaptureError(
            f"forward() uses {node.target} (node {node.name}), whose branches cannot be followed as one list of ops.\n"
            "  Capture the part before or after it, or write the branch as arithmetic (torch.where)."
        )
    else:
        env[node] = graph.node_copy(node, lambda n: env[n])


def _inline(owner: nn.Module, graph: fx.Graph, node: fx.Node, env: dict, region: int):
    body = getattr(owner, node.args[region].target)
    operands = node.args[region + 1 :]
    inner: dict[fx.Node, object] = {}
    feed = iter(operands)
    for sub in body.graph.nodes:
        if sub.op == "placeholder":
            value = next(feed)
            inner[sub] = env[value] if isinstance(value, fx.Node) else value
        elif sub.op == "output":
            return fx.map_arg(sub.args[0], lambda n: inner[n])
        else:
            _copy_node(body, graph, sub, inner)
    raise CaptureError(f"the region {node.name} has no output; please report the model")
