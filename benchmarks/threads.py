"""What benchmarks that are run with one thread and with two have in common: their options, and files in which each count keeps its own rows."""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from benchmarks.no_training.__main__ import versions


def options(doc: str | None, rounds: int, **more: dict[str, Any]) -> argparse.Namespace:
    """`--threads`, `--rounds`, and an option for each of `more`, as `add_argument` takes it."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", nargs="+", type=int, default=[1, 2])
    parser.add_argument("--rounds", type=int, default=rounds)
    for name, how in more.items():
        parser.add_argument(f"--{name}", **how)
    return parser.parse_args()


def measured(results: Path, given: argparse.Namespace, rows: Callable[[], Any], **facts: Any) -> None:
    """Writes what `rows` gives for each count of threads; those of other counts stay as an earlier run left them."""
    found: dict[str, Any] = json.loads(results.read_text())["threads"] if results.exists() else {}
    for threads in given.threads:
        torch.set_num_threads(threads)
        found[str(threads)] = rows()
        whole = {**facts, "rounds": given.rounds, "load_average": os.getloadavg(), "versions": versions(), "threads": dict(sorted(found.items()))}
        results.write_text(json.dumps(whole, indent=1) + "\n")
