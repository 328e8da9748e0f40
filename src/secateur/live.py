"""What a training shows while it goes: on the terminal, and in the report of the folder that it makes."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from datetime import timedelta
from pathlib import Path
from types import TracebackType
from typing import Any

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from secateur import report
from secateur.errors import FormatError
from secateur.figures import percent
from secateur.screen import Screen

SILENCE = 60.0  # seconds after which a line comes although no epoch is through, where no terminal shows a bar


class Display:
    """On a terminal a bar with the time that is left; elsewhere plain lines, one for every epoch and one a minute between. On standard error.

    Args:
        shown: False: nothing is said.
    """

    def __init__(self, shown: bool = True):
        self.console, self.shown = Screen(stderr=True), shown
        self.bar = shown and self.console.is_terminal
        columns = (TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn())
        self.progress = Progress(*columns, console=self.console, disable=not self.bar)
        self.title, self.task, self.step = "", None, -1  # the step: of the last call
        self.begun, self.last = (0, 0.0), 0.0  # of this title: at what step when; when a line was said

    def __enter__(self) -> Display:
        self.progress.__enter__()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.progress.__exit__(kind, error, trace)

    def moved(self, title: str, done: int, total: int, said: str = "") -> None:
        """So much is done of what `title` names."""
        self.step = done
        if title != self.title:
            self.title, self.begun, self.last = title, (done - 1, time.monotonic()), time.monotonic()
            self.task = self.progress.add_task(title, total=total)  # type: ignore[assignment]
        if self.bar and self.task is not None:
            self.progress.update(self.task, completed=done, total=total)
        elif self.shown and time.monotonic() - self.last >= SILENCE:
            self.line(f"{title}: {done:,} of {total:,}{said}{self.left(done, total)}")

    def ended(self, row: Mapping[str, float], steps: int) -> None:
        """An epoch is through; `row` of the history."""
        step = int(row["step"])
        measured = f", validation loss {row['valid_loss']:.4f}" if "valid_loss" in row else ""
        measured += f", accuracy {percent(row['valid'])}" if "valid" in row else ""
        self.line(f"epoch {row['epoch']:.0f}, step {step:,} of {steps:,}: loss {row['loss']:.4f}{measured}{self.left(step, steps)}")

    def line(self, text: str) -> None:
        self.last = time.monotonic()
        if self.shown:
            self.console.print(text, soft_wrap=True)

    def left(self, done: int, total: int) -> str:
        """The time that is left at the pace so far, in words."""
        step, began = self.begun
        if done >= total or done <= step:
            return ""
        return f", {timedelta(seconds=round((total - done) * (time.monotonic() - began) / (done - step)))} left"


class Page:
    """`report.json` and `report.html` of a training run in its folder, each replaced whole whenever there is news.

    Args:
        folder: where the trained model will be. sections: what stays true of the pruned one (`report.carried`).
        told: takes the message where the report cannot be written, once; the training goes on.
    """

    def __init__(self, folder: Path, sections: Mapping[str, Any], told: Callable[[str], None]):
        self.folder, self.sections, self.told = folder, dict(sections), told
        self.training: dict[str, Any] | None = None
        self.broken = False

    def news(self, history: Sequence[Mapping[str, float]], steps: int, epochs: float) -> None:
        """The training begins, goes on, or is one epoch farther."""
        self.training = {"epochs": epochs, "steps": steps, "rows": list(history)} if steps else None
        try:
            self.write()
        except FormatError as error:
            if not self.broken:
                self.told(f"{error}\n  The training goes on without it.")
            self.broken = True

    def write(self, **sections: Any) -> Path:
        """
        Raises:
            FormatError: the disk is full or not writable.
        """
        return report.write(self.folder, report.facts(**{**self.sections, "training": self.training, **sections}))
