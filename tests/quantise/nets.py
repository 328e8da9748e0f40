"""Small networks and data that several tests quantise."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from secateur.models.data import Batches, Data


def convolutional() -> tuple[nn.Module, tuple[Tensor, ...]]:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 16, 3, stride=2, padding=1), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 5),
    )  # fmt: skip
    return model.eval(), (torch.randn(2, 3, 8, 8),)


class Block(nn.Module):
    """Attention of 2 heads and a hidden layer, over 6 tokens of width 16; class scores of the mean token."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out, self.up, self.head = (nn.Linear(16, n) for n in (48, 16, 32, 5))
        self.down = nn.Linear(32, 16)
        self.one, self.two = nn.LayerNorm(16), nn.LayerNorm(16)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (t.view(-1, 6, 2, 8).transpose(1, 2) for t in self.qkv(self.one(x)).chunk(3, -1))
        x = x + self.out(nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        x = x + self.down(nn.functional.gelu(self.up(self.two(x))))
        return self.head(x.mean(1))


def transformer() -> tuple[nn.Module, tuple[Tensor, ...]]:
    torch.manual_seed(0)
    return Block().eval(), (torch.randn(2, 6, 16),)


def data_of(model: nn.Module, args: tuple[Tensor, ...], seed: int = 0, labelled: bool = True) -> Data:
    """Random rows; the labels are what the model says, so that it is always right."""
    x = torch.randn(96, *args[0].shape[1:], generator=torch.Generator().manual_seed(seed))
    with torch.no_grad():
        y = model(x).argmax(1) if labelled else None
    return Data("random", Batches(x[:64], None if y is None else y[:64], 32), Batches(x[64:], None if y is None else y[64:], 32), labelled)


def sparse(model: nn.Module, share: float = 0.5) -> nn.Module:
    """The model with that share of every matrix made zero."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in model.parameters():
            if p.dim() > 1:
                p[torch.rand(p.shape, generator=generator) < share] = 0.0
    return model
