"""`sweep()`: one model at several budgets, with one trace and one set of statistics."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from secateur.budget import MeasuredTarget, Target
from secateur.calibrate.loss import Loss
from secateur.errors import InputError
from secateur.measure import at_rest
from secateur.measure.run import forward
from secateur.mend import Progress, Result, study_of
from secateur.processes import of
from secateur.prune import How, begin, chosen, sensible

Point = Target | MeasuredTarget | Sequence[Target | MeasuredTarget]


def sweep(
    model: nn.Module,
    args: tuple,
    targets: Sequence[Point],
    *,
    data: Iterable[Any] | None = None,
    score: str | Callable | Mapping[str, Tensor] = "auto",
    allocation: str = "auto",
    repair: str = "auto",
    ignore: Sequence[str] = (),
    seed: int = 0,
    kwargs: Mapping[str, Any] | None = None,
    depth: bool = False,
    loss: Loss | None = None,
    progress: Progress | None = None,
    each: Callable[[Result], None] | None = None,
    only: Sequence[str] = (),
) -> list[Result]:
    """`prune` for every point of `targets`: the same results, in their order, for one trace and one reading of the data.

    Args:
        targets: one target per point, such as `[MACs("80%"), MACs("60%")]`, or several that the point must meet together.
        each: called with every result as soon as it is there, so that what is done is not lost with what comes after.
        The others are those of `prune`.

    Raises:
        InputError: no point, or a target that cannot be meant; all are looked at before anything is computed.
        CaptureError, ModelError, DataError, TargetError, CutError, ProofError: as `prune`; results before that went to `each`.
    """
    how = How(*chosen(score, allocation, repair, data is not None), seed, depth, loss, data, ignore, only)
    points = [tuple(p) if isinstance(p, (list, tuple)) else (p,) for p in targets]
    if not points:
        raise InputError("a sweep of no budgets.\n  Pass some, such as [MACs('80%'), MACs('60%')].")
    with of(data).watched():
        work = begin(model, args, kwargs, how, progress)
        for point in points:
            sensible(point, work.graph)
        found = []
        for point in points:
            work.say(" and ".join(str(t) for t in point))
            found.append(work.result(point))
            if each is not None:
                each(found[-1])
        return found


def divergence(result: Result, data: Iterable[Any]) -> float | None:
    """How far the model of a result is from the dense network on a few calibration rows: KL(dense || pruned) of the softmax,
    averaged over rows, where the outputs are scores of classes or tokens, else the squared error relative to their variance.
    None where the model cannot run on those rows (a graph that takes one batch size only)."""
    if result.dense is None:
        return None
    result.study = result.study or study_of(result.dense, result.graph, data, result.plan.why.get("seed", 0))
    output = result.study.output
    total = 0.0
    with at_rest(result.model):
        for dense, (args, kwargs) in zip(output.dense, output.feeds, strict=True):
            try:
                other = forward(result.model, args, kwargs)
            except InputError:
                return None
            first = next(v for v in tree_leaves(other) if isinstance(v, Tensor) and v.is_floating_point())
            total += output.apart(dense, first.float())
    return total / len(output.dense)
