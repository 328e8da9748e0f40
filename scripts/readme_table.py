"""Write the results table of README.md from benchmarks/results/*.json, or check that it is what they say.

Run as `python scripts/readme_table.py` to write, with `--check` to fail if writing would change anything.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
BEGIN, END = "<!-- results -->", "<!-- /results -->"
Rows = Iterator[tuple[str, str]]


def coverage(data: dict[str, Any]) -> Rows:
    """benchmarks/results/zoo.json: how many models were captured, proven, and brought to half of their MACs.

    Nothing while the suite has only been run in part: a model not yet tried would read as a failure.
    """
    if any(model["secateur"] is None for model in data["models"]):
        return
    for kind, n in data["counts"].items():
        if n["models"]:
            yield (
                f"half of the MACs: {kind}, {n['models']} models",
                f"captured {n['captured']}, proven {n['proven']}, at 50 % {n['at_half']}, stop short {n['stop_short']} "
                f"(Torch-Pruning finishes {n['torch_pruning']} of {n['torch_pruning_tried']} tried, values unchecked)",
            )


def resnet56(data: dict[str, Any]) -> Rows:
    """benchmarks/results/resnet56.json: accuracy at half of the MACs without training."""
    dense = data["dense"]
    yield f"{data['model']}: dense", f"{dense['accuracy']} %, {dense['macs']:,} MACs"
    for row in data["rows"]:
        who = f"{row['tool']}, {row['score']}" + (", global" if row.get("global") else "")
        yield (
            f"no training, {who}",
            f"{row['accuracy_as_cut']} % as cut, {row['accuracy_bn_re_estimated']} % with BatchNorm re-estimated, "
            f"{row['macs_percent']} % of the MACs",
        )


def speed(data: dict[str, Any]) -> Rows:
    """benchmarks/results/speed.json: seconds to trace, plan and cut."""
    for row in data["side_by_side"]:
        ours, theirs = row["secateur"], row["torch_pruning"]
        yield (
            f"trace, plan and cut {row['model']} to half of its MACs",
            f"{ours['all']:.2f} s, of it {ours['export']:.2f} s torch.export (Torch-Pruning: one step {theirs['all']:.2f} s, "
            f"search for the ratio that gives half {theirs['search']:.2f} s)",
        )
    for row in data["alone"]:
        if "seconds" in row:
            yield f"trace, plan{'' if 'params' in row else ' and cut'} {row['model']}", f"{row['seconds']['all']:.2f} s"


SOURCES: dict[str, tuple[str, Callable[[dict[str, Any]], Rows]]] = {
    "zoo.json": ("make zoo", coverage),
    "resnet56.json": ("make bench", resnet56),
    "speed.json": ("make bench", speed),
}


def table(folder: Path) -> str:
    """The Markdown table of the results files that are there."""
    lines = ["| what | result | from |", "| --- | --- | --- |"]
    for name, (command, rows) in SOURCES.items():
        if (folder / name).exists():
            source = f"[`{command}`](benchmarks/results/{name})"
            data = json.loads((folder / name).read_text())
            lines += [f"| {what} | {figure} | {source} |" for what, figure in rows(data)]
    return "\n".join(lines) if len(lines) > 2 else "No results have been committed yet."


def written(readme: str, rows: str) -> str:
    """The README with the text between the two markers replaced."""
    head, rest = readme.split(BEGIN)
    return f"{head}{BEGIN}\n{rows}\n{END}{rest.split(END)[1]}"


def main() -> int:
    path = ROOT / "README.md"
    old = path.read_text()
    new = written(old, table(ROOT / "benchmarks" / "results"))
    if "--check" in sys.argv:
        return int(old != new)
    path.write_text(new)
    return 0


if __name__ == "__main__":
    sys.exit(main())
