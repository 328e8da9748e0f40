"""What the commands of the command line share: their options, and how they begin and end."""

from __future__ import annotations

import json
import shlex
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from typing import Annotated, Any

import typer

from secateur import terminal
from secateur.models import Data, load_data
from secateur.models.example import parse_input
from secateur.models.text import LENGTH, SAMPLES, is_text, text_data

Model = Annotated[str, typer.Argument(metavar="MODEL", show_default=False, help=(
    "pkg.mod:factory, file.py:factory, torchvision/NAME, timm/NAME, hf/TYPE, hf/FOLDER, FILE.pt2, or a saved folder"
))]  # fmt: skip
Weights = Annotated[str | None, typer.Option(help="Safetensors, or a state dict without code in it.")]
Inputs = Annotated[list[str] | None, typer.Option("--input", help="Shape of an input, 1x3x224x224; repeatable.")]
Source = Annotated[str | None, typer.Option("--data", metavar="DATA", help=(
    "digits, imagefolder:DIR, npz:FILE, safetensors:FILE, pkg.mod:function; text:FILE with hf/FOLDER"
))]  # fmt: skip
Ignore = Annotated[list[str] | None, typer.Option(help="Module, parameter or group that keeps its shape; repeatable.")]
Seed = Annotated[int, typer.Option(min=-(2**63), max=2**63 - 1, help="Of random weights, random scores and the split of the data.")]
Score = Annotated[str, typer.Option(help="A criterion; `secateur explain` lists them. auto: obs with DATA, else l2.")]
Allocation = Annotated[str, typer.Option(help=(
    "search, curves or sensitivity (with the score obs), global or uniform. auto: search with obs, else global."
))]  # fmt: skip
Repair = Annotated[str, typer.Option(help="gauss_newton, least_squares, bias, batch_norm or none. auto: gauss_newton with DATA, else none.")]
Depth = Annotated[bool, typer.Option("--depth", help="Whole residual blocks may go too.")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON document instead of tables.")]
Debug = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")]


def command_line(context: typer.Context) -> str:
    """The line that was typed, as a shell takes it."""
    return shlex.join(["secateur", *(context.obj or ())])


def given_data(
    data: str | None, inputs: Sequence[str] | None, seed: int, model: str, windows: tuple[int, int] = (SAMPLES, LENGTH)
) -> tuple[Data | None, list[Any]]:  # fmt: skip
    """The data set, where one is named, and the inputs as tensors. `windows`: of text, how many and how long."""
    given = [parse_input(text) for text in inputs or ()]
    if data and is_text(data):
        return text_data(data, model, *windows, seed), given
    return (load_data(data, seed=seed) if data else None), given


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


def show(facts: dict[str, Any]) -> None:
    print(json.dumps(facts, indent=1, default=str))
