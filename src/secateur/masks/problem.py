"""One matrix of weights to be made sparse, and what is known of its inputs.

    minimise over W'  tr((W - W') H (W - W')^T),   H = E[x x^T]

that is the mean squared error of the layer's output. Rows of W are outputs, columns inputs.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from fractions import Fraction

import torch
from torch import Tensor

from secateur.errors import DataError
from secateur.pattern import Pattern, choose, limited

DAMP = 0.01  # of the mean of H's diagonal (Frantar & Alistarh 2023)
TRIES = 6


@dataclass(frozen=True)
class Problem:
    """
    Attributes:
        w: (rows, cols) float32 or float64.
        h: (cols, cols) of the same dtype; None for methods that look at weights alone.
        pattern, keep: what is asked for.
        allowed: bool (rows, cols): weights that may stay; None allows all. An already sparse layer keeps its zeros.
        damp: added to the diagonal of H, relative to its mean.
        name: of the layer, for messages.
    """

    w: Tensor
    h: Tensor | None
    pattern: Pattern
    keep: Fraction
    allowed: Tensor | None = None
    damp: float = DAMP
    name: str = "the layer"

    @property
    def gram(self) -> Tensor:
        """H.

        Raises:
            DataError: there is none, or it is not finite.
        """
        if self.h is None:
            raise DataError(f"{self.name}: this method needs to see what the layer takes in.\n  Pass data=, or use by='magnitude'.")
        if not finite(self.h):
            raise DataError(
                f"{self.name}: the second moments of its inputs are not finite on the calibration data.\n"
                "  Look for NaN, infinite or far too large activations in front of it."
            )
        return self.h

    def without_dead(self) -> Problem:
        """The problem with the weights of inputs that are always 0 at 0, so that they go first: nothing is lost with them, while the
        damping of H would make them count. Where all are, nothing is known, and the largest weights stay.

        Raises:
            DataError: nothing is known of the inputs.
        """
        dead = self.gram.diagonal() == 0
        if bool(dead.all()):
            return replace(self, h=torch.eye(len(dead), dtype=self.w.dtype))
        return replace(self, w=torch.where(dead, torch.zeros((), dtype=self.w.dtype), self.w)) if bool(dead.any()) else self

    def choose(self, score: Tensor, count: int | None = None) -> Tensor:
        """The mask that keeps the highest scores among the weights that may stay: bool (rows, cols). `count`: see `secateur.pattern.choose`.

        Raises:
            PlanError: the pattern does not fit the matrix, or scores are NaN.
        """
        if self.allowed is None:
            return choose(self.pattern, score, self.keep, count)
        return choose(self.pattern, limited(self.pattern, score, self.allowed), self.keep, count) & self.allowed

    def part(self, cols: slice, w: Tensor) -> Problem:
        """The problem of a few columns with the weights `w`; without H."""
        return replace(self, w=w, h=None, allowed=None if self.allowed is None else self.allowed[:, cols])


@dataclass(frozen=True)
class Solution:
    """`w` (rows, cols) is zero where `stays` (rows, cols) is False. `damped`: what was added to the diagonal of H, relative
    to its mean, where H had to be inverted."""

    w: Tensor
    stays: Tensor
    damped: float = 0.0


def masked(w: Tensor, stays: Tensor, damped: float = 0.0) -> Solution:
    """The weights that stay, as they are. Zeros are +0."""
    return Solution(torch.where(stays, w, torch.zeros((), dtype=w.dtype, device=w.device)), stays, damped)


def power(d: Tensor, h: Tensor) -> float:
    """tr(D H D^T): the mean square of D x."""
    return float(((d @ h) * d).sum())


def error(w: Tensor, new: Tensor, h: Tensor) -> float:
    """tr((W - W') H (W - W')^T) / tr(W H W^T): the relative squared error of the layer's output."""
    whole = power(w, h)
    return power(w - new, h) / whole if whole > 0 else 0.0


def damped(h: Tensor, damp: float, name: str, make: Callable[[Tensor], Tensor | None]) -> tuple[Tensor, float]:
    """`make(h + damp * mean(diag h) * I)` with the smallest damping that works, raised tenfold at a time, and that damping. `make`
    returns None where it cannot be made, and may write over what it is given.

    Raises:
        DataError: no damping helps.
    """
    mean = float(h.diagonal().mean())
    level = damp
    for attempt in range(TRIES):
        level = damp * 10**attempt
        found = make(_raised(h, level * mean if mean > 0 else 1.0))
        if found is not None and finite(found):
            return found, level
    raise DataError(
        f"{name}: no damping up to {level:.0e} of the mean makes the {len(h)} x {len(h)} moments of its inputs invertible.\n"
        "  Give more, or more varied, calibration data."
    )


def _raised(h: Tensor, by: float) -> Tensor:
    """h + by * I; a matrix that only the caller holds, because there may be no room for one more."""
    h = h.clone()
    h.diagonal().add_(by)
    return h


def factor(a: Tensor) -> Tensor | None:
    """The lower Cholesky factor of a positive definite matrix, written over it; None where it is none."""
    a, info = a.mT, torch.empty((), dtype=torch.int32, device=a.device)  # LAPACK counts by columns, and a is symmetric
    torch.linalg.cholesky_ex(a, out=(a, info))
    return None if int(info) else a


def inverse(a: Tensor) -> Tensor | None:
    """The inverse of a positive definite matrix, written over it; None where it is none."""
    lower = factor(a)
    return None if lower is None else torch.cholesky_inverse(lower, out=lower)


def finite(t: Tensor) -> bool:
    """Whether no value is NaN or infinite; needs no memory, unlike `torch.isfinite`."""
    return not t.numel() or all(math.isfinite(float(v)) for v in torch.aminmax(t))
