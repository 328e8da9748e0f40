"""Normalisation and reductions over channels: the reference reduces over the kept positions only."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from .harness import Case, U, prod
from .masks import attend, both, kept_layer_norm, kept_mean, kept_rms_norm, kept_softmax, on

IMAGE = ((2, 3, 4, 4),)
TOKENS = ((2, 5, 6),)


class LayerNormStream(Case):
    """A pre-norm transformer block on an embedded stream, one head, both norms over the cut stream."""

    units = {
        "stream": U("embed.weight", 0, 10),
        "qk": U("q.weight", 0, 6),
        "v": U("v.weight", 0, 7),
        "h": U("f1.weight", 0, 9),
    }
    fixed = (("head.weight", 0), ("embed.weight", 1))
    shapes = TOKENS

    def __init__(self):
        super().__init__()
        self.embed, self.n1, self.n2, self.n3 = nn.Linear(6, 10), nn.LayerNorm(10), nn.LayerNorm(10), nn.LayerNorm(10)
        self.q, self.k, self.v, self.o = nn.Linear(10, 6), nn.Linear(10, 6), nn.Linear(10, 7), nn.Linear(7, 10)
        self.f1, self.f2, self.head = nn.Linear(10, 9), nn.Linear(9, 10), nn.Linear(10, 3)

    def forward(self, x):
        x = self.embed(x)
        y = self.n1(x)
        a = (self.q(y) @ self.k(y).transpose(1, 2) * 0.4).softmax(-1)
        x = x + self.o(a @ self.v(y))
        x = x + self.f2(F.gelu(self.f1(self.n2(x))))
        return self.head(self.n3(x))

    def reference(self, keep, x):
        s = keep["stream"]
        x = on(self.embed(x), s)
        y = kept_layer_norm(x, s, self.n1.weight, self.n1.bias)
        v = attend(on(self.q(y), keep["qk"]), self.k(y), on(self.v(y), keep["v"]), 0.4)
        x = x + on(self.o(v), s)
        y = kept_layer_norm(x, s, self.n2.weight, self.n2.bias)
        x = x + on(self.f2(on(F.gelu(self.f1(y)), keep["h"])), s)
        return self.head(kept_layer_norm(x, s, self.n3.weight, self.n3.bias))


class ChannelsLastNorm(Case):
    """ConvNeXt: LayerNorm over channels between two permutes, layer scale by a raw parameter."""

    units = {"a": U("c1.weight", 0, 6), "h": U("f1.weight", 0, 8)}
    shapes = IMAGE

    def __init__(self):
        super().__init__()
        self.c1, self.dw = nn.Conv2d(3, 6, 1), nn.Conv2d(6, 6, 3, padding=1, groups=6)
        self.n, self.gamma = nn.LayerNorm(6, eps=1e-6), nn.Parameter(torch.zeros(6, 1, 1))
        self.f1, self.f2, self.head = nn.Linear(6, 8), nn.Linear(8, 6), nn.Conv2d(6, 2, 1)

    def forward(self, x):
        x = self.c1(x)
        y = self.n(self.dw(x).permute(0, 2, 3, 1))
        y = self.f2(F.gelu(self.f1(y))).permute(0, 3, 1, 2)
        return self.head(x + y * self.gamma)

    def reference(self, keep, x):
        x = on(self.c1(x), keep["a"], 1)
        y = kept_layer_norm(self.dw(x).permute(0, 2, 3, 1), keep["a"], self.n.weight, self.n.bias, 1e-6)
        y = self.f2(on(F.gelu(self.f1(y)), keep["h"])).permute(0, 3, 1, 2)
        return self.head(x + on(y * self.gamma, keep["a"], 1))


class ImageLayerNorm(Case):
    """LayerNorm over (C, H, W) with an element-wise weight of that shape."""

    units = {"a": U("c1.weight", 0, 6)}
    shapes = IMAGE

    def __init__(self):
        super().__init__()
        self.c1, self.n, self.head = nn.Conv2d(3, 6, 1), nn.LayerNorm([6, 4, 4]), nn.Conv2d(6, 2, 1)

    def forward(self, x):
        return self.head(self.n(self.c1(x)).relu())

    def reference(self, keep, x):
        x = on(self.c1(x), keep["a"], 1)
        flat = keep["a"].repeat_interleave(16)
        y = kept_layer_norm(x.flatten(1), flat, self.n.weight.flatten(), self.n.bias.flatten()).view_as(x)
        return self.head(y.relu())


class GroupNorm(Case):
    """12 channels in 3 norm groups of 4: whole groups may go, and equally many places of each group."""

    units = {"g": U("c1.weight", 0, prod((3, 4), 0)), "c": U("c1.weight", 0, prod((3, 4), 1))}
    shapes = IMAGE

    def __init__(self):
        super().__init__()
        self.c1, self.n, self.head = nn.Conv2d(3, 12, 1), nn.GroupNorm(3, 12), nn.Conv2d(12, 2, 1)

    def forward(self, x):
        return self.head(self.n(self.c1(x)).relu())

    def reference(self, keep, x):
        x = self.c1(x).view(2, 3, 64)
        flat = keep["c"].repeat_interleave(16)
        centred = x - kept_mean(x, flat)
        x = (centred / (kept_mean(centred**2, flat) + 1e-5).sqrt()).view(2, 12, 4, 4)
        x = x * self.n.weight.view(-1, 1, 1) + self.n.bias.view(-1, 1, 1)
        return self.head(on(x.relu(), both(keep["g"], keep["c"]), 1))


class GroupNormOfOne(Case):
    """One norm group (a LayerNorm over the whole image), then a residual and a second norm."""

    units = {"a": U("c1.weight", 0, 6)}
    shapes = IMAGE

    def __init__(self):
        super().__init__()
        self.c1, self.n1, self.c2 = nn.Conv2d(3, 6, 1), nn.GroupNorm(1, 6), nn.Conv2d(6, 6, 3, padding=1)
        self.n2, self.head = nn.GroupNorm(1, 6, affine=False), nn.Conv2d(6, 2, 1)

    def forward(self, x):
        x = self.n1(self.c1(x))
        return self.head(self.n2(x + self.c2(x.relu())))

    def norm(self, x, k):
        flat = k.repeat_interleave(16)
        return kept_layer_norm(x.flatten(1), flat, torch.ones(96), torch.zeros(96)).view_as(x)

    def reference(self, keep, x):
        k = keep["a"]
        x = self.norm(self.c1(x), k) * self.n1.weight.view(-1, 1, 1) + on(self.n1.bias.view(-1, 1, 1), k, 0)
        return self.head(self.norm(x + on(self.c2(x.relu()), k, 1), k))


class InstanceNorm(Case):
    units = {"a": U("c1.weight", 0, 6), "b": U("c2.weight", 0, 5)}
    shapes = IMAGE

    def __init__(self):
        super().__init__()
        self.c1, self.n1 = nn.Conv2d(3, 6, 1), nn.InstanceNorm2d(6, affine=True)
        self.c2, self.n2 = nn.Conv2d(6, 5, 1), nn.InstanceNorm2d(5, affine=True, track_running_stats=True)
        self.head = nn.Conv2d(5, 2, 1)

    def forward(self, x):
        return self.head(self.n2(self.c2(self.n1(self.c1(x)).relu())).relu())

    def reference(self, keep, x):
        x = self.c1(x)
        x = (x - x.mean((2, 3), keepdim=True)) / (x.var((2, 3), keepdim=True, unbiased=False) + 1e-5).sqrt()
        x = x * self.n1.weight.view(-1, 1, 1) + self.n1.bias.view(-1, 1, 1)
        x = self.c2(on(x.relu(), keep["a"], 1))
        n = self.n2
        x = (x - n.running_mean.view(-1, 1, 1)) / (n.running_var + 1e-5).sqrt().view(-1, 1, 1)
        x = x * n.weight.view(-1, 1, 1) + n.bias.view(-1, 1, 1)
        return self.head(on(x.relu(), keep["b"], 1))


class HandRMSNorm(Case):
    """RMSNorm as Llama writes it, on a residual stream."""

    units = {"stream": U("embed.weight", 0, 8), "h": U("f1.weight", 0, 9)}
    shapes = TOKENS

    def __init__(self):
        super().__init__()
        self.embed, self.w1, self.w2 = nn.Linear(6, 8), nn.Parameter(torch.ones(8)), nn.Parameter(torch.ones(8))
        self.f1, self.f2, self.head = nn.Linear(8, 9), nn.Linear(9, 8), nn.Linear(8, 3)

    def norm(self, x, weight):
        variance = x.pow(2).mean(-1, keepdim=True)
        return weight * (x * torch.rsqrt(variance + 1e-6))

    def forward(self, x):
        x = self.embed(x)
        x = x + self.f2(F.silu(self.f1(self.norm(x, self.w1))))
        return self.head(self.norm(x, self.w2))

    def reference(self, keep, x):
        s = keep["stream"]
        x = on(self.embed(x), s)
        y = on(F.silu(self.f1(kept_rms_norm(x, s, self.w1))), keep["h"])
        return self.head(kept_rms_norm(x + on(self.f2(y), s), s, self.w2))


class ModuleRMSNorm(Case):
    units = {"a": U("f1.weight", 0, 8)}

    def __init__(self):
        super().__init__()
        self.f1, self.n, self.f2 = nn.Linear(6, 8), nn.RMSNorm(8, eps=1e-5), nn.Linear(8, 3)

    def forward(self, x):
        return self.f2(self.n(self.f1(x)).tanh())

    def reference(self, keep, x):
        return self.f2(kept_rms_norm(on(self.f1(x), keep["a"]), keep["a"], self.n.weight, 1e-5).tanh())


class HandLayerNorm(Case):
    """Mean and unbiased variance by hand: n - 1 counts the kept units too, so two must stay."""

    least = 2
    units = {"a": U("f1.weight", 0, 8, must=False)}

    def __init__(self):
        super().__init__()
        self.f1, self.g, self.f2 = nn.Linear(6, 8), nn.Parameter(torch.ones(8)), nn.Linear(8, 3)

    def forward(self, x):
        x = self.f1(x)
        return self.f2((x - x.mean(-1, keepdim=True)) / (x.var(-1, keepdim=True) + 1e-3).sqrt() * self.g)

    def reference(self, keep, x):
        x, k = self.f1(x), keep["a"]
        centred = on(x - kept_mean(x, k), k)
        return self.f2(centred / (centred.pow(2).sum(-1, keepdim=True) / (k.sum() - 1) + 1e-3).sqrt() * self.g)


class BatchNorm1d(Case):
    units = {"a": U("f1.weight", 0, 8), "b": U("f2.weight", 0, 7)}

    def __init__(self):
        super().__init__()
        self.f1, self.n1, self.f2 = nn.Linear(6, 8, bias=False), nn.BatchNorm1d(8), nn.Linear(8, 7)
        self.n2, self.f3 = nn.BatchNorm1d(7), nn.Linear(7, 3)

    def forward(self, x):
        return self.f3(self.n2(self.f2(self.n1(self.f1(x)).relu())).sigmoid())

    def reference(self, keep, x):
        x = on(self.n1(self.f1(x)).relu(), keep["a"])
        return self.f3(on(self.n2(self.f2(x)).sigmoid(), keep["b"]))


class ChannelMean(Case):
    """CBAM's spatial gate: mean and maximum over the channels."""

    units = {"a": U("c1.weight", 0, 6, must=False)}
    shapes = IMAGE

    def __init__(self):
        super().__init__()
        self.c1, self.c2, self.head = nn.Conv2d(3, 6, 1), nn.Conv2d(2, 1, 3, padding=1), nn.Conv2d(6, 2, 1)

    def forward(self, x):
        x = self.c1(x)
        gate = self.c2(torch.cat([x.mean(1, keepdim=True), x.amax(1, keepdim=True)], 1)).sigmoid()
        return self.head(x * gate)

    def reference(self, keep, x):
        x, k = self.c1(x), keep["a"]
        gate = self.c2(torch.cat([kept_mean(x, k, 1), x[:, k].amax(1, keepdim=True)], 1)).sigmoid()
        return self.head(on(x, k, 1) * gate)


