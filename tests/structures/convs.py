"""Convolutions: plain, normalised, grouped, depthwise, 1d to 3d, transposed, reparametrised."""

from __future__ import annotations

import torch.nn.functional as F
from torch import nn

from .harness import Case, U, prod
from .masks import both, on

IMAGE = ((2, 3, 6, 6),)


class ConvChain(Case):
    units = {"a": U("c1.weight", 0, 8), "b": U("c2.weight", 0, 6)}
    fixed = (("c1.weight", 1), ("fc.weight", 0))
    shapes = IMAGE

    def __init__(self):
        super().__init__()
        self.c1, self.c2, self.fc = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 6, 3, stride=2), nn.Linear(6, 5)

    def forward(self, x):
        return self.fc(self.c2(self.c1(x).relu()).relu().mean((2, 3)))

    def reference(self, keep, x):
        x = on(self.c1(x).relu(), keep["a"], 1)
        return self.fc(on(self.c2(x).relu(), keep["b"], 1).mean((2, 3)))


class BatchNormChain(Case):
    units = {"a": U("c1.weight", 0, 8), "b": U("c2.weight", 0, 6)}
    fixed = (("head.weight", 0),)
    shapes = IMAGE

    def __init__(self):
        super().__init__()
        self.c1, self.n1 = nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8)
        self.c2, self.n2 = nn.Conv2d(8, 6, 1, bias=False), nn.BatchNorm2d(6, affine=False)
        self.head = nn.Conv2d(6, 4, 1)

    def forward(self, x):
        x = F.max_pool2d(F.silu(self.n1(self.c1(x))), 2)
        return self.head(F.hardswish(self.n2(self.c2(x))))

    def reference(self, keep, x):
        x = on(F.max_pool2d(F.silu(self.n1(self.c1(x))), 2), keep["a"], 1)
        return self.head(on(F.hardswish(self.n2(self.c2(x))), keep["b"], 1))


class Unpooled(Case):
    """SegNet: values go back to where a pooling took its largest from; and a pooling that gives places that nobody asks for."""

    units = {"a": U("c1.weight", 0, 8), "b": U("c2.weight", 0, 6)}
    shapes = ((2, 3, 8, 8),)

    def __init__(self):
        super().__init__()
        self.c1, self.c2, self.c3 = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 6, 3, padding=1), nn.Conv2d(6, 8, 1)
        self.down, self.up, self.whole = nn.MaxPool2d(2, return_indices=True), nn.MaxUnpool2d(2), nn.AdaptiveMaxPool2d(4)
        self.head = nn.Conv2d(8, 5, 3)

    def forward(self, x):
        x, places = self.down(self.c1(x).relu())
        x = self.c3(self.whole(self.c2(x).relu())).sigmoid()
        return self.head(self.up(x, places))

    def reference(self, keep, x):
        x, places = self.down(self.c1(x).relu())
        x = self.c3(on(self.whole(self.c2(on(x, keep["a"], 1)).relu()), keep["b"], 1)).sigmoid()
        return self.head(on(self.up(x, places), keep["a"], 1))


class Padded(Case):
    """Reflected padding, dilation, average pooling and interpolation leave the channels alone."""

    units = {"a": U("c1.weight", 0, 8), "b": U("c2.weight", 0, 6)}
    shapes = ((2, 3, 8, 8),)

    def __init__(self):
        super().__init__()
        self.c1 = nn.Conv2d(3, 8, 3, padding=1, padding_mode="reflect")
        self.c2 = nn.Conv2d(8, 6, 3, padding=2, dilation=2)
        self.c3 = nn.Conv2d(6, 4, 3)

    def forward(self, x):
        x = F.avg_pool2d(self.c1(x).tanh(), 2)
        return self.c3(F.interpolate(self.c2(x).relu(), scale_factor=2, mode="bilinear"))

    def reference(self, keep, x):
        x = on(F.avg_pool2d(self.c1(x).tanh(), 2), keep["a"], 1)
        return self.c3(on(F.interpolate(self.c2(x).relu(), scale_factor=2, mode="bilinear"), keep["b"], 1))


class GroupedConv(Case):
    """12 = 4 groups of 3 in, 8 = 4 groups of 2 out: whole groups, inputs per group, outputs per group."""

    units = {
        "g": U("c2.weight", 0, prod((4, 2), 0)),
        "o": U("c2.weight", 0, prod((4, 2), 1)),
        "i": U("c2.weight", 1, 3),
    }
    shapes = IMAGE

    def __init__(self):
        super().__init__()
        self.c1, self.c2, self.c3 = nn.Conv2d(3, 12, 3), nn.Conv2d(12, 8, 3, groups=4), nn.Conv2d(8, 5, 1)

    def forward(self, x):
        return self.c3(self.c2(self.c1(x).relu()).relu())

    def reference(self, keep, x):
        x = on(self.c1(x).relu(), both(keep["g"], keep["i"]), 1)
        return self.c3(on(self.c2(x).relu(), both(keep["g"], keep["o"]), 1))


