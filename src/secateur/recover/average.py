"""The average of the weights over steps, which comes back in the place of the last ones."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from itertools import islice

import torch
from torch import Tensor, nn

from secateur.errors import DataError, first_line
from secateur.recover import checkpoint
from secateur.recover.modes import Mode
from secateur.recover.order import Order
from secateur.recover.training import Training
from secateur.recover.validate import parted
from secateur.repair import batch_norm_statistics

BATCHES = 64  # from which statistics of batch norms are estimated


class Average:
    """Of all parameters of a model in training, step by step: with decay (`Training.ema`) or all of the last steps alike (`Training.average`).

    The running statistics of batch norms are those of the last weights. After an average of many steps, whose weights were never run, they are
    estimated anew from batches as the data has them (Izmailov et al. 2018, "Averaging Weights Leads to Wider Optima and Better Generalization").
    """

    def __init__(self, model: nn.Module, how: Training, steps: int):
        self.model, self.how, self.begin = model, how, steps - round(how.average * steps)
        used = steps and (how.ema is not None or how.average)
        self.weights = {n: p.detach().clone() for n, p in model.named_parameters()} if used else {}

    @torch.no_grad()
    def add(self, step: int) -> None:
        """The weights after a step, which count from 0."""
        share = 1 - self.how.ema if self.how.ema is not None else 1 / max(1, step - self.begin + 1)
        for name, average in self.weights.items():
            average.lerp_(self.model.get_parameter(name).detach(), share)

    def put(self, order: Order, mode: Mode) -> None:
        """The average in the place of the weights, with statistics of its own from the `order`'s first batches; `mode`: of the model.

        Raises:
            DataError: the data fails.
        """
        with torch.no_grad():
            for name, average in self.weights.items():
                self.model.get_parameter(name).copy_(average)
        if not self.weights or not self.how.average:
            return
        batches = (parted(batch, self.model) for batch in islice(order.epoch(0), BATCHES))
        try:
            with mode.rest():
                batch_norm_statistics(self.model, ((args, kwargs) for args, kwargs, _ in batches))
        except DataError as error:
            raise DataError(f"The mean weights got no statistics of batch norms: {first_line(error)}\n"
                            "  Every step is in the checkpoint, where there is a folder: the same call goes on from there.") from error  # fmt: skip

    @contextmanager
    def shown(self, order: Order, mode: Mode) -> Iterator[None]:
        """The average in the place of the weights, for a while."""
        held = {n: self.model.get_parameter(n) for n in self.weights} | (dict(self.model.named_buffers()) if self.weights else {})
        kept = {n: t.detach().clone() for n, t in held.items()}
        try:
            self.put(order, mode)
            yield
        finally:
            with torch.no_grad():
                for name, tensor in held.items():
                    tensor.copy_(kept[name])

    def state(self) -> dict[str, Tensor]:
        """On the CPU, whole; every process has to ask."""
        return {n: checkpoint.full(t) for n, t in self.weights.items()}

    def resumed(self, state: Mapping[str, Tensor]) -> None:
        for name, tensor in self.weights.items():
            tensor.copy_(checkpoint.spread(state[name], tensor))
