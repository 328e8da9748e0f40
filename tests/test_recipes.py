"""The benchmark that chooses a way of training back computes what `recover` does."""

import os
from pathlib import Path

import pytest
import torch

from secateur.recover import Training
from secateur.recover import loss as losses

DATA = Path(os.environ.get("SECATEUR_DATA", Path(__file__).parents[2] / "shared" / "data"))
pytestmark = pytest.mark.skipif(not (DATA / "cifar10_resnet56.safetensors").exists(), reason="no data: set SECATEUR_DATA")


def test_its_steps_are_those_of_recover_and_torch(monkeypatch):
    """A plain step, one with a box and one with a mixture, in float32: against torch's SGD at the rates and with the losses of the library."""
    from benchmarks import cifar, recipes

    monkeypatch.setattr(recipes, "BATCH", 8)
    monkeypatch.setattr(recipes, "HALF", torch.float32)
    torch.manual_seed(0)
    (x, y), dense = cifar.images("train_0", 24), cifar.trained_resnet56
    how = Training(epochs=1, mirror=True, lr=0.01, warmup=0.4, distil=0.9)
    run = recipes.Run(dense(), dense(), (x, y), recipes.Recipe(epochs=1, mirror=True, lr=0.01, warmup=0.4))
    run.epoch()
    run.own.fill_(1.0)
    run.own[1, :, 3:20, 5:32], run.own[2] = 0.0, 0.3
    model, teacher = dense().train(), dense()
    sgd = how.made(model, 8)
    for step, own in enumerate(run.own):
        images, labels, part = run.images[8 * step : 8 * step + 8], run.labels[8 * step : 8 * step + 8], float(own.mean())
        shown = torch.where(own == 1, images, own * images + (1 - own) * images.flip(0))
        with torch.no_grad():
            wanted = losses.middle(teacher(shown), teacher(shown.flip(-1)))
        scores = model(shown)
        loss = 0.9 * losses.distance(scores, wanted, 4.0) + 0.1 * losses.of_both(losses.task_loss, scores, labels, part)
        sgd.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), how.clip)
        for group in sgd.param_groups:
            group["lr"] = 0.01 * how.at(step, 3)
        sgd.step()
        run.loss.zero_()
        run.body()
        assert float(run.loss) == pytest.approx(float(loss.detach()), rel=1e-3)
    for (name, a), b, old in zip(model.named_parameters(), run.model.parameters(), dense().parameters(), strict=True):
        assert float((a - b).norm()) < 0.01 * float((a - old).norm()), name


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
