"""What the table of a quantised model means, in sentences."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from secateur.figures import percent, seconds, size

if TYPE_CHECKING:
    from secateur.quantise.run import Row

POINTS = 0.05  # of accuracy that int8 may cost before it is called wrong
BOUND = 0.25  # the same for the error of the outputs where there is no accuracy
_EQUAL = 0.03  # times that are this close are the same: the spread of the rounds is no smaller


def warnings(rows: Sequence[Row], worst: Callable[[str], list[str]]) -> list[str]:
    """One sentence for every int8 row that is far from its own float32, is slower, or lost zeros. `worst`: names the layers of a row that lose
    most."""
    own = {row.name: row for row in rows}
    out = []
    for row in rows:
        if not row.int8:
            continue
        base = own[row.name.removesuffix(" int8")]
        if said := _differs(row, base):
            layers = worst(row.name)
            out.append(said + (f"; the layers that lose most: {', '.join(layers)}" if layers else ""))
        if row.seconds.median > base.seconds.median * (1 + _EQUAL):
            out.append(
                f"{row.name} is slower than float32 here: {seconds(row.seconds.median)} to {seconds(base.seconds.median)}; "
                "the steps between int8 and float32 cost more than the multiplications save"
            )
        if row.zeros < base.zeros * row.weights // max(1, base.weights):
            had = f"{base.zeros:,} among {base.weights:,}"
            out.append(f"{row.name} has {row.zeros:,} zeros among {row.weights:,} weights, float32 {had}: zeros were lost")
    return out


def _differs(row: Row, base: Row) -> str:
    if row.accuracy is not None and base.accuracy is not None and not row.accuracy >= base.accuracy - POINTS:
        lost = 100 * (base.accuracy - row.accuracy)
        return f"{row.name} loses {lost:.2f} points of accuracy to float32, more than {100 * POINTS:.0f}"
    if not row.error <= BOUND:
        return f"outputs of {row.name} are off those of float32 by {percent(row.error)}, more than {percent(BOUND)}"
    return ""


def verdict(rows: Sequence[Row]) -> list[str]:
    """Whether int8 alone would do, and what pruning adds to it; nothing without a dense model."""
    named = {row.name: row for row in rows}
    if "dense" not in named:
        return []
    pruned, alone, both = named["pruned"], named["dense int8"], named["pruned int8"]
    better = alone.bytes <= pruned.bytes and _time(alone, pruned) <= 1 + _EQUAL and _quality(alone, pruned) >= 0
    worse = alone.bytes >= pruned.bytes and _time(alone, pruned) >= 1 - _EQUAL and _quality(alone, pruned) <= 0
    against = f"int8 alone against pruning alone: {_told(alone, pruned)}"
    if better:
        against += ". int8 alone does all that pruning alone does"
    elif worse:
        against += ". Pruning alone does all that int8 alone does"
    on_top = f"pruning on top of int8: {_told(both, alone)}"
    return [against, on_top + (". It makes int8 no quicker here" if _time(both, alone) >= 1 - _EQUAL else "")]


def _time(row: Row, base: Row) -> float:
    return row.seconds.median / base.seconds.median


def _quality(row: Row, base: Row) -> float:
    """Above 0 if `row` is better: accuracy, else nearness to the dense model."""
    if row.accuracy is not None and base.accuracy is not None:
        return row.accuracy - base.accuracy
    return (base.against_dense or 0.0) - (row.against_dense or 0.0)


def _told(row: Row, base: Row) -> str:
    said = f"{_time(row, base):.2f} times the time, {row.bytes / base.bytes:.2f} times the bytes ({size(row.bytes)} to {size(base.bytes)})"
    if row.accuracy is not None and base.accuracy is not None:
        return f"{said}, {100 * (row.accuracy - base.accuracy):+.2f} points of accuracy"
    return f"{said}, outputs off the dense model's by {percent(row.against_dense or 0.0)} to {percent(base.against_dense or 0.0)}"
