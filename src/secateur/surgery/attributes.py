"""Numbers kept as module attributes (`out_channels`, `num_heads`, `head_dim` ...): which take which new value.

Standard layers are settled by the shapes of their own parameters. For every other module the evidence is in the graph:
a constant of an op that this module's forward ran changed from 12 to 8, so its attribute of value 12 becomes 8.
Whether that was right is not assumed: the caller runs the module against the predicted graph.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import repeat
from typing import Any

import numpy as np
import torch
from torch import nn

from secateur.axes import Axis, count
from secateur.surgery.predict import Change
from secateur.trace.call import module_of, tensors_in


@dataclass(frozen=True)
class Edit:
    """`module.attribute` goes from `old` to `new` (integers, or lists and tuples of them)."""

    module: str
    attribute: str
    old: Any
    new: Any


def _conv(m: nn.Module, groups: int) -> dict[str, Any]:
    w = m.weight.shape
    if m.transposed:
        return {"in_channels": w[0], "out_channels": w[1] * groups, "groups": groups}
    return {"in_channels": w[1] * groups, "out_channels": w[0], "groups": groups}


def standard(m: nn.Module, changed: list[Change]) -> dict[str, Any] | None:
    """Attributes of a standard layer as its (already cut) parameters demand; None for other modules."""
    new = {c.name: c.new for c in changed}
    weight = getattr(m, "weight", None)
    if isinstance(m, nn.modules.conv._ConvNd):
        return _conv(m, new.get("groups", m.groups))
    if isinstance(m, nn.Linear):
        return {"out_features": weight.shape[0], "in_features": weight.shape[1]}
    if isinstance(m, (nn.modules.batchnorm._NormBase,)):
        sized = weight if weight is not None else m.running_mean
        return {} if sized is None else {"num_features": sized.shape[0]}
    if isinstance(m, (nn.LayerNorm, nn.RMSNorm)):
        shape = tuple(weight.shape) if weight is not None else tuple(new.get("normalized_shape", m.normalized_shape))
        return {"normalized_shape": shape}
    if isinstance(m, nn.GroupNorm):
        out = {"num_groups": new.get("num_groups", m.num_groups)}
        return {**out, "num_channels": weight.shape[0]} if weight is not None else out
    if isinstance(m, (nn.Embedding, nn.EmbeddingBag)):
        return {"num_embeddings": weight.shape[0], "embedding_dim": weight.shape[1]}
    if isinstance(m, nn.RNNBase):
        out = {"input_size": m.weight_ih_l0.shape[1], "hidden_size": m.weight_hh_l0.shape[0] // _gates(m)}
        return {**out, "proj_size": m.weight_hr_l0.shape[0]} if m.proj_size else out
    if isinstance(m, nn.RNNCellBase):
        return {"input_size": m.weight_ih.shape[1], "hidden_size": m.weight_hh.shape[1]}
    if isinstance(m, nn.PReLU):
        return {"num_parameters": weight.shape[0]}
    return None


def _gates(m: nn.RNNBase) -> int:
    return {"LSTM": 4, "GRU": 3}.get(m.mode, 1)


def _numbers(value: Any) -> list[int]:
    if isinstance(value, bool):
        return []
    if isinstance(value, int):
        return [value]
    if isinstance(value, (list, tuple)):
        return [v for v in value if isinstance(v, int) and not isinstance(v, bool)]
    return []


def evidence(changed: Iterable[Change], shapes: dict[str, list[tuple[int, int]]]) -> dict[str, dict[int, list[int]]]:
    """module path -> old number -> the new numbers it was seen to become, the most telling first.

    Constants of the module's own ops come first, then the sizes in `shapes`: (old, new) of the parameters of each
    module and of the tensors its own ops work on.
    """
    out: dict[str, dict[int, list[int]]] = defaultdict(lambda: defaultdict(list))
    for c in changed:
        path = module_of(c.node)
        for old, new in zip(_numbers(c.old), _numbers(c.new), strict=False):
            if old != new:
                out[path][old].append(new)
    for path, pairs in shapes.items():
        for old, new in pairs:
            if old != new and old not in out[path]:
                out[path][old].append(new)
    return out


def _substitutes(module: nn.Module, table: dict[int, list[int]], backwards: bool) -> list[tuple[str, Any, Any]]:
    """(attribute, old, new) for the numbers of a module that changed. Where one number became several, the attributes
    that hold it take them in order (or backwards) if there are as many (`lo`, `hi` of a padding), else all take the first."""
    holders: dict[int, int] = defaultdict(int)
    for value in vars(module).values():
        for v in _numbers(value):
            holders[v] += 1
    table = {old: new[::-1] if backwards else new for old, new in table.items()}
    feeds = {
        old: iter(new) if len(new) == holders[old] and len(set(new)) > 1 else repeat(new[0]) for old, new in table.items()
    }
    return [(k, v, _substitute(v, feeds)) for k, v in vars(module).items() if _numbers(v)]


def _substitute(value: Any, feeds: dict[int, Iterator[int]]) -> Any:
    def one(v: Any) -> Any:
        if isinstance(v, int) and not isinstance(v, bool) and v in feeds:
            return next(feeds[v])
        return v

    if isinstance(value, (list, tuple)) and not hasattr(value, "_fields"):
        return type(value)(one(v) for v in value)
    return one(value)


def propose(
    model: nn.Module, changed: list[Change], shapes: dict[str, list[tuple[int, int]]], backwards: bool = False
) -> list[Edit]:
    """Edits for the cut copy `model`, whose parameters are cut already. `backwards` is the other way to deal several new
    numbers to several attributes."""
    found = evidence(changed, shapes)
    by_module: dict[str, list[Change]] = defaultdict(list)
    for c in changed:
        by_module[module_of(c.node)].append(c)
    edits = []
    for path, module in model.named_modules():
        known = standard(module, by_module.get(path, []))
        if known is not None:
            values = [(k, getattr(module, k), v) for k, v in known.items()]
        else:
            table = found.get(path, {})
            values = _substitutes(module, table, backwards) if table else []
        edits += [Edit(path, k, old, new) for k, old, new in values if old != new]
    return edits


def apply(model: nn.Module, edits: Iterable[Edit]) -> None:
    """Set the attributes on `model`."""
    for e in edits:
        setattr(model.get_submodule(e.module), e.attribute, e.new)


def parameter_shapes(old: dict[str, torch.Tensor], new: dict[str, torch.Tensor]) -> dict[str, list[tuple[int, int]]]:
    """(old, new) sizes of every dimension that changed, by the module that owns the tensor."""
    out: dict[str, list[tuple[int, int]]] = defaultdict(list)
    for name, tensor in new.items():
        for a, b in zip(old[name].shape, tensor.shape, strict=True):
            if a != b:
                out[name.rpartition(".")[0]].append((a, b))
    return dict(out)


def tensor_shapes(changed: list[Change], env: dict, keep: Mapping[Axis, np.ndarray]) -> dict[str, list[tuple[int, int]]]:
    """(old, new) sizes of what goes into the ops whose constants changed, by the module that ran them."""
    out: dict[str, list[tuple[int, int]]] = defaultdict(list)
    for c in changed:
        for node in c.node.all_input_nodes:
            for dims in tensors_in(env.get(node)):
                out[module_of(c.node)] += [(d.size, count(d, keep)) for d in dims if count(d, keep) != d.size]
    return dict(out)
