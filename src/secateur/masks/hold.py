"""Zeros that stay zero while a masked model is trained on."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from secateur.errors import InputError, PlanError
from secateur.plan import Plan


class Hold:
    """What `hold` put on a model; `remove()` takes it off again, and the weights stay as they are then."""

    def __init__(self, model: nn.Module, masks: Mapping[str, Tensor]):
        self.parameters = {n: model.get_parameter(n) for n in masks}
        self.masks = dict(masks)
        self.handles: list[RemovableHandle] = []

    def gone(self, name: str) -> Tensor:
        """Where a weight is zero, on the device that it is on now."""
        p, mask = self.parameters[name], self.masks[name]
        if mask.device != p.device:
            mask = self.masks[name] = mask.to(p.device)
        if hasattr(p, "full_tensor") and not hasattr(mask, "full_tensor"):  # spread over processes (a DTensor)
            from torch.distributed.tensor import distribute_tensor

            mask = self.masks[name] = distribute_tensor(mask, p.device_mesh, p.placements)  # type: ignore[attr-defined]
        return ~mask

    def again(self) -> None:
        """Make the weights that the plan removed 0 now."""
        with torch.no_grad():
            for name, p in self.parameters.items():
                p.masked_fill_(self.gone(name), 0)

    def remove(self) -> None:
        """Take the hooks off the model and the optimizer."""
        for handle in self.handles:
            handle.remove()
        self.handles = []


def hold(model: nn.Module, plan: Plan, optimizer: torch.optim.Optimizer) -> Hold:
    """Keep the zeros of `plan.weights` zero: gradients of removed weights are 0, so that momentum is too, and after every step of the
    optimizer the weights themselves are made 0 again (weight decay and momentum from before may have moved them).

    Nothing is added to the model but hooks: its state dict, its files, `torch.compile` and `torch.export` see no difference. A copy of the
    model is not held; hold it with an optimizer of its own.

    Args:
        model: what `sparsify` or `mask` handed back, or a model loaded from it; compiled or not.
        plan: its plan.
        optimizer: of the model's parameters.

    Raises:
        PlanError: the plan has no weights, or is for other shapes.
        InputError: it is no optimizer, or it has none of the masked weights.
    """
    optimizer = hooked(optimizer)
    model = getattr(model, "_orig_mod", model)  # within torch.compile: its names are those of plans
    parameters = dict(model.named_parameters(remove_duplicate=False))
    trained = {id(p) for group in optimizer.param_groups for p in group["params"]}
    if not plan.weights:
        raise PlanError("this plan names no single weights, so there is nothing to hold.\n  A cut model has none to hold; pass a plan of sparsify().")
    _all_fit(parameters, plan)
    if not any(id(parameters[n]) in trained for n in plan.weights):
        raise InputError("the optimizer has none of the masked weights.\n  Make it of this model's parameters: a copy has its own.")
    held = Hold(model, plan.weights)
    for name in plan.weights:
        if parameters[name].requires_grad:
            held.handles.append(parameters[name].register_post_accumulate_grad_hook(_without(held, name)))
    held.handles.append(optimizer.register_step_post_hook(lambda *_: held.again()))
    held.again()
    return held


def hooked(optimizer: Any) -> torch.optim.Optimizer:
    """The optimizer whose hooks are called: torch's own within one that has none, as Accelerate's.

    Raises:
        InputError: there is none.
    """
    found = optimizer
    while not hasattr(found, "_optimizer_step_post_hooks") and hasattr(found, "optimizer"):
        found = found.optimizer
    if not isinstance(found, torch.optim.Optimizer) or not hasattr(found, "_optimizer_step_post_hooks"):
        raise InputError(f"optimizer is a {type(optimizer).__name__}.\n  Pass the torch.optim.Optimizer that trains the model.")
    return found


def zero(model: nn.Module, plan: Plan) -> None:
    """Make the weights that the plan removed 0, for a training that leaves them alone.

    Raises:
        PlanError: the plan is for other shapes. Nothing was changed.
    """
    _all_fit(dict(model.named_parameters(remove_duplicate=False)), plan)
    Hold(model, plan.weights).again()


def _all_fit(parameters: Mapping[str, Tensor], plan: Plan) -> None:
    for name, stays in plan.weights.items():
        _fits(name, parameters, stays)


def _fits(name: str, parameters: Mapping[str, Tensor], stays: Tensor) -> None:
    if name not in parameters or parameters[name].shape != stays.shape:
        have = tuple(parameters[name].shape) if name in parameters else "missing"
        raise PlanError(f"weight {name!r} is {have} in this model and {tuple(stays.shape)} in the plan.\n  Pass the model of the plan.")


def _without(held: Hold, name: str) -> Callable[[Tensor], None]:
    def hook(p: Tensor) -> None:
        if p.grad is not None:
            p.grad.masked_fill_(held.gone(name), 0)

    return hook


def merge_low_rank(model: nn.Module, plan: Plan, factors: Mapping[str, tuple[Tensor, Tensor]], scale: float = 1.0) -> None:
    """Add low-rank updates to masked weights in place, and lose no zero:  W += M * (scale * B A)   (Zimmer et al. 2023, "PERP").

    Args:
        factors: name of a weight (outputs, inputs) -> (A (rank, inputs), B (outputs, rank)), as LoRA names them.
        scale: alpha / rank, where they were trained with one.

    Raises:
        InputError: factors that do not fit their weight, or are not finite. PlanError: the plan is for other shapes. Nothing was changed.
    """
    parameters = dict(model.named_parameters())
    for name, (a, b) in factors.items():
        if name in plan.weights:
            _fits(name, parameters, plan.weights[name])
        if not all(f.dim() == 2 and bool(torch.isfinite(f).all()) for f in (a, b)):
            raise InputError(f"the factors of {name!r} are {tuple(a.shape)} and {tuple(b.shape)}, or hold NaN.\n  Pass two finite matrices.")
        if name not in parameters or (b.shape[0], a.shape[1]) != tuple(parameters[name].shape) or a.shape[0] != b.shape[1]:
            have = tuple(parameters[name].shape) if name in parameters else "missing"
            raise InputError(f"weight {name!r} is {have}; A is {tuple(a.shape)} and B {tuple(b.shape)}.\n  A is (rank, inputs), B (outputs, rank).")
    merged: dict[str, Tensor] = {}
    with torch.no_grad():
        for name, (a, b) in factors.items():
            w = parameters[name]
            wide = torch.promote_types(w.dtype, torch.float32)  # the product of two halves may have no half
            update = scale * (b.to(w.device, wide) @ a.to(w.device, wide))
            stays = plan.weights.get(name)
            merged[name] = (w + (update if stays is None else update.masked_fill(~stays.to(w.device), 0))).to(w.dtype)
            if not bool(torch.isfinite(merged[name]).all()):
                raise InputError(f"weight {name!r} would not be finite in {w.dtype} with its factors times {scale:g}.\n  Nothing was changed.")
        for name, new in merged.items():
            parameters[name].copy_(new)
