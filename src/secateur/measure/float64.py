"""Running in float64 what was written for narrower floats."""

from __future__ import annotations

import copy
import math
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map, tree_map_only

_NARROW = (torch.float32, torch.float16, torch.bfloat16)
_COMPLEX = (torch.complex64, torch.complex32)


def double(value: Any) -> Any:
    """Copies of all tensors in a nested value on the CPU, the floating ones in float64."""

    def one(v: Any) -> Any:
        return v.detach().to("cpu", _wide(v.dtype), copy=True) if isinstance(v, torch.Tensor) else v

    return tree_map(one, value)


def doubled(model: nn.Module) -> nn.Module:
    """A copy of a module on the CPU in float64 (complex128)."""
    return copy.deepcopy(model)._apply(lambda t: t.to("cpu", _wide(t.dtype)))


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype in _NARROW else torch.complex128 if dtype in _COMPLEX else dtype


class InFloat64(TorchDispatchMode):
    """Whatever asks for a narrower float gets float64, so that a model with casts inside still computes in float64."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        def widen(v: Any) -> Any:
            return _wide(v) if isinstance(v, torch.dtype) else v

        args, kwargs = tree_map(widen, (args, kwargs or {}))
        schema = func._schema.name
        if kwargs.get("dtype") is None and (schema in _FACTORIES or (schema in _FILLED and any(isinstance(a, float) for a in args))):
            kwargs["dtype"] = torch.float64
        return func(*args, **kwargs)


_FACTORIES = frozenset(f"aten::{n}" for n in ("zeros", "ones", "empty", "rand", "randn", "linspace", "logspace", "eye", "hann_window"))
_FILLED = frozenset(("aten::full", "aten::arange", "aten::scalar_tensor"))  # of floating point where a number given is


LARGE = 1e6


def apart(got: torch.Tensor, wanted: torch.Tensor) -> float:
    """max |got - wanted| / max |wanted|, and infinity for other shapes, integers or places that are not finite.

    Values of more than `LARGE` times the median are compared by themselves: one -1e9 that marks what is not allowed would hide any difference
    in all the others.
    """
    if got.shape != wanted.shape or got.is_complex() != wanted.is_complex():
        return math.inf
    if wanted.is_complex():
        got, wanted = (torch.view_as_real(t.resolve_conj()) for t in (got, wanted))
    if not wanted.is_floating_point():
        return 0.0 if torch.equal(got, wanted) else math.inf
    odd = ~torch.isfinite(wanted)
    if not torch.equal(odd, ~torch.isfinite(got)) or not _same_kind(got[odd], wanted[odd]):
        return math.inf
    got, wanted = got[~odd], wanted[~odd]
    difference, size = (got - wanted).abs(), wanted.abs()
    shown = size[size > 0]
    large = size > LARGE * float(shown.median()) if shown.numel() else size > 0
    worst = 0.0
    for part in (large, ~large):
        if bool(part.any()):
            most, scale = float(difference[part].max()), float(size[part].max())
            worst = max(worst, most / scale if scale else most)
    return worst


def _same_kind(got: torch.Tensor, wanted: torch.Tensor) -> bool:
    """NaN where NaN is, and infinities of the same sign."""
    return torch.equal(got.isnan(), wanted.isnan()) and torch.equal(got.nan_to_num(0.0), wanted.nan_to_num(0.0))


def lively(inputs: Any) -> Any:
    """The inputs with noise in the place of floats that are all alike, such as zeros, of which a network may make nothing but more zeros, so that
    wrong numbers do not show; None where there are none."""
    random = torch.Generator().manual_seed(0)

    def stirred(t: torch.Tensor) -> torch.Tensor:
        flat = t.is_floating_point() and t.device.type != "meta" and t.numel() > 1 and bool((t == t.flatten()[0]).all())
        return torch.randn(t.shape, generator=random).to(t) if flat else t

    out = tree_map_only(torch.Tensor, stirred, inputs)
    return out if any(a is not b for a, b in zip(tree_leaves(out), tree_leaves(inputs), strict=True)) else None
