"""The command that trains a pruned model back: `secateur recover`."""

from __future__ import annotations

import os
import shutil
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer
from torch import nn

from secateur import terminal
from secateur.errors import DataError, InputError
from secateur.job import Cast
from secateur.models import load_model
from secateur.models.data import Batches
from secateur.models.folder import read, save_trained
from secateur.models.quality import accuracy
from secateur.plan import Plan
from secateur.recover import Training
from secateur.recover import recover as trained
from secateur.recover.checkpoint import state_of
from secateur.shell import Debug, Json, Seed, Source, given_data, show, working


def recover(  # noqa: PLR0913  # a command's parameters are its options
    folder: Annotated[str, typer.Argument(metavar="FOLDER", show_default=False, help="What `prune -o` or `mask -o` wrote.")],
    data: Source = None,
    epochs: Annotated[float, typer.Option(min=0, help="Passes over the training part of the data.")] = 10.0,
    teacher: Annotated[str | None, typer.Option(metavar="MODEL", help="The dense model; its outputs are learned too.")] = None,
    teacher_weights: Annotated[str | None, typer.Option(help="Safetensors, or a state dict without code in it.")] = None,
    factory: Annotated[str | None, typer.Option(help="Builds the dense model of a folder without a graph.")] = None,
    out: Annotated[str | None, typer.Option("--out", "-o", help="Folder for the result; FOLDER-recovered without it.")] = None,
    lr: Annotated[float | None, typer.Option(help="Highest learning rate; without it 0.02 (SGD) or 3e-4 (AdamW) for a batch of 128.")] = None,
    batch: Annotated[int, typer.Option(min=1, help="Rows of a step, of all processes together.")] = 128,
    train: Annotated[str, typer.Option(help="all, or norms: norms and biases alone.")] = "all",
    distil: Annotated[float, typer.Option(min=0, max=1, help="Share of the loss that comes from the teacher.")] = 0.9,
    features: Annotated[float, typer.Option(min=0, help="Weight of the distance between inner outputs of teacher and model.")] = 0.0,
    ema: Annotated[float | None, typer.Option(help="Decay of a moving average of the weights, such as 0.999.")] = None,
    augment: Annotated[str, typer.Option(help="none, flip or flip_crop, for images.")] = "none",
    precision: Annotated[str, typer.Option(help="float32 or bfloat16.")] = "float32",
    channels_last: Annotated[bool, typer.Option("--channels-last", help="The layout of images while training.")] = False,
    shard: Annotated[bool, typer.Option("--shard", help="With torchrun: spread the weights over the processes.")] = False,
    seed: Seed = 0,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Train a pruned model back; its widths and its zeros stay. Goes on after a kill; `torchrun -m secateur recover ...` shares the work."""
    how = Training(epochs, batch, lr, train=train, distil=distil, features=features, ema=ema, precision=precision, channels_last=channels_last,
                   augment=augment, seed=seed, shard=shard)  # fmt: skip
    if data is None:
        raise InputError("recover needs data to train on.\n  Add --data DATA.")
    main, to = int(os.environ.get("RANK", "0")) == 0, Path(out or f"{folder.rstrip('/')}-recovered")
    with working(as_json or not main) as say:
        held, _ = given_data(data, None, seed, folder)
        assert held is not None
        how = how if isinstance(held.train, Batches) else replace(how, batch=None)
        say("load")
        saved, model = read(folder), load_model(folder, factory=factory).model
        dense = None if teacher is None else load_model(teacher, teacher_weights).model
        if not held.labelled and dense is None:
            raise DataError(f"--data {data} has no labels.\n  Add --teacher MODEL, whose outputs are learned then, or data with labels.")
        test = Cast(model, held.test) if held.labelled else None
        before = _accuracy(model, test)
    found = _trained(model, held, how, (Plan.from_json(saved.document["plan"]), dense, to), not as_json and main)
    state = state_of(model)  # of weights spread over processes, all of them have to take part
    accuracies = {**before, **_accuracy(model, test, "recovered")}
    facts = {**found.to_json(), "training": how.to_json(), "teacher": teacher, "data": data, "accuracy": accuracies}
    if main:
        save_trained(saved, state, to, facts)
        shutil.rmtree(_steps(to), ignore_errors=True)
        if as_json:
            show({"folder": str(to), **facts})
        else:
            terminal.recovered(str(to), facts)


def _steps(to: Path) -> Path:
    """Where checkpoints lie while a folder is made."""
    return to.parent / f".{to.name}.training"


def _accuracy(model: nn.Module, test: Any, name: str = "pruned") -> dict[str, float]:
    return {} if test is None else {name: accuracy(model, test)}


def _trained(model: nn.Module, held: Any, how: Training, given: tuple[Plan, nn.Module | None, Path], shown: bool) -> Any:
    plan, dense, to = given
    with terminal.bar("training") if shown else nullcontext() as moved:
        return trained(model, held.train, how, plan=plan, teacher=dense, folder=_steps(to), progress=_moving(moved) if moved else None)


def _moving(moved: Any) -> Any:
    return lambda step, steps, loss: moved(step, steps)
