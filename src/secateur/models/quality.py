"""How good a model is on data with labels."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from secateur.errors import DataError, InputError
from secateur.measure import at_rest
from secateur.measure.run import forward
from secateur.processes import ALONE, Alone, of


def accuracy(model: nn.Module, batches: Iterable[Any]) -> float:
    """The share of rows whose largest output is at their label, in 0..1. `batches` are (inputs, labels).

    The model is left as it was. Of processes that share the batches each counts its own, and all have the whole. Raises
    DataError if the batches have no labels, or no rows.
    """
    right = rows = 0
    with at_rest(model):
        for scores, labels in scored(model, batches, of(batches)):
            right += int(hits(scores, labels).sum())
            rows += len(labels)
    found = of(batches).total("accuracy", {"right": torch.tensor(right), "rows": torch.tensor(rows)})
    return int(found["right"]) / int(found["rows"])


def scored(model: nn.Module, batches: Iterable[Any], processes: Alone = ALONE) -> Iterator[tuple[Tensor, Tensor]]:
    """The class scores (rows, classes) and labels (rows,) of every batch of (inputs, labels), both where the scores are;
    of several processes each has those of its own batches.

    The model is run as it stands: go through it inside `with at_rest(model)`.

    Raises:
        DataError: batches without labels, or that do not fit the model; no rows at all.
    """
    rows = 0
    where = next((p for p in model.parameters()), torch.empty(0))
    for number, batch in enumerate(batches):
        if not (isinstance(batch, (tuple, list)) and len(batch) == 2):
            raise DataError("Accuracy needs labels, and these batches have none.\n  Give (inputs, labels).")
        inputs, labels = batch
        if not len(inputs):
            continue
        if not processes.mine(number):
            rows += len(inputs)
            continue
        labels = _whole(labels)
        try:
            scores = scores_of(forward(model, (inputs.to(where.device, where.dtype if inputs.is_floating_point() else None),)))
        except InputError as error:
            raise DataError(f"A batch of the data does not fit. {error}") from error
        if not isinstance(scores, Tensor):
            raise no_scores(scores)
        if scores.dim() != 2 or len(scores) != len(labels) or int(labels.max()) >= scores.shape[1]:
            raise DataError(
                f"The model gives {tuple(scores.shape)} for {len(labels)} labels up to {int(labels.max())}.\n"
                "  Accuracy needs one row of class scores per label: give data that fits, or none with labels."
            )
        rows += len(labels)
        yield scores, labels.to(scores.device)
    if not rows:
        raise DataError("Accuracy of no rows: the data set is empty.\n  Give at least one batch.")


def hits(scores: Tensor, labels: Tensor) -> Tensor:
    """Whether each row's largest score is at its label: True or False, (rows,). A row with NaN says nothing, so it is not right, though
    `argmax` names the place of the NaN."""
    return (scores.argmax(1) == labels) & ~scores.isnan().any(1)


def _whole(labels: Any) -> Tensor:
    """Labels as class numbers, one per row. Raises DataError for anything else."""
    labels = torch.as_tensor(labels)
    if labels.dim() != 1 or (labels.is_floating_point() and not torch.equal(labels, labels.round())) or int(labels.min()) < 0:
        raise DataError(f"Accuracy needs one class number from 0 up per row; these labels are {labels.dtype} of shape {tuple(labels.shape)}, "
                        f"the smallest {float(labels.min()):g}.\n  Give class numbers, or data without labels.")  # fmt: skip
    return labels.long()


def scores_of(output: Any) -> Any:
    """The class scores in whatever a model returns: a tensor, `logits`, `out`, or the first of a tuple."""
    for name in ("logits", "out"):
        if isinstance(output, Mapping) and name in output:
            return output[name]
        if not isinstance(output, (Tensor, tuple, list)) and hasattr(output, name):
            return getattr(output, name)
    return output[0] if isinstance(output, (tuple, list)) else output


def no_scores(output: Any) -> DataError:
    """What to raise where a model returns nothing that is known to be class scores."""
    names = f" of {', '.join(map(str, list(output)[:5]))}" if isinstance(output, Mapping) else ""
    return DataError(
        f"Accuracy needs class scores, and the model returns a {type(output).__name__}{names}.\n"
        "  Return the scores alone, first in a tuple, or as logits in a dict; or give data without labels."
    )
