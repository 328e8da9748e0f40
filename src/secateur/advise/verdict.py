"""What the figures say, in a few sentences, and which of them are on the Pareto front."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from secateur.advise.candidates import INT8, PATTERNS, WEIGHTS
from secateur.advise.front import front
from secateur.figures import size

FIGURES = ("lost", "ratio", "bytes")  # what a point of the front is
NOISE = 0.02  # of a ratio of times: what two runs of one model differ by anyway
QUICK = "The pruning was quick: without --rows, --allocation, --repair and --by its commands take longer and mostly lose less."
WORDS = {WEIGHTS: "single zeros", PATTERNS: "patterns of zeros"}

Row = Mapping[str, Any]


def marked(dense: dict[str, Any], rows: Sequence[dict[str, Any]]) -> None:
    """Write `front` (True or False) into the dense row and every measured one: whether nothing loses less, is quicker and is smaller at once."""
    known = [dense, *[row for row in rows if row["state"] == "measured"]]
    for row, best in zip(known, front([[row[name] for name in FIGURES] for row in known]), strict=True):
        row["front"] = best


def verdict(dense: Row, rows: Sequence[Row], metric: str, lose: float) -> list[str]:
    """Two to four sentences: int8, the pruning that saves most time within `lose` points, zeros, and which to take. Where the difference is within
    the noise, that is what they say."""
    known = [row for row in rows if row["state"] == "measured"]
    if not known:
        return ["Nothing was measured, so there is nothing to advise."]
    said = [_of_int8(rows, metric)]
    pruned = [row for row in known if row["way"] != INT8 and row["lost"] <= lose]
    said.append(_of_pruning(pruned, [row for row in known if row["way"] != INT8], metric, lose))
    said += _of_zeros(known)
    said.append(_which([row for row in known if row["lost"] <= lose], lose, metric))
    if pruned_at_all := [row for row in known if row["way"] != INT8]:
        if not any(row.get("careful") for row in pruned_at_all):
            said.append(QUICK)
    return [sentence for sentence in said if sentence]


def error(row: Row) -> float:
    """What a ratio may be off by: the spread of its rounds, and what two runs of one model differ by."""
    return max(NOISE, float(row["spread"]))


def quicker(a: Row, b: Row | None = None) -> bool:
    """Whether a takes less time than b (than the dense model) beyond both their noise."""
    return bool(a["ratio"] + error(a) < (1.0 if b is None else b["ratio"] - error(b)))


def told(row: Row, metric: str) -> str:
    return f"{100 * row['ratio']:.0f} % of the dense time, {size(row['bytes'])} on disk, {points(row)} {words_of(metric)} lost"


def points(row: Row) -> str:
    known = row["interval"] is not None and math.isfinite(row["interval"])  # of one row held out nothing is known
    return f"{row['lost']:.2f} ± {row['interval']:.2f}" if known else f"{row['lost']:.2f} ± unknown"


def words_of(metric: str, number: float | None = None) -> str:
    """What is lost, in words; behind a `number` where one is given."""
    words = {"accuracy": "points of accuracy", "agreement": "points of agreement"}.get(metric, "percent of squared error")
    return words if number is None else f"{number:g} {words.replace('points', 'point', 1) if number == 1 else words}"


def _of_int8(rows: Sequence[Row], metric: str) -> str:
    tried = [row for row in rows if row["way"] == INT8]
    if not tried:
        return ""
    best = tried[0]
    if best["state"] == "measured":
        return f"int8 alone gives {told(best, metric)}."
    return f"int8 was {best['state']}: {' '.join(best['why'].split()).rstrip('.')}."


def _of_pruning(good: Sequence[Row], every: Sequence[Row], metric: str, lose: float) -> str:
    if not every:
        return "No way of pruning was measured."
    if not good:
        least = min(every, key=lambda row: row["lost"])
        return f"No pruning stays within {words_of(metric, lose)}; {least['name']} comes nearest with {points(least)}."
    best = min(good, key=lambda row: row["ratio"])
    if not quicker(best):
        small = min(good, key=lambda row: row["bytes"])
        return (
            f"Within {words_of(metric, lose)} no pruning is quicker than the dense model beyond the noise; "
            f"{small['name']} is the smallest, with {told(small, metric)}."
        )
    return f"Of the pruning within {words_of(metric, lose)}, {best['name']} is quickest: {told(best, metric)}."


def _of_zeros(known: Sequence[Row]) -> list[str]:
    """From which share of zeros on they pay in time, if at all."""
    said = []
    for way in (WEIGHTS, PATTERNS):
        rows = [row for row in known if row["way"] == way and "keep=" in row["budget"]]
        if not rows:
            continue
        pays = [row for row in rows if quicker(row)]
        if not pays:
            fewest = min(rows, key=lambda row: row["bytes"])
            said.append(f"On this machine {WORDS[way]} do not pay in time, not even at {fewest['budget']}.")
        elif len(pays) < len(rows):
            most = max(pays, key=lambda row: row["bytes"])
            said.append(f"On this machine {WORDS[way]} pay in time from {most['budget']} down.")
    return said


def _which(good: Sequence[Row], lose: float, metric: str) -> str:
    """A recommendation, where one stands out."""
    fast = [row for row in good if quicker(row)]
    if not fast:
        return f"Nothing within {words_of(metric, lose)} saves time beyond the noise: keep the dense model, or choose by bytes."
    if (vague := min(row["interval"] for row in fast)) > max(lose, 1.0):
        return f"The held-out rows tell losses apart to ± {vague:.1f} only, so nothing is advised: compare on more rows."
    first, *others = sorted(fast, key=lambda row: row["ratio"])
    close = [row for row in others if not quicker(first, row)]
    if not close:
        return f"If time counts, take {first['name']}."
    names = ", ".join(row["name"] for row in close)
    return f"{first['name']} and {names} are equally quick within the noise: choose by what they lose and by their bytes."
