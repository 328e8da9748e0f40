"""Single weights become zero, in a pattern, and those that stay make up for them.

`sparsify()` finds masks and weights layer by layer; `mask()` carries out a plan that is already there. Both hand back a copy
of the model with zeros in it, of the same shapes.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import Any

import torch
from torch import Tensor, nn

from secateur.errors import CutError, InputError, PlanError
from secateur.masks import (
    LayerMask,
    Means,
    Selection,
    find,
    mask_alone,
    mean_squares,
    permuted,
    searched,
    select,
    solved,
    spread,
    wrong_zeros,
)
from secateur.measure.checks import check
from secateur.measure.count import count
from secateur.measure.proof import require
from secateur.mend import Progress, Result, agreed, study_of
from secateur.pattern import FREE, NM, Pattern, share_of, written
from secateur.plan import Plan
from secateur.processes import Shared, of
from secateur.repair import changed, proven, put_into
from secateur.repair.layers import find_layers
from secateur.repair.study import Study
from secateur.surgery import Cut
from secateur.surgery.cut import state_of
from secateur.surgery.oplog import reads
from secateur.trace import Graph, trace
from secateur.trace.tracer import patterns


@dataclass(frozen=True)
class Sparse:
    """How single weights are pruned.

    Attributes:
        keep: the share that stays of the weights of all layers that are made sparse, "10%" or 0.1; None with an N:M pattern.
        by: a method (`secateur.masks.METHODS`). "auto": alps with data, else magnitude.
        pattern: `Free()`, `NM(2, of=4)`, `Block(4, 1)` or `Kernels()`.
        budget: how much of each layer stays: a name of `secateur.masks.BUDGETS`, "search" (the output decides; needs data), or
            {weight: share}.
        refit: fit the weights that stay, once a layer's mask is known.
        corrected: aim at the dense network's values at the next addition, so that a layer makes up for those before it.
        ignore: names or patterns of modules or weights that stay dense.
        seed: of the rows that are sampled.
        permute: with an N:M pattern, put units in an order in which it loses less (`secateur.masks.permute`); costs no op.
    """

    keep: str | float | Fraction | None = None
    by: str = "auto"
    pattern: Pattern = FREE
    budget: str | Mapping[str, Fraction] = "uniform"
    refit: bool = True
    corrected: bool = True
    ignore: Sequence[str] = ()
    seed: int = 0
    permute: bool = False

    def share(self) -> Fraction:
        """
        Raises:
            InputError: no share is given, or one beside an N:M pattern, or it is none.
        """
        found = share_of(self.keep, self.pattern, "10%")
        if self.permute and not isinstance(self.pattern, NM):
            raise InputError(f"permute=True beside the pattern {self.pattern}, for which the order of inputs is not searched.\n"
                             "  Leave permute out, or use an N:M pattern.")  # fmt: skip
        return found


def sparsify(
    model: nn.Module, args: tuple, how: Sparse, data: Iterable[Any] | None = None, *,
    kwargs: Mapping[str, Any] | None = None, progress: Progress | None = None, study: Study | None = None,
) -> Result:  # fmt: skip
    """Make single weights of linear layers and convolutions zero. `model` is never changed.

    Args:
        model: a trained module. args, kwargs: example inputs, as it is called.
        how: what stays, in which pattern, by which method.
        data: batches of inputs, without labels (see `prune`); without it only magnitudes can be looked at. Processes may share it
            (`secateur.processes.Shared`).
        progress: called with the name of each stage as it starts.
        study: of this very model, these inputs and this data, from an earlier `Result`: its trace and its rows are taken.

    Returns a `Result`: `model` of the same shapes, `plan.weights` the masks, `masks` what became of each layer.

    Raises:
        InputError, ModelError, CaptureError, DataError, PlanError, ProofError, ProcessError: nothing was changed.
    """
    say = progress or (lambda stage: None)
    how.share()
    by = ("alps" if data is not None else "magnitude") if how.by == "auto" else how.by
    method = find(by)
    if method.needs != "weights" and data is None:
        raise InputError(f"by={by!r} needs calibration data.\n  Pass data=, batches of inputs; no labels are needed. by='magnitude' does without.")
    if how.budget == "search" and data is None and not isinstance(how.pattern, NM):
        raise InputError("budget='search' compares outputs on data.\n  Pass data=, batches of inputs without labels, or use budget='erk'.")
    with of(data).watched():
        return agreed(_sparse(model, (args, dict(kwargs or {})), replace(how, by=by), (data, study), say), of(data))


def _sparse(
    model: nn.Module, inputs: tuple[tuple, dict[str, Any]], how: Sparse, given: tuple[Iterable[Any] | None, Study | None], say: Progress
) -> Result:
    (args, kwargs), (data, study) = inputs, given
    method, keep = find(how.by), how.share()
    check(model, args, kwargs)
    look = _looked_at(model, (args, kwargs), how, data, say, study)
    if how.permute:
        look = _reordered(look, (args, kwargs), how, say)
    dense, model, graph, chosen, study = model, look.model, look.graph, look.chosen, look.study
    asked = spread(chosen, state_of(model), how.pattern, keep, *_budget(look, how, keep, say))
    why = {"score": how.by, "pattern": written(how.pattern), "budget": how.budget if isinstance(how.budget, str) else "given", "seed": how.seed,
           "keep": str(float(keep)), "refit": how.refit and data is not None, "corrected": how.corrected,
           **({"permuted": True} if look.model is not dense else {})}  # fmt: skip
    plan = Plan(_everything(graph), graph.cost(), graph.cost(), why)
    if study is None:
        weights = {n: mask_alone(chosen.layers[n], state_of(model)[n], one) for n, one in asked.items()}
        new = {n: _masked(state_of(model)[n], m) for n, m in weights.items()}
        rows = [LayerMask(chosen.layers[n].name, tuple(m.shape), int(m.sum()), str(how.pattern)) for n, m in weights.items()]
        return _result(model, graph, new, _with(plan, weights, chosen, how.pattern), rows, look.notes)
    network = solved(study, asked, Means(method.function, how.refit, how.corrected), how.seed, say)
    plan = replace(_with(plan, {n: network.stays[n] for n in asked}, chosen, how.pattern), why={**why, "calibration_rows": study.chunks.rows})
    rows = [row for row in network.masks_of if row.layer in {chosen.layers[n].name for n in asked}]
    result = _result(model, graph, changed(model, graph, network.state), plan, rows, [*look.notes, *too_little(rows, chosen, study.state)])
    return replace(result, study=study)


@dataclass(frozen=True)
class _Look:
    """A traced model, the layers to be made sparse, and, where there is data, its statistics."""

    model: nn.Module
    graph: Graph
    chosen: Selection
    study: Study | None
    notes: list[str]


def _looked_at(
    model: nn.Module, inputs: tuple[tuple, dict[str, Any]], how: Sparse, data: Iterable[Any] | None, say: Progress, study: Study | None = None
) -> _Look:
    ignore = patterns(how.ignore)
    if study is None or study.data is not data or study.model is not model or study.graph.ignored != ignore:
        say("trace")
        graph = trace(model, *inputs, ignore=ignore)
        study = study_of(model, graph, data, how.seed, say) if data is not None else None
    else:
        graph = study.graph
    chosen = select(graph, state_of(model), how.pattern)
    return _Look(model, graph, chosen, study, chosen.notes())


def _reordered(look: _Look, inputs: tuple[tuple, dict[str, Any]], how: Sparse, say: Progress) -> _Look:
    """The same of a copy with its units in another order."""
    assert isinstance(how.pattern, NM)  # `Sparse.share` sees to it
    say("reorder")
    squares = mean_squares(look.study, look.chosen.layers) if look.study is not None else {}
    feeds = look.study.chunks.feeds if look.study is not None else []
    model, said = permuted(look.model, look.graph, look.chosen, squares, how.pattern, how.seed, feeds[:1])
    if model is look.model:
        return replace(look, notes=[*look.notes, said])
    data: Any = [args or named for args, named in feeds] or None  # which may be read only once; flags are those of the inputs again
    if look.study is not None and look.study.processes.world > 1:
        data = Shared(data, look.study.processes)
    again = _looked_at(model, inputs, how, data, say)
    return replace(again, notes=[*again.notes, f"{said}; the plan is for that order, in which result.dense is too"])


def _budget(look: _Look, how: Sparse, keep: Fraction, say: Progress) -> tuple[str | Mapping[str, Fraction], Mapping[str, Tensor] | None]:
    """How much of each layer stays, or the name of the rule with what it has to know of the inputs."""
    if how.budget == "search" and look.study is not None and not isinstance(how.pattern, NM):
        return searched(look.study, look.chosen, how.pattern, keep, how.seed, say), None
    return how.budget, mean_squares(look.study, look.chosen.layers) if look.study is not None and how.budget == "owl" else None


def mask(model: nn.Module, args: tuple, plan: Plan, kwargs: Mapping[str, Any] | None = None) -> Result:
    """The model with the zeros of `plan.weights`; `mend(result, data)` then fits the weights that stay.

    Raises:
        PlanError: the plan has no weights, or is for other shapes. Nothing was changed.
    """
    kwargs, state = dict(kwargs or {}), state_of(model)
    check(model, args, kwargs)
    if not plan.weights:
        raise PlanError("this plan names no single weights.\n  cut() carries it out; plans of weights come from sparsify(), or Plan(..., weights=).")
    if plan.removed:
        raise PlanError(f"this plan removes units too ({next(iter(plan.removed))!r}).\n  Cut first, then mask what that leaves.")
    for name, stays in plan.weights.items():
        if name not in state or state[name].shape != stays.shape:
            have = tuple(state[name].shape) if name in state else "missing"
            raise PlanError(f"weight {name!r} is {have} in this model and {tuple(stays.shape)} in the plan.\n  Pass the model that it was made for.")
    graph = trace(model, args, kwargs)
    layers = {x.weight: x.why_not for x in find_layers(graph)}
    for name in plan.weights:
        if layers.get(name, "it is no weight of a linear layer or convolution under this name"):
            why = layers.get(name) or "it is no weight of a linear layer or convolution under this name"
            raise PlanError(f"weight {name!r} cannot be masked: {why}.\n  Leave it out of the plan.")
    new = {n: _masked(state[n], m) for n, m in plan.weights.items()}
    rows = [LayerMask(n.removesuffix(".weight"), tuple(m.shape), int(m.sum()), plan.patterns.get(n, "free")) for n, m in plan.weights.items()]
    reordered = ["this plan was made with permute=True: it is for the model in that order, result.dense"] if plan.why.get("permuted") else []
    return _result(model, graph, new, plan, rows, reordered)


def _result(model: nn.Module, graph: Graph, new: Mapping[str, Tensor], plan: Plan, rows: list[LayerMask], notes: list[str]) -> Result:
    """A copy of the model with the tensors `new`, proven."""
    try:
        made = copy.deepcopy(model).eval()
    except Exception as error:  # whatever a user's __deepcopy__ raises
        raise CutError(f"{type(model).__name__} cannot be copied: {error}.\n  Nothing was changed. Make it copy.deepcopy-able.") from error
    if reads(made, state_of(model).values(), *graph.program.example_inputs):
        raise CutError(f"{type(model).__name__} calls a function kept as an attribute, which goes on with the tensors of the original in a copy.\n"
                       "  Nothing was changed. Make it a method, or a module of its own.")  # fmt: skip
    put_into(made, graph, plan.keep, new)
    proof = proven(model, graph, plan.keep, made, new)
    require(proof, f"{type(model).__name__}, masked")
    if wrong := wrong_zeros(state_of(made), plan.weights):
        raise CutError(f"{wrong[0]}.\n  Nothing was changed. This is a fault of secateur: please report the model.")
    cost = count(model, *graph.program.example_inputs)
    total = sum(p.numel() for p in model.parameters())
    sizes = sum(m.numel() for m in plan.weights.values())
    kept = sum(int(m.sum()) for m in plan.weights.values())
    why = {**plan.why, "kept": kept, "of_weights": sizes, "of_parameters": total}
    asked = plan.why.get("keep")
    if asked is not None and kept > math.ceil(float(asked) * sizes) + sum(row.dense for row in rows):
        notes = [*notes, f"{kept:,} of {sizes:,} weights stay, more than {float(asked):.0%}: one at least of every layer, row or filter does"]
    return Result(made, replace(plan, why=why), proof, cost, cost, graph, Cut(made, "attributes", "", [], {}, made), list(notes), model, masks=rows)


def too_little(rows: Sequence[LayerMask], chosen: Selection, state: Mapping[str, Tensor]) -> list[str]:
    """What is to be said where there are fewer calibration rows than inputs: then masks follow chance."""
    inputs = {x.name: int(x.matrix(state[x.weight]).shape[2]) for x in chosen.layers.values()}
    few = [row for row in rows if row.rows < inputs[row.layer]]
    if not few:
        return []
    worst = min(few, key=lambda row: row.rows / inputs[row.layer])
    said = f"{worst.layer}: {worst.rows} rows, {inputs[worst.layer]} inputs"
    return [f"too little data: {len(few)} layers saw fewer rows than they have inputs ({said}), so their masks follow chance; give more"]


def _everything(graph: Graph) -> dict[str, Tensor]:
    return {n: torch.ones(g.size, dtype=torch.bool) for n, g in graph.groups.items()}


def _with(plan: Plan, weights: Mapping[str, Tensor], chosen: Selection, pattern: Pattern) -> Plan:
    return replace(plan, weights=weights, patterns={n: written(pattern, chosen.layers[n].transposed, chosen.layers[n].groups) for n in weights})


def _masked(weight: Tensor, stays: Tensor) -> Tensor:
    zero = torch.zeros((), dtype=weight.dtype, device=weight.device)
    return torch.where(stays.to(weight.device), weight.detach(), zero) + zero  # of -0 and 0 this makes 0
