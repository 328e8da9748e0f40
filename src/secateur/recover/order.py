"""The batches of every step: the same for the same seed, wherever a run begins again and however many processes share it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from itertools import count
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map_only

from secateur.errors import DataError
from secateur.models.data import Batches
from secateur.recover.checkpoint import digest


class Order:
    """Batches of an epoch, counted. Rows of tensors are drawn in a new order every epoch; a loader is gone through as it is, with torch's random
    numbers (and those of generators of its own) set by the epoch, so that one which shuffles does so in the same way, and by the batch, so that what
    is drawn for it is the same wherever a run begins again. Numbers that it takes from elsewhere, such as NumPy, are its own affair."""

    def __init__(self, data: Iterable[Any], batch: int | None, seed: int):
        self.data, self.seed = data, seed
        whole = isinstance(data, Batches)
        self.size = batch or (data.size if whole else None)  # type: ignore[attr-defined]
        if not whole and batch is not None:
            raise DataError(f"batch={batch}, and the data is a {type(data).__name__} with batches of its own.\n  Set the size there.")
        self.steps = -(-len(data.inputs) // self.size) if isinstance(data, Batches) and self.size else _length(data)
        if not self.steps:
            raise DataError("The data is empty.\n  Give at least one batch.")

    def said(self, first: Any) -> str:
        """What a run that goes on has to have in common: rows where they are at hand, else the number of batches and the form of the `first`,
        whose values may be drawn at random."""
        rows = isinstance(self.data, Batches)
        leaves = [t for t in tree_leaves((self.data.inputs, self.data.labels) if rows else first) if isinstance(t, Tensor)]  # type: ignore[attr-defined]
        forms = [f"{t.dtype} {tuple(t.shape[1:])} {digest({'': t}) if rows else ''}".strip() for t in leaves]
        return f"{self.steps} batches of {', '.join(forms)}"

    def first(self) -> Any:
        """A batch to look at.

        Raises:
            DataError: there is none, or the data fails.
        """
        try:
            return next(self.epoch(0))
        except StopIteration:
            raise DataError("The data is empty.\n  Give at least one batch.") from None
        except Exception as error:  # a user's loader may raise anything
            raise DataError(f"The data failed at its first batch: {type(error).__name__}: {error}.\n  Nothing was trained yet.") from error

    def epoch(self, number: int, begin: int = 0) -> Iterator[Any]:
        """The batches of an epoch from `begin` on."""
        if isinstance(self.data, Batches):
            inputs, labels, size = self.data.inputs, self.data.labels, self.size or 1
            order = torch.randperm(len(inputs), generator=torch.Generator().manual_seed(mixed(self.seed, number, 0)))
            for at in range(begin, self.steps):
                rows = order[at * size : (at + 1) * size]
                yield inputs[rows] if labels is None else (inputs[rows], labels[rows])
            return
        layers: list[Any] = [self.data]
        while isinstance(getattr(layers[-1], "items", None), Iterable):  # what is around a user's loader: names for its errors, a dtype
            layers.append(layers[-1].items)
        for loader in layers:
            for own in _generators(loader):
                own.manual_seed(mixed(self.seed, number, 0))
            if getattr(loader, "persistent_workers", False):  # they would go on with the random numbers of the epoch before
                loader._iterator = None
        torch.manual_seed(mixed(self.seed, number, 0))
        batches = iter(self.data)
        for at in count():
            torch.manual_seed(mixed(self.seed, number, 2 + at))
            try:
                batch = next(batches)
            except StopIteration:
                return
            if at >= begin:
                yield batch


def _generators(data: Any) -> list[torch.Generator]:
    """Of a DataLoader and its samplers, which may be within one another."""
    found, left, seen = list[torch.Generator](), [data], set[int]()
    while left:
        owner = left.pop()
        if owner is None or id(owner) in seen:
            continue
        seen.add(id(owner))
        own = getattr(owner, "generator", None)
        found += [own] if isinstance(own, torch.Generator) else []
        left += [getattr(owner, "sampler", None), getattr(owner, "batch_sampler", None)]
    return found


def mixed(seed: int, step: int, which: int) -> int:
    """A seed of its own for a step of a process (splitmix64)."""
    z = (seed * 0x9E3779B97F4A7C15 + step * 0xBF58476D1CE4E5B9 + which * 0x94D049BB133111EB + 1) % 2**64
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
    return (z ^ (z >> 27)) % 2**63


def _length(data: Iterable[Any]) -> int:
    if isinstance(data, Iterator):
        raise DataError(f"The data is a {type(data).__name__}, which can be gone through only once.\n  Pass a list, a DataLoader or Batches.")
    try:
        return len(data)  # type: ignore[arg-type]
    except TypeError:
        return sum(1 for _ in data)


def rows_of(batch: Any) -> int:
    """Rows of a batch: the length of its first tensor.

    Raises:
        DataError: there is none.
    """
    first = next((t for t in tree_leaves(dict(batch) if isinstance(batch, Mapping) else batch) if isinstance(t, Tensor) and t.dim()), None)
    if first is None:
        raise DataError(f"A batch of the data is a {type(batch).__name__} without tensors.\n  Give (inputs, labels), inputs, or a dict of tensors.")
    return len(first)


def part_of(batch: Any, rank: int, world: int) -> Any:
    """The rows of one process of `world`; processes may have one row more or less."""
    if world == 1:
        return batch
    n = rows_of(batch)
    return rows_from(batch, rank * n // world, (rank + 1) * n // world)


def rows_from(batch: Any, begin: int, end: int) -> Any:
    """The rows from `begin` to `end` of all tensors of a batch that have as many as it."""
    n = rows_of(batch)
    return tree_map_only(Tensor, lambda t: t[begin:end] if t.dim() and len(t) == n else t, dict(batch) if isinstance(batch, Mapping) else batch)
