"""What holds zeros, or makes them, in training loops of others: callbacks for the Hugging Face Trainer and for Lightning."""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from torch import nn

from secateur.errors import InputError
from secateur.recover.schedule import Schedule

Start = Callable[[nn.Module, torch.optim.Optimizer, int], Any]


def trainer_callback(start: Start) -> Any:
    """For `transformers.Trainer(callbacks=[...])`.

    Args:
        start: (model, optimizer, steps) -> what `remove()` ends, called when training begins:
            `lambda model, optimizer, steps: sc.hold(model, plan, optimizer)`, or `Schedule(model, optimizer, Gradual(...), steps)`.

    Raises:
        InputError: transformers is not installed; in training: a schedule that is to go on has no state, or the Trainer would put older weights
            back in the end.
    """
    try:
        from transformers import TrainerCallback
    except ImportError as error:
        raise InputError("trainer_callback needs transformers, which is not installed.\n  pip install transformers accelerate") from error

    class Holding(TrainerCallback):
        held: Any = None

        def on_train_begin(self, args: Any, state: Any, control: Any, **given: Any) -> None:
            _ended(self.held)  # of a training that stopped with an error
            self.held = start(given["model"], plain(given["optimizer"]), int(state.max_steps))
            if not hasattr(self.held, "load_state_dict"):
                return
            if args.load_best_model_at_end and isinstance(self.held, Schedule) and any(map(self.held.time.changes, range(1, self.held.steps + 1))):
                self.held.remove()
                raise InputError("load_best_model_at_end=True would end with weights of a step whose zeros are not those of the schedule's end.\n"
                                 "  Set it to False, or prune first and train with sc.hold.")  # fmt: skip
            if state.global_step:
                _going_on(self.held, _beside(args, state), state.global_step)

        def on_save(self, args: Any, state: Any, control: Any, **given: Any) -> None:
            if hasattr(self.held, "state_dict") and state.is_world_process_zero and _beside(args, state).parent.is_dir():
                whole = _beside(args, state)
                torch.save(self.held.state_dict(), fresh := whole.with_suffix(".new"))
                os.replace(fresh, whole)

        def on_train_end(self, args: Any, state: Any, control: Any, **given: Any) -> None:
            _ended(self.held)

    return Holding()


def lightning_callback(start: Start) -> Any:
    """For `lightning.Trainer(callbacks=[...])`; one optimizer. `start`: as in `trainer_callback`; steps are -1 where the Trainer's have no end.

    Raises:
        InputError: Lightning is not installed, or there are several optimizers.
    """
    Callback = _lightning()

    class Holding(Callback):  # type: ignore[misc,valid-type]
        held: Any = None
        before: Any = None  # what a checkpoint holds, until training begins

        def on_train_start(self, trainer: Any, module: Any) -> None:
            if len(trainer.optimizers) != 1:
                raise InputError(f"there are {len(trainer.optimizers)} optimizers, and this callback takes one.\n  Call sc.hold for each yourself.")
            _ended(self.held)
            steps = trainer.estimated_stepping_batches
            self.held = start(module, plain(trainer.optimizers[0]), int(steps) if math.isfinite(steps) else -1)
            before, self.before = self.before, None  # a second training with this callback begins anew
            if before is not None and hasattr(self.held, "load_state_dict"):
                self.held.load_state_dict(before)

        def state_dict(self) -> dict[str, Any]:
            return {"held": self.held.state_dict() if hasattr(self.held, "state_dict") else None}

        def load_state_dict(self, state_dict: dict[str, Any]) -> None:
            self.before = state_dict["held"]

        def on_train_end(self, trainer: Any, module: Any) -> None:
            _ended(self.held)

        def on_exception(self, trainer: Any, module: Any, exception: BaseException) -> None:
            _ended(self.held)

    return Holding()


def _ended(held: Any) -> None:
    """Hooks off, where there are any."""
    if held is not None:
        held.remove()


def _going_on(held: Any, path: Path, step: int) -> None:
    try:
        if not path.exists():
            raise InputError(f"training goes on at step {step}, and {path} is missing.\n  Without it the schedule would begin anew.")
        try:
            state = torch.load(path, weights_only=True)
        except (UnpicklingError, RuntimeError, EOFError, OSError) as error:
            raise InputError(f"training goes on at step {step}, and {path} cannot be read: {error}.\n  Go on from an earlier checkpoint.") from error
        held.load_state_dict(state)
    except BaseException:
        held.remove()
        raise


def _beside(args: Any, state: Any) -> Path:
    """A file of ours in the checkpoint of a step."""
    return Path(args.output_dir) / f"checkpoint-{state.global_step}" / "secateur.pt"


def _lightning() -> Any:
    for name in ("lightning.pytorch", "pytorch_lightning"):
        try:
            return import_module(name).Callback
        except ModuleNotFoundError:
            continue
    raise InputError("lightning_callback needs Lightning, which is not installed.\n  pip install lightning")


def plain(optimizer: Any) -> torch.optim.Optimizer:
    """torch's own optimizer within what a loop has put around it: hooks of a wrapper are never called."""
    while hasattr(optimizer, "optimizer"):
        optimizer = optimizer.optimizer
    return optimizer
