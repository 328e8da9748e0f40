"""Small building blocks of random networks. Each takes `c` channels and two free choices, and says how many come out.

Image pieces map (B, c, H, W) to (B, out, H, W), token pieces (B, N, c) to (B, N, out); a vector is one token.
"""

from __future__ import annotations

from math import gcd

import torch
import torch.nn.functional as F
from torch import nn

WIDTHS = (4, 6, 8, 12)


class Piece(nn.Module):
    """`a` and `b` are free choices between 0 and 11; `out` is the number of channels that come out."""

    def __init__(self, c: int, a: int, b: int):
        super().__init__()
        self.out = c
        self.make(c, a, b)

    def make(self, c: int, a: int, b: int) -> None:
        """Create the layers for `c` channels and set `self.out`."""


def width(a: int) -> int:
    return WIDTHS[a % len(WIDTHS)]


# --- images ----------------------------------------------------------------------------------------------------------


class Conv(Piece):
    def make(self, c, a, b):
        self.out = width(a)
        self.conv, self.norm = nn.Conv2d(c, self.out, 3, padding=1, bias=b % 2 == 0), nn.BatchNorm2d(self.out)

    def forward(self, x):
        return self.norm(self.conv(x)).relu()


class Residual(Piece):
    def make(self, c, a, b):
        self.c1, self.n, self.c2 = nn.Conv2d(c, width(a), 1), nn.BatchNorm2d(width(a)), nn.Conv2d(width(a), c, 1)

    def forward(self, x):
        return x + self.c2(F.silu(self.n(self.c1(x))))


class ConcatBranches(Piece):
    def make(self, c, a, b):
        self.c1, self.c2 = nn.Conv2d(c, width(a), 1), nn.Conv2d(c, width(b), 3, padding=1)
        self.out = width(a) + width(b)

    def forward(self, x):
        return torch.cat([self.c1(x).relu(), self.c2(x).sigmoid()], 1)


class DenseStep(Piece):
    def make(self, c, a, b):
        self.conv, self.out = nn.Conv2d(c, 4, 1), c + 4

    def forward(self, x):
        return torch.cat([x, self.conv(x).relu()], 1)


class SplitBranches(Piece):
    """A part passes, a part is transformed, and they are put together again (CSP, Res2Net)."""

    def make(self, c, a, b):
        self.first = 1 + a % (c - 1)
        self.conv = nn.Conv2d(c - self.first, c - self.first, 1)

    def forward(self, x):
        y, z = x.split([self.first, x.shape[1] - self.first], 1)
        return torch.cat([y, self.conv(z).tanh()], 1)


class ChunkAdd(Piece):
    def make(self, c, a, b):
        self.conv, self.out = nn.Conv2d(c, 2 * width(a), 1), width(a)

    def forward(self, x):
        y, z = self.conv(x).chunk(2, 1)
        return y * z.sigmoid() if self.out % 4 else y + z.relu()


class Grouped(Piece):
    def make(self, c, a, b):
        groups = gcd(c, (2, 3, 4)[a % 3])
        self.out = groups * (2 + b % 3)
        self.conv = nn.Conv2d(c, self.out, 3, padding=1, groups=groups)

    def forward(self, x):
        return self.conv(x).relu()


class Depthwise(Piece):
    def make(self, c, a, b):
        self.out = c * (1 + b % 2)
        self.conv, self.norm = nn.Conv2d(c, self.out, 3, padding=1, groups=c), nn.BatchNorm2d(self.out)

    def forward(self, x):
        return F.relu6(self.norm(self.conv(x)))


