"""Back to early weights with a mask that later ones gave: lottery tickets.

    early = Snapshot.of(model)                            # after a few hundred steps; at once for the original lottery ticket
    ...                                                   # train; find a plan: schedule.plan(), or that of sparsify()
    rewind(model, optimizer, early, plan)                 # weight rewinding
    hold(model, plan, optimizer)                          # train again, with the learning rates from that step on

Weight rewinding: Frankle et al. 2020, "Linear Mode Connectivity and the Lottery Ticket Hypothesis". Learning-rate rewinding (Renda et al. 2020,
"Comparing Rewinding and Fine-tuning in Neural Network Pruning") keeps the weights as they are and only runs the schedule of learning rates again
from an early step: `hold` the plan, make a new scheduler of learning rates, and leave `rewind` out. It does as well or better.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from secateur.errors import InputError, PlanError
from secateur.plan import Plan
from secateur.recover.sparse_layers import plain
from secateur.surgery.cut import state_of


@dataclass(frozen=True)
class Snapshot:
    """Copies of all parameters and buffers by name, as they were when it was taken; tied ones under each name they have."""

    state: Mapping[str, Tensor]

    @classmethod
    def of(cls, model: nn.Module) -> Snapshot:
        """Of the model as it is now.

        Raises:
            InputError: it is no module.
        """
        copies: dict[int, Tensor] = {}
        return cls({n: copies.setdefault(id(t), t.detach().clone()) for n, t in state_of(plain(model)).items()})


def rewind(model: nn.Module, optimizer: torch.optim.Optimizer, to: Snapshot, plan: Plan) -> None:
    """Put the model back to `to`, in place, with the weights that `plan.weights` drops at 0. The optimizer forgets what it remembers of the
    model's parameters (momentum, second moments, its count of steps), and gradients are dropped; learning rates are as they are.

    Args:
        model: what is trained. A `Schedule` or `hold` on it stays in force.
        to: of this model, whatever became of its weights since.
        plan: which weights survive.

    Raises:
        InputError: no optimizer or snapshot, or one of another model. PlanError: the plan has no weights or is for other shapes. Nothing was
            changed.
    """
    if not isinstance(optimizer, torch.optim.Optimizer):
        raise InputError(f"optimizer is a {type(optimizer).__name__}.\n  Pass the torch.optim.Optimizer that trains the model.")
    if not isinstance(to, Snapshot):
        raise InputError(f"to is a {type(to).__name__}, no Snapshot.\n  Take one early in the training: Snapshot.of(model).")
    state = state_of(plain(model))
    for name in sorted(state.keys() | to.state.keys()):
        have, kept = (tuple(s[name].shape) if name in s else "missing" for s in (state, to.state))
        if have != kept:
            raise InputError(f"{name!r} is {kept} in the snapshot and {have} in the model.\n  Take the snapshot of this model, with these shapes.")
    if not plan.weights:
        raise PlanError("this plan names no single weights, so nothing says which survive.\n  Pass schedule.plan(), or the plan of sparsify().")
    for name, stays in plan.weights.items():
        if name not in state or state[name].shape != stays.shape:
            here = tuple(state[name].shape) if name in state else "missing"
            raise PlanError(f"weight {name!r} is {here} in this model and {tuple(stays.shape)} in the plan.\n  Pass the model of the plan.")
    with torch.no_grad():
        for name, tensor in state.items():
            tensor.copy_(to.state[name])
        for name, stays in plan.weights.items():
            state[name].masked_fill_(~stays.to(state[name].device), 0)
    for p in plain(model).parameters():
        p.grad = None
        optimizer.state.pop(p, None)
