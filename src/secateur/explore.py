"""What a budget would cost before one is chosen, as the command line asks for it: the sensitivity of every group, and a
sweep over budgets that is saved point by point and can be taken up again."""

from __future__ import annotations

import re
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from secateur import job, report
from secateur.budget import MACs, MeasuredTarget, Target
from secateur.errors import FormatError, InputError
from secateur.job import Cast, Options, Progress
from secateur.measure import at_rest, compare, count
from secateur.measure.run import batch_of, forward, shapes
from secateur.mend import Result, study_of
from secateur.models import Data, LoadedModel, save
from secateur.models.atomic import MARK, REPORT_FACTS, sha256
from secateur.models.data import tensors_of
from secateur.models.folder import read
from secateur.models.weights import fingerprint
from secateur.prune import check
from secateur.repair import Study
from secateur.report.facts import frozen_rows, plain
from secateur.surgery.cut import state_of
from secateur.sweep import divergence, sweep
from secateur.trace import Graph

AnyTarget = Target | MeasuredTarget
COUNTS = 16  # of units per curve that the cost is counted for
ROUNDS = 15  # of a latency


# ---------------------------------------------------------------- sensitivity
def sensitivity(model: nn.Module, graph: Graph, data: Data | None, seed: int, say: Progress) -> list[dict[str, Any]]:
    """One row per group that has an error curve: `group`, `kind`, `units` and `points` by units kept (see `curve_rows`).

    Raises:
        InputError: no data.
        DataError: data that does not fit the model.
    """
    if data is None:
        raise InputError("--sensitivity looks at what the layers see, and there is no data.\n  Add --data; no labels are needed.")
    return curve_rows(study_of(model, graph, Cast(model, data.train), seed, say), graph)


def curve_rows(study: Study, graph: Graph) -> list[dict[str, Any]]:
    """Points hold `kept` (share), `units`, `removed`, `macs` of the whole network, `error` (added squared error of the layers
    that read the group, relative to the variance of what they feed) and, at a few of them, `divergence` of the output."""
    rows = []
    for name, curve in study.curves.items():
        size = len(curve.order)
        seen = {p.removed: p.divergence for p in study.points.get(name, ())}
        counts = sorted({round(n * (size - 1) / COUNTS) for n in range(COUNTS + 1)} | set(seen))
        points = [{
            "kept": (size - n) / size, "units": size - n, "removed": n, "macs": graph.cost({name: curve.keep(n)}).macs,
            "error": float(curve.error[n]), "divergence": seen.get(n),
        } for n in counts]  # fmt: skip
        rows.append({"group": name, "kind": graph.groups[name].kind, "units": size, "points": points})
    return rows


def write_inspection(folder: str | Path, graph: Graph, facts: Mapping[str, Any], settings: Mapping[str, Any]) -> Path:
    """A report of what `secateur inspect` found. Returns the page.

    Raises FormatError where it cannot be written.
    """
    groups = [{"name": g["name"], "kind": g["kind"], "before": g["units"], "after": g["units"]} for g in facts["groups"]]
    cost = [{"figure": name, "dense": value, "pruned": None} for name, value in facts["cost"].items()]
    taken = {name: facts[name] for name in ("model", "batch", "notes", "sensitivity") if facts.get(name)}
    return report.write(folder, report.facts(None, **taken, groups=groups, cost=cost, frozen=frozen_rows(graph.frozen), settings=dict(settings)))


# ---------------------------------------------------------------- a sweep
@dataclass(frozen=True)
class Around:
    """What belongs to a sweep besides how to prune: calibration and test data, the folder, and what else to do."""

    data: Data | None = None
    out: str | Path | None = None
    resume: bool = False
    latency: bool = False
    command: str = ""


