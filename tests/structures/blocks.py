"""Blocks of well-known networks: Swin, XCiT, Mixer, gMLP, DiT, ASPP, Perceiver, VQ, ECA, torch's own encoder layer."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from .attention import heads_of, joined
from .harness import Case, U, prod
from .masks import attend, both, kept_layer_norm, kept_softmax, on

TOKENS = ((2, 5, 6),)
IMAGE = ((2, 3, 4, 4),)


class EncoderLayer(Case):
    """`nn.TransformerEncoderLayer` on an embedded stream: three axes besides the stream."""

    units = {
        "s": U("embed.weight", 0, 8),
        "h": U("layer.self_attn.in_proj_weight", 0, prod((3, 2, 4), 1)),
        "qk": U("layer.self_attn.in_proj_weight", 0, prod((3, 2, 4), 2)),
        "f": U("layer.linear1.weight", 0, 9),
    }
    shapes = TOKENS

    def __init__(self):
        super().__init__()
        self.embed, self.head = nn.Linear(6, 8), nn.Linear(8, 3)
        self.layer = nn.TransformerEncoderLayer(8, 2, 9, batch_first=True, norm_first=True)

    def forward(self, x):
        return self.head(self.layer(self.embed(x)))

    def reference(self, keep, x):
        m, a, s = self.layer, self.layer.self_attn, keep["s"]
        x = on(self.embed(x), s)
        qkv = kept_layer_norm(x, s, m.norm1.weight, m.norm1.bias) @ a.in_proj_weight.t() + a.in_proj_bias
        q, k, v = (heads_of(part, 2) for part in qkv.split(8, -1))
        y = attend(on(q, keep["qk"]), k, v, keep["qk"].sum().to(x.dtype) ** -0.5)
        x = x + on(a.out_proj(on(joined(y), both(keep["h"], keep["qk"]))), s)
        y = kept_layer_norm(x, s, m.norm2.weight, m.norm2.bias)
        return self.head(x + on(m.linear2(on(m.linear1(y).relu(), keep["f"])), s))


class PositionBias(Case):
    """Swin: a table (offsets, heads) looked up by a constant index gives a bias per head."""

    units = {"h": U("table", 1, 3), "d": U("qkv.weight", 0, prod((3, 3, 4), 2))}
    fixed = (("table", 0),)
    shapes = ((2, 4, 6),)

    def __init__(self):
        super().__init__()
        self.qkv, self.proj, self.table = nn.Linear(6, 36), nn.Linear(12, 6), nn.Parameter(torch.zeros(7, 3))
        self.register_buffer("index", (torch.arange(4)[:, None] - torch.arange(4)[None, :]) + 3)

    def forward(self, x):
        b, n, _ = x.shape
        q, k, v = self.qkv(x).reshape(b, n, 3, 3, -1).permute(2, 0, 3, 1, 4)
        bias = self.table[self.index.view(-1)].view(n, n, -1).permute(2, 0, 1).contiguous()
        a = (q * 0.5) @ k.transpose(-2, -1) + bias.unsqueeze(0)
        return self.proj((a.softmax(-1) @ v).transpose(1, 2).reshape(b, n, -1))

    def reference(self, keep, x):
        q, k, v = (on(heads_of(part, 3), keep["d"]) for part in self.qkv(x).split(12, -1))
        rows = [[self.table[i - j + 3] for j in range(4)] for i in range(4)]
        bias = torch.stack([torch.stack(row) for row in rows]).permute(2, 0, 1)
        y = (q @ k.transpose(2, 3) * 0.5 + bias).softmax(-1) @ v
        return self.proj(on(joined(y), both(keep["h"], keep["d"])))


class PatchMerging(Case):
    """Four strided views of the image side by side: 4·c, normed and reduced."""

    units = {"a": U("embed.weight", 0, 5), "b": U("reduce.weight", 0, 7)}
    shapes = IMAGE

    def __init__(self):
        super().__init__()
        self.embed, self.norm = nn.Conv2d(3, 5, 1), nn.LayerNorm(20)
        self.reduce, self.head = nn.Linear(20, 7, bias=False), nn.Linear(7, 3)

    def forward(self, x):
        x = self.embed(x).permute(0, 2, 3, 1)
        x = torch.cat([x[:, 0::2, 0::2], x[:, 1::2, 0::2], x[:, 0::2, 1::2], x[:, 1::2, 1::2]], -1)
        return self.head(self.reduce(self.norm(x)).relu())

    def reference(self, keep, x):
        x = on(self.embed(x).permute(0, 2, 3, 1), keep["a"])
        x = torch.stack([x[:, i::2, j::2] for j in (0, 1) for i in (0, 1)], 3).flatten(3)
        x = kept_layer_norm(x, keep["a"].repeat(4), self.norm.weight, self.norm.bias)
        return self.head(on(self.reduce(x).relu(), keep["b"]))


class CrossCovariance(Case):
    """XCiT: attention between channels; the softmax runs over the key places."""

    units = {
        "h": U("q.weight", 0, prod((2, 4), 0)),
        "d": U("q.weight", 0, prod((2, 4), 1)),
        "e": U("k.weight", 0, prod((2, 4), 1), must=False),
    }
    shapes = TOKENS

    def __init__(self):
        super().__init__()
        self.q, self.k, self.v, self.o = nn.Linear(6, 8), nn.Linear(6, 8), nn.Linear(6, 8), nn.Linear(8, 6)

    def forward(self, x):
        b, n, _ = x.shape
        q, k, v = (f(x).view(b, n, 2, 4).permute(0, 2, 3, 1) for f in (self.q, self.k, self.v))
        a = (F.normalize(q, dim=-1) @ F.normalize(k, dim=-1).transpose(-2, -1)).softmax(-1)
        return self.o((a @ v).permute(0, 3, 1, 2).reshape(b, n, 8))

    def reference(self, keep, x):
        q, k, v = (heads_of(f(x), 2).transpose(2, 3) for f in (self.q, self.k, self.v))
        q, k = q / (q**2).sum(-1, keepdim=True).sqrt(), k / (k**2).sum(-1, keepdim=True).sqrt()
        y = kept_softmax(q @ k.transpose(2, 3), keep["e"]) @ v
        return self.o(on(y.permute(0, 3, 1, 2).reshape(2, 5, 8), both(keep["h"], keep["d"])))


class TalkingHeads(Case):
    """Linear layers over the heads, before and after the softmax: three head axes."""

    units = {
        "h": U("q.weight", 0, prod((3, 4), 0)),
        "d": U("q.weight", 0, prod((3, 4), 1)),
        "mid": U("before.weight", 0, 5),
        "out": U("after.weight", 0, 3),
        "v": U("v.weight", 0, prod((3, 2), 1)),
    }
    shapes = TOKENS

    def __init__(self):
        super().__init__()
        self.q, self.k, self.v, self.o = nn.Linear(6, 12), nn.Linear(6, 12), nn.Linear(6, 6), nn.Linear(6, 6)
        self.before, self.after = nn.Linear(3, 5), nn.Linear(5, 3)

    def forward(self, x):
        b, n, _ = x.shape
        q, k, v = (f(x).view(b, n, 3, -1).transpose(1, 2) for f in (self.q, self.k, self.v))
        a = self.before((q @ k.mT).permute(0, 2, 3, 1)).softmax(2)
        return self.o((self.after(a).permute(0, 3, 1, 2) @ v).transpose(1, 2).flatten(2))

    def reference(self, keep, x):
        q, k, v = (heads_of(f(x), 3) for f in (self.q, self.k, self.v))
        a = on((on(q, keep["d"]) @ k.transpose(2, 3)).permute(0, 2, 3, 1), keep["h"])
        a = self.after(on(self.before(a).softmax(2), keep["mid"])).permute(0, 3, 1, 2)
        return self.o(on(joined(a @ v), both(keep["out"], keep["v"])))


class Mixer(Case):
    """MLP-Mixer: one MLP over the tokens (whose hidden units are free), one over the channels."""

    units = {"s": U("embed.weight", 0, 7), "t": U("t1.weight", 0, 8), "c": U("c1.weight", 0, 9)}
    fixed = (("t1.weight", 1), ("t2.weight", 0))
    shapes = TOKENS

    def __init__(self):
        super().__init__()
        self.embed, self.n1, self.n2, self.head = nn.Linear(6, 7), nn.LayerNorm(7), nn.LayerNorm(7), nn.Linear(7, 3)
        self.t1, self.t2, self.c1, self.c2 = nn.Linear(5, 8), nn.Linear(8, 5), nn.Linear(7, 9), nn.Linear(9, 7)

    def forward(self, x):
        x = self.embed(x)
        x = x + self.t2(F.gelu(self.t1(self.n1(x).transpose(1, 2)))).transpose(1, 2)
        x = x + self.c2(F.gelu(self.c1(self.n2(x))))
        return self.head(x.mean(1))

    def reference(self, keep, x):
        s = keep["s"]
        x = on(self.embed(x), s)
        y = kept_layer_norm(x, s, self.n1.weight, self.n1.bias).transpose(1, 2)
        x = x + on(self.t2(on(F.gelu(self.t1(y)), keep["t"])).transpose(1, 2), s)
        y = kept_layer_norm(x, s, self.n2.weight, self.n2.bias)
        x = x + on(self.c2(on(F.gelu(self.c1(y)), keep["c"])), s)
        return self.head(x.mean(1))


class SpatialGating(Case):
    """gMLP: half of the channels is normed, mixed over tokens by a Conv1d, and gates the other half."""

    units = {"h": U("up.weight", 0, prod((2, 6), 1), must=False)}  # the channels are the convolution's "space"
    fixed = (("mix.weight", 0), ("mix.weight", 1))
    shapes = TOKENS

    def __init__(self):
        super().__init__()
        self.up, self.norm, self.mix, self.down = nn.Linear(6, 12), nn.LayerNorm(6), nn.Conv1d(5, 5, 1), nn.Linear(6, 6)

    def forward(self, x):
        u, v = F.gelu(self.up(x)).chunk(2, -1)
        return x + self.down(u * self.mix(self.norm(v)))

    def reference(self, keep, x):
        y = F.gelu(self.up(x))
        v = kept_layer_norm(y[..., 6:], keep["h"], self.norm.weight, self.norm.bias)
        v = torch.einsum("ts,bsc->btc", self.mix.weight[..., 0], v) + self.mix.bias[:, None]
        return x + self.down(on(y[..., :6] * v, keep["h"]))


class AdaptiveNorm(Case):
    """DiT: one Linear of the condition makes shift, scale and gate of the stream, which all are the stream's axis."""

    units = {"s": U("embed.weight", 0, 7), "m": U("mod.weight", 0, prod((3, 7), 1)), "h": U("f1.weight", 0, 9)}
    shapes = ((2, 5, 6), (2, 4))

    def __init__(self):
        super().__init__()
        self.embed, self.mod, self.head = nn.Linear(6, 7), nn.Linear(4, 21), nn.Linear(7, 3)
        self.norm, self.f1, self.f2 = nn.LayerNorm(7, elementwise_affine=False), nn.Linear(7, 9), nn.Linear(9, 7)

    def forward(self, x, condition):
        x = self.embed(x)
        shift, scale, gate = self.mod(F.silu(condition)).unsqueeze(1).chunk(3, dim=2)
        y = self.norm(x) * (1 + scale) + shift
        return self.head(x + gate * self.f2(self.f1(y).relu()))

    def reference(self, keep, x, condition):
        assert torch.equal(keep["s"], keep["m"])
        s = keep["s"]
        x = on(self.embed(x), s)
        shift, scale, gate = self.mod(F.silu(condition)).view(2, 3, 1, 7).unbind(1)
        y = kept_layer_norm(x, s, torch.ones(7), torch.zeros(7)) * (1 + scale) + shift
        y = self.f2(on(self.f1(on(y, s)).relu(), keep["h"]))
        return self.head(on(x + gate * y, s))


