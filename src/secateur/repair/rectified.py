"""Fits that look through a following ReLU: where the dense network gives nothing, any negative value is right.

    minimise E|relu(y + o) - relu(t)|^2,   y = W x + b,   o: what already arrives at the addition, if there is one

through a convex bound on it: (y + o - t)^2 where t > 0, relu(y + o)^2 elsewhere. With the targets t' = t where t > 0, and
min(y + o, 0) elsewhere, every least-squares step lowers that bound (the asymmetric reconstruction of Zhang et al. 2015,
"Accelerating very deep convolutional networks"); whether the error itself fell is measured on held-out rows.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor

from secateur.calibrate.moments import Moments
from secateur.repair.fit import Affine
from secateur.repair.solve import factor

BYTES = 2**26  # of sampled rows kept per layer
ROUNDS = 8


@dataclass
class Rows:
    """A sample of the rows that went into moments, for what moments cannot say."""

    x: list[Tensor] = field(default_factory=list)
    t: list[Tensor] = field(default_factory=list)
    o: list[Tensor] = field(default_factory=list)
    chunks: list[int] = field(default_factory=list)
    size: int = 0
    limit: int = BYTES

    def add(self, x: Tensor, t: Tensor, o: Tensor | None, share: float, chunk: int = 0) -> None:
        """Keep `share` of the rows of x (groups, rows, features), t and o (groups, rows, outputs), drawn at random; they are of `chunk`.
        Every so many would be the same few columns of each image, where the step divides its width."""
        n = math.ceil(x.shape[1] / math.ceil(1 / max(share, 1e-9)))
        some = torch.randperm(x.shape[1], generator=torch.Generator().manual_seed(chunk))[:n].sort()[0]
        x, t = x[:, some].float(), t[:, some].float()
        o = torch.zeros_like(t) if o is None else o[:, some].float()
        if not self.x or self.size + 4 * (x.numel() + t.numel()) <= self.limit:
            self.x.append(x)
            self.t.append(t + o)
            self.o.append(o)
            self.chunks.append(chunk)
            self.size += 4 * (x.numel() + 2 * t.numel())

    def joined(self) -> tuple[Tensor, Tensor, Tensor]:
        return torch.cat(self.x, 1), torch.cat(self.t, 1), torch.cat(self.o, 1)


def rectified_error(fit: Affine, x: Tensor, t: Tensor, o: Tensor, outputs: Tensor) -> float:
    """E|relu(t) - relu(y + o)|^2 over the outputs that stay."""
    y = torch.baddbmm(o + fit.b[:, None].float(), x, fit.w.mT.float())
    each = ((y.relu() - t.relu()) ** 2).mean(1).double()
    return float(each[outputs].sum())


def rectified(m: Moments, start: Affine, inputs: Tensor, rows: Rows, ridge: float, rounds: int = ROUNDS) -> Affine:
    """Improve a least-squares fit (with a bias) for what comes after the ReLU."""
    a, b, _ = m.central()
    s = torch.nonzero(inputs)[:, 0]
    lower, lam = factor(a[:, s][:, :, s], ridge)
    x_mean, t_mean = m.mean()
    x, t, o = rows.joined()
    x = x[:, :, s]
    centred = x - x_mean[:, None, s].float()
    prior = start.w.mT[:, s]  # the ridge holds on to the fit it starts from
    w, bias = start.w[:, :, s], start.b
    negative = t <= 0
    for _ in range(rounds):
        y = torch.baddbmm(o + bias[:, None].float(), x, w.mT.float())
        shift = torch.where(negative, y.clamp_max(0) - t, torch.zeros((), dtype=t.dtype))  # t' - t
        mean = shift.mean(1).double()
        extra = torch.bmm(centred.mT, shift).double() / shift.shape[1]
        w = torch.cholesky_solve(b[:, s] + extra + lam * prior, lower).mT
        bias = t_mean + mean - (w @ x_mean[:, s, None])[..., 0]
    full = torch.zeros_like(start.w)
    full[:, :, s] = w
    return Affine(full, bias)
