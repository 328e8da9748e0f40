"""Joules of one call: measured where the processor has a counter that may be read, otherwise an estimate that says so.

Measured: Linux shows the counters of Intel's and AMD's processors (RAPL, running average power limit) as files, in microjoules since
some moment, `/sys/class/powercap/intel-rapl:*/energy_uj`. The packages and their DRAM are summed; a counter that reaches its end begins
again at 0. Everything that runs on the machine is in these joules, so what it takes at rest is measured first and named beside them.

Estimated: MACs times the energy of one multiply and one add, plus bytes moved times the energy of a byte of DRAM, from the table in
Horowitz, "Computing's energy problem (and what we can do about it)", ISSCC 2014, for 45 nm and 0.9 V:

    joules = MACs · (multiply + add) + bytes · DRAM

Every operator reads the tensors it is given and writes those it makes, once each; views move nothing. An estimate is for comparing two
networks, not for sizing a battery.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from secateur.measure.count import count, distinct
from secateur.measure.latency import using_threads
from secateur.measure.run import at_rest, forward, inputs_on
from secateur.measure.runtimes import cast, prepared

POWERCAP = Path("/sys/class/powercap")
IDLE, ROUND, ROUNDS = 0.5, 0.3, 5  # seconds at rest, seconds of one round at least, rounds

PICO = 1e-12
# multiply and add, in picojoules; int8 products are summed in int32, bfloat16 is taken for float16
OPERATION = {"float32": (3.7, 0.9), "float16": (1.1, 0.4), "bfloat16": (1.1, 0.4), "int8": (0.2, 0.1)}
DRAM = 1300 / 8  # picojoules a byte: an access of 64 bits takes 1.3 to 2.6 nJ, and this is the lower end
ESTIMATE = "Horowitz, Computing's energy problem, ISSCC 2014, 45 nm, 0.9 V"
LEFT_OUT = "caches (all traffic counts as DRAM), instructions, idle power, zeros that a sparse layer skips, newer processes (which take less)"
MEASURED_LEFT_OUT = "all outside the processor packages and their DRAM: graphics cards, disks, losses of the power supply; other programs are in it"


@dataclass(frozen=True)
class Energy:
    """Joules of one call, or None where there is neither a counter nor a figure for this number format.

    `kind` is "measured" or "estimate"; `source` names the counters or the model and its figures; `leaves_out` says what is not in it.
    Of a measurement: `spread` (interquartile range of the rounds), `calls` in all, `idle_watts` of the machine at rest and `above_idle`, the
    joules of a call that come on top of that. Of an estimate: `macs`, `bytes_moved`, and the joules of each.
    """

    joules: float | None
    kind: str
    source: str
    leaves_out: str
    spread: float | None = None
    calls: int | None = None
    idle_watts: float | None = None
    above_idle: float | None = None
    macs: int | None = None
    bytes_moved: int | None = None
    joules_macs: float | None = None
    joules_bytes: float | None = None

    def to_json(self) -> dict[str, Any]:
        return {name: value for name, value in asdict(self).items() if value is not None or name == "joules"}


def energy(model: nn.Module, args: tuple, kwargs: Mapping[str, Any] | None = None, *, threads: int = 1, runtime: str = "torch",
           dtype: str | None = None, counters: Counters | None = None) -> Energy:  # fmt: skip
    """Joules of one forward in evaluation mode: measured with `counters` (those of this machine without them), else estimated.

    `runtime`, `threads` and `dtype` are those of `latency`; an estimate knows only the number format. Models on another device than the CPU
    are estimated: the counters do not see it. Raises what `latency` raises.
    """
    args, kwargs = inputs_on(model, args, kwargs)
    counters = Counters.of() if counters is None else counters
    device = next((p.device.type for p in model.parameters()), "cpu")
    if device != "cpu":
        counters = Counters((), f"the counters do not see the device {device!r}")
    if counters.zones:
        with prepared(model, args, kwargs, runtime=runtime, threads=threads, dtype=dtype) as call:
            found = measured({"call": call}, counters, threads=threads)["call"]
        if found.joules:
            return found
        counters = Counters((), "the energy counters stand still")
    model, args, kwargs = cast(model, args, kwargs, dtype)
    held = dtype or next((str(p.dtype).removeprefix("torch.") for p in model.parameters()), "float32")
    return estimate(count(model, args, kwargs).macs, bytes_moved(model, args, kwargs), held, counters.why)


def beside(dense: nn.Module, pruned: nn.Module, args: tuple, kwargs: Mapping[str, Any] | None = None, *,
           counters: Counters | None = None) -> dict[str, Energy]:  # fmt: skip
    """"dense" and "pruned" on the same inputs: measured in turns, on torch with one thread, or both estimated."""
    models = {"dense": dense, "pruned": pruned}
    counters = Counters.of() if counters is None else counters
    if counters.zones and all(p.device.type == "cpu" for model in models.values() for p in model.parameters()):
        with ExitStack() as stack:
            calls = {name: stack.enter_context(prepared(model, args, kwargs)) for name, model in models.items()}
            found = measured(calls, counters)
        if all(one.joules for one in found.values()):
            return found
        counters = Counters((), "the energy counters stand still")
    without = Counters((), counters.why)
    return {name: energy(model, args, kwargs, counters=without) for name, model in models.items()}


# ---------------------------------------------------------------- measured
@dataclass(frozen=True)
class Zone:
    """One counter: its file, what it counts, and the microjoules at which it begins again."""

    file: Path
    name: str
    end: int

    def read(self) -> int:
        return int(self.file.read_text())


@dataclass(frozen=True)
class Counters:
    """The counters that together see the processors and their memory; `why` there are none."""

    zones: tuple[Zone, ...]
    why: str = ""

    @classmethod
    def of(cls, powercap: Path = POWERCAP) -> Counters:
        """Packages and their DRAM; cores are part of a package and the platform holds them all, so neither is added."""
        found, shut = [], 0
        for folder in sorted(powercap.glob("intel-rapl:*")):
            try:
                name = (folder / "name").read_text().strip()
                zone = Zone(folder / "energy_uj", name, int((folder / "max_energy_range_uj").read_text()))
                if name.startswith("package") or name == "dram":
                    zone.read()
                    found.append(zone)
            except PermissionError:
                shut += 1
            except (OSError, ValueError):
                continue
        why = "the energy counters may be read by root alone" if shut else "this machine shows no energy counter"
        return cls(tuple(found)) if any(z.name.startswith("package") for z in found) and not shut else cls((), why)

    def read(self) -> tuple[int, ...]:
        return tuple(zone.read() for zone in self.zones)

    def joules(self, before: tuple[int, ...], after: tuple[int, ...]) -> float:
        """What was used between two readings, which lie less than one round of a counter apart (minutes)."""
        used = (b - a if b >= a else b - a + zone.end for zone, a, b in zip(self.zones, before, after, strict=True))
        return sum(used) * 1e-6


def measured(calls: Mapping[str, Callable[[], object]], counters: Counters, *, threads: int = 1, idle: float = IDLE,
             shortest: float = ROUND) -> dict[str, Energy]:  # fmt: skip
    """Joules of each function's call, in turns: medians over five rounds of at least `shortest` seconds each."""
    with using_threads(threads):
        for call in calls.values():
            call()
        at_rest_watts = _round(counters, lambda: time.sleep(idle), 1)
        watts = at_rest_watts[0] / at_rest_watts[1]
        times = {name: _times(call, shortest) for name, call in calls.items()}
        rounds: dict[str, list[tuple[float, float]]] = {name: [] for name in calls}
        for _ in range(ROUNDS):
            for name, call in calls.items():
                rounds[name].append(_round(counters, call, times[name]))
    return {name: _energy(found, times[name], watts, counters) for name, found in rounds.items()}


