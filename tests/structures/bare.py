"""Bare parameters and buffers, matmul and einsum without modules, experts, embeddings."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from .harness import Case, U
from .masks import both, kept_layer_norm, kept_softmax, on

TOKENS = ((2, 5, 6),)


class ScaleAndBias(Case):
    """Layer scale: raw vectors multiply and add along the channels."""

    units = {"a": U("c1.weight", 0, 8)}
    shapes = ((2, 3, 4, 4),)

    def __init__(self):
        super().__init__()
        self.c1, self.c2, self.head = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 8, 1), nn.Conv2d(8, 3, 1)
        self.gamma, self.beta = nn.Parameter(torch.zeros(8)), nn.Parameter(torch.zeros(1, 8, 1, 1))

    def forward(self, x):
        x = self.c1(x)
        return self.head(x + self.gamma.view(1, -1, 1, 1) * self.c2(x).relu() + self.beta)

    def reference(self, keep, x):
        x = on(self.c1(x), keep["a"], 1)
        return self.head(on(x + self.gamma[:, None, None] * self.c2(x).relu() + self.beta, keep["a"], 1))


class RawMatmul(Case):
    """`x @ w` with w (in, out): the units are columns; then addmm and a transposed factor."""

    units = {"a": U("w1", 1, 8), "b": U("w2", 1, 7), "c": U("w3", 0, 6)}
    fixed = (("w1", 0), ("w4", 1))

    def __init__(self):
        super().__init__()
        self.w1, self.w2 = nn.Parameter(torch.zeros(6, 8)), nn.Parameter(torch.zeros(8, 7))
        self.w3, self.w4, self.b2 = (
            nn.Parameter(torch.zeros(6, 7)), nn.Parameter(torch.zeros(6, 3)), nn.Parameter(torch.zeros(7)),
        )  # fmt: skip

    def forward(self, x):
        x = torch.addmm(self.b2, (x @ self.w1).relu(), self.w2).tanh()
        return torch.mm(x, self.w3.T).sigmoid().matmul(self.w4)

    def reference(self, keep, x):
        x = on((x @ self.w1).relu(), keep["a"])
        x = on((x @ self.w2 + self.b2).tanh(), keep["b"])
        return on((x @ self.w3.t()).sigmoid(), keep["c"]) @ self.w4


class EinsumLinear(Case):
    units = {"a": U("w1", 1, 8), "b": U("w2", 0, 7)}
    shapes = TOKENS

    def __init__(self):
        super().__init__()
        self.w1, self.w2 = nn.Parameter(torch.zeros(6, 8)), nn.Parameter(torch.zeros(7, 8))
        self.w3 = nn.Parameter(torch.zeros(7, 3))

    def forward(self, x):
        x = torch.einsum("bni,io->bno", x, self.w1).relu()
        return torch.einsum("bni,oi,oz->bnz", x, self.w2, self.w3)

    def reference(self, keep, x):
        x = on((x @ self.w1).relu(), keep["a"])
        return on(x @ self.w2.t(), keep["b"]) @ self.w3


class OuterProduct(Case):
    """bmm of a column and a row, flattened: the head's columns are a·b."""

    units = {"a": U("f1.weight", 0, 6), "b": U("f2.weight", 0, 5)}

    def __init__(self):
        super().__init__()
        self.f1, self.f2, self.head = nn.Linear(6, 6), nn.Linear(6, 5), nn.Linear(30, 3)

    def forward(self, x):
        a, b = self.f1(x).tanh(), self.f2(x).relu()
        return self.head(torch.bmm(a.unsqueeze(2), b.unsqueeze(1)).flatten(1))

    def reference(self, keep, x):
        a, b = on(self.f1(x).tanh(), keep["a"]), on(self.f2(x).relu(), keep["b"])
        return self.head((a[:, :, None] * b[:, None, :]).flatten(1))


