"""A network with batch norm and dropout, and rows that it can learn."""

import torch
from torch import nn

import secateur as sc
from secateur.models.data import Batches


class Net(nn.Module):
    def __init__(self, dropout=0.2):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(1, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.layers = nn.ModuleList([nn.Linear(8, 16), nn.Linear(16, 4)])
        self.drop = nn.Dropout(dropout)

    def forward(self, x):
        x = torch.relu(self.norm(self.conv(x))).mean((2, 3))
        return self.layers[1](self.drop(torch.relu(self.layers[0](x))))


def rows(n=90, size=32, seed=0):
    """Four classes of noisy stripes."""
    g = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, 4, (n,), generator=g)
    waves = torch.stack([torch.sin(torch.arange(8) * (k + 1) * 0.7) for k in range(4)])
    return Batches(waves[labels][:, None, None, :] + 0.3 * torch.randn(n, 1, 8, 8, generator=g), labels, size)


def net(seed=0, **options):
    torch.manual_seed(seed)
    return Net(**options)


def masked(model, x):
    return sc.sparsify(model.eval(), (x,), sc.Sparse(keep="30%", by="magnitude", refit=False))
