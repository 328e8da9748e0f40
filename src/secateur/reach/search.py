"""The plan that meets targets which must be measured: real cuts, measured beside the dense model, until the figure fits.

`planner(fraction)` gives a plan for a fraction of the MACs. What is measured falls with the fraction, but not evenly and
not without noise. So the search holds a bracket (a fraction that meets all targets, one that does not), places each
step by interpolation inside it, and measures what it ends on again with more rounds; where that does not bear out the
first reading, it goes on.
"""

from __future__ import annotations

import hashlib
import math
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch
from torch import nn

from secateur.budget import MeasuredTarget, Reading
from secateur.errors import InputError, TargetError
from secateur.plan import Plan
from secateur.processes import ALONE, Alone

HALVINGS = 24  # of the way between two plans; most need no new measurement

Planner = Callable[[float], Plan]
Progress = Callable[[str], None]


@dataclass(frozen=True)
class Options:
    """How hard to look.

    Attributes:
        rounds, final_rounds: timed rounds of a step, and of the reading that decides.
        close: a step is near enough when it is at most this share below the budget.
        accept: so far may the deciding reading be below the budget before the search goes on.
        steps: cuts and measurements at most.
        forms: other shapes of a plan (aligned widths), each no worse by score. They are measured beside the first plan, and
            the fastest of them, where it is no slower than the plan itself, is what the search goes on with.
        between: `(smaller plan, larger plan, t)` -> a plan between the two, larger with t in 0..1; where what is measured jumps from far
            below the budget to above it, the search ends between the plans on both sides of the jump.
        say: told of every step.
        processes: of several that search together process 0 alone takes the readings, while the others wait.
    """

    rounds: int = 11
    final_rounds: int = 31
    close: float = 0.03
    accept: float = 0.05
    steps: int = 26
    forms: Sequence[Callable[[Plan], Plan]] = ()
    between: Callable[[Plan, Plan, float], Plan] | None = None
    say: Progress | None = None
    processes: Alone = ALONE


@dataclass(frozen=True)
class Try:
    """One cut and its readings. `share` is the worst of the targets, what was read over what was asked."""

    fraction: float
    plan: Plan = field(repr=False)
    widths: str
    share: float
    readings: tuple[Reading, ...]
    rounds: int
    seconds: float
    note: str = ""

    @property
    def meets(self) -> bool:
        return self.share <= 1

    def to_json(self) -> dict[str, Any]:
        macs = self.plan.after.macs / max(1, self.plan.before.macs)
        return {
            "fraction": self.fraction, "macs": macs, "widths": self.widths, "share": self.share, "rounds": self.rounds,
            "seconds": self.seconds, "note": self.note, "readings": [asdict(r) for r in self.readings],
        }  # fmt: skip


@dataclass(frozen=True)
class Reached:
    """The plan, one row per target (asked and achieved), and every step on the way."""

    plan: Plan
    achieved: list[dict[str, Any]]
    trail: list[Try]


def reach(
    planner: Planner,
    realise: Callable[[Plan], nn.Module],
    targets: Sequence[MeasuredTarget],
    model: nn.Module,
    args: tuple,
    kwargs: Mapping[str, Any] | None = None,
    options: Options | None = None,
) -> Reached:
    """The largest fraction of the MACs, as far as measurements can tell, whose plan meets all `targets`.

    Args:
        planner: fraction in (0, 1) -> a plan; TargetError where there is none so small.
        realise: plan -> the cut model.
        targets: all are met at once.
        model, args, kwargs: the dense model and its call.

    Raises:
        InputError: no targets, or an absolute budget above what the dense model takes.
        ModelError: the runtime is not installed or cannot run the model.
        TargetError: even the smallest plan is above a budget; the message names the nearest reachable.
    """
    if not targets or not all(isinstance(t, MeasuredTarget) for t in targets):
        raise InputError("reach() takes targets that are measured.\n  Pass Latency(at_most='60%') or PeakMemory(...).")
    with ExitStack() as stack:
        grad = torch.is_grad_enabled()
        readers = [stack.enter_context(t.beside(model, args, kwargs)) for t in targets]
        stack.enter_context(torch.set_grad_enabled(grad))  # a planner may need the gradients that a measurement goes without
        search = _Search(planner, realise, targets, readers, options or Options())
        found = search.run()
    return Reached(found.plan, [row(t, r) for t, r in zip(targets, found.readings, strict=True)], search.trail)


