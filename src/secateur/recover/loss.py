"""What is made small: the task's own loss, and the distance to a teacher."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from secateur.errors import DataError
from secateur.models.quality import scores_of
from secateur.recover.lora import INSIDE
from secateur.recover.order import rows_of

Loss = Callable[[Any, Any], Tensor]  # (what the model gives, the labels or the whole batch) -> a number
IGNORED = -100  # a label that does not count, as Hugging Face has it
GUESSED = "the teacher's outputs have three dimensions and there are no labels: the last one is taken for the classes; give labels to tell"


def task_loss(output: Any, labels: Tensor) -> Tensor:
    """Cross-entropy of class numbers, whose classes are where `class_dim` finds them, or squared error of numbers.

    Raises:
        DataError: labels that do not fit the output.
    """
    scores = scores_of(output)
    if not isinstance(scores, Tensor):
        raise DataError(f"The model gives a {type(scores).__name__}, and nothing in it is known to be scores.\n"
                        "  Give them alone, first in a tuple or as logits in a dict; or pass loss=.")  # fmt: skip
    if labels.is_floating_point():
        if labels.shape != scores.shape:
            raise DataError(f"The model gives {tuple(scores.shape)} and the labels are numbers of {tuple(labels.shape)}.\n"
                            "  Give one for each output, or pass loss=.")  # fmt: skip
        return F.mse_loss(scores, labels)
    dim, labels = class_dim(scores, labels), labels.long()  # cross_entropy takes no other whole numbers
    if dim is None:
        raise DataError(f"The model gives {tuple(scores.shape)} and the labels are class numbers of {tuple(labels.shape)}.\n"
                        "  Give one class number for each row of scores, or pass loss=.")  # fmt: skip
    if dim == scores.dim() - 1:
        return F.cross_entropy(scores.flatten(0, -2).float(), labels.flatten(), ignore_index=IGNORED)
    return F.cross_entropy(scores.float(), labels, ignore_index=IGNORED)


def class_dim(scores: Tensor, labels: Tensor) -> int | None:
    """The dimension of scores that their class numbers have not: the second or the last. Where both would fit it is the second of images
    (N, C, H, W) and volumes, and the last of sequences (N, L, C). None: neither fits."""
    shape = tuple(scores.shape)
    fits = [d for d in {1, len(shape) - 1} if d > 0 and shape[:d] + shape[d + 1 :] == tuple(labels.shape)]
    return None if not fits else min(fits) if len(shape) > 3 else max(fits)


def labels_of(labels: Any) -> Tensor | None:
    """The labels of a batch where they are one tensor: in a dict those that are called so."""
    found = labels.get("labels") if isinstance(labels, Mapping) else labels
    return found if isinstance(found, Tensor) else None


def own_of(output: Any) -> Tensor | None:
    """The loss that a model has computed itself, from labels in a dict."""
    return output.get("loss") if isinstance(output, Mapping) else getattr(output, "loss", None)


def first_counts(batch: Any, call: Callable[[Mapping[str, Any]], Any]) -> bool:
    """Whether a model's own loss goes by the first label of a sequence: that of a causal model does not change without it."""
    labels = labels_of(batch) if isinstance(batch, Mapping) else None
    if labels is None or labels.is_floating_point() or labels.dim() != 2 or labels.shape[1] < 2:
        return True
    without = labels.clone()
    without[:, 0] = IGNORED
    found = [own_of(call({**batch, "labels": given})) for given in (labels, without)]
    return found[0] is None or found[1] is None or not torch.equal(found[0], found[1])


def counted(batch: Any, first: bool = True) -> int:
    """Class numbers of a batch that a loss is the mean of: those that are not `IGNORED`. Rows, where the labels are something else.

    Args:
        first: whether the first of a sequence counts in a dict of labels (N, L): causal models have no score for it.
    """
    pair = isinstance(batch, (tuple, list)) and len(batch) == 2
    labels = labels_of(batch) if isinstance(batch, Mapping) else labels_of(batch[1]) if pair else None
    if labels is None or labels.is_floating_point() or not labels.dim():
        return rows_of(batch)
    return int((labels if first or not isinstance(batch, Mapping) or labels.dim() != 2 else labels[:, 1:]).ne(IGNORED).sum())


def shares(labels: Any) -> bool:
    """Whether labels are shares of classes, which are not negative and sum to 1, rather than class numbers or plain numbers."""
    if not isinstance(labels, Tensor) or not labels.is_floating_point() or labels.dim() < 2:
        return False
    sums = labels.float().sum(_usual(labels))
    return bool((labels >= 0).all()) and torch.allclose(sums, torch.ones_like(sums), atol=1e-3)


def _usual(scores: Tensor) -> int:
    return 1 if scores.dim() > 3 else -1


