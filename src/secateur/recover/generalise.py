"""How well a model does on rows it was not trained on: accuracy, loss, calibration, noise; and what differences are worth.

A pruned network may do better on new rows than the dense one: with fewer weights it memorises less, wrong labels above all
(Jin et al. 2022, "Pruning's Effect on Generalization Through the Lens of Training and Regularization"; Bartoldson et al. 2020,
"The Generalization-Stability Tradeoff in Neural Network Pruning"). Whether it does is measured here, over several seeds and
with intervals, since differences of one run are mostly chance.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from secateur.errors import DataError, InputError, ModelError
from secateur.measure import at_rest
from secateur.models.data import Data
from secateur.models.quality import accuracy, scored

BINS = 15  # of confidence, as Guo et al. take them
APART = 0x5EC47E0A  # added to seeds of noise: inputs that were themselves drawn from seed 0 must not get themselves as noise
HALVINGS = 80  # of an interval of angles: more than float64 can tell apart


# ---------------------------------------------------------------- one model on one set of rows
@dataclass(frozen=True)
class Quality:
    """What `quality_of` found on `rows` rows.

    Attributes:
        accuracy: the share of rows whose largest score is at their label, 0..1.
        loss: mean cross-entropy in nats.
        ece: expected calibration error, 0..1: how far confidence and accuracy lie apart.
        rows: how many there were.
    """

    accuracy: float
    loss: float
    ece: float
    rows: int

    def to_json(self) -> dict[str, Any]:
        """One flat dictionary of numbers, ready for ``json.dumps``."""
        return asdict(self)


def quality_of(model: nn.Module, batches: Iterable[Any]) -> Quality:
    """Accuracy, loss and calibration on `batches` of (inputs, labels), one class number per row. The model is left as it was.

    The calibration error is that of Guo et al. 2017, "On Calibration of Modern Neural Networks", over 15 bins of equal width
    ((b - 1) / 15, b / 15] of a row's confidence, its largest softmax probability:

        ECE = sum over bins of (rows in the bin / rows) * |accuracy of the bin - mean confidence of the bin|

    Raises:
        DataError: no labels, no rows, or batches that do not fit the model.
        ModelError: scores that are not finite, of a model whose training diverged.
    """
    count, hits, confidence = (torch.zeros(BINS, dtype=torch.float64) for _ in range(3))
    loss = 0.0
    with at_rest(model):
        for scores, labels in scored(model, batches):
            logs = F.log_softmax(scores.double(), 1).cpu()
            own = -logs.gather(1, labels.cpu()[:, None])[:, 0]
            if not bool(own.isfinite().all()):
                bad = int((~own.isfinite()).sum())
                raise ModelError(
                    f"{type(model).__name__} gives {bad} of {len(own)} rows of a batch scores that are not finite: they have no loss.\n"
                    "  Its training diverged, or its weights are damaged: train at a lower rate, or load other weights."
                )
            loss += float(own.sum())
            sure = logs.max(1).values.exp()
            bins = (sure * BINS).ceil().long().clamp(1, BINS) - 1
            count.index_add_(0, bins, torch.ones_like(sure))
            hits.index_add_(0, bins, (scores.argmax(1) == labels).cpu().double())
            confidence.index_add_(0, bins, sure)
    rows = int(count.sum())
    return Quality(float(hits.sum()) / rows, loss / rows, float((hits - confidence).abs().sum()) / rows, rows)


def noisy(model: nn.Module, batches: Iterable[Any], sigma: float, seed: int = 0) -> float:
    """Accuracy, 0..1, with Gaussian noise added to the inputs: x + sigma * s * e, where s is the standard deviation of all
    numbers of all inputs of `batches` and e is drawn from `seed`. The model and the batches are left as they were.

    Raises:
        InputError: a `sigma` below 0 or not finite; batches that can be gone through only once.
        DataError: inputs that are whole numbers, such as tokens; and as `quality_of`.
    """
    if not (math.isfinite(sigma) and sigma >= 0):
        raise InputError(f"sigma={sigma!r} is no size of noise.\n  Pass a number from 0 up: 0.1 is a tenth of the inputs' standard deviation.")
    _many_times(batches)
    return accuracy(model, _Noisy(batches, sigma * _deviation(batches), seed))


class _Noisy:
    """(inputs, labels) with noise of `size` on the inputs; the same noise every time it is gone through."""

    def __init__(self, batches: Iterable[Any], size: float, seed: int):
        self.batches, self.size, self.seed = batches, size, seed

    def __iter__(self) -> Iterator[Any]:
        drawn = torch.Generator().manual_seed((self.seed + APART) % 2**63)
        for inputs, labels in self.batches:
            yield inputs + self.size * torch.randn(inputs.shape, generator=drawn).to(inputs.device, inputs.dtype), labels


def _deviation(batches: Iterable[Any]) -> float:
    """The standard deviation of all numbers of all inputs, batch by batch (Chan, Golub and LeVeque 1979)."""
    count, mean, squares = 0, 0.0, 0.0
    for batch in batches:
        x = batch[0] if isinstance(batch, (tuple, list)) and len(batch) == 2 else None
        if not (isinstance(x, Tensor) and x.is_floating_point()):
            found = "no (inputs, labels)" if x is None else str(getattr(x, "dtype", type(x).__name__)).removeprefix("torch.")
            raise DataError(f"Noise goes on inputs that are a tensor of floating point; these are {found}.\n  Leave the noise out: noise=().")
        if x.numel():
            x = x.detach().double()
            own, away = float(x.mean()), float(x.mean()) - mean
            squares += float((x - own).square().sum()) + away**2 * count * x.numel() / (count + x.numel())
            count += x.numel()
            mean += away * x.numel() / count
    return math.sqrt(squares / max(1, count))


def _many_times(batches: Iterable[Any]) -> None:
    if isinstance(batches, Iterator):
        raise InputError(f"batches is a {type(batches).__name__}, gone through only once, and needed again.\n  Pass a list of batches.")


# ---------------------------------------------------------------- trained on and new
@dataclass(frozen=True)
class Generalisation:
    """One model on the rows it was trained on and on new ones.

    Attributes:
        train, test: its quality on each.
        noise: {size of the noise: accuracy on the test rows with it}, see `noisy`.
    """

    train: Quality
    test: Quality
    noise: Mapping[float, float]

    @property
    def gap(self) -> float:
        """Accuracy on the training rows less that on the test rows; above 0 for a model that does worse on new rows."""
        return self.train.accuracy - self.test.accuracy

    @property
    def loss_gap(self) -> float:
        """Loss on the test rows less that on the training rows, nats; above 0 for a model that does worse on new rows."""
        return self.test.loss - self.train.loss

    def to_json(self) -> dict[str, Any]:
        """A dictionary of numbers, ready for ``json.dumps``; the sizes of noise as text."""
        return {
            "train": self.train.to_json(),
            "test": self.test.to_json(),
            "gap": self.gap,
            "loss_gap": self.loss_gap,
            "noise": {f"{sigma:g}": value for sigma, value in self.noise.items()},
        }


def generalisation(model: nn.Module, data: Data, noise: Sequence[float] = (0.1, 0.2), seed: int = 0) -> Generalisation:
    """Quality on `data.train` and `data.test`, and accuracy on the test rows under each size of `noise` (see `noisy`), drawn
    from `seed`. The model is left as it was.

    Raises:
        InputError, DataError, ModelError: as `quality_of` and `noisy`.
    """
    if noise:
        _many_times(data.test)
    train, test = quality_of(model, data.train), quality_of(model, data.test)
    return Generalisation(train, test, {float(sigma): noisy(model, data.test, sigma, seed) for sigma in noise})


# ---------------------------------------------------------------- over seeds
@dataclass(frozen=True)
class Interval:
    """A mean of `count` values and its confidence interval, mean - half .. mean + half.

    `half` is infinite for one value, which says nothing about chance.
    """

    mean: float
    half: float
    count: int
    confidence: float = 0.95

    @property
    def low(self) -> float:
        return self.mean - self.half

    @property
    def high(self) -> float:
        return self.mean + self.half

    def to_json(self) -> dict[str, Any]:
        """A flat dictionary, ready for ``json.dumps``; `half` is None where it is infinite."""
        return {**asdict(self), "half": self.half if math.isfinite(self.half) else None}


def interval(values: Iterable[float], confidence: float = 0.95) -> Interval:
    """The mean of independent values with its interval by Student's t (Student 1908, "The Probable Error of a Mean"):

        mean ± t * s / sqrt(n),   s² = sum of (value - mean)² / (n - 1),   t: the quantile of n - 1 degrees of freedom

    Raises:
        InputError: no values, values that are not finite, or a confidence outside 0..1.
    """
    held = [float(v) for v in values]
    if not 0 < confidence < 1:
        raise InputError(f"confidence={confidence!r} is no probability.\n  Pass a number between 0 and 1, such as 0.95.")
    if not held or not all(map(math.isfinite, held)):
        found = f"{sum(not math.isfinite(v) for v in held)} of {len(held)} values that are not finite" if held else "no values"
        raise InputError(f"an interval of {found}.\n  Pass at least one value, and finite ones only.")
    n = len(held)
    mean = math.fsum(held) / n
    if n == 1:
        return Interval(mean, math.inf, 1, confidence)
    spread = math.sqrt(math.fsum((v - mean) ** 2 for v in held) / (n - 1))
    return Interval(mean, student_t(n - 1, confidence) * spread / math.sqrt(n), n, confidence)


def paired(a: Sequence[float], b: Sequence[float], confidence: float = 0.95) -> Interval:
    """The mean of a - b with its interval, where a[i] and b[i] belong together, such as two runs from one seed. What the pair
    has in common drops out, so the interval is narrower than that of two separate means.

    Raises:
        InputError: not as many of one as of the other; and as `interval`.
    """
    if len(a) != len(b):
        raise InputError(f"{len(a)} values beside {len(b)}, which are no pairs.\n  Pass two values for each seed, in the same order.")
    return interval([x - y for x, y in zip(a, b, strict=True)], confidence)


def student_t(freedom: int, confidence: float = 0.95) -> float:
    """The t with P(|T| <= t) = confidence, of Student's distribution with `freedom` degrees of freedom, by bisection."""
    low, high = 0.0, math.pi / 2
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        low, high = (middle, high) if _within(middle, freedom) < confidence else (low, middle)
    return math.sqrt(freedom) * math.tan(low)


def _within(angle: float, freedom: int) -> float:
    """P(|T| <= t) where t = sqrt(freedom) * tan(angle): the finite sums of Abramowitz and Stegun 1964, 26.7.3 and 26.7.4.

        odd:   2/pi * (angle + sin * (cos + 2/3 cos³ + ... + 2*4...(f-3) / (3*5...(f-2)) cos^(f-2)))
        even:  sin * (1 + 1/2 cos² + ... + 1*3...(f-3) / (2*4...(f-2)) cos^(f-2))
    """
    odd = freedom % 2
    sine, cosine = math.sin(angle), math.cos(angle)
    term = cosine if odd else 1.0
    total = term if freedom > 1 else 0.0
    for k in range(2 + odd, freedom - 1, 2):
        term *= (k - 1) / k * cosine**2
        total += term
    return 2 / math.pi * (angle + sine * total) if odd else sine * total
