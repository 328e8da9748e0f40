"""Random scores: the baseline every criterion has to beat."""

from __future__ import annotations

import torch

from secateur.errors import InputError
from secateur.score.criterion import Criterion, Scores
from secateur.trace import Graph


def random(graph: Graph, model: torch.nn.Module | None = None, seed: int = 0) -> Scores:
    """Uniform numbers from `seed`; works without weights (meta device).

    Raises:
        InputError: the seed is no integer of 64 bits.
    """
    if not isinstance(seed, int) or not -(2**63) <= seed < 2**63:
        raise InputError(f"seed={seed!r} is not an integer of 64 bits.\n  Pass one such as 0.")
    generator = torch.Generator().manual_seed(seed)
    return {n: torch.rand(g.size, generator=generator, dtype=torch.float64) for n, g in graph.groups.items()}


RANDOM = Criterion(
    name="random",
    function=random,
    formula="s_u uniform in 0..1, from the seed",
    needs="weights",
    cost="nothing; works on the meta device",
    when="The baseline every criterion has to beat.",
    paper="Mittal et al. 2018, Recovering from Random Pruning: On the Plasticity of Deep Convolutional Neural Networks",
)
