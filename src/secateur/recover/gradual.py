"""How single weights go while a network is trained: the options, and what they mean after so many steps.

    one_shot    all at `begin`, then held                                          (Han et al. 2015, "Learning both Weights and Connections")
    iterative   every `every` steps the same share of what is left                 (the same; Frankle & Carbin 2019, "The Lottery Ticket Hypothesis")
                keep_k = keep^(k / n),  k = 1 .. n,  n = (end - begin) // every + 1
    cubic       s = S (1 - (1 - u)^3)                                              (Zhu & Gupta 2017, "To Prune, or Not to Prune", AGP)
    one_cycle   s = S (1 + e^(b - a)) / (1 + e^(b - a u)),  a = 14, b = 5          (Hubens et al. 2021, "One-Cycle Pruning")
    static      a random mask at `begin`, then held
    rigl        a mask at `begin`; every `every` steps the smallest |w| go and the largest |dense gradients| come (Evci et al. 2020, "Rigging the
                Lottery"); the share that moves is  fraction / 2 (1 + cos(pi u))
    set         the same, but chance says what comes                               (Mocanu et al. 2018, "Scalable Training of Sparse Networks")
    ac_dc       from `begin` to `end` compressed and dense phases of `every` steps in turn, compressed from then on
                (Peste et al. 2021, "AC/DC: Alternating Compressed / DeCompressed Training")

u = (t - begin) / (end - begin) after t steps of the optimizer; s is the share that is zero, S = 1 - keep what it ends at.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Literal

from secateur.errors import InputError
from secateur.masks import BUDGETS
from secateur.pattern import FREE, Free, Pattern, share_of

Kind = Literal["one_shot", "iterative", "cubic", "one_cycle", "static", "rigl", "set", "ac_dc"]
REGROWING = ("rigl", "set")
NESTED = ("one_shot", "iterative", "cubic", "one_cycle")  # what is zero once stays zero
# Kind -> the step after which nothing moves any more, as a share of all, and how many changes fit in all steps, where the user says nothing.
DEFAULTS: dict[str, tuple[float, int]] = {
    "one_shot": (1.0, 1), "iterative": (0.75, 10), "cubic": (0.75, 100), "one_cycle": (1.0, 100), "static": (1.0, 1), "rigl": (0.75, 100),
    "set": (0.75, 100), "ac_dc": (0.8, 20),
}  # fmt: skip
STEEP, SHIFT = 14.0, 5.0  # a and b of one_cycle
NEED_DATA = ("owl", "search")


@dataclass(frozen=True)
class Gradual:
    """How single weights become zero during training.

    Attributes:
        keep: the share that stays in the end of the weights of all layers that are made sparse, "5%" or 0.05; None with an N:M pattern.
        pattern: `Free()`, `NM(2, of=4)`, `Block(4, 1)` or `Kernels()`. On the way to N:M, M-1, M-2, ... of M stay.
        budget: how much of each layer stays: "uniform", "erk", "lamp" (of the weights at `begin`), "atp", or {weight: share}.
        kind: see the top of this module.
        every: steps between changes. None: a hundredth of all steps, for "rigl" and "set" 100 at most; a twentieth for "ac_dc"; a tenth of
            the way for "iterative".
        begin: steps before the first change.
        end: the step after which the mask moves no more. None: 75 % of all steps; 80 % for "ac_dc", all for "one_cycle".
        ignore: names or patterns of modules or weights that stay dense.
        start: the first mask of "rigl" and "set": "random" or "magnitude".
        fraction: of the active weights, the share that "rigl" and "set" move at the beginning.
        seed: of what is drawn.

    Raises:
        InputError: a value that cannot be meant.
    """

    keep: str | float | Fraction | None = None
    pattern: Pattern = FREE
    budget: str | Mapping[str, str | float | Fraction] = "erk"
    kind: Kind = "cubic"
    every: int | None = None
    begin: int = 0
    end: int | None = None
    ignore: Sequence[str] = ()
    start: Literal["random", "magnitude"] = "random"
    fraction: float = 0.3
    seed: int = 0

    def __post_init__(self) -> None:
        if self.kind not in DEFAULTS:
            raise InputError(f"kind={self.kind!r} is unknown.\n  There are: {', '.join(DEFAULTS)}.")
        self.share()
        if self.kind in REGROWING and self.pattern != Free():
            raise InputError(f"kind={self.kind!r} moves single weights about a layer, and the pattern {self.pattern} ties them together.\n"
                             "  Use sc.Free() with it, or another kind with this pattern.")  # fmt: skip
        if isinstance(self.budget, str) and (self.budget not in BUDGETS or self.budget in NEED_DATA):
            offered = ", ".join(n for n in BUDGETS if n not in NEED_DATA)
            why = "needs calibration data, of which a schedule sees none" if self.budget in NEED_DATA else "is unknown"
            raise InputError(f"budget={self.budget!r} {why}.\n  There are: {offered}; or give {{weight: share}}.")
        if self.start not in ("random", "magnitude"):
            raise InputError(f"start={self.start!r} is no way to make the first mask.\n  It is 'random' or 'magnitude'.")
        if not (isinstance(self.fraction, (int, float)) and 0 < self.fraction < 1):
            raise InputError(f"fraction={self.fraction!r} of the active weights move; that is no share above 0, below 1.\n  Evci et al. use 0.3.")
        if isinstance(self.ignore, str):
            raise InputError(f"ignore={self.ignore!r} is one text, and would be read letter by letter.\n  Pass a list: ignore=[{self.ignore!r}].")
        for name, value, least in (("begin", self.begin, 0), ("end", self.end, 0), ("every", self.every, 1), ("seed", self.seed, 0)):
            optional = value is None and name in ("end", "every")
            if not optional and (not isinstance(value, int) or isinstance(value, bool) or value < least):
                raise InputError(f"{name}={value!r} is no count of steps that a schedule can use.\n  Pass a whole number from {least} on.")

    def share(self) -> Fraction:
        """The share that stays in the end.

        Raises:
            InputError: no share is given, or one beside an N:M pattern, or it is none; no pattern.
        """
        return share_of(self.keep, self.pattern, "5%")

    def over(self, steps: int) -> Timeline:
        """What happens when, in a training of so many steps of the optimizer.

        Raises:
            InputError: `steps` is no count, or begin and end do not lie in it in this order.
        """
        if not isinstance(steps, int) or isinstance(steps, bool) or steps < 1:
            raise InputError(f"steps={steps!r} is no number of steps.\n  Pass how often the training calls optimizer.step(): epochs * len(loader).")
        until, changes = DEFAULTS[self.kind]
        end = max(self.begin, int(until * steps)) if self.end is None else self.end
        if not self.begin <= end <= steps:
            raise InputError(f"begin={self.begin} and end={end} of {steps} steps: the one comes after the other, or after the training.\n"
                             "  Choose 0 <= begin <= end <= steps.")  # fmt: skip
        way = end - self.begin if self.kind == "iterative" else steps
        every = self.every or max(1, way // changes)
        if self.every is None and self.kind in REGROWING:
            every = min(every, 100)
        return Timeline(self.kind, self.begin, end, every, self.share(), self.fraction)


@dataclass(frozen=True)
class Timeline:
    """A `Gradual` with its steps counted. `t` is always the number of steps of the optimizer that are done."""

    kind: str
    begin: int
    end: int
    every: int
    keep: Fraction
    fraction: float

    def changes(self, t: int) -> bool:
        """Whether the mask is made anew after `t` steps."""
        whole = (t - self.begin) % self.every == 0
        if t <= self.begin or self.kind in ("one_shot", "static"):
            return t == self.begin
        if self.kind in REGROWING:
            return whole and t < self.end
        if self.kind == "ac_dc":
            return self.dense(t) != self.dense(t - 1)
        return (whole and t <= self.end) or (t == self.end and self.kind != "iterative")

    def regrows(self, t: int) -> bool:
        """Whether weights are moved about after `t` steps."""
        return self.kind in REGROWING and t > self.begin and self.changes(t)

    def dense(self, t: int) -> bool:
        """Whether all weights are trained then."""
        if t < self.begin:
            return True
        return self.kind == "ac_dc" and t < self.end and (t - self.begin) // self.every % 2 == 1

    def done(self, t: int) -> Fraction:
        """The share of all zeros to be made that are made, from 0 to 1; between changes it stands still."""
        if self.dense(t):
            return Fraction(0)
        if self.kind not in ("iterative", "cubic", "one_cycle"):
            return Fraction(1)
        last = (t - self.begin) // self.every
        if self.kind == "iterative":
            rounds = (self.end - self.begin) // self.every + 1
            gone = float(1 - self.keep)  # exact before it is rounded: a share just below 1 is 1 as a float
            power = math.log(self.keep) if gone > 0.5 else math.log1p(-gone)
            return Fraction(math.expm1((last + 1) / rounds * power) / -gone) if last + 1 < rounds else Fraction(1)
        u = 1.0 if t >= self.end else last * self.every / (self.end - self.begin)
        if self.kind == "cubic":
            return Fraction(1 - (1 - u) ** 3)
        return Fraction((1 + math.exp(SHIFT - STEEP)) / (1 + math.exp(SHIFT - STEEP * u)))

    def moving(self, t: int) -> float:
        """The share of the active weights that "rigl" and "set" move after `t` steps."""
        return self.fraction / 2 * (1 + math.cos(math.pi * (t - self.begin) / (self.end - self.begin)))
