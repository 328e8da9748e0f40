"""How much of each layer stays, so that a share of all weights does.

    uniform   the same share of every layer
    erk       density_l ~ sum of the weight's dimensions / their product      (Evci et al. 2020, "Rigging the Lottery")
    lamp      one threshold on w^2 / sum of w'^2 over weights of the layer with |w'| >= |w|   (Lee et al. 2021)
    owl       sparsity_l = S - (D_l - mean D), D_l the share of |w| |x| above 5 times its mean, scaled to a range of 2 * 0.08
              (Yin et al. 2024, "Outlier Weighed Layerwise Sparsity")
    atp       sparsity_l = S + beta (l - (L - 1) / 2): later layers lose more    (2025, "Determining Layer-wise Sparsity for LLMs
              Through a Theoretical Perspective")

All give {name: share}, exact fractions; `floor(share * size)` weights stay, one at least of each layer, and but for those their sum is
at most what was asked for.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from fractions import Fraction

import torch
from torch import Tensor

from secateur.errors import InputError
from secateur.pattern import top

OUTLIER = 5.0  # times the mean
RANGE = 0.08
LEAST = 0.1  # of the share asked for
STEEPNESS = 0.3  # of atp: sparsity of the last layer minus that of the first, as a share of the room that there is


@dataclass(frozen=True)
class Weight:
    """A layer's weight as budgets see it: its matrix (rows, cols), the dimensions it is stored with, and E[x_j^2] of each
    column's input (None where no data was seen)."""

    w: Tensor
    shape: tuple[int, ...]
    mean_square: Tensor | None = None

    @property
    def size(self) -> int:
        return self.w.numel()


Weights = Mapping[str, Weight]
Budget = dict[str, Fraction]


def uniform(weights: Weights, keep: Fraction) -> Budget:
    """The same share of every layer."""
    return {n: keep for n in weights}


def erk(weights: Weights, keep: Fraction) -> Budget:
    """Small layers keep more: density in proportion to (sum of dimensions) / (their product), at most all."""
    raw: dict[str, float] = {}
    for n, x in weights.items():
        raw[n] = sum(x.shape) / math.prod(x.shape)
    return spent(raw, weights, keep)


def lamp(weights: Weights, keep: Fraction) -> Budget:
    """As many of each layer as one threshold on all LAMP scores leaves it; one at least."""
    scores = []
    for x in weights.values():
        ordered = x.w.double().square().flatten().sort().values
        left = ordered.flip(0).cumsum(0).flip(0)
        scores.append(ordered / left.clamp_min(torch.finfo(torch.float64).tiny))
    stays = top(torch.cat(scores), int(sum(x.size for x in weights.values()) * keep)).split([x.size for x in weights.values()])
    return {n: Fraction(max(1, int(s.sum())), x.size) for (n, x), s in zip(weights.items(), stays, strict=True)}


def owl(weights: Weights, keep: Fraction) -> Budget:
    """Layers with many outliers keep more.

    Raises:
        InputError: no data was seen.
    """
    shares = {}
    for n, x in weights.items():
        if x.mean_square is None:
            raise InputError("the budget 'owl' needs to see what layers take in.\n  Pass data=, or use budget='erk'.")
        a = x.w.abs() * x.mean_square.clamp_min(0).sqrt()
        shares[n] = float((a > OUTLIER * a.mean()).double().mean())
    low, high = min(shares.values()), max(shares.values())
    wide = {n: (d - low) / (high - low) * 2 * RANGE if high > low else 0.0 for n, d in shares.items()}
    mean = sum(wide[n] * x.size for n, x in weights.items()) / sum(x.size for x in weights.values())
    return spent({n: float(keep) + wide[n] - mean for n in weights}, weights, keep)


def atp(weights: Weights, keep: Fraction) -> Budget:
    """Early layers keep more: their errors grow on the way."""
    room = min(float(keep), 1 - float(keep))
    last = max(1, len(weights) - 1)
    return spent({n: float(keep) + STEEPNESS * room * (0.5 - i / last) for i, n in enumerate(weights)}, weights, keep)


BUDGETS: dict[str, Callable[[Weights, Fraction], Budget]] = {"uniform": uniform, "erk": erk, "lamp": lamp, "owl": owl, "atp": atp}


def spent(densities: Mapping[str, float], weights: Weights, keep: Fraction) -> Budget:
    """Densities in these proportions that keep the share `keep` of all weights, none under a tenth of it; where one exceeds 1, its layer
    is dense and what is over goes to the others."""
    densities = {n: max(d, LEAST * float(keep)) for n, d in densities.items()}
    total = int(sum(x.size for x in weights.values()) * keep)
    dense: set[str] = set()
    scale = 0.0
    while len(dense) < len(weights):
        left = total - sum(weights[n].size for n in dense)
        scale = max(0.0, left) / sum(densities[n] * weights[n].size for n in weights if n not in dense)
        over = {n for n in weights if n not in dense and scale * densities[n] >= 1}
        if not over:
            break
        dense |= over
    return {n: Fraction(1) if n in dense else Fraction(max(1, int(scale * densities[n] * x.size)), x.size) for n, x in weights.items()}
