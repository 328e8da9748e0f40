"""The main job as the command line runs it: a loaded model and data in; a result, its accuracies and a folder out."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map_only

from secateur import report
from secateur.budget import Latency, MACs, MeasuredTarget, Target
from secateur.errors import InputError
from secateur.measure.run import batch_of
from secateur.models import Data, LoadedModel, save
from secateur.models.quality import accuracy
from secateur.prune import Result, batches, check, prune
from secateur.repair import batch_norm_statistics

Progress = Callable[[str], None]


@dataclass(frozen=True)
class Options:
    """How to choose what goes: as `prune` takes it."""

    score: str = "l2"
    allocation: str = "global"
    ignore: Sequence[str] = ()
    seed: int = 0
    depth: bool = False


@dataclass(frozen=True)
class Job:
    """What came of it. `accuracy` has "dense", "cut" and, where BatchNorm was re-estimated, "repaired"; each 0..1.
    `rows` is the batch that the MACs are counted for."""

    name: str
    result: Result
    rows: int
    accuracy: Mapping[str, float] = field(default_factory=dict)
    folder: Path | None = None

    def to_json(self) -> dict[str, Any]:
        result = self.result
        return {
            "model": self.name,
            "batch": self.rows,
            "before": asdict(result.before),
            "after": asdict(result.after),
            "proof": result.proof.to_json(),
            "how": result.cut.how,
            "notes": list(result.notes),
            "accuracy": dict(self.accuracy) or None,
            "groups": group_rows(result),
            "why": dict(result.plan.why),
            "folder": str(self.folder) if self.folder else None,
        }


def example_inputs(loaded: LoadedModel, data: Data | None, given: Sequence[Tensor]) -> tuple[tuple, dict[str, Any]]:
    """The inputs to trace with: those given, else a row of the data, else the model's own; in the model's dtype.

    Raises InputError when there are none.
    """
    args: tuple
    kwargs: dict[str, Any] = {}
    if given:
        args = tuple(given)
    elif data is not None:
        args, kwargs = data.example(1)
    elif loaded.example_inputs is not None:
        args, kwargs = loaded.example_inputs, loaded.kwargs
    else:
        raise InputError(
            f"{loaded.name} does not say what its inputs look like.\n"
            "  Add --input 1x3x224x224 (once per input), or --data, or let the factory return (model, inputs)."
        )
    return like(loaded.model, (args, dict(kwargs)))


def run(
    loaded: LoadedModel,
    inputs: tuple[tuple, dict[str, Any]],
    targets: Sequence[Target | MeasuredTarget],
    options: Options,
    *,
    data: Data | None = None,
    out: str | Path | None = None,
    progress: Progress | None = None,
) -> Job:
    """Prune; with data re-estimate BatchNorm on its training part; with labels measure on its test part; save.

    Raises whatever `prune`, `accuracy` and `save` raise.
    """
    say = progress or (lambda stage: None)
    measured: dict[str, float] = {}
    model = loaded.model
    check(model, *inputs)
    if data is not None and data.labelled:
        say("accuracy of the dense model")
        measured["dense"] = accuracy(model, Cast(model, data.test))
    result, inputs = _pruned(model, inputs, targets, options, say)
    if data is not None:
        if data.labelled:
            say("accuracy as cut")
            measured["cut"] = accuracy(result.model, Cast(model, data.test))
        say("BatchNorm statistics")
        used = batch_norm_statistics(result.model, batches(Cast(model, data.train), inputs[0]))
        if used and data.labelled:
            say("accuracy after BatchNorm")
            measured["repaired"] = accuracy(result.model, Cast(model, data.test))
    folder = None
    if out is not None:
        say("save")
        folder = save(result, out)
    return Job(loaded.name, result, batch_of(*inputs), measured, folder)


def write_report(done: Job, **sections: Any) -> Path | None:
    """`report.json` and `report.html` into the folder of a saved job, with `sections` that the job does not know (see
    `report.facts`). Returns the page; None where nothing was saved.

    Raises FormatError where they cannot be written; the saved model is whole all the same.
    """
    return report.write(done.folder, report.facts(done, **sections)) if done.folder is not None else None


def _pruned(
    model: nn.Module, inputs: tuple[tuple, dict], targets: Sequence[Target | MeasuredTarget], options: Options, say: Progress
) -> tuple[Result, tuple[tuple, dict]]:
    """The result and the inputs it was traced with.

    A graph captured from a batch of one has that one written into it. That only matters where the graph is what is
    handed back, so only then is the model traced again, with two rows.
    """
    args, kwargs = inputs
    chosen = asdict(options)
    result = prune(model, args, *targets, kwargs=kwargs, progress=say, **chosen)
    if result.cut.how == "attributes" or batch_of(args, kwargs) != 1:
        return result, inputs
    say("again with a batch of two")
    args, kwargs = tree_map_only(Tensor, lambda t: torch.cat([t, t]) if t.dim() and len(t) == 1 else t, inputs)
    doubled = [_doubled(target, result) for target in targets]
    return prune(model, args, *doubled, kwargs=kwargs, progress=say, **chosen), (args, kwargs)


def _doubled(target: Target | MeasuredTarget, result: Result) -> Target | MeasuredTarget:
    """MACs are those of one call: an absolute budget for one row is twice that for two. Latency stays that of one row."""
    if isinstance(target, Latency):
        return replace(target, batch=target.batch or 1)
    if isinstance(target, MACs) and not str(target.at_most).strip().endswith("%"):
        return replace(target, at_most=2 * target.limit(result.before))
    return target


def group_rows(result: Result) -> list[dict[str, Any]]:
    """One row per group that lost units: name, kind, units before and after, MACs and parameters that saves alone."""
    graph, plan = result.graph, result.plan
    dense = graph.cost()
    rows = []
    for name in plan.removed:
        alone = graph.cost({name: plan.keep[name]})
        kind = graph.groups[name].kind if name in graph.groups else "block"
        rows.append({
            "name": name, "kind": kind, "units_before": len(plan.keep[name]), "units_after": int(plan.keep[name].sum()),
            "macs_saved": dense.macs - alone.macs, "params_saved": dense.params - alone.params,
        })  # fmt: skip
    return rows


class Cast:
    """Batches in the dtype and on the device of a model; labels and whole numbers keep their dtype."""

    def __init__(self, model: nn.Module, items: Any):
        self.model, self.items = model, items

    def __iter__(self) -> Iterator[Any]:
        for item in self.items:
            yield like(self.model, item)


def like(model: nn.Module, value: Any) -> Any:
    """`value` with its tensors moved to the model's device, and those of floating point to its dtype."""
    first = next((p for p in model.parameters() if p.is_floating_point()), None)
    if first is None or not tree_leaves(value):
        return value
    return tree_map_only(
        Tensor, lambda t: t.to(first.device, first.dtype if t.is_floating_point() else t.dtype), value
    )
