"""Batches that a user's function returned: what they are, and which of them train and test."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from secateur.errors import DataError, SecateurError


@dataclass(frozen=True)
class Told:
    """What a user's function returned; whatever it raises while it is gone through comes back as a DataError that names it."""

    name: str
    items: Any

    def __len__(self) -> int:
        return len(self.items)

    def __iter__(self) -> Iterator[Any]:
        given = 0
        try:
            for item in self.items:
                given += 1
                yield item
        except SecateurError:
            raise
        except Exception as error:  # whatever reading a user's files raises
            raise DataError(
                f"--data {self.name} stopped after {given} batches with {type(error).__name__}: {error}.\n"
                "  Return batches that can be read to their end."
            ) from error


def parts_of(spec: str, made: Any) -> tuple[Iterable[Any], Iterable[Any], bool]:
    """(train batches, test batches, whether there are labels) of (train, test), or of one list, of which the last fifth is for tests. A loader, which
    may shuffle, and a single batch are both parts at once: train is test then.

    Raises:
        DataError: none of these, or a batch that no model takes.
    """
    if isinstance(made, Mapping):
        raise DataError(f"--data {spec} returned a {type(made).__name__}, which is one batch.\n  Return a list of batches: [batch].")
    pair = made if isinstance(made, tuple) and len(made) == 2 else (made,)
    told = [part if isinstance(part, (list, tuple)) else Told(spec, part) for part in pair if hasattr(part, "__iter__")]
    parts = [list(part) if isinstance(part, Told) and not hasattr(part.items, "__len__") else part for part in told]
    if len(pair) == len(parts) == 1:
        (part,) = parts
        tests = max(1, len(part) // 5) if isinstance(part, (list, tuple)) and len(part) > 1 else 0
        parts = [part[:-tests], part[-tests:]] if tests else [part, part]  # type: ignore[index]
    if len(parts) != 2:
        raise DataError(f"--data {spec} returned a {type(made).__name__}.\n  Return (inputs, labels), a list of "
                        "batches such as a DataLoader, or (train batches, test batches).")  # fmt: skip
    labelled = True
    for part in parts if parts[0] is not parts[1] else parts[:1]:
        seen = part if isinstance(part, (list, tuple)) else islice(part, 1)  # what is at hand is looked at as a whole
        found = [_looked_at(spec, "the first batch" if n == 0 else f"batch {n + 1} of a part", batch) for n, batch in enumerate(seen)]
        if not found:
            raise DataError(f"--data {spec} returned no batches: the data set is empty.\n  Return at least one batch.")
        labelled = labelled and all(found)
    return parts[0], parts[1], labelled


def _looked_at(spec: str, which: str, batch: Any) -> bool:
    """Whether a batch has labels.

    Raises:
        DataError: it is not what a model takes.
    """
    labelled = isinstance(batch, (tuple, list)) and len(batch) == 2
    inputs = list(batch.values()) if isinstance(batch, Mapping) else [batch[0] if labelled else batch]
    if not any(isinstance(leaf, Tensor) for leaf in tree_leaves(inputs)):
        of = f" of {type(inputs[0]).__name__}" if isinstance(batch, (Mapping, tuple, list)) and inputs else ""
        raise DataError(f"--data {spec}: {which} is of type {type(batch).__name__}{of}, without a tensor of inputs.\n"
                        "  Return batches that are tensors, (inputs, labels), or dicts of tensors.")  # fmt: skip
    tensors = [leaf for leaf in tree_leaves(dict(batch) if isinstance(batch, Mapping) else batch) if isinstance(leaf, Tensor)]
    masked = isinstance(batch, (tuple, list)) and not labelled  # beside the inputs there may be masks of -inf
    for tensor in tensors:
        if tensor.layout != torch.strided:
            raise DataError(f"--data {spec}: {which} holds a tensor of layout {tensor.layout}.\n  Return dense tensors: .to_dense().")
        fine = ~tensor.isnan() if masked and tensor is not tensors[0] else tensor.isfinite()
        if tensor.is_floating_point() and not fine.all():
            raise DataError(f"--data {spec}: {which} holds NaN or infinity.\n  Clean the data first.")
    return labelled and batch[1] is not None
