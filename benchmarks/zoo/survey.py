"""Capture every model of the zoo with torch.export alone: seconds, operators, higher-order regions.

Run as `python -m benchmarks.zoo.survey OUT.jsonl [--only PATTERN] [--shard I/N]`. One JSON line per model; resumable.
"""

from __future__ import annotations

import argparse
import collections
import fnmatch
import json
import time
import warnings
from pathlib import Path
from typing import Any

import torch

from benchmarks.zoo import catalogue


def operators(program: torch.export.ExportedProgram) -> dict[str, int]:
    """How often each operator is called, nested regions included."""
    count: collections.Counter[str] = collections.Counter()
    for module in program.graph_module.modules():
        if isinstance(module, torch.fx.GraphModule):
            for node in module.graph.nodes:
                if node.op == "call_function":
                    count[str(node.target)] += 1
    return dict(count)


def survey(entry: catalogue.Entry) -> dict[str, Any]:
    """Build, run and export one model; failures are returned, not raised."""
    row: dict[str, Any] = {"model": entry.name, "kind": entry.kind}
    try:
        start = time.perf_counter()
        example = entry.build()
        row["build_s"] = round(time.perf_counter() - start, 2)
        row["params"] = sum(p.numel() for p in example.model.parameters())
        start = time.perf_counter()
        with torch.no_grad():
            example.model(*example.args, **example.kwargs)
        row["forward_s"] = round(time.perf_counter() - start, 2)
        start = time.perf_counter()
        program = torch.export.export(example.model, example.args, example.kwargs, strict=False)
        row["export_s"] = round(time.perf_counter() - start, 2)
        row["ops"] = operators(program)
        row["ok"] = True
    except Exception as error:  # the survey reports whatever a model library raises
        row |= {"ok": False, "error": f"{type(error).__name__}: {error}"[:600]}
    return row


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("out", type=Path)
    parser.add_argument("--only", default="*")
    parser.add_argument("--shard", default="0/1")
    options = parser.parse_args()
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    index, shards = map(int, options.shard.split("/"))
    lines = options.out.read_text().splitlines() if options.out.exists() else []
    done = {row["model"] for row in map(json.loads, lines) if row["ok"]}
    for entry in catalogue.entries()[index::shards]:
        if entry.name in done or not fnmatch.fnmatch(entry.name, options.only):
            continue
        row = survey(entry)
        with options.out.open("a") as file:
            file.write(json.dumps(row) + "\n")
        verdict = f"ok, {row['export_s']} s" if row["ok"] else row["error"][:200]
        print(entry.name, verdict, flush=True)


if __name__ == "__main__":
    main()
