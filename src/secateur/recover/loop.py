"""Training a pruned model back: its widths and its zeros stay what they are."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from secateur.errors import DataError, SecateurError, TrainingError, first_line, out_of_memory
from secateur.masks.hold import Hold, hold, zero
from secateur.models.quality import scores_of
from secateur.plan import Plan
from secateur.recover import checkpoint, modes
from secateur.recover import loss as losses
from secateur.recover.average import Average
from secateur.recover.engine import Engine, engine
from secateur.recover.images import shown
from secateur.recover.lora import LowRank
from secateur.recover.order import Order, mixed, part_of, rows_of
from secateur.recover.place import gpus, moved
from secateur.recover.sparse_layers import plain
from secateur.recover.training import LORA, Training
from secateur.recover.validate import alike, parted, validated

Progress = Callable[[int, int, float], None]  # step, steps, loss
Watch = Callable[[list[dict[str, float]], int], None]  # the history so far, steps in all


@dataclass
class Recovered:
    """The model that was trained, in place; `history`: one row per epoch (and one for a part of one at the end): epoch, step, lr, loss (the mean of
    the epoch), seconds and, where there is validation data, valid_loss (the same loss) and, with class numbers, valid (accuracy, 0..1)."""

    model: nn.Module
    history: list[dict[str, float]]
    notes: list[str] = field(default_factory=list)

    def to_json(self) -> dict[str, Any]:
        return {"history": self.history, "notes": self.notes}


def recover(  # noqa: PLR0913  # the one call; every parameter is a choice of its own
    model: nn.Module, data: Iterable[Any], how: Training | None = None, *, plan: Plan | None = None, teacher: nn.Module | None = None,
    valid: Iterable[Any] | None = None, folder: str | Path | None = None, loss: losses.Loss | None = None, progress: Progress | None = None,
    watch: Watch | None = None,
) -> Recovered:  # fmt: skip
    """Train `model` in place.

    Args:
        data: `Batches` of (inputs, labels), whose rows are put in a new order every epoch; or any iterable of batches that can be gone through
            many times, in its order. A batch is (inputs, labels), inputs alone (with a teacher), or a dict of keyword arguments.
        how: the choices; the defaults need no tuning.
        plan: its zeros stay zero (`hold`).
        teacher: the dense model, which is not trained.
        valid: batches that are measured after every epoch, and never trained on.
        folder: for checkpoints. A run that finds one there goes on from it, and ends as if it had never stopped.
        loss: (what the model gives, labels or the dict) -> a number, instead of `task_loss`.
        progress: called after every step with (step, steps, loss).
        watch: called when training begins and after every epoch with (history so far, steps in all).

    Started by `torchrun`, the rows of each batch are shared by the processes; `data` has to be the same in all of them.

    Raises:
        TrainingError: the loss or a gradient is not finite; the model is as it was at the last checkpoint.
        DataError: the data fails, and what was reached is in `folder` (of several processes the last checkpoint); or it does not fit, and the
            model is as it was at the last checkpoint.
        InputError, FormatError: a checkpoint of another run, that not all processes see, or one that cannot be read or written.
    """
    if isinstance(valid, Iterator):
        raise DataError(f"The validation data is a {type(valid).__name__}, which can be gone through only once.\n  Pass a list, or a DataLoader.")
    run = Run(model, Order(data, (how or Training()).batch, (how or Training()).seed), how or Training(), engine((how or Training()).shard))
    run.teacher, run.loss, run.valid, run.watch = teacher, loss, valid, watch
    return run.through(plan, None if folder is None else Path(folder), progress)


class Run:
    """One training run: the step it is at, and all that changes with it."""

    teacher: nn.Module | None = None
    loss: losses.Loss | None = None
    valid: Iterable[Any] | None = None
    watch: Watch | None = None
    held: Hold | None = None
    beside: LowRank | None = None

    def __init__(self, model: nn.Module, order: Order, how: Training, own: Engine):
        self.given, self.model, self.order, self.how, self.engine = model, plain(model), order, how, own
        self.steps = max(1, round(how.epochs * order.steps)) if how.epochs else 0
        self.step, self.history, self.notes = 0, list[dict[str, float]](), list[str]()
        self.total, self.began, self.spent = 0.0, time.monotonic(), 0.0  # of the epoch: summed losses; of the run: seconds
        self.good: dict[str, Tensor] = {}
        self.inner, self.soft = list[str](), False

    def through(self, plan: Plan | None, folder: Path | None, progress: Progress | None) -> Recovered:
        """All steps that are left."""
        model, how, teacher = self.model, self.how, self.teacher
        how.meant(teacher)
        with torch.random.fork_rng(devices=gpus(model)), torch.enable_grad():
            first = self.order.first()
            self.begun = checkpoint.digest(checkpoint.state_of(model))
            settings = {**how.to_json(), "steps": self.steps, "teacher": checkpoint.digest(checkpoint.state_of(teacher)) if teacher else None,
                        "zeros": checkpoint.digest(plan.weights) if plan else None, "data": self.order.said(first)}  # fmt: skip
            found = checkpoint.read(folder, settings, self.begun) if folder else None
            taught = modes.Mode(teacher) if teacher is not None else None
            with modes.training(model) as self.mode:
                try:
                    if taught is not None:
                        taught.still()
                    if how.channels_last:
                        model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
                    self._ready(first, found, plan)
                    self._epochs(settings, folder, progress)
                    self.average.put(self.order, self.mode)
                finally:
                    self._ended()
                    if taught is not None:
                        taught.back()
        return Recovered(self.given, self.history, self.notes)

    def _ready(self, first: Any, found: Mapping[str, Any] | None, plan: Plan | None) -> None:
        """The model spread over the processes, an optimizer of its parameters, zeros held, and the state of a checkpoint."""
        model, how, masked = self.model, self.how, plan if plan is not None and plan.weights else None
        if masked:
            zero(model, masked)
        if how.train == LORA:
            self.beside = LowRank(model, plan, how.rank, how.seed)
        self.called = self.engine.wrapped(model if self.engine.world > 1 else self.given)
        if self.engine.world > 1 and self.loss is None:
            with self.mode.rest(), torch.no_grad():
                self.engine.first = losses.first_counts(first, lambda batch: self.called(**parted(batch, model)[1]))
        self.finite = [n for n, b in model.named_buffers() if b.is_floating_point() and bool(torch.isfinite(b).all())]
        self.optimizer = how.made(model, self.order.size or rows_of(first))
        moves = masked and how.train == "all" and any(model.get_parameter(n).requires_grad for n in masked.weights)
        self.held = hold(model, masked, self.optimizer) if masked and moves else None
        self.rates = [float(group["lr"]) for group in self.optimizer.param_groups]
        self.average = Average(model, how, self.steps)
        if self.teacher is not None:
            self._with_teacher(first)
        if found:
            self._resumed(found)
        self.engine.agreed(self.step)
        self.good = checkpoint.state_of(model)

    def _ended(self) -> None:
        if self.held is not None:
            self.held.again()
            self.held.remove()
        if self.beside is not None:
            self.beside.merge()
        for p in self.model.parameters():
            p.grad = None
        if self.how.channels_last:
            self.model.to(memory_format=torch.contiguous_format)  # type: ignore[call-overload]

    def _epochs(self, settings: Mapping[str, Any], folder: Path | None, progress: Progress | None) -> None:
        each, last = self.order.steps, time.monotonic()
        self.began = time.monotonic()
        row = self.history[-1] if self.history else {}
        if self.valid is not None and row.get("step") == self.step and "valid_loss" not in row:
            self._validated(row)  # it was stopped while it did
        self._watched()
        while self.step < self.steps:
            number, begin = divmod(self.step, each)
            batches = self.order.epoch(number, begin)
            for _ in range(min(each - begin, self.steps - self.step)):
                try:
                    batch = next(batches)
                except StopIteration:
                    self._rescued(settings, folder)
                    raise DataError(f"The data ended after {self.step % each} of {each} batches in epoch {number}.\n"
                                    "  Give data that is the same every time.") from None  # fmt: skip
                except Exception as error:  # a user's loader may raise anything
                    where = self._rescued(settings, folder)
                    raise DataError(f"The data failed at batch {self.step % each} of epoch {number}: {type(error).__name__}: {error}.\n"
                                    f"  The {self.step} steps before are {where}.") from error  # fmt: skip
                value = self._stepped(batch)
                self.step += 1
                self.total += value
                if progress:
                    progress(self.step, self.steps, value)
                ended = self.step % each == 0 or self.step == self.steps
                if ended:
                    self._measured(number, (self.step - 1) % each + 1, lambda: self._save(settings, folder))
                    self._watched()
                if ended or (folder and self.engine.any(time.monotonic() - last >= self.how.every)):
                    self._save(settings, folder)
                    last = time.monotonic()

    # ------------------------------------------------------------------ one step
    def _stepped(self, batch: Any) -> float:
        how = self.how
        for group, rate in zip(self.optimizer.param_groups, self.rates, strict=True):
            group["lr"] = rate * how.at(self.step, self.steps)
        torch.manual_seed(mixed(how.seed, self.step, 1 + self.engine.rank))  # of dropout: the same wherever a run begins again
        own, share, self.weight = self.engine.part(batch)
        self.model.zero_grad(set_to_none=True)  # of all weights: those that are not trained would add theirs up
        value = self._fitting(own) * share
        self.engine.backward(value)
        norm = torch.nn.utils.clip_grad_norm_([p for g in self.optimizer.param_groups for p in g["params"] if p.grad is not None], how.clip)
        norm = norm.full_tensor() if hasattr(norm, "full_tensor") else norm
        found = self.engine.mean(float(value.detach()))
        if not (torch.isfinite(norm) and found == found and abs(found) != float("inf")):
            self._refused(own, found)
        self.optimizer.step()
        self.average.add(self.step)
        return found

    def _fitting(self, batch: Any) -> Tensor:
        """The loss of a batch. Raises DataError if it does not fit, and what else the loss raises: the model is as it was at the last checkpoint."""
        try:
            value = self._loss(batch)
            now = dict(self.model.named_buffers()) if rows_of(batch) == 1 else {}
            if not all(bool(torch.isfinite(now[n]).all()) for n in self.finite if n in now):
                raise ValueError("a norm over the batch has no variance")  # modules say so themselves, operators of a graph do not
        except (IndexError, RuntimeError, ValueError, SecateurError) as error:
            if self.engine.world == 1:  # the others may have no error, and spread weights are put back by all or by none
                checkpoint.put(self.model, self.good)
            if isinstance(error, SecateurError) or out_of_memory(error):
                raise
            alone, rows = "One row cannot be normalised: choose another batch size.", "Give rows and labels as the model and the loss take them."
            said = f"The batch of step {self.step} does not fit: {first_line(error).rstrip('.')}."
            raise DataError(f"{said}\n  {alone if rows_of(batch) == 1 else rows}") from error
        return value

    def _loss(self, batch: Any) -> Tensor:
        args, kwargs, labels = parted(batch, self.model)
        args, part = shown(args, labels, self.how, (self.step, self.engine.rank))
        return self._valued((args, kwargs, labels), self.called, self.weight, part)[0]

    def _valued(self, batch: tuple[tuple, dict[str, Any], Any], called: nn.Module, weight: float = 1.0, part: float = 1.0) -> tuple[Tensor, Any]:
        """What is made small, and what the model gives. `batch`: args, kwargs, labels; `called`: the model, or what is around it in training;
        `weight`: of the task's own loss, by how many of the labels that count are here; `part`: of it that goes by a row's own label."""
        how, (args, kwargs, labels) = self.how, batch
        autocast = torch.autocast(next(self.model.parameters()).device.type, torch.bfloat16, enabled=how.precision == "bfloat16")
        taught = alike((args, kwargs), self.teacher, copy=True) if self.teacher is not None else None  # the model may write into its inputs
        turned = losses.turned(*taught) if taught and how.mirror else None
        with autocast, losses.outputs(self.model, self.inner) as ours:
            output = called(*args, **kwargs)
        own: Tensor | None
        if self.loss is not None or isinstance(labels, Tensor):
            own = losses.of_both(self.loss if self.loss is not None else losses.task_loss, output, labels, part)
        else:
            own = losses.own_of(output)
        if own is not None and self.loss is None and weight != 1:
            own = own * weight if weight else own.nan_to_num() * 0  # a mean over no labels is no number
        if self.teacher is None or taught is None:
            if own is not None:
                return own, output
            raise DataError("These batches have no labels, and there is no teacher.\n  Give (inputs, labels), loss=, or teacher=.")
        with torch.no_grad(), autocast:
            with losses.outputs(self.teacher, self.inner) as theirs:
                wanted = scores_of(self.teacher(*taught[0], **taught[1]))
            if turned:
                wanted = losses.middle(wanted, scores_of(self.teacher(*turned[0], **turned[1])))
        distilled = losses.distance(scores_of(output), wanted, how.temperature, labels, self.soft)
        if wanted.dim() == 3 and losses.labels_of(labels) is None and losses.GUESSED not in self.notes:
            self.notes.append(losses.GUESSED)
        value = distilled if own is None else how.distil * distilled + (1 - how.distil) * own
        return value + how.features * losses.apart(ours, theirs) if self.inner else value, output

    def _refused(self, batch: Any, value: float) -> None:
        """The layer that first gives what is not finite, and the state of before."""
        args, kwargs, _ = parted(batch, self.model)
        layer = losses.broken(self.model, lambda: self.model(*args, **kwargs))
        said = f"layer {layer!r} gives numbers that are not finite" if layer else "the outputs are finite, the loss or its gradient is not"
        checkpoint.put(self.model, self.good)
        raise TrainingError(f"At step {self.step} of {self.steps} the loss is {value:g}: {said}.\n"
                            "  The model is as it was at the last checkpoint. Lower lr, or look at the data of that step.")  # fmt: skip

    # ------------------------------------------------------------------ around the steps
    def _with_teacher(self, batch: Any) -> None:
        assert self.teacher is not None
        moved(self.teacher, next(self.model.parameters()).device)
        labels = losses.labels_of(parted(batch, self.model)[2])
        self.soft = losses.shares(labels) and (self.loss is not None or isinstance(batch, Mapping))  # `task_loss` takes them for numbers
        args, kwargs, _ = parted(part_of(batch, 0, rows_of(batch)), self.model)  # one row
        if self.how.features:
            with self.mode.rest():
                self.inner = losses.matched(self.model, self.teacher, lambda m: m(*alike(args, m, True), **alike(kwargs, m, True)))
            if not self.inner:
                self.notes.append("features: no block of the teacher gives outputs of the same shape")

    def _measured(self, number: int, count: int, save: Callable[[], None]) -> None:
        """The row of an epoch; saved before validation data, which may fail, is looked at."""
        rate = float(self.optimizer.param_groups[0]["lr"])
        row = {"epoch": float(number + 1), "step": float(self.step), "lr": rate, "loss": self.total / max(1, count), "seconds": self._seconds()}
        self.history.append(row)
        self.total = 0.0
        if self.valid is not None:
            save()
            self._validated(row)

    def _validated(self, row: dict[str, float]) -> None:
        assert self.valid is not None
        with self.average.shown(self.order, self.mode), torch.no_grad(), self.mode.rest():
            row |= validated(self.valid, lambda batch: self._valued(batch, self.model), self.model)

    def _watched(self) -> None:
        if self.watch:
            self.watch([dict(row) for row in self.history], self.steps)

    def _save(self, settings: Mapping[str, Any], folder: Path | None) -> None:
        self.good = checkpoint.state_of(self.model)
        if folder is None:
            return
        through = self.step == self.steps
        held = {"settings": json.dumps(settings), "begun": self.begun, "step": self.step, "total": self.total, "history": self.history,
                "seconds": self._seconds(), "model": self.good, "optimizer": checkpoint.optimizer_state(self.model, self.optimizer),
                "shadow": self.average.state(), "ends": None}  # fmt: skip
        if self.engine.rank == 0 and through and self.how.average:
            checkpoint.write(folder, held)  # what comes next reads the data, which may fail
        if self.beside or through:
            with self.average.shown(self.order, self.mode) if through else nullcontext():
                now = checkpoint.state_of(self.model)
                held["ends"] = checkpoint.digest(self.beside.merged(now) if self.beside else now)
        if self.engine.rank == 0:
            checkpoint.write(folder, held)
        self.engine.wait()

    def _rescued(self, settings: Mapping[str, Any], folder: Path | None) -> str:
        """Save what there is, and say where. Not with several processes: the others may have no error, and would be waited for for ever."""
        if self.engine.world > 1:
            return "lost but for the last checkpoint"
        self._save(settings, folder)
        return f"in {folder}, from where the same call goes on" if folder else "in the model"

    def _seconds(self) -> float:
        return self.spent + time.monotonic() - self.began

    def _resumed(self, found: Mapping[str, Any]) -> None:
        checkpoint.put(self.model, found["model"])
        checkpoint.put_optimizer(self.model, self.optimizer, found["optimizer"])
        self.average.resumed(found["shadow"])
        self.begun = found["begun"]
        self.step, self.total, self.history, self.spent = found["step"], found["total"], list(found["history"]), found["seconds"]

