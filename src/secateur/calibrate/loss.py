"""The number whose gradient is asked for: the user's own, the model's own, or cross entropy with the labels."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch.nn.functional import cross_entropy
from torch.utils._pytree import tree_leaves

from secateur.calibrate.batches import Batch
from secateur.errors import DataError

Loss = Callable[[Any, Any], torch.Tensor]


def loss_of(outputs: Any, batch: Batch, loss: Loss | None) -> torch.Tensor:
    """The mean loss of one batch, a scalar.

    `loss(outputs, batch)` where it is given, with the batch as the data set gave it; else what the model itself returned as
    `.loss`, where it was given labels; else cross entropy of the logits (`.logits`, or the first output of floating point)
    with the labels: classes are the last dimension where the labels have the shape of all others, else dimension 1.

    Raises:
        DataError: no labels, labels that do not fit the logits, or a loss that is no finite number.
    """
    if loss is not None:
        value = loss(outputs, batch.given)
    elif batch.labels is None:
        raise DataError(
            f"{batch}, carries no labels, and a gradient needs a loss.\n"
            "  Give (inputs, labels) tuples or dicts with 'labels', or loss=function(outputs, batch)."
        )
    elif isinstance(own := _part(outputs, "loss"), torch.Tensor):
        value = own
    else:
        value = _cross_entropy(outputs, batch, batch.labels)
    if not isinstance(value, torch.Tensor) or value.numel() != 1:
        said = f"a tensor of shape {tuple(value.shape)}" if isinstance(value, torch.Tensor) else f"a {type(value).__name__}"
        raise DataError(f"the loss of {batch}, is {said}.\n  Return one number, as a tensor that depends on the outputs.")
    if not bool(torch.isfinite(value.detach()).all()):
        raise DataError(
            f"the loss of {batch}, is {float(value.detach())}.\n"
            "  Look for NaN, infinities or labels out of range in that batch, or for a model that overflows in its dtype."
        )
    return value.reshape(())


def _part(outputs: Any, name: str) -> Any:
    return outputs.get(name) if isinstance(outputs, Mapping) else getattr(outputs, name, None)


def _cross_entropy(outputs: Any, batch: Batch, labels: torch.Tensor) -> torch.Tensor:
    logits = _part(outputs, "logits")
    if not isinstance(logits, torch.Tensor):
        logits = next((t for t in tree_leaves(outputs) if isinstance(t, torch.Tensor) and t.is_floating_point()), None)
    if logits is None:
        raise DataError(f"the model returns no tensor of floating point for {batch}.\n  Give loss=function(outputs, batch).")
    shape, wanted = tuple(logits.shape), tuple(labels.shape)
    try:
        if not labels.is_floating_point() and logits.dim() > 2 and wanted == shape[:-1]:
            return cross_entropy(logits.flatten(0, -2), labels.flatten())
        return cross_entropy(logits, labels)
    except (RuntimeError, IndexError, ValueError) as error:
        said = (str(error).strip().splitlines() or ["?"])[0]
        raise DataError(
            f"labels of shape {wanted} ({labels.dtype}) do not fit outputs of shape {shape} in {batch}: {said}\n"
            "  Give class numbers of the shape of the outputs without their classes, or loss=function(outputs, batch)."
        ) from error
