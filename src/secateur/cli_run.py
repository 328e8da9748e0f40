"""The command that runs a sparse model with sparse layers: `secateur run`."""

from __future__ import annotations

from typing import Annotated, Any

import torch
import typer
from torch import Tensor, fx
from torch.utils._pytree import tree_map_only

from secateur import job, terminal
from secateur.errors import InputError
from secateur.measure.latency import using_threads
from secateur.measure.run import batch_of
from secateur.models import load_model
from secateur.runtime import convert
from secateur.shell import Debug, Inputs, Json, Model, Source, Weights, given_data, show, working


def run(  # noqa: PLR0913  # a command's parameters are its options
    model: Model,
    threads: Annotated[int, typer.Option(min=1, help="Threads of the timed runs.")] = 1,
    batch: Annotated[int | None, typer.Option(min=1, help="Rows of a batch; as the inputs have them without it.")] = None,
    rounds: Annotated[int, typer.Option(min=3, help="Timed runs each way.")] = 15,
    fold: Annotated[bool, typer.Option("--fold", help="Take batch norms and rectifiers into layers first; always so for a folder's graph.")] = False,
    factory: Annotated[str | None, typer.Option(metavar="FUNCTION", help="Builds the dense model of a folder without a graph.")] = None,
    data: Source = None,
    weights: Weights = None,
    inputs: Inputs = None,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Time a model whose weights have zeros, dense and with sparse layers where they are quicker here, layer by layer."""
    with working(as_json) as say:
        held, given = given_data(data, inputs, 0, model)
        say("load")
        loaded = load_model(model, weights, factory=factory)
        args, kwargs = job.example_inputs(loaded, held, given)
        if batch is not None:
            args, kwargs = of_rows(args, kwargs, batch)
        say("time every layer both ways")
        with using_threads(threads):
            found = convert(loaded.model, args, kwargs, rounds=rounds, fold=fold or isinstance(loaded.model, fx.GraphModule))
    if as_json:
        show({"model": model, "batch": batch_of(args, kwargs), **found.to_json()})
    else:
        terminal.converted(model, found, batch_of(args, kwargs))


def of_rows(args: tuple, kwargs: dict[str, Any], batch: int) -> tuple[tuple, dict[str, Any]]:
    """Inputs with `batch` rows, the rows given over and over.

    Raises:
        InputError: the inputs have no rows.
    """
    rows = batch_of(args, kwargs)
    if not rows:
        raise InputError(f"--batch {batch}: the inputs have no dimension for a batch.\n  Leave --batch out.")

    def repeated(t: Tensor) -> Tensor:
        return torch.cat([t] * -(-batch // rows))[:batch] if t.dim() and len(t) == rows else t

    return tree_map_only(Tensor, repeated, (args, kwargs))
