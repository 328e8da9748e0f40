"""Slow, obvious tensor code the hand-written references share: masking, and reductions over kept positions only."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def on(x: Tensor, keep: Tensor, dim: int = -1) -> Tensor:
    """`x` with the positions of `dim` that `keep` drops set to zero."""
    shape = [1] * x.ndim
    shape[dim] = -1
    return x * keep.to(x.dtype).view(shape)


def both(*keeps: Tensor) -> Tensor:
    """The flat mask of a row-major product of axes: a position stays if it stays in every factor."""
    flat = keeps[0]
    for keep in keeps[1:]:
        flat = (flat[:, None] & keep[None, :]).flatten()
    return flat


def kept_mean(x: Tensor, keep: Tensor, dim: int = -1) -> Tensor:
    """Mean over the kept positions of `dim`, that dimension left with size 1."""
    return on(x, keep, dim).sum(dim, keepdim=True) / keep.sum()


def kept_layer_norm(x: Tensor, keep: Tensor, weight: Tensor, bias: Tensor, eps: float = 1e-5) -> Tensor:
    """LayerNorm over the last dimension as if the dropped positions did not exist; they come out as zero."""
    centred = x - kept_mean(x, keep)
    variance = kept_mean(centred**2, keep)
    return on(centred / (variance + eps).sqrt() * weight + bias, keep)


def kept_rms_norm(x: Tensor, keep: Tensor, weight: Tensor, eps: float = 1e-6) -> Tensor:
    """RMSNorm over the kept positions of the last dimension; dropped ones come out as zero."""
    return on(x / (kept_mean(x**2, keep) + eps).sqrt() * weight, keep)


def kept_softmax(x: Tensor, keep: Tensor, dim: int = -1) -> Tensor:
    """Softmax over the kept positions of `dim`; dropped ones come out as zero."""
    shape = [1] * x.ndim
    shape[dim] = -1
    return x.masked_fill(~keep.view(shape), -math.inf).softmax(dim)


def attend(q: Tensor, k: Tensor, v: Tensor, scale: float, causal: bool = False) -> Tensor:
    """softmax(q kᵀ · scale) v over the last two dimensions (tokens, features), written out."""
    scores = q @ k.transpose(-2, -1) * scale
    if causal:
        n = scores.shape[-1]
        scores = scores.masked_fill(torch.ones(n, n, dtype=torch.bool).triu(1), -math.inf)
    return scores.softmax(-1) @ v
