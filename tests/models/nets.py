"""Small networks for the tests of folders and of the command line, importable from a new process."""

import torch
import torch.nn.functional as F
from torch import nn


class Net(nn.Module):
    """Convolutions, a residual, BatchNorm, a tied pair of linears, a non-persistent buffer."""

    def __init__(self, width=8):
        super().__init__()
        self.width = width
        self.a = nn.Conv2d(1, width, 3, padding=1)
        self.bn = nn.BatchNorm2d(width)
        self.b = nn.Conv2d(width, width, 3, padding=1)
        self.c = nn.Conv2d(width, width, 3, padding=1)
        self.one = nn.Linear(width, width, bias=False)
        self.two = nn.Linear(width, width, bias=False)
        self.two.weight = self.one.weight
        self.head = nn.Linear(width, 10)
        self.register_buffer("scale", torch.ones(1), persistent=False)

    def forward(self, x):
        x = F.relu(self.bn(self.a(x)))
        x = (x + F.relu(self.c(F.relu(self.b(x))))).mean((2, 3))
        return self.head(self.two(F.relu(self.one(x)))) * self.scale


class Hard(nn.Module):
    """A size written into forward(): only the rewritten graph can follow a cut."""

    def __init__(self):
        super().__init__()
        self.a = nn.Linear(6, 16)
        self.b = nn.Linear(16, 3)

    def forward(self, x):
        return self.b(F.relu(self.a(x)).reshape(-1, 16))


def net():
    torch.manual_seed(0)
    return Net().eval()


def other():
    torch.manual_seed(0)
    return Net(width=6)


def hard():
    torch.manual_seed(0)
    return Hard().eval()


def net_with_inputs():
    return net(), (torch.randn(2, 1, 8, 8),)


def diverged():
    model = net()
    with torch.no_grad():
        model.b.weight[0, 0, 0, 0] = float("nan")
    return model, torch.randn(2, 1, 8, 8)


def half():
    return net().half()


def rows():
    generator = torch.Generator().manual_seed(0)
    return torch.randn(64, 1, 8, 8, generator=generator), torch.randint(0, 10, (64,), generator=generator)


def no_rows():
    return torch.zeros(0, 1, 8, 8), torch.zeros(0, dtype=torch.int64)


def no_batches():
    return []


def batches():
    x, y = rows()
    return [(x[:32], y[:32]), (x[32:], y[32:])]


def not_data():
    return 3


def not_a_model():
    return "weights"


def broken():
    raise OSError("the disk with the weights is gone")


MADE = torch.nn.Linear(2, 2)
