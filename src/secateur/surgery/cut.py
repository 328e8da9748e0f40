"""Carry out a plan on a copy of the model. The model that was given is never touched."""

from __future__ import annotations

import copy
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from torch import nn
from torch.utils._pytree import tree_leaves

from secateur.axes import Axis, mask
from secateur.errors import CaptureError, CutError, PlanError
from secateur.measure.count import count
from secateur.measure.float64 import apart, lively
from secateur.plan import Plan
from secateur.surgery import attributes
from secateur.surgery.attributes import Edit
from secateur.surgery.constants import new_shape
from secateur.surgery.handed import handed_back
from secateur.surgery.oplog import first_difference, op_log, outputs_in_float64, reads
from secateur.surgery.predict import Prediction, cut_tensor, predict
from secateur.surgery.unread import unread
from secateur.trace import Graph
from secateur.trace.call import op_name, shape_of
from secateur.trace.capture import capture
from secateur.trace.tracer import named_by

TRAINING = (
    "a rewritten graph was captured in eval mode and from inputs of one size: in training its dropout stays off and its BatchNorm "
    "statistics stay fixed, branches of forward() that depend on sizes are those of the example inputs, tensors that it makes keep "
    "their dtype and device, and what ran under no_grad or autocast runs as plain ops"
)
SAME = 1e-9  # relative, in float64: the cut module and the predicted graph are the same function


@dataclass
class Cut:
    """A cut model and how it was made.

    Attributes:
        model: an ordinary smaller module.
        how: "attributes" (the user's own class, with tensors and attributes set) or "graph" (the captured graph with its
            constants rewritten, a `torch.fx.GraphModule`, because the class could not follow).
        why: what stood in the way of "attributes", '' where nothing did.
        edits: attributes that took a new value.
        kept: state name -> per dimension the kept positions (None where all stay); for optimizers and masks.
        predicted: the predicted graph, which `model` was compared with.
    """

    model: nn.Module
    how: str
    why: str
    edits: list[Edit]
    kept: dict[str, list[np.ndarray | None]]
    predicted: nn.Module
    notes: list[str] = field(default_factory=list)


def state_of(model: nn.Module) -> dict[str, torch.Tensor]:
    """Every parameter and buffer by name, non-persistent buffers and tied names included; the tensors themselves."""
    return {**dict(model.named_parameters(remove_duplicate=False)), **dict(model.named_buffers(remove_duplicate=False))}


@torch.inference_mode(False)  # what is made here is trained later
@torch.no_grad()
def cut(model: nn.Module, graph: Graph, plan: Plan, refuse_class: str = "", values: bool = True) -> Cut:
    """The model without the units that `plan` drops.

    Args:
        model: the module that `graph` was traced from, with its weights. Unchanged.
        graph: its trace.
        plan: made for this graph.
        values: compare the outputs of the cut class with those of the predicted graph in float64, besides its ops; to be
            left out only where a proof follows.
        refuse_class: why the user's own class cannot serve; then the rewritten graph is handed back.

    Raises:
        PlanError: the plan does not belong to the graph.
        CutError: the predicted graph does not run, or `ignore` names a tensor that nothing would read; nothing was changed.
    """
    if plan.weights:
        raise PlanError("this plan makes single weights zero, which a cut does not.\n  mask() carries it out; cut with a plan without weights first.")
    keep = graph.keep_axes(plan.keep)
    state = state_of(model)
    _belongs_together(state, graph)
    beside = _with_blocks(graph, plan)
    prediction = predict(graph, plan.keep, state)
    gone = graph.removed_blocks(plan.keep)
    if gone:
        refuse_class = f"forward() runs all residual blocks, and {len(gone)} of {len(graph.blocks)} go"
    args, kwargs = graph.capture.program.example_inputs
    try:
        wanted = op_log(prediction.module, args, kwargs)
    except Exception as error:
        raise CutError(
            f"the predicted graph of {type(model).__name__} does not run: {error}.\n  Nothing was changed. "
            "This is a fault of secateur: please report the model; ignore= the layers named above to go on without them."
        ) from error
    kept, back = _kept(graph, keep), list[Edit]()
    why = refuse_class
    if not why:
        try:
            trial, edits, others = _by_attributes(model, graph, keep, prediction, state)
        except Exception as error:  # a model that cannot be copied is still a model that can be cut as a graph
            why = f"the model cannot be copied ({error})"
    if not why:
        why = _refused(trial, graph, keep, (prediction.module, wanted), values)
        if why and others:
            attributes.apply(trial, others)
            if not _refused(trial, graph, keep, (prediction.module, wanted), values):
                why, edits = "", others
        if not why and reads(trial, state.values(), args, kwargs):
            why = "forward() calls a function kept as an attribute, which goes on with the tensors of the original in a copy"
        if not why:
            edits, back = _needed(trial, edits, graph, prediction.module)
    if why:
        rewritten, notes = handed_back(model, graph, plan, state, prediction.module)
        return Cut(rewritten, "graph", why, [], kept, prediction.module, [TRAINING, *notes, *beside])
    return Cut(trial, "attributes", "", edits, kept, prediction.module, unread(trial, graph, kept, back))


