"""Tables of what became of each layer."""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from rich.table import Table

from secateur.figures import percent

if TYPE_CHECKING:
    from secateur.masks import LayerMask
    from secateur.repair import LayerRepair

NOT_FITTED = ("plain", "bias")
WORST = 8  # layers of a repair that are listed; all are in --json and in the report


def masks(rows: Sequence[LayerMask], why: Mapping[str, Any]) -> Table:
    """The layers whose masks cost most, and a summary of all."""
    table = Table("layer", title=f"single weights by {why.get('score', '?')}: error of each layer, of its variance")
    for name in ("weights", "stay", "mask alone", "fitted"):
        table.add_column(name, justify="right")
    seen = any(row.rows for row in rows)
    for row in sorted(rows, key=lambda r: -r.plain)[:WORST]:
        errors = (f"{row.plain:.2g}", f"{row.repaired:.2g}" if row.used == "fit" else "-") if seen else ("", "")
        table.add_row(row.layer, f"{row.size:,}", percent(row.kept / row.size), *errors)
    kept, size = sum(r.kept for r in rows), sum(r.size for r in rows)
    said = f"{kept:,} of {size:,} weights of {len(rows)} layers stay ({percent(kept / max(1, size))}), pattern {rows[0].pattern}"
    if dense := sum(r.dense for r in rows):
        said += f"\n{dense:,} of them because the pattern does not divide their layer"
    table.caption = said
    return table


def repairs(rows: Sequence[LayerRepair]) -> Table:
    """The layers that a plain cut would hurt most, and what the repair made of them; a summary of all below."""
    table = Table("layer", title="repaired from data: error of each layer, of its variance")
    for name in ("plain cut", "repaired"):
        table.add_column(name, justify="right")
    table.add_column("used")
    for row in sorted(rows, key=lambda r: -r.plain)[:WORST]:
        table.add_row(row.layer, f"{row.plain:.2g}", f"{_error(row):.2g}", row.used)
    whole = [r for r in rows if r.layers > 1]
    single = [r for r in rows if r.layers == 1] or whole
    fits = sum(row.used not in NOT_FITTED for row in single)
    middle = [statistics.median(values) for values in ([r.plain for r in single], [_error(r) for r in single])]
    said = f"{fits} of {len(single)} layers fitted; median error {middle[0]:.2g} -> {middle[1]:.2g}"
    if whole:
        said += f"\n{sum(not r.why for r in whole)} of {len(whole)} branches fitted as a whole as well"
    kept: dict[str, list[str]] = defaultdict(list)
    for row in rows:
        if row.why or row.used in NOT_FITTED:
            kept[row.why or row.used].append(row.layer)
    for why, layers in kept.items():
        shown = ", ".join(layers[:3]) + (" ..." if len(layers) > 3 else "")
        said += f"\n{len(layers)} not fitted ({shown}): {why}"
    table.caption = said
    return table


def _error(row: LayerRepair) -> float:
    """Of what was used."""
    return {"plain": row.plain, "bias": row.bias}.get(row.used, row.repaired)
