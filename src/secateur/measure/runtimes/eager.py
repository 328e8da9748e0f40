"""torch: the module itself, operator by operator."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

from secateur.measure.run import forward, untouched


@contextmanager
def prepare(model: nn.Module, args: tuple, kwargs: dict[str, Any], threads: int) -> Iterator[Callable[[], Any]]:
    """One call of the module; `threads` is what torch is set to when it is called. Raises InputError if it cannot run."""
    with untouched(args, kwargs):
        forward(model, args, kwargs)
        yield lambda: model(*args, **kwargs)
