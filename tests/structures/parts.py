"""Parts of a channel dimension: split, chunk, slices, flip, roll, constant indices, padding."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from .harness import Case, U, prod, span
from .masks import on

IMAGE = ((2, 3, 4, 4),)


class ChunkGLU(Case):
    """One Linear makes values and gates: units are pairs (i, i + 8)."""

    units = {"h": U("up.weight", 0, prod((2, 8), 1))}

    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(6, 16), nn.Linear(8, 3)

    def forward(self, x):
        value, gate = self.up(x).chunk(2, dim=-1)
        return self.down(value * gate.sigmoid())

    def reference(self, keep, x):
        y = self.up(x)
        return self.down(on(y[:, :8] * y[:, 8:].sigmoid(), keep["h"]))


class FunctionGLU(Case):
    """`F.glu` over the channels of a convolution (a Conformer block)."""

    units = {"h": U("c1.weight", 0, prod((2, 6), 1))}
    shapes = ((2, 3, 9),)

    def __init__(self):
        super().__init__()
        self.c1, self.dw, self.c2 = nn.Conv1d(3, 12, 1), nn.Conv1d(6, 6, 3, groups=6), nn.Conv1d(6, 4, 1)

    def forward(self, x):
        return self.c2(F.silu(self.dw(F.glu(self.c1(x), 1))))

    def reference(self, keep, x):
        x = self.c1(x)
        x = on(x[:, :6] * x[:, 6:].sigmoid(), keep["h"], 1)
        return self.c2(on(F.silu(self.dw(x)), keep["h"], 1))


class SwiGLU(Case):
    units = {"h": U("gate.weight", 0, 9), "h2": U("up.weight", 0, 9)}

    def __init__(self):
        super().__init__()
        self.gate, self.up = nn.Linear(6, 9, bias=False), nn.Linear(6, 9, bias=False)
        self.down = nn.Linear(9, 6, bias=False)

    def forward(self, x):
        return x + self.down(F.silu(self.gate(x)) * self.up(x))

    def reference(self, keep, x):
        assert torch.equal(keep["h"], keep["h2"])
        g = self.gate(x)
        return x + self.down(on(g * g.sigmoid() * self.up(x), keep["h"]))


class SplitSizes(Case):
    """Unequal parts of one convolution go different ways."""

    units = {
        "p": U("c1.weight", 0, span(0, 4)),
        "q": U("c1.weight", 0, span(4, 10)),
        "r": U("c1.weight", 0, span(10, 13)),
    }
    shapes = IMAGE

    def __init__(self):
        super().__init__()
        self.c1 = nn.Conv2d(3, 13, 3)
        self.h1, self.h2, self.h3 = nn.Conv2d(4, 2, 1), nn.Conv2d(6, 2, 1), nn.Conv2d(3, 2, 1)

    def forward(self, x):
        p, q, r = torch.split(self.c1(x), [4, 6, 3], dim=1)
        return self.h1(p.relu()) + self.h2(q.tanh()) * self.h3(r.sigmoid())

    def reference(self, keep, x):
        x = self.c1(x)
        p, q, r = on(x[:, :4].relu(), keep["p"], 1), on(x[:, 4:10].tanh(), keep["q"], 1), x[:, 10:].sigmoid()
        return self.h1(p) + self.h2(q) * self.h3(on(r, keep["r"], 1))


class CatSplitAligned(Case):
    units = {"a": U("f1.weight", 0, 5), "b": U("f2.weight", 0, 7)}

    def __init__(self):
        super().__init__()
        self.f1, self.f2 = nn.Linear(6, 5), nn.Linear(6, 7)
        self.n, self.g1, self.g2 = nn.BatchNorm1d(12), nn.Linear(5, 3), nn.Linear(7, 3)

    def forward(self, x):
        a, b = self.n(torch.cat([self.f1(x), self.f2(x)], 1)).relu().split([5, 7], 1)
        return self.g1(a), self.g2(b)

    def reference(self, keep, x):
        y = self.n(torch.cat([self.f1(x), self.f2(x)], 1)).relu()
        return self.g1(on(y[:, :5], keep["a"])), self.g2(on(y[:, 5:], keep["b"]))


class CatSplitAcross(Case):
    """Split where the cat has no seam, then added: 5 + 7 against 8 + 4 against 4 + 8."""

    units = {"p": U("f1.weight", 0, 5), "q": U("f2.weight", 0, 7), "s": U("f3.weight", 0, 4)}

    def __init__(self):
        super().__init__()
        self.f1, self.f2, self.f3 = nn.Linear(6, 5), nn.Linear(6, 7), nn.Linear(6, 4)
        self.g1, self.g2 = nn.Linear(8, 3), nn.Linear(4, 3)

    def forward(self, x):
        a, b = torch.cat([self.f1(x), self.f2(x)], 1).split([8, 4], 1)
        return self.g1(a.relu()), self.g2(b * self.f3(x))

    def reference(self, keep, x):
        assert torch.equal(keep["q"][3:], keep["s"])
        y = on(torch.cat([self.f1(x), self.f2(x)], 1), torch.cat([keep["p"], keep["q"]]))
        return self.g1(y[:, :8].relu()), self.g2(y[:, 8:] * self.f3(x))


class Slices(Case):
    """Static slices that overlap nothing, one part unused further on."""

    units = {
        "p": U("f1.weight", 0, span(0, 5)),
        "q": U("f1.weight", 0, span(5, 9)),
        "unused": U("f1.weight", 0, span(9, 12), must=False),
    }

    def __init__(self):
        super().__init__()
        self.f1, self.g1, self.g2 = nn.Linear(6, 12), nn.Linear(5, 3), nn.Linear(4, 3)

    def forward(self, x):
        x = self.f1(x).tanh()
        return self.g1(x[:, :5]) * self.g2(x[:, 5:-3])

    def reference(self, keep, x):
        x = self.f1(x).tanh()
        return self.g1(on(x[:, :5], keep["p"])) * self.g2(on(x[:, 5:9], keep["q"]))


class StridedSlices(Case):
    """Even and odd channels multiply each other: units are neighbours."""

    units = {"pair": U("f1.weight", 0, prod((5, 2), 0))}

    def __init__(self):
        super().__init__()
        self.f1, self.f2 = nn.Linear(6, 10), nn.Linear(5, 3)

    def forward(self, x):
        x = self.f1(x)
        return self.f2(x[..., 0::2] * x[..., 1::2].cos())

    def reference(self, keep, x):
        x = self.f1(x).view(2, 5, 2)
        return self.f2(on(x[:, :, 0] * x[:, :, 1].cos(), keep["pair"]))


class Flip(Case):
    units = {"a": U("c1.weight", 0, 8)}
    shapes = IMAGE

    def __init__(self):
        super().__init__()
        self.c1, self.c2 = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 4, 1)

    def forward(self, x):
        return self.c2(self.c1(x).relu().flip(1))

    def reference(self, keep, x):
        x = on(self.c1(x).relu(), keep["a"], 1)
        return self.c2(x[:, [7, 6, 5, 4, 3, 2, 1, 0]])


class FlipAdded(Case):
    """A map added to its own mirror image: channel i lives and dies with channel 7 - i."""

    units = {"pair": U("c1.weight", 0, [[i, 7 - i] for i in range(4)], must=False)}
    shapes = IMAGE

    def __init__(self):
        super().__init__()
        self.c1, self.c2 = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 4, 1)

    def forward(self, x):
        x = self.c1(x)
        return self.c2((x + torch.flip(x, [1, 2])).relu())

    def reference(self, keep, x):
        x = on(self.c1(x), torch.cat([keep["pair"], keep["pair"].flip(0)]), 1)
        return self.c2((x + x[:, [7, 6, 5, 4, 3, 2, 1, 0]].flip(2)).relu())


class Roll(Case):
    units = {"a": U("c1.weight", 0, 8)}
    shapes = IMAGE

    def __init__(self):
        super().__init__()
        self.c1, self.c2 = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 4, 1)

    def forward(self, x):
        return self.c2(torch.roll(self.c1(x).relu(), 3, dims=1))

    def reference(self, keep, x):
        x = on(self.c1(x).relu(), keep["a"], 1)
        return self.c2(torch.cat([x[:, 5:], x[:, :5]], 1))


class Permutation(Case):
    """A buffer of indices reorders the channels: after the cut it must point at the new places."""

    units = {"a": U("c1.weight", 0, 8)}
    shapes = IMAGE

    def __init__(self):
        super().__init__()
        self.c1, self.c2 = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 4, 1)
        self.register_buffer("order", torch.tensor([3, 0, 7, 5, 1, 6, 2, 4]))

    def forward(self, x):
        return self.c2(self.c1(x).relu()[:, self.order])

    def reference(self, keep, x):
        x = on(self.c1(x).relu(), keep["a"], 1)
        return self.c2(torch.stack([x[:, i] for i in (3, 0, 7, 5, 1, 6, 2, 4)], 1))


class IndexSelect(Case):
    """A constant selection with a repeat and an omission: exact or frozen."""

    units = {"a": U("f1.weight", 0, 6, must=False), "c": U("f2.weight", 1, 5, must=False)}

    def __init__(self):
        super().__init__()
        self.f1, self.f2 = nn.Linear(6, 6), nn.Linear(5, 3)

    def forward(self, x):
        return self.f2(self.f1(x).index_select(1, torch.tensor([4, 0, 4, 2, 5])).relu())

    def reference(self, keep, x):
        x = on(self.f1(x).relu(), keep["a"])
        return self.f2(on(x[:, [4, 0, 4, 2, 5]], keep["c"]))


class PadChannels(Case):
    """Zeros before and after the channels; the consumer's columns for them stay unless they too may go."""

    units = {
        "a": U("c1.weight", 0, 6),
        "before": U("c2.weight", 1, span(0, 2), must=False),
        "after": U("c2.weight", 1, span(8, 11), must=False),
    }
    shapes = IMAGE

    def __init__(self):
        super().__init__()
        self.c1, self.c2 = nn.Conv2d(3, 6, 3), nn.Conv2d(11, 4, 1)

    def forward(self, x):
        return self.c2(F.pad(self.c1(x), (0, 0, 0, 0, 2, 3), value=0.5).exp())

    def reference(self, keep, x):
        x = F.pad(self.c1(x), (0, 0, 0, 0, 2, 3), value=0.5).exp()
        return self.c2(on(x, torch.cat([keep["before"], keep["a"], keep["after"]]), 1))


class Unbind(Case):
    """Three vectors taken apart from one Linear: their places are one axis, their number is fixed."""

    units = {"a": U("f1.weight", 0, prod((3, 4), 1))}

    def __init__(self):
        super().__init__()
        self.f1, self.f2 = nn.Linear(6, 12), nn.Linear(4, 3)

    def forward(self, x):
        a, b, c = self.f1(x).view(-1, 3, 4).unbind(1)
        return self.f2(a * b - c)

    def reference(self, keep, x):
        y = self.f1(x)
        return self.f2(on(y[:, :4] * y[:, 4:8] - y[:, 8:], keep["a"]))


CASES = (
    ChunkGLU, FunctionGLU, SwiGLU, SplitSizes, CatSplitAligned, CatSplitAcross, Slices, StridedSlices, Flip, FlipAdded,
    Roll, Permutation, IndexSelect, PadChannels, Unbind,
)  # fmt: skip
