"""Scores of whole residual blocks, so that depth competes with width."""

from __future__ import annotations

import torch
from torch import nn

from secateur.score.criterion import Scores
from secateur.trace import Graph


def blocks(graph: Graph, model: nn.Module) -> Scores:
    """The root mean square of the weights that only the block uses (of all its weights, where others use every one of them too), divided by its mean
    over all blocks: {block: (1,)}."""
    state = dict(model.named_parameters(remove_duplicate=False))
    size: dict[str, float] = {}
    for name, block in graph.blocks.items():
        named = ([t for t in some if t in state and state[t].dim() > 1] for some in (block.tensors, block.shared))
        weights = [state[t].detach().double() for t in next(filter(None, named), [])]
        total = sum(float((w * w).sum()) for w in weights)
        size[name] = (total / max(1, sum(w.numel() for w in weights))) ** 0.5
    mean = sum(size.values()) / max(1, len(size))
    return {n: torch.tensor([v / mean if mean else 0.0], dtype=torch.float64) for n, v in size.items()}
