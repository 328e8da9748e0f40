"""Whether a file computes what the model computes: both on the same inputs, the file in a process of its own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map_only

from secateur.errors import InputError, ModelError
from secateur.export.capture import has_tokens, of_other_lengths, plain
from secateur.export.runner import RUNTIMES, Call, File, Run, run
from secateur.measure.run import at_rest, batch_of, forward, inputs_on
from secateur.measure.runtimes import rows
from secateur.measure.runtimes.onnx_file import deviation

TOLERANCES = {torch.float16: 1e-2}
TOLERANCE = 1e-4  # of the largest output: float32 sums in another order stay below


@dataclass(frozen=True)
class Deviation:
    """The largest over all outputs of one call: `absolute`, and `relative` to the largest value of the same output. `tokens`: of a row of a
    call with inputs (rows, tokens), None for other inputs."""

    batch: int
    absolute: float
    relative: float
    tokens: int | None = None


def calls_of(args: tuple, kwargs: Mapping[str, Any], batches: Sequence[int]) -> list[Call]:
    """The inputs, and then the inputs with as many rows as `batches` says; rows that are there twice are turned around, so as to differ."""
    have = batch_of(args, kwargs)
    return [(args, kwargs), *(_turned(rows(args, kwargs, n), have, n) for n in batches if n != have)]


def tokens_of(call: Call) -> int | None:
    """The length of inputs that are all whole numbers (rows, tokens); None for others."""
    tensors = [leaf for leaf in tree_leaves(call) if isinstance(leaf, Tensor)]
    lengths = {t.shape[1] for t in tensors if has_tokens(t)}
    return lengths.pop() if len(lengths) == 1 and all(has_tokens(t) for t in tensors) else None


def other_lengths(call: Call, lengths: tuple[int, float] | None) -> list[Call]:
    """The call with other numbers of tokens, within those that the file takes (`Captured.lengths`); where nobody knows those, with fewer."""
    length = tokens_of(call)
    return [] if length is None or lengths == (0, 0) else of_other_lengths(call, *(lengths or (2, length)))


def _turned(call: Call, have: int, wanted: int) -> Call:
    def turn(x: Tensor) -> Tensor:
        if x.dim() < 2 or x.shape[0] != wanted or wanted <= have:
            return x
        again = torch.arange(wanted) // have % 2 == 1
        return torch.where(again.view(-1, *[1] * (x.dim() - 1)), x.flip(-1), x)

    args, kwargs = tree_map_only(Tensor, turn, (call[0], dict(call[1])))
    return args, kwargs


def wanted(model: nn.Module, calls: Sequence[Call]) -> list[list[Tensor]]:
    """What the model gives for every call, in evaluation mode.

    Raises ModelError: an output without a finite value, which any other would agree with.
    """
    with at_rest(model):
        outputs = [forward(model, *inputs_on(model, *call)) for call in calls]
    found = [[leaf.detach() for leaf in tree_leaves(plain(output)) if isinstance(leaf, Tensor)] for output in outputs]
    for call, leaves in zip(calls, found, strict=True):
        if any(leaf.is_floating_point() and leaf.numel() and not leaf.isfinite().any() for leaf in leaves):
            raise ModelError(
                f"{type(model).__name__} gives nothing but NaN or infinity on a batch of {batch_of(*call)}, with which nothing can be compared.\n"
                "  Look for the weights or the inputs that it comes from."
            )
    return found


def runnable(model: nn.Module, calls: Sequence[Call]) -> tuple[list[Call], list[str]]:
    """The first call, and of the others, whose number of rows nobody asked for, those that the model itself runs; a note on the rest."""
    kept, refused = list(calls[:1]), []
    with at_rest(model):
        for call in calls[1:]:
            try:
                forward(model, *inputs_on(model, *call))
                kept.append(call)
            except InputError:
                refused.append(f"{batch_of(*call)}{f' of {tokens_of(call)} tokens' if tokens_of(call) else ''}")
    return kept, [f"not checked with batches of {', '.join(refused)}, on which the model itself does not run"] if refused else []


def compared(expected: Sequence[Sequence[Tensor]], found: Sequence[Sequence[np.ndarray]], calls: Sequence[Call], file: File) -> list[Deviation]:
    """One row for every call.

    Raises ModelError: other outputs in number or shape.
    """
    out = []
    for ours, theirs, call in zip(expected, found, calls, strict=True):
        shapes = [tuple(t.shape) for t in ours], [tuple(np.shape(v)) for v in theirs]
        if shapes[0] != shapes[1]:
            raise ModelError(
                f"{file.path.name}: {RUNTIMES[file.format]} gives outputs of shapes {shapes[1]}, torch gives {shapes[0]}.\n"
                "  Return plain tensors from forward(), each once."
            )
        pairs = [deviation(a, torch.from_numpy(np.array(b))) for a, b in zip(ours, theirs, strict=True)]
        # of several outputs the one that is no number counts, which Python's max may pass over
        absolute, relative = (float(np.max(values, initial=0.0)) for values in ([a for a, _ in pairs], [r for _, r in pairs]))
        out.append(Deviation(batch_of(*call), absolute, relative, tokens_of(call)))
    return out


def accepted(model: nn.Module, tolerance: float | None = None) -> float:
    """The tolerance given, else that of the model's dtype."""
    kind = next((t.dtype for t in model.parameters() if t.is_floating_point()), torch.float32)
    return TOLERANCES.get(kind, TOLERANCE) if tolerance is None else tolerance


def checked(model: nn.Module, file: File, calls: Sequence[Call], tolerance: float | None = None) -> tuple[Run, list[Deviation]]:
    """The file run in a fresh process on every call, and how far it is from the model.

    Raises ModelError: it does not run, or deviates by more than `tolerance` of the largest output (None: 1e-4, and 1e-2 in float16).
    """
    most, expected = accepted(model, tolerance), wanted(model, calls)
    done = run(file, calls)
    found = compared(expected, done.outputs, calls, file)
    worst = max(found, key=lambda row: row.relative if row.relative == row.relative else float("inf"))
    if not worst.relative <= most:
        enough = f" If that is good enough for you: --tolerance {2 * worst.relative:.0e}." if np.isfinite(worst.relative) else ""
        raise ModelError(
            f"{file.path.name}: {RUNTIMES[file.format]} deviates from torch by {worst.relative:.1e} of the largest output (batch of {worst.batch}); "
            f"at most {most:.0e} is accepted.\n  Nothing was kept.{enough}"
        )
    return done, found