def distance(student: Tensor, teacher: Tensor, temperature: float, labels: Any = None, soft: bool = False) -> Tensor:
    """T^2 KL(teacher || student) of outputs divided by the temperature T, summed over classes and averaged over the rest (Hinton et al. 2015,
    "Distilling the Knowledge in a Neural Network"). Classes are where class numbers among the labels leave them (`class_dim`); without such labels
    the second dimension of images and volumes, else the last. Rows whose label is `IGNORED` count: the teacher has outputs for them too.

    Outputs that are no scores of several classes (one number for a row, or labels that are numbers and not, as `soft` says, shares of classes) are
    compared by their squared error: the softmax of a single number is 1, whatever it is.

    Raises:
        DataError: the two are of other shapes.
    """
    if student.shape != teacher.shape:
        raise DataError(f"The model gives {tuple(student.shape)} and the teacher {tuple(teacher.shape)}.\n"
                        "  Pass the teacher of this model: the one that it was cut from.")  # fmt: skip
    given = labels_of(labels)
    numbers = given is not None and given.is_floating_point() and not soft
    found = None if given is None or given.is_floating_point() else class_dim(student, given)
    dim = _usual(student) if found is None else found
    if numbers or student.dim() < 2 or student.shape[dim] == 1:
        return F.mse_loss(student.float(), teacher.float())
    s, t = F.log_softmax(student.float() / temperature, dim), F.log_softmax(teacher.float() / temperature, dim)
    return temperature**2 * F.kl_div(s, t, reduction="none", log_target=True).sum(dim).mean()


def of_both(loss: Loss, output: Any, labels: Any, part: float) -> Tensor:
    """`part` of the loss of rows by their labels, and the rest by those of the rows in reverse order: of what `boxed` has mixed."""
    own = loss(output, labels)
    return own if part == 1 or labels is None else part * own + (1 - part) * loss(output, labels.flip(0))


def turned(args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
    """The mirror images of the first input, beside copies of all else.

    Raises:
        DataError: it is no image.
    """
    if not args or not isinstance(args[0], Tensor) or args[0].dim() != 4:
        raise DataError("mirror is for images (N, C, H, W) as the first input, and here it is something else.\n  Leave it out.")
    return (args[0].flip(-1), *tree_map_only(Tensor, Tensor.clone, args[1:])), tree_map_only(Tensor, Tensor.clone, kwargs)


def middle(scores: Tensor, others: Tensor) -> Tensor:
    """The mean of what a teacher gives to images and to their mirror images.

    Raises:
        DataError: scores that lie in the image.
    """
    if not isinstance(scores, Tensor) or scores.dim() != 2:
        raise DataError(f"mirror is for a teacher that gives (N, classes), and here it gives {tuple(getattr(scores, 'shape', ()))}.\n  Leave it out.")
    return (scores.float() + others.float()) / 2  # autocast may have made them bfloat16


def apart(student: Mapping[str, Tensor], teacher: Mapping[str, Tensor]) -> Tensor:
    """The mean over inner outputs of their squared distance, relative to the teacher's (Romero et al. 2015, "FitNets")."""
    found = [((s - t).float().square().sum() / t.float().square().sum().clamp_min(1e-12)) for s, t in ((student[n], teacher[n]) for n in teacher)]
    return torch.stack(found).mean()


def matched(student: nn.Module, teacher: nn.Module, call: Callable[[nn.Module], Any]) -> list[str]:
    """The blocks of a layer list (`blocks.3`, `layer2.0`) whose outputs have the same shape in both: one number at the end of the name."""
    shapes = []
    for model in (student, teacher):
        names = [n for n, m in model.named_modules() if n.rpartition(".")[2].isdigit() and any(True for _ in m.parameters())]
        with torch.no_grad(), outputs(model, names) as held:
            call(model)
        shapes.append({n: t.shape for n, t in held.items()})
    return [n for n, shape in shapes[0].items() if shapes[1].get(n) == shape]


def broken(model: nn.Module, call: Callable[[], Any]) -> str | None:
    """The first module without parts whose output is not finite in a call; None: all are."""
    names = [n for n, m in model.named_modules()
             if n and INSIDE not in f".{n}." and all(c == INSIDE.strip(".") for c, _ in m.named_children())]  # fmt: skip
    with torch.no_grad(), outputs(model, names) as held:
        call()
    return next((n for n, t in held.items() if not bool(torch.isfinite(t).all())), None)


@contextmanager
def outputs(model: nn.Module, names: list[str]) -> Iterator[dict[str, Tensor]]:
    """What these modules give while the model runs."""
    held: dict[str, Tensor] = {}
    modules = dict(model.named_modules())

    def keep(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            value = output[0] if isinstance(output, (tuple, list)) else output
            if isinstance(value, Tensor) and value.is_floating_point():
                held[name] = value

        return hook

    handles = [modules[n].register_forward_hook(keep(n)) for n in names]
    try:
        yield held
    finally:
        for handle in handles:
            handle.remove()
