"""`advise()`: every way of pruning at a few budgets, with int8 beside them, on this machine."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from secateur.advise import store
from secateur.advise.bench import Bench, Timed
from secateur.advise.candidates import NEURONS, STRUCTURES, Candidate, Source, candidates, careful, careful_ones
from secateur.advise.clock import OutOfTime, at_most
from secateur.advise.held_out import HeldOut, Lost
from secateur.advise.make import Maker, Model
from secateur.advise.verdict import marked, verdict
from secateur.calibrate import batches
from secateur.errors import DataError, InputError, SecateurError
from secateur.job import Cast, doubled
from secateur.measure import RUNTIMES
from secateur.measure.run import batch_of
from secateur.models import Data, LoadedModel
from secateur.models.atomic import MARK
from secateur.models.data import rows_of
from secateur.prune import How, begin
from secateur.repair.sensitivity import gives_scores
from secateur.trace.only import neurons

MEASURED, REFUSED, FAILED, NOT_TRIED = "measured", "refused", "failed", "not tried"
ROWS, HELD_OUT = 512, 2000  # rows to calibrate with, and to compare on
ENDING = 0.01  # share of the time in which Python starts, and what was found is written and printed
MOST = 100_000  # characters of an error that are kept


@dataclass(frozen=True)
class Settings:
    """How long and how closely to look.

    Attributes:
        minutes: of the whole, at most; what is not reached is listed as not tried.
        held_out: rows of the test part to compare on (without one, of the training part behind those that calibrate).
        threads: of the timed runs. batch: rows of one timed call; None as the inputs have them.
        runtimes: of `measure.RUNTIMES`; () for torch and, where it is installed, onnxruntime.
        lose: points that may be lost, for the verdict.
        begun: moment of `time.monotonic` from which the minutes count; None for the call.
    """

    minutes: float = 15.0
    held_out: int = HELD_OUT
    threads: int = 1
    batch: int | None = None
    runtimes: Sequence[str] = ()
    lose: float = 1.0
    begun: float | None = None

    def check(self) -> None:
        """Raises InputError for what cannot be meant."""
        if not self.minutes > 0 or not self.lose >= 0:
            raise InputError(f"minutes={self.minutes:g}, lose={self.lose:g}: time is above 0, and points lost are 0 or more.\n  Give others.")
        if odd := [name for name in self.runtimes if name not in RUNTIMES]:
            raise InputError(f"unknown runtime {odd[0]!r}.\n  There are: {', '.join(RUNTIMES)}.")


@dataclass
class Advice:
    """What was found. `dense` and each of `rows` are figures that JSON can say (docs/how-to/advise.md), rows in the order in which they are tried.
    `verdict`: a few sentences. `finished`: False where it was interrupted."""

    name: str
    metric: str
    held_out: int
    dense: dict[str, Any]
    rows: list[dict[str, Any]]
    settings: dict[str, Any]
    verdict: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    seconds: float = 0.0
    finished: bool = True
    folder: Path | None = None

    def to_json(self) -> dict[str, Any]:
        return {"format": store.FORMAT, **asdict(self), "folder": str(self.folder) if self.folder else None}


def advise(
    loaded: LoadedModel, inputs: tuple[tuple, dict[str, Any]], data: Data, source: Source, settings: Settings, *,
    out: str | Path | None = None, progress: Callable[[str], None] | None = None,
) -> Advice:  # fmt: skip
    """Try weights, neurons, structures, patterns and int8 on a model, from one trace and one set of statistics, and say which pays here.

    Args:
        loaded: the dense model; it is not changed. inputs: (args, kwargs) of one row, or of the batch that is to be timed.
        data: calibrates with its training part, compares on its test part; without labels the agreement with the dense outputs counts.
        source: what was typed, for the commands that make every row again.
        out: for `advise.json`, `report.html` and one folder for each model. Rows that lie there from a run with the same weights, rows, settings
            and machine are taken as they are.
        progress: called with the name of each stage as it starts.

    Ctrl-C ends the search and keeps the rows so far. A candidate that is refused or fails is a row with its reason.

    Raises:
        InputError, ModelError, DataError, CaptureError: the model cannot be traced, or does not run on the data.
    """
    settings.check()
    if out is not None and os.path.exists(out) and not os.path.isdir(out):
        raise InputError(f"{out} is a file; an advice is a folder.\n  Choose another name.")
    if out is not None and os.path.isfile(Path(out) / MARK):  # its report would be replaced
        raise InputError(f"{out} holds a pruned model.\n  Choose another folder for the advice: -o DIR.")
    with TemporaryDirectory(prefix="secateur-advise-") as scratch:
        search = _Search(loaded, inputs, data, source, settings, Path(out) if out else None, Path(scratch))
        search.tell = progress or search.tell
        return search.run()


@dataclass
class _Search:
    loaded: LoadedModel
    inputs: tuple[tuple, dict[str, Any]]
    data: Data
    source: Source
    settings: Settings
    out: Path | None
    scratch: Path
    tell: Callable[[str], None] = lambda stage: None
    started: float = 0.0
    at: str = ""

    def run(self) -> Advice:
        model, settings = self.loaded.model, self.settings
        self.started = time.monotonic() if settings.begun is None else settings.begun
        train, test = parts(self.data, self.source.rows, settings.held_out)
        args, kwargs = doubled(self.inputs)  # so that graphs keep the batch size free
        how = How("obs", "curves", "least_squares", self.source.seed, False, None, Cast(model, train), self.source.ignore)
        work = begin(model, args, kwargs, how, self.say)
        self.say(f"dense model on {settings.held_out} held-out rows")
        held = HeldOut(model, Cast(model, test), self.data.labelled, gives_scores(work.graph), lambda batch: next(batches([batch], args, kwargs)))
        key = store.key(self.loaded, (self.source, settings), (self.inputs, train, test))
        known = store.rows(self.out, key)
        with Bench(model, timed_inputs(self.inputs, settings.batch), settings.threads, runtimes(settings.runtimes)) as bench:
            rows = (Cast(model, self.data.train), held.batches, self.data.labelled)
            maker = Maker(work, bench, rows, self.inputs, self.out or self.scratch)
            dense = _figures(Lost(0.0, 0.0, held.value), bench.itself(), maker.dense(self.scratch))
            done = Advice(self.loaded.name, held.metric, held.rows, dense, [], {**_said(settings, bench), "key": key}, folder=self.out)
            self._all(done, maker, held, known)
        done.notes = list(dict.fromkeys(bench.notes))
        self._write(done, done.rows)
        return done

    # ---------------------------------------------------------------- one after the other
    def _all(self, done: Advice, maker: Maker, held: HeldOut, known: Mapping[str, dict[str, Any]]) -> None:
        """Every candidate, and then what is worth more care, until the time is up or Ctrl-C. What is known is in every file written on the way."""
        bare = {c.name: self._row(c) for c in [*candidates(), *careful_ones()]}
        found = {name: {**row, "kept": True} for name, row in known.items() if name in bare and row["commands"] == bare[name]["commands"]}

        def write() -> None:
            self._write(done, [found[name] for name in bare if name in found])

        write()
        try:
            for candidate in self._queue(done):
                if candidate.name not in found:
                    found[candidate.name] = {**bare[candidate.name], **self._tried(candidate, maker, held, done.rows)}
                    write()
        except KeyboardInterrupt:
            done.finished = False
            for candidate in candidates():
                found.setdefault(candidate.name, {**bare[candidate.name], "state": NOT_TRIED, "why": "interrupted"})
            write()

    def _queue(self, done: Advice) -> Iterator[Candidate]:
        yield from candidates()
        if has_test(self.data):  # else rows that models are compared on would be among those that all of these are made from
            yield from careful(done.rows, self.settings.lose)

    def _row(self, candidate: Candidate) -> dict[str, Any]:
        lines = self.source.lines(candidate)
        if candidate.command == "mask":
            batch = ["--batch", str(self.settings.batch)] if self.settings.batch else []
            lines.append(" ".join(["secateur", "run", candidate.folder, "--fold", "--threads", str(self.settings.threads), *batch]))
        named = {"name": candidate.name, "way": candidate.way, "budget": candidate.budget, "careful": not candidate.quick}
        return {**named, "command": candidate.command, "commands": lines}

    def _tried(self, candidate: Candidate, maker: Maker, held: HeldOut, before: list[dict[str, Any]]) -> dict[str, Any]:
        """What became of one candidate."""
        begun, worked = time.monotonic(), time.process_time()
        kind = candidate.command, not candidate.quick
        like = [row["took"] for row in before if row["state"] == MEASURED and (row["command"], row.get("careful", False)) == kind]
        left = self._left()
        if left <= (like[-1] if like else 0.0):
            last = f", and the last `{candidate.command}` took {like[-1]:.0f} s" if like else ""
            return {"state": NOT_TRIED, "why": f"{max(0.0, left):.0f} s were left{last}"}
        self.at = candidate.name
        try:
            with at_most(left):
                facts = self._measured(candidate, maker, held)
        except OutOfTime:
            return {"state": NOT_TRIED, "why": f"stopped after {time.monotonic() - begun:.0f} s: the time was up"}
        except SecateurError as error:
            facts = {"state": REFUSED, "why": str(error)[:MOST]}
        except Exception as error:  # whatever a runtime raises: the other ways are still worth knowing
            facts = {"state": FAILED, "why": f"{type(error).__name__}: {error}"[:MOST]}
        return {"took": time.monotonic() - begun, "cpu": time.process_time() - worked, **facts}

    def _measured(self, candidate: Candidate, maker: Maker, held: HeldOut) -> dict[str, Any]:
        """What a candidate loses and gains. Its seconds are without the statistics that all of its kind share."""
        if why := _pointless(candidate, maker):
            return {"state": REFUSED, "why": why}
        maker.ready(candidate)
        begun, worked = time.monotonic(), time.process_time()
        model = maker.made(candidate)
        self.say("held-out rows")
        lost = held.lost(model.module) if model.module is not None else held.compared(held.seen(model.outputs or []))
        if not math.isfinite(lost.points):
            raise InputError("its outputs on the held-out rows are not finite.\n  Keep more of it.")
        self.say("time, in turns with the dense model")
        facts = {"state": MEASURED, **_figures(lost, maker.timed(candidate, model), model), "notes": model.notes}
        return {**facts, "took": time.monotonic() - begun, "cpu": time.process_time() - worked}

    # ---------------------------------------------------------------- the clock, and what is written
    def say(self, stage: str) -> None:
        """Tell the stage; past the deadline end the candidate instead."""
        if self.at and self._left() < 0:
            raise OutOfTime
        self.tell(f"{self.at}: {stage}" if self.at else stage)

    def _left(self) -> float:
        return 60 * self.settings.minutes * (1 - ENDING) - (time.monotonic() - self.started)

    def _write(self, done: Advice, rows: list[dict[str, Any]]) -> None:
        done.rows = rows
        marked(done.dense, done.rows)
        done.verdict = verdict(done.dense, done.rows, done.metric, self.settings.lose)
        done.seconds = time.monotonic() - self.started
        if self.out is not None:
            store.write(self.out, done.to_json())


def parts(data: Data, rows: int, held_out: int) -> tuple[Any, Any]:
    """The rows to calibrate with, and those to compare on, of which none is among the first.

    Raises:
        DataError: no row is left to compare on.
    """
    test = rows_of(data.test, 0, held_out)
    if not has_test(data):
        test = rows_of(data.train, rows, held_out)
    if not any(True for _ in test):
        raise DataError(f"--data {data.name} has no test part, and no more than {rows} rows.\n  Calibrate with fewer: --rows, or give more data.")
    return rows_of(data.train, 0, rows), test


def has_test(data: Data) -> bool:
    return data.test is not data.train and any(True for _ in data.test)


def runtimes(wanted: Sequence[str]) -> list[str]:
    """Those asked for, else torch and what is installed of onnxruntime."""
    import importlib.util

    there = all(importlib.util.find_spec(name) for name in ("onnxruntime", "onnx", "onnxscript"))
    return list(wanted) or ["torch", *(["onnxruntime"] if there else [])]


def timed_inputs(inputs: tuple[tuple, dict[str, Any]], batch: int | None) -> tuple[tuple, dict[str, Any]]:
    from secateur.measure.runtimes import rows

    return rows(*inputs, batch)


def _pointless(candidate: Candidate, maker: Maker) -> str:
    """Why a candidate would say nothing new, or ''."""
    graph = maker.work.graph
    hidden = set(neurons(graph))
    if candidate.way == STRUCTURES and graph.groups and hidden == set(graph.groups):
        return "all groups of this model are hidden units of linear layers: the rows of neurons say it"
    if candidate.way == NEURONS and not hidden:
        return "this model has no hidden units of linear layers that could go alone; its filters, heads and streams are structures"
    if "--depth" in candidate.options and not graph.blocks:
        return "this model has no residual block that could go as a whole"
    return ""


def _figures(lost: Lost, timed: Timed, model: Model) -> dict[str, Any]:
    return {
        "lost": lost.points, "interval": lost.interval, "value": lost.value, **timed.to_json(), "bytes": model.bytes, "peak_bytes": model.peak_bytes,
        "process_bytes": model.process_bytes, "macs": model.macs, "params": model.params, "folder": model.folder, "plan_sha256": model.plan_sha256,
    }  # fmt: skip


def _said(settings: Settings, bench: Bench) -> dict[str, Any]:
    return {
        **{k: v for k, v in asdict(replace(settings, runtimes=list(bench.dense))).items() if k != "begun"}, "batch": batch_of(*bench.inputs),
        "yardstick": bench.yardstick, "torch_threads": torch.get_num_threads(),
    }  # fmt: skip
