"""What the cut model may cost: `MACs(at_most="50%")`, `Params(at_most=1_000_000)`, `Bytes(at_most="2MiB")`."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import ClassVar

from secateur.errors import InputError
from secateur.plan import Cost

UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12, "kib": 2**10, "mib": 2**20, "gib": 2**30}
UNITS.update({"kb": 10**3, "mb": 10**6, "gb": 10**9})


@dataclass(frozen=True)
class Target:
    """At most so much of one figure of `Cost`; a string may be a percentage of the dense model or carry a unit."""

    at_most: str | int | float
    figure: ClassVar[str] = ""

    def limit(self, dense: Cost) -> int:
        """The budget as an integer.

        Raises:
            InputError: it is not a number, or not more than 0 and less than the dense model's figure.
        """
        whole = getattr(dense, self.figure)
        value = self._number(whole)
        if 0 < value < 1:
            raise InputError(
                f"{self} asks for less than one of {whole:,} {self.figure}.\n"
                f"  A share is written as a string: at_most='{100 * value:g}%'."
            )
        if not 0 < value < whole:
            raise InputError(
                f"{self} asks for {value:,.0f} {self.figure}; the dense model has {whole:,}.\n"
                "  A budget lies above 0 and below the dense model (above 0 % and below 100 %)."
            )
        return math.floor(value)

    def number(self) -> int:
        """A budget that is no percentage, as an integer.

        Raises:
            InputError: it is not a number.
        """
        return math.floor(self._number(0))

    def _number(self, whole: int) -> float:
        if isinstance(self.at_most, bool):
            raise InputError(f"{self}: a budget is a number or a string such as '50%'.")
        if isinstance(self.at_most, (int, float)):
            value = float(self.at_most)
        else:
            text = str(self.at_most).strip().replace("_", "").lower()
            match = re.fullmatch(r"([0-9]*\.?[0-9]+(?:e[+-]?[0-9]+)?)\s*(%|[a-z]*)", text)
            if not match or (match[2] != "%" and match[2] not in UNITS):
                raise InputError(f"{self}: {self.at_most!r} is not a budget.\n  Write '50%', 1000000, '1.5M' or '2MiB'.")
            value = float(match[1]) * (whole / 100 if match[2] == "%" else UNITS[match[2]])
        if not math.isfinite(value):
            raise InputError(f"{self}: a budget is a finite number.")
        return value

    def __str__(self) -> str:
        return f"{type(self).__name__}(at_most={self.at_most!r})"


@dataclass(frozen=True)
class MACs(Target):
    """Multiply-accumulates of one call with the example inputs."""

    figure: ClassVar[str] = "macs"

    def __str__(self) -> str:
        return Target.__str__(self)


@dataclass(frozen=True)
class Params(Target):
    """Number of parameters, tied ones once."""

    figure: ClassVar[str] = "params"

    def __str__(self) -> str:
        return Target.__str__(self)


@dataclass(frozen=True)
class Bytes(Target):
    """Bytes of parameters and buffers, tied ones once."""

    figure: ClassVar[str] = "bytes"

    def __str__(self) -> str:
        return Target.__str__(self)