class PyramidPooling(Case):
    """ASPP: dilated branches and a pooled one, interpolated and concatenated."""

    units = {
        "a": U("c0.weight", 0, 5),
        "p": U("c1.weight", 0, 4),
        "q": U("c2.weight", 0, 3),
        "r": U("c3.weight", 0, 4),
    }
    shapes = IMAGE

    def __init__(self):
        super().__init__()
        self.c0, self.c1, self.c3 = nn.Conv2d(3, 5, 1), nn.Conv2d(5, 4, 1), nn.Conv2d(5, 4, 1)
        self.c2, self.head = nn.Conv2d(5, 3, 3, padding=2, dilation=2), nn.Conv2d(11, 2, 1)

    def forward(self, x):
        x = self.c0(x).relu()
        pooled = F.interpolate(self.c3(F.adaptive_avg_pool2d(x, 1)), size=x.shape[-2:], mode="bilinear")
        return self.head(torch.cat([self.c1(x), self.c2(x), pooled], 1).relu())

    def reference(self, keep, x):
        x = on(self.c0(x).relu(), keep["a"], 1)
        pooled = self.c3(x.mean((2, 3), keepdim=True)).expand(2, 4, 4, 4)
        y = torch.cat([self.c1(x), self.c2(x), pooled], 1).relu()
        return self.head(on(y, torch.cat([keep["p"], keep["q"], keep["r"]]), 1))


