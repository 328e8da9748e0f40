"""Running a model in order to look at it, and leaving it as it was."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map_only

from secateur.errors import InputError


@contextmanager
def at_rest(model: nn.Module) -> Iterator[None]:
    """Evaluation mode, no gradients, no fused attention; every flag is put back afterwards.

    The flags are set one by one because modules that ``torch.export`` made refuse ``eval()``. The fast path of
    ``nn.MultiheadAttention`` is closed because it hides a whole layer behind one operator on the CPU only.
    """
    flags = [(module, module.training) for module in model.modules()]
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


def forward(model: nn.Module, args: tuple, kwargs: Mapping[str, Any] | None = None) -> Any:
    """``model(*args, **kwargs)``; what the model raises comes back as an InputError that names the shapes."""
    try:
        return model(*args, **(kwargs or {}))
    except (RuntimeError, TypeError, ValueError, IndexError, AssertionError) as error:
        raise InputError(
            f"{type(model).__name__} cannot run on inputs of {shapes(args, kwargs)}.\n"
            f"  It said: {str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__}\n"
            "  Pass args=(...) and kwargs={...} as forward takes them, on the model's device and in its dtype."
        ) from error


def inputs_on(model: nn.Module, args: tuple, kwargs: Mapping[str, Any] | None) -> tuple[tuple, dict[str, Any]]:
    """The inputs as a tuple and a dict; moved to the meta device if that is where the model is."""
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
