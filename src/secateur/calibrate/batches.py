"""The user's data, batch by batch: inputs as the model takes them, and labels where there are any."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch.utils._pytree import tree_leaves

from secateur.errors import DataError, InputError, SecateurError
from secateur.measure.run import batch_of, forward, shapes

Item = TypeVar("Item")


@dataclass(frozen=True)
class Batch:
    """One batch. `number` counts from 1; `given` is what the data set handed over, as it was."""

    number: int
    args: tuple
    kwargs: dict[str, Any]
    labels: torch.Tensor | None
    given: Any

    @property
    def rows(self) -> int:
        return batch_of(self.args, self.kwargs)

    def __str__(self) -> str:
        return f"batch {self.number} of data, {shapes(self.args, self.kwargs)}"


def batches(data: Iterable[Any], args: tuple, kwargs: Mapping[str, Any] | None = None) -> Iterator[tuple[tuple, dict[str, Any]]]:
    """Each item of `data` as (args, kwargs): of a tuple as many leading entries as the model has positional inputs. What holds no tensor in the
    traced call (`args`, `kwargs`), such as a flag, is as it is there where an item does not say otherwise: the model does what was traced.

    Raises:
        DataError: an item that holds no input.
    """
    for item in data:
        found, named, _ = _inputs(item, args, kwargs or {})
        yield found, named


def read(data: Iterable[Any], args: tuple, kwargs: Mapping[str, Any] | None = None) -> Iterator[Batch]:
    """Each item of `data` as a `Batch`, its inputs as in `batches`. Labels are the entry of a tuple after the inputs, or what a dict names "labels".

    Raises:
        DataError: an item that holds no input or no rows, or a data set that stops with an error.
    """
    for number, item in enumerate(arriving(data), 1):
        found, named, used = _inputs(item, args, kwargs or {})
        if batch_of(found, named) == 0:
            raise no_rows(number, found, named)
        labels = named.get("labels") if isinstance(item, Mapping) else None
        if isinstance(item, (tuple, list)) and len(item) > used:
            labels = item[used]
        yield Batch(number, found, named, labels if isinstance(labels, torch.Tensor) else None, item)


def taken(named: Mapping[str, Any], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Of a batch's named inputs those that the model is called with: all but labels, where the example has none by name."""
    by_name = any(_holds_tensor(v) for v in kwargs.values())
    return {k: v for k, v in named.items() if k in kwargs or (k != "labels" and not by_name)}


class Reread:
    """An iterator that can be gone through many times: what it gave is kept."""

    def __init__(self, items: Iterator[Any]):
        self.items, self.kept = items, list[Any]()

    def __iter__(self) -> Iterator[Any]:
        number = 0
        while True:
            if number == len(self.kept):
                try:
                    self.kept.append(next(self.items))
                except StopIteration:
                    return
            yield self.kept[number]
            number += 1


@dataclass(frozen=True)
class Anew:
    """What `make()` gives, made anew whenever it is gone through."""

    make: Callable[[], Iterator[Any]]

    def __iter__(self) -> Iterator[Any]:
        return self.make()


def many_times(data: Any) -> Any:
    """`data`, also where it is an iterator, which could be gone through once."""
    return Reread(data) if isinstance(data, Iterator) else data


def _inputs(item: Any, args: tuple, kwargs: Mapping[str, Any]) -> tuple[tuple, dict[str, Any], int]:
    """A call for an item, and how many entries of a tuple are in it."""
    flags = {k: v for k, v in kwargs.items() if not _holds_tensor(v)}
    if isinstance(item, torch.Tensor):
        item = (item,)
    if isinstance(item, Mapping):
        unnamed = [n for n, a in enumerate(args) if a is not None and not _holds_tensor(a)]
        if unnamed:
            raise DataError(f"the traced call has {args[unnamed[0]]!r} as input {unnamed[0] + 1} by place, which a batch that is a dict cannot say.\n"
                            "  Pass it by name in the example inputs (kwargs=), or give batches as tuples.")  # fmt: skip
        return (), {**item, **{k: v for k, v in flags.items() if k not in item}}, 0
    if isinstance(item, (tuple, list)) and item:
        named = [a is not None and not _holds_tensor(a) for a in args]
        if (len(item) >= len(args) and all(type(v) is type(a) for v, a, flag in zip(item, args, named, strict=False) if flag)) or not any(named):
            used = min(len(item), max(1, len(args)))
            return tuple(item[:used]), flags, used
        found, used = list[Any](), 0
        for example in args:  # the flags are not in the batch
            if not _holds_tensor(example):
                found.append(example)
            elif used < len(item):
                found.append(item[used])
                used += 1
        return tuple(found), flags, used
    raise DataError(f"a batch is a {type(item).__name__}.\n  Give tensors, (inputs, labels) tuples, or dicts of keyword inputs.")


def arriving(items: Iterable[Item]) -> Iterator[Item]:
    """The items of a data set; whatever it raises comes back as a DataError."""
    given = 0
    try:
        for item in items:
            given += 1
            yield item
    except SecateurError:
        raise
    except Exception as error:  # whatever the user's data set raises
        raise DataError(
            f"data stopped after {given} batches with {type(error).__name__}: {error}.\n"
            "  No statistics were changed. Pass an iterable of batches that can be read to its end."
        ) from error


def run(model: torch.nn.Module, number: int, args: tuple, kwargs: Mapping) -> Any:
    """`model` on one batch.

    Raises:
        DataError: a batch without rows, or one that the model cannot run.
    """
    if batch_of(args, kwargs) == 0:
        raise no_rows(number, args, kwargs)
    try:
        return forward(model, args, kwargs)
    except InputError as error:
        said = str(error).splitlines()[1].strip().removeprefix("It said: ")
        raise does_not_run(number, args, kwargs, said) from error


def does_not_run(number: int, args: tuple, kwargs: Mapping, said: str) -> DataError:
    return DataError(
        f"batch {number} of data, {shapes(args, kwargs)}, does not run: {said}\n"
        "  Pass batches like the example inputs, on the model's device and in its dtype: an iterable of tensors, of (inputs, labels), "
        "or of dicts."
    )


def no_rows(number: int, args: tuple, kwargs: Mapping) -> DataError:
    """What to raise for a batch without rows."""
    return DataError(f"batch {number} of data has no rows: {shapes(args, kwargs)}.\n  Leave empty batches out.")


def _holds_tensor(value: Any) -> bool:
    return any(isinstance(leaf, torch.Tensor) for leaf in tree_leaves(value))
