"""The command that writes a model for another runtime: `secateur export`."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table
from torch import nn

from secateur import job, terminal
from secateur.errors import InputError, SecateurError
from secateur.export import BATCHES, NAMES, Exported, How, to
from secateur.figures import percent, seconds, size
from secateur.measure.run import like
from secateur.models import Data, LoadedModel, load, load_model
from secateur.models.atomic import MARK
from secateur.models.folder import read as read_folder
from secateur.report.files import read
from secateur.shell import Debug, Inputs, Json, Model, Source, Weights, given_data, show, working

WITHOUT_CODE = ("hf/", "torchvision/", "timm/")  # models that a folder may name: loading them runs no file of its choosing


def export(  # noqa: PLR0913  # a command's parameters are its options
    model: Model,
    format: Annotated[str, typer.Option("--to", metavar="FORMAT", help="onnx, openvino, executorch, pt2 or hf.")],
    out: Annotated[str | None, typer.Option("--out", "-o", help="Folder for the file; MODEL-FORMAT without it.")] = None,
    dense: Annotated[str | None, typer.Option(metavar="MODEL", help=(
        "The dense model, to be timed beside; without it the one that a folder's report names, where no code has to run for that."
    ))] = None,
    factory: Annotated[str | None, typer.Option(metavar="FUNCTION", help="Builds the dense model of a folder without a graph.")] = None,
    tolerance: Annotated[float | None, typer.Option(min=0, help="Largest deviation over the largest output; 1e-4 without it.")] = None,
    threads: Annotated[int, typer.Option(min=1, help="Threads of the timed runs.")] = 1,
    rounds: Annotated[int, typer.Option(min=0, help="Timed rounds, dense and pruned in turns; 0 times nothing.")] = 20,
    data: Source = None,
    weights: Weights = None,
    inputs: Inputs = None,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Write a model for another runtime, run it there in a fresh process, compare it with torch, and time it."""
    if format not in NAMES:
        raise InputError(f"--to {format}: there is no such format.\n  There are: {', '.join(NAMES)}.")
    how = How(tolerance, threads, rounds)
    how.check()
    with working(as_json) as say:
        held, given = given_data(data, inputs, 0, model)
        say("load")
        beside, notes = _dense(model, dense)
        loaded = _loaded(model, weights, factory, (dense or _recorded(model)) if format == "hf" and beside is not None else None)
        args, kwargs = job.example_inputs(loaded, held, given)
        calls = _rows(loaded, held) if held is not None and not given else ()
        place = out or _beside(model, format)
        done = to(format, loaded.model, (args, kwargs), place, dense=beside, how=replace(how, calls=calls), progress=say)
    if as_json:
        show({"model": model, **done.to_json(), "notes": [*notes, *done.notes]})
    else:
        exported(model, done, notes)


def _loaded(model: str, weights: str | None, factory: str | None, dense: str | None) -> LoadedModel:
    """The model; of a folder, in the class of the dense model where that is needed and given."""
    if dense is None or factory is not None or not (Path(model) / MARK).is_file():
        return load_model(model, weights, factory=factory)
    args, kwargs = read_folder(model).example_inputs()
    return LoadedModel(load(model, lambda: load_model(dense).model), args, model, kwargs)


def _dense(model: str, dense: str | None) -> tuple[nn.Module | None, list[str]]:
    """The model to time beside, and what became of the one that the folder's report names."""
    if dense is not None:
        return load_model(dense).model, []
    name = _recorded(model)
    if name is None:
        return None, []
    try:
        return load_model(name).model, []
    except SecateurError:
        return None, [f"the dense model, {name}, could not be loaded from here; --dense MODEL times it beside"]


def _recorded(model: str) -> str | None:
    """The name of the dense model in a folder's report, where loading it runs no code of the report's choosing."""
    try:
        name = str(read(model).get("model"))
    except SecateurError:
        return None
    return name if name.startswith(WITHOUT_CODE) else None


def _rows(loaded: LoadedModel, held: Data) -> tuple[Any, ...]:
    """Rows of the data as calls of several sizes."""
    return tuple(like(loaded.model, held.example(n)) for n in BATCHES)


def _beside(model: str, format: str) -> str:
    """out/ is exported to out-onnx, pkg.mod:factory to factory-onnx."""
    path = model.rstrip("/")
    return f"{path}-{format}" if (Path(path) / MARK).is_file() else f"{path.split(':')[-1].split('/')[-1].removesuffix('.pt2')}-{format}"


def exported(name: str, done: Exported, notes: list[str]) -> None:
    """What was written, how far it is from the model, and what it takes."""
    console = terminal.out()
    title = f"{name} in {done.runtime}"
    sides = [side for side in ("dense", "pruned") if side in done.peak_bytes]
    table = Table("figure", *sides, title=title, title_justify="left")
    heads = {"dense": done.dense_bytes, "pruned": done.bytes}
    table.add_row("bytes of the files", *(size(heads[side] or 0) for side in sides))
    table.add_row("peak memory of the process", *(size(done.peak_bytes[side]) if done.peak_bytes[side] else "not known" for side in sides))
    if done.seconds is not None:
        first = done.seconds.seconds["pruned"]
        table.add_row(f"latency, batch of {first.batch}", *(seconds(done.seconds.seconds[side].median) for side in sides))
        if "dense" in sides:
            table.add_row("of the dense model's, round by round", percent(1), percent(done.seconds.ratio["pruned"]))
        table.caption = f"{first.rounds} rounds in turns, {first.threads} threads; the runtime alone takes {size(done.idle_bytes)}"
    console.print(table)
    for row in done.deviations:
        tokens = f" of {row.tokens} tokens" if row.tokens else ""
        console.print(f"largest deviation from the model, batch of {row.batch}{tokens}: {row.absolute:.1e}, {row.relative:.1e} of the largest output")
    for note in [*notes, *done.notes]:
        console.print(f"note: {note}", markup=False)
    console.print(f"written: {done.path}", markup=False, soft_wrap=True)
