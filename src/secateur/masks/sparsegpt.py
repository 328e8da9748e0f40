"""SparseGPT (Frantar & Alistarh 2023, "SparseGPT: Massive Language Models Can Be Accurately Pruned in One-Shot").

Columns are decided from left to right; what the removal of a weight costs the output is made up for by the columns behind it.
With U the upper Cholesky factor of H^-1

    cost(w_oj) = w_oj^2 / U_jj^2;    after column j:  W_o,k>j -= (w_oj - w'_oj) / U_jj  U_jk

The mask of a whole set of columns is chosen at once, exactly so many weights; N:M masks are chosen group by group from the
weights as they are then.
"""

from __future__ import annotations

import torch
from torch import Tensor

from secateur.masks.problem import Problem, Solution, damped, inverse, masked
from secateur.pattern import NM

AT_ONCE = 128  # columns whose mask is chosen together


def sparsegpt(p: Problem, at_once: int = AT_ONCE) -> Solution:
    """
    Raises:
        DataError: nothing is known of the inputs, or their moments cannot be inverted.
        PlanError: the pattern does not fit the matrix.
    """
    p = p.without_dead()
    u, level = damped(p.gram, p.damp, p.name, _upper)
    w = p.w.clone()
    stays = torch.ones(w.shape, dtype=torch.bool, device=w.device)
    across = p.pattern.unit[1]
    step = max(across, at_once // across * across)
    for start in range(0, w.shape[1], step):
        _decide(p, w, stays, slice(start, min(w.shape[1], start + step)), u)
    return masked(w, stays, level)


def _decide(p: Problem, w: Tensor, stays: Tensor, cols: slice, u: Tensor) -> None:
    """Mask and new values of a set of columns, and the correction of all behind them, in place."""
    part, diagonal = u[cols, cols], u.diagonal()[cols]
    now, errors = w[:, cols].clone(), torch.zeros_like(w[:, cols])
    width = now.shape[1]
    grouped = isinstance(p.pattern, NM)
    fits = width >= p.pattern.unit[1]
    mask = torch.ones(now.shape, dtype=torch.bool, device=w.device)
    if fits and not grouped:
        mask = p.part(cols, now).choose((now / diagonal).square())
    for j in range(width):
        if grouped and j % p.pattern.unit[1] == 0 and j + p.pattern.unit[1] <= width:
            group = slice(j, j + p.pattern.unit[1])
            these = slice(cols.start + j, cols.start + j + p.pattern.unit[1])
            mask[:, group] = p.part(these, now[:, group]).choose((now[:, group] / diagonal[group]).square())
        gone = torch.where(mask[:, j], 0.0, now[:, j]) / diagonal[j]
        now[:, j:] -= gone[:, None] * part[j, j:]
        errors[:, j] = gone
    w[:, cols], stays[:, cols] = now, mask
    w[:, cols.stop :] -= errors @ u[cols, cols.stop :]


def _upper(a: Tensor) -> Tensor | None:
    """U with U^T U = a^-1."""
    z = inverse(a)
    del a
    if z is None:
        return None
    u, info = torch.linalg.cholesky_ex(z, upper=True)
    return None if int(info) else u
