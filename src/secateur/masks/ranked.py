"""Masks by a score of each weight; the weights that stay are as they were.

    magnitude   w_oj^2
    wanda       w_oj^2 E[x_j^2]                                (Sun et al. 2024, "A Simple and Effective Pruning Approach for LLMs")
    ria         ((|w_oj| / sum_o |w_oj| + |w_oj| / sum_j |w_oj|) E[x_j^2]^(1/4))^2   (Zhang et al. 2024, "Plug-and-Play")

Scores are squared, so that those of a block add up to what it costs to lose it.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from secateur.masks.problem import Problem, Solution, masked
from secateur.pattern import Block, Free, Kernels

RIA_POWER = 0.5  # of the norm of the input


def magnitude(p: Problem) -> Solution:
    """The largest weights stay."""
    return masked(p.w, p.choose(p.w.square()))


def wanda(p: Problem) -> Solution:
    """Weights times the size of the input they meet, each output by itself.

    Raises:
        DataError: nothing is known of the inputs.
    """
    live = p.without_dead()
    return _by_row(p, live.w.square() * live.gram.diagonal())


def ria(p: Problem) -> Solution:
    """The share that a weight has in its row and in its column, times the root of the size of the input; each output by itself.

    Raises:
        DataError: nothing is known of the inputs.
    """
    live = p.without_dead()
    return _by_row(p, (relative(live.w) * live.gram.diagonal().clamp_min(0).pow(RIA_POWER / 2)).square())


def relative(w: Tensor) -> Tensor:
    """|w_oj| / sum_o |w_oj| + |w_oj| / sum_j |w_oj|: (rows, cols)."""
    size, tiny = w.abs(), torch.finfo(w.dtype).tiny
    return size / size.sum(0).clamp_min(tiny) + size / size.sum(1, keepdim=True).clamp_min(tiny)


def _by_row(p: Problem, score: Tensor) -> Solution:
    """These papers compare the weights of one output with each other."""
    if isinstance(p.pattern, (Free, Block, Kernels)):
        p = replace(p, pattern=replace(p.pattern, per="row"))
    return masked(p.w, p.choose(score))
