"""CIFAR-10 ResNet-56 at half of its multiply-accumulates, by the one call, beside Torch-Pruning.

Run as `python -m benchmarks.resnet56_half`; writes `benchmarks/results/resnet56.json`. No fine-tuning: accuracy on the
full 10,000 test images dense, as cut, and with BatchNorm statistics re-estimated from 2,048 training images. The cut
model is saved, loaded in a new process, and its outputs compared bit for bit.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import secateur as sc
from benchmarks import cifar
from secateur.measure import count
from secateur.repair import batch_norm_statistics

CALIBRATION = 2048
RESULTS = Path(__file__).parent / "results"
EXAMPLE = torch.zeros(1, 3, 32, 32)
AGAIN = """
import sys, torch
import secateur as sc
from benchmarks import cifar
model = sc.load(sys.argv[1], cifar.resnet56 if sys.argv[3] == "factory" else None)
x, _ = cifar.images("test", 500)
with torch.no_grad():
    torch.save(model.eval()(x) if hasattr(model, "layer1") else model(x), sys.argv[2])
"""


def re_estimated(model: nn.Module, x: Tensor) -> nn.Module:
    """The model with BatchNorm means and variances taken as plain averages over batches of `x`; changed in place."""
    norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None
    model.train()
    with torch.no_grad():
        for batch in x.split(256):
            model(batch)
    return model.eval()


def ours(score: str, x: Tensor, y: Tensor, calibration: Tensor) -> tuple[dict[str, Any], Any]:
    """One row for one criterion, and the calibrated result."""
    model = cifar.trained_resnet56()
    start = time.perf_counter()
    plain = sc.prune(model, (EXAMPLE,), sc.MACs(at_most="50%"), score=score)
    seconds = time.perf_counter() - start
    tuned = sc.prune(model, (EXAMPLE,), sc.MACs(at_most="50%"), score=score)
    batch_norm_statistics(tuned.model, [((b,), {}) for b in calibration.split(256)])  # as for the peer, without the dense network
    macs = count(plain.model, (EXAMPLE,)).macs
    row = {
        "tool": "secateur",
        "score": score,
        "macs": macs,
        "macs_percent": round(100 * macs / plain.before.macs, 3),
        "params": plain.after.params,
        "how": plain.cut.how,
        "proof_max_error": plain.proof.max_error,
        "prune_seconds": round(seconds, 2),
        "accuracy_as_cut": round(cifar.accuracy(plain.model, x, y), 2),
        "accuracy_bn_re_estimated": round(cifar.accuracy(tuned.model, x, y), 2),
    }
    return row, tuned


def theirs(ratio: float, global_pruning: bool, x: Tensor, y: Tensor, calibration: Tensor) -> dict[str, Any]:
    """One row of Torch-Pruning's magnitude importance (L2) at a channel ratio."""
    import torch_pruning as tp

    model = cifar.trained_resnet56()
    start = time.perf_counter()
    pruner = tp.pruner.BasePruner(
        model,
        EXAMPLE,
        importance=tp.importance.MagnitudeImportance(p=2),
        pruning_ratio=ratio,
        global_pruning=global_pruning,
        ignored_layers=[model.linear],
    )
    pruner.step()
    seconds = time.perf_counter() - start
    cost = count(model, (EXAMPLE,))
    row = {"tool": "torch-pruning", "score": "l2", "ratio": ratio, "global": global_pruning, "macs": cost.macs}
    row |= {"params": cost.params, "prune_seconds": round(seconds, 2)}
    row["accuracy_as_cut"] = round(cifar.accuracy(model, x, y), 2)
    row["accuracy_bn_re_estimated"] = round(cifar.accuracy(re_estimated(model, calibration), x, y), 2)
    return row


def search(global_pruning: bool, limit: int) -> float:
    """The smallest channel ratio (in steps of 1/256) at which Torch-Pruning leaves at most `limit` MACs.

    It takes ratios only, so this search is what asking it for MACs costs its user.
    """
    import torch_pruning as tp

    low, high = 0, 255
    while low < high:
        middle = (low + high) // 2
        model = cifar.trained_resnet56()
        importance = tp.importance.MagnitudeImportance(p=2)
        options: dict[str, Any] = {"global_pruning": global_pruning, "ignored_layers": [model.linear]}
        tp.pruner.BasePruner(model, EXAMPLE, importance=importance, pruning_ratio=middle / 256, **options).step()
        if count(model, (EXAMPLE,)).macs <= limit:
            high = middle
        else:
            low = middle + 1
    return low / 256


def reloaded(result: Any, x: Tensor) -> dict[str, Any]:
    """Save, load in a new process with and without the factory, compare outputs bit for bit."""
    row: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as parent:
        folder = Path(parent) / "resnet56_half"
        sc.save(result, folder)
        row["folder_bytes"] = sum(f.stat().st_size for f in folder.rglob("*") if f.is_file())
        with torch.no_grad():
            wanted = result.model(x)
        for how in ("factory", "folder alone"):
            out = Path(parent) / "outputs.pt"
            command = [sys.executable, "-c", AGAIN, str(folder), str(out), how]
            done = subprocess.run(command, capture_output=True, text=True)
            same = done.returncode == 0 and torch.equal(torch.load(out, weights_only=True), wanted)
            row[how] = "same bits" if same else f"differs or failed: {done.stderr[-300:]}"
    return row


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--scores", nargs="*", default=["l2", "l1", "bn_scale", "random"])
    parser.add_argument("--out", type=Path, default=RESULTS / "resnet56.json")
    options = parser.parse_args()
    torch.set_num_threads(1)
    x, y = cifar.images("test")
    calibration, _ = cifar.images("train_0", CALIBRATION)
    dense = cifar.trained_resnet56()
    before = count(dense, (EXAMPLE,))
    page: dict[str, Any] = {
        "model": "CIFAR-10 ResNet-56, zero-padding shortcuts",
        "test_images": len(y),
        "calibration_images": CALIBRATION,
        "fine_tuning": "none",
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "dense": {"macs": before.macs, "params": before.params, "accuracy": round(cifar.accuracy(dense, x, y), 2)},
        "rows": [],
    }
    print("dense", page["dense"], flush=True)
    for score in options.scores:
        row, result = ours(score, x, y, calibration)
        if score == "l2":
            page["reloaded_in_a_new_process"] = reloaded(result, x[:500])
            print(page["reloaded_in_a_new_process"])
        page["rows"].append(row)
        print(row, flush=True)
    for global_pruning in (False, True):
        row = theirs(search(global_pruning, before.macs // 2), global_pruning, x, y, calibration)
        page["rows"].append(row | {"macs_percent": round(100 * row["macs"] / before.macs, 3)})
        print(row, flush=True)
    options.out.write_text(json.dumps(page, indent=1) + "\n")


if __name__ == "__main__":
    main()
