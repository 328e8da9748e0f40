"""The trained networks of the data folder, each with its inputs, its calibration samples and its measurement.

A task knows no method. Calibration is a list of (inputs, labels) batches of equal size; whoever must not see labels is
handed the inputs alone. Loaders are checked against the data folder's `expected.json` by `--task NAME --method dense`.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cache, partial
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks import cifar
from benchmarks.no_training import split, texts

Batches = list[tuple[Tensor, Tensor]]
BATCH = 128


@dataclass(frozen=True)
class Task:
    """One trained network.

    Attributes:
        dense: builds the network with its trained weights, in eval mode.
        args: example inputs; two rows, so that the batch stays free. Costs are those of one row.
        calibrate: seed -> batches of (inputs, labels).
        evaluate: (model, first) -> numbers by name; only the first so many samples if a number is given.
        loss: (output, labels) -> a scalar, for criteria that take gradients.
        shares: label of a ratio -> share of the dense multiply-accumulates that may stay.
        bars: label -> what the issue asks of the metric at this ratio.
        metric: the name of the number that decides, and whether more is better.
        shown: further numbers for the table.
        ignore: names for `sc.prune(ignore=)`: what this task says must keep its shape.
        stream: endings of the names of the layers that write to the residual stream, for "inner channels only".
        calibration: how many samples calibrate, in words.
        screen: how many samples choose among the variants of a peer; None for all.
    """

    name: str
    dense: Callable[[], nn.Module]
    args: Callable[[], tuple[Tensor, ...]]
    calibrate: Callable[[int], Batches]
    evaluate: Callable[[nn.Module, int | None], dict[str, float]]
    shares: Mapping[str, float]
    calibration: str
    bars: Mapping[str, float] = field(default_factory=dict)
    loss: Callable[[Tensor, Tensor], Tensor] = F.cross_entropy
    metric: str = "top1"
    more_is_better: bool = True
    shown: tuple[str, ...] = ()
    ignore: tuple[str, ...] = ()
    stream: tuple[str, ...] = ()
    screen: int | None = 2000

    def inputs(self, seed: int) -> list[Tensor]:
        """The calibration batches without labels."""
        return [x for x, _ in self.calibrate(seed)]

    def writers(self, model: nn.Module) -> list[str]:
        """Names of the layers that write to the residual stream. A rule `^name` is a whole name, any other the end of one."""
        rules = [re.compile(f"^{re.escape(r[1:])}$" if r.startswith("^") else rf"(^|\.){re.escape(r)}$") for r in self.stream]
        return [name for name, _ in model.named_modules() if any(rule.search(name) for rule in rules)]


def batched(x: Tensor, y: Tensor, size: int = BATCH) -> Batches:
    """Batches of exactly `size` rows; what is left over is dropped."""
    return [(a, b) for a, b in zip(x.split(size), y.split(size), strict=True) if len(a) == size]


def top1(samples: Callable[[], tuple[Tensor, Tensor]], model: nn.Module, first: int | None) -> dict[str, float]:
    x, y = samples()
    return {"top1": round(cifar.accuracy(model, x[:first], y[:first]), 3)}


def trained(file: str, build: Callable[[Any], nn.Module]) -> nn.Module:
    """A network of the data folder's `reference_models.py`, filled from `file`."""
    reference = cifar.reference_models()
    return reference.load(build(reference), str(cifar.folder() / f"{file}.safetensors")).eval()


# ------------------------------------------------------------------ CIFAR-10
@cache
def cifar_samples(raw: bool, file: str) -> tuple[Tensor, Tensor]:
    x, y = cifar.pixels(file)
    return (x.float() if raw else cifar.normalised(x)), y


def cifar_calibration(raw: bool, seed: int) -> Batches:
    x, y = cifar.pixels(split.cifar_file(seed))
    rows = split.chosen(len(x), split.CALIBRATION, seed)
    return batched(x[rows].float() if raw else cifar.normalised(x[rows]), y[rows])


def cifar_task(name: str, dense: Callable[[], nn.Module], raw: bool, **options: Any) -> Task:
    return Task(
        name,
        dense,
        args=lambda: (torch.zeros(2, 3, 32, 32),),
        calibrate=partial(cifar_calibration, raw),
        evaluate=partial(top1, partial(cifar_samples, raw, "test")),
        calibration=f"{split.CALIBRATION} training images",
        **options,
    )


# ------------------------------------------------------------------ keywords
def keyword_samples(rows: Tensor | slice) -> tuple[Tensor, Tensor]:
    with np.load(cifar.folder() / "speech_commands_mfcc_1000.npz") as z:
        x = (torch.from_numpy(z["mfcc"]).float().unsqueeze(1) - float(z["zero_point"])) * float(z["scale"])
        return x[rows], torch.from_numpy(z["label"].astype(np.int64))[rows]


def keyword_accuracy(model: nn.Module, first: int | None) -> dict[str, float]:
    return top1(lambda: keyword_samples(split.keywords(0)[1]), model, first)


# ------------------------------------------------------------------ Fashion-MNIST
@cache
def fashion_samples(file: str) -> tuple[Tensor, Tensor]:
    with np.load(cifar.folder() / f"fashion_mnist_{file}.npz") as z:
        x, y = torch.from_numpy(z["image"]).unsqueeze(1), torch.from_numpy(z["label"].astype(np.int64))
    return (x.float() / 255 - 0.286) / 0.353, y


def fashion_calibration(seed: int) -> Batches:
    x, y = fashion_samples("train")
    rows = split.chosen(len(x), split.CALIBRATION, seed)
    return batched(x[rows], y[rows])


