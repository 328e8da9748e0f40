"""`python scripts/kills.py [--kills 20] [--out benchmarks/results/kills.json]`: training that is killed (-9) at random moments, again and again.

A masked network for the digits is trained back by `secateur recover`, once without a stop and once with a stop at every few seconds; both must
write the same bytes, and no start may lose more steps than lie between two checkpoints.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

import secateur as sc
from secateur.models import load_data
from secateur.models.digits import trained_digits_net

EPOCHS = 240


def command(folder: Path, out: Path) -> list[str]:
    return [sys.executable, "-m", "secateur", "recover", str(folder), "--data", "digits", "--epochs", str(EPOCHS), "-o", str(out), "--json"]


def reached(out: Path) -> int:
    """Steps in the checkpoint, -1 where there is none."""
    path = out.parent / f".{out.name}.training" / "checkpoint.pt"
    return int(torch.load(path, weights_only=True)["step"]) if path.exists() else -1


def finished(out: Path) -> bool:
    """Whether there is a model; a report is there from the beginning."""
    return (out / "model.safetensors").exists()


def killed(folder: Path, out: Path, kills: int, seed: int) -> list[dict[str, Any]]:
    """Starts, each killed after a random time, the last one left alone."""
    draw, rows = random.Random(seed), []
    for number in range(kills + 1):
        before, begin = reached(out), time.monotonic()
        process = subprocess.Popen(command(folder, out), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
        limit = None if number == kills else draw.uniform(3.0, 9.0)
        try:
            _, said = process.communicate(timeout=limit)
            if process.returncode:
                raise SystemExit(f"start {number} failed: {said[-800:]}")
        except subprocess.TimeoutExpired:
            process.kill()
            process.communicate()
        rows.append({"start": number, "seconds": time.monotonic() - begin, "step_before": before, "step_after": reached(out), "done": finished(out)})
        print(rows[-1], flush=True)
        if finished(out):
            break
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", default="benchmarks/results/kills.json")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        data = load_data("digits")
        model = trained_digits_net(data)
        sc.save(sc.sparsify(model, data.example(2)[0], sc.Sparse(keep="10%", by="magnitude", refit=False)), root / "masked")
        subprocess.run(command(root / "masked", root / "whole"), check=True, stdout=subprocess.DEVNULL)
        rows = killed(root / "masked", root / "parts", options.kills, options.seed)
        sums = [hashlib.sha256((root / name / "model.safetensors").read_bytes()).hexdigest() for name in ("whole", "parts")]
    facts = {"epochs": EPOCHS, "kills": sum(not r["done"] for r in rows), "finished": rows[-1]["done"], "same_bytes": sums[0] == sums[1],
             "lost_a_checkpoint": any(r["step_after"] < r["step_before"] for r in rows if not r["done"]), "starts": rows}  # fmt: skip
    Path(options.out).write_text(json.dumps(facts, indent=1) + "\n")
    print({k: v for k, v in facts.items() if k != "starts"})


if __name__ == "__main__":
    main()
