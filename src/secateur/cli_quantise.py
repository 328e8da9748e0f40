"""The command that makes int8 files: `secateur quantise`."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer
from torch import nn

from secateur import job, terminal
from secateur.errors import InputError
from secateur.figures import percent, seconds, size
from secateur.models import load_model
from secateur.models.atomic import MARK
from secateur.models.data import Data
from secateur.quantise import How, Quantised
from secateur.quantise import quantise as quantised
from secateur.shell import Debug, Inputs, Json, Model, Seed, Source, Weights, given_data, show, working


def quantise(  # noqa: PLR0913  # a command's parameters are its options
    model: Model,
    data: Source = None,
    dense: Annotated[str | None, typer.Option(metavar="MODEL", help="The model before pruning, to see what int8 alone would do.")] = None,
    dense_weights: Annotated[str | None, typer.Option(metavar="FILE", help="Safetensors, or a state dict without code in it.")] = None,
    out: Annotated[str | None, typer.Option("--out", "-o", metavar="FOLDER", help="Folder for the result; FOLDER-int8 without it.")] = None,
    runtime: Annotated[str, typer.Option(metavar="NAME", help="onnxruntime or openvino.")] = "onnxruntime",
    kind: Annotated[str, typer.Option(metavar="NAME", help="static: activations too, by calibration; weights: weights alone.")] = "static",
    ranges: Annotated[str | None, typer.Option(metavar="NAME", help=(
        "Of activations: minmax or percentile, entropy (onnxruntime) or mean_minmax (openvino); minmax without it."
    ))] = None,
    rows: Annotated[int, typer.Option(min=1, help="Rows of the training part of DATA to calibrate with, at most.")] = 300,
    threads: Annotated[int, typer.Option(min=1, help="Threads of the timed runs.")] = 1,
    rounds: Annotated[int, typer.Option(min=2, help="Timed runs.")] = 20,
    factory: Annotated[str | None, typer.Option(metavar="FUNCTION", help="Builds the dense model of a folder without a graph.")] = None,
    weights: Weights = None,
    inputs: Inputs = None,
    seed: Seed = 0,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Make an int8 file, calibrated on the training part of DATA, and measure it on the test part beside float32 and the dense model."""
    how = How(runtime, kind, ranges, rows, threads, rounds)
    how.check()
    if dense_weights and dense is None:
        raise InputError("--dense-weights without the model that they belong to.\n  Add --dense MODEL.")
    if data is None:
        raise InputError("quantise calibrates and measures on rows, and there are none.\n  Add --data DATA; labels are used where there are some.")
    folder = _folder(out, model)
    with working(as_json) as say:
        held, given = given_data(data, inputs, seed, model)
        assert held is not None
        say("load")
        loaded = load_model(model, weights, factory=factory, seed=seed)
        call = job.example_inputs(loaded, held, given)
        other = load_model(dense, dense_weights, seed=seed).model if dense else None
        done = quantised(loaded.model, call, _cast(loaded.model, held), folder, dense=other, how=how, progress=say)
    if as_json:
        show({"model": model, **done.to_json()})
    else:
        printed(model, done, folder)
        if other is None and (Path(model) / MARK).is_file():
            terminal.out().print("add --dense MODEL, the model before pruning, to see what int8 alone would do", markup=False)


def _folder(out: str | None, model: str) -> str:
    if out is None and not Path(model).is_dir():
        raise InputError(f"{model} is no folder that the result could be named after.\n  Add -o FOLDER.")
    return out or f"{model.rstrip('/')}-int8"


def _cast(model: nn.Module, data: Data) -> Data:
    """The data in the dtype of the model."""
    return replace(data, train=job.Cast(model, data.train), test=job.Cast(model, data.test))


def printed(name: str, done: Quantised, folder: str) -> None:
    """One row for every model and precision, and what that means."""
    first, console = done.rows[0], terminal.out()
    labelled, against = first.accuracy is not None, first.accuracy is None and first.against_dense is not None
    sparse = any(row.zeros >= 0.05 * row.weights for row in done.rows)
    table = terminal.Table("", title=f"{name}: int8 by {done.how.runtime}, {done.how.kind}", title_justify="left")
    optional = [("accuracy", labelled), ("error", True), ("to dense", against)]
    for head in [*(head for head, shown in optional if shown), "bytes", "of it", "latency", "of it", *(["zeros"] if sparse else [])]:
        table.add_column(head, justify="right")
    for row in done.rows:
        cells = [percent(row.accuracy)] if row.accuracy is not None else []
        cells += [percent(row.error) if row.int8 else ""]
        cells += [percent(row.against_dense)] if against and row.against_dense is not None else []
        cells += [size(row.bytes), f"{row.bytes / first.bytes:.0%}", seconds(row.seconds.median), f"{row.ratio:.0%}"]
        table.add_row(row.name, *cells, *([f"{row.zeros / max(1, row.weights):.0%}"] if sparse else []))
    console.print(table)
    timed = first.seconds
    console.print(
        f"error: how far outputs are from those of the same model in float32{'; to dense: from those of the dense model' if against else ''}\n"
        f"latency: {done.runtime}, batch of {timed.batch}, {timed.threads} threads, medians of {timed.rounds} rounds in turns\n"
        f"calibrated on {done.calibration_rows} training rows, measured on {done.test_rows} test rows", markup=False,
    )  # fmt: skip
    for text in done.verdict:
        console.print(text, markup=False)
    for text in done.warnings:
        console.print(f"warning: {text}", markup=False)
    for text in done.notes:
        console.print(f"note: {text}", markup=False)
    console.print(f"saved: {folder}", markup=False, soft_wrap=True)
