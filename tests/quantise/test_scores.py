"""Class scores need not be the first output: the accuracy is of those that the model's own is of."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from secateur.advise.int8 import int8
from secateur.errors import DataError
from secateur.models.data import Batches, Data
from secateur.models.quality import accuracy
from secateur.quantise import How, quantise
from secateur.quantise.rows import scores_at


class Headed(nn.Module):
    """Features, a count, and class scores under a name."""

    def __init__(self, name: str = "logits") -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body, self.head, self.name = nn.Linear(6, 12), nn.Linear(12, 4), name

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        features = self.body(x).relu()
        return {"count": (features > 0).sum(1), "features": features, self.name: self.head(features)}


X = torch.randn(96, 6, generator=torch.Generator().manual_seed(1))


def labelled(model: nn.Module) -> Data:
    y = model(X)["logits"].argmax(1)
    return Data("rows", Batches(X[:64], y[:64], 32), Batches(X[64:], y[64:], 32), True)


def test_scores_are_found_where_the_accuracy_of_torch_finds_them():
    assert scores_at(Headed(), ((X[:2],), {})) == 2
    assert scores_at(nn.Linear(6, 4), ((X[:2],), {})) == 0


def test_no_scores_are_an_error_and_no_guess():
    odd = Headed("answer")
    with pytest.raises(DataError, match=r"(?s)a dict of count, features, answer.*as logits"):
        scores_at(odd, ((X[:2],), {}))
    with pytest.raises(DataError, match="a dict of count, features, answer"):
        accuracy(odd, labelled(Headed()).test)


def test_int8_is_scored_by_them(tmp_path):
    for name in ("onnx", "onnxscript", "onnxruntime"):
        pytest.importorskip(name)
    model = Headed().eval()
    data = labelled(model)
    rows = quantise(model, ((X[:2],), {}), data, tmp_path / "q", how=How(rounds=2)).rows
    assert rows[0].accuracy == 1.0 and rows[1].accuracy > 0.8
    for classes in (True, False):
        test = list(data.test) if classes else [x for x, _ in data.test]
        found = int8(model, ((X[:2],), {}), (data.train, test, classes), ((X[:1],), {}), tmp_path / f"int8-{classes}", 1, lambda stage: None)
        assert found.outputs[0][0].shape == ((32, 4) if classes else (32, 12))  # without labels the first of floating point, as of a module
