"""torch.compile: the module through Inductor, with the shapes of the example inputs written in."""

from __future__ import annotations

import types
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from secateur.errors import ModelError
from secateur.measure.run import forward, untouched


@contextmanager
def prepare(model: nn.Module, args: tuple, kwargs: dict[str, Any], threads: int) -> Iterator[Callable[[], Any]]:
    """One call of the compiled module; `threads` is what torch is set to when it is called.

    Compiled code lives on disk where Inductor keeps it, and is found again there by later runs.

    Raises:
        InputError: the module cannot run on these inputs.
        ModelError: it cannot be compiled (no C++ compiler, for one).
    """

    def once() -> Any:
        return model(*args, **kwargs)

    # torch.compile keeps what it compiled with the code object, and falls back to eager after eight of them. The cut
    # models of one search share their forward; a code object of its own for each entry lets every one be compiled, and
    # frees it afterwards.
    own = types.FunctionType(once.__code__.replace(co_name="once"), globals(), "once", None, once.__closure__)
    with untouched(args, kwargs):
        forward(model, args, kwargs)
        call = torch.compile(own, dynamic=False)
        try:
            call()
        except Exception as error:  # Dynamo and Inductor raise many unrelated types
            first = (str(error).strip().splitlines() or [type(error).__name__])[0][:300]
            raise ModelError(
                f"torch.compile cannot compile {type(model).__name__}: {first}\n"
                "  It needs a C++ compiler on the CPU; measure on the runtime 'torch' otherwise."
            ) from error
        yield call
