"""The average of the weights over steps, which comes back in the place of the last ones."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn

from secateur.errors import DataError, first_line
from secateur.models.data import Batches
from secateur.recover import checkpoint
from secateur.recover.images import shown
from secateur.recover.modes import Mode
from secateur.recover.order import Order
from secateur.recover.training import Training
from secateur.recover.validate import parted
from secateur.repair import batch_norm_statistics

BATCHES = 64  # from which statistics of batch norms are estimated


class Average:
    """Of the parameters that a model trains, step by step: with decay (`Training.ema`) or all of the last steps alike (`Training.average`);
    in float32 at least, since a small share of a step is lost in less.

    The running statistics of batch norms are those of the last weights. After an average of many steps, whose weights were never run, they are
    estimated anew (Izmailov et al. 2018, "Averaging Weights Leads to Wider Optima and Better Generalization"), from batches as training shows them:
    the weights have learned to follow statistics of flipped, moved and mixed images, and those of the images as they are cost accuracy.
    """

    def __init__(self, model: nn.Module, how: Training, steps: int):
        self.model, self.how, self.begin = model, how, steps - round(how.average * steps)
        used = steps and (how.ema is not None or how.average)
        trained = {n: p.detach() for n, p in model.named_parameters() if p.requires_grad} if used else {}
        self.weights = {n: p.to(torch.promote_types(p.dtype, torch.float32), copy=True) for n, p in trained.items()}

    @torch.no_grad()
    def add(self, step: int) -> None:
        """The weights after a step, which count from 0."""
        # An average over a time that has not passed yet would be mostly of the weights as they were given.
        decay = None if self.how.ema is None else min(self.how.ema, (1 + step) / (10 + step))
        share = 1 / max(1, step - self.begin + 1) if decay is None else 1 - decay
        for name, average in self.weights.items():
            average.lerp_(self.model.get_parameter(name).detach().to(average.dtype), share)

    def put(self, order: Order, mode: Mode) -> None:
        """The average in the place of the weights, with statistics of its own from the batches of the `order`; `mode`: of the model.

        Raises:
            DataError: the data fails; the weights are the last ones.
        """
        before = self._copies()
        try:
            self._written(self.weights)
            if self.weights and self.how.average:
                with mode.rest():
                    batch_norm_statistics(self.model, self._shown(order))
                _reshard(self.model)
        except BaseException as error:
            self._written(before)
            if not isinstance(error, DataError):
                raise
            raise DataError(f"The mean weights got no statistics of batch norms: {first_line(error)}\n"
                            "  The model has the weights of the last step, as has the checkpoint where there is a folder: the same call goes on "
                            "from there.") from error  # fmt: skip

    @contextmanager
    def shown(self, order: Order, mode: Mode) -> Iterator[None]:
        """The average in the place of the weights, for a while."""
        before = self._copies()
        try:
            self.put(order, mode)
            yield
        finally:
            self._written(before)

    def state(self) -> dict[str, Tensor]:
        """On the CPU, whole; every process has to ask."""
        return {n: checkpoint.full(t) for n, t in self.weights.items()}

    def resumed(self, state: Mapping[str, Tensor]) -> None:
        for name, tensor in self.weights.items():
            tensor.copy_(checkpoint.spread(state[name], tensor))

    def _copies(self) -> dict[str, Tensor]:
        """Of all that `put` writes."""
        _reshard(self.model)
        held = {n: self.model.get_parameter(n) for n in self.weights} | (dict(self.model.named_buffers()) if self.weights else {})
        return {n: t.detach().clone() for n, t in held.items()}

    @torch.no_grad()
    def _written(self, values: Mapping[str, Tensor]) -> None:
        _reshard(self.model)
        held = dict([*self.model.named_parameters(), *self.model.named_buffers()]) if values else {}
        for name, value in values.items():
            held[name].copy_(value)

    def _shown(self, order: Order) -> Iterator[tuple[tuple, dict[str, Any]]]:
        """Batches as their steps show them; of data in an order of its own, which may be by class, from all over it."""
        apart = 1 if isinstance(order.data, Batches) else max(1, order.steps // BATCHES)
        for step, batch in islice(enumerate(order.epoch(0)), 0, apart * BATCHES, apart):
            args, kwargs, labels = parted(batch, self.model)
            yield shown(args, labels, self.how, (step, 0))[0], kwargs


def _reshard(model: nn.Module) -> None:
    """Weights that are spread over processes (FSDP2) are so again: a call leaves the outermost ones gathered, and what is written there is lost."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return
    from torch.distributed.fsdp import FSDPModule

    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()
