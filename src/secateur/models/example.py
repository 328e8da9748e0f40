"""Example inputs: read from the command line, described in a saved folder, built again from that description."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from secateur.errors import InputError
from secateur.models import graph_file

_SHAPE = re.compile(r"(?P<sizes>\d+(x\d+)*)(:(?P<dtype>\w+)(<(?P<high>\d+))?)?")
_DTYPES = {"float32", "float16", "bfloat16", "float64", "int64", "int32", "int8", "uint8", "bool"}


def parse_input(text: str) -> Tensor:
    """A random tensor from its shape: `1x3x224x224`, `1x16:int64<1000` (whole numbers below 1,000), `2x8:float16`.

    Raises InputError for anything else.
    """
    match = _SHAPE.fullmatch(text.strip())
    if match is None or (match["dtype"] or "float32") not in _DTYPES or "0" in match["sizes"].split("x"):
        raise InputError(
            f"--input {text!r} is not a shape.\n"
            "  Write sizes of at least 1 joined by x, like 1x3x224x224, or with a dtype, like 1x16:int64<1000 "
            f"(one of {', '.join(sorted(_DTYPES))})."
        )
    shape = [int(size) for size in match["sizes"].split("x")]
    high = int(match["high"] or 2)
    try:
        return _random(shape, match["dtype"] or "float32", high)
    except (RuntimeError, ValueError, TypeError) as error:  # more numbers than memory holds, or none below the bound
        raise InputError(f"--input {text!r} cannot be made: {(str(error).splitlines() or ['?'])[0][:160]}.\n"
                         "  Write sizes that fit into memory, and a bound of at least 1.") from error  # fmt: skip


def describe(args: tuple, kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Shapes and dtypes of the inputs in JSON's types; of whole numbers also the bound below which they lie.
    The values themselves are not kept: they may be somebody's data."""
    return {"args": [_describe(a) for a in args], "kwargs": {k: _describe(v) for k, v in kwargs.items()}}


def rebuild(form: Mapping[str, Any]) -> tuple[tuple, dict[str, Any]]:
    """Random inputs as `describe` saw them: (args, kwargs)."""
    return tuple(_rebuild(a) for a in form["args"]), {k: _rebuild(v) for k, v in form["kwargs"].items()}


def _describe(value: Any) -> Any:
    if isinstance(value, Tensor):
        out: dict[str, Any] = {"shape": list(value.shape), "dtype": str(value.dtype).removeprefix("torch.")}
        if not value.is_floating_point() and not value.is_complex() and value.numel() and value.device.type != "meta":
            out["below"] = int(value.max()) + 1
        return {"tensor": out}
    if isinstance(value, (tuple, list)):
        return {"tuple" if isinstance(value, tuple) else "list": [_describe(v) for v in value]}
    if isinstance(value, dict):
        return {"dict": {k: _describe(v) for k, v in value.items()}}
    try:
        return graph_file.encode(value)
    except graph_file.CannotWrite:
        return {"other": type(value).__name__}


def _rebuild(form: Any) -> Any:
    if not isinstance(form, dict):
        return form
    ((kind, held),) = form.items()
    if kind == "tensor":
        return _random(held["shape"], held["dtype"], max(1, held.get("below", 2)))
    if kind in ("tuple", "list"):
        return (tuple if kind == "tuple" else list)(_rebuild(v) for v in held)
    if kind == "dict":
        return {k: _rebuild(v) for k, v in held.items()}
    if kind == "other":
        raise InputError(f"The model was pruned with an input of type {held}, which plan.json cannot hold.\n"
                         "  Pass inputs of your own.")  # fmt: skip
    return graph_file.decode(form, {})


def _random(shape: list[int], dtype: str, high: int) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    kind = getattr(torch, dtype)
    if kind.is_floating_point:
        return torch.randn(shape, generator=generator).to(kind)
    if kind.is_complex:
        return torch.complex(torch.randn(shape, generator=generator), torch.randn(shape, generator=generator)).to(kind)
    return torch.randint(0, min(high, 256 if kind == torch.uint8 else high), shape, generator=generator).to(kind)