class GroupedPair(Case):
    """Two grouped convolutions with unlike group counts: groups of 4 hold two groups of 8 each."""

    units = {
        "outer": U("c1.weight", 0, prod((2, 2, 4), 0), must=False),
        "inner": U("c1.weight", 0, prod((2, 2, 4), 1), must=False),
        "i": U("c1.weight", 0, prod((2, 2, 4), 2), must=False),
        "o2": U("c2.weight", 0, prod((2, 2, 3), 2), must=False),
        "o3": U("c3.weight", 0, prod((2, 5), 1), must=False),
    }
    shapes = IMAGE

    def __init__(self):
        super().__init__()
        self.c1, self.c2 = nn.Conv2d(3, 16, 1), nn.Conv2d(16, 12, 3, groups=4)
        self.c3, self.c4 = nn.Conv2d(12, 10, 1, groups=2), nn.Conv2d(10, 4, 1)

    def forward(self, x):
        return self.c4(self.c3(self.c2(self.c1(x).relu()).relu()).relu())

    def reference(self, keep, x):
        x = on(self.c1(x).relu(), both(keep["outer"], keep["inner"], keep["i"]), 1)
        x = on(self.c2(x).relu(), both(keep["outer"], keep["inner"], keep["o2"]), 1)
        return self.c4(on(self.c3(x).relu(), both(keep["outer"], keep["o3"]), 1))


class Depthwise(Case):
    units = {"a": U("c1.weight", 0, 8), "b": U("pw.weight", 0, 6)}
    shapes = IMAGE

    def __init__(self):
        super().__init__()
        self.c1, self.dw, self.n = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 8, 3, groups=8), nn.BatchNorm2d(8)
        self.pw, self.head = nn.Conv2d(8, 6, 1), nn.Conv2d(6, 4, 1)

    def forward(self, x):
        x = F.relu6(self.n(self.dw(F.relu6(self.c1(x)))))
        return self.head(self.pw(x).relu())

    def reference(self, keep, x):
        x = on(F.relu6(self.c1(x)), keep["a"], 1)
        x = on(F.relu6(self.n(self.dw(x))), keep["a"], 1)
        return self.head(on(self.pw(x).relu(), keep["b"], 1))


class DepthwiseMultiplier(Case):
    """Each of 6 channels becomes 3: the multiplier is an axis of its own."""

    units = {"a": U("c1.weight", 0, 6), "m": U("dw.weight", 0, prod((6, 3), 1))}
    shapes = IMAGE

    def __init__(self):
        super().__init__()
        self.c1, self.dw, self.head = nn.Conv2d(3, 6, 1), nn.Conv2d(6, 18, 3, groups=6), nn.Conv2d(18, 4, 1)

    def forward(self, x):
        return self.head(self.dw(self.c1(x).relu()).relu())

    def reference(self, keep, x):
        x = on(self.c1(x).relu(), keep["a"], 1)
        return self.head(on(self.dw(x).relu(), both(keep["a"], keep["m"]), 1))


class Conv1dChain(Case):
    units = {"a": U("c1.weight", 0, 8), "b": U("c2.weight", 0, 6)}
    shapes = ((2, 3, 12),)

    def __init__(self):
        super().__init__()
        self.c1, self.n, self.c2 = nn.Conv1d(3, 8, 3), nn.BatchNorm1d(8), nn.Conv1d(8, 6, 3)
        self.fc = nn.Linear(6, 4)

    def forward(self, x):
        x = F.max_pool1d(self.n(self.c1(x)).relu(), 2)
        return self.fc(F.adaptive_avg_pool1d(F.elu(self.c2(x)), 1).squeeze(-1))

    def reference(self, keep, x):
        x = on(F.max_pool1d(self.n(self.c1(x)).relu(), 2), keep["a"], 1)
        return self.fc(on(F.elu(self.c2(x)).mean(-1), keep["b"]))


class Conv3dChain(Case):
    units = {"a": U("c1.weight", 0, 6), "b": U("c2.weight", 0, 5)}
    shapes = ((1, 2, 4, 4, 4),)

    def __init__(self):
        super().__init__()
        self.c1, self.n, self.c2 = nn.Conv3d(2, 6, 3, padding=1), nn.BatchNorm3d(6), nn.Conv3d(6, 5, (1, 3, 3))
        self.fc = nn.Linear(5, 3)

    def forward(self, x):
        x = F.avg_pool3d(self.n(self.c1(x)).relu(), (2, 1, 1))
        return self.fc(F.adaptive_avg_pool3d(self.c2(x).relu(), 1).flatten(1))

    def reference(self, keep, x):
        x = on(F.avg_pool3d(self.n(self.c1(x)).relu(), (2, 1, 1)), keep["a"], 1)
        return self.fc(on(self.c2(x).relu().mean((2, 3, 4)), keep["b"]))


