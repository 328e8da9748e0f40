"""The same cut from a trace with other inputs, so that a rewritten graph keeps its batch size free."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from secateur.budget import MeasuredTarget, Target
from secateur.measure.count import count
from secateur.measure.proof import prove
from secateur.mend import Result
from secateur.reach import achieved
from secateur.surgery import cut
from secateur.trace import analyse
from secateur.trace.capture import capture


def with_inputs(result: Result, args: tuple, kwargs: Mapping[str, Any], targets: Sequence[Target | MeasuredTarget]) -> Result | None:
    """Carry the plan of `result`, which is not repaired yet, out on a trace with other inputs, and prove it there.

    Nothing is scored, planned or timed again. `targets` are those of the new inputs: MACs are per call.
    Returns None where the model has other groups on these inputs, or the proof does not pass.

    Raises:
        CaptureError, CutError: the model cannot be captured with these inputs, or not cut.
    """
    model, old = result.dense, result.graph
    assert model is not None
    graph = analyse(capture(model, args, kwargs), model, old.ignored, for_class=old.for_class)
    sizes = [{n: g.size for n, g in one.groups.items()} for one in (graph, old)]
    if sizes[0] != sizes[1] or set(graph.blocks) != set(old.blocks):
        return None
    plan = replace(result.plan, before=graph.cost(), after=graph.cost(result.plan.keep))
    done = cut(model, graph, plan, values=False, refuse_class=result.cut.why)
    proof = prove(model, graph, plan.keep, done.model)
    if not proof.passed:
        return None
    before, after = count(model, args, kwargs), count(done.model, args, kwargs)
    plan = replace(plan, why={**plan.why, "achieved": achieved(targets, before, after, plan)})
    notes = [n for n in result.notes if n not in result.cut.notes]
    notes += [n for n in done.notes if n not in notes]
    return replace(result, model=done.model, plan=plan, proof=proof, before=before, after=after, graph=graph, cut=done, notes=notes)
