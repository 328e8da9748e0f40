"""`python -m benchmarks.advise [--minutes 15]`: `secateur advise` on ResNet-56 / CIFAR-10, as a user runs it.

The command is a process of its own in a new folder, with the threads that this one has (`cores`); network and data come from the two
functions below, by the form `file.py:function`. All 50,000 training images are offered, of which it takes the 512 that it calibrates with
by default; it compares on 2,000 of the 10,000 test images. `results/advise.json` has its wall-clock seconds and its rows.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks import cifar
from benchmarks.no_training.__main__ import versions
from secateur.models.data import Batches, Data
from secateur.report.hardware import hardware

HERE, ROOT = Path(__file__), Path(__file__).parents[1]
RESULTS = HERE.parent / "results" / "advise.json"
SHOWN = ("name", "way", "state", "why", "lost", "interval", "ratio", "bytes", "peak_bytes", "macs", "took")


def net() -> tuple[nn.Module, tuple[Tensor, ...]]:
    return cifar.trained_resnet56(), (torch.zeros(1, 3, 32, 32),)


def data() -> Data:
    x, y = (torch.cat(parts) for parts in zip(*(cifar.images(f"train_{i}", 10000) for i in range(5)), strict=True))
    return Data("cifar10", Batches(x, y), Batches(*cifar.images("test", 10000)), True)


def advised(minutes: float) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "out"
        line = [sys.executable, "-m", "secateur", "advise", f"{HERE}:net", "--data", f"{HERE}:data", "--minutes", f"{minutes:g}", "-o", str(out)]
        begin = time.monotonic()
        subprocess.run(line, check=True, env={**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT / "src"), str(ROOT)])})
        seconds = time.monotonic() - begin
        found = json.loads((out / "advise.json").read_text())
    rows = [{key: row[key] for key in SHOWN if row.get(key) is not None} for row in found["rows"]]
    told = {"minutes": minutes, "seconds": seconds, "cores": torch.get_num_threads(), "load_average": os.getloadavg()[:2], "hardware": hardware()}
    return {"model": "resnet56", **told, "dense": found["dense"], "rows": rows, "verdict": found["verdict"], "versions": versions()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=15.0)
    found = advised(parser.parse_args().minutes)
    RESULTS.write_text(json.dumps(found, indent=1) + "\n")
    print(f"{found['seconds']:.0f} s")


if __name__ == "__main__":
    main()
