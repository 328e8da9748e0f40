"""A model as int8, measured beside its float32 self and, where it was pruned, beside the dense model both ways."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import nn

from secateur.errors import InputError, ModelError
from secateur.export.check import compared, wanted
from secateur.export.runner import Call, File, race, run
from secateur.export.stages import write
from secateur.figures import plain
from secateur.measure.latency import Latency
from secateur.measure.run import batch_of, inputs_on
from secateur.measure.runtimes import check
from secateur.measure.runtimes.onnx_file import arrays
from secateur.models.atomic import MARK, replace_folder, sha256
from secateur.models.data import Data
from secateur.quantise import by_nncf, by_onnxruntime
from secateur.quantise.judge import verdict, warnings
from secateur.quantise.rows import Part, accuracy, error, parts, scores_at

FACTS, FORMAT = "quantised.json", "secateur-quantised/1"
RUNTIMES: Mapping[str, tuple[Any, str]] = {"onnxruntime": (by_onnxruntime, "onnx"), "openvino": (by_nncf, "openvino")}
KINDS = ("static", "weights")
FILES = {"onnx": "model-int8.onnx", "openvino": "model-int8.xml"}
_UNLABELLED = 64  # test rows where there is no accuracy to measure: outputs may be as wide as a vocabulary
_SAME = 1e-3  # the float32 file off the model by more than this, relative to the largest output, is another function
_INT8 = " int8"


@dataclass(frozen=True)
class How:
    """How a model is quantised and timed.

    Attributes:
        runtime: onnxruntime or openvino. kind: static (activations too, with ranges from calibration rows) or weights.
        ranges: of activations: minmax or percentile, entropy (onnxruntime) or mean_minmax (openvino); None is minmax.
        rows: calibration rows at most. threads: of one operator. rounds: timed rounds.
    """

    runtime: str = "onnxruntime"
    kind: str = "static"
    ranges: str | None = None
    rows: int = 300
    threads: int = 1
    rounds: int = 20

    def check(self) -> None:
        """Raises InputError for what no tool has."""
        if self.runtime not in RUNTIMES:
            raise InputError(f"unknown runtime {self.runtime!r}.\n  int8 is made for: {', '.join(RUNTIMES)}.")
        if self.kind not in KINDS:
            raise InputError(f"unknown kind {self.kind!r}.\n  There are: {', '.join(KINDS)}.")
        known = RUNTIMES[self.runtime][0].RANGES
        if self.ranges is not None and (self.ranges not in known or self.kind != "static"):
            raise InputError(f"ranges={self.ranges!r}: {self.runtime} takes activations' ranges by {', '.join(known)}, for kind='static' alone.")
        check(self.runtime, self.threads)
        if self.rows < 1 or self.rounds < 2:
            raise InputError(f"rows={self.rows}, rounds={self.rounds}: one calibration row and two timed rounds at least.")


@dataclass(frozen=True)
class Row:
    """One model in one precision.

    Attributes:
        name: dense, pruned or model, with " int8" after it. bytes: of its files.
        accuracy: 0..1 on the test rows, None without labels.
        error: |outputs - those of the same model in float32| / |those|, over the test rows; 0 in float32. against_dense: the same to the
            dense model in float32, None without one.
        seconds: of one row in turns with all others; ratio: of the first row's in the same round, median.
        weights, zeros: stored weights, and how many of them are exactly zero.
    """

    name: str
    bytes: int
    accuracy: float | None
    error: float
    against_dense: float | None
    seconds: Latency
    ratio: float
    weights: int
    zeros: int

    @property
    def int8(self) -> bool:
        return self.name.endswith(_INT8)


@dataclass(frozen=True)
class Quantised:
    """What `quantise` found. path: of the int8 file. rows: dense, pruned, dense int8, pruned int8; or model, model int8. warnings, verdict,
    notes: sentences."""

    path: Path
    how: How
    rows: list[Row]
    warnings: list[str]
    verdict: list[str]
    notes: list[str]
    calibration_rows: int
    test_rows: int
    runtime: str

    def to_json(self) -> dict[str, Any]:
        """For JSON, which has no NaN: an error that is none is null."""
        return dict(plain({**asdict(self), "path": str(self.path)}))


def int8_file(source: File, target: str | Path, calls: Sequence[Call], how: How | None = None) -> list[str]:
    """Quantise one file, and nothing else: no check, no timing. Returns notes.

    Args:
        source: an .onnx (runtime onnxruntime) or .xml file (openvino) in float32, with the names of its `inputs`.
        target: the file to write, .onnx or .xml; replaced only by a complete one. Its folder is there.
        calls: calibration inputs, `(args, kwargs)` each, of as many rows as the file takes; not used for the kind weights.

    Raises:
        InputError: settings that no tool has, or no calibration rows. ModelError: a package is missing, or the tool cannot do it.
    """
    how = how or How()
    how.check()
    tool, format = RUNTIMES[how.runtime]
    if source.format != format:
        raise InputError(f"{source.path.name} is {source.format}, and {how.runtime} quantises {format}.\n  Export the model for the runtime first.")
    if how.kind == "weights":
        return [*tool.weights(source.path, Path(target)), *_nothing(tool, Path(target))]
    if not calls:
        raise InputError("static int8 takes the ranges of activations from calibration rows, and there are none.\n  Pass calls, or kind='weights'.")
    return [*tool.static(source.path, Path(target), _feeds(source, calls, how), how.ranges), *_nothing(tool, Path(target))]


def _nothing(tool: Any, target: Path) -> list[str]:
    return [] if tool.has_int8(target) else ["nothing became int8: the model has no linear layer or convolution that the tool takes"]


def quantise(
    model: nn.Module, call: Call, data: Data, folder: str | Path, *, dense: nn.Module | None = None, how: How | None = None,
    progress: Callable[[str], None] | None = None,
) -> Quantised:  # fmt: skip
    """Make the int8 file of a model, and measure what that and pruning are worth, each alone and together.

    Args:
        model: on the CPU, float32; it is left as it was. call: its example inputs, `(args, kwargs)`.
        data: `train` calibrates, `test` is measured, in the dtype of the model; no row of one is in the other.
        folder: for `model-int8.onnx` (or .xml and .bin) and `quantised.json`; replaced whole once everything has worked.
        dense: the model before pruning; it is quantised and measured the same way, and not kept.

    Raises:
        InputError: settings or a folder that cannot be meant. DataError: data without rows, or that does not fit.
        ModelError: a package is missing, the model is not float32, cannot be exported or quantised, or its file computes something else.
        CaptureError: `torch.export` cannot follow it. FormatError: the disk is full or not writable. What was in the folder is unchanged.
    """
    how, folder, say = how or How(), Path(folder), progress or (lambda stage: None)
    how.check()
    if os.path.isfile(folder / MARK):  # not an error for a name that no folder can have, which is told when it is written
        raise InputError(f"{folder} holds a pruned model.\n  Choose another folder for the int8 file: -o DIR.")
    call = inputs_on(model, *call)
    models = {"model": model} if dense is None else {"dense": dense, "pruned": model}
    made: list[Quantised] = []

    def fill(fresh: Path) -> None:
        with TemporaryDirectory(prefix="secateur-int8-", ignore_cleanup_errors=True) as work:
            found = _Work(Path(work), models, call, data, (how, say)).measured(folder)
            for path in sorted((Path(work) / f"{list(models)[-1]}{_INT8}").iterdir()):
                shutil.copyfile(path, fresh / path.name)
        made.append(found)
        files = {p.name: {"bytes": p.stat().st_size, "sha256": sha256(p)} for p in sorted(fresh.iterdir())}
        facts = {k: v for k, v in found.to_json().items() if k != "path"}
        versions = {name: version(name) for name in ("torch", "numpy", *(("nncf",) if how.runtime == "openvino" else ()))}
        (fresh / FACTS).write_text(json.dumps({"format": FORMAT, **facts, "files": files, "versions": versions}, indent=1) + "\n")

    replace_folder(folder, fill, {FACTS: FORMAT})
    return made[0]


class _Work:
    """One run of `quantise`, in a folder of its own."""

    def __init__(self, folder: Path, models: Mapping[str, nn.Module], call: Call, data: Data, rest: tuple[How, Callable[[str], None]]):
        self.folder, self.models, self.call, self.data = folder, models, call, data
        self.how, self.say = rest
        self.tool, self.format = RUNTIMES[self.how.runtime]
        self.notes: list[str] = []
        self.files: dict[str, File] = {}
        self.calls: list[Call] = []

    def measured(self, folder: Path) -> Quantised:
        free = all([self._write(name, model) for name, model in self.models.items()])
        size = None if free else batch_of(*self.call)
        self.calls = [p.call for p in parts(self.data.train, self.call, size or self.tool.ROWS, whole=not free, at_most=self.how.rows)]
        for name in self.models:
            self._quantise(name)
        test = parts(self.data.test, self.call, size, whole=not free, at_most=None if self.data.labelled else _UNLABELLED)
        rows, runtime = self._rows(test, parts([test[0].given], self.call, size or 1, whole=not free, at_most=1)[0].call)
        said = warnings(rows, lambda name: self._worst(name.removesuffix(_INT8)))
        counted = sum(batch_of(*call) for call in self.calls), sum(batch_of(*p.call) for p in test)
        return Quantised(folder / FILES[self.format], self.how, rows, said, verdict(rows), self.notes, *counted, runtime)

    def _write(self, name: str, model: nn.Module) -> bool:
        """The float32 file. Returns whether its batch is free."""
        other = next((n for n, t in model.state_dict().items() if t.is_floating_point() and t.dtype != torch.float32), None)
        if other is not None:
            raise ModelError(f"{other} of the {name} model is not float32, which int8 is made from.\n  Convert a copy first: model.float().")
        self.say(f"write {name}, float32")
        (self.folder / name).mkdir()
        (self.files[name], free, notes), _ = write(self.format, model, self.call, self.folder / name)
        self.notes += [note for note in notes if note not in self.notes]
        return free

    def _quantise(self, name: str) -> None:
        self.say(f"quantise {name}")
        target = self.folder / f"{name}{_INT8}" / FILES[self.format]
        target.parent.mkdir()
        for note in int8_file(self.files[name], target, self.calls, self.how):
            if note not in self.notes:
                self.notes.append(note)
        self.files[name + _INT8] = File(target, self.format, self.files[name].inputs)

    def _rows(self, test: Sequence[Part], one: Call) -> tuple[list[Row], str]:
        names = [*self.models, *(name + _INT8 for name in self.models)]
        outputs, runtime = {}, ""
        for name in names:
            self.say(f"run {name} on the test rows")
            done = run(self.files[name], [part.call for part in test], threads=self.how.threads)
            outputs[name], runtime = done.outputs, done.version
            if name in self.models:
                self._same(name, done.outputs[0], test[0].call)
        self.say("time all in turns")
        timed = race({name: self.files[name] for name in names}, one, threads=self.how.threads, rounds=self.how.rounds)
        rows = []
        for name in names:
            own, path = name.removesuffix(_INT8), self.files[name].path
            against = error(outputs[name], outputs["dense"]) if "dense" in self.models else None
            size = sum(p.stat().st_size for p in path.parent.iterdir())
            right = accuracy(outputs[name], test, scores_at(self.models[own], test[0].call)) if self.data.labelled else None
            rows.append(Row(name, size, right, error(outputs[name], outputs[own]), against, timed.seconds[name], timed.ratio[name],
                            *self.tool.zeros(path)))  # fmt: skip
        return rows, runtime

    def _same(self, name: str, found: Any, call: Call) -> None:
        """Raises ModelError if the float32 file computes something else than the model."""
        model, file = self.models[name], self.files[name]
        off = compared(wanted(model, [call]), [found], [call], file)[0].relative
        if not off <= _SAME:
            raise ModelError(
                f"{self.how.runtime} deviates from torch by {off:.1e} of the largest output of the {name} model in float32; at most {_SAME:.0e} is "
                "accepted.\n  Nothing was written. `secateur export` says more."
            )

    def _worst(self, name: str) -> list[str]:
        """The layers that lose most, where the tool can tell."""
        if self.how.kind != "static":
            return []
        feeds = _feeds(self.files[name], self.calls[:1], self.how)
        return list(self.tool.worst(self.files[name].path, self.files[name + _INT8].path, feeds))


def _feeds(file: File, calls: Sequence[Call], how: How) -> list[dict[str, Any]]:
    return [arrays(args, dict(kwargs), file.inputs, how.runtime) for args, kwargs in calls]


