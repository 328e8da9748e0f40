"""`python -m benchmarks.blocks [--task fashion_vit lm_shakespeare] [--start magnitude ...] [--steps 100]`: block-wise reconstruction with gradients,
beside no training at all.

Starts: `magnitude` (30 % of the weights of each layer stay, the largest), `sparsegpt` (2:4), `ours` (30 %, the defaults of `sc.sparsify`) and `cut`
(half of the multiply-accumulates, the defaults of `sc.prune`). Each is measured as it is and after `secateur.recover.reconstruct` with the same
calibration samples, inputs alone; the test data is that of `benchmarks.no_training`. Rows that are in `results/blocks.json` already are left alone.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import torch
from torch import nn

import secateur as sc
from benchmarks.no_training.__main__ import versions
from benchmarks.no_training.methods import pruned
from benchmarks.no_training.tasks import TASKS, Task
from secateur.plan import Plan
from secateur.recover import Reconstruction, reconstruct

RESULTS = Path(__file__).parent / "results" / "blocks.json"
STARTS = {
    "magnitude": sc.Sparse(keep="30%", by="magnitude", refit=False), "sparsegpt": sc.Sparse(pattern=sc.NM(2, of=4), by="sparsegpt", refit=False),
    "ours": sc.Sparse(keep="30%"), "cut": None,
}  # fmt: skip


def begun(task: Task, start: str, seed: int) -> tuple[nn.Module, Plan | None]:
    how = STARTS[start]
    if how is None:
        result = pruned(task, 0.5, seed, data=task.inputs(seed))
        return result.model, None
    result = sc.sparsify(task.dense(), task.args(), how, None if start == "magnitude" else task.inputs(seed))
    return result.model, result.plan


def measured(task: Task, start: str, options: argparse.Namespace, seed: int) -> dict[str, Any]:
    model, plan = begun(task, start, seed)
    before = task.evaluate(model.eval(), None)[task.metric]
    begin = time.monotonic()
    how = Reconstruction(steps=options.steps, lr=options.lr, seed=seed)
    done = reconstruct(model, task.dense(), task.inputs(seed), how, plan=plan)
    seconds, after = time.monotonic() - begin, task.evaluate(model.eval(), None)[task.metric]
    left = max((float(model.get_parameter(n)[~m].abs().max()) for n, m in (plan.weights if plan else {}).items() if not m.all()), default=0.0)
    return {"metric": task.metric, "dense": task.evaluate(task.dense(), None)[task.metric], "without": before, "with": after, "seconds": seconds,
            "zeros_lost": left, "rows": sum(len(x) for x in task.inputs(seed)), **done.to_json()}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--task", nargs="+", default=["fashion_vit", "lm_shakespeare"], choices=list(TASKS))
    parser.add_argument("--start", nargs="+", default=list(STARTS), choices=list(STARTS))
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--lr", type=float, default=Reconstruction.lr)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    options = parser.parse_args()
    for name, start, seed in ((t, s, seed) for t in options.task for s in options.start for seed in options.seeds):
        same = {"task": name, "start": start, "seed": seed, "steps": options.steps, "lr": options.lr}
        rows = json.loads(RESULTS.read_text()) if RESULTS.exists() else []
        if any(all(row.get(k) == v for k, v in same.items()) for row in rows):
            continue
        row = {**same, **measured(TASKS[name], start, options, seed), "threads": torch.get_num_threads(), "versions": versions()}
        print({k: row[k] for k in (*same, "dense", "without", "with", "before", "after", "seconds", "zeros_lost", "notes")}, flush=True)
        rows = json.loads(RESULTS.read_text()) if RESULTS.exists() else []  # another process may have added some
        RESULTS.write_text(json.dumps([*rows, row], indent=1) + "\n")


if __name__ == "__main__":
    main()
