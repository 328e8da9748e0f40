"""Optimal brain compression (Frantar & Alistarh 2022, "Optimal Brain Compression"): weights go one after the other, the
cheapest first, and after each the others of its row are corrected.

    cost(P) = W_P (Z_PP)^-1 W_P^T,   W -= W_P (Z_PP)^-1 Z_P:,   Z -= Z_:P (Z_PP)^-1 Z_P:,   Z = H^-1

P is one weight, or the columns of a block; rows that share blocks share Z. Each row is followed to its end; then the
cheapest removals of all rows go. Weights on the final mask are refitted, which is where the removals lead, but for rounding.
"""

from __future__ import annotations

import torch
from torch import Tensor

from secateur.errors import PlanError
from secateur.masks.problem import Problem, Solution, damped, inverse, masked
from secateur.masks.refit import refit
from secateur.pattern import NM, some, top, whole

LARGEST = 2304  # columns: the work grows with their third power for every row
ELEMENTS = 2**24  # of Z that are worked on together
SHRINK = 0.75  # of its columns alive: Z is gathered anew


def obc(p: Problem) -> Solution:
    """
    Raises:
        DataError: nothing is known of the inputs, or their moments cannot be inverted.
        PlanError: the layer has too many columns, or the pattern does not fit it.
    """
    n = p.w.shape[1]
    if n > LARGEST:
        raise PlanError(f"{p.name} has {n} inputs, and obc takes time that grows with their third power for every output: up to {LARGEST}.\n"
                        "  Use by='alps', which is about as exact.")  # fmt: skip
    p = p.without_dead()
    z, level = damped(p.gram, p.damp, p.name, inverse)
    stays = _removed_first(p, z.double())
    a = p.gram.clone()
    a.diagonal().add_(level * float(a.diagonal().mean()))
    return masked(refit(p.w, a, torch.where(stays, p.w, torch.zeros((), dtype=p.w.dtype)), stays), stays, level)


