"""Numbers as people read them, and values as JSON can say them."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict, is_dataclass
from typing import Any


def number(value: float) -> str:
    """1,234 or 1.23 M."""
    for size, letter in ((1e12, "T"), (1e9, "G"), (1e6, "M")):
        if abs(value) >= size:
            return f"{value / size:.2f} {letter}"
    return f"{value:,.0f}"


def size(value: int) -> str:
    """Bytes in KiB, MiB or GiB."""
    for unit, letter in ((2**30, "GiB"), (2**20, "MiB"), (2**10, "KiB")):
        if value >= unit:
            return f"{value / unit:.2f} {letter}"
    return f"{value} B"


def seconds(value: float) -> str:
    """Milliseconds below one second."""
    return f"{value:.2f} s" if value >= 1 else f"{value * 1e3:.3f} ms"


def percent(value: float) -> str:
    return f"{100 * value:.2f} %"


def joules(value: float) -> str:
    """J, mJ, µJ or nJ."""
    for unit, letter in ((1.0, "J"), (1e-3, "mJ"), (1e-6, "µJ")):
        if value >= unit:
            return f"{value / unit:.2f} {letter}"
    return f"{value * 1e9:.2f} nJ"


def plain(value: Any) -> Any:
    """`value` as JSON can say it: numbers that are not finite become None, tensors and dataclasses their values."""
    if value is None or isinstance(value, (bool, int, str)):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(key): plain(held) for key, held in value.items()}
    if is_dataclass(value) and not isinstance(value, type):
        return plain(asdict(value))
    if hasattr(value, "tolist"):  # tensors and arrays, of any number of dimensions
        return plain(value.tolist())
    if isinstance(value, Iterable):
        return [plain(held) for held in value]
    return str(value)
