"""The proof that every prune runs: in float64 the cut model computes what the masked original computes."""

from __future__ import annotations

import math
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.utils._pytree import tree_flatten

from secateur.axes import mask
from secateur.errors import ProofError
from secateur.measure.float64 import InFloat64, apart, double, doubled, lively
from secateur.measure.masked import Keep, MaskedOriginal
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

    def masked(args: tuple, kwargs: Mapping, changed: Mapping[str, torch.Tensor] | None = None) -> list:
        with torch.no_grad():  # inputs of each their own: a forward may write into them
            return masked_outputs(graph, keep, {**state, **(changed or {})}, *double((args, kwargs)))

    def cut(args: tuple, kwargs: Mapping) -> list:
        with torch.no_grad(), at_rest(other), InFloat64():
            return tree_flatten(other(*args, **kwargs))[0]

    def tried(*given: Any) -> list | None:
        """What the original makes of other numbers; it need not take them, and then they are not asked of the cut either."""
        with suppress(Exception):
            found = masked(*given)
            return found if all(bool(torch.isfinite(t).all()) for t in found if isinstance(t, torch.Tensor)) else None
        return None

    try:
        wanted, got = masked(args, kwargs), cut(args, kwargs)
        if noise is not None and (stirred := tried(*noise)) is not None:
            wanted, got = [*wanted, *stirred], [*got, *cut(*noise)]
        unseen = _unseen(model, graph, graph.keep_axes(keep))
        stirred = tried(*(noise or (args, kwargs)), {n: whole for n, (whole, _) in unseen.items()}) if unseen else None
        if stirred is not None and _put(other, {n: small for n, (_, small) in unseen.items()}):
            wanted, got = [*wanted, *stirred], [*got, *cut(*(noise or (args, kwargs)))]
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
    if got.shape == wanted.shape and wanted.is_floating_point() and wanted.numel() and not bool(torch.isfinite(wanted).any()):
        return math.inf  # nothing can be compared, so nothing is proven
    return apart(got, wanted)


def _unseen(model: nn.Module, graph: Graph, keep: Keep) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """Numbers for parameters that are all zero and multiply something, whole and cut: behind the last layer of a residual branch that begins at
    zero no difference would show. A bias hides nothing."""
    random, drawn, found = torch.Generator().manual_seed(0), dict[int, torch.Tensor](), {}
    for name, p in model.named_parameters(remove_duplicate=False):
        adds = p.dim() < 2 and name.endswith("bias")
        if name not in graph.tensors or not p.is_floating_point() or p.numel() < 2 or adds or bool(p.any()):
            continue
        fan = p.numel() // max(1, p.shape[0]) if p.dim() > 1 else 1
        whole = drawn.setdefault(id(p), (torch.rand(p.shape, generator=random, dtype=torch.float64) + 0.5) / fan)
        small = whole
        for i, dim in enumerate(graph.tensors[name]):
            small = small.index_select(i, torch.from_numpy(np.flatnonzero(mask(dim, keep))))
        found[name] = whole, small
    return found


def _put(model: nn.Module, values: Mapping[str, torch.Tensor]) -> bool:
    """Whether a model has all these parameters, which it then takes."""
    have = dict(model.named_parameters(remove_duplicate=False))
    if any(n not in have or have[n].shape != t.shape for n, t in values.items()):
        return False
    with torch.no_grad():
        for name, tensor in values.items():
            have[name].copy_(tensor)
    return True


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
