"""What is tried, in the order of promise, and the command that makes each again."""

from __future__ import annotations

import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

INT8, STRUCTURES, NEURONS, WEIGHTS, PATTERNS = "int8", "structures", "neurons", "weights", "patterns"
WAYS = (INT8, STRUCTURES, NEURONS, WEIGHTS, PATTERNS)
SAID = {
    INT8: "all weights and activations as whole numbers of 8 bits",
    STRUCTURES: "filters, heads, residual streams and hidden units, removed",
    NEURONS: "hidden units of linear layers alone, removed",
    WEIGHTS: "single weights, set to zero",
    PATTERNS: "weights set to zero in blocks of 4 outputs, or 2 of every 4",
}
PRUNE = ("--allocation", "curves", "--repair", "least_squares")  # quick: a third of what the defaults take
MASK = ("--by", "sparsegpt")


@dataclass(frozen=True)
class Candidate:
    """One way at one budget. `budget` as it is written in the table; `options` of the command `command`. `after`: the candidate whose model it
    is made from; None for the dense one. `quick`: with the rows and settings of the search, else with the defaults of its command."""

    way: str
    budget: str
    command: str
    options: tuple[str, ...]
    after: Candidate | None = None
    quick: bool = True

    @property
    def name(self) -> str:
        return f"{self.way} {self.budget}".strip()

    @property
    def folder(self) -> str:
        """`structures-macs-50pct`: where its model lies, below that of the advice."""
        return re.sub(r"[^\w.:]+", "-", self.name.replace("%", "pct")).replace(":", "of").strip("-.")

    def value(self, option: str) -> str | None:
        """What its command says for an option."""
        return self.options[self.options.index(option) + 1] if option in self.options else None


@dataclass(frozen=True)
class Source:
    """What every command of one advice has in common, as it was typed."""

    model: str
    data: str
    rows: int
    seed: int = 0
    weights: str | None = None
    inputs: Sequence[str] = ()
    ignore: Sequence[str] = field(default=())

    def lines(self, candidate: Candidate) -> list[str]:
        """The commands that make a candidate again, as a shell takes them."""
        before = self.lines(candidate.after) if candidate.after else []
        model = candidate.after.folder if candidate.after else self.model
        words = ["secateur", candidate.command, model, *candidate.options, "--data", self.data]
        words += ["--rows", str(self.rows)] if candidate.quick else []
        words += ["--weights", self.weights] if self.weights and not candidate.after else []
        words += [w for shape in self.inputs for w in ("--input", shape)]
        if candidate.command != "quantise":
            words += ["--seed", str(self.seed)] if self.seed else []
            words += [w for name in self.ignore for w in ("--ignore", name)]
        return [*before, shlex.join([*words, "-o", candidate.folder])]


def _cut(way: str, share: str, *more: str) -> Candidate:
    only = ("--only", "neurons") if way == NEURONS else ()
    blocks = ", blocks" if "--depth" in more else ""
    return Candidate(way, f"macs={share}{blocks}", "prune", ("--at-most", f"macs={share}", *only, *more, *PRUNE))


def _zero(keep: str, pattern: str = "") -> Candidate:
    shaped = ("--pattern", pattern) if pattern else ()
    share = ("--keep", keep) if keep else ()
    return Candidate(PATTERNS if pattern else WEIGHTS, " ".join(filter(None, [pattern, keep and f"keep={keep}"])), "mask", (*share, *shaped, *MASK))


def candidates() -> list[Candidate]:
    """All of them, the most promising first: one of every way, then the ways at other budgets."""
    half = _cut(STRUCTURES, "50%")
    return [
        Candidate(INT8, "", "quantise", ()),
        half, _zero("30%", "4x1"), _zero("20%"), _cut(NEURONS, "75%"), Candidate(INT8, f"after {half.name}", "quantise", (), half), _zero("", "2:4"),
        _cut(STRUCTURES, "70%"), _zero("10%"), _zero("15%", "4x1"), _cut(NEURONS, "60%"), _cut(STRUCTURES, "35%"),
        _zero("50%", "4x1"), _zero("50%"), _cut(STRUCTURES, "50%", "--depth"),
    ]  # fmt: skip


def careful(rows: Sequence[Mapping[str, Any]], lose: float) -> list[Candidate]:
    """For what is left of the time: of every way of pruning the budget that promises most, made as its command makes it by default.

    That is the least time x bytes of those that lost at most four times `lose` points (four where that is less than one), or what lost least.
    """
    every = {c.name: c for c in candidates()}
    found = []
    for way in (STRUCTURES, NEURONS, PATTERNS, WEIGHTS):
        known = [row for row in rows if row["way"] == way and row["state"] == "measured" and row["name"] in every]
        good = [row for row in known if row["lost"] <= 4 * max(lose, 1.0)]
        if known:
            best = min(good, key=lambda row: row["ratio"] * row["bytes"]) if good else min(known, key=lambda row: row["lost"])
            found.append(_careful(every[best["name"]]))
    return found


def careful_ones() -> list[Candidate]:
    """All that `careful` may name."""
    return [_careful(c) for c in candidates() if c.command in ("prune", "mask")]


def _careful(candidate: Candidate) -> Candidate:
    quick = PRUNE if candidate.command == "prune" else MASK
    options = candidate.options[: -len(quick)]
    return replace(candidate, budget=f"{candidate.budget}, careful", options=options, quick=False)
