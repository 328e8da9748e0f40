"""`prune()`: the stages in order, and nothing else."""

from __future__ import annotations

import platform
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_leaves

from secateur import budget
from secateur import score as criteria
from secateur.budget import MeasuredTarget, Target
from secateur.calibrate import Calibration
from secateur.calibrate import batches as batches
from secateur.calibrate.loss import Loss
from secateur.errors import CaptureError, InputError, ModelError, TargetError
from secateur.measure.count import count
from secateur.measure.proof import Proof, prove, require
from secateur.measure.run import at_rest, forward, shapes
from secateur.plan import Cost, Plan
from secateur.reach import Options as Search
from secateur.reach import achieved, measured_again, within
from secateur.repair import batch_norm_statistics
from secateur.surgery import Cut, cut
from secateur.surgery.optimizer import migrate
from secateur.trace import Graph, analyse, parts, trace
from secateur.trace.tracer import patterns

Progress = Callable[[str], None]


@dataclass
class Result:
    """What `prune` hands back.

    Attributes:
        model: the smaller model, in eval mode; an ordinary `nn.Module`.
        plan: who stayed, and why.
        proof: how far the cut model is from the masked original, before any repair.
        before, after: cost counted on the dense and on the cut model.
        graph: the trace of the dense model.
        cut: how the cut was made.
        notes: what the user should know (ops without a rule, a graph handed back, ...).
    """

    model: nn.Module
    plan: Plan
    proof: Proof
    before: Cost
    after: Cost
    graph: Graph
    cut: Cut
    notes: list[str] = field(default_factory=list)
    dense: nn.Module | None = field(default=None, repr=False)

    def migrate(self, optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
        """An optimizer of the same class for the cut model: same settings, its state (momentum ...) cut alike."""
        if self.dense is None:
            raise InputError("this result was loaded from a folder: the dense model that the optimizer belongs to is not known.")
        return migrate(optimizer, self.dense, self.model, self.cut)


def prune(
    model: nn.Module,
    args: tuple,
    *targets: Target | MeasuredTarget,
    data: Iterable[Any] | None = None,
    score: str | Callable | Mapping[str, torch.Tensor] = "l2",
    allocation: str = "global",
    ignore: Sequence[str] = (),
    seed: int = 0,
    kwargs: Mapping[str, Any] | None = None,
    depth: bool = False,
    loss: Loss | None = None,
    progress: Progress | None = None,
) -> Result:
    """Trace, score, plan, cut, prove, and re-estimate BatchNorm where data is given. `model` is never changed.

    Args:
        model: a trained module.
        args, kwargs: example inputs, as the model is called. MACs are those of this call. A batch of two or more keeps the
            batch size free where the result is a rewritten graph.
        targets: `MACs`, `Params`, `Bytes`, and what is measured on real cuts: `Latency`, `PeakMemory`; all are met.
        data: batches (a tensor, `(inputs, labels)`, or a dict of keyword inputs) for BatchNorm statistics, and for criteria that
            need data: then something that can be read more than once.
        score: the name of a criterion (`score.CRITERIA`), a function `(graph, model, seed)`, or {group: numbers}.
        allocation: "global" or "uniform".
        ignore: names or patterns of modules, parameters or groups that keep their shape.
        depth: whole residual blocks may go too, in the same ranking. The result is then a rewritten graph.
        loss: `loss(outputs, batch)` -> scalar tensor, for criteria that need gradients; by default what the model returns as
            `.loss`, else cross entropy with the labels.
        progress: called with the name of each stage as it starts.

    Raises:
        CaptureError, InputError, ModelError, DataError, TargetError, CutError, ProofError: see `secateur.errors`; in every
            case nothing was changed.
    """
    say = progress or (lambda stage: None)
    if not isinstance(kwargs or {}, Mapping):
        raise InputError(f"kwargs is a {type(kwargs).__name__}.\n  Pass a dict of keyword inputs.")
    kwargs, ignore = dict(kwargs or {}), patterns(ignore)
    check(model, args, kwargs)
    say("trace")
    graph = _traced(model, args, kwargs, ignore)
    statistics = None if data is None else lambda graph: Calibration(model, graph, data, args=args, kwargs=kwargs, loss=loss, seed=seed)
    ask = _Asked(model, score, seed, targets, allocation, depth, say, statistics)
    plan, done, proof = ask.carry_out(graph)
    if done.how == "graph" and not graph.removed_blocks(plan.keep):
        graph, plan, done, proof = ask.with_class(graph, ignore) or (graph, plan, done, proof)
    if not proof.passed and _is_random(model, args, kwargs):
        raise InputError(
            f"{type(model).__name__} gives two outputs for one input (dropout that is always on, or noise), so nothing can be proven.\n"
            "  Make forward() deterministic in eval mode."
        )
    require(proof, type(model).__name__)
    if data is not None:
        say("repair")
        batch_norm_statistics(done.model, batches(data, args))
    before, after = count(model, args, kwargs), count(done.model, args, kwargs)
    notes = list(dict.fromkeys([*graph.notes, *done.notes]))
    if done.how == "graph":
        notes.insert(0, f"handed back as a rewritten graph, because the class could not follow: {done.why}")
    if proof.all_zero:
        notes.append("every output is 0 on these inputs (a zero-initialised last layer?), so the proof compared zeros")
    _kept_promise(targets, before, after)
    plan = replace(plan, why={**plan.why, "achieved": achieved(targets, before, after, plan)})
    if after != plan.after:
        notes.append(f"the plan predicted {plan.after}, the cut model counts {after}: an op without a rule takes part")
    return Result(done.model, plan, proof, before, after, graph, done, notes, model)


def _is_random(model: nn.Module, args: tuple, kwargs: Mapping[str, Any]) -> bool:
    with at_rest(model):
        a, b = (tree_leaves(forward(model, args, kwargs)) for _ in range(2))
    return not all(torch.equal(x.nan_to_num(), y.nan_to_num()) for x, y in zip(a, b, strict=True) if isinstance(x, torch.Tensor))


def _kept_promise(targets: Sequence[Target | MeasuredTarget], before: Cost, after: Cost) -> None:
    """Of what is counted; what is measured was held against its budget where it was measured."""
    for t in targets:
        if isinstance(t, MeasuredTarget):
            continue
        limit, have = t.limit(before), getattr(after, t.figure)
        if have > limit:
            raise TargetError(
                f"{t} = {limit:,} {t.figure}, and the cut model counts {have:,}: ops without a rule cost what no plan can see.\n"
                f"  `trace(...).notes` names them; ask for {100 * (2 * limit - have) / max(1, getattr(before, t.figure)):.0f}% to make up for it."
            )


@dataclass
class _Asked:
    """What was asked of one model, so that it can be tried on more than one trace of it."""

    model: nn.Module
    score: Any
    seed: int
    targets: tuple[Target | MeasuredTarget, ...]
    allocation: str
    depth: bool
    say: Progress
    statistics: Callable[[Graph], Calibration] | None = None

    def carry_out(self, graph: Graph) -> tuple[Plan, Cut, Proof]:
        self.say("score")
        scores = criteria.score(graph, self.model, self.score, self.seed, self.statistics(graph) if self.statistics else None)
        if self.depth:
            scores = {**scores, **criteria.blocks(graph, self.model)}
        self.say("plan")
        planner = partial(budget.plan, graph, scores, allocation=self.allocation)
        plan = within(self.model, graph, self.targets, planner, scores, Search(say=self.say))
        plan = _explained(plan, self.score, self.seed)
        self.say("cut")
        done = cut(self.model, graph, plan, values=False)  # the proof below compares values
        self.say("prove")
        proof = prove(self.model, graph, plan.keep, done.model)
        if not proof.passed and done.how == "attributes":  # a number of forward() that no shape shows, such as sqrt(width)
            done = cut(self.model, graph, plan, refuse_class=f"its forward() deviates by {proof.max_error:.1e} after the cut")
            proof = prove(self.model, graph, plan.keep, done.model)
            plan = measured_again(plan, done.model, self.targets, self.model, graph)
        return plan, done, proof

    def with_class(self, graph: Graph, ignore: Sequence[str]) -> tuple[Graph, Plan, Cut, Proof] | None:
        """The same with ties that let the user's class follow; None where that does not help or the budget is then out
        of reach."""
        tied = analyse(graph.capture, self.model, ignore, for_class=True)
        if {n: g.size for n, g in tied.groups.items()} == {n: g.size for n, g in graph.groups.items()}:
            return None
        try:
            plan, done, proof = self.carry_out(tied)
        except (TargetError, InputError):  # scores given by hand are for the groups of the free trace
            return None
        return (tied, plan, done, proof) if done.how == "attributes" and proof.passed else None


def _traced(model: nn.Module, args: tuple, kwargs: Mapping[str, Any], ignore: Sequence[str]) -> Graph:
    try:
        return trace(model, args, kwargs, ignore=ignore)
    except CaptureError as error:
        names = [repr(p.name) for p in parts(model, args, kwargs)]
        if not names:
            raise
        raise CaptureError(
            f"{error}\n  Parts that can be captured: {', '.join(names[:8])}{' ...' if len(names) > 8 else ''}. "
            "`sc.parts` hands each of them out with its inputs, to be pruned and put back."
        ) from error


def check(model: nn.Module, args: tuple, kwargs: Mapping[str, Any]) -> None:
    """Refuse what could only fail later and worse: inputs that do not run, weights that are not finite.

    Raises:
        InputError: `args` is no tuple, the model does not run on the inputs.
        ModelError: no parameters, NaN or infinite parameters, or parameters on the meta device.
    """
    if not isinstance(model, nn.Module):
        raise InputError(f"model is a {type(model).__name__}, not a torch.nn.Module.\n  Pass the module itself.")
    if not isinstance(args, (tuple, list)):
        raise InputError(f"args is a {type(args).__name__}; it holds the positional inputs.\n  Pass a tuple: prune(model, (x,), ...).")
    if isinstance(model, torch.jit.ScriptModule):
        raise ModelError(f"{type(model).__name__} is TorchScript, which torch.export does not capture.\n  Pass the Python module it was made from.")
    parameters = dict(model.named_parameters())
    if not parameters:
        raise ModelError(f"{type(model).__name__} has no parameters, so there is nothing to prune.")
    for name, p in parameters.items():
        if isinstance(p, nn.parameter.UninitializedParameter):
            raise ModelError(f"parameter {name!r} of a lazy module has no shape yet.\n  Run the model once on the example inputs first.")
        if p.device.type == "meta":
            raise ModelError(f"parameter {name!r} is on the meta device and has no values.\n  Load the weights; `trace` and `plan` work without.")
        if not bool(torch.isfinite(p).all()):
            bad = int((~torch.isfinite(p)).sum())
            raise ModelError(f"parameter {name!r} holds {bad} values of {p.numel()} that are NaN or infinite.\n  Load sound weights first.")
    for name, b in model.named_buffers():
        if b.is_floating_point() and bool(torch.isnan(b).any()):
            raise ModelError(f"buffer {name!r} holds {int(torch.isnan(b).sum())} values of {b.numel()} that are NaN.\n  Load sound weights first.")
    device = next(iter(parameters.values())).device
    for leaf in tree_leaves((tuple(args), dict(kwargs))):
        if not isinstance(leaf, torch.Tensor):
            continue
        if leaf.device != device:
            raise InputError(f"an input of {shapes(tuple(args), kwargs)} is on {leaf.device}, the model on {device}.\n  Move one to the other.")
        if leaf.is_floating_point() and bool(torch.isnan(leaf).any()):
            raise InputError(f"an input of {shapes(tuple(args), kwargs)} holds NaN.\n  Pass sound example inputs; the proof runs on them.")
    with at_rest(model):
        forward(model, tuple(args), kwargs)


def _explained(plan: Plan, score: Any, seed: int) -> Plan:
    from secateur import __version__

    name = score if isinstance(score, str) else getattr(score, "__name__", "given")
    versions = {"secateur": __version__, "torch": torch.__version__, "python": platform.python_version()}
    return replace(plan, why={**plan.why, "score": name, "seed": seed, "versions": versions})
