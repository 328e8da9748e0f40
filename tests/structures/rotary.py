"""Rotary embeddings, positional tables, linear and cosine attention."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from .attention import heads_of, joined
from .harness import Case, U, prod
from .masks import attend, both, on

TOKENS = ((2, 5, 6),)


def rotated(x, cos, sin, keep, first, second):
    """Rotate the places `first[i]`, `second[i]` of the last dimension by angle i; dropped pairs come out as zero."""
    a, b = x[..., first], x[..., second]
    out = torch.zeros_like(x)
    out[..., first], out[..., second] = on(a * cos - b * sin, keep), on(b * cos + a * sin, keep)
    return out


class RotaryHalves(Case):
    """Places j and j + 4 are a pair; cosines come from a bare buffer of inverse frequencies."""

    units = {
        "h": U("q.weight", 0, prod((2, 2, 4), 0)),
        "pair": U("q.weight", 0, prod((2, 2, 4), 2)),
        "v": U("v.weight", 0, prod((2, 3), 1)),
    }
    shapes = TOKENS

    def __init__(self):
        super().__init__()
        self.q, self.k, self.v, self.o = nn.Linear(6, 16), nn.Linear(6, 16), nn.Linear(6, 6), nn.Linear(6, 6)
        self.register_buffer("inv_freq", torch.tensor([1.0, 0.41, 0.13, 0.05]))

    def rotate(self, x, cos, sin):
        half = x.shape[-1] // 2
        return x * cos + torch.cat((-x[..., half:], x[..., :half]), dim=-1) * sin

    def forward(self, x):
        b, n, _ = x.shape
        angles = torch.arange(n, device=x.device).to(x.dtype)[:, None] * self.inv_freq[None, :]
        angles = torch.cat((angles, angles), dim=-1)
        cos, sin = angles.cos(), angles.sin()
        q, k, v = (f(x).view(b, n, 2, -1).transpose(1, 2) for f in (self.q, self.k, self.v))
        q, k = self.rotate(q, cos, sin), self.rotate(k, cos, sin)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=0.4)
        return self.o(y.transpose(1, 2).reshape(b, n, -1))

    def reference(self, keep, x):
        angles = torch.outer(torch.arange(5).to(x.dtype), self.inv_freq)
        first, second = [0, 1, 2, 3], [4, 5, 6, 7]
        cos, sin = angles.cos(), angles.sin()
        q, k = (rotated(heads_of(f(x), 2), cos, sin, keep["pair"], first, second) for f in (self.q, self.k))
        y = attend(q, k, heads_of(self.v(x), 2), 0.4, causal=True)
        return self.o(on(joined(y), both(keep["h"], keep["v"])))


class RotaryTables(Case):
    """The same with whole (N, d) cosine and sine tables as buffers, each half a copy of the other."""

    units = RotaryHalves.units
    shapes = TOKENS

    def __init__(self):
        super().__init__()
        self.q, self.k, self.v, self.o = nn.Linear(6, 16), nn.Linear(6, 16), nn.Linear(6, 6), nn.Linear(6, 6)
        angles = torch.outer(torch.arange(5.0), torch.tensor([1.0, 0.41, 0.13, 0.05])).repeat(1, 2)
        self.register_buffer("cos", angles.cos())
        self.register_buffer("sin", angles.sin())

    def forward(self, x):
        b, n, _ = x.shape
        q, k, v = (f(x).view(b, n, 2, -1).transpose(1, 2) for f in (self.q, self.k, self.v))
        q, k = (t * self.cos + torch.cat((-t[..., 4:], t[..., :4]), -1) * self.sin for t in (q, k))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=0.4)
        return self.o(y.transpose(1, 2).reshape(b, n, -1))

    def reference(self, keep, x):
        cos, sin, first, second = self.cos[:, :4], self.sin[:, :4], [0, 1, 2, 3], [4, 5, 6, 7]
        q, k = (rotated(heads_of(f(x), 2), cos, sin, keep["pair"], first, second) for f in (self.q, self.k))
        y = attend(q, k, heads_of(self.v(x), 2), 0.4, causal=True)
        return self.o(on(joined(y), both(keep["h"], keep["v"])))


class RotaryInterleaved(Case):
    """Neighbours 2j and 2j + 1 are a pair (GPT-J)."""

    units = {
        "h": U("q.weight", 0, prod((2, 4, 2), 0)),
        "pair": U("q.weight", 0, prod((2, 4, 2), 1)),
        "v": U("v.weight", 0, prod((2, 3), 1)),
    }
    shapes = TOKENS

    def __init__(self):
        super().__init__()
        self.q, self.k, self.v, self.o = nn.Linear(6, 16), nn.Linear(6, 16), nn.Linear(6, 6), nn.Linear(6, 6)
        angles = torch.outer(torch.arange(5.0), torch.tensor([1.0, 0.41, 0.13, 0.05]))
        self.register_buffer("cos", angles.cos())
        self.register_buffer("sin", angles.sin())

    def rotate(self, x):
        even, odd = x[..., ::2], x[..., 1::2]
        return torch.stack((even * self.cos - odd * self.sin, odd * self.cos + even * self.sin), -1).flatten(-2)

    def forward(self, x):
        b, n, _ = x.shape
        q, k, v = (f(x).unflatten(-1, (2, -1)).transpose(1, 2) for f in (self.q, self.k, self.v))
        y = F.scaled_dot_product_attention(self.rotate(q), self.rotate(k), v, scale=0.4)
        return self.o(y.transpose(1, 2).reshape(b, n, -1))

    def reference(self, keep, x):
        first, second = [0, 2, 4, 6], [1, 3, 5, 7]
        q, k = (rotated(heads_of(f(x), 2), self.cos, self.sin, keep["pair"], first, second) for f in (self.q, self.k))
        y = attend(q, k, heads_of(self.v(x), 2), 0.4)
        return self.o(on(joined(y), both(keep["h"], keep["v"])))


class PositionTable(Case):
    """A bare buffer (1, N, width) added to the stream must lose the same places."""

    units = {"stream": U("embed.weight", 0, 8), "table": U("table", 2, 8)}
    shapes = TOKENS

    def __init__(self):
        super().__init__()
        self.embed, self.head = nn.Linear(6, 8), nn.Linear(8, 3)
        self.register_buffer("table", torch.randn(1, 9, 8))

    def forward(self, x):
        x = self.embed(x)
        return self.head((x + self.table[:, : x.shape[1]]).relu())

    def reference(self, keep, x):
        assert torch.equal(keep["stream"], keep["table"])
        return self.head(on((self.embed(x) + self.table[:, :5]).relu(), keep["stream"]))


class LinearAttention(Case):
    """Kernelised attention: keys and values are summed over tokens first, no softmax over tokens."""

    units = {
        "h": U("q.weight", 0, prod((2, 4), 0)),
        "qk": U("q.weight", 0, prod((2, 4), 1)),
        "v": U("v.weight", 0, prod((2, 3), 1)),
    }
    shapes = TOKENS

    def __init__(self):
        super().__init__()
        self.q, self.k, self.v, self.o = nn.Linear(6, 8), nn.Linear(6, 8), nn.Linear(6, 6), nn.Linear(6, 6)

    def forward(self, x):
        b, n, _ = x.shape
        q, k = (F.elu(f(x).view(b, n, 2, 4)) + 1 for f in (self.q, self.k))
        kv = torch.einsum("bnhd,bnhe->bhde", k, self.v(x).view(b, n, 2, 3))
        z = 1 / (torch.einsum("bnhd,bhd->bnh", q, k.sum(1)) + 1e-6)
        return self.o(torch.einsum("bnhd,bhde,bnh->bnhe", q, kv, z).reshape(b, n, 6))

    def reference(self, keep, x):
        q, k = (on(F.elu(heads_of(f(x), 2)) + 1, keep["qk"]) for f in (self.q, self.k))
        weights = q @ k.transpose(2, 3)
        y = weights @ heads_of(self.v(x), 2) / (weights.sum(-1, keepdim=True) + 1e-6)
        return self.o(on(joined(y), both(keep["h"], keep["v"])))


class CosineAttention(Case):
    """Swin v2: normalised queries and keys, a raw (heads, 1, 1) parameter as temperature, a bias per head."""

    units = {"h": U("qkv.weight", 0, prod((3, 3, 4), 1)), "d": U("qkv.weight", 0, prod((3, 3, 4), 2))}
    shapes = TOKENS

    def __init__(self):
        super().__init__()
        self.qkv, self.o = nn.Linear(6, 36), nn.Linear(12, 6)
        self.temperature, self.bias = nn.Parameter(torch.zeros(3, 1, 1)), nn.Parameter(torch.zeros(3, 5, 5))

    def forward(self, x):
        b, n, _ = x.shape
        qkv = self.qkv(x).view(b, n, 3, 3, 4).permute(2, 0, 3, 1, 4)
        q, k, v = qkv[0], qkv[1], qkv[2]
        a = F.normalize(q, dim=-1) @ F.normalize(k, dim=-1).transpose(-2, -1) * self.temperature.exp()
        return self.o(((a + self.bias.unsqueeze(0)).softmax(-1) @ v).transpose(1, 2).reshape(b, n, 12))

    def reference(self, keep, x):
        q, k, v = (on(heads_of(part, 3), keep["d"]) for part in self.qkv(x).split(12, -1))
        q, k = q / (q**2).sum(-1, keepdim=True).sqrt(), k / (k**2).sum(-1, keepdim=True).sqrt()
        a = (q @ k.transpose(2, 3) * self.temperature.exp() + self.bias).softmax(-1)
        return self.o(on(joined(a @ v), both(keep["h"], keep["d"])))


CASES = (
    RotaryHalves, RotaryTables, RotaryInterleaved, PositionTable, LinearAttention, CosineAttention,
)  # fmt: skip
