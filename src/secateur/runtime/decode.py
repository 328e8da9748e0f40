"""Linear layers for one token at a time, as when a language model writes: bound by the bytes of their weights.

    masks   int32 (blocks * chunks * 8,)   a bit for each of 32 columns, of the 8 rows of a block side by side, chunk after chunk
    values  (n + 32,) float32 or bfloat16   in that order, and 32 zeros that may be read
    starts  int64 (blocks + 1,)   where the values of each block begin
"""

from __future__ import annotations

from typing import Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from secateur.runtime.ops import available, lowered, transformed

TOKENS = 4  # more are not bound by bytes
ROWS, COLUMNS = 8, 32
KNOWN = (torch.float32, torch.bfloat16)


def packed(weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(values, masks, starts) of a matrix (rows, columns), of its dtype."""
    w = weight.detach()
    rows, columns = w.shape
    blocks, chunks = -(-rows // ROWS), -(-columns // COLUMNS)
    whole = F.pad(w, (0, chunks * COLUMNS - columns, 0, blocks * ROWS - rows))
    parts = whole.view(blocks, ROWS, chunks, COLUMNS).transpose(1, 2)  # block, chunk, row, column
    there = parts != 0
    bits = (there.long() << torch.arange(COLUMNS)).sum(-1)
    counts = there.flatten(1).sum(1)
    starts = torch.cat([torch.zeros(1, dtype=torch.long), counts.cumsum(0)])
    return torch.cat([parts[there], w.new_zeros(COLUMNS)]), bits.to(torch.int32).flatten(), starts


def unpacked(values: Tensor, masks: Tensor, shape: tuple[int, int]) -> Tensor:
    """The matrix again."""
    rows, columns = shape
    blocks, chunks = -(-rows // ROWS), -(-columns // COLUMNS)
    there = (masks.view(blocks, chunks, ROWS, 1) >> torch.arange(COLUMNS, dtype=torch.int32, device=masks.device)) & 1 != 0
    parts = values.new_zeros(there.shape)
    parts[there] = values[:-COLUMNS]
    return parts.transpose(1, 2).reshape(blocks * ROWS, chunks * COLUMNS)[:rows, :columns]


class DecodeLinear(nn.Module):
    """y = x W^T + b for up to four rows x; more are computed with the dense weight. For inference: nothing in it is a parameter."""

    def __init__(self, weight: Tensor, bias: Tensor | None):
        super().__init__()
        self.rows, self.columns = weight.shape
        self.values: Tensor
        self.masks: Tensor
        self.starts: Tensor
        self.bias: Tensor | None
        for name, tensor in zip(("values", "masks", "starts"), packed(weight), strict=True):
            self.register_buffer(name, tensor)
        self.register_buffer("bias", None if bias is None else bias.detach().clone())

    @property
    def weight(self) -> Tensor:
        """The weight with its zeros, made anew at every look."""
        return unpacked(self.values, self.masks, (self.rows, self.columns))

    @property
    def in_features(self) -> int:
        return self.columns

    @property
    def out_features(self) -> int:
        return self.rows

    @classmethod
    def of(cls, layer: nn.Linear) -> Self:
        """`layer`: float32 or bfloat16, with zeros in its weight."""
        return cls(layer.weight, layer.bias)

    def forward(self, input: Tensor) -> Tensor:
        x = input
        learns = (torch.is_grad_enabled() and x.requires_grad) or transformed()
        if x.numel() <= TOKENS * self.columns and not learns and x.device.type == "cpu" and self.values.dtype in KNOWN and available():
            bias = None if self.bias is None else self.bias.float()
            y = torch.ops.secateur.sparse_decode(x.float().contiguous(), self.values, self.masks, self.starts, bias, self.rows, self.columns)
            return lowered(y.to(x.dtype))
        return F.linear(x, self.weight.to(x.dtype), None if self.bias is None else self.bias.to(x.dtype))

    def extra_repr(self) -> str:
        return f"{self.columns}, {self.rows}, density={(len(self.values) - COLUMNS) / (self.rows * self.columns):.3f}, {self.values.dtype}"
