"""Targets as they are written on a command line: `macs=50%`, `latency=60%@onnxruntime,batch=1,threads=1`."""

from __future__ import annotations

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
