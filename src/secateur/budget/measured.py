"""What the cut model may take where only a measurement can tell: `Latency(at_most="60%")`, `PeakMemory(at_most="4MiB")`.

No `Cost` has these figures, so no plan can be made from such a target alone: `secateur.reach` looks for the plan, and
every step of it is a real cut and a real measurement beside the dense model.
"""

from __future__ import annotations

import math
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import nn

from secateur.budget.targets import UNITS
from secateur.errors import InputError
from secateur.measure import batch_of, compare, peak_bytes, prepared
from secateur.measure.runtimes import check

SECONDS = {"s": 1.0, "ms": 1e-3, "us": 1e-6, "µs": 1e-6}


@dataclass(frozen=True)
class Reading:
    """A cut model measured beside the dense one: both figures, and the ratio (of the noisy: median over the rounds of the
    ratio within a round, and its interquartile range)."""

    dense: float
    cut: float
    ratio: float
    spread: float = 0.0
    rounds: int = 1


@dataclass(frozen=True)
class MeasuredTarget(ABC):
    """At most so much of a figure that has to be measured; a string may be a percentage of the dense model or carry a unit.

    Raises:
        InputError: when it is made: not a number, not above 0, or a percentage of 100 or more.
    """

    at_most: str | int | float
    figure: ClassVar[str] = ""
    units: ClassVar[Mapping[str, float]] = {}
    example: ClassVar[str] = ""

    def __post_init__(self) -> None:
        value, percent = self._asked()
        if not (value > 0 and math.isfinite(value)) or (percent and value >= 100):
            raise InputError(
                f"{self} cannot be met.\n  A budget lies above 0 and below the dense model (above 0 % and below 100 %)."
            )

    def _asked(self) -> tuple[float, bool]:
        """(number in base units or in percent, whether it is a percentage)."""
        if isinstance(self.at_most, (int, float)) and not isinstance(self.at_most, bool):
            return float(self.at_most), False
        match = re.fullmatch(r"([0-9]*\.?[0-9]+(?:e[+-]?[0-9]+)?)\s*(%|[a-zµ]*)", str(self.at_most).strip().lower())
        if isinstance(self.at_most, bool) or not match or match[2] not in ("%", *self.units):
            raise InputError(f"{type(self).__name__}: {self.at_most!r} is not a budget.\n  Write {self.example}.")
        return float(match[1]) * self.units.get(match[2], 1.0), match[2] == "%"

    @property
    def percent(self) -> float | None:
        """The percentage of the dense model, None where a number of seconds or bytes is asked."""
        value, percent = self._asked()
        return value if percent else None

    def limit(self, dense: float) -> float:
        """The budget in seconds or bytes, for a dense model that takes `dense` of them.

        Raises:
            InputError: the dense model is within it already.
        """
        value, percent = self._asked()
        if percent:
            return dense * value / 100
        if value >= dense:
            raise InputError(
                f"{self} asks for {value:g}, and the dense model takes {dense:g}.\n  A budget lies below the dense model."
            )
        return value

    def share(self, reading: Reading) -> float:
        """What was read over what was asked: 1 is the budget itself. Of a percentage the ratio counts, which noise that
        slows both models leaves alone."""
        value, percent = self._asked()
        return reading.ratio / (value / 100) if percent else reading.cut / value

    @abstractmethod
    def beside(
        self, dense: nn.Module, args: tuple, kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """A context manager that gives a function (cut model, rounds) -> `Reading`, valid until the block ends."""

    def __str__(self) -> str:
        return f"{type(self).__name__}(at_most={self.at_most!r})"


@dataclass(frozen=True)
class Latency(MeasuredTarget):
    """Seconds of one call on a named runtime: "60%" of the dense model, "3.5ms", or a number of seconds.

    Args:
        at_most: a percentage is held against the ratio of cut and dense, timed in turns.
        runtime: "torch", "torch.compile", "onnxruntime" or "openvino".
        batch: rows of one call; None takes those of the example inputs.
        threads: of one operator.
        dtype: "float32", or "bfloat16" on the torch runtimes.

    Raises:
        InputError: any of these that cannot be meant.
    """

    runtime: str = "torch"
    batch: int | None = None
    threads: int = 1
    dtype: str = "float32"
    figure: ClassVar[str] = "latency"
    units: ClassVar[Mapping[str, float]] = SECONDS
    example: ClassVar[str] = "'60%', '3.5ms' or 0.0035 (seconds)"

    def __post_init__(self) -> None:
        MeasuredTarget.__post_init__(self)
        check(self.runtime, self.threads, self.dtype)
        if self.batch is not None and (isinstance(self.batch, bool) or not isinstance(self.batch, int) or self.batch < 1):
            raise InputError(f"batch={self.batch!r}: a call has one row at least.\n  Pass a whole number, or None for the example inputs.")

    @contextmanager
    def beside(
        self, dense: nn.Module, args: tuple, kwargs: Mapping[str, Any] | None = None
    ) -> Iterator[Callable[[nn.Module, int], Reading]]:
        """See `MeasuredTarget.beside`. Raises what `measure.prepared` raises."""
        settings: dict[str, Any] = {
            "runtime": self.runtime, "batch": self.batch, "threads": self.threads, "dtype": self.dtype,
        }  # fmt: skip
        rows = self.batch or batch_of(args, kwargs)
        with prepared(dense, args, kwargs, **settings) as yardstick:

            def read(cut: nn.Module, rounds: int) -> Reading:
                with prepared(cut, args, kwargs, **settings) as call:
                    once = {"threads": self.threads, "batch": rows}
                    slow = compare({"dense": yardstick}, rounds=2, **once).seconds["dense"].median
                    turns = max(3, min(9, round(0.05 / slow)))
                    found = compare({"dense": yardstick, "cut": call}, rounds=rounds, least_of=turns, **once)
                one, other = found.seconds["dense"].median, found.seconds["cut"].median
                return Reading(one, other, found.ratio["cut"], found.ratio_spread["cut"], rounds)

            yield read

    def __str__(self) -> str:
        batch = f", batch={self.batch}" if self.batch is not None else ""
        dtype = f", dtype={self.dtype!r}" if self.dtype != "float32" else ""
        return f"Latency(at_most={self.at_most!r}, runtime={self.runtime!r}{batch}, threads={self.threads}{dtype})"


@dataclass(frozen=True)
class PeakMemory(MeasuredTarget):
    """Most bytes alive at once during one call with the example inputs, as `measure` counts them: "50%", "4MiB" or bytes."""

    figure: ClassVar[str] = "peak_memory"
    units: ClassVar[Mapping[str, float]] = UNITS
    example: ClassVar[str] = "'50%', '4MiB' or 4000000 (bytes)"

    @contextmanager
    def beside(
        self, dense: nn.Module, args: tuple, kwargs: Mapping[str, Any] | None = None
    ) -> Iterator[Callable[[nn.Module, int], Reading]]:
        """See `MeasuredTarget.beside`. The number is the same on every run, so rounds do not matter."""
        whole = peak_bytes(dense, args, kwargs)

        def read(cut: nn.Module, rounds: int) -> Reading:
            part = peak_bytes(cut, args, kwargs)
            return Reading(whole, part, part / max(1, whole))

        yield read

    def __str__(self) -> str:
        return MeasuredTarget.__str__(self)
