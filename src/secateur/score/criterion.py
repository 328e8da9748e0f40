"""What a criterion is, and what `secateur explain` says about it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Literal

import torch

Scores = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Criterion:
    """A way to give every unit a number; what scores lowest goes first.

    Attributes:
        name: as `score=` takes it.
        function: `(graph, model, seed)` where `needs` is "weights", else `(graph, model, calibration)`;
            returns {group: float64 (units,)}.
        formula: in plain characters; u is a unit, w a weight of it.
        needs: "weights", "inputs" (data, no labels) or "labels" (data with labels, or `loss=`).
        cost: what it takes to compute.
        when: what it is good for, and what not.
        paper: where it comes from.
    """

    name: str
    function: Callable[..., Scores]
    formula: str
    needs: Literal["weights", "inputs", "labels"]
    cost: str
    when: str
    paper: str

    def __call__(self, *args, **kwargs) -> Scores:
        """The function itself, so that a criterion can be used as one."""
        return self.function(*args, **kwargs)

    def facts(self) -> dict[str, str]:
        """Everything but the function, as plain JSON values."""
        return {k: v for k, v in asdict(self).items() if k != "function"}


def normalised(score: torch.Tensor) -> torch.Tensor:
    """Divided by the mean of its absolute values over the group, so that groups of different width and scale can be
    ranked together. Infinite scores (units that stay) do not take part in the mean."""
    finite = score[torch.isfinite(score)]
    mean = finite.abs().mean() if len(finite) else torch.zeros((), dtype=score.dtype)
    return score / mean if mean > 0 else score


def staying(size: int) -> torch.Tensor:
    """The scores of a group a criterion has nothing to say about: infinity, so that it stays whole."""
    return torch.full((size,), torch.inf, dtype=torch.float64)
