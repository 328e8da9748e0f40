"""Seconds of a model beside the dense one, each on the runtime where it is quickest."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from types import TracebackType
from typing import Any

from torch import nn

from secateur.errors import ModelError, SecateurError
from secateur.measure import RUNTIMES, Comparison, at_rest, compare
from secateur.measure.latency import BRIEF, using_threads
from secateur.measure.run import batch_of, forward
from secateur.runtime import convert
from secateur.runtime.convert import Converted

TORCH, SPARSE = "torch", "sparse layers"
ROUNDS, LEAST_OF = 15, 12  # of a comparison; of each round the least of so many turns: others at work on the machine only ever add
SECONDS, FEWEST = 8.0, 5  # that a comparison may take, about, and rounds at least

Call = Callable[[], Any]


@dataclass(frozen=True)
class Timed:
    """One model beside the dense one. `ratio`: its time over that of the quickest dense runtime, formed round by round and then the median;
    `spread` the interquartile range of the rounds. Seconds are medians. `each`: the ratio on every runtime that ran."""

    runtime: str
    ratio: float
    spread: float
    seconds: float
    dense_seconds: float
    each: Mapping[str, float]

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


class Bench:
    """The dense model, ready on every runtime for as long as the block lasts; others are timed in turns with it.

    Args:
        inputs: (args, kwargs) of the batch that counts. threads: of one operator.
        runtimes: of `measure.RUNTIMES`. One that cannot run the dense model is left out, and `notes` says why.
    """

    def __init__(self, model: nn.Module, inputs: tuple[tuple, dict[str, Any]], threads: int, runtimes: Iterable[str]):
        self.model, self.inputs, self.threads, self.wanted = model, inputs, threads, list(runtimes)
        self.notes: list[str] = []
        self.dense: dict[str, Call] = {}
        self.yardstick = TORCH
        self.spreads: dict[str, float] = {}  # of the last comparison
        self.stack = ExitStack()

    def __enter__(self) -> Bench:
        for name in self.wanted:
            try:
                self.dense[name] = self._prepared(self.model, name, self.stack)
            except ModelError as error:
                self.notes.append(f"no time on {name}: {error}".replace("\n ", ""))
        if not self.dense:
            self.dense[TORCH] = self._prepared(self.model, TORCH, self.stack)
        found = self._compared(self.dense)
        self.yardstick = min(self.dense, key=lambda name: found.seconds[name].median)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.stack.close()

    def itself(self) -> Timed:
        """The dense model: 1 by definition, with the spread of the rounds between two equal calls."""
        found = self.calls(self.dense)
        name = self.yardstick
        return replace(found, runtime=name, ratio=1.0, spread=abs(found.each[name] - 1) + self.spreads[name], seconds=found.dense_seconds)

    def model_of(self, model: nn.Module) -> Timed:
        """A smaller model, on all runtimes that run the dense one."""
        with ExitStack() as stack:
            calls = {}
            for name in self.dense:
                try:
                    calls[name] = self._prepared(model, name, stack)
                except ModelError as error:
                    self.notes.append(f"no time on {name}: {error}".replace("\n ", ""))
            calls = calls or {TORCH: self._prepared(model, TORCH, stack)}
            with at_rest(model):
                return self.calls(calls)

    def zeros_of(self, model: nn.Module) -> tuple[Timed, Converted | None]:
        """A model whose weights have zeros: with sparse layers, or as the dense model where that is quicker, since elsewhere zeros are numbers
        like others. Also what became of its layers; None where it cannot be converted."""
        args, kwargs = self.inputs
        try:
            with using_threads(self.threads):
                found = convert(model, args, kwargs, fold=True, rounds=5)
        except SecateurError as error:
            self.notes.append(f"no sparse layers: {error}".replace("\n ", ""))
            found = None
        as_dense = self.itself()
        if found is None or not found.chosen:
            return as_dense, found
        with ExitStack() as stack, at_rest(found.model):
            timed = self.calls({SPARSE: self._prepared(found.model, TORCH, stack)})
        return (timed if timed.ratio < 1 else replace(as_dense, each={**as_dense.each, **timed.each})), found

    def calls(self, calls: Mapping[str, Call]) -> Timed:
        """Functions by runtime, in turns with the dense model."""
        found = self._compared({"yardstick": self.dense[self.yardstick], **calls})
        best = min(calls, key=found.ratio.__getitem__)
        self.spreads = dict(found.ratio_spread)
        each = {name: found.ratio[name] for name in calls}
        return Timed(best, found.ratio[best], found.ratio_spread[best], found.seconds[best].median, found.seconds["yardstick"].median, each)

    def _compared(self, calls: Mapping[str, Call]) -> Comparison:
        with at_rest(self.model):
            turn = 0.0
            for call in calls.values():
                call()
                begun = time.perf_counter()
                call()
                turn += max(BRIEF, time.perf_counter() - begun)
            turns = SECONDS / turn
            least = max(1, min(LEAST_OF, round(turns / ROUNDS)))
            rounds = max(min(FEWEST, ROUNDS), min(ROUNDS, round(turns / least)))
            return compare(calls, rounds=rounds, threads=self.threads, batch=batch_of(*self.inputs), least_of=least)

    def _prepared(self, model: nn.Module, name: str, stack: ExitStack) -> Call:
        """A call that holds for as long as `stack`; the model is in evaluation mode whenever it is timed."""
        args, kwargs = self.inputs
        if name == TORCH:
            def call() -> Any:
                return model(*args, **kwargs)

            with at_rest(model):
                forward(model, args, kwargs)
            return call
        with at_rest(model):
            return stack.enter_context(RUNTIMES[name](model, args, kwargs, self.threads))