class LearnedQueries(Case):
    """Perceiver: a bare parameter of query vectors attends to the input; its width is an axis, its count is not."""

    units = {"w": U("queries", 1, 7), "qk": U("q.weight", 0, 5), "v": U("v.weight", 0, 6)}
    fixed = (("queries", 0),)
    shapes = TOKENS

    def __init__(self):
        super().__init__()
        self.queries = nn.Parameter(torch.zeros(4, 7))
        self.q, self.k, self.v, self.o = nn.Linear(7, 5), nn.Linear(6, 5), nn.Linear(6, 6), nn.Linear(6, 3)

    def forward(self, x):
        q = self.q(self.queries.unsqueeze(0).expand(x.size(0), -1, -1))
        return self.o(F.scaled_dot_product_attention(q, self.k(x), self.v(x)))

    def reference(self, keep, x):
        q = on(self.q(on(self.queries, keep["w"])), keep["qk"])
        v = on(self.v(x), keep["v"])
        return self.o(attend(q, self.k(x), v, keep["qk"].sum().to(x.dtype) ** -0.5))


class VectorQuantised(Case):
    """The nearest row of a codebook by squared distance: the distance sums over kept places, the choice follows."""

    units = {"d": U("enc.weight", 0, 6)}
    fixed = (("codes", 0),)
    shapes = ((5, 6),)

    def __init__(self):
        super().__init__()
        self.enc, self.codes, self.dec = nn.Linear(6, 6), nn.Parameter(torch.zeros(4, 6)), nn.Linear(6, 3)

    def forward(self, x):
        z = self.enc(x)
        chosen = (z[:, None] - self.codes[None]).pow(2).sum(-1).argmin(1)
        return self.dec(self.codes[chosen] * z)

    def reference(self, keep, x):
        z = on(self.enc(x), keep["d"])
        codes = on(self.codes, keep["d"])
        chosen = torch.stack([((row - codes) ** 2).sum(1).argmin() for row in z])
        return self.dec(codes[chosen] * z)


