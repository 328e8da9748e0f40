"""Patterns of sparse weights: which sets of single weights may stay together.

    Free()          any single weight
    NM(2, of=4)     of every 4 inputs in a row 2 stay
    Block(4, 1)     rectangles of 4 outputs x 1 input stay or go as one
    Kernels()       whole kernels of a convolution, one output x one input channel

A pattern chooses on a matrix (rows: outputs, columns: inputs) of scores that add up: what a weight's removal costs. True
stays. Choices are exact to the unit; of equal scores the one with the lower index stays. What is left over when a dimension
cannot be divided into groups or blocks stays whole.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import Literal

import torch
from torch import Tensor

from secateur.errors import InputError, PlanError

Per = Literal["layer", "row"]


@dataclass(frozen=True)
class Free:
    """Any single weight. `per`: "layer" ranks all weights of a layer together, "row" those of each output by itself."""

    per: Per = "layer"

    def __post_init__(self) -> None:
        _known(self.per)

    def __str__(self) -> str:
        return "free" if self.per == "layer" else "free per row"

    @property
    def unit(self) -> tuple[int, int]:
        return 1, 1


@dataclass(frozen=True)
class NM:
    """N kept of every M inputs in a row (Mishra et al. 2021, "Accelerating Sparse Deep Neural Networks"). In a convolution
    the inputs in a row are input channels at one place of the kernel."""

    n: int
    of: int

    def __post_init__(self) -> None:
        if not (isinstance(self.n, int) and isinstance(self.of, int) and 0 < self.n < self.of):
            raise InputError(f"a pattern keeps N of M with 0 < N < M, and this one keeps {self.n!r} of {self.of!r}.\n  Write NM(2, of=4).")

    def __str__(self) -> str:
        return f"{self.n}:{self.of}"

    @property
    def unit(self) -> tuple[int, int]:
        return 1, self.of


@dataclass(frozen=True)
class Block:
    """Rectangles of `rows` outputs x `cols` inputs stay or go as one. In a convolution the inputs in a row are input channels
    at one place of the kernel. `per`: "layer" ranks all blocks of a layer together, "row" those of each row of blocks."""

    rows: int
    cols: int = 1
    per: Per = "layer"

    def __post_init__(self) -> None:
        _known(self.per)
        if not all(isinstance(v, int) and v > 0 for v in (self.rows, self.cols)):
            raise InputError(f"a block has whole numbers of rows and columns, and this one has {self.rows!r} x {self.cols!r}.\n  Write Block(4, 1).")

    def __str__(self) -> str:
        return f"{self.rows}x{self.cols}" + (" per row" if self.per == "row" else "")

    @property
    def unit(self) -> tuple[int, int]:
        return self.rows, self.cols


@dataclass(frozen=True)
class Kernels:
    """The k x k weights between one input channel and one output stay or go as one; in a linear layer, single weights.
    `per`: as in `Block`. `size`: weights of a kernel, filled in for each layer."""

    per: Per = "layer"
    size: int = 1

    def __post_init__(self) -> None:
        _known(self.per)

    def __str__(self) -> str:
        return "kernels" + (" per row" if self.per == "row" else "")

    @property
    def unit(self) -> tuple[int, int]:
        return 1, self.size


def _known(per: object) -> None:
    if per not in ("layer", "row"):
        raise InputError(f"per={per!r} is unknown.\n  Weights are ranked per 'layer' or per 'row'.")


Pattern = Free | NM | Block | Kernels
FREE = Free()
TURNED, GROUPS = " transposed", " groups "  # said of a weight that is stored inputs first; of a grouped convolution


def parse_pattern(text: str) -> Pattern:
    """`"free"`, `"free/row"`, `"2:4"`, `"4x1"`, `"4x1/row"`, `"kernels"` or `"kernels/row"`; what is said of one weight behind it is passed over.

    Raises:
        InputError: it is none of these.
    """
    name, _, per = text.lower().removesuffix(TURNED).split(GROUPS)[0].strip().partition("/")
    per = per or "layer"
    if name == "free":
        return Free(per)  # type: ignore[arg-type]  # it is checked there
    if name == "kernels":
        return Kernels(per)  # type: ignore[arg-type]
    if match := re.fullmatch(r"(\d+):(\d+)", name):
        return NM(int(match[1]), of=int(match[2]))
    if match := re.fullmatch(r"(\d+)x(\d+)", name):
        return Block(int(match[1]), int(match[2]), per)  # type: ignore[arg-type]
    raise InputError(f"{text!r} is not a pattern.\n  Write free, free/row, 2:4 (2 kept of 4), 4x1 (blocks of 4 outputs) or kernels.")


def written(pattern: Pattern, transposed: bool = False, groups: int = 1) -> str:
    """The text that `parse_pattern` reads. `transposed`: the weight is stored inputs first; `groups`: of a grouped convolution, each of
    which has a mask of its own."""
    name = "free" if isinstance(pattern, Free) else str(pattern).removesuffix(" per row")
    return name + ("/row" if not isinstance(pattern, NM) and pattern.per == "row" else "") + (
        f"{GROUPS}{groups}" if groups > 1 else TURNED if transposed else ""
    )


def share_of(keep: str | float | Fraction | None, pattern: Pattern, example: str) -> Fraction:
    """The share that stays, as an exact number: the one given, or that of an N:M pattern. `example`: of a share, for the message.

    Raises:
        InputError: no share is given, or one beside an N:M pattern that is another, or it is none; no pattern.
    """
    if not isinstance(pattern, (Free, NM, Block, Kernels)):
        raise InputError(f"pattern={pattern!r} is no pattern.\n  Pass sc.Free(), sc.NM(2, of=4), sc.Block(4, 1) or sc.Kernels().")
    if isinstance(pattern, NM):
        own = Fraction(pattern.n, pattern.of)
        if keep is not None and share(keep) != own:
            raise InputError(f"keep={keep!r} beside the pattern {pattern}, which keeps {float(100 * own):g} %.\n  Leave keep out.")
        return own
    if keep is None:
        raise InputError(f"the pattern {pattern} does not say how much stays.\n  Pass keep='{example}'.")
    return share(keep)


def share(keep: str | float | Fraction, dense: bool = False) -> Fraction:
    """The share of weights that stays: "10%", 0.1 or a fraction, as an exact number. `dense`: all of them is a share too.

    Raises:
        InputError: it is not a number, or does not lie above 0 and below 1.
    """
    try:
        text = str(keep).strip()
        value = Fraction(text[:-1].strip()) / 100 if text.endswith("%") else Fraction(text)
        if isinstance(keep, bool):
            raise ValueError
    except (ValueError, ZeroDivisionError):
        raise InputError(f"keep={keep!r} is not a share.\n  Write '10%' or 0.1: the share of the weights that stays.") from None
    if not (0 < value < 1 or (dense and value == 1)):
        raise InputError(
            f"keep={keep!r} is {float(100 * value):g} % of the weights; a share lies above 0 and below 100 %.\n"
            "  It is what stays: keep='10%' makes nine of ten weights zero."
        )
    return value


def of_kernel(pattern: Pattern, size: int) -> Pattern:
    """The pattern as it stands in a layer with kernels of so many weights."""
    return replace(pattern, size=size) if isinstance(pattern, Kernels) else pattern


def whole(pattern: Pattern, shape: tuple[int, int]) -> tuple[int, int]:
    """Rows and columns of a matrix that are covered by whole units of the pattern; the others stay dense."""
    r, c = pattern.unit
    return shape[0] // r * r, shape[1] // c * c


def kept(pattern: Pattern, shape: tuple[int, int], keep: Fraction) -> int:
    """How many weights of a matrix stay: the share of those that can go, rounded down, one unit at least; what is left over stays."""
    rows, cols = whole(pattern, shape)
    over = shape[0] * shape[1] - rows * cols
    if isinstance(pattern, NM):
        return rows * cols // pattern.of * pattern.n + over
    r, c = pattern.unit
    down, across = rows // r, cols // c
    units = down * some(across, keep) if pattern.per == "row" else some(down * across, keep)
    return units * r * c + over


def some(units: int, keep: Fraction) -> int:
    """The share of so many units, rounded down, but one at least: a filter or a layer of zeros alone cuts the network in two."""
    return max(1, int(units * keep)) if units else 0


def some_between(pattern: Pattern, rows: int, cols: slice, keep: Fraction) -> int:
    """How many units of some columns stay, of each row or of the layer as `per` says, where columns are decided from left to right: with
    those before them as many as `some` says. `rows`: of the matrix."""
    assert not isinstance(pattern, NM)
    down = rows // pattern.unit[0] if pattern.per == "layer" else 1
    first, last = cols.start // pattern.unit[1], cols.stop // pattern.unit[1]
    return some(down * last, keep) - some(down * first, keep)


def spread(pattern: Pattern, stays: Tensor) -> Tensor:
    """The mask (rows, cols) with every block or kernel that is kept in part kept as a whole; the same for other patterns."""
    r, c = (1, 1) if isinstance(pattern, NM) else pattern.unit
    rows, cols = whole(pattern, (stays.shape[0], stays.shape[1]))
    if (r, c) == (1, 1):
        return stays
    out = stays.clone()
    units = stays[:rows, :cols].reshape(rows // r, r, cols // c, c).any(3).any(1)
    out[:rows, :cols] = units.repeat_interleave(r, 0).repeat_interleave(c, 1)
    return out


def limited(pattern: Pattern, score: Tensor, allowed: Tensor) -> Tensor:
    """Scores (rows, cols) where only some weights may stay: the others are worth nothing to their block or kernel, and one of which none
    may stay goes first."""
    nothing = torch.where(allowed, score, torch.zeros((), dtype=score.dtype, device=score.device))
    return nothing.masked_fill(~spread(pattern, allowed), -torch.inf)


def choose(pattern: Pattern, score: Tensor, keep: Fraction, count: int | None = None) -> Tensor:
    """Which weights stay: bool (rows, cols).

    Args:
        score: (rows, cols), what each weight's removal costs; the highest stay. Infinity stays before anything finite.
        keep: the share that stays; N:M has its own.
        count: units that stay, of each row or of the layer as `per` says, instead of that share.

    Raises:
        PlanError: no unit of the pattern fits into the matrix, or scores are NaN.
    """
    if bool(score.isnan().any()):
        bad = int(score.isnan().sum())
        raise PlanError(f"{bad} of {score.numel()} scores are NaN, so nothing can be ranked.\n  Look for NaN in the weights or the data.")
    rows, cols = whole(pattern, (score.shape[0], score.shape[1]))
    if not rows or not cols:
        r, c = pattern.unit
        raise PlanError(f"the pattern {pattern} needs {r} outputs and {c} inputs at least, and the layer has {score.shape[0]} x {score.shape[1]}.\n"
                        "  Leave the layer out with ignore=, or choose a smaller pattern.")  # fmt: skip
    stays = torch.ones(score.shape, dtype=torch.bool, device=score.device)
    part = score[:rows, :cols]
    if isinstance(pattern, NM):
        groups = part.reshape(rows, cols // pattern.of, pattern.of)
        stays[:rows, :cols] = top(groups, pattern.n).reshape(rows, cols)
        return stays
    r, c = pattern.unit
    units = part if (r, c) == (1, 1) else part.reshape(rows // r, r, cols // c, c).sum((1, 3))
    if pattern.per == "row":
        picked = top(units, some(units.shape[1], keep) if count is None else count)
    else:
        picked = top(units.reshape(-1), some(units.numel(), keep) if count is None else count).reshape(units.shape)
    stays[:rows, :cols] = picked if (r, c) == (1, 1) else picked.repeat_interleave(r, 0).repeat_interleave(c, 1)
    return stays


def top(score: Tensor, k: int) -> Tensor:
    """The k highest along the last dimension, exactly, lower indices first among equals: bool, of the shape of `score`."""
    n = score.shape[-1]
    if k <= 0 or k >= n:
        return torch.full(score.shape, k > 0, dtype=torch.bool, device=score.device)
    if n <= 64:  # short groups: a sort is quicker than a selection
        order = score.sort(dim=-1, descending=True, stable=True).indices[..., :k]
        return torch.zeros(score.shape, dtype=torch.bool, device=score.device).scatter_(-1, order, True)
    least = score.kthvalue(n - k + 1, dim=-1, keepdim=True).values
    above, equal = score > least, score == least
    missing = k - above.sum(-1, keepdim=True)
    if score.dim() == 1:
        above[equal.nonzero()[: int(missing), 0]] = True
        return above
    return above | (equal & (equal.cumsum(-1) <= missing))


def legal(pattern: Pattern, stays: Tensor) -> bool:
    """Whether a mask (rows, cols) obeys the pattern; what cannot be divided may be anything."""
    rows, cols = whole(pattern, (stays.shape[0], stays.shape[1]))
    part = stays[:rows, :cols]
    if isinstance(pattern, NM):
        return bool((part.reshape(rows, -1, pattern.of).sum(-1) <= pattern.n).all())
    r, c = pattern.unit
    blocks = part.reshape(rows // r, r, cols // c, c).sum((1, 3))
    return bool(((blocks == 0) | (blocks == r * c)).all())