# ------------------------------------------------------------------ characters
WINDOW = 129
WINDOWS = 512


@cache
def shakespeare() -> Tensor:
    """tiny_shakespeare as numbers of characters: int64 (length,)."""
    text = (cifar.folder() / "tiny_shakespeare.txt").read_text(encoding="utf8")
    number = {c: i for i, c in enumerate(sorted(set(text)))}
    return torch.tensor([number[c] for c in text])


def windows(positions: range) -> Tensor:
    """Consecutive windows of 129 characters inside `positions`: int64 (windows, 129)."""
    ids = shakespeare()[positions.start : positions.stop]
    return ids[: len(ids) // WINDOW * WINDOW].view(-1, WINDOW)


def lm_calibration(seed: int) -> Batches:
    w = windows(split.characters(len(shakespeare()))[0])
    w = w[split.chosen(len(w), WINDOWS, seed)]
    return batched(w[:, :-1].contiguous(), w[:, 1:].contiguous(), 64)


def lm_loss(logits: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(logits.flatten(0, 1), labels.flatten())


def lm_perplexity(model: nn.Module, first: int | None) -> dict[str, float]:
    """Perplexity per character of the last 10 %; also in nats over every fourth window, as `expected.json` has it."""
    w = windows(split.characters(len(shakespeare()))[1])[:first]
    with torch.no_grad():
        each = torch.cat([_nats(model(b[:, :-1]), b[:, 1:]) for b in w.split(32)])
    loss = float(each.mean())
    return {"perplexity": round(math.exp(loss), 4), "nats": round(loss, 4), "nats_every_fourth": round(float(each[::4].mean()), 4)}


def _nats(logits: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(logits.transpose(1, 2), labels, reduction="none").mean(1)


# ------------------------------------------------------------------ the list
HALVES = {"÷1.5": 1 / 1.5, "÷2.0": 1 / 2}
TASKS: dict[str, Task] = {
    "resnet56": cifar_task(
        "resnet56",
        partial(trained, "cifar10_resnet56", lambda r: r.CifarResNet(56)),
        raw=False,
        shares={"÷1.5": 1 / 1.5, "÷2.0": 1 / 2, "÷2.57": 1 / 2.57, "÷3.0": 1 / 3},
        bars={"÷1.5": 93.2, "÷2.0": 92.5, "÷2.57": 90.5, "÷3.0": 88.5},
        stream=("conv2", "^conv1"),
    ),
    "resnet20": cifar_task(
        "resnet20",
        partial(trained, "cifar10_resnet20", lambda r: r.CifarResNet(20)),
        raw=False,
        shares={"÷2.0": 1 / 2},
        bars={"÷2.0": 91.73 - 2.5},
        stream=("conv2", "^conv1"),
    ),
    "ic_resnet8": cifar_task(
        "ic_resnet8",
        partial(trained, "tiny_ic_resnet8", lambda r: r.TinyResNet8()),
        raw=True,
        shares=HALVES,
        bars={"÷1.5": 87.21 - 2},
        stream=("c2", "sc", "^conv"),
    ),
    "kws_dscnn": Task(
        "kws_dscnn",
        partial(trained, "tiny_kws_dscnn", lambda r: r.DSCNN()),
        args=lambda: (keyword_samples(slice(0, 2))[0],),
        calibrate=lambda seed: batched(*keyword_samples(split.keywords(seed)[0]), 64),
        evaluate=keyword_accuracy,
        calibration=f"{split.KEYWORDS} of the 500 windows that are not measured; measured on the other 500",
        shares=HALVES,
        bars={"÷1.5": 91.6 - 2},
        screen=None,
    ),
    "fashion_vit": Task(
        "fashion_vit",
        partial(trained, "fashion_vit", lambda r: r.TinyViT()),
        args=lambda: (torch.zeros(2, 1, 28, 28),),
        calibrate=fashion_calibration,
        evaluate=partial(top1, partial(fashion_samples, "test")),
        calibration=f"{split.CALIBRATION} training images",
        shares=HALVES,
        bars={"÷1.5": 87.89 - 2},
        stream=("^embed", "proj", "fc2"),
    ),
    "lm_shakespeare": Task(
        "lm_shakespeare",
        partial(trained, "lm_shakespeare", lambda r: r.TinyLlama()),
        args=lambda: (torch.zeros(2, WINDOW - 1, dtype=torch.long),),
        calibrate=lm_calibration,
        evaluate=lm_perplexity,
        loss=lm_loss,
        calibration=f"{WINDOWS} windows of 128 characters of the first 90 %",
        shares={"−20 %": 0.8, "−35 %": 0.65},
        bars={"−20 %": 4.5422 * 1.05},
        metric="perplexity",
        shown=("nats",),
        more_is_better=False,
        ignore=("tok",),
        stream=("^tok", "wo", "w2"),
        screen=216,
    ),
    "minilm": Task(
        "minilm",
        texts.encoder,
        args=lambda: (texts.example(),),
        calibrate=texts.calibration,
        evaluate=texts.evaluate,
        loss=texts.contrast,
        calibration=f"{texts.CALIBRATION} passages of 64 tokens from other source files than those measured",
        shares={"−30 %": 0.7, "−50 %": 0.5},
        metric="cosine",
        shown=("other_half", "neighbour@1", "neighbours@10", "spearman"),
        ignore=("*head_dim", "*value_dim", "bert.embeddings*"),
        stream=("^bert.embeddings", "output.dense"),
        screen=256,
    ),
}
