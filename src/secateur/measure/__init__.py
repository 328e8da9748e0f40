"""What a model costs: counted where it can be counted, timed where it must be timed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from secateur.measure.count import count, count_bytes, count_params
from secateur.measure.energy import Energy, energy
from secateur.measure.latency import Comparison, Latency, compare, latency
from secateur.measure.memory import peak_bytes
from secateur.measure.run import at_rest, batch_of, inputs_on
from secateur.measure.runtimes import RUNTIMES, check, prepared
from secateur.plan import Cost

__all__ = [
    "RUNTIMES", "Comparison", "Energy", "Latency", "Measurement", "at_rest", "compare", "count", "count_bytes", "count_params", "energy",
    "latency", "measure", "peak_bytes", "prepared",
]  # fmt: skip


@dataclass(frozen=True)
class Measurement:
    """What ``measure`` found. MACs and peak bytes belong to ``batch`` rows; ``seconds`` is None on the meta device."""

    cost: Cost
    peak_bytes: int
    seconds: Latency | None
    batch: int
    device: str
    dtype: str
    runtime: str = "torch"
    energy: Energy | None = None

    def to_json(self) -> dict[str, Any]:
        """One flat dictionary of numbers and strings, ready for ``json.dumps``."""
        timed = self.seconds
        return {
            "macs": self.cost.macs,
            "params": self.cost.params,
            "bytes": self.cost.bytes,
            "peak_bytes": self.peak_bytes,
            "latency_median_s": timed.median if timed else None,
            "latency_spread_s": timed.spread if timed else None,
            "rounds": timed.rounds if timed else 0,
            "threads": timed.threads if timed else 0,
            "batch": self.batch,
            "device": self.device,
            "dtype": self.dtype,
            "runtime": self.runtime,
            **({f"energy_{name}": value for name, value in self.energy.to_json().items()} if self.energy else {}),
        }


def measure(
    model: nn.Module,
    args: tuple,
    kwargs: Mapping[str, Any] | None = None,
    *,
    threads: int = 1,
    rounds: int = 20,
    runtime: str = "torch",
    dtype: str | None = None,
) -> Measurement:
    """MACs, parameters, bytes, peak memory, latency and energy of one forward in evaluation mode.

    ``args`` is a tuple of positional inputs, as for ``torch.export``. The model is left as it was. ``runtime`` is what
    the seconds belong to: "torch", "torch.compile", "onnxruntime" or "openvino" (the last two from an ONNX export whose
    outputs are compared with torch's); ``dtype`` what they are taken in: "float32", "bfloat16" (torch only), None the
    model's own. Energy is measured on the same runtime where the machine has a counter, else estimated (`measure.energy`).
    Everything else is torch's.

    Raises:
        InputError: the model cannot run on these inputs; an unknown runtime or dtype.
        ModelError: the runtime is not installed, or cannot run this model.
    """
    check(runtime, threads, dtype)
    args, kwargs = inputs_on(model, args, kwargs)
    cost = count(model, args, kwargs)
    peak = peak_bytes(model, args, kwargs)
    first = next(model.parameters(), None)
    on_meta = first is not None and first.device.type == "meta"
    return Measurement(
        cost=cost,
        peak_bytes=peak,
        seconds=None if on_meta else latency(model, args, kwargs, rounds=rounds, threads=threads, runtime=runtime, dtype=dtype),
        batch=batch_of(args, kwargs),
        device=str(first.device) if first is not None else "cpu",
        dtype=dtype or (str(first.dtype).removeprefix("torch.") if first is not None else "none"),
        runtime=runtime,
        energy=energy(model, args, kwargs, threads=threads, runtime=runtime, dtype=dtype),
    )
