"""SparseGPT (Frantar & Alistarh 2023, "SparseGPT: Massive Language Models Can Be Accurately Pruned in One-Shot").

Columns are decided from left to right; what the removal of a weight costs the output is made up for by the columns behind it.
With H = R R^T, R upper triangular, and U = R^-1 (the upper Cholesky factor of H^-1)

    cost(w_oj) = w_oj^2 / U_jj^2;    after column j:  W_o,k>j -= (w_oj - w'_oj) / U_jj  U_jk

U is not made: what all columns D before a set C have lost so far moves the weights of C by (W - W')_D R_DC (R_CC)^-1, so one
Cholesky factorisation is all that is needed, a quarter of the work of inverting H and factorising that.

The mask of a whole set of columns is chosen at once, exactly so many weights, and of all sets together as many as are asked for; N:M masks
are chosen group by group from the weights as they are then.
"""

from __future__ import annotations

import torch
from torch import Tensor

from secateur.masks.problem import Problem, Solution, damped, factor, masked
from secateur.pattern import NM, some_between

AT_ONCE = 128  # columns whose mask is chosen together


def sparsegpt(p: Problem, at_once: int = AT_ONCE) -> Solution:
    """
    Raises:
        DataError: nothing is known of the inputs, or their moments cannot be inverted.
        PlanError: the pattern does not fit the matrix.
    """
    p = p.without_dead()
    r, level = damped(p.gram, p.damp, p.name, _upper)
    new, gone = p.w.clone(), torch.zeros_like(p.w)
    stays = torch.ones(p.w.shape, dtype=torch.bool, device=p.w.device)
    across = p.pattern.unit[1]
    step = max(across, at_once // across * across)
    for start in range(0, p.w.shape[1], step):
        cols = slice(start, min(p.w.shape[1], start + step))
        u = torch.linalg.solve_triangular(r[cols, cols], torch.eye(cols.stop - start, dtype=r.dtype, device=r.device), upper=True)
        now = p.w[:, cols] + (gone[:, :start] @ r[:start, cols]) @ u
        count = None if isinstance(p.pattern, NM) else some_between(p.pattern, len(p.w), cols, p.keep)
        new[:, cols], stays[:, cols] = _decided(p.part(cols, now), u, count)
        gone[:, cols] = p.w[:, cols] - new[:, cols]
    return masked(new, stays, level)


def _decided(p: Problem, u: Tensor, count: int | None) -> tuple[Tensor, Tensor]:
    """New values and mask of a set of columns (rows, width), of which `count` units stay, with U (width, width) of them. One column after
    the other, so the work is done on the transpose, where a column lies in one piece."""
    now, mask = p.w.mT.contiguous(), torch.ones_like(p.w.mT, dtype=torch.bool)
    width, across = len(now), p.pattern.unit[1]
    grouped, diagonal = isinstance(p.pattern, NM), u.diagonal()[:, None]
    if width >= across and not grouped:
        mask[:] = p.choose((now / diagonal).square().mT, count).mT
    for j in range(width):
        if grouped and j % across == 0 and j + across <= width:
            group = slice(j, j + across)
            mask[group] = p.part(group, now[group].mT).choose((now[group] / diagonal[group]).square().mT).mT
        lost = torch.where(mask[j], 0.0, now[j]) / u[j, j]
        now[j:].addr_(u[j, j:], lost, alpha=-1)
    return now.mT, mask.mT


def _upper(a: Tensor) -> Tensor | None:
    """R, upper triangular, with R R^T = a: the lower factor of `a` with both axes reversed, reversed again."""
    lower = factor(a.flip(0, 1))
    return None if lower is None else lower.flip(0, 1)
