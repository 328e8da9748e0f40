"""`python -m benchmarks.no_training --task NAME ... --method NAME ... [--seeds 0 1 2] [--resume]`."""

from __future__ import annotations

import argparse
import platform
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch

from benchmarks.no_training import methods, peer
from benchmarks.no_training.rows import Key, Row, Store, store
from benchmarks.no_training.tasks import TASKS, Task
from secateur.measure import count

NAMES = ("dense", *methods.METHODS, "torch_pruning")
PACKAGES = ("secateur", "torch", "torch-pruning", "transformers", "numpy")


def versions() -> dict[str, str]:
    """What produced a row."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            if name == "secateur":
                import secateur

                found[name] = secateur.__version__
    return found


@dataclass
class Job:
    """Measurements of one task. `measure` may be replaced by a test."""

    task: Task
    store: Store
    done: set[Key]
    measure: Callable[[Task, str, str, int, int | None], Row]

    def run(self, name: str, ratio: str, seed: int, first: int | None = None, label: str = "") -> Row | None:
        """Measure and write one row unless it is there; a failure is a row that says how. `label`: the name of the row
        where it is not the method's own."""
        key = (self.task.name, ratio, label or name, seed)
        if key in self.done:
            return None
        start = time.perf_counter()
        try:
            row = self.measure(self.task, name, ratio, seed, first)
        except NotImplementedError as error:  # not a result: the library cannot do it yet
            print(*key, f"skipped: {error}", flush=True)
            return None
        except Exception as error:  # the failure is the result
            said = " ".join(str(error).split())[:300]
            row = {"error": f"{type(error).__name__}: {said}", "seconds": round(time.perf_counter() - start, 2)}
        row = dict(zip(("task", "ratio", "method", "seed"), key, strict=True)) | row | {"versions": versions()}
        if label:
            row["variant"] = name
        self.store.append(row)
        self.done.add(key)
        shown = ("error", self.task.metric, "macs_percent", "seconds")
        print(*key, {k: row[k] for k in shown if k in row}, flush=True)
        return row

    def torch_pruning(self, ratio: str, seeds: list[int]) -> None:
        """All variants with the first seed, measured on the task's screening samples; the best of them with every seed and on
        all samples. The choice looks at the test set, in favour of the peer."""
        for name in peer.variants(self.task):
            self.run(name, ratio, seeds[0], self.task.screen)
        rows = [r for r in self.store.read() if r["ratio"] == ratio and r["method"].startswith(peer.PREFIX) and self.task.metric in r]
        if not rows:
            print(self.task.name, ratio, "torch_pruning: every variant failed", flush=True)
            return
        sign = 1 if self.task.more_is_better else -1
        best = max(rows, key=lambda r: sign * r[self.task.metric])["method"]
        for seed in seeds[:1] if methods.needs_no_seed(best, self.task.dense()) else seeds:
            self.run(best, ratio, seed, label="torch_pruning")


def measure(task: Task, name: str, ratio: str, seed: int, first: int | None) -> Row:
    """One row: prune, count, evaluate. Costs are of one row of the example inputs; seconds are of the method alone,
    on the wall's clock and the processor's (which other work on the machine does not stretch)."""
    dense, args = task.dense(), task.args()
    before, rows = count(dense, args), len(args[0])
    info: dict[str, Any] = {}
    row: Row = {}
    start, worked = time.perf_counter(), time.process_time()
    if name == "dense":
        model = dense
    else:
        share = task.shares[ratio]
        model, info = methods.method(name)(task, share, seed)
        row |= {"share": round(share, 4), "macs_asked": int(share * before.macs) // rows}
    row |= {"seconds": round(time.perf_counter() - start, 2), "cpu_seconds": round(time.process_time() - worked, 2)}
    row |= {"threads": torch.get_num_threads()}
    after = count(model.eval() if name == "dense" else model, args)
    row |= {"macs": after.macs // rows, "macs_percent": round(100 * after.macs / before.macs, 3), "params": after.params}
    row |= task.evaluate(model, first)
    return row | {"samples": first or "all", "calibration": task.calibration} | info


def wanted(task: Task, names: list[str], seeds: list[int]) -> Iterator[tuple[str, str, int]]:
    """(method, ratio, seed) of everything but Torch-Pruning, one seed where seeds make no difference."""
    for name in names:
        if name == "torch_pruning" or not methods.makes_sense(name, task):
            continue
        alone = methods.needs_no_seed(name, task.dense())
        for ratio in ["1"] if name == "dense" else task.shares:
            for seed in seeds[:1] if alone else seeds:
                yield name, ratio, seed


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--task", nargs="+", choices=list(TASKS), default=list(TASKS))
    parser.add_argument("--method", nargs="+", choices=NAMES, default=list(NAMES))
    parser.add_argument("--ratio", nargs="+", help="labels of the task, such as ÷2.0; all by default")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--resume", action="store_true", help="leave out what has a row already; without it, rows are replaced")
    parser.add_argument("--retry", action="store_true", help="with --resume: run failures again")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    for name in options.task:
        rows = store(name)
        job = Job(TASKS[name], rows, rows.done(failed_too=not options.retry) if options.resume else set(), measure)
        for method, ratio, seed in wanted(job.task, options.method, options.seeds):
            if not options.ratio or ratio in options.ratio or ratio == "1":
                job.run(method, ratio, seed)
        if "torch_pruning" in options.method:
            for ratio in options.ratio or job.task.shares:
                job.torch_pruning(ratio, options.seeds)


if __name__ == "__main__":
    main()
