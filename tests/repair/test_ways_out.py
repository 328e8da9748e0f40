"""Where the data cannot be followed through a network, what the error says to do instead works."""

import pytest
import torch
from torch import nn

import secateur as sc
from secateur.errors import DataError, InputError


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.a, self.norm, self.b = nn.Linear(10, 12), nn.BatchNorm1d(12), nn.Linear(12, 5)


class Written(Net):
    def forward(self, x):
        y = self.a(x)
        y[:, :3].relu_()
        return self.b(self.norm(y))


class Masked(Net):
    def forward(self, x, mask):
        return self.b(self.norm(self.a(x))) + mask


MASK = torch.zeros(5)
CASES = {
    "written into a view": (Written, (torch.randn(2, 10),), [torch.randn(64, 10)] * 2, InputError, "writes in place into a view"),
    "an input without rows": (
        Masked, (torch.randn(2, 10), MASK), [{"x": torch.randn(64, 10), "mask": MASK}] * 2, DataError, "no row for each of the 64 samples",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_it_works(name):
    net, args, data, kind, said = CASES[name]
    model, half = net().eval(), sc.MACs(at_most="60%")
    for call in (lambda: sc.prune(model, args, half, data=data), lambda: sc.sparsify(model, args, sc.Sparse(keep="50%"), data)):
        with pytest.raises(kind, match=rf"(?s){said}.*\n  .*prune\(score='l2'\), sparsify\(\) without data"):
            call()
    assert sc.prune(model, args, half, data=data, score="l2").proof.passed
    assert sc.sparsify(model, args, sc.Sparse(keep="50%")).masks