class Normalize(Case):
    """`F.normalize` and a vector norm over the channels: sums of squares, zeros add nothing."""

    units = {"a": U("f1.weight", 0, 8), "b": U("f2.weight", 0, 7)}

    def __init__(self):
        super().__init__()
        self.f1, self.f2, self.f3 = nn.Linear(6, 8), nn.Linear(8, 7), nn.Linear(7, 3)

    def forward(self, x):
        x = self.f2(F.normalize(self.f1(x), dim=-1)).relu() + 0.1
        return self.f3(x / torch.linalg.vector_norm(x, ord=1, dim=1, keepdim=True))

    def reference(self, keep, x):
        x = on(self.f1(x), keep["a"])
        x = self.f2(x / (x**2).sum(-1, keepdim=True).sqrt())
        x = on(x.relu() + 0.1, keep["b"])
        return self.f3(x / x.abs().sum(1, keepdim=True))


class ChannelSoftmax(Case):
    """A softmax gate over the channels: it renormalises over the kept ones, or the axis is frozen."""

    units = {"a": U("f1.weight", 0, 8, must=False)}

    def __init__(self):
        super().__init__()
        self.f1, self.f2 = nn.Linear(6, 8), nn.Linear(8, 3)

    def forward(self, x):
        x = self.f1(x)
        return self.f2(x.softmax(-1) * x)

    def reference(self, keep, x):
        x = self.f1(x)
        return self.f2(kept_softmax(x, keep["a"]) * x)


