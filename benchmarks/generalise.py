"""`python -m benchmarks.generalise [--seeds 8] [--settings digits_wide_40 ...]`: does pruning help on new rows?

Each setting is a data set, a network and a share of training labels that are drawn anew at random (over all ten classes, so
that 40 % drawn anew are 36 % wrong). For each seed: rows, labels, initial weights and order are drawn; 20 % of the training
rows are set aside for validation, their labels as noisy as the others; the dense network is trained for some epochs (EPOCHS),
masked by magnitude to a share of its weights, each layer to the same, and trained on for as many. What it is compared with is
the dense network trained on for as many in the same order, from a new optimizer as well. The last epoch counts; the rate falls
to 0 by then, because at a constant one the last epoch of a dense network may be a bad one by chance, which flatters whatever it
is compared with. EPOCHS and the rate were settled by training and validation rows of another seed. (A first study at a constant rate
was thrown away after its test figures had been seen; it was kinder to pruning in nearly every setting.)

The test rows choose nothing. All shares were fixed beforehand and all are reported. Two rows choose by validation, seed by
seed: "chosen" takes the share (100 % is one of them), "stopped" takes the dense network at the best of its epochs, which is the
cheaper way not to memorise. Differences are paired by seed, with 95 % intervals by Student's t over the seeds; the
test rows are the same for all seeds, so that the intervals say nothing of other test rows, and they are not corrected for the
number of shares.

Fashion-MNIST comes from the data folder (`SECATEUR_DATA`) and is left out, with the reason, where that is not there.
`results/generalise.json` has all runs and their summary.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.cifar import folder
from benchmarks.no_training.__main__ import versions
from secateur import Sparse, sparsify
from secateur.masks.hold import hold
from secateur.models.data import Batches, Data, load_data
from secateur.models.quality import accuracy
from secateur.plan import Plan
from secateur.recover.generalise import generalisation, interval, paired

RESULTS = Path(__file__).parent / "results" / "generalise.json"
SHARES = (100, 50, 20, 10, 5, 2)  # percent of the weights that stay
SEEDS, BATCH, RATE = 8, 50, 1e-3
EPOCHS = {"digits": 60, "fashion": 20}  # twice as many fit the wide network to nearly all of its training labels
VALIDATION, NOISE, CLASSES = 0.2, 0.2, 10
WIDE, NARROW = {"digits": (256, 256), "fashion": (512, 512)}, {"digits": (16,), "fashion": (32,)}


@dataclass(frozen=True)
class Setting:
    """One question: `source` digits or fashion, the layers between, labels drawn anew (percent), training images (None: all)."""

    name: str
    source: str
    hidden: tuple[int, ...]
    random: int
    images: int | None


def settings() -> list[Setting]:
    found = []
    for source, images in (("digits", None), ("fashion", 2000)):
        for width, hidden in (("wide", WIDE[source]), ("narrow", NARROW[source])):
            found += [Setting(f"{source}_{width}_{random}", source, hidden, random, images) for random in (40, 0)]
    return found


# ---------------------------------------------------------------- data
@dataclass(frozen=True)
class Rows:
    """What one seed trains on, chooses by and is measured on. `wrong`: which training labels are not the true ones."""

    train: Batches
    valid: Batches
    test: Batches
    wrong: Tensor


@cache
def pixels(source: str) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Training images (N, pixels) of mean 0 and deviation 1, their labels, and both of the test rows.

    Raises:
        FileNotFoundError: Fashion-MNIST, and no data folder.
    """
    if source == "digits":
        data = load_data("digits")
        held = [data.train.inputs, data.train.labels, data.test.inputs, data.test.labels]
    else:
        held = []
        for part in ("train", "test"):
            with np.load(folder() / f"fashion_mnist_{part}.npz") as archive:
                held += [torch.from_numpy(archive["image"]).float() / 255, torch.from_numpy(archive["label"]).long()]
    mean, deviation = held[0].mean(), held[0].std()
    return tuple(t if t.dtype == torch.int64 else ((t - mean) / deviation).flatten(1) for t in held)


