"""Targets as they are written on a command line: `macs=50%`, `latency=60%@onnxruntime,batch=1,threads=1`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from secateur.budget.measured import Latency, MeasuredTarget, PeakMemory
from secateur.budget.targets import Bytes, MACs, Params, Target
from secateur.errors import InputError

COUNTED: dict[str, type[Target]] = {"macs": MACs, "params": Params, "bytes": Bytes}
SETTINGS = ("batch", "threads", "dtype")
EXAMPLES = "macs=50%, params=50%, bytes=50%, peak_memory=50%, latency=60%@onnxruntime,batch=1,threads=1"


def parse(text: str) -> Target | MeasuredTarget:
    """`"macs=50%"` -> `MACs(at_most="50%")`; `"latency=60%@torch,threads=2"` -> `Latency("60%", "torch", threads=2)`.

    Raises:
        InputError: an unknown figure, no '=', or a setting that latency does not have.
    """
    name, sep, value = text.partition("=")
    name, value = name.strip().lower(), value.strip()
    if sep and name in COUNTED:
        return COUNTED[name](value)
    if sep and name == "peak_memory":
        return PeakMemory(value)
    if sep and name == "latency":
        return _latency(text, value)
    raise InputError(f"{text!r} is not a target.\n  Write one of {EXAMPLES}.")


def parse_points(texts: Sequence[str]) -> dict[str, list[Target | MeasuredTarget]]:
    """Budgets of a sweep: `["macs=80%,60%"]` -> `{"macs=80%": [MACs("80%")], "macs=60%": [MACs("60%")]}`. Of several texts the
    first budgets make the first point, and so on; one with a single budget holds at every point.

    Raises:
        InputError: as `parse`; an empty place, lists of different lengths, or a point that stands twice.
    """
    lists = [_budgets(text) for text in texts]
    most = max((len(one) for one in lists), default=0)
    if odd := next((text for text, one in zip(texts, lists, strict=True) if len(one) not in (1, most)), None):
        raise InputError(
            f"{odd!r} has {odd.count(',') + 1} budgets where another has {most}.\n  Write as many in each, or one that holds at every point."
        )
    points: dict[str, list[Target | MeasuredTarget]] = {}
    for n in range(most):
        written = [one[n if len(one) > 1 else 0] for one in lists]
        label = " ".join(written)
        if label in points:
            raise InputError(f"the point {label!r} stands twice in the sweep.\n  Leave one of them out.")
        points[label] = [parse(text) for text in written]
    return points


def _budgets(text: str) -> list[str]:
    """`"latency=80%,60%@torch,threads=1"` -> `["latency=80%@torch,threads=1", "latency=60%@torch,threads=1"]`."""
    name, sep, value = text.partition("=")
    head, at, tail = value.partition("@")
    pieces = [piece.strip() for piece in head.split(",")]
    budgets, settings = [p for p in pieces if "=" not in p], [p for p in pieces if "=" in p]
    if not sep or not all(budgets) or not budgets:
        raise InputError(f"{text!r} is no list of budgets.\n  Write macs=80%,60%,40% or latency=80%,60%@onnxruntime,batch=1.")
    return ["".join([name.strip().lower(), "=", ",".join([b, *settings]), at, tail]) for b in budgets]


def _latency(text: str, value: str) -> Latency:
    first, *rest = (part.strip() for part in value.split(","))
    at_most, at, runtime = (part.strip() for part in first.partition("@"))
    settings: dict[str, Any] = {"runtime": runtime} if at else {}
    for part in rest:
        key, sep, given = (piece.strip() for piece in part.partition("="))
        if not sep or key not in SETTINGS or key in settings:
            raise InputError(f"{text!r}: {part!r} is not a setting of a latency.\n  Write {EXAMPLES.rsplit(', ', 1)[1]}.")
        settings[key] = given if key == "dtype" else _whole(text, key, given)
    return Latency(at_most, **settings)


def _whole(text: str, key: str, given: str) -> int:
    try:
        return int(given)
    except ValueError:
        raise InputError(f"{text!r}: {key}={given!r} is no whole number.\n  Write {key}=1.") from None