class ChannelConvolution(Case):
    """ECA: a convolution slides along the channels; neighbours matter, so the axis is frozen."""

    units = {"b": U("c2.weight", 0, 6)}
    fixed = (("c1.weight", 0),)
    shapes = IMAGE

    def __init__(self):
        super().__init__()
        self.c1, self.eca = nn.Conv2d(3, 8, 1), nn.Conv1d(1, 1, 3, padding=1, bias=False)
        self.c2, self.head = nn.Conv2d(8, 6, 1), nn.Conv2d(6, 2, 1)

    def forward(self, x):
        x = self.c1(x)
        gate = self.eca(x.mean((2, 3)).unsqueeze(1)).transpose(1, 2).unsqueeze(-1).sigmoid()
        return self.head(self.c2(x * gate).relu())

    def reference(self, keep, x):
        x = self.c1(x)
        y, w = F.pad(x.mean((2, 3)), (1, 1)), self.eca.weight[0, 0]
        gate = (y[:, :-2] * w[0] + y[:, 1:-1] * w[1] + y[:, 2:] * w[2]).sigmoid()
        return self.head(on(self.c2(x * gate[..., None, None]).relu(), keep["b"], 1))


CASES = (
    EncoderLayer, PositionBias, PatchMerging, CrossCovariance, TalkingHeads, Mixer, SpatialGating, AdaptiveNorm,
    PyramidPooling, LearnedQueries, VectorQuantised, ChannelConvolution,
)  # fmt: skip
