"""The list of models the coverage suite runs: one entry per model, each with its builder and example inputs.

Nothing here imports a model library until an entry is built, so listing names is instant. Weights are always randomly
initialised. Image sizes are kept small where the architecture allows it, so that the whole list runs on a laptop CPU.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from benchmarks.zoo import huggingface, timm_models, torchvision_models


@dataclass(frozen=True)
class Example:
    """A model in eval mode with the inputs it is called with."""

    model: nn.Module
    args: tuple[Any, ...]
    kwargs: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Entry:
    """One model of the suite: its name (`library/model`), its kind, and how to build it."""

    name: str
    kind: str
    make: Callable[[], tuple[nn.Module, tuple[Any, ...], dict[str, Any]]]

    def build(self, seed: int = 0) -> Example:
        """The model (eval mode, random weights drawn from `seed`) and its example inputs."""
        torch.manual_seed(seed)
        model, args, kwargs = self.make()
        _fill_zeros(model)
        return Example(model.eval(), args, kwargs)


def _fill_zeros(model: nn.Module) -> None:
    """Parameters that start at zero (heads, biases, last norms of residual branches) would hide what feeds them from a
    comparison of outputs, so they get small random values."""
    with torch.no_grad():
        for p in model.parameters():
            if p.is_floating_point() and not bool(p.any()):
                p.uniform_(-0.1, 0.1)


def entries() -> list[Entry]:
    """Every model of the suite, in the order of the table."""
    rows = [*torchvision_models.rows(), *timm_models.rows(), *huggingface.rows()]
    return [Entry(name, kind, make) for name, kind, make in rows]


def find(name: str) -> Entry:
    """The entry called `name`; KeyError when there is none."""
    for entry in entries():
        if entry.name == name:
            return entry
    raise KeyError(name)
