"""Running a model in order to look at it, and leaving it as it was."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import _disable_current_modes
from torch.utils._pytree import tree_leaves, tree_map_only

from secateur.errors import InputError
from secateur.trace.kept import BORN_LATER, Kept


@contextmanager
def at_rest(model: nn.Module) -> Iterator[None]:
    """Evaluation mode, no gradients, no fused attention; every flag is put back afterwards, and so are the buffers and
    attributes that a forward of the model itself changes (`Kept`).

    The flags are set one by one because modules that ``torch.export`` made refuse ``eval()``. The fast path of
    ``nn.MultiheadAttention`` is closed because it hides a whole layer behind one operator on the CPU only.
    """
    flags = [(module, module.training) for module in model.modules()]
    kept = [Kept(module) for module, _ in flags if not isinstance(module, BORN_LATER)]
    fast = torch.backends.mha.get_fastpath_enabled()
    try:
        for module, _ in flags:
            module.training = False
        torch.backends.mha.set_fastpath_enabled(False)
        with torch.no_grad():
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)
        for module, training in flags:
            module.training = training
        for state in kept:
            state.put_back()


@contextmanager
def untouched(args: tuple, kwargs: Mapping[str, Any] | None = None) -> Iterator[None]:
    """Inputs that a forward writes into are put back afterwards."""
    tensors = [leaf for leaf in tree_leaves((tuple(args), dict(kwargs or {}))) if isinstance(leaf, Tensor)]
    with torch.no_grad(), _disable_current_modes():
        copies = [(tensor, (tensor.clone(), tensor._version)) for tensor in tensors if not tensor.is_inference()]
    try:
        yield
    finally:
        with torch.no_grad(), _disable_current_modes():
            for tensor, (value, version) in copies:
                if tensor._version != version:
                    tensor.copy_(value)


def forward(model: nn.Module, args: tuple, kwargs: Mapping[str, Any] | None = None) -> Any:
    """``model(*args, **kwargs)``; what the model raises comes back as an InputError that names the shapes. Inputs that
    the model writes into are put back."""
    try:
        with untouched(args, kwargs):
            return model(*args, **(kwargs or {}))
    except (Exception, SystemExit) as error:  # a user's forward may raise anything
        raise InputError(
            f"{type(model).__name__} cannot run on inputs of {shapes(args, kwargs)}.\n"
            f"  It said: {_said(error)}\n"
            "  Pass args=(...) and kwargs={...} as forward takes them, on the model's device and in its dtype."
        ) from error


def _said(error: BaseException) -> str:
    first = (str(error).strip().splitlines() or [""])[0]
    known = isinstance(error, (RuntimeError, TypeError, ValueError)) and first
    return first if known else f"{type(error).__name__}{': ' if first else ''}{first}"


def like(model: nn.Module, value: Any) -> Any:
    """`value` with its tensors moved to the model's device, and those of floating point to its dtype."""
    first = next((p for p in model.parameters() if p.is_floating_point()), None)
    if first is None or not tree_leaves(value):
        return value
    return tree_map_only(Tensor, lambda t: t.to(first.device, first.dtype if t.is_floating_point() else t.dtype), value)


def inputs_on(model: nn.Module, args: tuple, kwargs: Mapping[str, Any] | None) -> tuple[tuple, dict[str, Any]]:
    """The inputs as a tuple and a dict; moved to the meta device if that is where the model is."""
    if not isinstance(model, nn.Module):
        raise InputError(f"model is a {type(model).__name__}, not a torch.nn.Module.\n  Pass the module itself.")
    if isinstance(args, Tensor):
        args = (args,)
    if not isinstance(args, (tuple, list)):
        raise InputError(f"args is a {type(args).__name__}. It holds the positional inputs: pass a tuple, (x,).")
    where = next((tensor.device for tensor in model.parameters()), None)
    both = (tuple(args), dict(kwargs or {}))
    if where is not None and where.type == "meta":
        both = tree_map_only(Tensor, lambda tensor: tensor.to("meta"), both)
    return both


def shapes(args: tuple, kwargs: Mapping[str, Any] | None = None) -> str:
    """The shapes and dtypes of all tensors among the inputs, for messages."""
    tensors = [leaf for leaf in tree_leaves((args, dict(kwargs or {}))) if isinstance(leaf, Tensor)]
    return ", ".join(f"{tuple(t.shape)} {str(t.dtype).removeprefix('torch.')}" for t in tensors) or "no tensors"


def batch_of(args: tuple, kwargs: Mapping[str, Any] | None = None) -> int:
    """Size of the first dimension of the first input tensor; 1 if there is none."""
    for leaf in tree_leaves((args, dict(kwargs or {}))):
        if isinstance(leaf, Tensor) and leaf.dim():
            return int(leaf.shape[0])
    return 1
