"""The command that trains a pruned model back: `secateur recover`."""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch import Tensor, nn

from secateur import report, terminal
from secateur.errors import DataError, InputError
from secateur.job import Cast
from secateur.live import Display, Page
from secateur.models import Data, load_model
from secateur.models.atomic import REPORT_FACTS, refuse_foreign
from secateur.models.data import Batches
from secateur.models.folder import Saved, read, save_trained
from secateur.models.quality import accuracy
from secateur.plan import Plan
from secateur.recover import Reconstruction, Training, reconstruct
from secateur.recover import recover as trained
from secateur.recover.checkpoint import state_of
from secateur.recover.place import AUTO, moved, place
from secateur.recover.training import ROWS
from secateur.shell import Debug, Json, Seed, Source, command_line, given_data, show, working


def recover(  # noqa: PLR0913  # a command's parameters are its options
    context: typer.Context,
    folder: Annotated[str, typer.Argument(metavar="FOLDER", show_default=False, help="What `prune -o` or `mask -o` wrote.")],
    data: Source = None,
    epochs: Annotated[float, typer.Option(min=0, help="Passes over the training part of the data.")] = 10.0,
    teacher: Annotated[str | None, typer.Option(metavar="MODEL", help="The dense model; its outputs are learned too.")] = None,
    teacher_weights: Annotated[str | None, typer.Option(metavar="FILE", help="Safetensors, or a state dict without code in it.")] = None,
    factory: Annotated[str | None, typer.Option(metavar="FUNCTION", help="Builds the dense model of a folder without a graph.")] = None,
    out: Annotated[str | None, typer.Option("--out", "-o", metavar="FOLDER", help="Folder for the result; FOLDER-recovered without it.")] = None,
    lr: Annotated[float | None, typer.Option(help="Highest learning rate; without it 0.02 (SGD), 3e-4 (AdamW), 3e-3 (lora) per 128 rows.")] = None,
    batch: Annotated[int | None, typer.Option(min=1, help="Rows of a step, of all processes together; 128, or as data in batches has them.")] = None,
    train: Annotated[str, typer.Option(help="all; norms: norms and biases alone; lora: they, and low-rank updates that are merged.")] = "all",
    rank: Annotated[int, typer.Option(min=1, help="Of the updates of --train lora.")] = 8,
    blocks: Annotated[int, typer.Option(min=0, help="Steps for each block to give what the teacher's gives, before; 0: none.")] = 0,
    distil: Annotated[float, typer.Option(min=0, max=1, help="Share of the loss that comes from the teacher.")] = 0.9,
    features: Annotated[float, typer.Option(min=0, help="Weight of the distance between inner outputs of teacher and model.")] = 0.0,
    ema: Annotated[float | None, typer.Option(help="Decay of a moving average of the weights, such as 0.999.")] = None,
    average: Annotated[float, typer.Option(min=0, max=1, help="Share of the steps, the last, whose mean weights come back, such as 0.33.")] = 0.0,
    augment: Annotated[str, typer.Option(help="none, flip or flip_crop, for images.")] = "none",
    cutmix: Annotated[float, typer.Option(help="Share of the steps in which a box of every image shows another one.")] = 0.0,
    mirror: Annotated[bool, typer.Option("--mirror", help="The teacher also sees the mirror images; its outputs are the mean.")] = False,
    precision: Annotated[str, typer.Option(help="float32 or bfloat16.")] = "float32",
    channels_last: Annotated[bool, typer.Option("--channels-last", help="The layout of images while training.")] = False,
    device: Annotated[str, typer.Option(help="Where to train: cpu, cuda, cuda:1; auto: a GPU where there is one.")] = AUTO,
    shard: Annotated[bool, typer.Option("--shard", help="With torchrun: spread the weights over the processes.")] = False,
    seed: Seed = 0,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Train a pruned model back; its widths and its zeros stay. Goes on after a kill; `torchrun -m secateur recover ...` shares the work."""
    how = Training(epochs, batch or ROWS, lr, train=train, distil=distil, features=features, ema=ema, average=average, precision=precision,
                   channels_last=channels_last, augment=augment, seed=seed, shard=shard, rank=rank, cutmix=cutmix, mirror=mirror)  # fmt: skip
    if data is None:
        raise InputError("recover needs data to train on.\n  Add --data DATA.")
    _meant(shard, teacher, {"--blocks": blocks, "--teacher-weights": teacher_weights, "--features": features, "--mirror": mirror})
    main, to = int(os.environ.get("RANK", "0")) == 0, _target(folder, out)
    with working(as_json or not main) as say:
        held, _ = given_data(data, None, seed, teacher or folder)  # the tokens of a text are the dense model's: a pruned folder has no tokenizer
        assert held is not None
        say("load")
        saved, model, dense = _loaded(folder, factory, (teacher, teacher_weights), place(device))
        _learnable(data, held.labelled, dense)
        how = how if isinstance(held.train, Batches) else _as_they_come(how, batch)
        work = Work(saved, model, dense, held, how, to)
        say("accuracy")
        work.measured("dense", dense)
        work.measured("pruned", model)
    with Display(main) as display:
        facts = {**work.through(blocks, display, command_line(context) if main else None), "teacher": teacher, "data": data}
    if main:
        work.finished(facts, as_json)


def _meant(shard: bool, teacher: str | None, of_a_teacher: Mapping[str, Any]) -> None:
    """Raises InputError for options that would be passed over."""
    if teacher is None and (lonely := [name for name, value in of_a_teacher.items() if value]):
        raise InputError(f"{lonely[0]} without a dense model, which is what is learned from.\n  Add --teacher MODEL.")
    if shard and int(os.environ.get("WORLD_SIZE", "1")) < 2:
        raise InputError("--shard spreads the weights over processes, and there is one.\n  Start it by torchrun, or leave --shard out.")


def _learnable(data: str, labelled: bool, dense: nn.Module | None) -> None:
    if not labelled and dense is None:
        raise DataError(f"--data {data} has no labels.\n  Add --teacher MODEL, whose outputs are learned then, or data with labels.")


def _target(folder: str, out: str | None) -> Path:
    """Where the result goes; refused before hours of training, not after."""
    to = Path(out or f"{folder.rstrip('/')}-recovered")
    refuse_foreign(to)
    return to


def _loaded(
    folder: str, factory: str | None, teacher: tuple[str | None, str | None], there: torch.device
) -> tuple[Saved, nn.Module, nn.Module | None]:  # fmt: skip
    """What was saved, the pruned model and the dense one, both on the device."""
    name, weights = teacher
    dense = None if name is None else moved(load_model(name, weights).model, there)
    return read(folder), moved(load_model(folder, factory=factory).model, there), dense


def _as_they_come(how: Training, batch: int | None) -> Training:
    if batch:
        raise InputError(f"--batch {batch} beside data that comes in batches.\n  Leave it out, or return rows: (inputs, labels).")
    return replace(how, batch=None)


@dataclass
class Work:
    """What is trained, on what, and into which folder."""

    saved: Saved
    model: nn.Module
    dense: nn.Module | None
    data: Data
    how: Training
    to: Path
    accuracies: dict[str, float] = field(default_factory=dict)
    page: Page | None = None
    state: dict[str, Tensor] = field(default_factory=dict)

    def measured(self, name: str, model: nn.Module | None) -> None:
        """The accuracy on the test part, where it has labels."""
        if model is not None and self.data.labelled:
            self.accuracies[name] = accuracy(model, Cast(model, self.data.test))

    def through(self, blocks: int, display: Display, command: str | None) -> dict[str, Any]:
        """Blocks, then epochs; the facts. `command`: of the report, which is written where there is one."""
        plan, steps = Plan.from_json(self.saved.document["plan"]), _steps(self.to)
        if command:
            self.page = self._page(display, command)
        rebuilt = None
        if blocks:
            assert self.dense is not None
            rebuilt = reconstruct(self.model, self.dense, self.data.train, Reconstruction(blocks, seed=self.how.seed), plan=plan,
                                  folder=steps / "blocks", progress=lambda done, total: display.moved("blocks", done, total))  # fmt: skip
            display.line(f"blocks: the output is {rebuilt.after:.3g} from the dense one, {rebuilt.before:.3g} before")
            if self.page:
                self.page.sections["repairs"] = [*self.page.sections.get("repairs", ()), *(b.to_json() for b in rebuilt.blocks)]
        found = trained(self.model, self.data.train, self.how, plan=plan, teacher=self.dense, folder=steps, valid=self._valid(),
                        progress=lambda step, total, loss: display.moved("training", step, total, f", loss {loss:.4f}"),
                        watch=lambda history, total: self._news(history, total, display))  # fmt: skip
        self.state = state_of(self.model)  # of weights spread over processes, all of them have to take part
        self.measured("recovered", self.model)
        more = {} if rebuilt is None else {"reconstruction": rebuilt.to_json()}
        return {**found.to_json(), **more, "training": self.how.to_json(), "accuracy": self.accuracies}

    def finished(self, facts: dict[str, Any], as_json: bool) -> None:
        """The folder, its report, and what is printed."""
        save_trained(self.saved, self.state, self.to, facts)
        shutil.rmtree(_steps(self.to), ignore_errors=True)
        if self.page:
            self.page.write(accuracy=self._stages(), notes=facts["notes"])
        if as_json:
            show({"folder": str(self.to), **facts})
        else:
            terminal.recovered(str(self.to), facts)

    def _valid(self) -> Any:
        """The test part is measured after every epoch; nothing is chosen by it."""
        return Cast(self.model, self.data.test) if self.data.labelled else None

    def _news(self, history: Any, total: int, display: Display) -> None:
        if self.page:
            self.page.news(history, total, self.how.epochs)
        if history and history[-1]["step"] == display.step:  # not what a run before has said already
            display.ended(history[-1], total)

    def _stages(self) -> dict[str, float]:
        return {("trained" if name == "recovered" else name): value for name, value in self.accuracies.items()}

    def _page(self, display: Display, command: str) -> Page:
        known = report.read(self.saved.folder) if (self.saved.folder / REPORT_FACTS).is_file() else report.facts(_known(self.saved.document))
        sections = report.carried(known)
        settings = {**sections.pop("settings"), **self.how.to_json(), "data": self.data.name, "command": command}
        return Page(self.to, {**sections, "settings": settings, "accuracy": self._stages()}, display.line)


def _known(document: Mapping[str, Any]) -> dict[str, Any]:
    """Of a folder without a report: what its plan.json says, as a job does."""
    names = ("model", "how", "before", "after", "proof")
    return {**{name: document[name] for name in names}, "why": document["plan"]["why"]}


def _steps(to: Path) -> Path:
    """Where checkpoints lie while a folder is made."""
    return to.parent / f".{to.name}.training"
