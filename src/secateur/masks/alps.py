"""ALPS (Meng et al. 2024, "ALPS: Improved Optimization for Highly Sparse One-Shot Pruning for Large Language Models").

The mask and the weights are found together by ADMM: B fits the output, D obeys the pattern, V is what still lies between them.

    B = (A + rho I)^-1 (G - V + rho D);   D = project(B + V / rho);   V += rho (B - D)

A is H scaled to a unit diagonal and G = A B_dense. rho grows while the support still changes. Then the weights are refitted
on the support.
"""

from __future__ import annotations

import torch
from torch import Tensor

from secateur.masks.problem import Problem, Solution, masked
from secateur.masks.refit import refit
from secateur.pattern import kept

ROUNDS = 300
EVERY = 3  # rounds between two looks at the support
START = 0.1  # rho


def alps(p: Problem, rounds: int = ROUNDS) -> Solution:
    """
    Raises:
        DataError: nothing is known of the inputs.
        PlanError: the pattern does not fit the matrix.
    """
    p = p.without_dead()
    gram = p.gram.clone()
    mean = float(gram.diagonal().mean())
    gram.diagonal().add_(p.damp * mean if mean > 0 else 1.0)
    s = gram.diagonal().sqrt()
    a, dense = gram / s / s[:, None], p.w * s
    stays = _support(p, a, dense, rounds)
    start = torch.where(stays, p.w, torch.zeros((), dtype=p.w.dtype))
    return masked(refit(p.w, gram, start, stays), stays, p.damp)


def _support(p: Problem, a: Tensor, dense: Tensor, rounds: int) -> Tensor:
    """The mask that ADMM settles on."""
    values, vectors = torch.linalg.eigh(a.double())
    values, vectors = values.clamp_min(0).to(a.dtype), vectors.to(a.dtype)
    goal = dense @ a
    size = kept(p.pattern, (dense.shape[0], dense.shape[1]), p.keep)
    zero = torch.zeros((), dtype=a.dtype)
    rho, grown = START, False
    stays = p.choose(dense.square())
    d, v = torch.where(stays, dense, zero), torch.zeros_like(dense)
    seen, b = stays, dense
    for i in range(1, rounds + 1):
        b = ((goal - v + rho * d) @ vectors / (values + rho)) @ vectors.mT
        stays = p.choose((b + v / rho).square())
        d = torch.where(stays, b + v / rho, zero)
        v = v + rho * (b - d)
        if i % EVERY:
            continue
        changed = int((stays ^ seen).sum()) // 2
        seen = stays
        if i >= 10 * EVERY and changed < 0.0003 * size:
            break
        factor = 1.3 if changed > 0.1 * size else 1.2 if changed > 0.005 * size else 1.1 if changed else 0.0
        if factor:
            rho, grown = rho * factor, True
        elif grown:
            break
        else:  # nothing moved yet: rho is too large to begin with
            rho /= 5
            stays = p.choose(dense.square())
            d, v, seen = torch.where(stays, dense, zero), torch.zeros_like(dense), stays
    return p.choose(b.square())
