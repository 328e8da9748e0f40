"""The proof that every prune runs: in float64 the cut model computes what the masked original computes."""

from __future__ import annotations

import math
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_flatten

from secateur.errors import ProofError
from secateur.measure.float64 import InFloat64, double, doubled, lively
from secateur.measure.masked import MaskedOriginal
from secateur.measure.run import at_rest
from secateur.trace import Graph

TOLERANCE = 1e-9


@dataclass(frozen=True)
class Proof:
    """Largest deviation between the cut model and the masked original over all outputs.

    `max_error` is relative: max |cut - masked| / max |masked| of the same output (absolute where the output is all 0).
    """

    max_error: float
    tolerance: float
    outputs: tuple[float, ...]
    all_zero: bool = False  # every output was 0, as with a zero-initialised last layer: the comparison saw nothing

    @property
    def passed(self) -> bool:
        return self.max_error <= self.tolerance

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "passed": self.passed}


def masked_outputs(graph: Graph, keep: Mapping[str, torch.Tensor], state: Mapping[str, torch.Tensor], args: tuple, kwargs: Mapping) -> list:
    """Flat outputs of the masked original in float64. `state` is the dense model's; gradients flow into `state`
    and the inputs where they ask for it."""
    flat, _ = tree_flatten((args, dict(kwargs)))
    runner = MaskedOriginal(graph, keep, state)
    with InFloat64():
        out = runner.run(*runner.inputs(flat), enable_io_processing=False)
    return list(tree_flatten(out)[0])


def prove(
    model: nn.Module, graph: Graph, keep: Mapping[str, torch.Tensor], cut_model: nn.Module, inputs: tuple[tuple, Mapping] | None = None
) -> Proof:
    """Run both in float64 and compare every output.

    Args:
        model: the dense model. Unchanged.
        graph: its trace.
        keep: the plan's masks.
        cut_model: what came out of the cut. Unchanged.
        inputs: (args, kwargs); by default the example inputs of the trace. Shapes must be those of the trace.

    Raises:
        ProofError: one of the two cannot run in float64, so nothing can be compared.
    """
    args, kwargs = inputs if inputs is not None else graph.capture.program.example_inputs
    args, kwargs = double((tuple(args), dict(kwargs)))
    named = {**dict(model.named_parameters(remove_duplicate=False)), **dict(model.named_buffers(remove_duplicate=False))}
    state = {**double(dict(graph.capture.values)), **double(named)}
    other, noise = doubled(cut_model), lively((args, kwargs))

    def masked(args: tuple, kwargs: Mapping) -> list:
        with torch.no_grad():
            return masked_outputs(graph, keep, state, *double((args, kwargs)))  # each its own: a forward may write into them

    def cut(args: tuple, kwargs: Mapping) -> list:
        with torch.no_grad(), at_rest(other), InFloat64():
            return tree_flatten(other(*args, **kwargs))[0]

    stirred: list | None = None
    try:
        wanted, got = masked(args, kwargs), cut(args, kwargs)
        if noise is not None:
            with suppress(Exception):  # the original need not take noise; then it is not asked of the cut either
                stirred = masked(*noise)
            if stirred is not None and all(bool(torch.isfinite(t).all()) for t in stirred if isinstance(t, torch.Tensor)):
                wanted, got = [*wanted, *stirred], [*got, *cut(*noise)]
    except Exception as error:  # a forward may raise anything
        raise ProofError(
            f"{type(model).__name__} does not run in float64, in which every cut is proven: {type(error).__name__}: "
            f"{(str(error).strip().splitlines() or ['?'])[0][:200]}.\n  Nothing is returned and the model is unchanged. "
            "Look in forward() for tensors made in a fixed dtype; x.dtype in its place lets the proof run."
        ) from error
    errors = tuple(_error(a, b) for a, b in zip(got, wanted, strict=True) if isinstance(b, torch.Tensor))
    blind = all(not bool(b.any()) for b in wanted if isinstance(b, torch.Tensor))
    return Proof(max(errors, default=0.0), TOLERANCE, errors, blind)


def _error(got: torch.Tensor, wanted: torch.Tensor) -> float:
    if got.shape != wanted.shape:
        return math.inf
    if not wanted.is_floating_point():
        return 0.0 if torch.equal(got, wanted) else math.inf
    if got.numel() == 0:
        return 0.0
    if not bool(torch.isfinite(wanted).all()):
        if not bool(torch.isfinite(wanted).any()):
            return math.inf  # nothing can be compared, so nothing is proven
        if not torch.equal(torch.isfinite(got), torch.isfinite(wanted)):
            return math.inf
        got, wanted = got[torch.isfinite(wanted)], wanted[torch.isfinite(wanted)]
        if got.numel() == 0:
            return math.inf  # nothing finite to compare proves nothing
    if not bool(torch.isfinite(got).all()):
        return math.inf  # NaN is no larger than any error, so max() over several outputs would pass it over
    difference, scale = float((got - wanted).abs().max()), float(wanted.abs().max())
    return difference / scale if scale else difference


def require(proof: Proof, name: str) -> None:
    """Refuse a result that was not proven.

    Raises:
        ProofError: the deviation is above the tolerance.
    """
    if not proof.passed and math.isinf(proof.max_error):
        raise ProofError(
            f"{name}: the cut model cannot be compared with the masked original: an output has another shape, other integers, "
            "NaN or infinity in other places, or no finite value at all.\n  Nothing is returned and the model is unchanged. "
            "Check that the outputs on the example inputs are finite; if they are, this is a fault of secateur: please report the model."
        )
    if not proof.passed:
        raise ProofError(
            f"{name}: the cut model deviates from the masked original by {proof.max_error:.2e} (relative, float64), "
            f"more than {proof.tolerance:.0e}.\n  Nothing is returned and the model is unchanged. This is a fault of secateur: "
            "please report the model; ignore= the layers involved to go on without them."
        )