def _times(call: Callable[[], object], shortest: float) -> int:
    begin = time.perf_counter()
    call()
    return max(1, round(shortest / max(time.perf_counter() - begin, 1e-6)))


def _round(counters: Counters, call: Callable[[], object], times: int) -> tuple[float, float]:
    """(joules, seconds) of so many calls."""
    before, begin = counters.read(), time.perf_counter()
    for _ in range(times):
        call()
    took = time.perf_counter() - begin
    return counters.joules(before, counters.read()), took


def _energy(rounds: list[tuple[float, float]], times: int, watts: float, counters: Counters) -> Energy:
    joules = [used / times for used, _ in rounds]
    low, middle, high = statistics.quantiles(joules, n=4, method="inclusive")
    above = statistics.median((used - watts * took) / times for used, took in rounds)
    names = ", ".join(zone.name for zone in counters.zones)
    return Energy(middle, "measured", f"RAPL: {names}", MEASURED_LEFT_OUT, spread=high - low, calls=times * len(rounds), idle_watts=watts,
                  above_idle=above)  # fmt: skip


# ---------------------------------------------------------------- estimated
def estimate(macs: int, moved: int, dtype: str = "float32", why: str = "") -> Energy:
    """MACs · (multiply + add) + bytes · DRAM, with the figures of Horowitz 2014.

    Args:
        macs: multiply-accumulates of one call. moved: bytes read and written in one call. dtype: float32, float16, bfloat16 or int8; of
            others the table says nothing and the joules are None. why: there is no measurement.
    """
    left_out = LEFT_OUT + (f"; estimated because {why}" if why else "")
    if dtype not in OPERATION:
        return Energy(None, "estimate", f"{ESTIMATE}: no figure for {dtype}", left_out, macs=macs, bytes_moved=moved)
    multiply, add = OPERATION[dtype]
    source = f"{ESTIMATE}: {multiply + add:.3g} pJ a {dtype} multiply-accumulate, {DRAM:g} pJ a byte of DRAM"
    computed, fetched = macs * (multiply + add) * PICO, moved * DRAM * PICO
    return Energy(computed + fetched, "estimate", source, left_out, macs=macs, bytes_moved=moved, joules_macs=computed, joules_bytes=fetched)