class _Search:
    """What was tried, and the bracket that follows from it: `low`, the largest fraction that meets all targets, below
    `top`, the smallest that does not; at and below `dead` there is no plan. A later reading of the same widths, with more
    rounds, takes the place of an earlier one, so a reading that noise spoilt does not bind the search."""

    def __init__(
        self, planner: Planner, realise: Callable[[Plan], nn.Module], targets: Sequence[MeasuredTarget],
        readers: Sequence[Callable[[nn.Module, int], Reading]], options: Options,
    ):  # fmt: skip
        self.planner, self.realise, self.targets, self.readers, self.options = planner, realise, targets, readers, options
        self.trail: list[Try] = []
        self.read: dict[str, Try] = {}  # by widths, the reading that stands
        self.points: dict[float, Plan] = {}
        self.refused: TargetError | None = None
        self.dead = 0.0
        self.form: Callable[[Plan], Plan] | None = None

    def run(self) -> Try:
        try:
            return self._search(self.options.steps)
        except TargetError:
            if self.form is None:
                raise
        self.form, self.points, self.dead = None, {}, 0.0  # rounded up, the narrowest widths are too wide: as planned, then
        return self._search(len(self.trail) + self.options.steps)

    def _search(self, steps: int) -> Try:
        while len(self.trail) < steps:
            low, top = self._bracket()
            if low is None and self._top(top) - self.dead < max(0.002, 0.04 * self._top(top)):
                break
            narrow = low is not None and self._top(top) - low.fraction < 0.004
            if low is not None and (narrow or low.share >= 1 - self.options.close):
                if not self._decided(low):
                    self.again(low)
                elif low.share >= 1 - self.options.accept or (narrow and (top is None or self._decided(top))):
                    return self._between(low, top) if top is not None and low.share < 1 - self.options.accept else low
                elif narrow and top is not None:
                    self.again(top)  # far below the budget, and a little more misses it: is that so?
                else:
                    self.at(self._next(low, top))
                continue
            self.at(self._next(low, top) if self.trail else self._first())
        return self._best_effort()

    # ------------------------------------------------------------ one step
    def at(self, fraction: float) -> None:
        """Make the plan of this fraction and measure it, if none of these widths was."""
        try:
            plan = self.planner(fraction)
        except TargetError as error:
            self.refused, self.dead = error, fraction
            return
        plan = self.form(plan) if self.form else plan
        first = not self.read
        if widths(plan) not in self.read:
            self.measure(plan, fraction, self.options.rounds)
        self.points[fraction] = self._best_form(plan, fraction) if first else plan

    def _best_form(self, plan: Plan, fraction: float) -> Plan:
        """Of the plan and its other forms the one that measures fastest, which is the form of what follows."""
        best = self.read[widths(plan)]
        for form in self.options.forms:
            other = form(plan)
            if widths(other) in self.read:
                continue
            tried = self.measure(other, fraction, self.options.rounds, f"aligned to {other.why.get('aligned', '?')}")
            if tried.share <= best.share:
                best, self.form = tried, form
        return best.plan

    def again(self, tried: Try) -> None:
        """Measure once more, with as many rounds as decide."""
        self.measure(tried.plan, tried.fraction, self.options.final_rounds, "again")

    def measure(self, plan: Plan, fraction: float, rounds: int, note: str = "") -> Try:
        begin = time.perf_counter()
        cut_model = self.realise(plan)
        readings = taken(self.readers, cut_model, rounds, self.options.processes)
        for target, reading in zip(self.targets, readings, strict=True):
            target.limit(reading.dense)
        share = max(t.share(r) for t, r in zip(self.targets, readings, strict=True))
        tried = Try(fraction, plan, widths(plan), share, readings, rounds, time.perf_counter() - begin, note)
        self.trail.append(tried)
        self.read[tried.widths] = tried
        if self.options.say:
            shown = ", ".join(f"{t.figure} {100 * r.ratio:.1f} %" for t, r in zip(self.targets, readings, strict=True))
            macs = plan.after.macs / max(1, plan.before.macs)
            self.options.say(f"step {len(self.trail)}: {100 * macs:.1f} % of the MACs, {shown}")
        return tried

    def _between(self, low: Try, top: Try) -> Try:
        """Bisection between two plans whose figures lie far apart; the largest that surely meets the targets. Where a single unit
        makes the figure jump, its group is passed over and the search goes on with the others."""
        best, larger, bottom, above = low, top.plan, 0.0, 1.0
        under, over = low.plan, top.plan
        for _ in range(HALVINGS if self.options.between else 0):
            middle = (bottom + above) / 2
            plan = self.options.between(under, larger, middle)  # type: ignore[misc]
            if widths(plan) in (widths(best.plan), widths(over)):  # no unit lies between
                mine = best.plan.keep
                larger = replace(larger, keep={n: m if torch.equal(over.keep[n], mine[n]) else mine[n] for n, m in larger.keep.items()})
                under, over, bottom, above = best.plan, larger, 0.0, 1.0
                continue
            tried = self._formed(plan, low.fraction, f"between, {middle:.3f}")
            if tried.meets and tried.share > best.share:
                best, bottom = tried, middle
            elif tried.meets:
                bottom = middle
            else:
                over, above = plan, middle
            if best.share >= 1 - self.options.close:
                break
        return best

    def _formed(self, plan: Plan, fraction: float, note: str) -> Try:
        """A plan in the form that was chosen, read twice where the first reading meets the targets."""
        plan = self.form(plan) if self.form else plan
        tried = self.read.get(widths(plan)) or self.measure(plan, fraction, self.options.rounds, note)
        decided = self._decided(tried) or not tried.meets
        return tried if decided else self.measure(plan, fraction, self.options.final_rounds, "again")

    # ------------------------------------------------------------ the bracket
    def _tries(self) -> list[Try]:
        """A reading for every fraction asked for, smallest fraction first."""
        return [replace(self.read[widths(plan)], fraction=f, plan=plan) for f, plan in sorted(self.points.items())]

    def _bracket(self) -> tuple[Try | None, Try | None]:
        """(low, top). What missed below a fraction that surely meets binds nothing: figures fall unevenly."""
        tries = self._tries()
        sure = max((t.fraction for t in tries if t.meets and self._decided(t)), default=0.0)
        top = next((t for t in tries if not t.meets and t.fraction > sure), None)
        return max((t for t in tries if t.meets and t.fraction < self._top(top)), key=lambda t: t.fraction, default=None), top

    def _decided(self, tried: Try) -> bool:
        return tried.rounds >= self.options.final_rounds

    @staticmethod
    def _top(top: Try | None) -> float:
        return top.fraction if top is not None else 1.0

    @property
    def _aim(self) -> float:
        return 1 - self.options.close / 2

    def _first(self) -> float:
        """As if the figure were proportional to the MACs."""
        asked = min(t.percent / 100 if t.percent else 0.5 for t in self.targets)
        return max(self.dead + 0.2 * (1 - self.dead), min(asked, 0.95))

    def _next(self, low: Try | None, top: Try | None) -> float:
        """Interpolated between the ends of the bracket, every third time its middle; below the bracket while nothing met."""
        above, share = (top.fraction, top.share) if top is not None else (1.0, self._of_dense())
        bottom = low.fraction if low is not None else self.dead
        width = above - bottom
        if low is not None:
            gain = share - low.share
            guess = bottom + (self._aim - low.share) / gain * width if gain > 0 else bottom
        else:
            misses = [(t.fraction, t.share) for t in self._tries() if t.fraction > above]
            far, its = misses[0] if misses else (1.0, self._of_dense())
            slope = (its - share) / (far - above) if far > above else 0.0
            guess = above - (share - self._aim) / slope if slope > 0 else 0.0
        if len(self.points) % 3 == 0:
            guess = bottom + width / 2
        return min(max(guess, bottom + 0.1 * width), above - 0.1 * width)

    def _of_dense(self) -> float:
        """The share of the dense model, which is a fraction of 1."""
        last = self.trail[-1].readings
        return max(t.share(Reading(r.dense, r.dense, 1.0)) for t, r in zip(self.targets, last, strict=True))

    # ------------------------------------------------------------ the end
    def _best_effort(self) -> Try:
        """After the last step: the largest that met its budget, readings that decide before others; none is an error."""
        for tried in sorted((t for t in self._tries() if t.meets), key=lambda t: (self._decided(t), t.fraction), reverse=True):
            if not self._decided(self.read[tried.widths]):
                self.again(tried)
            if self.read[tried.widths].meets:
                return replace(self.read[tried.widths], fraction=tried.fraction, plan=tried.plan)
        if not self.trail:
            raise self.refused or TargetError("no plan could be made for any fraction of the MACs.\n  Drop another target, or entries of ignore=.")
        nearest = min(self.trail, key=lambda t: t.share)
        worst, reading = max(zip(self.targets, nearest.readings, strict=True), key=lambda pair: pair[0].share(pair[1]))
        percent = min(99, math.ceil(102 * reading.ratio))
        raise TargetError(
            f"{worst} is out of reach: the best of {len(self.trail)} cuts measured keeps "
            f"{100 * nearest.plan.after.macs / max(1, nearest.plan.before.macs):.1f} % of the MACs and still takes "
            f"{100 * reading.ratio:.1f} % of the dense model's {worst.figure} ({shown(worst, reading.cut)} of {shown(worst, reading.dense)}).\n"
            f"  The nearest reachable is {worst.figure}={percent}%; ask for that much or more, or drop entries of ignore=."
        )


