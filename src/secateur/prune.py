"""`prune()`: the stages in order, and nothing else."""

from __future__ import annotations

import platform
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_leaves

from secateur import budget
from secateur import score as criteria
from secateur.budget import MeasuredTarget, Target
from secateur.calibrate import Calibration, many_times
from secateur.calibrate import batches as batches
from secateur.calibrate.loss import Loss
from secateur.errors import CaptureError, InputError, TargetError
from secateur.measure.checks import check as check
from secateur.measure.count import count
from secateur.measure.proof import Proof, prove, require
from secateur.measure.run import at_rest, forward
from secateur.mend import Progress, Result, mend, study_of
from secateur.plan import Cost, Plan
from secateur.processes import of
from secateur.reach import Options as Search
from secateur.reach import achieved, measured_again, within
from secateur.repair import HOW, Study
from secateur.repair.study import BY_CURVES
from secateur.surgery import Cut, cut
from secateur.trace import Graph, analyse, parts, trace
from secateur.trace.only import named
from secateur.trace.tracer import patterns


def prune(
    model: nn.Module,
    args: tuple,
    *targets: Target | MeasuredTarget,
    data: Iterable[Any] | None = None,
    score: str | Callable | Mapping[str, torch.Tensor] = "auto",
    allocation: str = "auto",
    repair: str = "auto",
    ignore: Sequence[str] = (),
    seed: int = 0,
    kwargs: Mapping[str, Any] | None = None,
    depth: bool = False,
    loss: Loss | None = None,
    progress: Progress | None = None,
    only: Sequence[str] = (),
) -> Result:
    """Trace, score, plan, cut, prove, and repair where data is given. `model` is never changed.

    Args:
        model: a trained module.
        args, kwargs: example inputs, as the model is called. MACs are those of this call. A batch of two or more keeps the
            batch size free where the result is a rewritten graph.
        targets: `MACs`, `Params`, `Bytes`, and what is measured on real cuts: `Latency`, `PeakMemory`; all are met.
        data: batches (a tensor, `(inputs, labels)`, or a dict of keyword inputs); something that can be read more than once.
            At most 2,048 rows are used for the repair, fewer where their activations would take more than about 4 GiB.
            `secateur.processes.Shared(batches)`: several processes run a share each, and have the same result.
        score: "obs" (the reconstruction error that a unit's removal causes; the default with data), the name of a criterion
            (`score.CRITERIA`; without data "l2"), a function `(graph, model, seed)`, or {group: numbers}.
        allocation: "search" (the default with "obs": the budget is spent where error rises least, early errors weighed in two ways and
            residual streams free or whole, the best by the output kept), "curves" (one way), "sensitivity" (weighed by the
            output group by group), "global" or "uniform".
        repair: "gauss_newton" (the default with data: every layer is fitted anew to the dense network, then every residual branch
            as a whole, all by least squares without labels), "least_squares" (layers alone: no derivatives, quicker),
            "bias" (biases only), "batch_norm" (statistics, by the dense model) or "none".
        ignore: names or patterns of modules, parameters or groups that keep their shape.
        depth: whole residual blocks may go too, in the same ranking. The result is then a rewritten graph.
        loss: `loss(outputs, batch)` -> scalar tensor, for criteria that need gradients; by default what the model returns as
            `.loss`, else cross entropy with the labels.
        progress: called with the name of each stage as it starts.
        only: names or patterns of the groups that may lose units, or "neurons" (hidden units of linear layers); without it all may.

    Raises:
        CaptureError, InputError, ModelError, DataError, TargetError, CutError, ProofError, ProcessError: see `secateur.errors`; in
            every case nothing was changed.
    """
    score, allocation, repair = chosen(score, allocation, repair, data is not None)
    how = How(score, allocation, repair, seed, depth, loss, data, ignore, only)
    with of(data).watched():
        return begin(model, args, kwargs, how, progress).result(targets)


