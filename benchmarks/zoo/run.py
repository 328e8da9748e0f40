"""The coverage suite: every model of the catalogue, one process each, half of its multiply-accumulates asked for.

Run as `python -m benchmarks.zoo.run [--only PATTERN] [--resume] [--again] [--side secateur|torch_pruning|both]`.
One JSON line per model is appended to `benchmarks/results/zoo_SIDE.jsonl` (the last line of a model counts), and the
table is rewritten from all lines at the end. `--resume` skips models that have a line, `--again` only those that are
right. Models run one after the other, so that times and memory mean something.
"""

from __future__ import annotations

import argparse
import fnmatch
import json
from pathlib import Path
from typing import Any

from benchmarks.zoo import catalogue, guard, report, torch_pruning, worker

RESULTS = Path(__file__).resolve().parents[1] / "results"
SIDES = {
    "secateur": (worker.work, guard.Limits(seconds=300)),
    "torch_pruning": (torch_pruning.work, guard.Limits(seconds=60)),
}


def read(path: Path) -> dict[str, dict[str, Any]]:
    """The last line of every model in a results file; empty when there is none."""
    lines = path.read_text().splitlines() if path.exists() else []
    return {row["model"]: row for row in map(json.loads, lines)}


def wanted(options: argparse.Namespace, known: dict[str, dict[str, Any]]) -> list[catalogue.Entry]:
    """The entries that the options select, given the lines that exist."""
    chosen = [e for e in catalogue.entries() if any(fnmatch.fnmatch(e.name, p) for p in options.only)]
    if options.resume:
        chosen = [e for e in chosen if e.name not in known]
    if options.again:
        chosen = [e for e in chosen if not known.get(e.name, {}).get("ok")]
    return chosen


def run_side(side: str, options: argparse.Namespace) -> None:
    """Run one library over the selected models and append its lines."""
    work, limits = SIDES[side]
    path = options.results / f"zoo_{side}.jsonl"
    path.parent.mkdir(parents=True, exist_ok=True)
    chosen = wanted(options, read(path))
    for index, entry in enumerate(chosen, 1):
        row = {"model": entry.name, "kind": entry.kind, "ok": False}
        row |= guard.run(work, entry.name, limits)
        with path.open("a") as file:
            file.write(json.dumps(row) + "\n")
        verdict = "ok" if row["ok"] else row.get("error") or row.get("stopped", "")
        print(f"[{index}/{len(chosen)}] {side} {entry.name}: {verdict[:160]} ({row['wall_s']} s)", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="*", default=["*"], help="patterns over names, for example 'timm/*'")
    parser.add_argument("--resume", action="store_true", help="skip models that have a line")
    parser.add_argument("--again", action="store_true", help="skip models whose line is right")
    parser.add_argument("--side", choices=[*SIDES, "both"], default="both")
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--report", action="store_true", help="only rewrite the table")
    options = parser.parse_args()
    if not options.report:
        guard.preload()
        for side in SIDES:
            if options.side in (side, "both"):
                run_side(side, options)
    order = {entry.name: entry.kind for entry in catalogue.entries()}
    report.write(options.results, order, *(read(options.results / f"zoo_{side}.jsonl") for side in SIDES))


if __name__ == "__main__":
    main()
