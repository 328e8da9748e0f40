"""What a step makes of the images of a batch: flipped, moved, with boxes of one another."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from secateur.errors import DataError
from secateur.recover.order import mixed
from secateur.recover.training import Training


def augmented(x: Tensor, how: str, seed: int) -> Tensor:
    """Images (N, C, H, W), each flipped left and right or not, and moved by up to an eighth of their size, with zeros behind."""
    if how == "none" or x.dim() != 4:
        return x
    g = torch.Generator().manual_seed(seed)
    flip = torch.rand(len(x), generator=g) < 0.5
    x = torch.where(flip.view(-1, 1, 1, 1).to(x.device), x.flip(-1), x)
    if how == "flip":
        return x
    high, wide = (max(1, n // 8) for n in x.shape[-2:])
    padded = torch.nn.functional.pad(x, (wide, wide, high, high))
    down, right = (torch.randint(0, 2 * n + 1, (len(x), 1), generator=g) for n in (high, wide))
    rows, columns = (down + torch.arange(x.shape[-2]))[:, None, :, None], (right + torch.arange(x.shape[-1]))[:, None, None, :]
    images, channels = torch.arange(len(x))[:, None, None, None], torch.arange(x.shape[1])[None, :, None, None]
    return padded[images, channels, rows, columns]


def shown(args: tuple, labels: Any, how: Training, at: tuple[int, int]) -> tuple[tuple, float]:
    """The inputs of a batch as a step shows them to the model, and what share of the loss is by a row's own label. `at`: step, process.

    Raises:
        DataError: images are to be changed, and there are none, or labels are not one for each of them.
    """
    asked = "cutmix" if how.cutmix else "augment" if how.augment != "none" else None
    image = bool(args) and isinstance(args[0], Tensor) and args[0].dim() == 4
    if asked and not (image and (labels is None or _one_each(labels, args[0]))):
        given = f"inputs of {tuple(args[0].shape)}" if args and isinstance(args[0], Tensor) else "inputs by name or of another kind"
        said = f"labels of {tuple(labels.shape)}" if isinstance(labels, Tensor) else f"labels that are a {type(labels).__name__}"
        raise DataError(f"{asked} is for images (N, C, H, W) as the first input, with labels (N,) or (N, classes): here are {given}, {said}.\n"
                        "  Leave it out, or do it where the data is read: what is within an image moves with it.")  # fmt: skip
    if not image:
        return args, 1.0
    (step, rank), part = at, 1.0
    x = augmented(args[0], how.augment, mixed(how.seed, step, 1001 + rank))
    if how.cutmix:
        x, part = boxed(x, how.cutmix, mixed(how.seed, step, -1))  # the same box in all processes
    return (x.to(memory_format=torch.channels_last) if how.channels_last else x, *args[1:]), part


def _one_each(labels: Any, x: Tensor) -> bool:
    return isinstance(labels, Tensor) and labels.dim() in (1, 2) and len(labels) == len(x)


def boxed(x: Tensor, share: float, seed: int) -> tuple[Tensor, float]:
    """CutMix (Yun et al. 2019, "CutMix: Regularization Strategy to Train Strong Classifiers with Localizable Features") in a `share` of all seeds:
    the same box of every image shows that of the image at the other end of the batch. The area of the box, before what lies outside of the image is
    left off, is uniform in 0..1 of the image's.

    Returns:
        The images (N, C, H, W), and by what share the labels are still those of their own rows; the rest are those of the rows in reverse order.
    """
    g = torch.Generator().manual_seed(seed)
    drawn, area = torch.rand(2, generator=g).tolist()
    if drawn >= share:
        return x, 1.0
    edges = []
    for n in x.shape[-2:]:
        middle, side = int(torch.randint(0, n, (), generator=g)), round(math.sqrt(area) * n)
        edges.append((max(0, middle - side // 2), min(n, middle - side // 2 + side)))
    (top, bottom), (left, right) = edges
    out = x.clone()
    out[..., top:bottom, left:right] = x.flip(0)[..., top:bottom, left:right]
    return out, 1 - (bottom - top) * (right - left) / (x.shape[-2] * x.shape[-1])
