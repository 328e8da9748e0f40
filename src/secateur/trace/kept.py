"""What a module itself remembers from one call to the next, put back after a look at it."""

from __future__ import annotations

from collections import Counter, OrderedDict
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.nn.modules.lazy import LazyModuleMixin
from torch.utils._python_dispatch import _disable_current_modes
from torch.utils._pytree import tree_leaves

BORN_LATER = (torch.jit.ScriptModule, LazyModuleMixin)  # state out of Python's sight; sizes that the first call sets
_PLAIN = (bool, int, float, complex, str, type(None), tuple, list, dict, set)
_FILLED = {Counter: "update", OrderedDict: "update", dict: "update", set: "update", list: "__setitem__"}  # how what was emptied is filled again
_STRUCTURE = ("_parameters", "_buffers", "_modules")
_ABSENT = object()


class Kept:
    """Numbers, words, flags and containers among the attributes of a module, what its lists, dicts and sets hold (hooks too), and the values of its
    buffers. All of it or none: a flag that says that a list is filled goes with the list. Tensors and modules among the attributes stay what they
    are now: norms of weights leave theirs there, spread weights are gathered, a caller may have put one layer in the place of another. Not seen is
    what lies deeper, such as a list in a list, or is in a container that is filled in a way of its own.

    Args:
        whole: parameters, buffers and sub-modules are those of before too, as after a capture, in which a forward made them of no numbers.
    """

    def __init__(self, module: nn.Module, whole: bool = False):
        self.module = module
        with torch.no_grad(), _disable_current_modes():
            self.buffers = {k: (b, None if b.is_inference() else _copy(b)) for k, b in module._buffers.items() if b is not None}
            written = module._parameters if getattr(module, "max_norm", None) is not None else {}  # an embedding shortens what it looks up
            self.written = [(p, *_copy(p)) for p in written.values() if p is not None and not p.is_inference()]
        held = vars(module)
        self.names = set(held)
        self.plain = {k: v for k, v in held.items() if isinstance(v, _PLAIN) and (whole or k not in _STRUCTURE)}
        self.contents = [(v, kind(v)) for v in self.plain.values() for kind in (dict, set, list) if isinstance(v, kind) and _as_usual(v)]

    def put_back(self) -> None:
        held = vars(self.module)
        for name in [k for k in held.keys() - self.names if _is_plain(held[k])]:
            del held[name]
        for container, contents in self.contents:
            _refill(container, contents)
        registered = {name for some in _STRUCTURE for name in held[some]}  # a layer that was None: beside it, None would hide it
        for name, value in self.plain.items():
            if held.get(name, _ABSENT) is not value and name not in registered:
                held[name] = value
        with torch.no_grad(), _disable_current_modes():
            for name, (buffer, copy) in self.buffers.items():
                if self.module._buffers.get(name) is not buffer:
                    self.module._buffers[name] = buffer
                if copy and (buffer._version != copy[1] or not _same(buffer, copy[0])):
                    buffer.copy_(copy[0])
            for parameter, values, version in self.written:
                if parameter._version != version:
                    parameter.copy_(values)


def _is_plain(value: Any) -> bool:
    """A number, a word, a flag, a container, or tensors that are no numbers: what a forward remembers of a run that is to leave nothing."""
    return isinstance(value, _PLAIN) or any(isinstance(leaf, FakeTensor) for leaf in tree_leaves(value))


def _as_usual(container: Any) -> bool:
    """Whether it can be emptied and filled as the built-in container that it is."""
    kind = next(k for k in _FILLED if isinstance(container, k))
    return all(getattr(type(container), method) is getattr(kind, method) for method in ("clear", _FILLED[kind]))


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
