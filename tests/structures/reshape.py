"""Reshapes: flatten, permute, shuffle, pixel shuffle, unflatten, stack, repeat, expand, literals in view."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from .harness import Case, U, prod
from .masks import both, on

IMAGE = ((2, 3, 4, 4),)


def ones(n: int) -> torch.Tensor:
    """A mask that keeps everything: the factor of a product nothing is cut from."""
    return torch.ones(n, dtype=torch.bool)


class FlattenConv(Case):
    units = {"a": U("c1.weight", 0, 6), "h": U("f1.weight", 0, 10)}
    shapes = IMAGE

    def __init__(self):
        super().__init__()
        self.c1, self.f1, self.f2 = nn.Conv2d(3, 6, 3, padding=1), nn.Linear(96, 10), nn.Linear(10, 3)

    def forward(self, x):
        return self.f2(self.f1(torch.flatten(self.c1(x).relu(), 1)).relu())

    def reference(self, keep, x):
        x = on(self.c1(x).relu(), keep["a"], 1)
        return self.f2(on(self.f1(x.flatten(1)).relu(), keep["h"]))


class FlattenPermuted(Case):
    """Channels last before the flatten: unit c owns every 6th column."""

    units = {"a": U("f1.weight", 1, prod((16, 6), 1)), "h": U("f1.weight", 0, 10)}
    shapes = IMAGE

    def __init__(self):
        super().__init__()
        self.c1, self.f1, self.f2 = nn.Conv2d(3, 6, 3, padding=1), nn.Linear(96, 10), nn.Linear(10, 3)

    def forward(self, x):
        x = self.c1(x).relu().permute(0, 2, 3, 1)
        return self.f2(self.f1(x.reshape(x.size(0), -1)).relu())

    def reference(self, keep, x):
        x = on(self.c1(x).relu(), keep["a"], 1).permute(0, 2, 3, 1)
        return self.f2(on(self.f1(x.flatten(1)).relu(), keep["h"]))


class FlattenBatchNorm(Case):
    """BatchNorm1d after the flatten: its vectors carry channels times pixels."""

    units = {"a": U("n.weight", 0, prod((5, 16), 0))}
    shapes = IMAGE

    def __init__(self):
        super().__init__()
        self.c1, self.n, self.fc = nn.Conv2d(3, 5, 3, padding=1), nn.BatchNorm1d(80), nn.Linear(80, 3)

    def forward(self, x):
        return self.fc(self.n(self.c1(x).view(2, 80)).relu())

    def reference(self, keep, x):
        return self.fc(on(self.n(self.c1(x).flatten(1)).relu(), both(keep["a"], ones(16))))


class ChannelShuffle(Case):
    units = {"g": U("c1.weight", 0, prod((3, 4), 0)), "n": U("c1.weight", 0, prod((3, 4), 1))}
    shapes = IMAGE

    def __init__(self):
        super().__init__()
        self.c1, self.c2 = nn.Conv2d(3, 12, 1), nn.Conv2d(12, 4, 1)

    def forward(self, x):
        b, c, h, w = (x := self.c1(x)).shape
        x = x.view(b, 3, c // 3, h, w).transpose(1, 2).contiguous().view(b, c, h, w)
        return self.c2(x.relu())

    def reference(self, keep, x):
        x = on(self.c1(x).relu(), both(keep["g"], keep["n"]), 1)
        order = torch.arange(12).view(3, 4).t().flatten()
        return self.c2(x[:, order])


class ShuffleGrouped(Case):
    """ShuffleNet: grouped, shuffled, grouped; the groups of the second are the fillers of the first."""

    units = {
        "g": U("c1.weight", 0, prod((4, 4), 0)),
        "n": U("c1.weight", 0, prod((4, 4), 1)),
        "i": U("c1.weight", 1, 2),
        "o": U("c2.weight", 0, prod((4, 2), 1)),
    }
    shapes = IMAGE

    def __init__(self):
        super().__init__()
        self.c0, self.c1 = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 16, 1, groups=4)
        self.c2, self.head = nn.Conv2d(16, 8, 1, groups=4), nn.Conv2d(8, 3, 1)

    def forward(self, x):
        x = F.channel_shuffle(self.c1(self.c0(x).relu()).relu(), 4)
        return self.head(self.c2(x).relu())

    def reference(self, keep, x):
        x = on(self.c0(x).relu(), both(keep["g"], keep["i"]), 1)
        x = on(self.c1(x).relu(), both(keep["g"], keep["n"]), 1)
        x = x[:, torch.arange(16).view(4, 4).t().flatten()]
        return self.head(on(self.c2(x).relu(), both(keep["n"], keep["o"]), 1))


class PixelShuffle(Case):
    units = {"a": U("c1.weight", 0, prod((5, 4), 0))}
    shapes = IMAGE

    def __init__(self):
        super().__init__()
        self.c1, self.up, self.c2 = nn.Conv2d(3, 20, 1), nn.PixelShuffle(2), nn.Conv2d(5, 3, 3)

    def forward(self, x):
        return self.c2(self.up(self.c1(x)).relu())

    def reference(self, keep, x):
        x = on(self.c1(x), both(keep["a"], ones(4)), 1)
        x = x.view(2, 5, 2, 2, 4, 4).permute(0, 1, 4, 2, 5, 3).reshape(2, 5, 8, 8)
        return self.c2(on(x.relu(), keep["a"], 1))


class PixelUnshuffle(Case):
    units = {"a": U("c1.weight", 0, 5), "b": U("c2.weight", 0, 7)}
    shapes = IMAGE

    def __init__(self):
        super().__init__()
        self.c1, self.c2, self.head = nn.Conv2d(3, 5, 1), nn.Conv2d(20, 7, 1), nn.Conv2d(7, 3, 1)

    def forward(self, x):
        return self.head(self.c2(F.pixel_unshuffle(self.c1(x).relu(), 2)).relu())

    def reference(self, keep, x):
        x = on(self.c1(x).relu(), keep["a"], 1)
        x = x.view(2, 5, 2, 2, 2, 2).permute(0, 1, 3, 5, 2, 4).reshape(2, 20, 2, 2)
        return self.head(on(self.c2(x).relu(), keep["b"], 1))


class Unflatten(Case):
    """A generator: a vector becomes an image; unit c owns 4 consecutive rows."""

    units = {"a": U("f1.weight", 0, prod((6, 4), 0)), "b": U("t.weight", 1, 5)}

    def __init__(self):
        super().__init__()
        self.f1, self.unflatten = nn.Linear(6, 24), nn.Unflatten(1, (6, 2, 2))
        self.t, self.head = nn.ConvTranspose2d(6, 5, 2, stride=2), nn.Conv2d(5, 1, 1)

    def forward(self, z):
        return self.head(self.t(self.unflatten(self.f1(z)).relu()).relu())

    def reference(self, keep, z):
        x = on(self.f1(z).view(2, 6, 2, 2).relu(), keep["a"], 1)
        return self.head(on(self.t(x).relu(), keep["b"], 1))


class MovedDims(Case):
    """movedim, permute, transpose, squeeze and unsqueeze, back and forth (a ConvNeXt block without its norm)."""

    units = {"a": U("c1.weight", 0, 6), "h": U("f1.weight", 0, 9)}
    shapes = IMAGE

    def __init__(self):
        super().__init__()
        self.c1, self.f1, self.f2, self.fc = nn.Conv2d(3, 6, 3), nn.Linear(6, 9), nn.Linear(9, 6), nn.Linear(6, 3)

    def forward(self, x):
        x = self.c1(x)
        y = self.f2(F.gelu(self.f1(x.movedim(1, -1)))).permute(0, 3, 1, 2)
        z = (x + y).unsqueeze(0).transpose(0, 2).squeeze(2).mean((2, 3))
        return self.fc(z.swapaxes(0, 1))

    def reference(self, keep, x):
        x = on(self.c1(x), keep["a"], 1)
        h = on(F.gelu(self.f1(x.permute(0, 2, 3, 1))), keep["h"])
        x = x + on(self.f2(h), keep["a"]).permute(0, 3, 1, 2)
        return self.fc(x.mean((2, 3)))


class StackFlatten(Case):
    """Two vectors interleaved: both lose the same units."""

    units = {"a": U("f1.weight", 0, 6), "a2": U("f2.weight", 0, 6), "c": U("f3.weight", 1, prod((6, 2), 0))}

    def __init__(self):
        super().__init__()
        self.f1, self.f2, self.f3 = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(12, 3)

    def forward(self, x):
        return self.f3(torch.stack([self.f1(x).relu(), self.f2(x).tanh()], -1).flatten(1))

    def reference(self, keep, x):
        assert torch.equal(keep["a"], keep["a2"]) and torch.equal(keep["a"], keep["c"])
        y = torch.empty(2, 12, dtype=x.dtype)
        y[:, 0::2] = on(self.f1(x).relu(), keep["a"])
        y[:, 1::2] = on(self.f2(x).tanh(), keep["a"])
        return self.f3(y)


class Repeat(Case):
    """3 copies of 8 channels: column k·8 + c; the number of copies may be cut too."""

    units = {"a": U("c1.weight", 0, 8), "copies": U("c2.weight", 1, prod((3, 8), 0), must=False)}
    shapes = IMAGE

    def __init__(self):
        super().__init__()
        self.c1, self.c2 = nn.Conv2d(3, 8, 3), nn.Conv2d(24, 4, 1)

    def forward(self, x):
        return self.c2(self.c1(x).relu().repeat(1, 3, 1, 1))

    def reference(self, keep, x):
        x = on(self.c1(x).relu(), keep["a"], 1)
        return self.c2(on(torch.cat([x, x, x], 1), both(keep["copies"], ones(8)), 1))


class RepeatInterleave(Case):
    units = {"a": U("c1.weight", 0, 8), "copies": U("c2.weight", 1, prod((8, 3), 1), must=False)}
    shapes = IMAGE

    def __init__(self):
        super().__init__()
        self.c1, self.c2 = nn.Conv2d(3, 8, 3), nn.Conv2d(24, 4, 1)

    def forward(self, x):
        return self.c2(self.c1(x).relu().repeat_interleave(3, dim=1))

    def reference(self, keep, x):
        x = on(self.c1(x).relu(), keep["a"], 1)
        x = torch.stack([x, x, x], 2).flatten(1, 2)
        return self.c2(on(x, both(ones(8), keep["copies"]), 1))


class ExpandParameter(Case):
    """A class token, expanded over the batch and put before the patches."""

    units = {"a": U("c1.weight", 0, 8), "h": U("f1.weight", 0, 7)}
    shapes = IMAGE

    def __init__(self):
        super().__init__()
        self.c1, self.token = nn.Conv2d(3, 8, 2, stride=2), nn.Parameter(torch.zeros(1, 1, 8))
        self.position = nn.Parameter(torch.zeros(1, 5, 8))
        self.f1, self.f2 = nn.Linear(8, 7), nn.Linear(7, 3)

    def forward(self, x):
        x = self.c1(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.token.expand(x.shape[0], -1, -1), x], 1) + self.position
        return self.f2(self.f1(x).relu().mean(1))

    def reference(self, keep, x):
        x = self.c1(x).flatten(2).transpose(1, 2)
        x = on(torch.cat([self.token.repeat(2, 1, 1), x], 1) + self.position, keep["a"])
        return self.f2(on(self.f1(x).relu(), keep["h"]).mean(1))


class Literals(Case):
    """Sizes written as numbers in forward: no attribute can carry the new ones."""

    units = {
        "h": U("f1.weight", 0, prod((3, 4), 0)),
        "d": U("f1.weight", 0, prod((3, 4), 1)),
        "m": U("f2.weight", 0, 10),
    }

    def __init__(self):
        super().__init__()
        self.f1, self.scale = nn.Linear(6, 12), nn.Parameter(torch.zeros(3, 1))
        self.f2, self.f3 = nn.Linear(12, 10), nn.Linear(10, 2)

    def forward(self, x):
        x = self.f1(x).view(2, 3, 4) * self.scale
        x = self.f2(x.tanh().reshape(2, 12))
        return self.f3(x.view(-1, 10).relu())

    def reference(self, keep, x):
        x = on(self.f1(x) * self.scale.repeat_interleave(4), both(keep["h"], keep["d"]))
        return self.f3(on(self.f2(x.tanh()).relu(), keep["m"]))


class Attributes(Case):
    """The same with the sizes in attributes of the module."""

    units = Literals.units

    def __init__(self):
        super().__init__()
        self.heads, self.hd, self.width = 3, 4, 10
        self.f1, self.scale = nn.Linear(6, 12), nn.Parameter(torch.zeros(3, 1))
        self.f2, self.f3 = nn.Linear(12, 10), nn.Linear(10, 2)

    def forward(self, x):
        x = self.f1(x).view(-1, self.heads, self.hd) * self.scale
        x = self.f2(x.tanh().reshape(-1, self.heads * self.hd))
        return self.f3(x.view(-1, self.width).relu())

    reference = Literals.reference


class Windows(Case):
    """Swin's windows: tokens cut into 2x2 windows, rolled in space, mixed, and put back."""

    units = {"a": U("c1.weight", 0, 6), "h": U("f1.weight", 0, 7)}
    shapes = IMAGE

    def __init__(self):
        super().__init__()
        self.c1, self.f1, self.f2, self.fc = nn.Conv2d(3, 6, 1), nn.Linear(6, 7), nn.Linear(7, 6), nn.Linear(6, 3)

    def forward(self, x):
        x = self.c1(x).permute(0, 2, 3, 1)
        b, h, w, c = x.shape
        y = torch.roll(x, (-1, -1), (1, 2))
        y = y.view(b, h // 2, 2, w // 2, 2, c).permute(0, 1, 3, 2, 4, 5).reshape(-1, 4, c)
        y = self.f2(self.f1(y).relu().cumsum(1)).view(b, h // 2, w // 2, 2, 2, c)
        y = y.permute(0, 1, 3, 2, 4, 5).reshape(b, h, w, c)
        return self.fc((x + torch.roll(y, (1, 1), (1, 2))).tanh())

    def reference(self, keep, x):
        x = on(self.c1(x).permute(0, 2, 3, 1), keep["a"])
        y = torch.roll(x, (-1, -1), (1, 2)).view(2, 2, 2, 2, 2, 6).permute(0, 1, 3, 2, 4, 5).reshape(-1, 4, 6)
        y = on(self.f2(on(self.f1(y).relu(), keep["h"]).cumsum(1)), keep["a"])
        y = y.view(2, 2, 2, 2, 2, 6).permute(0, 1, 3, 2, 4, 5).reshape(2, 4, 4, 6)
        return self.fc((x + torch.roll(y, (1, 1), (1, 2))).tanh())


CASES = (
    FlattenConv, FlattenPermuted, FlattenBatchNorm, ChannelShuffle, ShuffleGrouped, PixelShuffle, PixelUnshuffle,
    Unflatten, MovedDims, StackFlatten, Repeat, RepeatInterleave, ExpandParameter, Literals, Attributes, Windows,
)  # fmt: skip
