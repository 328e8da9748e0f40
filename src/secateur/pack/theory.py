"""What packed tensors weigh by the books."""

from __future__ import annotations

import math
from dataclasses import dataclass

from secateur.errors import InputError
from secateur.pack.places import ESCAPE


@dataclass(frozen=True)
class Theory:
    """Bytes of a tensor with n weights of which k are not zero.

    Attributes:
        dense: n values.
        bitmask: one bit a weight, k values.
        index: one byte a value, k values, and the escapes to be expected where places are drawn at random.
        entropy: n H(k/n) bits, which no code for places drawn at random falls below on average, and k values.
    """

    dense: float
    bitmask: float
    index: float
    entropy: float


def theory(n: int, k: int, itemsize: int) -> Theory:
    """
    Args:
        n: weights. k: those that are not zero. itemsize: bytes of a value.

    Raises:
        InputError: k does not lie between 0 and n.
    """
    if not 0 <= k <= n:
        raise InputError(f"{k} of {n} weights are not zero.\n  k lies between 0 and n.")
    share = k / n if n else 1.0
    lost = 1.0 - share
    # zeros before a value: q^255 of all runs have 255 or more, q^510 twice as many, and so on
    escapes = n / ESCAPE if not k else (k + 1) * lost**ESCAPE / (1.0 - lost**ESCAPE)
    bits = -sum(p * math.log2(p) for p in (share, lost) if p > 0)
    return Theory(n * itemsize, n / 8 + k * itemsize, k + escapes + k * itemsize, n * bits / 8 + k * itemsize)
