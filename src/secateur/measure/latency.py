"""Seconds of one call: median and spread, with the threads and the batch they belong to.

Clocks drift: another process wakes, the processor cools. Two functions timed one after the other are therefore not
comparable, and ``compare`` takes turns instead: every round calls each function once, in an order that rotates, and
the ratio is formed within the round.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import nn

from secateur.errors import InputError
from secateur.measure.run import batch_of, inputs_on
from secateur.measure.runtimes import MOST_THREADS, prepared

_SHORTEST = 2e-3  # seconds: a quicker function is called several times per sample, or the clock's noise is measured
BRIEF = 5e-4  # the same for samples of which the least is taken: the shorter, the more often one runs undisturbed


@dataclass(frozen=True)
class Latency:
    """Seconds of one call. ``spread`` is the interquartile range of the rounds; ``batch`` the rows of one call."""

    median: float
    spread: float
    rounds: int
    calls: int
    threads: int
    batch: int

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class Comparison:
    """Each function's latency, and its time divided by the first one's in the same round (median and spread)."""

    seconds: dict[str, Latency]
    ratio: dict[str, float]
    ratio_spread: dict[str, float]

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def latency(
    model: nn.Module,
    args: tuple,
    kwargs: Mapping[str, Any] | None = None,
    *,
    rounds: int = 20,
    threads: int = 1,
    runtime: str = "torch",
    dtype: str | None = None,
) -> Latency:
    """Seconds of one forward in evaluation mode without gradients, after a warm-up, on one of `RUNTIMES`.

    Raises:
        InputError: the model cannot run on these inputs or is on the meta device; an unknown runtime.
        ModelError: the runtime is not installed, or cannot run this model.
    """
    args, kwargs = inputs_on(model, args, kwargs)
    with prepared(model, args, kwargs, runtime=runtime, threads=threads, dtype=dtype) as call:
        timed = compare({"forward": call}, rounds=rounds, threads=threads, batch=batch_of(args, kwargs))
    return timed.seconds["forward"]


def compare(
    functions: Mapping[str, Callable[[], object]],
    *,
    rounds: int = 20,
    threads: int = 1,
    batch: int = 1,
    least_of: int = 1,
) -> Comparison:
    """Time the functions in turns. The first function is the yardstick.

    ``batch`` is only passed on into the result. With ``least_of`` above 1 every round takes that many turns, and its
    sample is the least of them: what other processes do only ever adds, so the least of a few is what the call itself
    takes. Medians are over the rounds, as always.
    """
    if not functions:
        raise InputError("compare() got no functions. Pass {name: function, ...}.")
    if not isinstance(least_of, int) or least_of < 1:
        raise InputError(f"least_of={least_of!r}: a round takes 1 turn at least.")
    if not (isinstance(rounds, int) and isinstance(threads, int)) or rounds < 2 or not 1 <= threads <= MOST_THREADS:
        raise InputError(f"rounds={rounds!r}, threads={threads!r}: a spread needs 2 rounds at least, a run 1 to {MOST_THREADS} threads.")
    names = list(functions)
    samples: dict[str, list[float]] = {name: [] for name in names}
    with using_threads(threads):
        calls = {name: _calls(functions[name], _SHORTEST if least_of == 1 else BRIEF) for name in names}
        for turn in range(rounds):
            found: dict[str, list[float]] = {name: [] for name in names}
            for again in range(least_of):
                start = (turn + again) % len(names)
                for name in names[start:] + names[:start]:
                    found[name].append(_sample(functions[name], calls[name]))
            for name in names:
                samples[name].append(min(found[name]))
    return compared(samples, calls, threads=threads, batch=batch)


def compared(samples: Mapping[str, list[float]], calls: Mapping[str, int], *, threads: int, batch: int) -> Comparison:
    """Medians, spreads and ratios of `samples`: for every function the seconds of one call, round by round. The first is the yardstick."""
    names = list(samples)
    first = samples[names[0]]
    ratios = {name: [mine / one for mine, one in zip(samples[name], first, strict=True)] for name in names}
    return Comparison(
        seconds={
            name: Latency(statistics.median(times), _spread(times), len(times), calls[name], threads, batch)
            for name, times in samples.items()
        },
        ratio={name: statistics.median(values) for name, values in ratios.items()},
        ratio_spread={name: _spread(values) for name, values in ratios.items()},
    )


def _calls(function: Callable[[], object], shortest: float) -> int:
    """Warm up (three calls), and say how many calls make one sample long enough for the clock."""
    function()
    function()
    return max(1, round(shortest / max(_sample(function, 1), 1e-9)))


def _sample(function: Callable[[], object], calls: int) -> float:
    """Seconds per call over ``calls`` calls, the work of an accelerator included."""
    _wait()
    begin = time.perf_counter()
    for _ in range(calls):
        function()
    _wait()
    return (time.perf_counter() - begin) / calls


def _wait() -> None:
    """Calls on a GPU return before the work is done."""
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        torch.cuda.synchronize()


def _spread(values: list[float]) -> float:
    low, _, high = statistics.quantiles(values, n=4, method="inclusive")
    return high - low


@contextmanager
def using_threads(wanted: int) -> Iterator[None]:
    """So many threads of torch's operators within the block."""
    before = torch.get_num_threads()
    torch.set_num_threads(wanted)
    try:
        yield
    finally:
        torch.set_num_threads(before)
