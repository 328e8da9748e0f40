"""A small network, and training steps of it that are the same at every run."""

import torch
from torch import nn

from secateur.recover.gradual import DEFAULTS
from secateur.recover.schedule import Schedule

KINDS = list(DEFAULTS)
NESTED = ["one_shot", "iterative", "cubic", "one_cycle"]
OPTIMIZERS = {
    "sgd": lambda p: torch.optim.SGD(p, 0.05, momentum=0.9, weight_decay=0.1),
    "adam, foreach off": lambda p: torch.optim.Adam(p, 0.01, weight_decay=0.1, foreach=False),
    "adamw": lambda p: torch.optim.AdamW(p, 0.01, amsgrad=True),
}
X = torch.randn(32, 4, 5, 5, generator=torch.Generator().manual_seed(0))


class Net(nn.Module):
    """A convolution, a grouped one, a batch norm and two linear layers."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(4, 8, 3, padding=1)
        self.norm = nn.BatchNorm2d(8)
        self.grouped = nn.Conv2d(8, 8, 3, groups=2, bias=False)
        self.fc = nn.Linear(8, 12)
        self.head = nn.Linear(12, 4)

    def forward(self, x):
        x = torch.relu(self.grouped(torch.relu(self.norm(self.conv(x)))))
        return self.head(torch.relu(self.fc(x.mean((2, 3)))))


SIZES = {"conv.weight": 288, "grouped.weight": 288, "fc.weight": 96, "head.weight": 48}


def net():
    torch.manual_seed(0)
    return Net().train()


def target(x):
    return x[:, :, 2, 2].sin()


def backward(model, step, parts=1):
    """Gradients of the batch of a step, in so many parts."""
    rows = torch.randint(0, 32, (8,), generator=torch.Generator().manual_seed(step))
    for part in rows.chunk(parts):
        (nn.functional.mse_loss(model(X[part]), target(X[part])) / parts).backward()


def train(model, optimizer, steps, look=lambda step: None, parts=1):
    for step in steps:
        backward(model, step, parts)
        optimizer.step()
        look(step + 1)
        optimizer.zero_grad()


def made(how, steps, optimizer="sgd"):
    model = net()
    opt = OPTIMIZERS[optimizer](model.parameters())
    return model, opt, Schedule(model, opt, how, steps)
