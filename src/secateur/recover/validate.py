"""What a training run measures after an epoch, and how a batch is taken apart."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from secateur.errors import DataError
from secateur.models.quality import scores_of
from secateur.recover.order import rows_of

Parts = tuple[tuple, dict[str, Any], Any]  # args, kwargs, labels


def parted(batch: Any, place: torch.device) -> tuple[tuple, dict[str, Any], Any]:
    """(args, kwargs, labels) of a batch; the labels of a dict are the dict."""

    def there(value: Any) -> Any:
        return value.to(place) if isinstance(value, Tensor) else value

    if isinstance(batch, Mapping):
        kwargs = {k: there(v) for k, v in batch.items()}
        return (), kwargs, kwargs
    if isinstance(batch, (tuple, list)):
        if len(batch) != 2:
            raise DataError(f"A batch of the data has {len(batch)} parts.\n  Give (inputs, labels), inputs alone, or a dict.")
        return (there(batch[0]),), {}, there(batch[1])
    return (there(batch),), {}, None


def validated(batches: Iterable[Any], value: Callable[[Parts], tuple[Tensor, Any]], place: torch.device) -> dict[str, float]:
    """{"valid_loss": mean over the rows} and, where every batch has one class number a row, "valid": accuracy, 0..1.

    Args:
        value: (args, kwargs, labels) -> the loss of a batch and what the model gives.

    Raises:
        DataError: no rows, or a batch that does not fit.
    """
    total, rows, hits = 0.0, 0, 0
    classes = True
    for at, batch in enumerate(batches):
        count = rows_of(batch)
        if not count:
            continue
        args, kwargs, labels = parts = parted(batch, place)
        try:
            loss, output = value(parts)
        except (IndexError, RuntimeError, ValueError) as error:
            raise DataError(f"Batch {at} of the validation data does not fit: {str(error).splitlines()[0][:200]}.\n"
                            "  Give rows and labels as those that are trained on.") from error  # fmt: skip
        total, rows = total + float(loss) * count, rows + count
        scores = scores_of(output)
        classes = classes and isinstance(labels, Tensor) and isinstance(scores, Tensor) and _whole(scores, labels)
        hits += int((scores.argmax(1) == labels).sum()) if classes else 0
    if not rows:
        raise DataError("The validation data is empty.\n  Give at least one batch, or none.")
    return {"valid_loss": total / rows, **({"valid": hits / rows} if classes else {})}


def _whole(scores: Tensor, labels: Tensor) -> bool:
    return scores.dim() == 2 and labels.shape == scores.shape[:1] and not labels.is_floating_point()
