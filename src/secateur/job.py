"""The main job as the command line runs it: a loaded model and data in; a result, its accuracies and a folder out."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from secateur import report
from secateur.budget import Latency, MACs, MeasuredTarget, Target
from secateur.calibrate import Anew
from secateur.errors import InputError, SecateurError
from secateur.measure.energy import beside
from secateur.measure.run import batch_of, like
from secateur.mend import mend
from secateur.models import Data, LoadedModel, save
from secateur.models.quality import accuracy
from secateur.processes import Alone, of
from secateur.prune import Result, batches, check, chosen, prune
from secateur.repair import FITTED, batch_norm_statistics, like_dense
from secateur.repair.chunks import ROWS
from secateur.retrace import with_inputs
from secateur.sparsify import Sparse, sparsify
from secateur.stream import Streamed
from secateur.stream.hf import calibration, mask_folder

Progress = Callable[[str], None]


@dataclass(frozen=True)
class Options:
    """How to choose what goes: as `prune` takes it."""

    score: str = "auto"
    allocation: str = "auto"
    repair: str = "auto"
    ignore: Sequence[str] = ()
    seed: int = 0
    depth: bool = False
    only: Sequence[str] = ()


@dataclass(frozen=True)
class Job:
    """What came of it. `accuracy` has "dense", "cut" and, where it was repaired, "repaired"; before a repair of the weights
    also "batch_norm", what re-estimating the statistics alone would give. Each is 0..1. `rows` is the batch that the MACs are
    counted for."""

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
            "repairs": [row.to_json() for row in result.repairs],
            **({"masks": [row.to_json() for row in result.masks]} if result.masks else {}),
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
    """Prune; with data score, allocate and repair from its training part; with labels measure on its test part; save.

    Raises whatever `prune`, `mend`, `accuracy` and `save` raise.
    """
    say = progress or (lambda stage: None)
    model = loaded.model
    check(model, *inputs)
    options = settled(options, data)
    measured = dense_accuracy(model, data, say)
    result, inputs = _pruned(model, inputs, targets, options, (data, say))
    if data is not None:
        measured |= repaired(result, data, options.repair, say)
    folder = None
    if out is not None:
        say("save")
        folder = save(result, out)
    return Job(loaded.name, result, batch_of(*inputs), measured, folder)


def masked(
    loaded: LoadedModel, inputs: tuple[tuple, dict[str, Any]], how: Sparse, *,
    data: Data | None = None, out: str | Path | None = None, entropy: bool = False, progress: Progress | None = None,
) -> Job:  # fmt: skip
    """Make single weights zero, from the training part of the data; with labels measure on its test part; save. `entropy`: as in `save`.

    Raises whatever `sparsify`, `accuracy` and `save` raise.
    """
    say, (args, kwargs) = progress or (lambda stage: None), inputs
    model = loaded.model
    check(model, args, kwargs)
    measured = dense_accuracy(model, data, say)
    held = Cast(model, data.train) if data is not None else None
    result = sparsify(model, args, how, held, kwargs=kwargs, progress=say)
    if data is not None and data.labelled:
        say("accuracy of the masked model")
        measured["cut" if result.plan.why["score"] == "magnitude" and not result.plan.why["refit"] else "repaired"] = accuracy(
            result.model, Cast(model, data.test)
        )
    folder = None
    if out is not None:
        say("save")
        folder = save(result, out, entropy=entropy)
    return Job(loaded.name, result, batch_of(args, kwargs), measured, folder)


def streamed(name: str, how: Sparse, given: tuple[str | None, int, int, bool], out: str | Path | None, progress: Progress) -> Streamed:
    """A Hugging Face folder made sparse block by block. `given`: what `--data` says, windows, tokens of each, one pass for each block.

    Raises:
        InputError: no folder of Hugging Face, no data, or no place for the result. And whatever `mask_folder` raises.
    """
    data, samples, length, at_once = given
    if not name.startswith("hf/"):
        raise InputError(f"--stream reads the shards of hf/FOLDER, and the model is {name!r}.\n  Leave --stream out.")
    if data is None or out is None:
        raise InputError("--stream needs text to calibrate with and a folder for the result.\n  Add --data text:FILE and -o FOLDER.")
    folder = Path(name.removeprefix("hf/"))
    progress("tokens")
    tokens, notes = calibration(data, folder, samples, length, how.seed)
    found = mask_folder(folder, out, how, tokens, at_once=at_once, progress=progress)
    return replace(found, notes=[*notes, *found.notes])


def settled(options: Options, data: Data | None) -> Options:
    """What "auto" becomes.

    Raises:
        InputError: an unknown word, or something that needs data where there is none.
    """
    score, allocation, repair = chosen(options.score, options.allocation, options.repair, data is not None)
    return replace(options, score=score, allocation=allocation, repair=repair)


def dense_accuracy(model: nn.Module, data: Data | None, say: Progress) -> dict[str, float]:
    """{"dense": accuracy} where there are labels, else nothing."""
    if data is None or not data.labelled:
        return {}
    say("accuracy of the dense model")
    return {"dense": accuracy(model, Cast(model, data.test))}


def repaired(result: Result, data: Data, repair: str, say: Progress) -> dict[str, float]:
    """Repair a cut model in place from the training part of the data; the accuracies before and after where there are labels."""
    measured: dict[str, float] = {}
    model = result.model
    train = result.study.data if result.study is not None else Cast(model, data.train)  # the object that statistics are kept of
    if data.labelled:
        say("accuracy as cut")
        measured["cut"] = accuracy(model, Cast(model, data.test))
        if repair in FITTED:
            measured |= _with_statistics(result, data, say)
    mend(result, train, repair, say)
    if data.labelled and result.plan.why["repair"] != "none":
        say("accuracy after the repair")
        measured["repaired"] = accuracy(model, Cast(model, data.test))
    return measured


def _with_statistics(result: Result, data: Data, say: Progress) -> dict[str, float]:
    """The accuracy with BatchNorm re-estimated and nothing else, from as many rows as a repair reads; the model is left as
    it was. Nothing where the model has no BatchNorm."""
    model = result.model
    before = {name: held.detach().clone() for name, held in model.named_buffers()}
    if not before:
        return {}
    say("accuracy with BatchNorm alone")
    calls = Anew(lambda: _at_most(batches(Cast(model, data.train), *result.graph.program.example_inputs)))
    used = batch_norm_statistics(model, calls, of(data.train), like_dense(result.dense, result.graph, result.plan.keep))
    found = {"batch_norm": accuracy(model, Cast(model, data.test))} if used else {}
    with torch.no_grad():
        for name, held in model.named_buffers():
            held.copy_(before[name])
    return found


def _at_most(calls: Iterable[tuple[tuple, dict]], rows: int = ROWS) -> Iterator[tuple[tuple, dict]]:
    for args, kwargs in calls:
        if rows <= 0:
            return
        yield args, kwargs
        rows -= batch_of(args, kwargs)


def write_report(done: Job, **sections: Any) -> Path | None:
    """`report.json` and `report.html` into the folder of a saved job, with `sections` that the job does not know (see
    `report.facts`). Returns the page; None where nothing was saved.

    Raises FormatError where they cannot be written; the saved model is whole all the same.
    """
    if done.folder is None:
        return None
    sections = {"energy": energies(done.result), **sections}
    return report.write(done.folder, report.facts(done, **sections))


def energies(result: Result) -> dict[str, Any] | None:
    """Joules of one call, dense and pruned, as the report has them. None where single weights went, whose zeros torch computes like any other
    weight, and where the models do not run on the inputs they were traced with."""
    if result.dense is None or result.masks:
        return None
    args, kwargs = result.graph.program.example_inputs or ((), {})
    try:
        found = beside(result.dense, result.model, args, kwargs)
    except SecateurError:
        return None
    dense, pruned = found["dense"], found["pruned"]
    return {"kind": dense.kind, "source": dense.source, "leaves_out": dense.leaves_out, "dense": dense.to_json(), "pruned": pruned.to_json()}


def _pruned(
    model: nn.Module, inputs: tuple[tuple, dict], targets: Sequence[Target | MeasuredTarget], options: Options,
    source: tuple[Data | None, Progress],
) -> tuple[Result, tuple[tuple, dict]]:  # fmt: skip
    """The result, not repaired yet, and the inputs it was traced with.

    A graph captured from a batch of one has that one written into it. That only matters where the graph is what is
    handed back, so only then is the model traced again, with two rows; the plan stays what it is.
    """
    (args, kwargs), (data, say) = inputs, source
    held = Cast(model, data.train) if data is not None else None
    settings: dict[str, Any] = {**asdict(options), "data": held, "repair": "none", "progress": say}
    result = prune(model, args, *targets, kwargs=kwargs, **settings)
    if result.cut.how == "attributes" or batch_of(args, kwargs) != 1:
        return result, inputs
    say("again with a batch of two")
    args, kwargs = doubled(inputs)
    found = with_inputs(result, args, kwargs, [t if isinstance(t, MeasuredTarget) else _doubled(t, result) for t in targets])
    if found is None:
        found = prune(model, args, *[_doubled(t, result) for t in targets], kwargs=kwargs, **settings)
    return found, (args, kwargs)


def doubled(inputs: tuple[tuple, dict]) -> tuple[tuple, dict]:
    """Inputs of one row as inputs of two."""
    return tree_map_only(Tensor, lambda t: torch.cat([t, t]) if t.dim() and len(t) == 1 else t, inputs)


def _doubled(target: Target | MeasuredTarget, result: Result) -> Target | MeasuredTarget:
    """MACs are those of one call: an absolute budget for one row is twice that for two. Latency stays that of one row."""
    if isinstance(target, MeasuredTarget):
        return of_one_row(target)
    if isinstance(target, MACs) and not str(target.at_most).strip().endswith("%"):
        return replace(target, at_most=2 * target.limit(result.before))
    return target


def of_one_row(target: MeasuredTarget) -> MeasuredTarget:
    """The target for inputs of two rows that were made of one."""
    return replace(target, batch=target.batch or 1) if isinstance(target, Latency) else target


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

    @property
    def processes(self) -> Alone:
        return of(self.items)

    def __iter__(self) -> Iterator[Any]:
        for item in self.items:
            yield like(self.model, item)
