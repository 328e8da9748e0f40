"""The command that tries all ways of pruning: `secateur advise`."""

from __future__ import annotations

import time
from typing import Annotated

import typer

from secateur import advise as advisor
from secateur import job, terminal
from secateur.advise.run import HELD_OUT, ROWS
from secateur.advise.table import show as show_advice
from secateur.endings import INTERRUPTED
from secateur.errors import InputError
from secateur.models import load_model
from secateur.shell import Debug, Ignore, Inputs, Json, Model, Seed, Source, Weights, given_data, show, working


def advise(  # noqa: PLR0913  # a command's parameters are its options
    model: Model,
    data: Source = None,
    out: Annotated[str | None, typer.Option("--out", "-o", metavar="FOLDER", help=(
        "Folder for advise.json, the report and every model; what lies there is taken up."
    ))] = None,
    minutes: Annotated[float, typer.Option(help="Time for all of it; what is not reached is listed as not tried.")] = 15.0,
    lose: Annotated[float, typer.Option(help="Points of accuracy (of agreement, without labels) that may be lost, for the verdict.")] = 1.0,
    rows: Annotated[int, typer.Option(min=1, help="Rows of the training part of DATA to calibrate with.")] = ROWS,
    held_out: Annotated[int, typer.Option("--held-out", min=1, help="Rows of the test part of DATA to compare on.")] = HELD_OUT,
    runtime: Annotated[list[str] | None, typer.Option(metavar="NAME", help="torch, torch.compile, onnxruntime or openvino; repeatable.")] = None,
    threads: Annotated[int, typer.Option(min=1, help="Threads of the timed runs.")] = 1,
    batch: Annotated[int | None, typer.Option(min=1, help="Rows of a timed call; as the inputs have them without it.")] = None,
    ignore: Ignore = None,
    seed: Seed = 0,
    weights: Weights = None,
    inputs: Inputs = None,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Try weights, neurons, structures, patterns and int8 at a few budgets on this machine, and show which pays."""
    settings = advisor.Settings(minutes, held_out, threads, batch, tuple(runtime or ()), lose, time.monotonic())
    settings.check()
    if data is None:
        raise InputError("advise compares models on rows, and there are none.\n  Add --data DATA; labels are used where there are some.")
    with working(as_json) as say:
        held, given = given_data(data, inputs, seed, model)
        assert held is not None
        say("load")
        loaded = load_model(model, weights, seed=seed)
        example = job.example_inputs(loaded, held, given)
        source = advisor.Source(model, data, rows, seed, weights, tuple(inputs or ()), tuple(ignore or ()))
        done = advisor.advise(loaded, example, held, source, settings, out=out, progress=say)
    if as_json:
        show(done.to_json())
    else:
        show_advice(done, terminal.out())
    if not done.finished:
        raise typer.Exit(INTERRUPTED)
