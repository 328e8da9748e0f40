"""The best weights for a mask that is given.

    minimise over W' with W' = 0 where the mask says so   tr((W - W') H (W - W')^T)

Every row has a least-squares problem of its own on the weights that stay, H_SS w' = (H w^T)_S. All rows are solved at once by
conjugate gradients whose residual is masked, preconditioned by the diagonal of H. The start is the better of what is given,
so the error never rises.
"""

from __future__ import annotations

import torch
from torch import Tensor

STEPS = 100
TOLERANCE = 1e-5  # of the residual's norm relative to that of the right side


def refit(w: Tensor, h: Tensor, start: Tensor, stays: Tensor, steps: int = STEPS, tolerance: float = TOLERANCE) -> Tensor:
    """
    Args:
        w: (rows, cols), the dense weights (or whatever the output should be that of).
        h: (cols, cols), positive semidefinite.
        start: (rows, cols), zero outside the mask.
        stays: bool (rows, cols).

    Returns (rows, cols): zero outside the mask, every row at least as good as `start`.
    """
    zero = torch.zeros((), dtype=w.dtype, device=w.device)
    diagonal = h.diagonal()
    scale = torch.where(diagonal > 0, diagonal, torch.ones_like(diagonal))
    goal = w @ h
    x = start.clone()
    r = torch.where(stays, goal - x @ h, zero)
    enough = tolerance * torch.where(stays, goal, zero).norm(dim=1).clamp_min(torch.finfo(w.dtype).tiny)
    z = r / scale
    d, rz = z.clone(), (r * z).sum(1)
    for _ in range(steps):
        going = (r.norm(dim=1) > enough) & (rz > 0)
        if not bool(going.any()):
            break
        hd = torch.where(stays, d @ h, zero)
        curvature = (d * hd).sum(1)
        length = torch.where(going & (curvature > 0), rz / curvature.clamp_min(torch.finfo(w.dtype).tiny), zero)[:, None]
        x += length * d
        r -= length * hd
        z = r / scale
        new = (r * z).sum(1)
        d = z + torch.where(rz > 0, new / rz.clamp_min(torch.finfo(w.dtype).tiny), zero)[:, None] * d
        rz = new
    better = each_error(w, x, h) <= each_error(w, start, h)
    return torch.where(better[:, None], x, start)


def each_error(w: Tensor, new: Tensor, h: Tensor) -> Tensor:
    """The squared error of each output: (rows,)."""
    d = w - new
    return ((d @ h) * d).sum(1)
