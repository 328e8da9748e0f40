"""One process or many: who this process is, and how gradients meet.

With `torchrun` the work is handed to Accelerate: every process has all weights (DDP), or they are spread over the processes (FSDP2).
"""

from __future__ import annotations

import os
from typing import Any

import torch
from torch import Tensor, nn

from secateur.errors import InputError
from secateur.recover.loss import counted
from secateur.recover.order import part_of, rows_of
from secateur.recover.place import moved


class Engine:
    """This process alone."""

    rank, world = 0, 1
    first = True  # whether the first label of a sequence counts in a model's own loss

    def part(self, batch: Any) -> tuple[Any, float, float]:
        """Its rows of a batch; what a mean over them is multiplied with, so that the mean over the processes is that over the batch; and by how
        much more the mean over its labels is, which need not be as many a row (`counted`), 0 where none counts. Of fewer rows than processes all
        take all."""
        if not 1 < self.world <= (rows := rows_of(batch)):
            return batch, 1.0, float(counted(batch, self.first) > 0)
        own = part_of(batch, self.rank, self.world)
        share = rows_of(own) * self.world / rows
        return own, share, counted(own, self.first) * self.world / max(1, counted(batch, self.first)) / share

    def wrapped(self, model: nn.Module) -> nn.Module:
        """The model to call in training."""
        return model

    def backward(self, loss: Tensor) -> None:
        loss.backward()

    def mean(self, number: float) -> float:
        """The mean over the processes."""
        return number

    def any(self, here: bool) -> bool:
        """Whether it is so in any process."""
        return here

    def wait(self) -> None:
        """Until all processes are here."""

    def agreed(self, step: int) -> None:
        """
        Raises:
            InputError: the processes go on at different steps.
        """


class Processes(Engine):
    """The processes that `torchrun` started, through Accelerate.

    Raises:
        InputError: Accelerate is missing.
    """

    def __init__(self, shard: bool) -> None:
        try:
            from accelerate import Accelerator, DistributedDataParallelKwargs
        except ImportError as error:
            raise InputError("training in several processes needs Accelerate, which is not installed.\n  pip install accelerate") from error
        # A weight that no output needs has no gradient, as in one process, instead of stopping the run.
        self.own: Any = Accelerator(cpu=not torch.cuda.is_available(), kwargs_handlers=[DistributedDataParallelKwargs(find_unused_parameters=True)])
        self.rank, self.world = self.own.process_index, self.own.num_processes
        self.shard = shard

    def wrapped(self, model: nn.Module) -> nn.Module:
        moved(model, self.own.device)
        if self.shard:
            return _sharded(model)
        return self.own.prepare_model(model)

    def backward(self, loss: Tensor) -> None:
        self.own.backward(loss)

    def mean(self, number: float) -> float:
        return float(self.own.reduce(torch.tensor(number, dtype=torch.float64, device=self.own.device), "mean"))

    def any(self, here: bool) -> bool:
        return self.mean(float(here)) > 0

    def wait(self) -> None:
        self.own.wait_for_everyone()

    def agreed(self, step: int) -> None:
        if self.any(abs(self.mean(step) - step) > 1e-6):
            raise InputError(f"process {self.rank} of {self.world} would go on at step {step}, and another at another one.\n"
                             "  Not all of them see the checkpoint: give a folder that all processes see.")  # fmt: skip


def _sharded(model: nn.Module) -> nn.Module:
    """The model with its weights spread over the processes, in place: every block of a list of layers by itself, then the rest.

    Raises:
        InputError: it is a captured graph, whose calls FSDP cannot wrap.
    """
    if any(isinstance(m, torch.fx.GraphModule) for m in model.modules()):
        raise InputError("a captured graph cannot be spread over processes.\n  Pass the model of its own class (--factory), or leave shard out.")
    from torch.distributed.fsdp import fully_shard

    for module in model.modules():
        if isinstance(module, nn.ModuleList):
            for block in module:
                if any(True for _ in block.parameters()):
                    fully_shard(block)
    fully_shard(model)
    return model


def engine(shard: bool = False) -> Engine:
    """Of the processes that there are: `WORLD_SIZE` says so, as `torchrun` sets it. `shard`: spread the weights over them."""
    return Processes(shard) if int(os.environ.get("WORLD_SIZE", "1")) > 1 else Engine()