def _removed_first(p: Problem, z: Tensor) -> Tensor:
    down, across = (1, 1) if isinstance(p.pattern, NM) else p.pattern.unit
    rows, cols = whole(p.pattern, (p.w.shape[0], p.w.shape[1]))
    if not rows or not cols:
        return p.choose(p.w)  # raises, with the reason
    units, nm = cols // across, (p.pattern.n, p.pattern.of) if isinstance(p.pattern, NM) else None
    w = p.w[:rows].double().reshape(rows // down, down, -1)
    may = None if p.allowed is None else p.allowed[:rows, :cols].reshape(rows // down, down, units, across).any(3).any(1)
    cost = torch.zeros(rows // down, units, dtype=torch.float64)
    for part in torch.arange(rows // down).split(max(1, ELEMENTS // z.numel())):
        cost[part] = _trace(w[part], z, (units, across), nm, None if may is None else may[part])
    if isinstance(p.pattern, NM):
        picked = torch.isinf(cost)  # as many of each group as may stay were never removed
    elif p.pattern.per == "row":
        picked = top(cost, some(units, p.keep))
    else:
        picked = top(cost.reshape(-1), some(cost.numel(), p.keep)).reshape(cost.shape)
    stays = torch.ones(p.w.shape, dtype=torch.bool)
    stays[:rows, :cols] = picked.repeat_interleave(down, 0).repeat_interleave(across, 1)
    return stays if p.allowed is None else stays & p.allowed


def _trace(w: Tensor, z: Tensor, shape: tuple[int, int], nm: tuple[int, int] | None, may: Tensor | None) -> Tensor:
    """What each unit costs in its turn, always more than one that went before it: (groups of rows, units). Units of an N:M
    pattern that are never removed cost infinity.

    Args:
        w: (groups of rows, rows in a group, cols); z: (cols, cols); shape: units, and columns in each.
        nm: N and M, of an N:M pattern. may: units that may stay.
    """
    units, across = shape
    groups, over = len(w), w.shape[2] - units * across
    z, w = z.expand(groups, -1, -1).clone(), w.clone()
    index = torch.arange(groups)
    place = torch.arange(units * across).reshape(units, across).expand(groups, -1, -1).clone()  # of each unit's columns in w and z
    alive = torch.ones(groups, units, dtype=torch.bool)
    n, m = nm or (0, units)
    left = torch.full((groups, units // m), m)
    cost = torch.full((groups, units), torch.inf, dtype=torch.float64)
    last, more = torch.zeros(groups, dtype=torch.float64), torch.tensor(torch.inf, dtype=torch.float64)
    for _ in range(units // m * (m - n)):
        each = _costs(w, z, place, index)
        if may is not None:  # zeros that were there go first, at no cost
            each = torch.where(may, each, -1.0)
        each = torch.where(alive & (left > n).repeat_interleave(m, 1), each, torch.inf)
        unit = each.argmin(1)
        last = torch.maximum(torch.nextafter(last, more), each[index, unit])  # a little more, so that no two tie
        cost[index, unit] = last
        alive[index, unit] = False
        left[index, unit // m] -= 1
        _remove(w, z, place[index, unit], index)
        if across == 1 and w.shape[2] > 32 and int(alive[0].sum()) + over < SHRINK * w.shape[2]:
            w, z, place = _gathered(w, z, place, alive, over)
    return cost


def _costs(w: Tensor, z: Tensor, place: Tensor, index: Tensor) -> Tensor:
    """(groups, units); of units that are gone the numbers mean nothing."""
    groups, units, across = place.shape
    flat = place.reshape(groups, -1)
    mine = w.gather(2, flat[:, None].expand(-1, w.shape[1], -1)).reshape(groups, w.shape[1], units, across)
    if across == 1:
        return mine[..., 0].square().sum(1) / z.diagonal(dim1=1, dim2=2).gather(1, flat).clamp_min(1e-300)
    block = z[index[:, None, None, None], place[..., :, None], place[..., None, :]]
    rhs = mine.permute(0, 2, 3, 1)
    return (rhs * torch.linalg.solve(block, rhs)).sum((2, 3))


def _remove(w: Tensor, z: Tensor, gone: Tensor, index: Tensor) -> None:
    """Take columns (groups, n) out of w and z, in place."""
    rows = z.gather(1, gone[:, :, None].expand(-1, -1, z.shape[2]))  # Z_P:
    mine = w.gather(2, gone[:, None].expand(-1, w.shape[1], -1))
    if gone.shape[1] == 1:
        across = rows / rows.gather(2, gone[:, None]).clamp_min(1e-300)
    else:
        across = torch.linalg.solve(rows.gather(2, gone[:, None].expand(-1, gone.shape[1], -1)), rows)
    w.baddbmm_(mine, across, alpha=-1)
    z.baddbmm_(rows.mT, across, alpha=-1)
    w.scatter_(2, gone[:, None].expand(-1, w.shape[1], -1), 0.0)
    z.scatter_(1, gone[:, :, None].expand(-1, -1, z.shape[2]), 0.0)
    z.scatter_(2, gone[:, None].expand(-1, z.shape[1], -1), 0.0)
    z[index[:, None], gone, gone] = 1.0


def _gathered(w: Tensor, z: Tensor, place: Tensor, alive: Tensor, over: int) -> tuple[Tensor, Tensor, Tensor]:
    """w and z with the columns that are still there (single weights; as many in every group), and where units stand now.
    The last `over` columns belong to no unit and stay."""
    groups, n = len(w), int(alive[0].sum())
    units = alive.nonzero()[:, 1].reshape(groups, n)
    cols = place[..., 0].gather(1, units)
    if over:
        cols = torch.cat([cols, torch.arange(w.shape[2] - over, w.shape[2]).expand(groups, over)], 1)
    w = w.gather(2, cols[:, None].expand(-1, w.shape[1], -1))
    z = z.gather(1, cols[:, :, None].expand(-1, -1, z.shape[2])).gather(2, cols[:, None].expand(-1, cols.shape[1], -1))
    new = torch.zeros_like(place)
    new.scatter_(1, units[..., None], torch.arange(n).expand(groups, n)[..., None])
    return w, z, new