class Shuffle(Piece):
    def make(self, c, a, b):
        self.groups = gcd(c, (2, 3, 4)[a % 3])

    def forward(self, x):
        b, c, h, w = x.shape
        return x.view(b, self.groups, c // self.groups, h, w).transpose(1, 2).reshape(b, c, h, w)


class Excite(Piece):
    def make(self, c, a, b):
        self.f1, self.f2 = nn.Conv2d(c, 4, 1), nn.Conv2d(4, c, 1)

    def forward(self, x):
        return x * self.f2(self.f1(F.adaptive_avg_pool2d(x, 1)).relu()).sigmoid()


class Norms(Piece):
    def make(self, c, a, b):
        self.norm = nn.GroupNorm(gcd(c, 1 + a % 4), c) if b % 2 else nn.InstanceNorm2d(c, affine=True)

    def forward(self, x):
        return self.norm(x)


class ChannelsLast(Piece):
    def make(self, c, a, b):
        self.norm, self.f1, self.f2 = nn.LayerNorm(c), nn.Linear(c, width(a)), nn.Linear(width(a), c)
        self.gamma = nn.Parameter(torch.ones(c))

    def forward(self, x):
        y = self.norm(x.permute(0, 2, 3, 1))
        y = self.f2(F.gelu(self.f1(y))) * self.gamma
        return x + y.permute(0, 3, 1, 2)


class Rearrange(Piece):
    """Flip, roll, zero padding or repetition of the channels."""

    def make(self, c, a, b):
        self.how, self.shift = a % 4, 1 + b % (c - 1)
        self.out = c + 3 if self.how == 2 else 2 * c if self.how == 3 else c

    def forward(self, x):
        if self.how == 0:
            return x.flip(1)
        if self.how == 1:
            return x.roll(self.shift, 1)
        return F.pad(x, (0, 0, 0, 0, 1, 2)) if self.how == 2 else x.repeat(1, 2, 1, 1)


class Upsample(Piece):
    """Pixel shuffle up, a transposed convolution's worth of channels down again."""

    def make(self, c, a, b):
        self.conv, self.out = nn.Conv2d(c, 4 * width(a), 1), width(a)

    def forward(self, x):
        return F.avg_pool2d(F.pixel_shuffle(self.conv(x), 2), 2)


# --- tokens ----------------------------------------------------------------------------------------------------------


class Dense(Piece):
    def make(self, c, a, b):
        self.out = width(a)
        self.f = nn.Linear(c, self.out, bias=b % 2 == 0)

    def forward(self, x):
        return F.gelu(self.f(x))


class Mlp(Piece):
    def make(self, c, a, b):
        self.norm = nn.LayerNorm(c) if b % 2 else nn.RMSNorm(c, eps=1e-6)
        self.f1, self.f2 = nn.Linear(c, width(a)), nn.Linear(width(a), c)

    def forward(self, x):
        return x + self.f2(self.f1(self.norm(x)).relu())


class Gated(Piece):
    def make(self, c, a, b):
        self.fused, n = b % 2, width(a)
        self.up = nn.Linear(c, 2 * n) if self.fused else nn.ModuleList([nn.Linear(c, n), nn.Linear(c, n)])
        self.down = nn.Linear(n, c)

    def forward(self, x):
        if self.fused:
            return x + self.down(F.glu(self.up(x), -1))
        return x + self.down(F.silu(self.up[0](x)) * self.up[1](x))


class Attention(Piece):
    """Separate projections, one viewed (3, h, d), or one cut in three; the residual around it."""

    def make(self, c, a, b):
        self.how, self.heads, self.hd = a % 3, 2 + b % 2, 3 + b % 3
        inner = self.heads * self.hd
        self.qkv = nn.ModuleList([nn.Linear(c, inner) for _ in range(3)]) if self.how == 0 else nn.Linear(c, 3 * inner)
        self.proj = nn.Linear(inner, c)

    def forward(self, x):
        b, n, _ = x.shape
        if self.how == 1:
            q, k, v = self.qkv(x).view(b, n, 3, self.heads, self.hd).permute(2, 0, 3, 1, 4).unbind(0)
        else:
            parts = [f(x) for f in self.qkv] if self.how == 0 else self.qkv(x).chunk(3, -1)
            q, k, v = (t.reshape(b, n, self.heads, self.hd).transpose(1, 2) for t in parts)
        y = F.scaled_dot_product_attention(q, k, v)
        return x + self.proj(y.transpose(1, 2).reshape(b, n, self.heads * self.hd))


class GroupedQuery(Piece):
    """Two key/value heads for four or six queries, with rotary halves."""

    def make(self, c, a, b):
        self.repeats, self.hd = 2 + a % 2, 4
        self.q, self.o = nn.Linear(c, 2 * self.repeats * 4, bias=False), nn.Linear(2 * self.repeats * 4, c)
        self.k, self.v = nn.Linear(c, 8, bias=False), nn.Linear(c, 8, bias=False)
        self.register_buffer("freq", torch.tensor([1.0, 0.3]))

    def forward(self, x):
        b, n, _ = x.shape
        angle = torch.arange(n)[:, None] * self.freq[None]
        angle = torch.cat([angle, angle], -1)
        q, k, v = (f(x).view(b, n, -1, self.hd).transpose(1, 2) for f in (self.q, self.k, self.v))
        q, k = (t * angle.cos() + torch.cat([-t[..., 2:], t[..., :2]], -1) * angle.sin() for t in (q, k))
        k, v = k.repeat_interleave(self.repeats, 1), v.repeat_interleave(self.repeats, 1)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return x + self.o(y.transpose(1, 2).reshape(b, n, -1))


class Recurrent(Piece):
    def make(self, c, a, b):
        both = a // 4 == 1
        self.out = width(a) * (2 if both else 1)
        self.rnn = (nn.LSTM if b % 2 else nn.GRU)(c, width(a), num_layers=1 + a // 8, bidirectional=both, batch_first=True)

    def forward(self, x):
        return self.rnn(x)[0]


class Parts(Piece):
    """Static slices of a Linear, multiplied pairwise or joined in another order."""

    def make(self, c, a, b):
        self.f, self.half, self.out = nn.Linear(c, 2 * width(a)), width(a), width(a) * (1 + b % 2)

    def forward(self, x):
        x = self.f(x)
        y, z = x[..., : self.half], x[..., self.half :]
        return y * z.tanh() if self.out == self.half else torch.cat([z, y], -1)


IMAGE = (
    Conv, Residual, ConcatBranches, DenseStep, SplitBranches, ChunkAdd, Grouped, Depthwise, Shuffle, Excite, Norms,
    ChannelsLast, Rearrange, Upsample,
)  # fmt: skip
TOKEN = (Dense, Mlp, Gated, Attention, GroupedQuery, Recurrent, Parts)
