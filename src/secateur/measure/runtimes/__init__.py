"""One model, ready to be called on a named runtime: `with prepared(model, args, runtime="onnxruntime") as call: call()`.

Each runtime is one file with one context manager `prepare(model, args, kwargs, threads)`. What it makes (sessions,
temporary files) is gone when the block ends, and the model is as it was.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from secateur.errors import InputError
from secateur.measure.run import at_rest, batch_of, inputs_on
from secateur.measure.runtimes import compiled, eager, onnx_runtime, open_vino

Call = Callable[[], Any]
RUNTIMES: Mapping[str, Callable[[nn.Module, tuple, dict[str, Any], int], AbstractContextManager[Call]]] = {
    "torch": eager.prepare,
    "torch.compile": compiled.prepare,
    "onnxruntime": onnx_runtime.prepare,
    "openvino": open_vino.prepare,
}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
IN_TORCH = ("torch", "torch.compile")
MOST_THREADS = 1024  # OpenMP ends the process where it cannot start as many as it is told to


def check(runtime: str, threads: int = 1, dtype: str | None = None) -> None:
    """Refuse settings that no runtime has.

    Raises:
        InputError: an unknown runtime or dtype, threads outside 1..1024, or bfloat16 outside torch.
    """
    if runtime not in RUNTIMES:
        raise InputError(f"unknown runtime {runtime!r}.\n  There are: {', '.join(RUNTIMES)}.")
    if isinstance(threads, bool) or not isinstance(threads, int) or not 1 <= threads <= MOST_THREADS:
        raise InputError(f"threads={threads!r}: a run has 1 to {MOST_THREADS} threads.")
    if dtype is not None and dtype not in DTYPES:
        raise InputError(f"unknown dtype {dtype!r}.\n  There are: {', '.join(DTYPES)}.")
    if dtype == "bfloat16" and runtime not in IN_TORCH:
        raise InputError(f"{runtime} is measured in float32; bfloat16 runs on {' and '.join(IN_TORCH)}.\n  Ask for dtype='float32'.")


@contextmanager
def prepared(
    model: nn.Module,
    args: tuple,
    kwargs: Mapping[str, Any] | None = None,
    *,
    runtime: str = "torch",
    threads: int = 1,
    dtype: str | None = None,
    batch: int | None = None,
) -> Iterator[Call]:
    """A function that runs one call of the model in evaluation mode, valid until the block ends.

    Args:
        model: left as it was, buffers and training flags included.
        args, kwargs: example inputs, as the model is called.
        runtime: "torch", "torch.compile", "onnxruntime" or "openvino".
        threads: of one operator. The torch runtimes take what `torch.set_num_threads` says when they are called, which
            `compare` sets; the others are told here.
        dtype: "float32" or "bfloat16" (torch only); None keeps the model's own.
        batch: rows of one call; None keeps those of the inputs. Rows are repeated or left out to get there.

    Raises:
        InputError: settings that no runtime has, or inputs that the model does not run on.
        ModelError: a package is not installed, the model cannot be exported, or the exported one computes something
            else (largest deviation above 1e-3 of the largest output).
    """
    check(runtime, threads, dtype)
    args, kwargs = inputs_on(model, args, kwargs)
    where = next((p.device.type for p in model.parameters()), "cpu")
    if where == "meta":
        raise InputError(
            "The model is on the meta device, where nothing is computed and nothing takes time.\n"
            "  Load its weights, or ask for count() and peak_bytes() only."
        )
    if where != "cpu" and runtime not in IN_TORCH:
        raise InputError(f"{runtime} is measured on the CPU, and the model is on {where}.\n  Move a copy of it to the CPU first.")
    args, kwargs = rows(args, kwargs, batch)
    model, args, kwargs = cast(model, args, kwargs, dtype)
    with ExitStack() as stack:
        stack.enter_context(at_rest(model))
        yield stack.enter_context(RUNTIMES[runtime](model, args, kwargs, threads))


def rows(args: tuple, kwargs: Mapping[str, Any], batch: int | None) -> tuple[tuple, dict[str, Any]]:
    """The inputs with `batch` rows: every tensor whose first dimension is the batch is repeated as often as needed."""
    have = batch_of(args, kwargs)
    if batch is None or batch == have:
        return args, dict(kwargs)

    def resize(x: Tensor) -> Tensor:
        if not x.dim() or x.shape[0] != have:
            return x
        return x.repeat(-(-batch // have), *[1] * (x.dim() - 1))[:batch]

    return tree_map_only(Tensor, resize, (args, dict(kwargs)))


def cast(model: nn.Module, args: tuple, kwargs: dict[str, Any], dtype: str | None) -> tuple[nn.Module, tuple, dict[str, Any]]:
    """A copy of the model and its inputs in another floating point type; the same objects where nothing changes."""
    if dtype is None:
        return model, args, kwargs
    wanted = DTYPES[dtype]
    tensors = [*model.parameters(), *model.buffers()]
    if any(t.is_floating_point() and t.dtype != wanted for t in tensors):
        model = copy.deepcopy(model).to(wanted)
    args, kwargs = tree_map_only(Tensor, lambda x: x.to(wanted) if x.is_floating_point() else x, (args, kwargs))
    return model, args, kwargs
