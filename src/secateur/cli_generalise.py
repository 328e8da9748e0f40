"""The command that measures whether pruning helps on new rows: `secateur generalise`.

For every seed and every share of the weights that stays: the given model is masked, trained on, and measured on rows that it
was not trained on. The dense model trained on for as many epochs is what the pruned ones are compared with, seed by seed.
"""

from __future__ import annotations

import copy
import hashlib
import json
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from fractions import Fraction
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.table import Table
from torch import Tensor, nn

from secateur import job, terminal
from secateur.errors import DataError, FormatError, InputError, ModelError
from secateur.masks import find
from secateur.measure.run import like
from secateur.models import Data, LoadedModel, load_model
from secateur.models.atomic import sync
from secateur.models.data import Batches
from secateur.pattern import share
from secateur.recover.generalise import generalisation, interval, paired
from secateur.recover.loop import Training, recover
from secateur.shell import Debug, Inputs, Json, Model, Source, Weights, given_data, show, working
from secateur.sparsify import Sparse, sparsify

FILE = "generalise.json"
NOISE = (0.1, 0.2)
Row = dict[str, Any]


def generalise(  # noqa: PLR0913  # a command's parameters are its options
    model: Model,
    data: Source = None,
    keep: Annotated[str, typer.Option(help="Shares of the weights that stay, with commas; 100% is dense and always there.")] = "100%,50%,20%,10%,5%",
    epochs: Annotated[float, typer.Option(help="Passes over the training rows, of every row of the table.")] = 5.0,
    seeds: Annotated[int, typer.Option(min=1, help="Runs of every share, of the seeds 0, 1, ...; two at least for an interval.")] = 3,
    by: Annotated[str, typer.Option(help="How weights are chosen: magnitude, or another method of `secateur mask`.")] = "magnitude",
    lr: Annotated[float | None, typer.Option(help="Learning rate of the training; that of `secateur.recover` without it.")] = None,
    weights: Weights = None,
    inputs: Inputs = None,
    out: Annotated[str | None, typer.Option("--out", "-o", metavar="FOLDER", help=(
        f"Folder for {FILE}; rows that are there already are not run again."
    ))] = None,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Measure whether pruning helps on new rows: mask, train on, and compare with the dense model trained on as long."""
    shares, how = _shares(keep), _settings(model, data, (by, epochs, lr))
    with working(as_json) as say:
        held, given = given_data(data, inputs, 0, model)
        if held is None or not held.labelled:
            raise DataError(f"--data {data} has no labels, and training needs them.\n  Name a data set with labels, such as digits.")
        if held.test is held.train:
            raise DataError(f"--data {data} returned one set of batches, and the gap is that to other rows.\n  Return (train batches, test batches).")
        say("load")
        loaded = load_model(model, weights)
        study = Study(loaded, job.example_inputs(loaded, held, given), _cast(loaded.model, held), how)
        facts = study.run(shares, seeds, Path(out) if out is not None else None, say)
    if as_json:
        show(facts)
    else:
        printed(facts)
        if out is not None:
            terminal.out().print(f"written: {Path(out) / FILE}", soft_wrap=True)


def _shares(text: str) -> list[Fraction]:
    """The shares as exact numbers, the dense one first, each once.

    Raises:
        InputError: one of them is no share.
    """
    found = {share(part, dense=True) for part in text.split(",") if part.strip()}
    return sorted(found | {Fraction(1)}, reverse=True)


def _settings(model: str, data: str | None, how: tuple[str, float, float | None]) -> dict[str, Any]:
    """What all rows have in common. Raises InputError for what cannot be meant, before anything is loaded."""
    by, epochs, lr = how
    if data is None:
        raise InputError("generalise trains and measures, and no data is given.\n  Add --data, a data set with labels such as digits.")
    if not 0 < epochs < float("inf"):
        raise InputError(f"--epochs {epochs:g} is no length of training.\n  Write a number above 0, such as 5.")
    if lr is not None and not 0 < lr < float("inf"):
        raise InputError(f"--lr {lr:g} is no learning rate.\n  Write a number above 0, such as 0.01, or leave --lr out.")
    if by != "auto":
        find(by)
    return {"model": model, "data": data, "by": by, "epochs": epochs, "lr": lr, "noise": list(NOISE)}


# ---------------------------------------------------------------- the runs
@dataclass(frozen=True)
class Study:
    """A trained model, example inputs of it, data with labels in its dtype, and the settings of all rows."""

    loaded: LoadedModel
    inputs: tuple[tuple, dict[str, Any]]
    data: Data
    how: Mapping[str, Any]

    def run(self, shares: Sequence[Fraction], seeds: int, folder: Path | None, say: Callable[[str], None]) -> dict[str, Any]:
        """Settings, the model as given, one row for each seed and share, and a summary for each share. With `folder` the rows so
        far are written after every one, and those that are there are not run again.

        Raises:
            InputError: the folder holds rows with other settings. FormatError: it cannot be read or written.
        """
        settings = {**self.how, "state": _digest(self.loaded.model.state_dict().values()), "test_rows": _digest(_tensors(self.data.test)),
                    "train_rows": _digest(_tensors(self.data.train))}  # fmt: skip
        before = _read(folder, settings) if folder is not None else {}
        rows: list[Row] = list(before.get("rows", ()))
        facts = {"settings": settings, "given": before.get("given"), "rows": rows}
        if facts["given"] is None:
            say("the model as given")
            facts["given"] = generalisation(self.loaded.model, self.data, NOISE).to_json()
        for seed in range(seeds):
            for one in shares:
                if _row(rows, one, seed) is None:
                    say(f"{_percent(one)} of the weights, seed {seed}")
                    rows.append(self.row(one, seed))
                    _chance(rows)
                    if folder is not None:
                        _write(folder, facts)
        return {**facts, "summary": [summary(rows, one, seeds) for one in shares]}

    def row(self, one: Fraction, seed: int) -> Row:
        """Mask (unless all weights stay), train on, measure."""
        model, (args, kwargs) = self.loaded.model, self.inputs
        plan, kept, of = None, 1, 1
        if one == 1:
            model = _copied(model)
        else:
            read = self.data.train if _reads(self.how["by"]) else None
            result = sparsify(model, args, Sparse(one, self.how["by"], seed=seed), read, kwargs=kwargs)
            model, plan = result.model, result.plan
            kept, of = int(plan.why["kept"]), int(plan.why["of_weights"])
        done = recover(model, self.data.train, Training(epochs=self.how["epochs"], lr=self.how["lr"], seed=seed), plan=plan)
        return {"keep": _percent(one), "seed": seed, "stays": kept / of, **generalisation(done.model, self.data, NOISE, seed).to_json()}


def _chance(rows: list[Row]) -> None:
    """
    Raises:
        InputError: the last row is, to the bit, that of another seed: an interval over such seeds would be of no width, and say nothing.
    """
    *others, last = rows
    same = [r for r in others if r["keep"] == last["keep"] and all(r[part]["loss"] == last[part]["loss"] for part in ("train", "test"))]
    if same:
        raise InputError(f"seeds {same[0]['seed']} and {last['seed']} gave the same model with {last['keep']} of the weights: nothing is drawn.\n"
                         "  Give data whose order is drawn (a list of batches, or a DataLoader with shuffle=True), or --seeds 1.")  # fmt: skip


def _reads(by: str) -> bool:
    """Whether a method reads data."""
    return by == "auto" or find(by).needs != "weights"


def _copied(model: nn.Module) -> nn.Module:
    try:
        return copy.deepcopy(model)
    except Exception as error:  # whatever a user's __deepcopy__ raises
        raise ModelError(f"{type(model).__name__} cannot be copied: {error}.\n  It is trained several times: make it copy.deepcopy-able.") from error


def _cast(model: nn.Module, data: Data) -> Data:
    """The data in the dtype and on the device of the model; rows that can be shuffled still can be."""

    def one(part: Any) -> Any:
        part = _rows(part) if isinstance(part, (list, tuple)) else part
        return replace(part, inputs=like(model, part.inputs)) if isinstance(part, Batches) else job.Cast(model, part)

    return replace(data, train=one(data.train), test=one(data.test))


def _rows(part: Sequence[Any]) -> Any:
    """The rows of a list of batches of one form, so that every seed has an order of its own; the list where they have not."""
    if not all(isinstance(b, (tuple, list)) and len(b) == 2 and all(isinstance(t, Tensor) and t.dim() for t in b) for b in part):
        return part
    if len({(x.shape[1:], x.dtype, y.shape[1:], y.dtype) for x, y in part}) != 1:
        return part
    return Batches(torch.cat([x for x, _ in part]), torch.cat([y for _, y in part]), max(len(x) for x, _ in part))


def _percent(one: Fraction) -> str:
    return f"{float(100 * one):g}%"


# ---------------------------------------------------------------- the file
def _tensors(batches: Iterable[Any]) -> Iterable[Tensor]:
    for batch in batches:
        yield from batch


def _digest(tensors: Iterable[Any]) -> str:
    """A hash of the bytes of tensors: rows belong to one model and one set of test rows, whatever these are called."""
    found = hashlib.sha256()
    for t in tensors:
        if isinstance(t, Tensor):
            found.update(f"{tuple(t.shape)} {t.dtype}".encode())
            found.update(t.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return found.hexdigest()


def _read(folder: Path, settings: Mapping[str, Any]) -> dict[str, Any]:
    """What an earlier run with the same settings left; nothing where there was none."""
    path = folder / FILE
    try:
        if not path.exists():
            return {}
        facts = json.loads(path.read_text())
        theirs = facts["settings"]
        known = [(row["keep"], row["seed"], row["test"]["accuracy"]) for row in facts["rows"]]
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise FormatError(f"{path} cannot be read as the rows of a study: {type(error).__name__}: {error}.\n"
                          "  Remove it to begin again, or choose another folder.") from error  # fmt: skip
    other = [name for name, value in settings.items() if theirs.get(name) != value]
    if other:
        raise InputError(f"{path} holds {len(known)} rows of other settings: {', '.join(other)} differ.\n  Remove it, or choose another folder.")
    return facts


def _write(folder: Path, facts: Mapping[str, Any]) -> None:
    """A new file beside the old one, put in its place when it is whole: a kill leaves one or the other."""
    path = folder / FILE
    fresh = path.with_name(f".{FILE}.new-{os.getpid()}")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        fresh.write_text(json.dumps(facts, indent=1) + "\n")
        sync(fresh)
        fresh.replace(path)
        sync(folder)
    except OSError as error:
        raise FormatError(f"{path} could not be written: {error.strerror or error}.\n  The rows before are unchanged. Check the folder.") from error
    finally:
        with suppress(OSError):
            fresh.unlink(missing_ok=True)


# ---------------------------------------------------------------- over the seeds
def _row(rows: Sequence[Row], one: Fraction, seed: int) -> Row | None:
    return next((row for row in rows if (row["keep"], row["seed"]) == (_percent(one), seed)), None)


def summary(rows: Sequence[Row], one: Fraction, seeds: int) -> dict[str, Any]:
    """Mean and 95 % interval of every figure of one share, and its paired difference to the dense rows of the same seeds."""
    mine, dense = ([row for seed in range(seeds) if (row := _row(rows, s, seed))] for s in (one, Fraction(1)))

    def over(read: Callable[[Row], float]) -> dict[str, Any]:
        return interval(map(read, mine)).to_json()

    better = paired([r["test"]["accuracy"] for r in mine], [r["test"]["accuracy"] for r in dense])
    return {
        "keep": _percent(one), "stays": mine[0]["stays"], "seeds": seeds,
        "train_accuracy": over(lambda r: r["train"]["accuracy"]), "test_accuracy": over(lambda r: r["test"]["accuracy"]),
        "test_loss": over(lambda r: r["test"]["loss"]), "ece": over(lambda r: r["test"]["ece"]), "gap": over(lambda r: r["gap"]),
        "noise": {name: interval(r["noise"][name] for r in mine).to_json() for name in mine[0]["noise"]},
        "against_dense": better.to_json() if one != 1 else None,
    }  # fmt: skip


def printed(facts: Mapping[str, Any]) -> None:
    """One row for each share, mean ± 95 % interval over the seeds; accuracies and their differences in percent."""
    table = Table("stays", title=f"{facts['settings']['model']}: on new rows")
    for name in ("train %", "test %", "against dense", "gap", "test loss", "ECE %", *(f"noise {s}" for s in facts["given"]["noise"])):
        table.add_column(name, justify="right")
    given = facts["given"]
    train, test = given["train"]["accuracy"], given["test"]
    table.add_row("given", _mean(train), _mean(test["accuracy"]), "", _mean(given["gap"], sign="+"), _mean(test["loss"], 1, 3),
                  _mean(test["ece"], places=1), *map(_mean, given["noise"].values()))  # fmt: skip
    for row in facts["summary"]:
        against = _mean(row["against_dense"], sign="+") if row["against_dense"] else ""
        table.add_row(row["keep"], _mean(row["train_accuracy"]["mean"]), _mean(row["test_accuracy"]), against, _mean(row["gap"]["mean"], sign="+"),
                      _mean(row["test_loss"], 1, 3), _mean(row["ece"], places=1), *map(_mean, row["noise"].values()))  # fmt: skip
    seeds, epochs = facts["summary"][0]["seeds"], facts["settings"]["epochs"]
    chance = f"± 95 % interval over {seeds} seeds of the training" if seeds > 1 else "one seed: no interval, and no telling chance from more"
    console = terminal.out()
    console.print(table)
    console.print(f"every share trained on for {epochs:g} epochs, dense (100%) too; {chance}")
    console.print("the best of several shares is flattered by the rows that it was chosen by")


def _mean(found: Any, times: float = 100, places: int = 2, sign: str = "") -> str:
    """So many times a number, or a mean ± half of its interval."""
    if not isinstance(found, Mapping):
        return f"{times * found:{sign}.{places}f}"
    half = f" ± {times * found['half']:.{places}f}" if found["half"] is not None else ""
    return f"{times * found['mean']:{sign}.{places}f}{half}"
