"""Attention with one projection per role or fused, sdpa, einsum, nn.MultiheadAttention, grouped queries."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from .harness import Case, U, prod
from .masks import attend, both, on

TOKENS = ((2, 5, 6),)


def heads_of(x: torch.Tensor, heads: int) -> torch.Tensor:
    """(B, N, h·d) as (B, h, N, d)."""
    return x.view(x.shape[0], x.shape[1], heads, -1).transpose(1, 2)


def joined(x: torch.Tensor) -> torch.Tensor:
    """(B, h, N, d) as (B, N, h·d)."""
    return x.transpose(1, 2).flatten(2)


def masked_attention(q, k, v, keep, scale, causal=False):
    """Attention of (B, h, N, d) tensors without the query/key places `qk`, the value places `v` and the heads `h`."""
    out = attend(on(q, keep["qk"]), k, on(v, keep["v"]), scale, causal)
    return on(joined(out), both(keep["h"], keep["v"]))


def kept_scale(keep) -> torch.Tensor:
    """1/sqrt(number of kept query/key places): what sdpa divides by when those places are gone."""
    return keep["qk"].sum().to(torch.float64) ** -0.5


class SeparateSDPA(Case):
    """12 = 3 heads of 4; the default scale of sdpa follows the kept places."""

    units = {
        "h": U("q.weight", 0, prod((3, 4), 0)),
        "qk": U("q.weight", 0, prod((3, 4), 1)),
        "v": U("v.weight", 0, prod((3, 4), 1)),
    }
    fixed = (("o.weight", 0),)
    shapes = TOKENS

    def __init__(self):
        super().__init__()
        self.heads = 3
        self.q, self.k, self.v, self.o = nn.Linear(6, 12), nn.Linear(6, 12), nn.Linear(6, 12), nn.Linear(12, 6)

    def forward(self, x):
        b, n, _ = x.shape
        q, k, v = (f(x).view(b, n, self.heads, -1).transpose(1, 2) for f in (self.q, self.k, self.v))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return x + self.o(y.transpose(1, 2).reshape(b, n, -1))

    def reference(self, keep, x):
        q, k, v = heads_of(self.q(x), 3), heads_of(self.k(x), 3), heads_of(self.v(x), 3)
        return x + self.o(masked_attention(q, k, v, keep, kept_scale(keep), causal=True))


class ManualScale(Case):
    """The scale is a number in an attribute, the head size another: the number stays what it is."""

    units = SeparateSDPA.units
    shapes = TOKENS

    def __init__(self):
        super().__init__()
        self.heads, self.hd, self.scale = 3, 4, 0.5
        self.q, self.k, self.v, self.o = nn.Linear(6, 12), nn.Linear(6, 12), nn.Linear(6, 12), nn.Linear(12, 6)

    def forward(self, x):
        b, n = x.shape[:2]
        q = self.q(x).reshape(b, n, self.heads, self.hd).permute(0, 2, 1, 3) * self.scale
        k = self.k(x).reshape(b, n, self.heads, self.hd).permute(0, 2, 3, 1)
        v = self.v(x).reshape(b, n, self.heads, self.hd).permute(0, 2, 1, 3)
        y = torch.matmul(torch.matmul(q, k).softmax(dim=-1), v)
        return self.o(y.transpose(1, 2).contiguous().view(b, n, self.heads * self.hd))

    def reference(self, keep, x):
        q, k, v = heads_of(self.q(x), 3), heads_of(self.k(x), 3), heads_of(self.v(x), 3)
        return self.o(masked_attention(q, k, v, keep, 0.5))


class FusedView(Case):
    """qkv as one Linear viewed (3, heads, d): the places of q, k and v are one axis."""

    units = {"h": U("qkv.weight", 0, prod((3, 3, 4), 1)), "qk": U("qkv.weight", 0, prod((3, 3, 4), 2))}
    shapes = TOKENS

    def __init__(self):
        super().__init__()
        self.num_heads, self.head_dim = 3, 4
        self.qkv, self.proj = nn.Linear(6, 36), nn.Linear(12, 6)

    def forward(self, x):
        b, n, _ = x.shape
        qkv = self.qkv(x).reshape(b, n, 3, self.num_heads, self.head_dim).permute(2, 0, 3, 1, 4)
        q, k, v = qkv.unbind(0)
        y = F.scaled_dot_product_attention(q, k, v)
        return self.proj(y.transpose(1, 2).reshape(b, n, self.num_heads * self.head_dim))

    def reference(self, keep, x):
        q, k, v = (heads_of(part, 3) for part in self.qkv(x).split(12, -1))
        return self.proj(masked_attention(q, k, v, dict(keep, v=keep["qk"]), kept_scale(keep)))


class FusedChunk(Case):
    """qkv as one Linear cut in three: the value places are free of the query places."""

    units = {
        "h": U("qkv.weight", 0, prod((3, 3, 4), 1)),
        "qk": U("qkv.weight", 0, [row[:6] for row in prod((3, 3, 4), 2)]),
        "v": U("qkv.weight", 0, prod((3, 4), 1, start=24)),
    }
    shapes = TOKENS

    def __init__(self):
        super().__init__()
        self.qkv, self.proj = nn.Linear(6, 36, bias=False), nn.Linear(12, 6)

    def forward(self, x):
        b, n, _ = x.shape
        q, k, v = (t.view(b, n, 3, 4).transpose(1, 2) for t in self.qkv(x).chunk(3, dim=-1))
        y = F.scaled_dot_product_attention(q, k, v, scale=0.3)
        return self.proj(y.transpose(1, 2).reshape(b, n, 12))

    def reference(self, keep, x):
        q, k, v = (heads_of(part, 3) for part in self.qkv(x).split(12, -1))
        return self.proj(masked_attention(q, k, v, keep, 0.3))


class Multihead(Case):
    """`nn.MultiheadAttention` with its packed in_proj_weight, which asserts its own sizes."""

    units = {
        "h": U("attn.in_proj_weight", 0, prod((3, 2, 3), 1)),
        "qk": U("attn.in_proj_weight", 0, prod((3, 2, 3), 2)),
    }
    shapes = TOKENS

    def __init__(self):
        super().__init__()
        self.attn, self.n = nn.MultiheadAttention(6, 2, batch_first=True), nn.LayerNorm(6)

    def forward(self, x):
        return self.n(x + self.attn(x, x, x, need_weights=False)[0])

    def reference(self, keep, x):
        qkv = x @ self.attn.in_proj_weight.t() + self.attn.in_proj_bias
        q, k, v = (heads_of(part, 2) for part in qkv.split(6, -1))
        y = masked_attention(q, k, v, dict(keep, v=keep["qk"]), kept_scale(keep))
        return self.n(x + self.attn.out_proj(y))


class MultiheadCross(Case):
    """Queries and keys of different widths: separate projections inside `nn.MultiheadAttention`."""

    units = {
        "h": U("attn.q_proj_weight", 0, prod((2, 3), 0)),
        "qk": U("attn.q_proj_weight", 0, prod((2, 3), 1)),
        "v": U("attn.v_proj_weight", 0, prod((2, 3), 1)),
    }
    shapes = ((2, 5, 6), (2, 4, 7))

    def __init__(self):
        super().__init__()
        self.attn = nn.MultiheadAttention(6, 2, kdim=7, vdim=7, batch_first=True)

    def forward(self, x, memory):
        return self.attn(x, memory, memory, need_weights=False)[0]

    def reference(self, keep, x, memory):
        a = self.attn
        bq, bk, bv = a.in_proj_bias.split(6)
        q = heads_of(x @ a.q_proj_weight.t() + bq, 2)
        k, v = heads_of(memory @ a.k_proj_weight.t() + bk, 2), heads_of(memory @ a.v_proj_weight.t() + bv, 2)
        return a.out_proj(masked_attention(q, k, v, keep, kept_scale(keep)))


class EinsumAttention(Case):
    """Weights with a dimension each for model, head and place, everything by einsum."""

    units = {"h": U("wq", 1, 3), "qk": U("wq", 2, 4), "v": U("wv", 2, 5)}
    fixed = (("wq", 0), ("wo", 2))
    shapes = TOKENS

    def __init__(self):
        super().__init__()
        self.wq, self.wk = nn.Parameter(torch.zeros(6, 3, 4)), nn.Parameter(torch.zeros(6, 3, 4))
        self.wv, self.wo = nn.Parameter(torch.zeros(6, 3, 5)), nn.Parameter(torch.zeros(3, 5, 6))

    def forward(self, x):
        q, k = torch.einsum("bnd,dhk->bhnk", x, self.wq), torch.einsum("bnd,dhk->bhnk", x, self.wk)
        a = torch.einsum("bhnk,bhmk->bhnm", q, k).softmax(-1)
        y = torch.einsum("bhnm,bmhv->bnhv", a, torch.einsum("bmd,dhv->bmhv", x, self.wv))
        return torch.einsum("bnhv,hvd->bnd", y, self.wo)

    def reference(self, keep, x):
        q, k, v = (torch.stack([x @ w[:, h] for h in range(3)], 1) for w in (self.wq, self.wk, self.wv))
        y = masked_attention(q, k, v, keep, 1.0)
        return y @ self.wo.flatten(0, 1)


class GroupedQueries(Case):
    """2 key/value heads serve 3 queries each by repeat_interleave: queries k·r·d, keys k·d."""

    units = {
        "h": U("k.weight", 0, prod((2, 4), 0)),
        "r": U("q.weight", 0, prod((2, 3, 4), 1), must=False),
        "qk": U("k.weight", 0, prod((2, 4), 1)),
        "v": U("v.weight", 0, prod((2, 4), 1)),
    }
    shapes = TOKENS

    def __init__(self):
        super().__init__()
        self.q, self.k = nn.Linear(6, 24, bias=False), nn.Linear(6, 8, bias=False)
        self.v, self.o = nn.Linear(6, 8, bias=False), nn.Linear(24, 6, bias=False)
        self.kv_heads, self.repeats, self.head_dim = 2, 3, 4

    def wide(self, t):
        return torch.repeat_interleave(t, self.repeats, dim=1)

    def forward(self, x):
        b, n, _ = x.shape
        q = self.q(x).view(b, n, -1, self.head_dim).transpose(1, 2)
        k = self.k(x).view(b, n, self.kv_heads, self.head_dim).transpose(1, 2)
        v = self.v(x).view(b, n, self.kv_heads, self.head_dim).transpose(1, 2)
        y = F.scaled_dot_product_attention(q, self.wide(k), self.wide(v), scale=0.5)
        return self.o(y.transpose(1, 2).reshape(b, n, -1))

    def reference(self, keep, x):
        q, k, v = heads_of(self.q(x), 6), heads_of(self.k(x), 2), heads_of(self.v(x), 2)
        outs = [attend(on(q[:, i], keep["qk"]), k[:, i // 3], v[:, i // 3], 0.5) for i in range(6)]
        return self.o(on(torch.cat(outs, -1), both(keep["h"], keep["r"], keep["v"])))


class GroupedQueriesExpand(GroupedQueries):
    """The same by Hugging Face's `repeat_kv`: expand a new dimension, then reshape it away."""

    def wide(self, t):
        b, heads, n, d = t.shape
        return t[:, :, None, :, :].expand(b, heads, self.repeats, n, d).reshape(b, heads * self.repeats, n, d)


class GroupedQueriesNative(GroupedQueries):
    """The same by sdpa's own `enable_gqa`."""

    def forward(self, x):
        b, n, _ = x.shape
        q = self.q(x).view(b, n, 6, 4).transpose(1, 2)
        k, v = (f(x).view(b, n, 2, 4).transpose(1, 2) for f in (self.k, self.v))
        y = F.scaled_dot_product_attention(q, k, v, scale=0.5, enable_gqa=True)
        return self.o(y.transpose(1, 2).reshape(b, n, 24))


CASES = (
    SeparateSDPA, ManualScale, FusedView, FusedChunk, Multihead, MultiheadCross, EinsumAttention, GroupedQueries,
    GroupedQueriesExpand, GroupedQueriesNative,
)  # fmt: skip
