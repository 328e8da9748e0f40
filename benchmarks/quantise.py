"""`python -m benchmarks.quantise [--model NAME ...] [--runtime NAME ...] [--kind NAME ...] [--threads 1] [--rounds 30] [--again]`

Dense, pruned to half of the multiply-accumulates, dense int8 and pruned int8, in ONNX Runtime and in OpenVINO: top-1 on the 10,000 test
images of CIFAR-10 (ResNet-20, ResNet-56), bytes of the files, and latency of one image as medians of rounds in turns. The ResNet-50 has
random weights and random images: its bytes and latency count, nothing else; it is pruned evenly. The others are pruned by the one call
with its defaults, without training; what it gave is kept in `build/quantise`. Ranges of activations come from 300 training images.

Rows that are in `results/quantise.json` already are left alone, unless `--again` is given; the file is written after each.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
from collections.abc import Callable
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import nn

import secateur as sc
from benchmarks.no_training.__main__ import versions
from benchmarks.no_training.methods import pruned
from benchmarks.no_training.tasks import TASKS, cifar_samples
from secateur.measure import count
from secateur.models.data import Batches, Data
from secateur.quantise import KINDS, RUNTIMES, How, quantise

RESULTS = Path(__file__).parent / "results" / "quantise.json"
BUILD = Path(__file__).parents[1] / "build" / "quantise"
SHARE, ROWS = 0.5, 300
PACKAGES = ("onnx", "onnxruntime", "openvino", "nncf")

Case = tuple[nn.Module, nn.Module, tuple, Data]  # dense, pruned, example inputs of one row, data


def kept(name: str, make: Callable[[], sc.Result]) -> nn.Module:
    """The pruned model of an earlier run, or a new one."""
    folder = BUILD / name
    if not (folder / "plan.json").exists():
        sc.save(make(), folder)
    return sc.load(folder)


def cifar(name: str) -> Case:
    task = TASKS[name]
    less = kept(name, lambda: pruned(task, SHARE, 0, data=task.inputs(0)))
    x, y = cifar_samples(False, "test")
    data = Data("CIFAR-10", Batches(torch.cat(task.inputs(0))), Batches(x, y), True)
    return task.dense(), less, (x[:1],), data


def resnet50() -> Case:
    from benchmarks.sparse_models import resnet50 as built

    torch.manual_seed(0)
    model, shape = built()
    model.eval()
    x = torch.randn(64, *shape[1:], generator=torch.Generator().manual_seed(0))
    less = kept("resnet50", lambda: sc.prune(model, (x[:2],), sc.MACs(at_most="50%"), score="l2", allocation="uniform"))
    return model, less, (x[:1],), Data("random", Batches(x[:48], size=16), Batches(x[48:], size=16), False)


CASES: dict[str, Callable[[], Case]] = {"resnet20": partial(cifar, "resnet20"), "resnet56": partial(cifar, "resnet56"), "resnet50": resnet50}


def measured(name: str, how: How) -> dict[str, Any]:
    dense, less, args, data = CASES[name]()
    with tempfile.TemporaryDirectory() as folder:
        done = quantise(less, (args, {}), data, folder, dense=dense, how=how, progress=lambda stage: print(f"  {stage}", flush=True))
    facts = {k: v for k, v in done.to_json().items() if k not in ("path", "how")}
    macs = {which: count(model, args).macs for which, model in (("dense", dense), ("pruned", less))}
    told = {"model": name, "runtime_name": how.runtime, "kind": how.kind, "threads": how.threads, "rounds": how.rounds}
    return {**told, "macs": macs, **facts, "load_average": os.getloadavg()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for option, known in (("model", CASES), ("runtime", RUNTIMES), ("kind", KINDS)):
        parser.add_argument(f"--{option}", nargs="+", default=list(known), choices=list(known))
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--again", action="store_true")
    given = parser.parse_args()
    rows: list[dict[str, Any]] = json.loads(RESULTS.read_text())["rows"] if RESULTS.exists() else []
    for name, runtime, kind in ((m, r, k) for m in given.model for r in given.runtime for k in given.kind):
        same = [row for row in rows if (row["model"], row["runtime_name"], row["kind"], row["threads"]) == (name, runtime, kind, given.threads)]
        if same and not given.again:
            continue
        print(name, runtime, kind, flush=True)
        row = measured(name, How(runtime, kind, rows=ROWS, threads=given.threads, rounds=given.rounds))
        for one in row["rows"]:
            print(f"  {one['name']:12} accuracy {one['accuracy']} bytes {one['bytes']:,} {1e3 * one['seconds']['median']:.3f} ms, {one['ratio']:.3f}")
        rows = [other for other in rows if other not in same] + [row]
        packages = {package: version(package) for package in PACKAGES}
        RESULTS.write_text(json.dumps({"share_of_macs": SHARE, "versions": {**versions(), **packages}, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
