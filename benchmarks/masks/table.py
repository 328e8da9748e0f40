"""`python -m benchmarks.masks.table [--out FILE]`: the rows as Markdown, one line per method, one column per share or pattern."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from benchmarks.masks.__main__ import FOLDER, METHODS, POINTS
from benchmarks.no_training.rows import Row, every_row
from benchmarks.no_training.table import digits, spread
from benchmarks.no_training.tasks import TASKS, Task

TITLES = {
    "magnitude": "magnitude", "magnitude + BN": "magnitude, BN re-estimated", "wanda": "Wanda", "wanda + BN": "Wanda, BN re-estimated",
    "sparsegpt": "SparseGPT", "sparsegpt + BN": "SparseGPT, BN re-estimated", "alps, own targets": "ALPS with refit, each layer's own output",
    "sparsegpt, ours": "**SparseGPT, refit, corrected targets**", "obc, ours": "**OBC, refit, corrected targets**",
    "alps, ours": "**ALPS, refit, corrected targets** (the default)", "alps, permuted": "the same, units reordered first (`permute=True`)",
    "sparsegpt, permuted": "SparseGPT, units reordered first", "sparsegpt, searched": "SparseGPT, layers' shares searched",
    "alps, erk": "the same, more in small layers (ERK)",
    "alps, searched": "the same, layers' shares searched (`budget='search'`)",
}  # fmt: skip
DENSE = {"resnet56": 93.39, "resnet20": 91.73, "lm_shakespeare": 4.5422}


def cell(task: Task, rows: Sequence[Row]) -> str:
    """Mean ± standard deviation, and the number of seeds where it is not three."""
    good = [row[task.metric] for row in rows if "error" not in row]
    if not good:
        return "failed" if rows else ""
    seeds = f" ({len(good)})" if len(good) == 2 else ""
    return spread(good, digits(task.metric)) + seeds


def section(task: Task, rows: Sequence[Row]) -> str:
    points = [p for p in POINTS if any(row["ratio"] == p for row in rows)]
    lines = [f"### {task.name}: {task.metric}, dense {DENSE[task.name]:.{digits(task.metric)}f}", "",
             f"What goes of the weights of linear layers and convolutions. Calibrated from {task.calibration}, no labels, no training; "
             "± over three calibration seeds, one seed where there is no ±.", "",
             f"| method | {' | '.join(points)} |", f"| {' | '.join(['---'] * (len(points) + 1))} |"]  # fmt: skip
    for name in METHODS:
        mine = [row for row in rows if row["method"] == name]
        if mine:
            lines.append(f"| {TITLES[name]} | {' | '.join(cell(task, [r for r in mine if r['ratio'] == p]) for p in points)} |")
    return "\n".join(lines) + "\n"


def table(folder: Path = FOLDER) -> str:
    rows = every_row(folder)
    return "\n".join(section(TASKS[name], [r for r in rows if r["task"] == name]) for name in sorted({r["task"] for r in rows}))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    if options.out:
        options.out.write_text(table())
    else:
        print(table())


if __name__ == "__main__":
    main()
