"""What is refused before any work begins."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_leaves

from secateur.errors import InputError, ModelError
from secateur.measure.run import at_rest, forward, shapes


def check(model: nn.Module, args: tuple, kwargs: Mapping[str, Any]) -> None:
    """Refuse what could only fail later and worse: inputs that do not run, weights that are not finite.

    Raises:
        InputError: `args` is no tuple, the model does not run on the inputs.
        ModelError: no parameters, NaN or infinite parameters, or parameters on the meta device.
    """
    if not isinstance(model, nn.Module):
        raise InputError(f"model is a {type(model).__name__}, not a torch.nn.Module.\n  Pass the module itself.")
    if not isinstance(args, (tuple, list)):
        raise InputError(f"args is a {type(args).__name__}; it holds the positional inputs.\n  Pass a tuple: prune(model, (x,), ...).")
    if isinstance(model, torch.jit.ScriptModule):
        raise ModelError(f"{type(model).__name__} is TorchScript, which torch.export does not capture.\n  Pass the Python module it was made from.")
    parameters = dict(model.named_parameters())
    if not parameters:
        raise ModelError(f"{type(model).__name__} has no parameters, so there is nothing to prune.")
    for name, p in parameters.items():
        if isinstance(p, nn.parameter.UninitializedParameter):
            raise ModelError(f"parameter {name!r} of a lazy module has no shape yet.\n  Run the model once on the example inputs first.")
        if p.device.type == "meta":
            raise ModelError(f"parameter {name!r} is on the meta device and has no values.\n  Load the weights; `trace` and `plan` work without.")
        numbers = p.float() if p.element_size() == 1 else p  # torch cannot ask this of float8
        if not bool(torch.isfinite(numbers).all()):
            bad = int((~torch.isfinite(numbers)).sum())
            raise ModelError(f"parameter {name!r} holds {bad} values of {p.numel()} that are NaN or infinite.\n  Load sound weights first.")
    for name, b in model.named_buffers():
        if b.is_floating_point() and bool(torch.isnan(b).any()):
            raise ModelError(f"buffer {name!r} holds {int(torch.isnan(b).sum())} values of {b.numel()} that are NaN.\n  Load sound weights first.")
    device = next(iter(parameters.values())).device
    for leaf in tree_leaves((tuple(args), dict(kwargs))):
        if not isinstance(leaf, torch.Tensor):
            continue
        if leaf.device != device:
            raise InputError(f"an input of {shapes(tuple(args), kwargs)} is on {leaf.device}, the model on {device}.\n  Move one to the other.")
        if leaf.is_floating_point() and bool(torch.isnan(leaf).any()):
            raise InputError(f"an input of {shapes(tuple(args), kwargs)} holds NaN.\n  Pass sound example inputs; the proof runs on them.")
    with at_rest(model):
        forward(model, tuple(args), kwargs)
