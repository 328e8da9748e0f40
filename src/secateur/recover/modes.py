"""Train mode for every kind of model: also for a captured graph, in which batch norms and dropout were written down as they are at rest."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import fx, nn

TRAINS = {"batch_norm": 5, "dropout": 2, "alpha_dropout": 2, "feature_dropout": 2}  # where such an operator says whether it trains


@contextmanager
def training(model: nn.Module, on: bool = True) -> Iterator[None]:
    """The model in train mode (at rest with `on=False`), and everything afterwards as it was. In graphs (`fx.GraphModule`) the operators are told
    so: in training batch norms use the statistics of the batch and move their own, and dropout drops."""
    modes = {m: m.training for m in model.modules()}
    before = list[tuple[fx.GraphModule, fx.Node, Any]]()
    try:
        model.train(on)
        for module in modes:
            for node in module.graph.nodes if isinstance(module, fx.GraphModule) else ():
                place = TRAINS.get(_name(node))
                if place is not None and len(node.args) > place and node.args[place] is not on:
                    before.append((module, node, node.args))  # type: ignore[arg-type]
                    node.args = (*node.args[:place], on, *node.args[place + 1 :])
        _recompiled(before)
        yield
    finally:
        for _, node, args in before:
            node.args = args
        _recompiled(before)
        for module, mode in modes.items():
            module.training = mode


def _name(node: fx.Node) -> str:
    return node.target._schema.name.removeprefix("aten::") if isinstance(node.target, torch._ops.OpOverload) else ""


def _recompiled(changed: list[tuple[fx.GraphModule, fx.Node, Any]]) -> None:
    for module in {id(m): m for m, _, _ in changed}.values():
        module.recompile()
