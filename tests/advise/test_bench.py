"""What is timed is what runs: both models in evaluation mode, whatever mode they came in."""

import pytest
import torch
from torch import nn

from secateur.advise import bench


class Watched(nn.Module):
    def __init__(self, modes):
        super().__init__()
        torch.manual_seed(0)
        self.layer, self.norm = nn.Linear(64, 64), nn.BatchNorm1d(64)
        self.told = modes.add  # a set among the attributes would be as before after a look

    def forward(self, x):
        self.told(self.training)
        return self.norm(self.layer(x))


@pytest.mark.parametrize("ask", ["model_of", "zeros_of"])
def test_a_model_in_training_mode_is_timed_in_evaluation(monkeypatch, ask):
    """In training mode its batch norms would compute, and change, statistics that the dense model's do not."""
    monkeypatch.setattr(bench, "ROUNDS", 3)
    modes, x = set(), torch.randn(1, 64)
    dense, other = Watched(set()).train(), Watched(modes).train()
    with torch.no_grad():
        other.layer.weight[:, :60] = 0.0
    with bench.Bench(dense, ((x,), {}), 1, ["torch"]) as held:
        timed = getattr(held, ask)(other)
        timed = timed if ask == "model_of" else timed[0]
    assert timed.ratio > 0 and modes == {False} and not other.norm.num_batches_tracked
    assert dense.training and other.training
