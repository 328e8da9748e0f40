"""A model that cannot be captured as a whole is pruned in the parts that can."""

import pytest
import torch
from torch import nn

from secateur import MACs, parts, prune
from secateur.errors import CaptureError, InputError


class Detector(nn.Module):
    """Backbone and head are plain; what comes after depends on the data, as box filtering does."""

    def __init__(self):
        super().__init__()
        self.backbone = nn.Sequential(nn.Conv2d(3, 16, 3), nn.ReLU(), nn.Conv2d(16, 8, 3))
        self.head = nn.ModuleDict({"score": nn.Sequential(nn.Conv2d(8, 12, 1), nn.ReLU(), nn.Conv2d(12, 1, 1))})

    def forward(self, x):
        x = self.backbone(x)
        score = self.head["score"](x)
        boxes = [row for row in score.flatten() if float(row) > 0]
        return torch.stack(boxes) if boxes else score.new_zeros(0)


X = torch.randn(2, 3, 10, 10, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def detector():
    torch.manual_seed(0)
    return Detector().train()


def test_the_whole_is_refused_and_the_message_names_the_parts(detector):
    with pytest.raises(CaptureError, match=r"'backbone', 'head.score'.*sc.parts"):
        prune(detector, (X,), MACs(at_most="50%"))


def test_the_largest_parts_in_the_order_they_run(detector):
    found = parts(detector, (X,))
    assert [p.name for p in found] == ["backbone", "head.score"]
    assert detector.training and not detector.backbone[0]._forward_pre_hooks
    torch.testing.assert_close(found[1].args[0], detector.backbone(X))


def test_parts_are_pruned_and_put_back(detector):
    dense = {n: p.clone() for n, p in detector.state_dict().items()}
    smaller = detector
    for part in parts(detector, (X,)):
        result = prune(part.module, part.args, MACs(at_most="60%"), kwargs=part.kwargs)
        smaller = part.put(smaller, result.model)
    count = [sum(p.numel() for p in m.parameters()) for m in (smaller, detector)]
    assert count[0] < 0.7 * count[1]
    assert smaller(X).dim() == 1
    assert all(torch.equal(p, dense[n]) for n, p in detector.state_dict().items())


def test_a_part_of_another_model_is_refused(detector):
    with pytest.raises(InputError, match="has no module 'backbone'"):
        parts(detector, (X,))[0].put(nn.Linear(2, 2), nn.Linear(2, 2))
