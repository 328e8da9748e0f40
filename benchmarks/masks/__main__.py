"""`python -m benchmarks.masks --task NAME ... [--method NAME ...] [--point LABEL ...] [--seeds 0 1 2]`.

Every row: a trained network, a share or a pattern, a method, a calibration seed; the metric on the full test set. Rows that are
there already are left alone. No method trains and none sees labels.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

import secateur as sc
from benchmarks.no_training.__main__ import versions
from benchmarks.no_training.rows import Row, Store
from benchmarks.no_training.tasks import TASKS, Task
from secateur.pattern import Pattern
from secateur.repair import batch_norm_statistics

FOLDER = Path(__file__).parents[1] / "results" / "masks"
# label -> share of the weights that stays (None: the pattern's own), pattern
POINTS: dict[str, tuple[str | None, Pattern]] = {
    "50 %": ("50%", sc.Free()), "60 %": ("40%", sc.Free()), "70 %": ("30%", sc.Free()), "80 %": ("20%", sc.Free()), "90 %": ("10%", sc.Free()),
    "2:4": (None, sc.NM(2, of=4)), "4x1, 50 %": ("50%", sc.Block(4, 1)), "4x1, 70 %": ("30%", sc.Block(4, 1)),
}  # fmt: skip
OWN = {"refit": False, "corrected": False}  # as in the papers: each layer against its own output, with what the method gives
# name -> settings of `Sparse`, whether data is seen, whether BatchNorm is re-estimated afterwards
METHODS: dict[str, tuple[dict[str, Any], bool, bool]] = {
    "magnitude": ({"by": "magnitude"}, False, False),
    "magnitude + BN": ({"by": "magnitude"}, False, True),
    "wanda": ({"by": "wanda", **OWN}, True, False),
    "wanda + BN": ({"by": "wanda", **OWN}, True, True),
    "sparsegpt": ({"by": "sparsegpt", **OWN}, True, False),
    "sparsegpt + BN": ({"by": "sparsegpt", **OWN}, True, True),
    "alps, own targets": ({"by": "alps", "corrected": False}, True, False),
    "sparsegpt, ours": ({"by": "sparsegpt"}, True, False),
    "obc, ours": ({"by": "obc"}, True, False),
    "alps, ours": ({"by": "alps"}, True, False),
    "sparsegpt, permuted": ({"by": "sparsegpt", "permute": True, **OWN}, True, False),
    "alps, permuted": ({"by": "alps", "permute": True}, True, False),
    "sparsegpt, searched": ({"by": "sparsegpt", "budget": "search", **OWN}, True, False),
    "alps, erk": ({"by": "alps", "budget": "erk"}, True, False),
    "alps, searched": ({"by": "alps", "budget": "search"}, True, False),
}
SEEDLESS = ("magnitude",)


def masked(task: Task, name: str, point: str, seed: int) -> tuple[sc.Result, float]:
    """The result and the seconds that it took."""
    settings, sees, statistics = METHODS[name]
    keep, pattern = POINTS[point]
    begin = time.perf_counter()
    data = task.inputs(seed)
    result = sc.sparsify(task.dense(), task.args(), sc.Sparse(keep, pattern=pattern, seed=seed, **settings), data if sees else None)
    if statistics:  # as others do it: those of the data, whatever the dense network has learned
        batch_norm_statistics(result.model, [((x,), {}) for x in data])
    return result, time.perf_counter() - begin


def has_statistics(model: nn.Module) -> bool:
    return any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in model.modules())


def measure(task: Task, name: str, point: str, seed: int) -> Row:
    result, seconds = masked(task, name, point, seed)
    why = result.plan.why
    found = {"seconds": round(seconds, 1), "threads": torch.get_num_threads(), "kept": why["kept"], "of_weights": why["of_weights"],
             "of_parameters": why["of_parameters"], "notes": result.notes}  # fmt: skip
    return found | task.evaluate(result.model, None)


def rows(task: Task, options: argparse.Namespace, measure_one: Callable[..., Row] = measure) -> None:
    store = Store(FOLDER / f"{task.name}.jsonl")
    done = store.done()
    for point in options.point:
        for name in options.method:
            if name.endswith("+ BN") and not has_statistics(task.dense()):
                continue
            for seed in options.seeds[:1] if name in SEEDLESS else options.seeds:
                key = (task.name, point, name, seed)
                if key in done:
                    continue
                try:
                    row = measure_one(task, name, point, seed)
                except sc.SecateurError as error:
                    row = {"error": f"{type(error).__name__}: {error}"}
                store.append({"task": task.name, "ratio": point, "method": name, "seed": seed, **row, "versions": versions()})
                print(*key, {k: row[k] for k in ("error", task.metric, "seconds") if k in row}, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--task", nargs="+", default=["resnet56", "lm_shakespeare"], choices=list(TASKS))
    parser.add_argument("--method", nargs="+", default=list(METHODS), choices=list(METHODS))
    parser.add_argument("--point", nargs="+", default=list(POINTS), choices=list(POINTS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    for name in options.task:
        rows(TASKS[name], options)


if __name__ == "__main__":
    main()
