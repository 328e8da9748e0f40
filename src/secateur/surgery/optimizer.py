"""An optimizer's state follows the cut: momentum and second moments lose what their parameters lost."""

from __future__ import annotations

import copy
import inspect
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_leaves

from secateur.errors import InputError
from secateur.surgery.cut import Cut


def migrate(optimizer: torch.optim.Optimizer, dense: nn.Module, model: nn.Module, done: Cut) -> torch.optim.Optimizer:
    """An optimizer of the same class over the parameters of `model`; the one that was given is not changed.

    State tensors shaped like their parameter are cut like it, numbers are copied.

    Raises:
        InputError: the optimizer holds a parameter that is not one of the dense model's, or state of another shape than
            its parameter (Adafactor's rows and columns, L-BFGS' history).
    """
    names = {id(p): n for n, p in dense.named_parameters()}
    new = dict(model.named_parameters())
    groups = []
    for group in optimizer.param_groups:
        own = []
        for p in group["params"]:
            if id(p) not in names:
                raise InputError(
                    f"the optimizer holds a parameter of shape {tuple(p.shape)} that is not one of the dense model's.\n"
                    "  Pass the optimizer that trained the model you pruned."
                )
            if names[id(p)] in new:
                own.append(new[names[id(p)]])
        groups.append({**{k: v for k, v in group.items() if k != "params"}, "params": own})
    known = inspect.signature(type(optimizer).__init__).parameters  # defaults may hold what a parent class was told
    fresh = type(optimizer)(groups, **{k: v for k, v in optimizer.defaults.items() if k in known})
    for p, state in optimizer.state.items():
        name = names[id(p)]
        if name in new:
            fresh.state[new[name]] = {k: _cut(k, v, p, done.kept.get(name)) for k, v in state.items()}
    return fresh


def _cut(key: str, value: Any, parameter: torch.Tensor, kept: list | None) -> Any:
    if kept is not None and any(isinstance(v, torch.Tensor) and v.numel() > 1 and v.shape != parameter.shape for v in tree_leaves(value)):
        raise InputError(
            f"the optimizer keeps {key!r} for a parameter of shape {tuple(parameter.shape)} in another shape, so it is not known "
            "what of it belongs to the units that went.\n  Make a new optimizer over the cut model's parameters."
        )
    if not isinstance(value, torch.Tensor) or kept is None or value.shape != parameter.shape:
        return value.clone() if isinstance(value, torch.Tensor) else copy.deepcopy(value)
    for d, index in enumerate(kept):
        if index is not None:
            value = value.index_select(d, torch.from_numpy(index).to(value.device))
    return value
