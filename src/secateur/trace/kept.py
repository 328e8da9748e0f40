"""What a module itself remembers from one call to the next, put back after a look at it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.lazy import LazyModuleMixin
from torch.utils._python_dispatch import _disable_current_modes

BORN_LATER = (torch.jit.ScriptModule, LazyModuleMixin)  # state out of Python's sight; sizes that the first call sets
_ABSENT = object()


class Kept:
    """Attributes of one module, what its lists, dicts and sets hold (hooks and sub-modules too), and the values of its buffers. All of it or none:
    a flag that says that a list is filled goes with the list."""

    def __init__(self, module: nn.Module):
        self.module = module
        with torch.no_grad(), _disable_current_modes():
            self.buffers = [(b, *_copy(b)) for b in module._buffers.values() if b is not None and not b.is_inference()]
            written = module._parameters if getattr(module, "max_norm", None) is not None else {}  # an embedding shortens what it looks up
            self.written = [(p, *_copy(p)) for p in written.values() if p is not None and not p.is_inference()]
        self.attributes = dict(vars(module))
        self.contents = [(v, kind(v)) for v in self.attributes.values() for kind in (list, dict, set) if isinstance(v, kind)]

    def put_back(self) -> None:
        held = vars(self.module)
        for name in held.keys() - self.attributes.keys():
            del held[name]
        for name, value in self.attributes.items():
            if held.get(name, _ABSENT) is not value:
                held[name] = value
        for container, contents in self.contents:
            _refill(container, contents)
        with torch.no_grad(), _disable_current_modes():
            for buffer, values, version in self.buffers:
                if buffer._version != version or not _same(buffer, values):
                    buffer.copy_(values)
            for parameter, values, version in self.written:
                if parameter._version != version:
                    parameter.copy_(values)


def _copy(tensor: Tensor) -> tuple[Tensor, int]:
    """Its values, and the number of writes into it so far (tensors made in inference mode have none)."""
    return tensor.clone(), tensor._version


def _same(a: Tensor, b: Tensor) -> bool:
    """Batch norm writes its statistics without counting it as a write."""
    if a.device.type == "meta" or a.layout != torch.strided or not a.is_floating_point():
        return True
    return torch.allclose(a, b, rtol=0.0, atol=0.0, equal_nan=True)


def _refill(container: Any, before: Any) -> None:
    """A list, dict or set with what it held; a forward may keep tensors in it, and in a capture they are no numbers."""
    if isinstance(container, list):
        if [*map(id, container)] != [*map(id, before)]:
            container[:] = before
    elif not _alike(container, before):
        container.clear()
        container.update(before)


def _alike(a: Any, b: Any) -> bool:
    return a == b if isinstance(a, set) else [(k, id(v)) for k, v in a.items()] == [(k, id(v)) for k, v in b.items()]
