"""Sizes of the example inputs that a captured graph goes on with, whatever it is given.

Only the batch is read at run time. A length that forward() wrote into a number (`/ x.shape[-1]`), an index or a view is that of the example inputs,
and the graph may run on others and compute something else. So every dimension is tried out at other sizes, beside the model itself.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import torch
from torch import fx, nn
from torch.fx.node import map_aggregate
from torch.utils._pytree import tree_flatten, tree_leaves, tree_unflatten

from secateur.measure.float64 import apart, lively
from secateur.measure.run import at_rest, untouched
from secateur.surgery.batch import run_safely

MANY = 16  # dimensions; of more, those of one size are tried together only
_RAN, _DIFFERS = "ran alike", "differs"


class Place(NamedTuple):
    """A dimension of one of the inputs, counted as the graph takes them."""

    input: int
    dim: int


class _Trial:
    """The model beside its graph, on the example inputs at other sizes."""

    def __init__(self, model: nn.Module, graph: fx.GraphModule, inputs: tuple[tuple, dict]):
        self.model, self.graph = model, graph
        self.leaves, self.spec = tree_flatten(inputs)
        self.agreed = dict[Place, int]()  # where both agree: the last size that was tried, the smallest

    def places(self) -> list[Place]:
        """All but the batch."""
        rows = set(_rows(self.leaves))
        return [p for i, t in enumerate(self.leaves) if _sized(t) for d in range(t.dim()) if (p := Place(i, d)) not in rows]

    def size(self, place: Place) -> int:
        return self.leaves[place.input].shape[place.dim]

    def at(self, sizes: Mapping[Place, int]) -> tuple[tuple, dict]:
        leaves = list(self.leaves)
        for place, size in sizes.items():
            leaves[place.input] = _resized(leaves[place.input], place.dim, size)
        return tree_unflatten(leaves, self.spec)

    def both(self, sizes: Mapping[Place, int]) -> tuple[bool, str]:
        """(whether the model runs at these sizes, what the graph does: "" where it raises too, or not)."""
        args, kwargs = self.at(sizes)
        wanted, got = _outputs(self.model, args, kwargs), _outputs(self.graph, args, kwargs)
        if wanted is None:
            return False, "" if got is None else _DIFFERS
        return True, _RAN if got is not None and _alike(got, wanted) else _DIFFERS

    def tried(self, places: list[Place], smaller: bool = False) -> bool | None:
        """Whether the graph does as the model at a larger and at a smaller size of these places, which have the same one; None where neither runs."""
        size, silent, ran = self.size(places[0]), False, False
        for row in _others(size)[smaller:]:
            for other in row:
                runs, does = self.both(dict.fromkeys(places, other))
                if runs and does == _DIFFERS:
                    return False
                silent |= does == _DIFFERS
                if runs:
                    ran = True
                    self.agreed.update(dict.fromkeys(places, other))
                    break
        return True if ran else False if silent else None


def held_sizes(model: nn.Module, graph: fx.GraphModule, args: tuple, kwargs: Mapping[str, Any]) -> list[Place]:
    """The dimensions whose size is a part of `graph`: at another one it differs from `model`, raises where that runs, or runs where that raises.

    Args:
        graph: what `model` does at the sizes of the inputs `args` and `kwargs`, with nothing cut.
    """
    with untouched((*graph.parameters(), *graph.buffers())):  # an operator may write into them, such as one that shortens embeddings
        return _held(model, graph, (tuple(args), dict(kwargs)))


def _held(model: nn.Module, graph: fx.GraphModule, inputs: tuple[tuple, dict]) -> list[Place]:
    trial = _Trial(model, graph, inputs)
    try:
        model, graph, inputs = _on_cpu(model, graph, inputs)
    except Exception:  # the model may be no more than what it is on its device; nothing can be tried
        return [*_rows(trial.leaves), *trial.places()]
    noise = lively(inputs)
    trial = _Trial(model, graph, inputs if noise is None or _outputs(model, *noise) is None else noise)
    rows, held, free = _rows(trial.leaves), set[Place](), set[Place]()
    if rows and not trial.tried(rows, smaller=trial.size(rows[0]) > 4):  # many rows take as much again
        held.update(rows)  # such as where forward() made a number of how many there are
    elif rows and trial.size(rows[0]) > 3:
        trial = _Trial(model, graph, trial.at(dict.fromkeys(rows, 3)))
        trial.agreed.update(dict.fromkeys(rows, 2))
    for places in _together(trial):
        if not held.union(free).isdisjoint(places):
            continue
        if (same := trial.tried(places)) is not None:
            (free if same else held).update(places)
    changed = {p: n for p, n in trial.agreed.items() if p not in held}
    if len(changed) > 1 and trial.both(changed) == (True, _DIFFERS):  # each alone is free, such as two that are multiplied
        held |= free
    return sorted(held)


def rows_of(args: tuple, kwargs: Mapping[str, Any]) -> list[Place]:
    """The batch: the first dimension of the first tensor, and of all others where it is as long."""
    return _rows(tree_leaves((tuple(args), dict(kwargs))))


def _rows(leaves: list) -> list[Place]:
    tensors = [(i, t) for i, t in enumerate(leaves) if _sized(t) and t.dim()]
    return [Place(i, 0) for i, t in tensors if t.shape[0] == tensors[0][1].shape[0]]


def _together(trial: _Trial) -> Iterable[list[Place]]:
    """Each dimension alone, then those of one size in one place, then all of one size: tokens and their mask have one length."""
    places = trial.places()
    alone = [[p] for p in places] if len(places) <= MANY else []
    alike = dict[Any, list[Place]]()
    for p in places:
        alike.setdefault((trial.size(p), p.dim), []).append(p)
        alike.setdefault(trial.size(p), []).append(p)
    more = [group for group in alike.values() if len(group) > 1 or not alone]
    return [*alone, *sorted(more, key=len)]


def _others(size: int) -> list[list[int]]:
    """Larger and smaller sizes, those that a model is likely to take first."""
    odd = size // 2 if size // 2 % 2 else size // 2 + 1
    rows = [size + size // 2, 2 * size, size + 1], [odd, size // 2, size - 1]
    return [[n for n in dict.fromkeys(row) if n > 1 and n != size] for row in rows]  # a size of 1 is that of all others elsewhere


def _sized(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and value.layout == torch.strided and not value.is_nested


def _resized(tensor: torch.Tensor, dim: int, size: int) -> torch.Tensor:
    """Its beginning, or the tensor and its mirror images: what is near its ends is then elsewhere."""
    parts = [tensor]
    while sum(p.shape[dim] for p in parts) < size and tensor.shape[dim]:
        parts.append(parts[-1].flip(dim))
    return torch.cat(parts, dim).narrow(dim, 0, size).contiguous()


def _outputs(model: nn.Module, args: tuple, kwargs: dict) -> list[torch.Tensor] | None:
    """Its tensors; None where it raises."""
    try:
        with at_rest(model), untouched(args, kwargs):
            made = run_safely(model, args, kwargs) if isinstance(model, fx.GraphModule) else model(*args, **kwargs)
            return [t for t in tree_leaves(made) if isinstance(t, torch.Tensor)]
    except Exception:  # whatever it is, it takes no such inputs
        return None


def _alike(got: list[torch.Tensor], wanted: list[torch.Tensor]) -> bool:
    def same(a: torch.Tensor, b: torch.Tensor) -> bool:
        if a.shape != b.shape or a.dtype != b.dtype or b.device.type == "meta":
            return a.shape == b.shape and a.dtype == b.dtype
        loose = b.is_floating_point() and b.element_size() < 4
        return apart(a.float() if loose else a, b.float() if loose else b) <= (3e-2 if loose else 1e-3)

    return len(got) == len(wanted) and all(same(a, b) for a, b in zip(got, wanted, strict=True))


def _on_cpu(model: nn.Module, graph: fx.GraphModule, inputs: Any) -> tuple[nn.Module, fx.GraphModule, Any]:
    """Copies on the CPU of what lies on a device: an index that is out of range is an error there, and elsewhere the end of the process."""
    flat, spec = tree_flatten(inputs)
    tensors = [t for t in (*model.parameters(), *model.buffers(), *flat) if isinstance(t, torch.Tensor)]
    if all(t.device.type in ("cpu", "meta") for t in tensors):
        return model, graph, inputs
    graph = copy.deepcopy(graph).to("cpu")
    for node in graph.graph.nodes:
        node.args, node.kwargs = map_aggregate((node.args, node.kwargs), lambda v: torch.device("cpu") if isinstance(v, torch.device) else v)
    graph.recompile()
    moved = [t.to("cpu") if isinstance(t, torch.Tensor) else t for t in flat]
    return copy.deepcopy(model).to("cpu"), graph, tree_unflatten(moved, spec)