class Transposed1d(Case):
    units = {"a": U("t1.weight", 1, 8), "b": U("t2.weight", 1, 6)}
    fixed = (("t1.weight", 0),)
    shapes = ((2, 3, 5),)

    def __init__(self):
        super().__init__()
        self.t1, self.t2 = nn.ConvTranspose1d(3, 8, 3, stride=2), nn.ConvTranspose1d(8, 6, 2)
        self.head = nn.Conv1d(6, 4, 1)

    def forward(self, x):
        return self.head(self.t2(self.t1(x).relu()).relu())

    def reference(self, keep, x):
        x = on(self.t1(x).relu(), keep["a"], 1)
        return self.head(on(self.t2(x).relu(), keep["b"], 1))


class Transposed2d(Case):
    units = {"a": U("c1.weight", 0, 8), "b": U("t.weight", 1, 6)}
    shapes = IMAGE

    def __init__(self):
        super().__init__()
        self.c1, self.t = nn.Conv2d(3, 8, 3), nn.ConvTranspose2d(8, 6, 3, stride=2, output_padding=1)
        self.n, self.head = nn.BatchNorm2d(6), nn.Conv2d(6, 4, 1)

    def forward(self, x):
        return self.head(self.n(self.t(self.c1(x).relu())).relu())

    def reference(self, keep, x):
        x = on(self.c1(x).relu(), keep["a"], 1)
        return self.head(on(self.n(self.t(x)).relu(), keep["b"], 1))


class TransposedGrouped(Case):
    """Weight (12 in, 2 out per group), 4 groups: dimension 0 is g·i, dimension 1 is o."""

    units = {
        "g": U("t.weight", 0, prod((4, 3), 0)),
        "i": U("t.weight", 0, prod((4, 3), 1)),
        "o": U("t.weight", 1, 2),
    }
    shapes = IMAGE

    def __init__(self):
        super().__init__()
        self.c1, self.t, self.head = nn.Conv2d(3, 12, 3), nn.ConvTranspose2d(12, 8, 2, groups=4), nn.Conv2d(8, 4, 1)

    def forward(self, x):
        return self.head(self.t(self.c1(x).relu()).relu())

    def reference(self, keep, x):
        x = on(self.c1(x).relu(), both(keep["g"], keep["i"]), 1)
        return self.head(on(self.t(x).relu(), both(keep["g"], keep["o"]), 1))


class WeightNormed(Case):
    """The norm of a weight-normed filter runs over its inputs: cutting those is a reduction over kept positions."""

    units = {
        "a": U("c1.parametrizations.weight.original1", 0, 8, must=False),
        "b": U("c2.parametrizations.weight.original1", 0, 6),
    }
    shapes = IMAGE

    def __init__(self):
        super().__init__()
        self.c1 = nn.utils.parametrizations.weight_norm(nn.Conv2d(3, 8, 3))
        self.c2 = nn.utils.parametrizations.weight_norm(nn.Conv2d(8, 6, 1))
        self.head = nn.Conv2d(6, 4, 1)

    def forward(self, x):
        return self.head(self.c2(self.c1(x).relu()).relu())

    def reference(self, keep, x):
        x = on(self.c1(x).relu(), keep["a"], 1)
        p = self.c2.parametrizations.weight
        v = on(p.original1, keep["a"], 1)
        w = p.original0 * v / (v**2).sum((1, 2, 3), keepdim=True).sqrt()
        return self.head(on(F.conv2d(x, w, self.c2.bias).relu(), keep["b"], 1))


class Squared(nn.Module):
    """A parametrisation: the weight is the square of what is stored."""

    def forward(self, w):
        return w * w


class Parametrised(Case):
    units = {"a": U("c1.parametrizations.weight.original", 0, 8)}
    shapes = IMAGE

    def __init__(self):
        super().__init__()
        self.c1, self.head = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 4, 1)
        nn.utils.parametrize.register_parametrization(self.c1, "weight", Squared())

    def forward(self, x):
        return self.head(self.c1(x).relu())

    def reference(self, keep, x):
        return self.head(on(self.c1(x).relu(), keep["a"], 1))


class PReLUChannels(Case):
    units = {"a": U("c1.weight", 0, 8)}
    shapes = IMAGE

    def __init__(self):
        super().__init__()
        self.c1, self.act, self.head = nn.Conv2d(3, 8, 3), nn.PReLU(8), nn.Conv2d(8, 4, 1)
        self.one = nn.PReLU()

    def forward(self, x):
        return self.head(self.one(self.act(self.c1(x)) - 0.5))

    def reference(self, keep, x):
        x = self.c1(x)
        x = x.clamp_min(0) + self.act.weight.view(-1, 1, 1) * x.clamp_max(0) - 0.5
        return self.head(on(x.clamp_min(0) + self.one.weight * x.clamp_max(0), keep["a"], 1))


CASES = (
    ConvChain, BatchNormChain, Unpooled, Padded, GroupedConv, GroupedPair, Depthwise, DepthwiseMultiplier, Conv1dChain,
    Conv3dChain, Transposed1d, Transposed2d, TransposedGrouped, WeightNormed, Parametrised, PReLUChannels,
)  # fmt: skip
