"""A module as an ONNX file, and whether a runtime computes from it what torch computes."""

from __future__ import annotations

import importlib
import logging
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from secateur.errors import ModelError
from secateur.measure.run import forward

TOLERANCE = 1e-3  # largest deviation over the largest output: fused and re-ordered float32 sums stay far below


def required(extra: str, *packages: str) -> Any:
    """The first of the packages, imported; all must be there.

    Raises:
        ModelError: one is not installed.
    """
    found = []
    for name in packages:
        try:
            found.append(importlib.import_module(name))
        except ImportError as error:
            raise ModelError(
                f"the runtime {packages[0]} needs the package {name}, which cannot be imported ({error}).\n"
                f'  Install it: pip install "secateur[{extra}]"'
            ) from error
    return found[0]


@contextmanager
def exported(model: nn.Module, args: tuple, kwargs: dict[str, Any]) -> Iterator[Path]:
    """The path of an ONNX file of the model as it stands, made by torch's exporter (`dynamo=True`); gone after the block.

    Raises:
        ModelError: the exporter cannot follow the model.
    """
    with TemporaryDirectory(prefix="secateur-onnx-", ignore_cleanup_errors=True) as folder:
        path = Path(folder) / "model.onnx"
        with quietly():
            try:
                write_onnx(model, path, args, kwargs)
            except Exception as error:  # the exporter wraps whatever failed below it
                first = (str(error).strip().splitlines() or [type(error).__name__])[0][:300]
                raise ModelError(
                    f"torch.onnx cannot export {type(model).__name__}: {first}\n"
                    "  Measure it on the runtime 'torch', or export the part that matters."
                ) from error
        yield path


def write_onnx(
    model: nn.Module | torch.export.ExportedProgram, path: Path, args: tuple = (), kwargs: dict[str, Any] | None = None, *, batch: bool = False
) -> None:
    """The ONNX file of a module called with `args` and `kwargs`, or of an exported program. `batch`: free dimensions get names.
    Raises whatever the exporter raises."""
    program = torch.onnx.export(model, args, kwargs=kwargs, dynamo=True, verbose=False)
    if program is None:
        raise RuntimeError("the exporter returned nothing")
    if batch:
        _call_them(program.model)
    program.save(str(path))


def _call_them(model: Any, names: Sequence[str] = ("batch", "length")) -> None:
    """The exporter calls a free dimension s31; the first one of an input is the batch, the second the length of tokens."""
    import onnx_ir

    said: dict[str, str] = {}
    for position, name in enumerate(names):
        free = {str(v.shape[position]) for v in model.graph.inputs if v.shape and len(v.shape) > position and _open(v.shape[position])}
        if len(free) == 1:
            said.setdefault(free.pop(), name)
    for value in [*model.graph.inputs, *model.graph.outputs]:
        if value.shape:
            value.shape = onnx_ir.Shape([said.get(str(size), size) for size in value.shape])


def _open(size: Any) -> bool:
    return not isinstance(size, int)


@contextmanager
def quietly() -> Iterator[None]:
    """The exporter warns of its own deprecations and logs every package it does without."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


def arrays(args: tuple, kwargs: dict[str, Any], names: Sequence[str], who: str) -> dict[str, np.ndarray]:
    """The input tensors by the names that the ONNX file gave them, in its order; keywords go by their own name.

    Raises:
        ModelError: the file takes another number of inputs.
    """
    named = {k: v for k, v in kwargs.items() if k in names and isinstance(v, Tensor)}
    rest = [t for t in tree_leaves((args, {k: v for k, v in kwargs.items() if k not in named})) if isinstance(t, Tensor)]
    free = [name for name in names if name not in named]
    if len(rest) != len(free):
        raise ModelError(
            f"{who}: the exported model takes {len(names)} inputs ({', '.join(names)}), and the call has {len(rest) + len(named)}.\n"
            "  An input that forward() does not use is dropped by the exporter: leave it out of args and kwargs."
        )
    return {name: t.detach().cpu().contiguous().numpy() for name, t in [*named.items(), *zip(free, rest, strict=True)]}


def agree(model: nn.Module, args: tuple, kwargs: dict[str, Any], run: Callable[[], Sequence[Any]], who: str) -> float:
    """Largest deviation of `run()` from the model's outputs, over the largest absolute output of the same tensor.

    Raises:
        ModelError: it is above 1e-3, or the outputs are others in number or shape.
    """
    wanted = [t.detach().cpu() for t in tree_leaves(forward(model, args, kwargs)) if isinstance(t, Tensor)]
    found = [torch.from_numpy(np.array(value)) for value in run()]
    if [tuple(t.shape) for t in wanted] != [tuple(t.shape) for t in found]:
        raise ModelError(
            f"{who} gives outputs of shapes {[tuple(t.shape) for t in found]} for {type(model).__name__}, "
            f"torch gives {[tuple(t.shape) for t in wanted]}.\n  Return plain tensors from forward(), each once."
        )
    worst = float(np.max([deviation(a, b)[1] for a, b in zip(wanted, found, strict=True)], initial=0.0))  # NaN is the worst of all
    if not worst <= TOLERANCE:
        raise ModelError(
            f"{who} deviates from torch by {worst:.1e} of the largest output of {type(model).__name__}; at most {TOLERANCE:.0e} "
            "is accepted, so its time would be that of another function.\n  Measure on the runtime 'torch'."
        )
    return worst


def deviation(wanted: Tensor, found: Tensor) -> tuple[float, float]:
    """Largest deviation of two tensors of one shape: absolute, and over the largest absolute value of `wanted` (infinities left out)."""
    if not wanted.numel():
        return 0.0, 0.0
    wanted, found = wanted.double(), found.double()
    same = (wanted == found) | (wanted.isnan() & found.isnan())  # equal infinities have no difference
    difference = torch.where(same, 0.0, (wanted - found).abs()).max()
    return float(difference), float(difference / wanted.nan_to_num(0.0, 0.0, 0.0).abs().max().clamp_min(1e-6))