def begin(model: nn.Module, args: tuple, kwargs: Mapping[str, Any] | None, how: How, progress: Progress | None = None) -> Work:
    """Check and trace the model, for any number of budgets.

    Raises:
        CaptureError, InputError, ModelError: it cannot be pruned with these inputs.
    """
    say = progress or (lambda stage: None)
    if not isinstance(kwargs or {}, Mapping):
        raise InputError(f"kwargs is a {type(kwargs).__name__}.\n  Pass a dict of keyword inputs.")
    kwargs, ignore = dict(kwargs or {}), patterns(how.ignore)
    check(model, args, kwargs)
    say("trace")
    graph = _traced(model, args, kwargs, ignore)
    return Work(model, args, kwargs, replace(how, ignore=ignore, data=many_times(how.data)), say, graph).but(only=how.only)


def _is_random(model: nn.Module, args: tuple, kwargs: Mapping[str, Any]) -> bool:
    with at_rest(model):
        a, b = (tree_leaves(forward(model, args, kwargs)) for _ in range(2))
    return not all(torch.equal(x.nan_to_num(), y.nan_to_num()) for x, y in zip(a, b, strict=True) if isinstance(x, torch.Tensor))


def _not_arithmetic(rows: Sequence[Mapping[str, Any]], macs: float) -> list[str]:
    """What is to be said where a latency was only reached by a cut far deeper than the time it saved."""
    return [
        f"{row['target']}: {100 * row['ratio']:.0f} % of the time is left with {100 * macs:.1f} % of the multiply-accumulates, so most of the "
        "time is not spent on arithmetic, and pruning buys little here: use a larger batch, another runtime, or a looser budget"
        for row in rows
        if row["figure"] == "latency" and macs < row["ratio"] / 4
    ]


def _kept_promise(targets: Sequence[Target | MeasuredTarget], before: Cost, after: Cost) -> None:
    """Of what is counted; what is measured was held against its budget where it was measured."""
    for t in (t for t in targets if not isinstance(t, MeasuredTarget)):
        limit, have = t.limit(before), getattr(after, t.figure)
        if have > limit:
            raise TargetError(
                f"{t} = {limit:,} {t.figure}, and the cut model counts {have:,}: ops without a rule cost what no plan can see.\n"
                f"  `trace(...).notes` names them; ask for {100 * (2 * limit - have) / max(1, getattr(before, t.figure)):.0f}% to make up for it."
            )


def chosen(score: Any, allocation: str, repair: str, has_data: bool) -> tuple[Any, str, str]:
    """What "auto" means.

    Raises:
        InputError: an unknown word, or something that needs data where there is none.
    """
    score = "obs" if score is criteria.CRITERIA["obs"] else score
    known = isinstance(score, str) and score == "auto"
    score = ("obs" if has_data else "l2") if known else score
    by_curves = isinstance(score, str) and score == "obs"
    allocation = ("search" if by_curves else "global") if allocation == "auto" else allocation
    repair = ("gauss_newton" if has_data else "none") if repair == "auto" else repair
    if repair not in HOW:
        raise InputError(f"unknown repair {repair!r}.\n  There are: auto, {', '.join(HOW)}.")
    if not has_data and (by_curves or repair != "none"):
        asked = "score='obs'" if by_curves else f"repair={repair!r}"
        raise InputError(f"{asked} needs calibration data.\n  Pass data=, batches of inputs; no labels are needed.")
    if allocation in BY_CURVES and not by_curves:
        raise InputError(
            f"allocation={allocation!r} needs the error curves of score='obs', and the score is {score!r}.\n"
            "  Use allocation='global' or 'uniform'."
        )
    return score, allocation, repair


@dataclass(frozen=True)
class How:
    """How to choose what goes, as `prune` takes it; nothing here is "auto" any more."""

    score: Any
    allocation: str
    repair: str
    seed: int = 0
    depth: bool = False
    loss: Loss | None = None
    data: Iterable[Any] | None = None
    ignore: Sequence[str] = ()
    only: Sequence[str] = ()


