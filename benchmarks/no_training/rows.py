"""Results as lines of JSON: appended one by one, so that a run that is cut off loses one row at most."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parents[1] / "results" / "no_training"
Row = dict[str, Any]
Key = tuple[str, str, str, int]


def key(row: Row) -> Key:
    """What makes a row one measurement: task, ratio, method, seed."""
    return row["task"], row["ratio"], row["method"], row["seed"]


class Store:
    """One file of rows. The last row of a key counts."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def read(self) -> list[Row]:
        """The rows that count, in the order in which they were first written."""
        found: dict[Key, Row] = {}
        for line in self.path.read_text(encoding="utf8").splitlines() if self.path.exists() else ():
            if line.strip():
                row = json.loads(line)
                found[key(row)] = row
        return list(found.values())

    def append(self, row: Row) -> None:
        """Write one row at once."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a", encoding="utf8") as file:
            file.write(json.dumps(row, ensure_ascii=False) + "\n")

    def done(self, failed_too: bool = True) -> set[Key]:
        """Keys that need not run again; a failure is a result, unless it is to be tried again."""
        return {key(row) for row in self.read() if failed_too or "error" not in row}


def store(task: str) -> Store:
    return Store(FOLDER / f"{task}.jsonl")


def every_row(folder: Path = FOLDER) -> list[Row]:
    """The rows of all tasks."""
    files: Iterable[Path] = sorted(folder.glob("*.jsonl"))
    return [row for file in files for row in Store(file).read()]
