"""Latency targets of 70, 50 and 35 % on ONNX Runtime and torch: asked, achieved, and measured again in a fresh process.

    python -m benchmarks.latency_targets                      # every row that is not there yet
    python -m benchmarks.latency_targets --network resnet56 --runtime onnxruntime --percent 50

Every row: the network is pruned to the target (no training, BatchNorm statistics re-estimated where there are trained
weights), saved, and loaded in processes of their own, where it is timed beside the dense model. Accuracy only where the
weights are trained. One row of inputs, one thread. Rows go to `benchmarks/results/latency_targets.json` as they come.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import secateur as sc
from benchmarks.no_training.tasks import TASKS, Task
from secateur.models import load_model

RESULTS = Path(__file__).parent / "results" / "latency_targets.json"
PERCENTS = (70, 50, 35)
RUNTIMES = ("onnxruntime", "torch")
ROUNDS = 41  # of each fresh process
PROCESSES = 5


@dataclass(frozen=True)
class Network:
    """`dense` builds it in eval mode; `args` are the inputs it is traced with; `task` is there where weights are trained."""

    dense: Callable[[], nn.Module]
    args: Callable[[], tuple[Tensor, ...]]
    task: Task | None = None


def of_task(name: str) -> Network:
    return Network(TASKS[name].dense, TASKS[name].args, TASKS[name])


def of_torchvision(name: str) -> Network:
    """Random weights, the same in every process; for latency alone."""

    def dense() -> nn.Module:
        return load_model(f"torchvision/{name}", seed=0).model.eval()

    return Network(dense, lambda: (torch.randn(2, 3, 224, 224, generator=torch.Generator().manual_seed(0)),))


NETWORKS = {
    "resnet56": of_task("resnet56"),
    "kws_dscnn": of_task("kws_dscnn"),
    "mobilenet_v2": of_torchvision("mobilenet_v2"),
    "fashion_vit": of_task("fashion_vit"),
    "vit_b_16": of_torchvision("vit_b_16"),
}


def target(percent: float, runtime: str) -> sc.Latency:
    return sc.Latency(f"{percent}%", runtime=runtime, batch=1, threads=1)


def again(name: str, runtime: str, folder: str, how: str, rounds: int) -> dict[str, Any]:
    """Ratio and seconds of the saved model beside the dense one; this is all that a fresh process does."""
    network = NETWORKS[name]
    cut = sc.load(folder, network.dense if how == "attributes" else None)
    with target(50, runtime).beside(network.dense(), network.args()) as read:
        found = read(cut, rounds)
    return {"ratio": found.ratio, "ratio_spread": found.spread, "dense_s": found.dense, "cut_s": found.cut}


def in_fresh_processes(name: str, runtime: str, result: Any, options: argparse.Namespace) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as parent:
        folder = str(sc.save(result, Path(parent) / "cut"))
        command = [sys.executable, "-m", "benchmarks.latency_targets", "--again", folder, "--how", result.cut.how,
                   "--network", name, "--runtime", runtime, "--rounds", str(options.rounds)]  # fmt: skip
        found = []
        for _ in range(options.processes):
            done = subprocess.run(command, capture_output=True, text=True)
            if done.returncode:
                raise RuntimeError(f"the fresh process failed: {done.stderr[-500:]}")
            found.append(json.loads(done.stdout.splitlines()[-1]))
    middle = {key: statistics.median(one[key] for one in found) for key in found[0]}
    return {**middle, "ratios": [one["ratio"] for one in found], "processes": len(found), "rounds": options.rounds}


def one_row(name: str, runtime: str, percent: float, options: argparse.Namespace) -> dict[str, Any]:
    network, load = NETWORKS[name], os.getloadavg()[0]
    dense = network.dense()
    batches = network.task.inputs(0) if network.task else None
    start = time.perf_counter()
    result = sc.prune(dense, network.args(), target(percent, runtime), data=batches, progress=lambda s: print("   ", s, flush=True))
    seconds = time.perf_counter() - start
    (achieved,) = result.plan.why["achieved"]
    fresh = in_fresh_processes(name, runtime, result, options)
    off = 100 * (100 * fresh["ratio"] / percent - 1)
    row = {
        "network": name, "runtime": runtime, "asked_percent": percent, "achieved_percent": round(100 * achieved["ratio"], 2),
        "measured_again_percent": round(100 * fresh["ratio"], 2), "off_by_percent": round(off, 2), "within_5": abs(off) <= 5,
        "again": fresh, "achieved": achieved, "macs_percent": round(100 * result.after.macs / result.before.macs, 2),
        "steps": len(result.plan.why["trail"]), "prune_seconds": round(seconds, 1), "how": result.cut.how,
        "aligned": result.plan.why.get("aligned"), "score": result.plan.why["score"], "allocation": result.plan.why["allocation"],
        "weights": "trained" if network.task else "random", "load_average": [round(load, 2), round(os.getloadavg()[0], 2)],
    }  # fmt: skip
    if network.task:
        metric = network.task.metric
        for key, model in (("dense", dense), ("pruned", result.model)):
            row[f"{metric}_{key}"] = network.task.evaluate(model, options.first)[metric]
        row["images"] = options.first or "all"
    return row


def page() -> dict[str, Any]:
    if RESULTS.exists():
        return json.loads(RESULTS.read_text())
    versions = {"secateur": sc.__version__, "torch": torch.__version__, "python": platform.python_version()}
    for name in ("onnxruntime", "onnx", "onnxscript", "torchvision"):
        versions[name] = version(name)
    machine = {"machine": platform.machine(), "system": platform.system(), "cores": os.cpu_count()}
    return {"fine_tuning": "none", "batch": 1, "threads": 1, "versions": versions, **machine, "rows": []}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--network", nargs="*", default=list(NETWORKS), choices=list(NETWORKS))
    parser.add_argument("--runtime", nargs="*", default=list(RUNTIMES), choices=[*RUNTIMES, "torch.compile", "openvino"])
    parser.add_argument("--percent", nargs="*", type=float, default=list(PERCENTS))
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--processes", type=int, default=PROCESSES)
    parser.add_argument("--first", type=int, help="only so many test images, for a trial")
    parser.add_argument("--dry", action="store_true", help="print the rows and write none")
    parser.add_argument("--redo", action="store_true", help="measure rows again that are there")
    parser.add_argument("--again", help=argparse.SUPPRESS)
    parser.add_argument("--how", help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.again:
        print(json.dumps(again(options.network[0], options.runtime[0], options.again, options.how, options.rounds)))
        return
    for name in options.network:
        for runtime in options.runtime:
            for percent in options.percent:
                keep_row(name, runtime, percent, options)


def keep_row(name: str, runtime: str, percent: float, options: argparse.Namespace) -> None:
    """Measure one row unless it is there, and write it; a refusal is a row that says so."""
    key = {"network": name, "runtime": runtime, "asked_percent": percent}
    have = page()
    same = [row for row in have["rows"] if key.items() <= row.items()]
    if same and not options.redo:
        return
    print(name, runtime, f"{percent:g} %", flush=True)
    try:
        row = one_row(name, runtime, percent, options)
    except sc.SecateurError as error:
        row = {**key, "error": f"{type(error).__name__}: {error}"}
    print({k: v for k, v in row.items() if not isinstance(v, dict)}, flush=True)
    if not options.dry:
        have["rows"] = [r for r in have["rows"] if r not in same] + [row]
        RESULTS.write_text(json.dumps(have, indent=1) + "\n")


if __name__ == "__main__":
    main()
