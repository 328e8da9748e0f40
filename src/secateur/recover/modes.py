"""Train mode for every kind of model: also for a captured graph, in which batch norms and dropout were written down as they are at rest."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import fx, nn

# Where such an operator says whether it trains, and for norms where their running mean is.
TRAINS = {"batch_norm": (5, 3), "instance_norm": (5, 3), "dropout": (2, None), "alpha_dropout": (2, None), "feature_dropout": (2, None),
          "feature_alpha_dropout": (2, None)}  # fmt: skip
MOMENTUM = 0.1  # of norms that average over all batches: in a graph theirs was written down as 0


class Mode:
    """A model in train mode, its captured graphs too: `rest()` puts it at rest for a moment."""

    def __init__(self, model: nn.Module):
        self.flags = {m: m.training for m in model.modules()}
        self.still_ones = {m for m, flag in self.flags.items() if model.training and not flag}  # put at rest by hand, in a model that trains
        self.graphs = list[tuple[fx.GraphModule, fx.Node, Any, Any]]()  # with the arguments at rest, and in training
        for module in self.flags:
            for node in module.graph.nodes if isinstance(module, fx.GraphModule) else ():
                args = _training(node)
                if args is not None:
                    self.graphs.append((module, node, node.args, args))  # type: ignore[arg-type]

    def train(self) -> None:
        for module in self.flags:
            module.training = module not in self.still_ones
        self._written(3)

    def still(self) -> None:
        for module in self.flags:
            module.training = False
        self._written(2)

    def back(self) -> None:
        """As everything was."""
        for module, flag in self.flags.items():
            module.training = flag
        self._written(2)

    def _written(self, which: int) -> None:
        for row in self.graphs:
            row[1].args = row[which]  # type: ignore[assignment]
        for module in {id(row[0]): row[0] for row in self.graphs}.values():
            module.recompile()

    @contextmanager
    def rest(self) -> Iterator[None]:
        self.still()
        try:
            yield
        finally:
            self.train()


@contextmanager
def training(model: nn.Module) -> Iterator[Mode]:
    """The model in train mode, and everything afterwards as it was. In graphs (`fx.GraphModule`) the operators are told so: batch norms use the
    statistics of the batch and move their own, dropout drops."""
    mode = Mode(model)
    try:
        mode.train()
        yield mode
    finally:
        mode.back()


def has_batch_norms(model: nn.Module) -> bool:
    """Whether it normalises by batches, as modules or in a captured graph."""
    modules = list(model.modules())
    nodes = (node for m in modules if isinstance(m, fx.GraphModule) for node in m.graph.nodes)
    return any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in modules) or any(_name(node) == "batch_norm" for node in nodes)


def _name(node: fx.Node) -> str:
    return node.target._schema.name.removeprefix("aten::").removesuffix("_") if isinstance(node.target, torch._ops.OpOverload) else ""


def _training(node: fx.Node) -> tuple | None:
    """The arguments of an operator in training, where they are others than at rest."""
    if (name := _name(node)) not in TRAINS:
        return None
    place, mean = TRAINS[name]
    args = list(node.args)
    if len(args) <= place or args[place] is not False or (mean is not None and args[mean] is None):
        return None
    args[place] = True
    if mean is not None and len(args) > place + 1 and args[place + 1] == 0.0:
        args[place + 1] = MOMENTUM
    return tuple(args)