class Bilinear(Case):
    """`nn.Bilinear`: a weight of three axes."""

    units = {"a": U("f1.weight", 0, 5), "b": U("f2.weight", 0, 6), "o": U("mix.weight", 0, 7)}

    def __init__(self):
        super().__init__()
        self.f1, self.f2, self.mix, self.head = nn.Linear(6, 5), nn.Linear(6, 6), nn.Bilinear(5, 6, 7), nn.Linear(7, 3)

    def forward(self, x):
        return self.head(self.mix(self.f1(x).tanh(), self.f2(x).tanh()).relu())

    def reference(self, keep, x):
        a, b = on(self.f1(x).tanh(), keep["a"]), on(self.f2(x).tanh(), keep["b"])
        y = torch.stack([((a @ w) * b).sum(-1) for w in self.mix.weight], -1) + self.mix.bias
        return self.head(on(y.relu(), keep["o"]))


class GramMatrix(Case):
    """A map times its own transpose: the channels stand on both sides."""

    units = {"a": U("c1.weight", 0, 5)}
    shapes = ((2, 3, 4, 4),)

    def __init__(self):
        super().__init__()
        self.c1, self.head = nn.Conv2d(3, 5, 1), nn.Linear(25, 3)

    def forward(self, x):
        x = self.c1(x).flatten(2)
        return self.head((x @ x.mT / 16).flatten(1))

    def reference(self, keep, x):
        x = on(self.c1(x).flatten(2), keep["a"], 1)
        return self.head(torch.stack([(x[:, i] * x[:, j]).sum(-1) / 16 for i in range(5) for j in range(5)], 1))


class DenseExperts(Case):
    """Stacked expert weights (E, in, out) by einsum, mixed by a softmax over the experts."""

    units = {"h": U("w1", 2, 7), "e": U("w1", 0, 4, must=False)}
    fixed = (("w1", 1), ("w2", 2))

    def __init__(self):
        super().__init__()
        self.gate, self.w1 = nn.Linear(6, 4), nn.Parameter(torch.zeros(4, 6, 7))
        self.b1, self.w2 = nn.Parameter(torch.zeros(4, 7)), nn.Parameter(torch.zeros(4, 7, 3))

    def forward(self, x):
        weight = self.gate(x).softmax(-1)
        y = (torch.einsum("bi,eih->beh", x, self.w1) + self.b1).relu()
        return torch.einsum("beh,eho,be->bo", y, self.w2, weight)

    def reference(self, keep, x):
        weight = kept_softmax(self.gate(x), keep["e"])
        out = 0
        for e in range(4):
            y = on((x @ self.w1[e] + self.b1[e]).relu(), keep["h"])
            out = out + weight[:, e, None] * (y @ self.w2[e])
        return out


class BatchedExperts(DenseExperts):
    """The same by bmm, experts first."""

    def forward(self, x):
        weight = self.gate(x).softmax(dim=1).t().unsqueeze(2)
        y = torch.baddbmm(self.b1.unsqueeze(1), x.unsqueeze(0).expand(4, -1, -1), self.w1).relu()
        return (torch.bmm(y, self.w2) * weight).sum(0)


class ModuleExperts(Case):
    """Experts as a list of modules, each with hidden units of its own, gated by columns of a softmax."""

    units = {"h0": U("ups.0.weight", 0, 5), "h1": U("ups.1.weight", 0, 6)}

    def __init__(self):
        super().__init__()
        self.gate = nn.Linear(6, 2)
        self.ups = nn.ModuleList([nn.Linear(6, 5), nn.Linear(6, 6)])
        self.downs = nn.ModuleList([nn.Linear(5, 3), nn.Linear(6, 3)])

    def forward(self, x):
        weight = self.gate(x).softmax(-1)
        experts = zip(self.ups, self.downs, strict=True)
        return sum(weight[:, i, None] * down(up(x).relu()) for i, (up, down) in enumerate(experts))

    def reference(self, keep, x):
        weight = self.gate(x).softmax(-1)
        a = self.downs[0](on(self.ups[0](x).relu(), keep["h0"]))
        return weight[:, :1] * a + weight[:, 1:] * self.downs[1](on(self.ups[1](x).relu(), keep["h1"]))


class Tokens(Case):
    """Base of the cases that read token numbers."""

    def example(self):
        return (torch.randint(0, 11, (2, 5), generator=torch.Generator().manual_seed(3)),), {}


