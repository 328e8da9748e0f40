"""From a model to a folder that holds its file for another runtime and the facts about it: write, check, measure, put in place."""

from __future__ import annotations

import json
import math
import os
import zlib
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from torch import nn

from secateur.errors import InputError, ModelError, SecateurError
from secateur.export import to_executorch, to_hf, to_onnx, to_openvino, to_pt2
from secateur.export.capture import Captured, capture, check_inputs, exportable, named, named_within
from secateur.export.check import Deviation, accepted, calls_of, checked, other_lengths, runnable, tokens_of
from secateur.export.runner import Call, File, race, run
from secateur.measure.latency import Comparison
from secateur.measure.run import batch_of, inputs_on
from secateur.measure.runtimes import check as check_runtime
from secateur.models.atomic import MARK, replace_folder, sha256

FACTS = "export.json"
FORMAT = "secateur-export/1"
NAMES = {"onnx": "model.onnx", "openvino": "model.xml", "executorch": "model.pte", "pt2": "model.pt2", "hf": ""}
BATCHES = (1, 2, 5)


@dataclass(frozen=True)
class How:
    """How an export is checked and timed.

    Attributes:
        tolerance: largest deviation over the largest output that is accepted; None is 1e-4, and 1e-2 in float16.
        threads: of one operator. rounds: timed rounds; 0 times nothing.
        batches: rows of the calls that are checked where the batch is free.
        calls: inputs to check with, `(args, kwargs)` each, instead of `batches` rows of the example inputs; the first is timed.
    """

    tolerance: float | None = None
    threads: int = 1
    rounds: int = 20
    batches: tuple[int, ...] = BATCHES
    calls: tuple[Call, ...] = ()

    def check(self) -> None:
        """Raises InputError for what cannot be meant."""
        check_runtime("torch", self.threads)
        if self.rounds < 0 or self.rounds == 1:
            raise InputError(f"rounds={self.rounds}: a file is timed in 2 rounds at least, or with 0 not at all.")
        if self.tolerance is not None and not 0 <= self.tolerance < math.inf:
            raise InputError(f"tolerance={self.tolerance}: the largest deviation over the largest output is a number from 0 up.\n  1e-4 is usual.")
        if odd := [n for n in self.batches if not isinstance(n, int) or n < 1]:
            raise InputError(f"batches={self.batches}: {odd[0]} is no number of rows.\n  Give whole numbers from 1 up.")


@dataclass(frozen=True)
class Exported:
    """An export that was checked.

    Attributes:
        folder: what was written. path: the file in it that the runtime opens; of a Hugging Face export the folder itself.
        format: onnx, openvino, executorch, pt2 or hf. runtime: its name and version.
        dynamic: whether it takes any number of rows.
        deviations: from the model, for every call.
        bytes: of all files that the runtime reads; `dense_bytes` those of the dense model, None without one.
        seconds: of the first call, "pruned" beside "dense" where that was given; None where nothing was timed.
        peak_bytes: most memory of the process, by the same names; `idle_bytes`: the runtime alone.
    """

    folder: Path
    path: Path
    format: str
    runtime: str
    dynamic: bool
    inputs: tuple[str, ...]
    deviations: list[Deviation]
    bytes: int
    dense_bytes: int | None = None
    seconds: Comparison | None = None
    peak_bytes: Mapping[str, int] = field(default_factory=dict)
    idle_bytes: int = 0
    notes: list[str] = field(default_factory=list)

    @property
    def deviation(self) -> float:
        """The largest, relative to the largest value of the output."""
        return max(row.relative for row in self.deviations)

    def to_json(self) -> dict[str, Any]:
        held = asdict(self)
        return {**held, "folder": str(self.folder), "path": str(self.path)}


Written = tuple[File, bool, list[str]]  # the file, whether its batch is free, notes


def write(format: str, model: nn.Module, call: Call, folder: Path) -> tuple[Written, Captured | None]:
    """The file of one format into a folder that is there, and the program that was written, where there is one.
    Raises ModelError or CaptureError: it cannot be written."""
    if format == "hf":
        file, notes = to_hf.write(model, call, folder)
        return (file, True, notes), None
    captured = capture(model, *call, fixed=format == "executorch")
    path, notes = folder / NAMES[format], []
    if format == "executorch":
        file, notes = to_executorch.write(captured, path)
        notes = [*notes, "memory is planned for the batch of the example inputs, and no other is taken"]
    else:
        file = {"onnx": to_onnx.write, "openvino": to_openvino.write, "pt2": to_pt2.write}[format](captured, path)
    if not captured.dynamic and format != "executorch":
        notes.append("torch.export could not keep the batch free: the file takes that of the example inputs")
    fewest, most = captured.lengths
    if fewest > 2:
        notes.append(f"rows of fewer than {fewest} tokens are not taken")
    if 0 < most < 2**31:
        notes.append(f"a row has {most:.0f} tokens at most")
    if not most and tokens_of(call) is not None:
        notes.append(f"a row has {tokens_of(call)} tokens, no more and no less, as the inputs have; --input 1x128:int64<1000 sets another length")
    return (file, captured.dynamic, notes), captured