def bytes_moved(model: nn.Module, args: tuple, kwargs: Mapping[str, Any] | None = None) -> int:
    """Bytes that the operators of one forward read and write, each tensor once an operator; on any device, the meta device included.

    Raises InputError if the model cannot run on these inputs.
    """
    args, kwargs = inputs_on(model, args, kwargs)
    watch = _Traffic()
    with at_rest(model), watch:
        forward(model, args, kwargs)
    return watch.moved


aten = torch.ops.aten
_LOOKUPS = {aten.embedding, aten.index_select, aten.gather, aten.index}  # of their first tensor they read what they give back
_UNWRITTEN = {aten.empty, aten.new_empty, aten.empty_like, aten.empty_strided, aten.new_empty_strided}


class _Traffic(TorchDispatchMode):
    """Sums what every operator reads and writes."""

    def __init__(self) -> None:
        super().__init__()
        self.moved = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        given, made = _tensors((args, kwargs)), _tensors(out)
        held = {t.untyped_storage()._cdata for t in given}
        fresh = [t for t in made if t.untyped_storage()._cdata not in held]
        writes = any(a.alias_info is not None and a.alias_info.is_write for a in func._schema.arguments)
        if func.overloadpacket in _UNWRITTEN or not (fresh or writes):
            return out
        written = sum(map(_bytes, fresh)) if fresh else sum(map(_bytes, made))
        if func.overloadpacket in _LOOKUPS:
            self.moved += min(_bytes(given[0]), written) + sum(map(_bytes, given[1:])) + written
        else:
            self.moved += sum(map(_bytes, given)) + written
        return out


def _tensors(value: Any) -> list[Tensor]:
    return distinct(t for t in tree_leaves(value) if isinstance(t, Tensor) and t.layout == torch.strided)


def _bytes(t: Tensor) -> int:
    """What lies behind a tensor: one that is expanded repeats numbers that are there once."""
    return min(t.numel() * t.element_size(), t.untyped_storage().nbytes())
