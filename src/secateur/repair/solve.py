"""Ridge regression on moments, and the greedy elimination of its inputs.

    W' = (A_SS + lambda I)^-1 (B_S + lambda W0_S),   lambda = ridge * mean(diag A)

A and B are those of `secateur.calibrate.moments`, S the inputs that stay, W0 the weights before (so that where the data says
nothing, nothing changes).

Elimination (optimal brain surgeon: Hassibi & Stork 1993; per group of columns: Kurtic et al. 2023, "ZipLM"): with Z = A^-1
and W the least-squares solution, removing the columns P of one unit raises the squared error by

    cost(P) = tr(W_P^T (Z_PP)^-1 W_P);   then  W -= Z_:P (Z_PP)^-1 W_P,   Z -= Z_:P (Z_PP)^-1 Z_P:
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from secateur.errors import DataError

RIDGE = 1e-3
_TRIES = 6
_AT_ONCE = 64  # groups of more than 512 units lose up to 1/64 of what is left per step


def factor(a: Tensor, ridge: float) -> tuple[Tensor, float]:
    """Cholesky factor of a + lambda I, and lambda; lambda is raised tenfold until the factor exists.

    Raises:
        DataError: the moments are not finite, or no lambda helps.
    """
    mean = float(a.diagonal(dim1=-2, dim2=-1).mean())
    if not torch.isfinite(a).all():
        raise DataError("the moments of the layer's inputs are not finite.\n  Look for infinite or NaN activations on the calibration data.")
    lam = ridge * mean if mean > 0 else 1.0
    eye = torch.eye(a.shape[-1], dtype=a.dtype)
    for _ in range(_TRIES):
        lower, info = torch.linalg.cholesky_ex(a + lam * eye)
        if not bool((info > 0).any()):
            return lower, lam
        lam *= 10
    raise DataError(
        f"no ridge up to {lam / max(mean, 1e-300):.0e} of the mean variance makes the layer's {a.shape[-1]} x {a.shape[-1]} moments invertible.\n"
        "  Give more, or more varied, calibration data."
    )


def solve(a: Tensor, b: Tensor, prior: Tensor, ridge: float = RIDGE) -> Tensor:
    """(..., features, outputs) that minimises the ridge problem above. All arguments float64, batched alike."""
    if not a.shape[-1]:
        return b
    lower, lam = factor(a, ridge)
    return torch.cholesky_solve(b + lam * prior, lower)


@dataclass
class Problem:
    """One consumer in an elimination.

    Attributes:
        a: (features, features) moments; w: (features, outputs), the weights to start from.
        columns: (units, columns per unit) of `a`.
        scale: what one unit of squared error counts, so that several consumers can be added.
    """

    a: Tensor
    w: Tensor
    columns: Tensor
    scale: float = 1.0


class Elsewhere(Protocol):
    """A cost of units that is no least-squares problem of this kind (attention scores)."""

    columns: Tensor

    def begin(self, ridge: float) -> None: ...
    def costs(self, alive: Tensor) -> Tensor: ...
    def remove(self, gone: Tensor) -> None: ...


def eliminate(
    problems: Sequence[Problem], remove: int | None = None, ridge: float = RIDGE, others: Sequence[Elsewhere] = ()
) -> tuple[Tensor, Tensor]:
    """Remove units one after the other, cheapest first.

    Args:
        problems: every consumer of the units; their costs add up.
        remove: how many units go; all by default.
        others: further costs of the same units.

    Returns (order, error): the units as they go, int64, and the total squared error after each, float64. The errors
    of problems start at 0: they are what removing adds.
    """
    units = len((problems[0] if problems else others[0]).columns)
    for other in others:
        other.begin(ridge)
    remove = units if remove is None else remove
    states = []
    for p in problems:
        lower, _ = factor(p.a, ridge)
        states.append((torch.cholesky_inverse(lower), p.w.clone(), p.columns, p.scale))
    alive = torch.arange(units)
    order, errors, total = list[int](), list[float](), 0.0
    while len(order) < remove and len(alive):
        cost = torch.zeros(len(alive), dtype=torch.float64)
        for z, w, columns, scale in states:
            cost += scale * _costs(z, w, columns[alive])
        for other in others:
            cost += other.costs(alive)
        n = min(max(1, len(alive) // _AT_ONCE if units > 512 else 1), remove - len(order))
        first = torch.argsort(cost, stable=True)[:n]
        if n > 1:
            taken, each = _one_by_one(states, alive[first], float(cost[first[-1]]))
            first = first[taken]
        else:
            each = [float(cost[first])]
        gone = alive[first]
        for z, w, columns, _ in states:
            _downdate(z, w, columns[gone].reshape(-1))
        for other in others:
            other.remove(gone)
        for c in each:
            total += max(c, 0.0)
            errors.append(total)
        order += gone.tolist()
        left = torch.ones(len(alive), dtype=torch.bool)
        left[first] = False
        alive = alive[left]
    return torch.tensor(order, dtype=torch.int64), torch.tensor(errors, dtype=torch.float64)


def _one_by_one(states: Sequence[tuple[Tensor, Tensor, Tensor, float]], units: Tensor, most: float) -> tuple[list[int], list[float]]:
    """Of the cheapest units those that are still cheap when the ones before them went (of two equal units each is cheap
    only as long as the other is there): their places among `units`, and what each costs in its turn."""
    blocks = []
    for z, w, columns, scale in states:
        at = columns[units].reshape(-1)
        blocks.append((z[at][:, at], w[at], torch.arange(len(at)).reshape(len(units), -1), scale))
    taken: list[int] = []
    costs: list[float] = []
    for i in range(len(units)):
        cost = sum(scale * float(_costs(z, w, columns[i : i + 1])) for z, w, columns, scale in blocks)
        if not taken or cost <= 2 * most:
            taken.append(i)
            costs.append(cost)
            for z, w, columns, _ in blocks:
                _downdate(z, w, columns[i])
    return taken, costs


def _costs(z: Tensor, w: Tensor, columns: Tensor) -> Tensor:
    """tr(W_P^T (Z_PP)^-1 W_P) for every unit's columns P: (units,)."""
    rows = w[columns]
    if columns.shape[1] == 1:
        return (rows[:, 0] ** 2).sum(1) / z.diagonal()[columns[:, 0]].clamp_min(1e-300)
    block = z[columns[:, :, None], columns[:, None, :]]
    return (rows * torch.linalg.solve(block, rows)).sum((1, 2))


def _downdate(z: Tensor, w: Tensor, gone: Tensor) -> None:
    """Take columns out of the problem, in place; what is left of them is exactly nothing."""
    block = z[gone][:, gone]
    across = torch.linalg.solve(block, z[gone])  # (Z_PP)^-1 Z_P:
    change = torch.linalg.solve(block, w[gone])
    left = z[:, gone]
    w -= left @ change
    z -= left @ across
    w[gone] = 0
    z[gone] = 0
    z[:, gone] = 0
    z[gone, gone] = 1.0  # keeps the matrix invertible; its weights are 0