def _with_blocks(graph: Graph, plan: Plan) -> list[str]:
    """A note on tensors of no single block that nothing reads without all those that go, such as an encoder's."""
    gone = graph.removed_blocks(plan.keep)
    names = sorted(graph.unused_tensors(plan.keep) & graph.tensors.keys() - {t for b in gone for t in b.tensors})
    ignored = [n for n in names if named_by(n, graph.ignored)]
    if ignored:
        raise CutError(f"{ignored[0]!r}, which ignore= names, would be read by nothing: the blocks that read it go ({len(gone)} in all), such as "
                       f"{gone[0].name!r}.\n  Nothing was changed. Add one of these blocks to ignore=.")  # fmt: skip
    if not names:
        return []
    more = f" and {len(names) - 4} more" if len(names) > 4 else ""
    return [f"with the blocks that go ({len(gone)}) goes what only they read: {', '.join(names[:4])}{more}"]


def _belongs_together(state: dict[str, torch.Tensor], graph: Graph) -> None:
    for name, dims in graph.tensors.items():
        want = [d.size for d in dims]
        if name in graph.sizes and (name not in state or list(state[name].shape) != want):
            have = tuple(state[name].shape) if name in state else "missing"
            raise PlanError(
                f"{name!r} is {have} in this model and {tuple(want)} in the trace.\n  Pass the model that was traced, or trace this one."
            )


def _kept(graph: Graph, keep: dict[Axis, np.ndarray]) -> dict[str, list[np.ndarray | None]]:
    out = {}
    for name, dims in graph.tensors.items():
        masks = [mask(d, keep) for d in dims]
        if not all(m.all() for m in masks):
            out[name] = [None if m.all() else np.flatnonzero(m) for m in masks]
    return out


def _by_attributes(model: nn.Module, graph: Graph, keep, prediction: Prediction, state) -> tuple[nn.Module, list[Edit], list[Edit]]:
    """A copy of `model` with cut tensors and attributes, the edits made, and others that would be as plausible."""
    trial = copy.deepcopy(model)
    own = {id(m) for m in model.modules()} | {id(t) for t in state.values()}
    if any(id(x) in own for x in (*trial.modules(), *state_of(trial).values())):
        raise CutError("its copy shares modules or tensors with it")
    for module in trial.modules():
        module.training = False
    new: dict[str, torch.Tensor] = {}
    for name, dims in graph.tensors.items():
        if name in state and any(not mask(d, keep).all() for d in dims):
            new[name] = cut_tensor(state[name], dims, keep)
    new.update({name: value for name, value in prediction.indices.items() if name in state})
    for name, tensor in new.items():
        names = [name, *(a for a, first in graph.capture.aliases.items() if first == name)]
        put(trial, names, tensor, state[name])
    sizes = attributes.parameter_shapes(state, new)
    for path, pairs in attributes.tensor_shapes(prediction.changed, graph.env, keep).items():
        sizes[path] = [*sizes.get(path, []), *pairs]
    edits = attributes.propose(trial, prediction.changed, sizes)
    others = attributes.propose(trial, prediction.changed, sizes, backwards=True)
    attributes.apply(trial, edits)
    return trial, edits, others if others != edits else []


def put(model: nn.Module, names: list[str], tensor: torch.Tensor, like: torch.Tensor) -> None:
    """Put `tensor` where the state names say, one object under all of them."""
    value = nn.Parameter(tensor, requires_grad=like.requires_grad) if isinstance(like, nn.Parameter) else tensor
    for name in names:
        path, _, leaf = name.rpartition(".")
        owner = model.get_submodule(path)
        if leaf in owner._parameters or leaf in owner._buffers:
            setattr(owner, leaf, value)


def _refused(trial: nn.Module, graph: Graph, keep: dict[Axis, np.ndarray], predicted: tuple[nn.Module, list], values: bool) -> str:
    """Why the cut module is not what the graph predicts (the module and its op log); '' where it is."""
    args, kwargs = graph.capture.program.example_inputs
    try:
        log = op_log(trial, args, kwargs)
    except Exception as error:  # any error of the user's forward means that its numbers do not fit
        lines = str(error).strip().splitlines() or [type(error).__name__]
        return f"forward() does not fit the cut sizes ({lines[0][:200]})"
    why = first_difference(log, predicted[1])
    if why and _captured_differently(trial, graph, keep):  # otherwise forward() only takes another path while it is captured
        return "" if _same_work(trial, predicted[0], args, kwargs) else why
    if values and not same_values(trial, predicted[0], args, kwargs):
        return "the module's output differs from that of the predicted graph"
    return ""