class ResponseNorm(Case):
    """Local response norm and a cumulative sum look at neighbouring channels: frozen, or exact all the same."""

    units = {"free": U("c0.weight", 0, 5), "b": U("c2.weight", 0, 7, must=False)}
    fixed = (("c1.weight", 0),)
    shapes = IMAGE

    def __init__(self):
        super().__init__()
        self.c0, self.c1 = nn.Conv2d(3, 5, 1), nn.Conv2d(5, 8, 1)
        self.c2, self.head = nn.Conv2d(8, 7, 1), nn.Conv2d(7, 2, 1)

    def forward(self, x):
        x = F.local_response_norm(self.c1(self.c0(x).relu()), 3, alpha=1.0)
        return self.head(torch.cumsum(self.c2(x), 1))

    def reference(self, keep, x):
        x = F.local_response_norm(self.c1(on(self.c0(x).relu(), keep["free"], 1)), 3, alpha=1.0)
        return self.head(on(torch.cumsum(on(self.c2(x), keep["b"], 1), 1), keep["b"], 1))


CASES = (
    LayerNormStream, ChannelsLastNorm, ImageLayerNorm, GroupNorm, GroupNormOfOne, InstanceNorm, HandRMSNorm,
    ModuleRMSNorm, HandLayerNorm, BatchNorm1d, ChannelMean, Normalize, ChannelSoftmax, ResponseNorm,
)  # fmt: skip
