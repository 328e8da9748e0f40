"""Streams that several layers write: residuals, shortcuts, concatenation, gates, modules used twice."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from .harness import Case, U, span
from .masks import on

IMAGE = ((2, 3, 6, 6),)


class Residual(Case):
    units = {"stream": U("c1.weight", 0, 8), "mid": U("c2.weight", 0, 6)}
    shapes = IMAGE

    def __init__(self):
        super().__init__()
        self.c1, self.c2, self.c3 = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 6, 3, padding=1), nn.Conv2d(6, 8, 3, padding=1)
        self.n, self.fc = nn.BatchNorm2d(8), nn.Linear(8, 4)

    def forward(self, x):
        x = self.c1(x)
        x = x + self.n(self.c3(self.c2(x.relu()).relu()))
        return self.fc(x.relu().mean((2, 3)))

    def reference(self, keep, x):
        x = on(self.c1(x), keep["stream"], 1)
        y = on(self.c2(x.relu()).relu(), keep["mid"], 1)
        x = x + on(self.n(self.c3(y)), keep["stream"], 1)
        return self.fc(x.relu().mean((2, 3)))


class ResidualProjection(Case):
    units = {"a": U("c1.weight", 0, 6), "mid": U("c2.weight", 0, 7), "b": U("c3.weight", 0, 10)}
    shapes = IMAGE

    def __init__(self):
        super().__init__()
        self.c1, self.c2 = nn.Conv2d(3, 6, 1), nn.Conv2d(6, 7, 3, stride=2, padding=1)
        self.c3, self.short = nn.Conv2d(7, 10, 1), nn.Conv2d(6, 10, 1, stride=2)
        self.head = nn.Conv2d(10, 4, 1)

    def forward(self, x):
        x = self.c1(x).relu()
        x = (self.c3(self.c2(x).relu()) + self.short(x)).relu()
        return self.head(x)

    def reference(self, keep, x):
        x = on(self.c1(x).relu(), keep["a"], 1)
        y = on(self.c2(x).relu(), keep["mid"], 1)
        return self.head(on((self.c3(y) + self.short(x)).relu(), keep["b"], 1))


class OptionA(Case):
    """The CIFAR shortcut: every second pixel, zeros on both sides of the channels."""

    units = {
        "a": U("c1.weight", 0, 6),
        "before": U("c3.weight", 0, span(0, 3)),
        "after": U("c3.weight", 0, span(9, 12)),
        "mid": U("c2.weight", 0, 5),
    }
    shapes = IMAGE

    def __init__(self):
        super().__init__()
        self.c1, self.c2 = nn.Conv2d(3, 6, 1), nn.Conv2d(6, 5, 3, stride=2, padding=1)
        self.c3, self.head = nn.Conv2d(5, 12, 1), nn.Conv2d(12, 4, 1)

    def forward(self, x):
        x = self.c1(x).relu()
        short = F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, 3, 3), "constant", 0)
        return self.head((self.c3(self.c2(x).relu()) + short).relu())

    def reference(self, keep, x):
        x = on(self.c1(x).relu(), keep["a"], 1)
        y = self.c3(on(self.c2(x).relu(), keep["mid"], 1))
        zero = torch.zeros_like(y[:, :3])
        y = (y + torch.cat([zero, x[:, :, ::2, ::2], zero], 1)).relu()
        return self.head(on(y, torch.cat([keep["before"], keep["a"], keep["after"]]), 1))


class Concat(Case):
    units = {"a": U("c1.weight", 0, 5), "b": U("c2.weight", 0, 7), "c": U("c3.weight", 0, 6)}
    shapes = IMAGE

    def __init__(self):
        super().__init__()
        self.c1, self.c2 = nn.Conv2d(3, 5, 1), nn.Conv2d(3, 7, 3, padding=1)
        self.n, self.c3, self.head = nn.BatchNorm2d(12), nn.Conv2d(12, 6, 1), nn.Conv2d(6, 4, 1)

    def forward(self, x):
        x = torch.cat([self.c1(x), self.c2(x).relu()], 1)
        return self.head(self.c3(self.n(x).relu()).relu())

    def reference(self, keep, x):
        x = torch.cat([self.c1(x), self.c2(x).relu()], 1)
        x = on(self.n(x).relu(), torch.cat([keep["a"], keep["b"]]), 1)
        return self.head(on(self.c3(x).relu(), keep["c"], 1))


class DenseBlock(Case):
    """Every layer reads all that came before."""

    units = {"a": U("c0.weight", 0, 6), "b": U("c1.weight", 0, 4), "c": U("c2.weight", 0, 4)}
    shapes = IMAGE

    def __init__(self):
        super().__init__()
        self.c0, self.n1, self.c1 = nn.Conv2d(3, 6, 1), nn.BatchNorm2d(6), nn.Conv2d(6, 4, 3, padding=1)
        self.n2, self.c2 = nn.BatchNorm2d(10), nn.Conv2d(10, 4, 3, padding=1)
        self.n3, self.fc = nn.BatchNorm2d(14), nn.Linear(14, 3)

    def forward(self, x):
        feats = [self.c0(x)]
        for norm, conv in ((self.n1, self.c1), (self.n2, self.c2)):
            feats.append(conv(norm(torch.cat(feats, 1)).relu()))
        return self.fc(self.n3(torch.cat(feats, 1)).relu().mean((2, 3)))

    def reference(self, keep, x):
        y = self.c0(x)
        k = keep["a"]
        y = torch.cat([y, self.c1(on(self.n1(y).relu(), k, 1))], 1)
        k = torch.cat([k, keep["b"]])
        y = torch.cat([y, self.c2(on(self.n2(y).relu(), k, 1))], 1)
        k = torch.cat([k, keep["c"]])
        return self.fc(on(self.n3(y).relu(), k, 1).mean((2, 3)))


class UNet(Case):
    units = {"a": U("d1.weight", 0, 6), "b": U("d2.weight", 0, 8), "u": U("up.weight", 1, 6)}
    shapes = IMAGE

    def __init__(self):
        super().__init__()
        self.d1, self.d2 = nn.Conv2d(3, 6, 3, padding=1), nn.Conv2d(6, 8, 3, padding=1)
        self.up, self.head = nn.ConvTranspose2d(8, 6, 2, stride=2), nn.Conv2d(12, 2, 1)

    def forward(self, x):
        a = self.d1(x).relu()
        b = self.d2(F.max_pool2d(a, 2)).relu()
        return self.head(torch.cat((self.up(b).relu(), a), dim=1))

    def reference(self, keep, x):
        a = on(self.d1(x).relu(), keep["a"], 1)
        b = on(self.d2(F.max_pool2d(a, 2)).relu(), keep["b"], 1)
        return self.head(torch.cat((on(self.up(b).relu(), keep["u"], 1), a), 1))


class SqueezeExcite(Case):
    units = {"a": U("c1.weight", 0, 8), "s": U("f1.weight", 0, 4)}
    shapes = IMAGE

    def __init__(self):
        super().__init__()
        self.c1, self.f1, self.f2 = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 4, 1), nn.Conv2d(4, 8, 1)
        self.head = nn.Conv2d(8, 5, 1)

    def forward(self, x):
        x = self.c1(x).relu()
        gate = self.f2(self.f1(F.adaptive_avg_pool2d(x, 1)).relu()).sigmoid()
        return self.head(x * gate)

    def reference(self, keep, x):
        x = on(self.c1(x).relu(), keep["a"], 1)
        s = on(self.f1(x.mean((2, 3), keepdim=True)).relu(), keep["s"], 1)
        return self.head(x * self.f2(s).sigmoid())


class SpatialGate(Case):
    """A one-channel gate broadcasts over all channels, and a channel gate over all pixels."""

    units = {"a": U("c1.weight", 0, 8)}
    shapes = IMAGE

    def __init__(self):
        super().__init__()
        self.c1, self.gate, self.head = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 1, 1), nn.Conv2d(8, 5, 1)

    def forward(self, x):
        x = self.c1(x).relu()
        return self.head(x * self.gate(x).sigmoid())

    def reference(self, keep, x):
        x = on(self.c1(x).relu(), keep["a"], 1)
        return self.head(x * self.gate(x).sigmoid())


class CalledTwice(Case):
    """The same module on its own output: its rows and its columns are one axis."""

    units = {"a": U("mid.weight", 0, 8)}
    shapes = ((3, 6),)

    def __init__(self):
        super().__init__()
        self.first, self.mid, self.last = nn.Linear(6, 8), nn.Linear(8, 8), nn.Linear(8, 4)

    def forward(self, x):
        x = self.first(x).relu()
        for _ in range(2):
            x = self.mid(x).tanh()
        return self.last(x)

    def reference(self, keep, x):
        x = on(self.first(x).relu(), keep["a"])
        x = on(self.mid(x).tanh(), keep["a"])
        return self.last(on(self.mid(x).tanh(), keep["a"]))


class SharedBranch(Case):
    """One convolution applied to two maps, concatenated: the same units twice."""

    units = {"a": U("c1.weight", 0, 6), "b": U("c2.weight", 0, 7)}
    shapes = ((2, 3, 6, 6), (2, 3, 6, 6))

    def __init__(self):
        super().__init__()
        self.c1, self.c2, self.head = nn.Conv2d(3, 6, 3), nn.Conv2d(12, 7, 1), nn.Conv2d(7, 4, 1)

    def forward(self, x, y):
        return self.head(self.c2(torch.cat([self.c1(x), self.c1(y)], 1).relu()).relu())

    def reference(self, keep, x, y):
        xy = torch.cat([on(self.c1(x), keep["a"], 1), on(self.c1(y), keep["a"], 1)], 1).relu()
        return self.head(on(self.c2(xy).relu(), keep["b"], 1))


class TiedLinears(Case):
    """Encoder and decoder share one weight, transposed; the hidden units are its rows."""

    units = {"h": U("enc.weight", 0, 9)}
    fixed = (("enc.weight", 1),)

    def __init__(self):
        super().__init__()
        self.enc, self.bias = nn.Linear(6, 9), nn.Parameter(torch.zeros(6))

    def forward(self, x):
        return F.linear(self.enc(x).relu(), self.enc.weight.t(), self.bias)

    def reference(self, keep, x):
        return on(self.enc(x).relu(), keep["h"]) @ self.enc.weight + self.bias


class TiedTwins(Case):
    """Two Linear modules hold the same parameter: inputs and outputs of both are one axis each."""

    units = {"a": U("first.weight", 0, 7)}

    def __init__(self):
        super().__init__()
        self.first, self.l1, self.l2 = nn.Linear(6, 7), nn.Linear(7, 7), nn.Linear(7, 7)
        self.l2.weight = self.l1.weight
        self.last = nn.Linear(7, 3)

    def forward(self, x):
        return self.last(self.l2(self.l1(self.first(x).relu()).relu()).relu())

    def reference(self, keep, x):
        x = on(self.first(x).relu(), keep["a"])
        x = on(self.l1(x).relu(), keep["a"])
        return self.last(on((x @ self.l1.weight.t() + self.l2.bias).relu(), keep["a"]))


class MaxOut(Case):
    """Elementwise maximum and minimum, where, and clamp tie their operands like addition does."""

    units = {"a": U("f1.weight", 0, 8)}

    def __init__(self):
        super().__init__()
        self.f1, self.f2, self.f3, self.last = nn.Linear(6, 8), nn.Linear(6, 8), nn.Linear(6, 8), nn.Linear(8, 3)

    def forward(self, x):
        a, b, c = self.f1(x), self.f2(x), self.f3(x)
        return self.last(torch.where(a > 0, torch.maximum(a, b), torch.minimum(b, c)).clamp(-1.0, 1.0))

    def reference(self, keep, x):
        a, b, c = self.f1(x), self.f2(x), self.f3(x)
        y = torch.where(a > 0, torch.maximum(a, b), torch.minimum(b, c)).clamp(-1.0, 1.0)
        return self.last(on(y, keep["a"]))


class SplitAttention(Case):
    """Two branches stacked, a softmax over the branches (not over the channels), a weighted sum."""

    units = {"a": U("c1.weight", 0, 6), "s": U("f1.weight", 0, 4)}
    shapes = IMAGE

    def __init__(self):
        super().__init__()
        self.c1, self.c2 = nn.Conv2d(3, 6, 3), nn.Conv2d(3, 6, 3)
        self.f1, self.f2, self.head = nn.Linear(6, 4), nn.Linear(4, 12), nn.Linear(6, 3)

    def forward(self, x):
        u = torch.stack([self.c1(x).relu(), self.c2(x).relu()], 1)
        gate = self.f2(self.f1(u.sum(1).mean((2, 3))).relu()).view(x.shape[0], 2, 6).softmax(1)
        return self.head((u * gate[..., None, None]).sum(1).mean((2, 3)))

    def reference(self, keep, x):
        a, b = on(self.c1(x).relu(), keep["a"], 1), on(self.c2(x).relu(), keep["a"], 1)
        z = self.f2(on(self.f1((a + b).mean((2, 3))).relu(), keep["s"]))
        ga, gb = z[:, :6], z[:, 6:]
        total = ga.exp() + gb.exp()
        y = a * (ga.exp() / total)[..., None, None] + b * (gb.exp() / total)[..., None, None]
        return self.head(on(y.mean((2, 3)), keep["a"]))


CASES = (
    Residual, ResidualProjection, OptionA, Concat, DenseBlock, UNet, SqueezeExcite, SpatialGate, CalledTwice,
    SharedBranch, TiedLinears, TiedTwins, MaxOut, SplitAttention,
)  # fmt: skip