@dataclass
class Sweep:
    """What came of it: one row per point, of figures that JSON can say. `rows` is the batch that MACs are counted for."""

    name: str
    rows: int
    dense: dict[str, Any]
    points: list[dict[str, Any]]
    settings: dict[str, Any]
    sensitivity: list[dict[str, Any]] = field(default_factory=list)
    folder: Path | None = None

    def to_json(self) -> dict[str, Any]:
        return {
            "model": self.name, "batch": self.rows, "dense": self.dense, "points": self.points, "settings": self.settings,
            "sensitivity": self.sensitivity or None, "folder": str(self.folder) if self.folder else None,
        }  # fmt: skip

    def sheet(self) -> dict[str, Any]:
        """The facts of its report."""
        same = {"kl": 0.0} if any(row.get("kl") is not None for row in self.points) else {}
        dense = {"label": "dense", "share": 1.0, **same, **{k: self.dense.get(k) for k in ("macs", "params", "accuracy", "seconds")}}
        facts = {"model": self.name, "batch": self.rows, "pareto": [dense, *self.points], "settings": self.settings}
        return report.facts(None, **facts, **({"sensitivity": self.sensitivity} if self.sensitivity else {}))


def run(
    loaded: LoadedModel, inputs: tuple[tuple, dict[str, Any]], points: Mapping[str, Sequence[AnyTarget]], options: Options, around: Around,
    progress: Progress | None = None,
) -> Sweep:  # fmt: skip
    """Prune, prove, repair and measure at every point; save each under `around.out` as soon as it is done.

    Args:
        points: label, as it was written, -> its targets. A batch of one is made one of two, so that graphs keep it free.

    With `around.resume` a point that lies whole in its folder, from the same weights, data and options, is taken as it is; so are those of
    sweeps that lie in folders of `around.out`, which may have run anywhere.

    Raises whatever `sweep`, `mend`, `accuracy` and `save` raise; the points before that are saved.
    """
    say = progress or (lambda stage: None)
    model, data = loaded.model, around.data
    if around.resume and around.out is None:
        raise InputError("there is nothing to resume without a folder.\n  Add -o FOLDER, the one of the sweep that was interrupted.")
    check(model, *inputs)
    options = job.settled(options, data)
    if batch_of(*inputs) == 1:
        inputs, points = job.doubled(inputs), {label: [_for_two(t) for t in point] for label, point in points.items()}
    settings = {
        "targets": list(points), **{k: v for k, v in asdict(options).items() if v not in ((), False)}, "command": around.command,
        "fingerprint": _fingerprint(loaded, inputs, options, data),
    }  # fmt: skip
    folder = Path(around.out) if around.out is not None else None
    rows, curves = _saved(folder, settings["fingerprint"], around) if folder is not None and around.resume else ({}, [])
    rows = {label: rows[label] for label in points if label in rows}
    dense = {**asdict(count(model, *inputs)), "accuracy": job.dense_accuracy(model, data, say).get("dense")}
    done = Sweep(loaded.name, batch_of(*inputs), dense, [], settings, curves, folder)
    left = [label for label in points if label not in rows]

    def each(result: Result) -> None:
        label = next(label for label in left if label not in rows)
        rows[label] = _point((loaded.name, label), result, options, (around, inputs), say)
        _gather(done, [rows[label] for label in points if label in rows])
        if result.study is not None and "points" in vars(result.study):
            done.sensitivity = curve_rows(result.study, result.graph)
        if folder is not None:
            report.write(folder, done.sheet())

    if left:
        chosen: dict[str, Any] = {**asdict(options), "repair": "none", "data": Cast(model, data.train) if data is not None else None}
        sweep(model, inputs[0], [points[label] for label in left], kwargs=inputs[1], progress=say, each=each, **chosen)
    _gather(done, [rows[label] for label in points])
    if folder is not None and not left:
        report.write(folder, done.sheet())
    return done


def _gather(done: Sweep, rows: list[dict[str, Any]]) -> None:
    done.points = rows
    timed = [row["seconds_dense"] for row in rows if row.get("seconds_dense")]
    if timed:
        done.dense["seconds"] = statistics.median(timed)


