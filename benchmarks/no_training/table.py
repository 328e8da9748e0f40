"""`python -m benchmarks.no_training.table`: the rows as Markdown, mean ± standard deviation over seeds.

The table shows the best variant of Torch-Pruning; `--variants` lists all of them, as they were screened.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Iterable, Sequence
from pathlib import Path

from benchmarks.no_training.peer import PREFIX
from benchmarks.no_training.rows import FOLDER, Row, every_row
from benchmarks.no_training.tasks import TASKS, Task

ORDER = ("dense", "ours", "ours_layers", "torch_pruning", "taylor", "taylor_inner", "flap", "magnitude", "magnitude_inner", "random")
TITLES = {
    "dense": "dense",
    "ours": "**secateur**, inputs only",
    "ours_layers": "secateur, layers fitted one by one",
    "torch_pruning": "Torch-Pruning, best variant, BN re-estimated",
    "taylor": "Taylor with labels, BN re-estimated",
    "taylor_inner": "Taylor with labels, residual stream kept, BN re-estimated",
    "flap": "FLAP-like, biases only",
    "magnitude": "magnitude (L2), BN re-estimated",
    "magnitude_inner": "magnitude (L2), residual stream kept, BN re-estimated",
    "random": "random, BN re-estimated",
}


def spread(numbers: Sequence[float], digits: int = 2) -> str:
    """`92.10 ± 0.05`; the sample standard deviation, none for a single number."""
    mean = statistics.fmean(numbers)
    if len(numbers) < 2:
        return f"{mean:.{digits}f}"
    return f"{mean:.{digits}f} ± {statistics.stdev(numbers):.{digits}f}"


def digits(metric: str) -> int:
    return 4 if metric in ("cosine", "spearman") else 3 if metric in ("perplexity", "nats") else 2


def asked(task: Task, ratio: str, rows: Iterable[Row]) -> str:
    """The bar beside what was reached, where the issue sets one."""
    if ratio not in task.bars:
        return ""
    bar = task.bars[ratio]
    mean = statistics.fmean(row[task.metric] for row in rows)
    met = mean >= bar if task.more_is_better else mean <= bar
    sign = "≥" if task.more_is_better else "≤"
    return f"{sign} {bar:.{digits(task.metric)}f}: {'met' if met else 'missed'}"


def line(task: Task, ratio: str, method: str, rows: list[Row]) -> str:
    """One row of the table from the seeds of one method at one ratio."""
    good = [row for row in rows if "error" not in row]
    metrics = (task.metric, *task.shown)
    title = TITLES.get(method, method)
    if variants := sorted({row["variant"].removeprefix(PREFIX) for row in good if "variant" in row}):
        title += f" ({', '.join(variants)})"
    if not good:
        return _cells(ratio, title, f"failed: {rows[0]['error'][:120]}", *[""] * (len(metrics) + 2), "0")
    cells = [spread([row[m] for row in good], digits(m)) for m in metrics]
    macs = f"{statistics.fmean(row['macs_percent'] for row in good):.2f} %"
    seconds = f"{statistics.fmean(row.get('cpu_seconds', row['seconds']) for row in good):.0f}" if method != "dense" else ""
    bar = asked(task, ratio, good) if method == "ours" else ""
    failed = f", {len(rows) - len(good)} failed" if len(good) < len(rows) else ""
    return _cells(ratio, title, *cells, bar, macs, seconds, f"{len(good)}{failed}")


def _cells(*cells: str) -> str:
    return f"| {' | '.join(cells)} |"


def section(task: Task, rows: list[Row], variants: bool = False) -> str:
    """Heading and table of one task."""
    head = ["ratio", "method", task.metric, *task.shown, "asked of secateur", "MACs left", "s", "seeds"]
    lines = [f"### {task.name}", "", f"Calibrated from {task.calibration}.", "", _cells(*head), _cells(*["---"] * len(head))]
    for ratio in ("1", *task.shares):
        for method in ORDER:
            if found := [r for r in rows if r["ratio"] == ratio and r["method"] == method]:
                lines.append(line(task, ratio, method, found))
        for method in sorted({r["method"] for r in rows if r["method"].startswith(PREFIX)}) if variants else ():
            if found := [r for r in rows if r["ratio"] == ratio and r["method"] == method]:
                lines.append(line(task, ratio, f"{method} (first {found[0].get('samples')})", found))
    return "\n".join(lines)


def table(rows: list[Row], variants: bool = False) -> str:
    """All tasks that have rows."""
    parts = [section(t, own, variants) for t in TASKS.values() if (own := [r for r in rows if r["task"] == t.name])]
    return "\n\n".join(parts) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--variants", action="store_true", help="every variant of Torch-Pruning as well")
    parser.add_argument("--out", type=Path, help="a file instead of the terminal")
    options = parser.parse_args()
    text = table(every_row(FOLDER), options.variants)
    if options.out:
        options.out.write_text(text, encoding="utf8")
    else:
        print(text, end="")


if __name__ == "__main__":
    main()
