"""How a pruned model is trained back: choices that need no tuning, and what they become for a model."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import nn

from secateur.errors import InputError
from secateur.recover.lora import Update
from secateur.recover.modes import has_batch_norms

NORMS = (nn.modules.batchnorm._NormBase, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm)
SGD, ADAMW, LORA = "sgd", "adamw", "lora"
RATE = {SGD: 0.02, ADAMW: 3e-4}  # of a batch of 128: a fifth of what such networks are trained with from the start
UPDATES = 10  # times that for low-rank updates, which begin as zeros
DECAY = {SGD: 5e-4, ADAMW: 0.01}
ROWS = 128
AVERAGED = 0.5  # the rate while weights are averaged: they have to move, so that their mean is none of them


@dataclass(frozen=True)
class Training:
    """How to train.

    Attributes:
        epochs: passes over the data; fractions count.
        batch: rows of a step, of all processes together; as the data has them where it is None.
        lr: the highest learning rate; None: 0.02 with SGD and 3e-4 with AdamW, ten times that for "lora", times batch / 128.
        optimizer: "sgd" (Nesterov, momentum 0.9) or "adamw"; "auto": SGD for a model with batch norms, else and for "lora" AdamW.
        weight_decay: None: 5e-4 with SGD, 0.01 with AdamW; never on norms and biases.
        warmup: share of the steps in which the rate rises; then it falls as a cosine, to 0 (Loshchilov & Hutter 2017).
        train: "all"; "norms": norms and biases alone; "lora": they, and low-rank updates beside the weights of linear layers and convolutions, which
            are merged into them at the end and lose no zero (Zimmer et al. 2023; `secateur.recover.lora`).
        rank: of those updates.
        distil: share of the loss that comes from the teacher, where there is one (Hinton et al. 2015).
        temperature: that its outputs are divided by.
        features: weight of the squared distance between inner outputs of the same name and shape (Romero et al. 2015).
        ema: decay of a moving average of the weights, which is then what comes back; None: no average.
        average: share of the steps, the last ones, whose mean weights come back, with statistics of batch norms estimated for them. The rate falls to
            half until then, and stays there (stochastic weight averaging, Izmailov et al. 2018). Of "lora" the mean of the factors.
        precision: "float32" or "bfloat16" (autocast; weights stay float32).
        channels_last: the layout of images while training.
        clip: largest norm of the gradient.
        augment: "none", "flip" (left and right) or "flip_crop" (and moved by up to an eighth), for images.
        cutmix: share of the steps in which a box of every image shows another image of its process's rows of the batch (Yun et al. 2019), and labels
            count by area. For images; labels (N,) or (N, classes), or none.
        mirror: a teacher's outputs are the mean of those of the image and of its mirror image; for images, and outputs (N, classes).
        seed: of the order of the rows, of augmentation and of dropout.
        shard: spread the weights over the processes (FSDP2) instead of a copy in each (DDP).
        every: seconds between checkpoints, at most; there is one after every epoch too.
    """

    epochs: float = 10.0
    batch: int | None = None
    lr: float | None = None
    optimizer: str = "auto"
    weight_decay: float | None = None
    warmup: float = 0.05
    train: str = "all"
    distil: float = 0.9
    temperature: float = 4.0
    features: float = 0.0
    ema: float | None = None
    precision: str = "float32"
    channels_last: bool = False
    clip: float = 5.0
    augment: str = "none"
    seed: int = 0
    shard: bool = False
    every: float = 120.0
    rank: int = 8
    cutmix: float = 0.0
    mirror: bool = False
    average: float = 0.0

    def __post_init__(self) -> None:
        words = {"optimizer": ("auto", SGD, ADAMW), "train": ("all", "norms", "lora"), "precision": ("float32", "bfloat16"),
                 "augment": ("none", "flip", "flip_crop")}  # fmt: skip
        for name, known in words.items():
            if getattr(self, name) not in known:
                raise InputError(f"{name}={getattr(self, name)!r}: there are {', '.join(known)}.\n  Choose one of them.")
        ranges = {"epochs": (0, math.inf), "warmup": (0, 1), "distil": (0, 1), "cutmix": (0, 1), "average": (0, 1), "temperature": (1e-6, math.inf),
                  "features": (0, math.inf), "clip": (1e-12, math.inf), "every": (0, math.inf)}  # fmt: skip
        for name, (least, most) in ranges.items():
            if not least <= getattr(self, name) <= most or not math.isfinite(getattr(self, name)):
                raise InputError(f"{name}={getattr(self, name)} is outside {least:g} to {most:g}.\n  Give a number in between.")
        for name in ("lr", "ema", "weight_decay", "batch"):
            value = getattr(self, name)
            if value is not None and (value < 0 or not math.isfinite(value) or (name == "ema" and value >= 1) or (name == "batch" and value < 1)):
                raise InputError(f"{name}={value}: {'a decay below 1' if name == 'ema' else 'a positive number'} is asked.\n  Or leave it out.")
        if self.batch is not None and (isinstance(self.batch, bool) or not isinstance(self.batch, int)):
            raise InputError(f"batch={self.batch!r} is no number of rows.\n  Give a whole number from 1 on, or leave it out.")
        if isinstance(self.rank, bool) or not isinstance(self.rank, int) or self.rank < 1:
            raise InputError(f"rank={self.rank!r} is no rank of a matrix.\n  Give a whole number from 1 on, such as 8.")
        if self.ema is not None and self.average:
            raise InputError(f"ema={self.ema} and average={self.average:g}: one of the two comes back.\n  Leave one of them out.")
        if self.train == LORA and self.shard:
            raise InputError("train='lora' beside shard: the updates are not spread over processes.\n"
                             "  Leave shard out: the optimizer keeps little for them.")  # fmt: skip

    def to_json(self) -> dict[str, Any]:
        # a checkpoint of before knows nothing of these
        chosen = {"rank": self.train == LORA, "cutmix": self.cutmix, "mirror": self.mirror, "average": self.average}
        return {k: v for k, v in asdict(self).items() if chosen.get(k, True)}

    def meant(self, teacher: nn.Module | None) -> None:
        """
        Raises:
            InputError: choices for a teacher, and there is none.
        """
        lonely = [n for n in ("mirror", "features") if getattr(self, n)]
        if teacher is None and lonely:
            raise InputError(f"{lonely[0]}={getattr(self, lonely[0])} is of a teacher, and there is none.\n  Pass teacher=, or leave it out.")

    def kind(self, model: nn.Module) -> str:
        """ "sgd" or "adamw"."""
        if self.optimizer != "auto":
            return self.optimizer
        if self.train == LORA:
            return ADAMW
        return SGD if has_batch_norms(model) else ADAMW

    def rate(self, model: nn.Module, rows: int) -> float:
        """The highest learning rate for batches of so many rows."""
        if self.lr is not None:
            return self.lr
        return RATE[self.kind(model)] * rows / ROWS * (UPDATES if self.train == LORA else 1)

    def at(self, step: int, steps: int) -> float:
        """What the highest rate is multiplied with at a step, 0 to 1."""
        rising = self.warmup * steps
        if step < rising:
            return (step + 1) / (rising + 1)
        low, falling = (AVERAGED if self.average else 0.0), steps * (1 - self.average) - rising
        return low + (1 - low) * 0.5 * (1 + math.cos(math.pi * min(1.0, (step - rising) / max(1.0, falling))))

    def made(self, model: nn.Module, rows: int) -> torch.optim.Optimizer:
        """The optimizer of the parameters that are trained.

        Raises:
            InputError: there are none.
        """
        decayed, plain = list[nn.Parameter](), list[nn.Parameter]()
        for parameter, inner in _trained(model, self.train):
            (decayed if inner else plain).append(parameter)
        if not decayed and not plain:
            raise InputError(f"train={self.train!r}: the model has no such parameter that takes a gradient.\n  Train all, or unfreeze some.")
        kind, rate = self.kind(model), self.rate(model, rows)
        decay = DECAY[kind] if self.weight_decay is None else self.weight_decay
        groups = [{"params": held, "weight_decay": d} for held, d in ((decayed, decay), (plain, 0.0)) if held]
        if kind == SGD:
            return torch.optim.SGD(groups, lr=rate, momentum=0.9, nesterov=True)
        return torch.optim.AdamW(groups, lr=rate)


def _trained(model: nn.Module, which: str) -> Iterator[tuple[nn.Parameter, bool]]:
    """Every parameter that is trained, once, and whether its size is worth a decay: it is a matrix, not of a norm and no bias."""
    seen = set[int]()
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is None or not parameter.requires_grad or id(parameter) in seen:
                continue
            small = isinstance(module, NORMS) or name == "bias" or parameter.dim() < 2
            if which == "all" or small or isinstance(module, Update):
                seen.add(id(parameter))
                yield parameter, not small
