"""The forms that a layer's weight may be stored in, and which of them computes quickest."""

from __future__ import annotations

import time
from collections.abc import Callable
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn

from secateur.errors import InputError
from secateur.runtime.decode import TOKENS, DecodeLinear
from secateur.runtime.layers import inner, sparse, why_not
from secateur.runtime.layout import ROWS, Layout
from secateur.runtime.semi import TOKENS as MANY
from secateur.runtime.semi import semi_structured, why_not_semi

DENSE, BITS, SEMI = "dense", "bits", "2:4"
FORMS = (DENSE, *(f"{r}x1" for r in ROWS), BITS, SEMI)  # blocks of rows that share their columns; a bit for every weight; on GPUs


def zeros_of(layer: nn.Module) -> float:
    """The share of zeros of its weight."""
    weight = inner(layer).get_parameter("weight")
    return float((weight == 0).float().mean()) if weight.numel() else 0.0


def forms_for(layer: nn.Module, x: Tensor) -> list[str]:
    """The forms that a layer may take for such an input."""
    weight = inner(layer).get_parameter("weight").flatten(1)
    if x.device.type == "cuda":
        return [] if why_not_semi(layer, x) else [SEMI]
    few = type(layer) is nn.Linear and x.numel() <= TOKENS * weight.shape[1]
    bits = [BITS] if few and x.dtype == weight.dtype in (torch.float32, torch.bfloat16) else []
    if x.device.type != "cpu" or not x.dtype == weight.dtype == torch.float32:
        return bits if x.device.type == "cpu" else []
    stored = {r: r * len(Layout.of(weight, r).index) for r in ROWS}
    return [f"{r}x1" for r, n in stored.items() if n <= max(2 * min(stored.values()), 1)] + bits


def formed(layer: nn.Module, form: str, x: Tensor | None = None) -> nn.Module:
    """A layer in another form; its tensors are ordinary ones, wherever this is called. `x`: an input of it, which "2:4" is checked for.

    Raises:
        InputError: there is no such form, or not of this layer.
    """
    if form not in FORMS:
        raise InputError(f"form {form!r}: there are {', '.join(FORMS)}.\n  Choose one of them.")
    with torch.inference_mode(False), torch.no_grad():
        if form == SEMI:
            many = torch.empty(MANY, layer.get_parameter("weight").shape[-1], dtype=layer.get_parameter("weight").dtype, device="meta")
            return semi_structured(layer, many if x is None else x)
        if form == BITS:
            if type(layer) is not nn.Linear or why_not(layer):
                why = why_not(layer) or "only linear layers have"
                raise InputError(f"{type(layer).__name__} has no form {BITS!r}: {why}.\n  Choose another.")
            return DecodeLinear.of(layer)
        return layer if form == DENSE else sparse(layer, int(form[0]))


def in_turns(calls: list[Callable[[], Any]], rounds: int, seconds: float | None = None) -> list[float]:
    """Median seconds of each call, timed in turns so that all see the same machine; fewer rounds where `seconds` are over."""
    times: list[list[float]] = [[] for _ in calls]
    for call in calls:
        call()
    begin = time.perf_counter()
    for turn in range(rounds):
        for i, call in enumerate(calls):
            at = time.perf_counter()
            call()
            times[i].append(time.perf_counter() - at)
        if seconds is not None and turn >= 2 and time.perf_counter() - begin > seconds:
            break
    return [median(t) for t in times]