@dataclass(frozen=True)
class _Planner:
    """Scores of one trace, and plans for any budget from them."""

    plan: Callable[..., Plan]
    scores: dict[str, torch.Tensor]
    study: Study | None = None


@dataclass(frozen=True)
class _Done:
    graph: Graph
    plan: Plan
    cut: Cut
    proof: Proof
    study: Study | None


@dataclass
class Work:
    """A model under `prune`: its trace, and scores and statistics that are computed once for any number of budgets."""

    model: nn.Module
    args: tuple
    kwargs: Mapping[str, Any]
    how: How
    say: Progress
    graph: Graph
    planners: dict[int, _Planner] = field(default_factory=dict, repr=False)  # by the id of a trace that lives as long
    studies: dict[int, Study] = field(default_factory=dict, repr=False)  # likewise

    def but(self, only: Sequence[str] = (), depth: bool = False) -> Work:
        """The same with other groups that may lose units, from the same trace and statistics. Raises InputError where `only` names none."""
        if only := patterns(only):
            named(self.graph, only)
        return replace(self, how=replace(self.how, only=only, depth=depth or self.how.depth), planners={})

    def study(self, graph: Graph) -> Study:
        """Statistics of the dense model on the data, computed as they are asked for."""
        if id(graph) not in self.studies:
            assert self.how.data is not None
            self.studies[id(graph)] = study_of(self.model, graph, self.how.data, self.how.seed, say=self.say)
        return self.studies[id(graph)]

    def result(self, targets: Sequence[Target | MeasuredTarget]) -> Result:
        """Plan, cut, prove and repair for these targets.

        Raises:
            InputError, TargetError, CutError, ProofError, DataError: as `prune`.
        """
        sensible(targets, self.graph)
        done = self._carry_out(self.graph, targets)
        if done.cut.how == "graph" and not self.graph.removed_blocks(done.plan.keep):
            done = self._with_class(targets) or done
        if not done.proof.passed and _is_random(self.model, self.args, self.kwargs):
            raise InputError(
                f"{type(self.model).__name__} gives two outputs for one input (dropout that is always on, or noise), so nothing can be proven.\n"
                "  Make forward() deterministic in eval mode."
            )
        require(done.proof, type(self.model).__name__)
        result = self._told(done, targets)
        return mend(result, self.how.data, self.how.repair, say=self.say) if self.how.data is not None else result

    def _told(self, done: _Done, targets: Sequence[Target | MeasuredTarget]) -> Result:
        """The result with its real costs, and what is to be known about it."""
        before, after = count(self.model, self.args, self.kwargs), count(done.cut.model, self.args, self.kwargs)
        notes = list(dict.fromkeys([*done.graph.notes, *done.cut.notes]))
        if done.cut.how == "graph":
            notes.insert(0, f"handed back as a rewritten graph, because the class could not follow: {done.cut.why}")
        if self.how.depth and not done.graph.blocks:
            notes.append("depth: no residual block was found that may go as a whole, so none did")
        if done.proof.all_zero:
            notes.append("every output is 0 on these inputs (a zero-initialised last layer?), so the proof compared zeros")
        _kept_promise(targets, before, after)
        plan = replace(done.plan, why={**done.plan.why, "achieved": achieved(targets, before, after, done.plan)})
        notes += _not_arithmetic(plan.why["achieved"], after.macs / max(1, before.macs))
        if after != plan.after:
            notes.append(f"the plan predicted {plan.after}, the cut model counts {after} (an op without a rule, an index or a mere shape)")
        return Result(done.cut.model, plan, done.proof, before, after, done.graph, done.cut, notes, self.model, study=done.study)

    def _carry_out(self, graph: Graph, targets: Sequence[Target | MeasuredTarget]) -> _Done:
        planner = self._planner(graph)
        self.say("plan")
        plan = within(self.model, graph, targets, planner.plan, planner.scores, Search(say=self.say, processes=of(self.how.data)))
        plan = _explained(plan, self.how.score, self.how.seed)
        self.say("cut")
        done = cut(self.model, graph, plan, values=False)  # the proof below compares values
        self.say("prove")
        proof = prove(self.model, graph, plan.keep, done.model)
        if not proof.passed and done.how == "attributes":  # a number of forward() that no shape shows, such as sqrt(width)
            done = cut(self.model, graph, plan, refuse_class=f"its forward() deviates by {proof.max_error:.1e} after the cut")
            proof = prove(self.model, graph, plan.keep, done.model)
            plan = measured_again(plan, done.model, targets, self.model, graph, of(self.how.data))
        return _Done(graph, plan, done, proof, planner.study)

    def _planner(self, graph: Graph) -> _Planner:
        if id(graph) not in self.planners:
            self.say("score")
            self.planners[id(graph)] = self._by_curves(graph) if _is_obs(self.how.score) else self._by_scores(graph)
        return self.planners[id(graph)]

    def _by_scores(self, graph: Graph) -> _Planner:
        how = self.how
        statistics = None
        if how.data is not None:
            statistics = Calibration(self.model, graph, how.data, args=self.args, kwargs=self.kwargs, loss=how.loss, seed=how.seed)
        scores = criteria.score(graph, self.model, how.score, how.seed, statistics)
        if how.depth:
            scores = {**criteria.blocks(graph, self.model), **scores}
        scores = of(how.data).lent("scores", self._of_named(graph, scores))
        study = self.study(graph) if how.data is not None else None  # for the repair
        return _Planner(partial(budget.plan, graph, scores, allocation=how.allocation), scores, study)

    def _by_curves(self, graph: Graph) -> _Planner:
        how, study = self.how, self.study(graph)
        scores = self._of_named(graph, study.scores())
        if how.allocation in BY_CURVES:
            only = named(graph, how.only) if how.only else None
            return _Planner(partial(study.plan, allocation=how.allocation, depth=how.depth, only=only), scores, study)
        if how.depth:
            scores = self._of_named(graph, {**scores, **{name: curve.error[1:] for name, curve in study.blocks.items()}})
        return _Planner(partial(budget.plan, graph, scores, allocation=how.allocation), scores, study)

    def _of_named(self, graph: Graph, scores: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """The scores, infinite where `only` does not name the group."""
        if not self.how.only:
            return scores
        may = named(graph, self.how.only)
        return {n: s if n in may else torch.full_like(s, torch.inf) for n, s in scores.items() if n in may or n in graph.groups}

    @cached_property
    def tied(self) -> Graph:
        """The trace with ties that let the user's class follow a cut."""
        return analyse(self.graph.capture, self.model, self.how.ignore, for_class=True)

    def _with_class(self, targets: Sequence[Target | MeasuredTarget]) -> _Done | None:
        """The same on the tied trace; None where that does not help or the budget is then out of reach."""
        if {n: g.size for n, g in self.tied.groups.items()} == {n: g.size for n, g in self.graph.groups.items()}:
            return None
        try:
            done = self._carry_out(self.tied, targets)
        except (TargetError, InputError):  # scores given by hand are for the groups of the free trace
            return None
        return done if done.cut.how == "attributes" and done.proof.passed else None


def sensible(targets: Sequence[Target | MeasuredTarget], graph: Graph) -> None:
    """What is wrong with a target is said before anything is computed."""
    if not targets:
        raise InputError("no target was given.\n  Pass one, such as MACs(at_most='50%').")
    for t in targets:
        if isinstance(t, Target):
            t.limit(graph.cost())


def _is_obs(score: Any) -> bool:
    return isinstance(score, str) and score == "obs"


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


def _explained(plan: Plan, score: Any, seed: int) -> Plan:
    from secateur import __version__

    name = score if isinstance(score, str) else getattr(score, "__name__", "given")
    versions = {"secateur": __version__, "torch": torch.__version__, "python": platform.python_version()}
    return replace(plan, why={**plan.why, "score": name, "seed": seed, "versions": versions})
