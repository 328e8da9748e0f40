"""What the commands of the command line share: their options, and how they begin and end."""

from __future__ import annotations

import json
import shlex
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from dataclasses import replace
from typing import Annotated, Any

import typer

from secateur import terminal
from secateur.errors import InputError
from secateur.models import Data, load_data
from secateur.models.data import rows_of
from secateur.models.example import parse_input
from secateur.models.text import LENGTH, SAMPLES, is_text, text_data
from secateur.processes import Alone, Shared, launched, started


def _whole(text: str) -> int:
    """A seed as torch takes one: any whole number of 64 bits."""
    try:
        seed = int(text)
    except ValueError:
        raise typer.BadParameter(f"{text!r} is not a whole number.") from None
    if not -(2**63) <= seed < 2**63:
        raise typer.BadParameter(f"{text} is not within 64 bits.")
    return seed


Model = Annotated[str, typer.Argument(metavar="MODEL", show_default=False, help=(
    "pkg.mod:factory, file.py:factory, torchvision/NAME, timm/NAME, hf/TYPE, hf/FOLDER, FILE.pt2, or a saved folder"
))]  # fmt: skip
Weights = Annotated[str | None, typer.Option(metavar="FILE", help="Safetensors, or a state dict without code in it.")]
Inputs = Annotated[list[str] | None, typer.Option("--input", metavar="SHAPE", help="Shape of an input, 1x3x224x224; repeatable.")]
Source = Annotated[str | None, typer.Option("--data", metavar="DATA", help=(
    "digits, imagefolder:DIR, npz:FILE, safetensors:FILE, file.py:function; text:FILE with hf/FOLDER"
))]  # fmt: skip
Rows = Annotated[int | None, typer.Option(min=1, help="Rows of the training part of DATA to calibrate with, at most.")]
Only = Annotated[list[str] | None, typer.Option(metavar="NAME", help=(
    "Group or module that alone may lose units, or neurons: hidden units of linear layers; repeatable."
))]  # fmt: skip
Ignore = Annotated[list[str] | None, typer.Option(metavar="NAME", help="Module, parameter or group that keeps its shape; repeatable.")]
Seed = Annotated[int, typer.Option(parser=_whole, metavar="NUMBER", help="Of random weights, random scores and the split of the data.")]
Score = Annotated[str, typer.Option(metavar="NAME", help="A criterion; `secateur explain` lists them. auto: obs with DATA, else l2.")]
Allocation = Annotated[str, typer.Option(metavar="NAME", help=(
    "search, curves or sensitivity (with the score obs), global or uniform. auto: search with obs, else global."
))]  # fmt: skip
Repair = Annotated[str, typer.Option(metavar="NAME", help=(
    "gauss_newton, least_squares, bias, batch_norm or none. auto: gauss_newton with DATA, else none."
))]  # fmt: skip
Depth = Annotated[bool, typer.Option("--depth", help="Whole residual blocks may go too.")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON document instead of tables.")]
Debug = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")]


def command_line(context: typer.Context) -> str:
    """The line that was typed, as a shell takes it."""
    return shlex.join(["secateur", *(context.obj or ())])


def given_data(
    data: str | None, inputs: Sequence[str] | None, seed: int, model: str, windows: tuple[int, int] = (SAMPLES, LENGTH), rows: int | None = None
) -> tuple[Data | None, list[Any]]:  # fmt: skip
    """The data set, where one is named, and the inputs as tensors. Its rows are split the same way by every command, whatever its seed, so that
    none measures on rows that another one trained on; `seed` chooses windows of text. `windows`: of text, how many and how long. `rows`: of
    its training part, at most."""
    given = [parse_input(text) for text in inputs or ()]
    if not data:
        return None, given
    held = text_data(data, model, *windows, seed) if is_text(data) else load_data(data)
    if held.test is held.train:
        terminal.error(f"--data {data} returned one set of batches: figures are of the rows that were calibrated or trained on.\n"
                       "  Return (train batches, test batches) for figures of others.")  # fmt: skip
    return (held if rows is None else replace(held, name=f"{held.name}, {rows} rows", train=rows_of(held.train, 0, rows))), given


@contextmanager
def working(as_json: bool) -> Iterator[Any]:
    """The stages of the work. With --json standard output holds one document: what a user's code prints goes to
    standard error."""
    with terminal.stages() as say:
        if not as_json:
            yield say
            return
        with redirect_stdout(sys.stderr):
            yield say


@contextmanager
def sharing(as_json: bool) -> Iterator[tuple[Any, Alone]]:
    """`working`, in each of the processes that `torchrun` started, and those processes. The first alone shows the stages."""
    with started() as processes:
        if processes.rank == 0:
            with working(as_json) as say:
                yield say, processes
        else:
            with redirect_stdout(sys.stderr):
                yield (lambda stage: None), processes


def shared(data: Data | None, processes: Alone) -> Data | None:
    """A data set that every one of the processes runs its share of.

    Raises:
        InputError: there is nothing to share.
    """
    if processes.world == 1:
        return data
    if data is None:
        raise InputError("several processes share the calibration data, and there is none.\n  Add --data DATA, or leave torchrun out.")
    test = Shared(data.test, processes) if data.labelled else data.test
    return replace(data, train=Shared(data.train, processes), test=test)


def by_one(what: str) -> None:
    """
    Raises:
        InputError: several processes were started for the work of one.
    """
    if launched() > 1:
        raise InputError(f"{what} is the work of one process, and torchrun started {launched()}.\n  Leave torchrun out.")


def show(facts: dict[str, Any]) -> None:
    print(json.dumps(facts, indent=1, default=str))