def _same_work(trial: nn.Module, predicted: nn.Module, args: tuple, kwargs: dict) -> bool:
    """Whether a class that runs other ops than the graph gives the same values for as many multiply-accumulates: with one unit left
    it may pass over what it no longer needs (queries that share a key head are repeated once). A meta model has no values to tell."""
    if any(p.device.type == "meta" for p in trial.parameters()):
        return False
    return same_values(trial, predicted, args, kwargs) and count(trial, args, kwargs).macs == count(predicted, args, kwargs).macs


def same_values(trial: nn.Module, predicted: nn.Module, args: tuple, kwargs: dict) -> bool:
    """Whether two modules give the same outputs in float64, to `SAME` of the largest; on noise too, where inputs are all alike and the graph
    takes it."""

    def same(args: tuple, kwargs: dict) -> bool:
        got, wanted = (tree_leaves(outputs_in_float64(m, args, kwargs)) for m in (trial, predicted))
        pairs = [(a, b) for a, b in zip(got, wanted, strict=True) if isinstance(a, torch.Tensor)]
        return all(a.device.type == "meta" or apart(a, b) <= SAME for a, b in pairs)

    noise = lively((args, kwargs))
    if noise is not None:
        try:
            outputs_in_float64(predicted, *noise)
        except Exception:  # such as numbers that become an index
            noise = None
    return same(args, kwargs) and (noise is None or same(*noise))


def _needed(trial: nn.Module, edits: list[Edit], graph: Graph, predicted: nn.Module) -> tuple[list[Edit], list[Edit]]:
    """Edits without those that make no difference, and these: a number that happens to equal a width (a longest length, a
    limit) must keep its value. Those of standard layers stay; the others are taken back one attribute name at a time."""
    args, kwargs = graph.capture.program.example_inputs
    wanted = op_log(trial, args, kwargs)  # the graph's, or that of other ops which do the same
    custom: dict[tuple[type, str], list[Edit]] = {}
    needless: list[Edit] = []
    for e in edits:
        owner = trial.get_submodule(e.module)
        if attributes.standard(owner, []) is None:
            custom.setdefault((type(owner), e.attribute), []).append(e)
    for same in custom.values():
        back = [replace(e, old=e.new, new=e.old) for e in same]
        attributes.apply(trial, back)
        try:
            unchanged = op_log(trial, args, kwargs) == wanted and same_values(trial, predicted, args, kwargs)
        except Exception:  # whatever it raises, the number is needed
            unchanged = False
        if unchanged and not _captures(trial, graph):  # forward() may take another path under torch.export, which reads the number
            attributes.apply(trial, same)
            unchanged = not _captures(trial, graph)
            attributes.apply(trial, back)
        if unchanged:
            needless += same
        else:
            attributes.apply(trial, same)
    return [e for e in edits if e not in needless], needless


def _captures(trial: nn.Module, graph: Graph) -> bool:
    args, kwargs = graph.capture.program.example_inputs
    try:
        capture(trial, args, kwargs)
    except CaptureError:
        return False
    return True


def _captured_differently(trial: nn.Module, graph: Graph, keep: dict[Axis, np.ndarray]) -> str:
    """Capture the cut module again and compare op by op with the prediction; '' where they agree."""
    args, kwargs = graph.capture.program.example_inputs
    try:
        again = capture(trial, args, kwargs).graph
    except CaptureError as error:
        return str(error)
    mine, theirs = ([n for n in g.nodes if n.op == "call_function" and n.name] for g in (again, graph.capture.graph))
    mine, theirs = ([n for n in nodes if op_name(n) != "_assert_tensor_metadata"] for nodes in (mine, theirs))
    if len(mine) != len(theirs):
        return f"{len(mine)} ops instead of {len(theirs)}"
    for a, b in zip(mine, theirs, strict=True):
        dims, value = graph.env.get(b), a.meta.get("val")
        if op_name(a) != op_name(b):
            return f"{op_name(a)} instead of {op_name(b)}"
        if isinstance(dims, tuple) and isinstance(value, torch.Tensor) and shape_of(value) != new_shape(dims, keep):
            return f"{op_name(a)} gives {shape_of(value)} instead of {new_shape(dims, keep)}"
    return ""
