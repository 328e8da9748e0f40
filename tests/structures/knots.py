"""Axes tied to themselves, refined twice, written in place, or mixed with the batch."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from .harness import Case, U, prod
from .masks import both, on

IMAGE = ((2, 3, 4, 4),)


class RollAdded(Case):
    """A map added to itself, rolled by 3 of 9: three cycles of three, or frozen."""

    units = {"a": U("f1.weight", 0, [[i, i + 3, i + 6] for i in range(3)], must=False)}

    def __init__(self):
        super().__init__()
        self.f1, self.f2 = nn.Linear(6, 9), nn.Linear(9, 3)

    def forward(self, x):
        x = self.f1(x)
        return self.f2(x * x.roll(3, 1))

    def reference(self, keep, x):
        x = self.f1(x)
        return self.f2(on(x * torch.cat([x[:, 6:], x[:, :6]], 1), keep["a"].repeat(3)))


class PermutedAdded(Case):
    """A map added to a constant permutation of itself: its cycles (0 2 5) (1 4) (3), or frozen."""

    units = {"a": U("f1.weight", 0, [[0, 2, 5], [1, 4], [3]], must=False)}

    def __init__(self):
        super().__init__()
        self.f1, self.f2 = nn.Linear(6, 6), nn.Linear(6, 3)
        self.register_buffer("order", torch.tensor([2, 4, 5, 3, 1, 0]))

    def forward(self, x):
        x = self.f1(x)
        return self.f2((x + x[:, self.order]).relu())

    def reference(self, keep, x):
        x, k = self.f1(x), keep["a"]
        mask = torch.stack([k[0], k[1], k[0], k[2], k[1], k[0]])
        return self.f2(on((x + torch.stack([x[:, i] for i in (2, 4, 5, 3, 1, 0)], 1)).relu(), mask))


class ShuffleAdded(Case):
    """A map added to its own shuffle (3·4 against 4·3): whatever is cut must be exact."""

    units = {"a": U("f1.weight", 0, [[0], [1, 3, 9, 5, 4], [2, 6, 7, 10, 8], [11]], must=False)}

    def __init__(self):
        super().__init__()
        self.f1, self.f2 = nn.Linear(6, 12), nn.Linear(12, 3)

    def forward(self, x):
        x = self.f1(x)
        return self.f2((x + x.view(-1, 3, 4).transpose(1, 2).reshape(-1, 12)).relu())

    def reference(self, keep, x):
        x, k = self.f1(x), keep["a"]
        order = [0, 4, 8, 1, 5, 9, 2, 6, 10, 3, 7, 11]
        mask = torch.zeros(12, dtype=torch.bool)
        for unit, rows in enumerate(self.units["a"].sets):
            mask[list(rows)] = k[unit]
        return self.f2(on((x + x[:, order]).relu(), mask))


class Regrouped(Case):
    """24 seen as 4·6, then as 2·12, then as 8·3, each time scaled by a bare parameter of the outer factor."""

    units = {
        "p": U("f1.weight", 0, prod((2, 2, 2, 3), 0), must=False),
        "q": U("f1.weight", 0, prod((2, 2, 2, 3), 1), must=False),
        "r": U("f1.weight", 0, prod((2, 2, 2, 3), 2), must=False),
        "s": U("f1.weight", 0, prod((2, 2, 2, 3), 3)),
    }

    def __init__(self):
        super().__init__()
        self.f1, self.f2 = nn.Linear(6, 24), nn.Linear(24, 3)
        self.a, self.b, self.c = (nn.Parameter(torch.zeros(n, 1)) for n in (4, 2, 8))

    def forward(self, x):
        x = self.f1(x).view(-1, 4, 6) * self.a
        x = (x.reshape(-1, 2, 12) * self.b).view(-1, 8, 3) + self.c
        return self.f2(x.flatten(1).relu())

    def reference(self, keep, x):
        x = self.f1(x) * self.a.repeat_interleave(6) * self.b.repeat_interleave(12) + self.c.repeat_interleave(3)
        return self.f2(on(x.relu(), both(keep["p"], keep["q"], keep["r"], keep["s"])))


class InPlace(Case):
    """Additions and activations in place, and an assignment into a slice of the channels."""

    units = {"p": U("c1.weight", 0, [[0], [1], [2]]), "q": U("c1.weight", 0, [[i] for i in range(3, 8)])}
    shapes = IMAGE

    def __init__(self):
        super().__init__()
        self.c1, self.c2, self.head = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 8, 1), nn.Conv2d(8, 2, 1)
        self.act = nn.ReLU(inplace=True)

    def forward(self, x):
        x = self.c1(x)
        y = self.c2(self.act(x.clone()))
        y += x
        y[:, :3] = y[:, :3] * 2
        return self.head(y.sigmoid_())

    def reference(self, keep, x):
        k = torch.cat([keep["p"], keep["q"]])
        x = on(self.c1(x), k, 1)
        y = self.c2(x.relu()) + x
        y = torch.cat([y[:, :3] * 2, y[:, 3:]], 1)
        return self.head(on(y.sigmoid(), k, 1))


class WithTheBatch(Case):
    """Channels folded into the batch and out again (per-channel convolution in one channel)."""

    units = {"a": U("c1.weight", 0, 5)}
    shapes = IMAGE

    def __init__(self):
        super().__init__()
        self.c1, self.each, self.head = nn.Conv2d(3, 5, 1), nn.Conv2d(1, 1, 3, padding=1), nn.Conv2d(5, 2, 1)

    def forward(self, x):
        x = self.c1(x)
        b, c, h, w = x.shape
        return self.head(self.each(x.reshape(b * c, 1, h, w)).view(b, c, h, w).relu())

    def reference(self, keep, x):
        x = self.c1(x)
        x = torch.cat([self.each(x[:, i : i + 1]) for i in range(5)], 1)
        return self.head(on(x.relu(), keep["a"], 1))


class DynamicDepthwise(Case):
    """Filters made from the input, applied with groups = batch · channels."""

    units = {"a": U("c1.weight", 0, 5)}
    shapes = IMAGE

    def __init__(self):
        super().__init__()
        self.c1, self.make, self.head = nn.Conv2d(3, 5, 1), nn.Linear(3, 45), nn.Conv2d(5, 2, 1)

    def forward(self, x):
        kernel = self.make(x.mean((2, 3))).view(-1, 1, 3, 3)
        x = self.c1(x)
        b, c, h, w = x.shape
        y = F.conv2d(x.view(1, b * c, h, w), kernel, groups=b * c, padding=1)
        return self.head(y.view(b, c, h, w).relu())

    def reference(self, keep, x):
        kernel = self.make(x.mean((2, 3))).view(2, 5, 3, 3)
        x = F.pad(self.c1(x), (1, 1, 1, 1))
        y = sum(x[:, :, i : i + 4, j : j + 4] * kernel[:, :, i, j, None, None] for i in range(3) for j in range(3))
        return self.head(on(y.relu(), keep["a"], 1))


class StreamMeetsHeads(Case):
    """The stream is added to a tensor of heads: its 12 channels are 3 heads of 4 places from then on."""

    units = {"h": U("embed.weight", 0, prod((3, 4), 0)), "d": U("embed.weight", 0, prod((3, 4), 1))}
    shapes = ((2, 5, 6),)

    def __init__(self):
        super().__init__()
        self.embed, self.gate, self.head = nn.Linear(6, 12), nn.Linear(6, 3), nn.Linear(12, 2)

    def forward(self, x):
        y = self.embed(x)
        heads = y.view(2, 5, 3, 4) * self.gate(x).sigmoid()[..., None]
        return self.head((y + heads.flatten(2)).relu())

    def reference(self, keep, x):
        y = self.embed(x)
        y = y + y * self.gate(x).sigmoid().repeat_interleave(4, -1)
        return self.head(on(y.relu(), both(keep["h"], keep["d"])))


class LayerMixture(Case):
    """A softmax over three bare weights mixes three layers (ELMo): the layers stay, their channels go together."""

    units = {"a": U("f0.weight", 0, 7)}
    fixed = (("mix", 0),)

    def __init__(self):
        super().__init__()
        self.f0, self.f1, self.f2, self.head = nn.Linear(6, 7), nn.Linear(7, 7), nn.Linear(7, 7), nn.Linear(7, 3)
        self.mix = nn.Parameter(torch.zeros(3))

    def forward(self, x):
        a = self.f0(x)
        b = self.f1(a).relu()
        c = self.f2(b).relu()
        weights = self.mix.softmax(0)
        return self.head((torch.stack([a, b, c]) * weights[:, None, None]).sum(0))

    def reference(self, keep, x):
        k = keep["a"]
        a = on(self.f0(x), k)
        b = on(self.f1(a).relu(), k)
        c = on(self.f2(b).relu(), k)
        e = self.mix.exp() / self.mix.exp().sum()
        return self.head(a * e[0] + b * e[1] + c * e[2])


class Unfolded(Case):
    """im2col by hand: `F.unfold` gives c·9 rows, weighed by a bare matrix."""

    units = {"a": U("c1.weight", 0, 4), "b": U("w", 0, 6)}
    shapes = IMAGE

    def __init__(self):
        super().__init__()
        self.c1, self.w, self.head = nn.Conv2d(3, 4, 1), nn.Parameter(torch.zeros(6, 36)), nn.Linear(6, 2)

    def forward(self, x):
        cols = F.unfold(self.c1(x).relu(), 3, padding=1)
        return self.head((self.w @ cols).tanh().transpose(1, 2))

    def reference(self, keep, x):
        x = on(self.c1(x).relu(), keep["a"], 1)
        y = F.conv2d(x, self.w.view(6, 4, 3, 3), padding=1).tanh()
        return self.head(on(y, keep["b"], 1).flatten(2).transpose(1, 2))


class FaintRoll(Case):
    """A literal that no longer fits (roll by 3) but raises nothing, in a branch that hardly shows in the output."""

    units = {"a": U("f1.weight", 0, 8)}

    def __init__(self):
        super().__init__()
        self.f1, self.f2 = nn.Linear(6, 8), nn.Linear(8, 6)

    def forward(self, x):
        return x + 1e-6 * self.f2(self.f1(x).relu().roll(3, -1))

    def reference(self, keep, x):
        y = on(self.f1(x).relu(), keep["a"])
        return x + 1e-6 * self.f2(torch.cat([y[:, 5:], y[:, :5]], 1))


class DoubleDuty(Case):
    """An attribute that is the width of a view and, by coincidence of value, a divisor and an exponent as well."""

    units = {"h": U("f1.weight", 0, prod((3, 4), 0)), "d": U("f1.weight", 0, prod((3, 4), 1))}

    def __init__(self):
        super().__init__()
        self.n, self.size = 4, 12
        self.f1, self.f2 = nn.Linear(6, 12), nn.Linear(12, 6)

    def forward(self, x):
        y = self.f1(x).view(-1, 3, self.n) / self.n
        return x + self.f2(y.reshape(-1, self.size)) / self.size**self.n

    def reference(self, keep, x):
        return x + self.f2(on(self.f1(x) / 4, both(keep["h"], keep["d"]))) / 12**4


class SameTwice(Case):
    """cat([x, x]), a difference of halves, and a product with a constant table in code."""

    units = {
        "a": U("f1.weight", 0, 6),
        "b": U("f2.weight", 0, prod((2, 5), 1)),
        "half": U("f2.weight", 0, prod((2, 5), 0), must=False),
    }

    def __init__(self):
        super().__init__()
        self.f1, self.f2, self.head = nn.Linear(6, 6), nn.Linear(12, 10), nn.Linear(5, 3)

    def forward(self, x):
        x = self.f1(x).relu()
        y = self.f2(torch.cat([x, x], 1))
        y = y.view(-1, 2, 5) * torch.tensor([[1.0], [-1.0]], dtype=x.dtype)
        return self.head(y.sum(1).sigmoid())

    def reference(self, keep, x):
        x = on(self.f1(x).relu(), keep["a"])
        y = x @ self.f2.weight[:, :6].t() + x @ self.f2.weight[:, 6:].t() + self.f2.bias
        y = on(y, both(keep["half"], keep["b"]))
        return self.head(on((y[:, :5] - y[:, 5:]).sigmoid(), keep["b"]))


class TopExperts(Case):
    """The two best of four experts by a data-dependent choice: the experts stay, their hidden units are free."""

    units = {"h": U("w1", 2, 5)}
    fixed = (("gate.weight", 0), ("w1", 0))
    shapes = ((3, 6),)

    def __init__(self):
        super().__init__()
        self.gate = nn.Linear(6, 4)
        self.w1, self.w2 = nn.Parameter(torch.zeros(4, 6, 5)), nn.Parameter(torch.zeros(4, 5, 2))

    def forward(self, x):
        value, index = self.gate(x).softmax(-1).topk(2, dim=-1)
        y = torch.einsum("beh,eho->beo", torch.einsum("bi,eih->beh", x, self.w1).relu(), self.w2)
        return (y.gather(1, index[..., None].expand(-1, -1, 2)) * value[..., None]).sum(1)

    def reference(self, keep, x):
        weight = self.gate(x).softmax(-1)
        rows = []
        for b in range(3):
            best = sorted(range(4), key=lambda e: -float(weight[b, e]))[:2]
            rows.append(sum(weight[b, e] * (on((x[b] @ self.w1[e]).relu(), keep["h"]) @ self.w2[e]) for e in best))
        return torch.stack(rows)


CASES = (
    RollAdded, PermutedAdded, ShuffleAdded, Regrouped, InPlace, WithTheBatch, DynamicDepthwise, StreamMeetsHeads,
    LayerMixture, Unfolded, FaintRoll, DoubleDuty, SameTwice, TopExperts,
)  # fmt: skip
