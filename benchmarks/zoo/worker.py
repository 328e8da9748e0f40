"""secateur on one model: `python -m benchmarks.zoo.worker NAME OUT.json` (the suite calls it in its own process).

Half of the multiply-accumulates asked globally by L2; where the model cannot go that far, the nearest reachable, with
the reason. Then everything is checked again from outside: the forward runs, shapes are unchanged, the counted cost of
the cut model is the plan's, the proof holds, and the model that was given is untouched.
"""

from __future__ import annotations

import importlib
import re
import sys
import time
import traceback
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import nn

from benchmarks.zoo import catalogue, guard
from benchmarks.zoo.timing import exports, stages
from benchmarks.zoo.torch_pruning import tensors

ASKED = 0.5
TOLERANCE = 1e-9


def fingerprint(model: nn.Module) -> dict[str, tuple[Any, ...]]:
    """What changes when a parameter or buffer is replaced, resized or written to."""
    named = [*model.named_parameters(), *model.named_buffers()]
    return {name: (t.data_ptr(), t._version, tuple(t.shape)) for name, t in named}


def pruned(example: catalogue.Example, row: dict[str, Any], out: Path, at_most: str) -> Any:
    """`sc.prune` with the seconds of its stages written into `row`."""
    import secateur as sc

    marks: dict[str, float] = {}

    def progress(stage: str) -> None:
        marks[stage] = time.perf_counter()
        row["stage"] = stage
        row["captured"] = row.get("captured", False) or stage != "trace"
        guard.write(out, row)

    target = sc.MACs(at_most=at_most)
    flow, tracer = importlib.import_module("secateur.prune"), importlib.import_module("secateur.trace.tracer")
    with exports() as export, stages(flow, ("trace", "cut", "prove")) as seconds, stages(tracer, ("analyse",)) as inner:
        options = {"score": "l2", "allocation": "global", "kwargs": example.kwargs, "progress": progress}
        result = sc.prune(example.model, example.args, target, **options)
    times = {"export": export[0], "axes": inner["analyse"], "plan": marks["cut"] - marks["score"]}
    times |= {"cut": seconds["cut"], "proof": seconds["prove"]}
    row["seconds"] = {name: round(value, 3) for name, value in times.items()}
    return result


def checks(example: catalogue.Example, result: Any, shapes: list[tuple[int, ...]]) -> dict[str, Any]:
    """The facts of one result, each found without the help of the code that made it."""
    from secateur.measure import count

    with torch.no_grad():
        after = [tuple(t.shape) for t in tensors(result.model(*example.args, **example.kwargs))]
    cost = count(result.model, example.args, example.kwargs)
    before = count(example.model, example.args, example.kwargs)
    share = cost.macs / before.macs
    largest = sorted(result.graph.frozen, key=lambda f: -f.size)[:3]
    short = [f"{f.size} x {f.reason}" for f in largest] if share > ASKED else []
    return {
        "same_shape": after == shapes,
        "macs_before": before.macs,
        "macs_after": cost.macs,
        "params_before": before.params,
        "params_after": cost.params,
        "plan_is_count": cost == result.plan.after,
        "plan_macs": result.plan.after.macs,
        "error_relative": result.proof.max_error,
        "how": result.cut.how,
        "why_graph": result.cut.why,
        "groups": len(result.graph.groups),
        "reached": share <= ASKED,
        "close": share >= ASKED * 0.99,
        "short": "; ".join(short),
        "notes": list(result.notes)[:5],
    }


def attempt(example: catalogue.Example, row: dict[str, Any], out: Path) -> None:
    """Prune, at the nearest reachable where 50 % is not, and check; `row["ok"]` at the end."""
    from secateur.errors import TargetError

    shapes = [tuple(t.shape) for t in tensors(example.model(*example.args, **example.kwargs))]
    before = fingerprint(example.model)
    try:
        result = pruned(example, row, out, f"{ASKED:.0%}")
    except TargetError as error:
        row["target_error"] = str(error)
        nearest = re.search(r"nearest reachable is macs=([0-9.]+)%", str(error))
        if nearest is None:
            raise
        result = pruned(example, row, out, f"{float(nearest[1]) + 0.1:.2f}%")
    row |= checks(example, result, shapes)
    if row.get("target_error"):
        row["short"] = row["target_error"].partition("stands in the way:")[2].partition("\n")[0].strip() or row["short"]
    row["untouched"] = fingerprint(example.model) == before
    faults = [name for name in ("same_shape", "plan_is_count", "untouched") if not row[name]]
    if not row["error_relative"] < TOLERANCE:
        faults.append(f"proof {row['error_relative']:.1e}")
    row["ok"] = not faults
    if faults:
        row["error"] = "failed checks: " + ", ".join(faults)


def work(name: str, out: Path) -> None:
    """Build, prune and check one model; the row goes to `out` after every stage."""
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    row: dict[str, Any] = {"model": name, "ok": False, "stage": "build"}
    guard.write(out, row)
    example = catalogue.find(name).build()
    row["params"] = sum(p.numel() for p in example.model.parameters())
    try:
        attempt(example, row, out)
    except Exception as error:  # the failure is the result
        row["error"] = f"{type(error).__name__}: {error}".strip()[:1500]
        row["where"] = traceback.format_exc()[-1500:]
    row["captured"] = row.get("captured", False)
    guard.write(out, row)


if __name__ == "__main__":
    work(sys.argv[1], Path(sys.argv[2]))
