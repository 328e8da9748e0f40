"""Peak memory of one forward, from the tensors themselves.

Measured with a dispatch mode that sees every operator's outputs: a storage counts from the operator that made it until
nothing refers to it any more. Parameters, buffers and inputs count all the time. The number is the same on every run,
and can be had on the meta device, with the kernels of that device: attention is not fused there, so its scores count.
What it cannot see is scratch space inside one operator (an im2col buffer, a re-ordered weight) and what the allocator
rounds up.
"""

from __future__ import annotations

import weakref
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from secateur.measure.run import at_rest, forward, inputs_on


def peak_bytes(model: nn.Module, args: tuple, kwargs: Mapping[str, Any] | None = None) -> int:
    """The most bytes alive at once during one forward without gradients: weights, buffers, inputs and activations.

    Raises InputError if the model cannot run on these inputs.
    """
    args, kwargs = inputs_on(model, args, kwargs)
    watch = _Live()
    for tensor in [*model.parameters(), *model.buffers(), *tree_leaves((args, kwargs))]:
        watch.meet(tensor)
    with at_rest(model), watch:
        out = forward(model, args, kwargs)
    del out
    return watch.peak


class _Live(TorchDispatchMode):
    """Bytes of the storages met so far that are still alive, and the most they have been."""

    def __init__(self) -> None:
        super().__init__()
        self.now = 0
        self.peak = 0
        self._known: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            self.meet(leaf)
        return out

    def meet(self, leaf: Any) -> None:
        if not isinstance(leaf, Tensor) or leaf.layout != torch.strided:
            return
        storage = leaf.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key in self._known:
            return
        self._known.add(key)
        self.now += size
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._leave, key, size).atexit = False

    def _leave(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.now -= size
