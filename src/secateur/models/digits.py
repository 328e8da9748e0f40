"""A small residual network for scikit-learn's 8x8 digits, and its training: the model of `secateur demo`."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from secateur.models.data import Batches, Data


class Block(nn.Module):
    """Two 3x3 convolutions around a shortcut. (N, inputs, H, W) -> (N, outputs, H / stride, W / stride)."""

    def __init__(self, inputs: int, outputs: int, stride: int):
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or inputs != outputs:
            self.shortcut = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.bn1(self.conv1(x)))
        return F.relu(self.bn2(self.conv2(y)) + self.shortcut(x))


class DigitsNet(nn.Module):
    """Three residual stages. (N, 1, 8, 8) -> (N, 10) class scores; pixels in 0..1."""

    def __init__(self, width: int = 16):
        super().__init__()
        self.conv1 = nn.Conv2d(1, width, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.layer1 = Block(width, width, 1)
        self.layer2 = Block(width, 2 * width, 2)
        self.layer3 = Block(2 * width, 4 * width, 2)
        self.head = nn.Linear(4 * width, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn1(self.conv1(x)))
        return self.head(self.layer3(self.layer2(self.layer1(x))).mean((2, 3)))


def digits_net() -> DigitsNet:
    """The network, weights drawn from seed 0."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return DigitsNet()


def trained_digits_net(
    data: Data, *, epochs: int = 8, seed: int = 0, progress: Callable[[int, int], None] | None = None
) -> DigitsNet:
    """The network trained on `data.train` (as `load_data("digits")` gives it): about 98 % of the test rows.

    The same weights every time for one seed on one machine. `progress(epochs done, epochs)` is called as it goes.
    """
    assert isinstance(data.train, Batches) and data.train.labels is not None
    inputs, labels = data.train.inputs, data.train.labels
    model = digits_net()
    shuffle = torch.Generator().manual_seed(seed)
    steps = epochs * -(-len(inputs) // 64)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=5e-4, nesterov=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.1, total_steps=steps)
    model.train()
    for epoch in range(epochs):
        for rows in torch.randperm(len(inputs), generator=shuffle).split(64):
            loss = F.cross_entropy(model(_shifted(inputs[rows], shuffle)), labels[rows])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
        if progress is not None:
            progress(epoch + 1, epochs)
    return model.eval()


def _shifted(images: Tensor, generator: torch.Generator) -> Tensor:
    """The batch moved by up to one pixel in each direction."""
    down, right = torch.randint(0, 3, (2,), generator=generator).tolist()
    return F.pad(images, (1, 1, 1, 1))[:, :, down : down + 8, right : right + 8]
