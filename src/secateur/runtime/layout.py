"""A sparse weight as the kernels read it: blocks of rows that share their columns, columns in sets that fit the cache.

    values  float32 (n, r)   of block after block, a column at a time
    index   int16 (n,)       the column within its set, as an unsigned number
    starts  int32 (sets * blocks + 1,)   where the columns of block b of set q begin: starts[q * blocks + b]
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

ROWS = (1, 4, 8)  # rows of a block that there are kernels for
# Work for one column of a block, relative to a single weight: one load feeds r multiplications.
COST = {1: 1.0, 4: 2.9, 8: 5.4}
SETS = {1: 128, 4: 768, 8: 768}  # columns of a linear layer: 64 floats of each are read from the first cache, or from the second
CHANNELS = {1: 32, 4: 512, 8: 512}  # of a convolution, whose taps read the same numbers
SPARSE = 0.25  # up to this density sets of single weights are twice as large: a short loop costs more than the second cache


def columns_of_set(weight: Tensor, r: int, taps: int = 1) -> int:
    """How many columns of a matrix (rows, channels * taps) suit one set."""
    size = SETS[r] if taps == 1 else CHANNELS[r] * taps
    if r == 1 and 0 < int((weight != 0).sum()) <= SPARSE * weight.numel():
        size *= 2
    return max(taps, min(size, 65536 // taps * taps))


@dataclass(frozen=True)
class Layout:
    """`rows`, `columns`: of the matrix; `r`: rows of a block; `set`: columns of a set."""

    values: Tensor
    index: Tensor
    starts: Tensor
    rows: int
    columns: int
    r: int
    set: int

    @classmethod
    def of(cls, weight: Tensor, r: int | None = None, size: int | None = None, taps: int = 1) -> Layout:
        """The layout of a matrix (rows, columns) with zeros in it.

        Args:
            r: rows of a block; None takes what should be quickest for these zeros.
            size: columns of a set, at most 65,536; None takes what suits.
            taps: columns that one channel has.
        """
        w = weight.detach().to(torch.float32)
        rows, columns = w.shape
        if r is None:
            r = min(ROWS, key=lambda n: COST[n] * int(_columns(w, n).sum()))
        size = min(size or columns_of_set(w, r, taps), 65536)
        there = _columns(w, r)
        sets = -(-columns // size)
        padded = torch.zeros(there.shape[0], sets * size, dtype=torch.bool)
        padded[:, :columns] = there
        q, b, k = padded.view(-1, sets, size).transpose(0, 1).nonzero(as_tuple=True)
        values = _blocks(w, r)[b, :, q * size + k]
        counts = torch.bincount(q * len(there) + b, minlength=sets * len(there))
        starts = torch.cat([torch.zeros(1, dtype=torch.long), counts.cumsum(0)]).to(torch.int32)
        return cls(values.contiguous(), k.to(torch.int32).to(torch.int16), starts, rows, columns, r, size)

    def places(self) -> tuple[Tensor, Tensor]:
        """(block, column) of every entry of `index`, int64 (n,)."""
        blocks = -(-self.rows // self.r)
        runs = torch.arange(len(self.starts) - 1, device=self.starts.device)
        run = torch.repeat_interleave(runs, self.starts.diff().long(), output_size=len(self.index))
        return run % blocks, run // blocks * self.set + (self.index.to(torch.int32) & 0xFFFF).long()

    def dense(self) -> Tensor:
        """The matrix (rows, columns) again, float32."""
        return dense(self.values, self.index, self.starts, (self.rows, self.columns, self.r, self.set))


def dense(values: Tensor, index: Tensor, starts: Tensor, shape: tuple[int, int, int, int]) -> Tensor:
    """The matrix of a layout; derivatives go through it to `values`. `shape`: rows, columns, r, set."""
    rows, columns, r, size = shape
    b, k = Layout(values, index, starts, rows, columns, r, size).places()
    blocks = -(-rows // r)
    out = values.new_zeros(blocks, columns, r).index_put((b, k), values)
    return out.transpose(1, 2).reshape(blocks * r, columns)[:rows]


def _blocks(w: Tensor, r: int) -> Tensor:
    """(blocks, r, columns), padded with zeros."""
    blocks = -(-len(w) // r)
    return torch.cat([w, w.new_zeros(blocks * r - len(w), w.shape[1])]).view(blocks, r, -1)


def _columns(w: Tensor, r: int) -> Tensor:
    """Which columns a block of rows has: bool (blocks, columns). Minus zero counts as zero."""
    return (_blocks(w, r) != 0).any(1)
