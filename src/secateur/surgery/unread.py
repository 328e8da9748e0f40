"""Notes on what a forward in eval mode never reads: it stays as it was, and may not fit the cut sizes in training or in another call."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping, Sequence
from types import CodeType
from typing import Any

from torch import nn

from secateur.surgery.attributes import Edit
from secateur.trace import Graph

_SHOWN = 4
_NO_CALL = ("__init__", "extra_repr", "__repr__")  # methods that no forward goes through


def unread(model: nn.Module, graph: Graph, kept: Mapping[str, Sequence[Any]], back: Sequence[Edit]) -> list[str]:
    """
    Args:
        model: the cut one. kept: as in `Cut`, of its tensors.
        back: edits that were taken back because eval mode does as well without them.
    """
    lost = {name: {dim.size for dim, place in zip(graph.tensors[name], places, strict=True) if place is not None} for name, places in kept.items()}
    names = sorted({*_parameters(graph), *_buffers(model, graph, set[int]().union(*lost.values()))})
    numbers = [*((e.module, e.attribute, e.old) for e in back), *_numbers(model, lost)]
    said = [(f"{path}." if path else "") + f"{name} = {value}" for path, name, value in numbers if _named(model.get_submodule(path), name)]
    out = []
    if names:
        out.append(f"forward() in eval mode never reads {_first(names)}: left as they are, they may no longer fit what feeds them in training")
    if said:
        out.append(f"forward() in eval mode does as well with {_first(list(dict.fromkeys(said)))}: left as they are, though a tensor lost such a "
                   "size, they may be wrong in training or in another call")  # fmt: skip
    return out


def _first(names: Sequence[str]) -> str:
    return ", ".join(names[:_SHOWN]) + (f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else "")


def _read(graph: Graph) -> set[str]:
    """State names of tensors that the captured forward reads, tied ones by the first of their names."""
    capture = graph.capture
    names = (capture.tensors[n.name] for n in capture.graph.nodes if n.op == "placeholder" and n.name in capture.tensors and n.users)
    return {capture.aliases.get(name, name) for name in names}


def _parameters(graph: Graph) -> Iterator[str]:
    """Such as those of a head that runs in training only."""
    read = _read(graph)
    yield from (name for name in graph.capture.trainable if graph.capture.aliases.get(name, name) not in read)


def _buffers(model: nn.Module, graph: Graph, lost: set[int]) -> Iterator[str]:
    """Averages and queues of as many numbers as a tensor that is read had before the cut. Whole numbers count and point, and have no such size."""
    read = _read(graph)
    for name, buffer in model.named_buffers(remove_duplicate=False):
        if graph.capture.aliases.get(name, name) not in read and buffer.is_floating_point() and buffer.numel() > 1 and lost & set(buffer.shape):
            yield name


def _numbers(model: nn.Module, lost: Mapping[str, set[int]]) -> Iterator[tuple[str, str, int]]:
    """Of the user's modules, those that equal a size which a tensor within lost, and for which no op gave a reason to change."""
    for path, module in model.named_modules():
        if not type(module).__module__.startswith("torch."):
            sizes = set[int]().union(*(held for name, held in lost.items() if not path or name.startswith(f"{path}.")))
            yield from ((path, name, value) for name, value in vars(module).items() if type(value) is int and value in sizes)


def _named(module: nn.Module, attribute: str) -> bool:
    """Whether a method of the module's class names the attribute: many numbers are stored and never looked at again."""
    for kind in type(module).__mro__[: type(module).__mro__.index(nn.Module)]:
        for name, held in vars(kind).items():
            code = getattr(inspect.unwrap(getattr(held, "fget", None) or getattr(held, "__func__", held)), "__code__", None)
            if name not in _NO_CALL and code is not None and attribute in _words(code):
                return True
    return False


def _words(code: CodeType) -> set[str]:
    """Names in a function and in those within it."""
    return set(code.co_names).union(*(_words(c) for c in code.co_consts if isinstance(c, CodeType)))
