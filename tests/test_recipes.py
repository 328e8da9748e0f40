"""The benchmark that chooses a way of training back computes what `recover` does."""

import os
from pathlib import Path

import pytest
import torch

from secateur.models.data import Batches
from secateur.recover import Training, recover

DATA = Path(os.environ.get("SECATEUR_DATA", Path(__file__).parents[2] / "shared" / "data"))
pytestmark = pytest.mark.skipif(not (DATA / "cifar10_resnet56.safetensors").exists(), reason="no data: set SECATEUR_DATA")


def test_one_step_is_the_one_of_recover(monkeypatch):
    from benchmarks import cifar, recipes

    monkeypatch.setattr(recipes, "BATCH", 64)
    x, y = cifar.images("train_0", 64)
    how = recipes.Recipe(epochs=1, mirror=True, lr=0.1)
    run = recipes.Run(cifar.trained_resnet56(), cifar.trained_resnet56(), (x, y), how)
    run.epoch()
    shown, labels = run.images.clone(), run.labels.clone()
    assert not torch.equal(shown, x) and torch.equal(labels.sort().values, y.sort().values) and bool((run.own == 1).all())
    run.body()
    seen, model, before = [], cifar.trained_resnet56(), cifar.trained_resnet56()
    options = Training(epochs=1, mirror=True, lr=0.1, precision="bfloat16", channels_last=True)
    recover(model, Batches(shown, labels, 64), options, teacher=cifar.trained_resnet56(), progress=lambda step, steps, loss: seen.append(loss))
    assert float(run.loss) == pytest.approx(seen[0], rel=0.02)
    apart = {n: (a - b).norm() / (a - old).norm() for (n, a), b, old in
             zip(model.named_parameters(), run.model.parameters(), before.parameters(), strict=True)}  # fmt: skip
    assert max(apart.values()) < 0.5 and sum(apart.values()) / len(apart) < 0.15, apart  # bfloat16, and the rows in another order


def test_boxes_and_mixtures_come_as_often_as_said():
    from benchmarks import recipes

    n = recipes.BATCH * 40
    rows = torch.zeros(1).expand(n, 3, 32, 32), torch.zeros(n).long()
    run = recipes.Run(torch.nn.Linear(1, 1), None, rows, recipes.Recipe(cutmix=0.3, mixup=0.3))
    counts = {"plain": 0, "box": 0, "mixture": 0}
    for _ in range(10):
        run.epoch()
        for own in run.own:
            values = set(own.flatten().tolist())
            counts["plain" if values == {1.0} else "box" if values <= {0.0, 1.0} else "mixture"] += 1
    assert 80 < counts["box"] < 160 and 80 < counts["mixture"] < 160 and sum(counts.values()) == 400