def export(
    format: str, model: nn.Module, call: Call, folder: str | Path, *, dense: nn.Module | None = None, how: How | None = None,
    progress: Callable[[str], None] | None = None,
) -> Exported:  # fmt: skip
    """Write, check and measure one export; `folder` is replaced once all of it has worked, and left alone otherwise.

    Raises: as the functions of `secateur.export`.
    """
    how, folder, say = how or How(), Path(folder), progress or (lambda stage: None)
    if format not in NAMES:
        raise InputError(f"unknown format {format!r}.\n  There are: {', '.join(NAMES)}.")
    how.check()
    args, kwargs = inputs_on(model, *call)
    check_inputs(args, kwargs)
    exportable(model)
    if os.path.isfile(folder / MARK):  # not an error for a name that no folder can have, which is told when it is written
        raise InputError(f"{folder} holds a pruned model.\n  Choose another folder for the export: -o DIR.")
    made: list[Exported] = []

    def fill(fresh: Path) -> None:
        say(f"write {format}")
        (file, dynamic, notes), captured = write(format, model, (args, kwargs), fresh)
        files = _files(fresh)
        calls = list(how.calls) or calls_of(args, kwargs, how.batches)
        calls += other_lengths(calls[0], captured.lengths if captured is not None else None)
        if not dynamic:  # of the calls given those of the batch that is written in
            calls = [c for c in how.calls if batch_of(*c) == batch_of(args, kwargs)] or [(args, kwargs)]
            if (left := len(how.calls) - len(calls)) > 0:
                notes = [*notes, f"not checked with {left} of the inputs given, which have another batch than the file"]
        calls, said = runnable(model, calls)
        say("run it in a fresh process")
        try:
            done, rows = checked(model, file, calls, how.tolerance)
        except ModelError as error:
            raise _located(error, captured) from error
        bytes_ = sum(entry["bytes"] for entry in files.values())
        notes += said
        beside = _measured(format, (file, done.peak_bytes), dense, calls[0], (how, notes, say))
        found = Exported(
            folder, folder / file.path.name if format != "hf" else folder, format, done.version, dynamic, file.inputs, rows, bytes_,
            idle_bytes=done.idle_bytes, notes=[*notes, *zeros_note(model, fresh)], **beside,
        )  # fmt: skip
        made.append(found)
        (fresh / FACTS).write_text(json.dumps(_document(found, files, accepted(model, how.tolerance), how.threads), indent=1) + "\n")

    replace_folder(folder, fill, {FACTS: FORMAT})
    return made[0]


def _files(folder: Path) -> dict[str, dict[str, Any]]:
    found = (path for path in sorted(folder.rglob("*")) if path.is_file())
    return {path.relative_to(folder).as_posix(): {"bytes": path.stat().st_size, "sha256": sha256(path)} for path in found}


def _measured(format: str, pruned: tuple[File, int], dense: nn.Module | None, call: Call, rest: tuple[How, list[str], Callable]) -> dict[str, Any]:
    """Latency, peak memory and bytes beside the dense model's, which is written the same way to a place that does not last."""
    (file, peak), (how, notes, say) = pruned, rest
    if dense is None:
        say("time it")
        alone = race({"pruned": file}, call, threads=how.threads, rounds=how.rounds) if how.rounds else None
        return {"seconds": alone, "peak_bytes": {"pruned": peak}}
    with TemporaryDirectory(prefix="secateur-dense-", ignore_cleanup_errors=True) as folder:
        try:
            say(f"write the dense model as {format}")
            (other, _, _), _ = write(format, dense, call, Path(folder))
            say("time both in turns")
            done = run(other, [call])
            seconds = race({"dense": other, "pruned": file}, call, threads=how.threads, rounds=how.rounds) if how.rounds else None
        except SecateurError as error:
            notes.append(f"the dense model could not be measured beside it: {str(error).splitlines()[0]}")
            return _measured(format, pruned, None, call, rest)
        size = sum(p.stat().st_size for p in Path(folder).rglob("*") if p.is_file())
    return {"seconds": seconds, "peak_bytes": {"dense": done.peak_bytes, "pruned": peak}, "dense_bytes": size}


def _located(error: ModelError, captured: Captured | None) -> ModelError:
    """The error with the operators that it speaks of and their layers."""
    where = (named(str(error), captured.program) or named_within(str(error), captured.program)) if captured is not None else ""
    return ModelError(f"{error}\n  It speaks of {where}." if where else str(error))


def _document(found: Exported, files: Mapping[str, Any], tolerance: float, threads: int) -> dict[str, Any]:
    facts = {k: v for k, v in found.to_json().items() if k not in ("folder", "path")}
    return {
        **facts, "export": found.format, "format": FORMAT, "files": files, "tolerance": tolerance, "threads": threads,
        "versions": {name: version(name) for name in ("torch", "numpy")},
    }  # fmt: skip


def zeros_note(model: nn.Module, folder: Path) -> list[str]:
    """What zeros among the weights mean for the file: they are stored, and only packing the file saves their bytes."""
    tensors = [p.detach() for p in model.parameters() if p.dim() > 1]
    size, zero = sum(t.numel() for t in tensors), sum(int((t == 0).sum()) for t in tensors)
    if not size or zero < 0.05 * size:
        return []
    whole, packed = 0, 0
    for path in folder.rglob("*"):
        if path.is_file():
            deflate = zlib.compressobj(6)
            with path.open("rb") as file:
                while piece := file.read(2**20):
                    whole, packed = whole + len(piece), packed + len(deflate.compress(piece))
            packed += len(deflate.flush())
    return [
        f"{100 * zero / size:.0f} % of the weights are zero and stored as such: {whole:,} bytes, {packed:,} deflated. "
        "The runtime multiplies by them; `secateur run` times layers that do not"
    ]
