"""An advice on the terminal."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from rich import box
from rich.console import Console
from rich.table import Table

from secateur.advise.verdict import points
from secateur.figures import seconds, size

if TYPE_CHECKING:
    from secateur.advise.run import Advice


def show(done: Advice, console: Console) -> None:
    """One row per point, the verdict, and the commands that make each again."""
    console.print(table(done))
    console.print("* nothing else here loses less, is quicker and is smaller at once; what is not on that front is grey", style="dim")
    for row in done.rows:
        if row["state"] != "measured":
            why = " ".join(row["why"].split())
            console.print(f"{row['name']}: {row['state']}: {textwrap.shorten(why, 300)}", markup=False)
    for note in done.notes:
        console.print(f"note: {note}", markup=False)
    console.print()
    for sentence in done.verdict:
        console.print(sentence, markup=False)
    console.print()
    for row in done.rows:
        if row["state"] == "measured":
            console.print(f"# {row['name']}{'' if row['front'] else ' (off the front)'}", markup=False, style="dim")
            for line in row["commands"]:
                console.print(line, markup=False, soft_wrap=True)
    if done.folder is not None:
        console.print(f"saved: {done.folder}", markup=False, soft_wrap=True)


def table(done: Advice) -> Table:
    """Every measured point beside the dense model."""
    minutes = done.seconds / 60
    found = Table(title=f"{done.name}: what pays here, {minutes:.1f} minutes", title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    found.add_column("")
    found.add_column("point")
    for name in ("points lost" if done.metric != "error" else "error, %", "time of dense", "time", "on disk", "peak memory", "took"):
        found.add_column(name, justify="right")
    for row in [{"name": "dense", "took": None, **done.dense}, *[row for row in done.rows if row["state"] == "measured"]]:
        found.add_row(*cells(row), style=None if row["front"] else "dim")
    threads = done.settings.get("threads", 1)
    what = {"accuracy": "accuracy", "agreement": "agreement with the dense model"}.get(done.metric, "squared error of the outputs")
    found.caption = f"{what} on {done.held_out:,} held-out rows; {threads} threads, batch of {done.settings.get('batch', 1)}"
    found.caption_justify = "left"
    return found


def cells(row: Mapping[str, Any]) -> list[str]:
    """The figures of a row as they read; `time of dense` has the quartiles' distance of the rounds beside it."""
    lost = "" if row["name"] == "dense" else points(row)
    peak = size(row["peak_bytes"]) if row.get("peak_bytes") else ""
    took = f"{row['took']:.0f} s" if row.get("took") else ""
    mark, ratio = "*" if row["front"] else "", f"{row['ratio']:.2f} ± {row['spread']:.2f}"
    return [mark, row["name"], lost, ratio, seconds(row["seconds"]), size(row["bytes"]), peak, took]