class TiedHead(Tokens):
    """The embedding is also the output layer: the vocabulary stays, the width may go, in both."""

    units = {"stream": U("embed.weight", 1, 8), "pos": U("place.weight", 1, 8), "h": U("f1.weight", 0, 9)}
    fixed = (("embed.weight", 0),)

    def __init__(self):
        super().__init__()
        self.embed, self.place = nn.Embedding(11, 8), nn.Embedding(6, 8)
        self.f1, self.f2, self.norm = nn.Linear(8, 9), nn.Linear(9, 8), nn.LayerNorm(8)
        self.head = nn.Linear(8, 11, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, ids):
        x = self.embed(ids) + self.place(torch.arange(ids.shape[1], device=ids.device))
        return self.head(self.norm(x + self.f2(F.gelu(self.f1(x)))))

    def reference(self, keep, ids):
        assert torch.equal(keep["stream"], keep["pos"])
        s = keep["stream"]
        x = on(self.embed.weight[ids] + self.place.weight[:5], s)
        x = x + on(self.f2(on(F.gelu(self.f1(x)), keep["h"])), s)
        return kept_layer_norm(x, s, self.norm.weight, self.norm.bias) @ self.embed.weight.t()


class EmbeddingInside(Tokens):
    """A categorical column embedded and put beside the numeric features of a table."""

    units = {"e": U("embed.weight", 1, 4), "n": U("numeric.weight", 0, 5), "h": U("f1.weight", 0, 7)}

    def __init__(self):
        super().__init__()
        self.embed, self.numeric = nn.Embedding(11, 4), nn.Linear(3, 5)
        self.f1, self.f2 = nn.Linear(25, 7), nn.Linear(7, 2)

    def example(self):
        ids = super().example()[0][0]
        return (ids, torch.randn(2, 3, generator=torch.Generator().manual_seed(5), dtype=torch.float64)), {}

    def forward(self, ids, x):
        x = torch.cat([self.embed(ids).flatten(1), self.numeric(x).relu()], dim=-1)
        return self.f2(self.f1(x).relu())

    def reference(self, keep, ids, x):
        e = on(self.embed.weight[ids].flatten(1), both(torch.ones(5, dtype=torch.bool), keep["e"]))
        x = torch.cat([e, on(self.numeric(x).relu(), keep["n"])], -1)
        return self.f2(on(self.f1(x).relu(), keep["h"]))


class Bags(Case):
    """Words of a row summed, and their largest of each feature: what recommenders look up (`EmbeddingBag`)."""

    units = {"e": U("summed.weight", 1, 6), "g": U("largest.weight", 1, 4), "h": U("f1.weight", 0, 7)}
    fixed = (("summed.weight", 0), ("largest.weight", 0))

    def __init__(self):
        super().__init__()
        self.summed, self.largest = nn.EmbeddingBag(11, 6, mode="sum"), nn.EmbeddingBag(11, 4, mode="max")
        self.f1, self.f2 = nn.Linear(10, 7), nn.Linear(7, 2)

    def example(self):
        return (torch.randint(0, 11, (9,), generator=torch.Generator().manual_seed(3)), torch.tensor([0, 4, 6])), {}

    def forward(self, ids, offsets):
        x = torch.cat([self.summed(ids, offsets), self.largest(ids, offsets)], dim=-1)
        return self.f2(self.f1(x).relu())

    def reference(self, keep, ids, offsets):
        bags = [ids[a:b] for a, b in ((0, 4), (4, 6), (6, 9))]
        e = on(torch.stack([self.summed.weight[b].sum(0) for b in bags]), keep["e"])
        g = on(torch.stack([self.largest.weight[b].amax(0) for b in bags]), keep["g"])
        return self.f2(on(self.f1(torch.cat([e, g], -1)).relu(), keep["h"]))


CASES = (
    ScaleAndBias, RawMatmul, EinsumLinear, OuterProduct, Bilinear, GramMatrix, DenseExperts, BatchedExperts,
    ModuleExperts, TiedHead, EmbeddingInside, Bags,
)  # fmt: skip
