"""Zeros that stay zero while a masked model is trained on."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from secateur.errors import InputError, PlanError
from secateur.plan import Plan

SUFFIX = "_stays"


class Hold:
    """What `hold` put on a model; `remove()` takes it off again, and the weights stay as they are then."""

    def __init__(self, model: nn.Module, names: list[str]):
        self.model, self.names = model, names
        self.handles: list[RemovableHandle] = []

    def again(self) -> None:
        """Make the weights that the plan removed 0 now."""
        with torch.no_grad():
            for name in self.names:
                self.model.get_parameter(name).masked_fill_(~mask_of(self.model, name), 0)

    def remove(self) -> None:
        """Take hooks and masks off the model."""
        for handle in self.handles:
            handle.remove()
        for name in self.names:
            path, _, leaf = name.rpartition(".")
            delattr(self.model.get_submodule(path), leaf + SUFFIX)
        self.names, self.handles = [], []


def hold(model: nn.Module, plan: Plan, optimizer: torch.optim.Optimizer) -> Hold:
    """Keep the zeros of `plan.weights` zero: gradients of removed weights are 0, so that momentum is too, and after every step of the
    optimizer the weights themselves are made 0 again (weight decay and momentum from before may have moved them).

    Each mask is a buffer beside its weight that is no part of the state dict: it moves with the model and is copied with it, and a
    saved file is no larger. Nothing stands in the way of `torch.compile` or `torch.export`.

    Args:
        model: what `sparsify` or `mask` handed back, or a model loaded from it.
        plan: its plan.
        optimizer: of the model's parameters.

    Raises:
        PlanError: the plan has no weights, or is for other shapes.
        InputError: the model is held already, or the optimizer has none of the masked weights.
    """
    parameters = dict(model.named_parameters())
    trained = {id(p) for group in optimizer.param_groups for p in group["params"]}
    if not plan.weights:
        raise PlanError("this plan names no single weights, so there is nothing to hold.\n  A cut model has none to hold; pass a plan of sparsify().")
    for name, stays in plan.weights.items():
        if name not in parameters or parameters[name].shape != stays.shape:
            have = tuple(parameters[name].shape) if name in parameters else "missing"
            raise PlanError(f"weight {name!r} is {have} in this model and {tuple(stays.shape)} in the plan.\n  Pass the model of the plan.")
        path, _, leaf = name.rpartition(".")
        if hasattr(model.get_submodule(path), leaf + SUFFIX):
            raise InputError(f"weight {name!r} is held already.\n  Remove that hold first.")
    if not any(id(parameters[n]) in trained for n in plan.weights):
        raise InputError("the optimizer has none of the masked weights.\n  Make it of this model's parameters: a copy has its own.")
    held = Hold(model, list(plan.weights))
    for name, stays in plan.weights.items():
        path, _, leaf = name.rpartition(".")
        p = parameters[name]
        model.get_submodule(path).register_buffer(leaf + SUFFIX, stays.to(p.device), persistent=False)
        if p.requires_grad:
            held.handles.append(p.register_post_accumulate_grad_hook(_without(model, name)))
    held.handles.append(optimizer.register_step_post_hook(lambda *_: held.again()))
    held.again()
    return held


def mask_of(model: nn.Module, name: str) -> Tensor:
    """The mask that `hold` put beside a weight."""
    path, _, leaf = name.rpartition(".")
    return model.get_submodule(path).get_buffer(leaf + SUFFIX)


def _without(model: nn.Module, name: str) -> Callable[[Tensor], None]:
    def hook(p: Tensor) -> None:
        if p.grad is not None:
            p.grad.masked_fill_(~mask_of(model, name), 0)

    return hook


def merge_low_rank(model: nn.Module, plan: Plan, factors: Mapping[str, tuple[Tensor, Tensor]], scale: float = 1.0) -> None:
    """Add low-rank updates to masked weights in place, and lose no zero:  W += M * (scale * B A)   (Zimmer et al. 2023, "PERP").

    Args:
        factors: name of a weight (outputs, inputs) -> (A (rank, inputs), B (outputs, rank)), as LoRA names them.
        scale: alpha / rank, where they were trained with one.

    Raises:
        InputError: factors that do not fit their weight. Nothing was changed.
    """
    parameters = dict(model.named_parameters())
    for name, (a, b) in factors.items():
        if name not in parameters or (b.shape[0], a.shape[1]) != tuple(parameters[name].shape) or a.shape[0] != b.shape[1]:
            have = tuple(parameters[name].shape) if name in parameters else "missing"
            raise InputError(f"weight {name!r} is {have}; A is {tuple(a.shape)} and B {tuple(b.shape)}.\n  A is (rank, inputs), B (outputs, rank).")
    with torch.no_grad():
        for name, (a, b) in factors.items():
            w = parameters[name]
            update = (scale * (b.to(w.dtype) @ a.to(w.dtype))).to(w.device)
            stays = plan.weights.get(name)
            w.add_(update if stays is None else update.masked_fill(~stays.to(w.device), 0))
