"""What a training run measures after an epoch, and how a batch is taken apart."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from secateur.errors import DataError, SecateurError, first_line, out_of_memory
from secateur.models.quality import hits as right
from secateur.models.quality import scores_of
from secateur.recover.loss import IGNORED, counted
from secateur.recover.order import rows_of

Parts = tuple[tuple, dict[str, Any], Any]  # args, kwargs, labels


def parted(batch: Any, model: nn.Module) -> Parts:
    """(args, kwargs, labels) of a batch, on the device of the model; the labels of a dict are the dict. Inputs that are no whole numbers have the
    dtype of the model."""
    place = next(model.parameters()).device

    def there(value: Any) -> Any:
        return tree_map_only(Tensor, lambda t: t.to(place), value)

    if isinstance(batch, Mapping):
        kwargs = there(dict(batch))
        return (), alike(kwargs, model), kwargs
    if isinstance(batch, (tuple, list)):
        if len(batch) != 2:
            raise DataError(f"A batch of the data has {len(batch)} parts.\n  Give (inputs, labels), inputs alone, or a dict.")
        return (alike(there(batch[0]), model),), {}, there(batch[1])
    return (alike(there(batch), model),), {}, None


def alike(given: Any, model: nn.Module, copy: bool = False) -> Any:
    """What is given to a model, its floating-point tensors in the dtype of the model's. `copy`: in memory of their own."""
    dtype = next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)
    return tree_map_only(Tensor, lambda t: t.to(dtype if t.is_floating_point() else t.dtype, copy=copy), given)


def validated(batches: Iterable[Any], value: Callable[[Parts], tuple[Tensor, Any]], model: nn.Module) -> dict[str, float]:
    """{"valid_loss": mean over the rows} and, where every batch has one class number a row, "valid": accuracy, 0..1, of rows whose label counts. Of
    batches with fewer labels that count than others (`counted`) the loss has as much less a share in the mean.

    Args:
        value: (args, kwargs, labels) -> the loss of a batch and what the model gives.

    Raises:
        DataError: no rows, or a batch that does not fit.
    """
    total, rows, hits = 0.0, 0, 0
    classes = True
    for at, batch in enumerate(batches):
        if not rows_of(batch) or not (count := counted(batch)):
            continue
        args, kwargs, labels = parts = parted(batch, model)
        try:
            loss, output = value(parts)
        except (IndexError, RuntimeError, ValueError) as error:
            if isinstance(error, SecateurError) or out_of_memory(error):
                raise
            raise DataError(f"Batch {at} of the validation data does not fit: {first_line(error)}.\n"
                            "  Give rows and labels as those that are trained on.") from error  # fmt: skip
        total, rows = total + float(loss) * count, rows + count
        scores = scores_of(output)
        classes = classes and isinstance(labels, Tensor) and isinstance(scores, Tensor) and _whole(scores, labels)
        hits += int(right(scores, labels).sum()) if classes else 0
    if not rows:
        raise DataError(f"The validation data is empty: no row with a label other than {IGNORED}.\n  Give at least one batch, or none.")
    return {"valid_loss": total / rows, **({"valid": hits / rows} if classes else {})}


def _whole(scores: Tensor, labels: Tensor) -> bool:
    return scores.dim() == 2 and labels.shape == scores.shape[:1] and not labels.is_floating_point()
