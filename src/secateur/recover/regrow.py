"""Some weights of a sparse layer go and as many come, while it is trained (Evci et al. 2020, "Rigging the Lottery"; Mocanu et al. 2018)."""

from __future__ import annotations

import torch
from torch import Tensor

from secateur.errors import PlanError
from secateur.pattern import top


def moved(weight: Tensor, active: Tensor, score: Tensor, count: int) -> Tensor:
    """The mask of a layer in which the `count` smallest active weights have gone and as many others have come.

    What comes has the highest scores among all that did not stay, those just dropped too (as in the authors' code: one that comes straight
    back is not new, and keeps its value). Of equal ones the lower index stays, and comes. The number of active weights does not change.

    Args:
        weight: any shape; active: bool of its shape; score: one number from 0 on for each weight, of its shape.
        count: how many move, at most as many as are active.

    Raises:
        PlanError: weights or scores are NaN.
    """
    if bool(weight.isnan().any()) or bool(score.isnan().any()):
        raise PlanError("weights or gradients are NaN, so nothing can be ranked.\n  The training has diverged: lower the learning rate.")
    size = weight.detach().abs().float().masked_fill(~active, -1).flatten()
    stays = top(size, int(active.sum()) - count)
    comes = top(score.detach().float().flatten().masked_fill(stays, -torch.inf), count)
    return (stays | comes).reshape(weight.shape)