def drawn(setting: Setting, seed: int) -> Rows:
    """The rows of a seed, some of their labels drawn anew."""
    x, y, test_x, test_y = pixels(setting.source)
    g = torch.Generator().manual_seed(seed)
    rows = torch.randperm(len(x), generator=g)[: setting.images]
    x, true = x[rows], y[rows]
    anew = torch.rand(len(true), generator=g) < setting.random / 100
    labels = torch.where(anew, torch.randint(CLASSES, true.shape, generator=g), true)
    n = len(x) - round(VALIDATION * len(x))
    train, valid = Batches(x[:n], labels[:n], 500), Batches(x[n:], labels[n:], 500)
    return Rows(train, valid, Batches(test_x, test_y, 1000), (labels != true)[:n])


# ---------------------------------------------------------------- one seed
def network(setting: Setting, seed: int) -> nn.Sequential:
    torch.manual_seed(seed)
    sizes = (pixels(setting.source)[0].shape[1], *setting.hidden, CLASSES)
    layers: list[nn.Module] = []
    for a, b in zip(sizes, sizes[1:], strict=False):
        layers += [nn.Linear(a, b), nn.ReLU()]
    return nn.Sequential(*layers[:-1]).eval()


def train(model: nn.Module, rows: Batches, epochs: int, seed: int, plan: Plan | None = None, seen: Callable[[], None] | None = None) -> None:
    """In place, by Adam, the rate falling as a cosine to 0; the zeros of `plan` stay. `seen` is called after each epoch."""
    optimizer = torch.optim.Adam(model.parameters(), RATE, fused=True)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs * -(-len(rows.inputs) // BATCH))
    held = hold(model, plan, optimizer) if plan is not None else None
    g = torch.Generator().manual_seed(seed)
    for _ in range(epochs):
        model.train()
        for some in torch.randperm(len(rows.inputs), generator=g).split(BATCH):
            loss = F.cross_entropy(model(rows.inputs[some]), rows.labels[some])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
        model.eval()
        if seen is not None:
            seen()
    if held is not None:
        held.remove()


class Best:
    """The dense network at its best epoch by validation; of equally good ones the first."""

    def __init__(self, model: nn.Module, valid: Batches):
        self.model, self.valid, self.value, self.epoch, self.at = model, valid, -1.0, 0, 0
        self.state: dict[str, Tensor] = {}

    def __call__(self) -> None:
        self.epoch += 1
        if (value := accuracy(self.model, self.valid)) > self.value:
            self.value, self.at = value, self.epoch
            self.state = {name: t.clone() for name, t in self.model.state_dict().items()}


def figures(model: nn.Module, rows: Rows) -> dict[str, float]:
    """All that is reported of one network. `memorised`: the share of wrong training labels that it gives back."""
    found = generalisation(model, Data("rows", rows.train, rows.test, True), (NOISE,))
    with torch.no_grad():
        learnt = model(rows.train.inputs[rows.wrong]).argmax(1) == rows.train.labels[rows.wrong]
    return {
        "train": found.train.accuracy, "valid": accuracy(model, rows.valid), "test": found.test.accuracy, "gap": found.gap,
        "test_loss": found.test.loss, "ece": found.test.ece, "noisy": found.noise[NOISE],
        **({"memorised": float(learnt.double().mean())} if len(learnt) else {}),
    }  # fmt: skip


def run(setting: Setting, seed: int, epochs: int) -> dict[str, dict[str, float]]:
    """{share, "chosen" or "stopped": figures} of one seed."""
    rows = drawn(setting, seed)
    dense = network(setting, seed)
    best = Best(dense, rows.valid)
    train(dense, rows.train, epochs, 2 * seed, seen=best)
    found = {}
    for share in SHARES:
        if share == 100:
            model, plan = copy.deepcopy(dense), None
            best.model = model
        else:
            done = sparsify(dense, (rows.train.inputs[:2],), Sparse(f"{share}%", "magnitude"))
            model, plan = done.model, done.plan
        train(model, rows.train, epochs, 2 * seed + 1, plan, best if plan is None else None)
        found[str(share)] = figures(model, rows)
    share = max(found, key=lambda s: (found[s]["valid"], int(s)))
    found["chosen"] = {**found[share], "share": float(share)}
    model = network(setting, seed)
    model.load_state_dict(best.state)
    found["stopped"] = {**figures(model, rows), "epoch": float(best.at)}
    return found


# ---------------------------------------------------------------- over the seeds
def summary(runs: Sequence[Mapping[str, Mapping[str, float]]]) -> dict[str, Any]:
    """Mean and interval of every figure of every row, and the paired difference of test accuracies to the dense network."""

    def over(one: str, other: str) -> dict[str, float]:
        held = paired([r[one]["test"] for r in runs], [r[other]["test"] for r in runs])
        return {"mean": held.mean, "half": held.half}

    found: dict[str, Any] = {}
    for one in runs[0]:
        values = {name: interval(r[one][name] for r in runs) for name in runs[0][one]}
        found[one] = {name: {"mean": v.mean, "half": v.half} for name, v in values.items()}
        if one != "100":
            found[one]["against_dense"] = over(one, "100")
    found["chosen"]["against_stopped"] = over("chosen", "stopped")
    return found


def shown(setting: Setting, found: Mapping[str, Any]) -> None:
    print(f"\n{setting.name}: test accuracy, its paired difference to the dense network trained as long, in points")
    away = found["chosen"]["against_stopped"]
    print(f"  chosen against stopped {100 * away['mean']:+.2f} ± {100 * away['half']:.2f}")
    for one, row in found.items():
        against = row.get("against_dense")
        said = f"{100 * against['mean']:+6.2f} ± {100 * against['half']:.2f}" if against else " " * 13
        learnt = f"  wrong labels memorised {row['memorised']['mean']:.0%}" if "memorised" in row else ""
        print(f"  {one:>8}  train {100 * row['train']['mean']:6.2f}  test {100 * row['test']['mean']:6.2f} ± {100 * row['test']['half']:.2f}  {said}"
              f"  loss {row['test_loss']['mean']:.3f}  ECE {row['ece']['mean']:.3f}  noisy {100 * row['noisy']['mean']:.2f}{learnt}")  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=SEEDS)
    parser.add_argument("--epochs", type=int, help="Before the mask, and again after it.")
    parser.add_argument("--settings", nargs="+", choices=[s.name for s in settings()])
    parser.add_argument("--out", type=Path, default=RESULTS)
    given = parser.parse_args()
    torch.set_num_threads(1)
    facts: dict[str, Any] = {
        "shares": SHARES, "seeds": given.seeds, "epochs": EPOCHS if given.epochs is None else given.epochs, "batch": BATCH, "rate": RATE,
        "noise": NOISE, "validation": VALIDATION, "versions": versions(), "settings": {},
    }  # fmt: skip
    for setting in settings():
        if given.settings and setting.name not in given.settings:
            continue
        try:
            pixels(setting.source)
        except FileNotFoundError as error:
            print(f"\n{setting.name}: left out, {error}")
            facts["settings"][setting.name] = {**asdict(setting), "left_out": "no data folder"}
            continue
        began = time.process_time()
        runs = [run(setting, seed, given.epochs or EPOCHS[setting.source]) for seed in range(given.seeds)]
        found = summary(runs)
        shown(setting, found)
        weights = sum(p.numel() for p in network(setting, 0).parameters())
        test, rows = len(pixels(setting.source)[2]), len(drawn(setting, 0).wrong)
        facts["settings"][setting.name] = _rounded({
            **asdict(setting), "parameters": weights, "trained_on": rows, "tested_on": test, "cpu_seconds": time.process_time() - began,
            "summary": found, "runs": runs,
        })  # fmt: skip
        fresh = given.out.with_suffix(".new")
        fresh.write_text(json.dumps(facts, indent=1) + "\n")
        os.replace(fresh, given.out)


def _rounded(value: Any) -> Any:
    """Numbers with five decimals."""
    if isinstance(value, Mapping):
        return {name: _rounded(v) for name, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_rounded(v) for v in value]
    return round(value, 5) if isinstance(value, float) else value


if __name__ == "__main__":
    main()
