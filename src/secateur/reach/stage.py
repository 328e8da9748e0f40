"""Where `prune` meets targets that are measured: counted and measured ones under one call, asked beside achieved."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

from torch import Tensor, nn

from secateur.budget import MACs, MeasuredTarget, Target
from secateur.budget.align import align
from secateur.budget.between import between
from secateur.errors import TargetError
from secateur.plan import Cost, Plan
from secateur.processes import ALONE, Alone
from secateur.reach.search import Options, reach, row, shown, taken
from secateur.surgery import cut
from secateur.trace import Graph

MULTIPLES = (8, 16)  # channels in one register or block of the common kernels


def within(
    model: nn.Module, graph: Graph, targets: Sequence[Target | MeasuredTarget], planner: Callable[..., Plan],
    scores: Mapping[str, Tensor] | None = None, options: Options | None = None,
) -> Plan:  # fmt: skip
    """The plan that meets counted and measured targets: `planner(*counted)` itself where nothing is measured, else what
    `reach` finds with it.

    Args:
        planner: counted targets -> a plan that meets them all.
        scores: of the groups; with them widths aligned to 8 and to 16 channels are tried too.

    Raises:
        InputError, ModelError, TargetError: as `reach` and the planner.
    """
    measured = [t for t in targets if isinstance(t, MeasuredTarget)]
    counted = [t for t in targets if not isinstance(t, MeasuredTarget)]
    if not measured:
        return planner(*counted)
    dense = graph.cost()
    ways: list[str] = []

    def realise(plan: Plan) -> nn.Module:
        done = cut(model, graph, plan, values=False)
        ways.append(done.how)
        return done.model

    def aligned(multiple: int, plan: Plan) -> Plan:
        other = align(graph, plan, scores or {}, multiple)
        return other if all(getattr(other.after, t.figure) <= t.limit(dense) for t in counted) else plan

    def mixed(smaller: Plan, larger: Plan, t: float) -> Plan:
        other = between(graph, smaller, larger, scores or {}, t)
        return other if all(getattr(other.after, x.figure) <= x.limit(dense) for x in counted) else smaller

    args, kwargs = graph.program.example_inputs
    options = options or Options()
    if scores is not None and not options.forms:
        options = replace(options, forms=[partial(aligned, n) for n in MULTIPLES])
    if scores is not None and options.between is None:
        options = replace(options, between=mixed)
    found = reach(
        lambda fraction: planner(*counted, MACs(at_most=max(1, int(fraction * dense.macs)))),
        realise, measured, model, args, kwargs, options,
    )  # fmt: skip
    why = {
        **found.plan.why, "targets": [str(t) for t in targets], "limits": [t.limit(dense) for t in counted],
        "achieved": found.achieved, "trail": [t.to_json() for t in found.trail], "measured_as": ways[-1],
    }  # fmt: skip
    return replace(found.plan, why=why)


def achieved(targets: Sequence[Target | MeasuredTarget], before: Cost, after: Cost, plan: Plan) -> list[dict[str, Any]]:
    """One row per target in the order they were asked: what was asked, the budget, what it is now, the dense figure."""
    measured = {r["target"]: r for r in plan.why.get("achieved", ())}
    rows = []
    for t in targets:
        if isinstance(t, MeasuredTarget):
            rows.append(measured[str(t)])
            continue
        have, whole = getattr(after, t.figure), getattr(before, t.figure)
        rows.append({
            "target": str(t), "figure": t.figure, "asked": t.at_most, "limit": t.limit(before), "dense": whole, "achieved": have,
            "ratio": have / max(1, whole),
        })  # fmt: skip
    return rows


def measured_again(
    plan: Plan, cut_model: nn.Module, targets: Sequence[Target | MeasuredTarget], model: nn.Module, graph: Graph, processes: Alone = ALONE
) -> Plan:
    """The plan with the achieved figures of `cut_model`, where another form of it than the one now handed out was measured.

    Raises:
        TargetError: that form takes more than 5 % above a budget.
    """
    args, kwargs = graph.program.example_inputs
    rows = []
    for t in (t for t in targets if isinstance(t, MeasuredTarget)):
        with t.beside(model, args, kwargs) as read:
            (reading,) = taken([read], cut_model, Options.final_rounds, processes)
        rows.append(row(t, reading))
        if t.share(reading) > 1 + Options.accept:
            raise TargetError(
                f"{t}: the cut class was within the budget, but the rewritten graph that is handed out instead takes "
                f"{shown(t, reading.cut)} of {shown(t, reading.dense)} ({100 * reading.ratio:.1f} %).\n  Ask for less by as much."
            )
    return replace(plan, why={**plan.why, "achieved": rows}) if rows else plan
