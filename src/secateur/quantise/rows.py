"""Rows of a data set as calls of a file, and how good what the file gives is."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map_only

from secateur.calibrate.batches import read
from secateur.errors import DataError, InputError
from secateur.export.capture import plain
from secateur.export.runner import Call
from secateur.measure.run import at_rest, batch_of, forward
from secateur.models import quality


@dataclass(frozen=True)
class Part:
    """A few rows: the call, their labels where there are any, and the inputs as the data set would give them: what it does not say, such as a flag,
    is in the example call."""

    call: Call
    labels: Tensor | None

    @property
    def given(self) -> Any:
        args, kwargs = self.call
        return args or dict(kwargs)


def parts(data: Iterable[Any], call: Call, size: int | None, *, whole: bool, at_most: int | None) -> list[Part]:
    """The first `at_most` rows of a data set (None: all) in parts of `size` rows (None: as they come).

    Args:
        call: example inputs: keywords that it does not have are left out. whole: rows that do not fill a part are left out.

    Raises:
        DataError: no rows, or not even one whole part.
    """
    found, left = [], math.inf if at_most is None else at_most
    for batch in read(data, *call):
        kwargs = {name: value for name, value in batch.kwargs.items() if name in call[1]}
        for part in _cut((batch.args, kwargs), batch.labels, size or batch.rows):
            if left <= 0:
                break
            rows = batch_of(*part.call)
            if rows > left and not whole:
                part, rows = next(_cut(part.call, part.labels, int(left))), int(left)
            if not whole or rows == size:
                found.append(part)
                left -= rows
        if left <= 0:
            break
    if not found:
        raise DataError(f"the data has no {'part of ' + str(size) + ' rows' if whole else 'rows'}.\n  Give data with rows, in batches of as many.")
    return found


def _cut(call: Call, labels: Tensor | None, size: int) -> Iterator[Part]:
    rows = batch_of(*call)
    for start in range(0, rows, size):
        stop = min(rows, start + size)

        def piece(t: Tensor, start: int = start, stop: int = stop) -> Tensor:
            return t[start:stop] if t.dim() and len(t) == rows else t

        args, kwargs = tree_map_only(Tensor, piece, (call[0], dict(call[1])))
        yield Part((args, kwargs), None if labels is None else labels[start:stop])


def scores_at(model: nn.Module, call: Call) -> int:
    """Which output of a file holds the class scores that `models.quality` takes of the model: its logits need not come first.

    Raises:
        DataError: the scores are none of the tensors that the model returns.
    """
    with at_rest(model):
        found = forward(model, *call)
    scores = quality.scores_of(found)
    place = next((n for n, t in enumerate(t for t in tree_leaves(plain(found)) if isinstance(t, Tensor)) if t is scores), None)
    if place is None:
        raise quality.no_scores(found)
    return place


class _Played(nn.Module):
    """Gives what a file gave, call by call, of its outputs the one `at` that place."""

    def __init__(self, outputs: Sequence[Sequence[np.ndarray]], at: int):
        super().__init__()
        self.left, self.at = iter(outputs), at

    def forward(self, inputs: Tensor) -> Tensor:
        return torch.from_numpy(next(self.left)[self.at])


def accuracy(outputs: Sequence[Sequence[np.ndarray]], test: Sequence[Part], at: int = 0) -> float:
    """The share of rows whose largest score is at their label, in 0..1; the scores are the output `at` that place (`scores_at`).

    Raises:
        DataError: labels that do not fit the outputs.
    """
    return quality.accuracy(_Played(outputs, at), [(torch.empty(batch_of(*part.call)), part.labels) for part in test])


def error(found: Sequence[Sequence[np.ndarray]], wanted: Sequence[Sequence[np.ndarray]]) -> float:
    """|found - wanted| / |wanted|, Euclidean, over all outputs of floating point of all calls; NaN if `found` has one that `wanted` has not.

    Infinities are masks: where both have the same there is no difference, and they do not count in |wanted|.

    Raises:
        InputError: no output is of floating point, so that nothing is measured.
    """
    off, size, floating = 0.0, 0.0, False
    for ours, theirs in zip(found, wanted, strict=True):
        for a, b in zip(ours, theirs, strict=True):
            if np.issubdtype(b.dtype, np.floating):
                a, b, floating = a.astype(np.float64), b.astype(np.float64), True
                same = (a == b) | (np.isnan(a) & np.isnan(b))
                off += float(np.sum(np.subtract(a, b, where=~same, out=np.zeros_like(b)) ** 2))
                size += float(np.sum(b[np.isfinite(b)] ** 2))
    if not floating:
        raise InputError("int8 is compared by its outputs, and the model returns none of floating point.\n  Let it return scores, not decisions.")
    return math.sqrt(off / size) if size else math.sqrt(off)
