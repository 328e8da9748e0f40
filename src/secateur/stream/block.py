"""One block: what its linear layers take in, and their weights made sparse."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import Any

import torch
from torch import Tensor, nn

from secateur.errors import DataError
from secateur.masks import Method
from secateur.masks.network import LayerMask
from secateur.masks.problem import Problem, finite, power
from secateur.masks.refit import refit
from secateur.pattern import Pattern, whole

EXACT = 1024  # inputs up to which a layer is solved in float64
RIDGE = 1e-4  # of a refit, relative to the mean of the diagonal of H
REFIT_STEPS = 30

Call = Callable[[int], None]  # runs the block on one sample


@dataclass(frozen=True)
class Rule:
    """What is asked of every layer: `why_not` says why it is left dense."""

    method: Method
    pattern: Pattern
    keep: Fraction
    refit: bool = True
    ignore: Sequence[str] = ()

    def why_not(self, weight: Tensor) -> str:
        return "" if all(whole(self.pattern, matrix(weight))) else f"the pattern {self.pattern} does not fit into {matrix(weight)}"


def given(args: tuple, kwargs: Mapping[str, Any]) -> Tensor:
    """What a linear layer takes in, however it is called."""
    return args[0] if args else next(iter(kwargs.values()))


def matrix(weight: Tensor) -> tuple[int, int]:
    return int(weight.shape[0]), int(weight.shape[1])


def linears(block: nn.Module) -> dict[str, nn.Module]:
    """Linear layers by their name in the block; `Conv1D` of older language models stores its weight inputs first."""
    return {n: m for n, m in block.named_modules() if isinstance(m, nn.Linear) or type(m).__name__ == "Conv1D"}


def oriented(module: nn.Module, weight: Tensor) -> Tensor:
    """(outputs, inputs), a view."""
    return weight if isinstance(module, nn.Linear) else weight.t()


def grams(
    groups: Sequence[Sequence[str]], layers: Mapping[str, nn.Module], samples: Iterable[int], call: Call
) -> list[tuple[Tensor | None, int]]:  # fmt: skip
    """H = E[x x^T] over tokens, and their number, for each group of layers that are given one tensor; None where none ran."""
    sums: list[Tensor | None] = [None for _ in groups]
    tokens = [0 for _ in groups]

    def see(i: int) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
            x = given(args, kwargs)
            rows = x.reshape(-1, x.shape[-1]).float()
            total = sums[i]
            sums[i] = rows.mT @ rows if total is None else total.addmm_(rows.mT, rows)
            tokens[i] += len(rows)

        return hook

    handles = [layers[g[0]].register_forward_pre_hook(see(i), with_kwargs=True) for i, g in enumerate(groups)]
    try:
        for sample in samples:
            call(sample)
    finally:
        for handle in handles:
            handle.remove()
    return [(None if total is None else total.div_(max(1, n)), n) for total, n in zip(sums, tokens, strict=True)]


def solve(name: str, weight: Tensor, gram: Tensor | None, tokens: int, rule: Rule) -> tuple[Tensor, Tensor, LayerMask]:
    """New weights (outputs, inputs) float32, their mask, and what became of the layer.

    Raises:
        DataError: what the layer takes in is not finite, or its moments cannot be inverted.
    """
    if gram is not None and not finite(gram):
        raise DataError(f"layer {name!r} takes in numbers that are not finite on the calibration data.\n  Look for NaN in the weights before it.")
    dtype = torch.float64 if weight.shape[1] <= EXACT else torch.float32
    w = weight.to(dtype)
    h = None if gram is None else gram.to(dtype)
    there = weight != 0
    p = Problem(w, h, rule.pattern, rule.keep, None if bool(there.all()) else there, name=f"layer {name!r}")  # zeros that were there stay
    if h is None or tokens == 0:  # an expert that no token reached: nothing is known but its weights
        stays = p.choose(w.square())
        new, damped, why = torch.where(stays, w, 0.0), 0.0, "no calibration token reached it: the largest weights stay"
    else:
        found = rule.method.function(p)
        new, stays, damped, why = found.w, found.stays, found.damped, ""
        if rule.refit and rule.method.needs == "inputs":
            a = h.clone()
            a.diagonal().add_(RIDGE * float(h.diagonal().mean()))
            new = refit(w, a, new, stays, steps=REFIT_STEPS)
    plain = repaired = 0.0
    if h is not None and (all_of := power(w, h)) > 0:
        plain, repaired = power(torch.where(stays, 0.0, w), h) / all_of, power(w - new, h) / all_of
    size = (int(w.shape[0]), int(w.shape[1]))
    row = LayerMask(name, size, int(stays.sum()), str(rule.pattern), tokens, plain, repaired, "fit" if h is not None else "plain", damped, why=why)
    rows, cols = whole(rule.pattern, size)
    return new.float(), stays, replace(row, dense=size[0] * size[1] - rows * cols)


def in_order(block: nn.Module, layers: Mapping[str, nn.Module], call: Call) -> list[list[str]]:
    """Names of the layers in the order in which they first run on sample 0; those given one tensor together. Layers that never ran
    come last."""
    seen: list[tuple[tuple, str]] = []
    held: list[Any] = []

    def hook(name: str) -> Callable[..., None]:
        def see(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
            x = given(args, kwargs)
            held.append(x)  # so that its memory is not given to another
            seen.append(((x.data_ptr(), x.shape, x.stride(), x._version), name))

        return see

    handles = [m.register_forward_pre_hook(hook(n), with_kwargs=True) for n, m in layers.items()]
    try:
        call(0)
    finally:
        for handle in handles:
            handle.remove()
    groups: dict[tuple, list[str]] = {}
    done: set[str] = set()
    for where, name in seen:
        if name not in done:
            groups.setdefault(where, []).append(name)
            done.add(name)
    rest = [[n] for n in layers if n not in done]
    return [*groups.values(), *rest]