def taken(readers: Sequence[Callable[[nn.Module, int], Reading]], cut_model: nn.Module, rounds: int, processes: Alone) -> tuple[Reading, ...]:
    """The readings of a cut model, which process 0 takes for all."""
    own = [asdict(read(cut_model, rounds)) for read in readers] if processes.rank == 0 else []
    return tuple(Reading(**row) for row in processes.fact("readings", own))


def widths(plan: Plan) -> str:
    """A short name for the kept counts of all groups: plans of the same widths run alike."""
    text = ";".join(f"{name}={int(mask.sum())}" for name, mask in sorted(plan.keep.items()))
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def row(target: MeasuredTarget, reading: Reading) -> dict[str, Any]:
    """Asked and achieved, plain values."""
    settings = {k: v for k, v in asdict(target).items() if k != "at_most"}
    return {
        "target": str(target), "figure": target.figure, "asked": target.at_most, "limit": target.limit(reading.dense),
        "dense": reading.dense, "achieved": reading.cut, "ratio": reading.ratio, "ratio_spread": reading.spread,
        "share": target.share(reading), "rounds": reading.rounds, "settings": settings,
    }  # fmt: skip


def shown(target: MeasuredTarget, value: float) -> str:
    return f"{value:,.0f} bytes" if target.figure == "peak_memory" else f"{1e3 * value:.3f} ms"
