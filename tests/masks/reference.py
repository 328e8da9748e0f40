"""Slow and obvious twins of the methods, one weight at a time, in float64."""

import itertools

import torch


def least_squares_on(w, h, stays):
    """Each row's best weights on its support, by a dense solve."""
    new = torch.zeros_like(w)
    for r in range(len(w)):
        s = stays[r].nonzero()[:, 0]
        new[r, s] = torch.linalg.solve(h[s][:, s], (h @ w[r])[s])
    return new


def row_error(w, h, stays):
    d = w - least_squares_on(w[None], h, stays[None])[0]
    return float(d @ h @ d)


def greedy(w, h, remove):
    """One row: weights go one after the other, each time the one whose loss, with all others refitted, is least."""
    stays, order = torch.ones(len(w), dtype=torch.bool), []
    for _ in range(remove):
        best = None
        for j in stays.nonzero()[:, 0].tolist():
            stays[j] = False
            found = row_error(w, h, stays)
            stays[j] = True
            if best is None or found < best[0]:
                best = (found, j)
        stays[best[1]] = False
        order.append(best[1])
    return order


def sparsegpt(w, h, keep, at_once):
    """Columns from left to right; every removal is made up for by a dense solve over the columns behind."""
    w, (rows, cols) = w.clone(), w.shape
    stays = torch.ones(rows, cols, dtype=torch.bool)
    for start in range(0, cols, at_once):
        end = min(cols, start + at_once)
        score = torch.stack([w[:, j] ** 2 / torch.linalg.inv(h[j:, j:])[0, 0] for j in range(start, end)], 1)
        ranked = sorted(itertools.product(range(rows), range(end - start)), key=lambda p: (-float(score[p]), p))
        stays[:, start:end] = False
        for r, j in ranked[: int(score.numel() * keep)]:
            stays[r, start + j] = True
        for j in range(start, end):
            for r in range(rows):
                if not stays[r, j]:
                    z = torch.linalg.inv(h[j:, j:])
                    w[r, j:] -= w[r, j] / z[0, 0] * z[0]
                    w[r, j] = 0.0
    return w, stays
