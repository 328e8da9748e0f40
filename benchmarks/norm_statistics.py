"""`python -m benchmarks.norm_statistics [--task resnet20 ...] [--seeds 0 1 2]`: a cut of which nothing but BatchNorm statistics is repaired.

Units go by the l2 norm of their weights. Top-1 on all 10,000 test images of CIFAR-10: as cut, with the statistics of the calibration images (as
others do it), and with those by which every norm gives the mean and the variance that it has in the dense network (`repair="batch_norm"`). No
labels, no training. At 100 % nothing is cut.
"""

from __future__ import annotations

import argparse
import copy
import json
from pathlib import Path
from typing import Any

import secateur as sc
from benchmarks.no_training.__main__ import versions
from benchmarks.no_training.methods import budget
from benchmarks.no_training.tasks import TASKS, Task
from secateur.repair import batch_norm_statistics
from secateur.repair.batch_norm import Dense

RESULTS = Path(__file__).parent / "results" / "norm_statistics.json"
SHARES = (1.0, 0.95, 0.9, 0.8, 0.7, 0.6, 0.5)


def row(task: Task, share: float, seed: int) -> dict[str, Any]:
    model, data = task.dense(), task.inputs(seed)
    calls: list[tuple[tuple, dict]] = [((x,), {}) for x in data]
    if share == 1:
        cut, alike = model, copy.deepcopy(model)
        batch_norm_statistics(alike, calls, dense=Dense(model, lambda name, values: values))
    else:
        result = sc.prune(model, task.args(), budget(task, share, model), score="l2", allocation="global", repair="none", ignore=task.ignore)
        cut = copy.deepcopy(result.model)
        alike = sc.mend(result, data, "batch_norm").model
    plain = copy.deepcopy(cut)
    batch_norm_statistics(plain, calls)
    ways = {"as_cut": cut, "re_estimated": plain, "by_dense": alike}
    return {"task": task.name, "share": share, "seed": seed} | {way: task.evaluate(net.eval(), None)["top1"] for way, net in ways.items()}


def held() -> list[dict[str, Any]]:
    """The rows so far, another process's too."""
    return json.loads(RESULTS.read_text())["rows"] if RESULTS.exists() else []


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--task", nargs="+", default=["resnet20", "resnet56"])
    parser.add_argument("--share", type=float, nargs="+", default=SHARES)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    options = parser.parse_args()
    for name in options.task:
        for share in options.share:
            for seed in options.seeds:
                if not any((r["task"], r["share"], r["seed"]) == (name, share, seed) for r in held()):
                    print(new := row(TASKS[name], share, seed), flush=True)
                    RESULTS.write_text(json.dumps({"versions": versions(), "rows": [*held(), new]}, indent=1) + "\n")


if __name__ == "__main__":
    main()