def _point(name: tuple[str, str], result: Result, options: Options, where: tuple[Around, tuple[tuple, dict]], say: Progress) -> dict[str, Any]:
    """Repair, measure and save one point. The study is the same for all points, and stays what it is."""
    (model_name, label), (around, inputs) = name, where
    row: dict[str, Any] = {"label": label, **asdict(result.after), "share": result.after.macs / max(1, result.before.macs)}
    stages: dict[str, float] = {}
    if around.data is not None:
        stages = job.repaired(result, around.data, options.repair, say)
        say("divergence of the output")
        row["kl"] = divergence(result, Cast(result.model, around.data.train))
    row |= {"accuracy": stages.get("repaired", stages.get("cut")), "stages": stages, "how": result.cut.how}
    row |= {"achieved": result.plan.why["achieved"], "repair": result.plan.why.get("repair"), "proof": result.proof.max_error}
    if around.latency:
        say("latency, in turns with the dense model")
        row |= _timed(result, inputs)
    if around.out is not None:
        say("save")
        folder = save(result, Path(around.out) / folder_of(label))
        job.write_report(job.Job(model_name, result, batch_of(*inputs), stages, folder), settings={"point": label, "command": around.command})
        row |= {"folder": folder.name, "plan_sha256": sha256(folder / MARK)}
    return plain(row)


def _timed(result: Result, inputs: tuple[tuple, dict]) -> dict[str, float]:
    """Median seconds of one call on torch with one thread, and its share of the dense model's, taken in turns."""
    args, kwargs = inputs
    dense, pruned = result.dense, result.model
    assert dense is not None
    with at_rest(dense), at_rest(pruned):
        calls = {"dense": lambda: forward(dense, args, kwargs), "pruned": lambda: forward(pruned, args, kwargs)}
        timed = compare(calls, rounds=ROUNDS, batch=batch_of(args, kwargs))
    return {"seconds": timed.seconds["pruned"].median, "seconds_dense": timed.seconds["dense"].median, "ratio": timed.ratio["pruned"]}


def folder_of(label: str) -> str:
    """`macs=80%` -> `macs_80pct`."""
    return re.sub(r"[^\w.]+", "_", label.replace("%", "pct")).strip("_.")


def _for_two(target: AnyTarget) -> AnyTarget:
    """A budget of MACs that is a number was meant for one row. Shares, and what is measured, stay."""
    if isinstance(target, MeasuredTarget):
        return job.of_one_row(target)
    share = not isinstance(target, MACs) or str(target.at_most).strip().endswith("%")
    return target if share else replace(target, at_most=2 * target.number())


# ---------------------------------------------------------------- taking it up again
def _saved(folder: Path, fingerprint: str, around: Around) -> tuple[dict[str, dict[str, Any]], list[dict[str, Any]]]:
    """The rows of earlier runs with this fingerprint whose folders are whole, by label, and their sensitivity. A run's report lies in the
    folder itself, or in one of its folders."""
    rows: dict[str, dict[str, Any]] = {}
    curves: list[dict[str, Any]] = []
    for place in [folder, *sorted(path.parent for path in folder.glob(f"*/{REPORT_FACTS}"))]:
        try:
            known = report.read(place)
        except FormatError:
            continue
        if (known.get("settings") or {}).get("fingerprint") != fingerprint:
            continue
        curves = curves or known.get("sensitivity") or []
        for row in known.get("pareto") or ():
            if row["label"] not in rows and _whole(place, row) and (not around.latency or row.get("seconds")):
                rows[row["label"]] = {**row, "folder": (place / row["folder"]).relative_to(folder).as_posix()}
    return rows, curves


def _whole(folder: Path, row: dict[str, Any]) -> bool:
    if not row.get("folder"):
        return False
    try:
        read(folder / row["folder"])
        return sha256(folder / row["folder"] / MARK) == row.get("plan_sha256")
    except (FormatError, InputError):
        return False


def _fingerprint(loaded: LoadedModel, inputs: tuple[tuple, dict], options: Options, data: Data | None) -> str:
    """Of all that decides what a point becomes: weights, options, shapes, the rows of the data, the version."""
    from secateur import __version__

    facts = (__version__, torch.__version__, loaded.name, asdict(options), shapes(*inputs), data.name if data is not None else None)
    rows = tensors_of(train=data.train, test=data.test) if data is not None else {}
    return fingerprint(facts, {**state_of(loaded.model), **rows})
