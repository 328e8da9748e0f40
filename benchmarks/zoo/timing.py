"""Where the seconds go: how long `torch.export` takes inside a call, without a change to the library."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch


@contextmanager
def exports(clock: Callable[[], float] = time.perf_counter) -> Iterator[list[float]]:
    """A list that receives the seconds of every `torch.export.export` made inside the block, in order."""
    seconds: list[float] = []
    original = torch.export.export

    def timed(*args: Any, **kwargs: Any) -> Any:
        start = clock()
        try:
            return original(*args, **kwargs)
        finally:
            seconds.append(clock() - start)

    torch.export.export = timed  # type: ignore[assignment]
    try:
        yield seconds
    finally:
        torch.export.export = original


@contextmanager
def stages(
    module: Any, names: tuple[str, ...], clock: Callable[[], float] = time.perf_counter
) -> Iterator[dict[str, float]]:
    """Seconds spent in each of the functions `names` of `module` inside the block."""
    seconds = dict.fromkeys(names, 0.0)
    originals = {name: getattr(module, name) for name in names}

    def timer(name: str) -> Any:
        def timed(*args: Any, **kwargs: Any) -> Any:
            start = clock()
            try:
                return originals[name](*args, **kwargs)
            finally:
                seconds[name] += clock() - start

        return timed

    for name in names:
        setattr(module, name, timer(name))
    try:
        yield seconds
    finally:
        for name, original in originals.items():
            setattr(module, name, original)
