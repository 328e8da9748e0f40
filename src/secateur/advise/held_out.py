"""What a model loses, on rows that no candidate was made from: points of accuracy, or of agreement with the dense model."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from secateur.errors import DataError, InputError
from secateur.measure import at_rest
from secateur.measure.run import forward
from secateur.models.quality import hits, scored

NORMAL = 1.96  # 95 % of a normal distribution lie within so many standard deviations
ACCURACY, AGREEMENT, ERROR = "accuracy", "agreement", "error"


@dataclass(frozen=True)
class Lost:
    """`points` lost of 100 (less than none: gained), and half of their 95 % interval. `value`: the figure itself, 0..1."""

    points: float
    interval: float
    value: float

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


class HeldOut:
    """The dense model on held-out rows, to compare others with.

    `metric`: "accuracy" where there are labels: the points are what the dense model gets right more often. "agreement" where the outputs are
    scores of classes or tokens: how many rows have another largest score than the dense model's. Otherwise "error": the squared error, in percent
    of the variance of the dense outputs.

    The interval is of paired rows, for the difference d of a row in -1..1: sum d +- 1.96 sqrt(sum d^2 + 1 - (sum d)^2 / (n + 2)), divided by n + 2;
    half a row in each cell keeps it honest where no row differs (Agresti & Min 2005, "Simple improved confidence intervals for comparing
    matched proportions").
    """

    def __init__(self, model: nn.Module, batches: Iterable[Any], labelled: bool, scores: bool, calls: Callable[[Any], tuple[tuple, dict]]):
        """`scores`: whether outputs without labels are scores. `calls`: a batch as (args, kwargs) of the model."""
        self.batches, self.calls = list(batches), calls
        self.metric = ACCURACY if labelled else AGREEMENT if scores else ERROR
        self.dense = self._rows(model)
        self.rows = len(self.dense)
        if not self.rows:
            raise DataError("there is no row to compare models on.\n  Give more data, or fewer rows to calibrate with.")
        spread = float(self.dense.flatten(0, -2).var(0, correction=0).mean()) if self.metric == ERROR and self.dense.dim() > 1 else 0.0
        self.scale = spread or 1.0
        self.value = float(self.dense.float().mean()) if labelled else 1.0

    def lost(self, model: nn.Module) -> Lost:
        """What a model loses against the dense one.

        Raises:
            DataError, InputError: it does not run on the rows.
        """
        return self.compared(self._rows(model))

    def compared(self, found: Tensor) -> Lost:
        """The same of rows that are there already: (rows,) right or not, (rows, ...) largest scores, or (rows, ...) outputs."""
        if found.shape != self.dense.shape:
            given, own = tuple(found.shape), tuple(self.dense.shape)
            raise InputError(f"the model gives {given} on the held-out rows, the dense one {own}.\n  They cannot be compared.")
        if self.metric == ERROR:
            each = ((found - self.dense) ** 2).flatten(1).mean(1) / self.scale if found.dim() > 1 else (found - self.dense) ** 2
            half = NORMAL * float(each.std()) / math.sqrt(self.rows) if self.rows > 1 else math.inf
            return Lost(100 * float(each.mean()), 100 * half, 1.0 - float(each.mean()))
        if self.metric == ACCURACY:
            each = self.dense.double() - found.double()
        else:
            each = (self.dense != found).double().reshape(self.rows, -1).mean(1)
        total, squares, n = float(each.sum()), float((each**2).sum()), self.rows + 2
        half = NORMAL * math.sqrt(max(0.0, squares + 1 - total**2 / n)) / n
        return Lost(100 * total / self.rows, 100 * half, self.value - total / self.rows)

    def _rows(self, model: nn.Module) -> Tensor:
        with at_rest(model):
            if self.metric == ACCURACY:
                return self.seen(scored(model, self.batches))
            return self.seen((self._output(model, batch), None) for batch in self.batches)

    def seen(self, outputs: Iterable[tuple[Tensor, Tensor | None]]) -> Tensor:
        """What is compared of outputs (and labels, where those count), for `compared`."""
        return torch.cat([self._of(found, labels).cpu() for found, labels in outputs] or [torch.empty(0)])

    def _of(self, found: Tensor, labels: Tensor | None) -> Tensor:
        if self.metric == ACCURACY:
            assert labels is not None
            return hits(found, labels)
        if self.metric == ERROR:
            return found.float()
        return torch.where(found.isnan().any(-1), -1, found.argmax(-1))  # no winner among NaN, though argmax names one

    def _output(self, model: nn.Module, batch: Any) -> Tensor:
        found = forward(model, *self.calls(batch))
        first = next((v for v in tree_leaves(found) if isinstance(v, Tensor) and v.is_floating_point()), None)
        if first is None:
            raise InputError("outputs are to be compared, and the model returns none of floating point.\n  Let it return scores, not decisions.")
        return first
