"""A model with sparse layers where they are quicker here: every layer is timed both ways, on the inputs it really gets."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from secateur.errors import ProofError
from secateur.measure.run import at_rest
from secateur.runtime.fold import fold as folded
from secateur.runtime.layers import Rectified, SparseLayer, inner, sparse, why_not
from secateur.runtime.layout import ROWS, Layout
from secateur.runtime.ops import available

LEAST = 0.3  # share of zeros below which a layer stays dense unseen
GAIN = 0.97  # of the dense time: what a sparse layer takes at most
ROUNDS, SECONDS = 15, 0.3  # of one layer: timings each way, and time for all of them
TOLERANCE = 1e-3  # of the largest output: sums in another order
SLOWER = 1.01  # end to end: a model that takes longer than this is not handed back


@dataclass(frozen=True)
class Choice:
    """What became of one layer. Seconds are medians of one call; `r`: rows of a block, 0 where it stays dense."""

    layer: str
    zeros: float
    dense: float
    sparse: float
    r: int
    why: str = ""

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


@dataclass
class Converted:
    """`model` with sparse layers; `choices` of all layers looked at; seconds of one call of the whole, before and after."""

    model: nn.Module
    choices: list[Choice]
    dense: float
    sparse: float
    threads: int
    notes: list[str] = field(default_factory=list)

    def to_json(self) -> dict[str, Any]:
        return {"dense_seconds": self.dense, "sparse_seconds": self.sparse, "threads": self.threads, "notes": self.notes,
                "layers": [c.to_json() for c in self.choices]}  # fmt: skip


def convert(
    model: nn.Module, args: tuple, kwargs: Mapping[str, Any] | None = None, *, chosen: Mapping[str, int] | None = None, rounds: int = ROUNDS,
    fold: bool = False,
) -> Converted:  # fmt: skip
    """Sparse layers in place of those that are quicker so, on this machine, with these inputs and torch's number of threads now.

    Args:
        model: with zeros in its weights; it is not changed. args, kwargs: what it is called with, of the batch size that counts.
        chosen: {layer: rows of a block}: take these and time nothing, as an earlier `Converted.chosen` said.
        rounds: timings each way, in turns.
        fold: take batch norms and rectifiers into the layers before them first; what comes back is then the captured graph, for inference and
            for inputs of these shapes.

    The whole model is timed too: what is handed back is not slower than the model given, or is a copy of it; and its outputs are compared.

    Raises:
        InputError: `chosen` names a layer that has no sparse form. CaptureError: with `fold`, torch.export cannot follow the model.
        ProofError: the outputs differ by more than float32 explains.
    """
    kwargs = dict(kwargs or {})
    made = folded(model, args, kwargs) if fold else copy.deepcopy(model).eval()
    if chosen is not None:
        for name, r in chosen.items():
            _put(made, name, sparse(made.get_submodule(name), r))
        _compared(model, made, args, kwargs)
        return Converted(made, [], 0.0, 0.0, torch.get_num_threads())
    notes: list[str] = []
    choices: list[Choice] = []
    if not available():
        return Converted(made, choices, 0.0, 0.0, torch.get_num_threads(), ["no kernels here, so every layer stays dense"])
    with at_rest(model), torch.inference_mode():
        inputs = _inputs(made, args, kwargs)
        for name, x in inputs.items():
            choice, layer = _chosen(name, made.get_submodule(name), x, rounds)
            choices.append(choice)
            if layer is not None:
                _put(made, name, layer)
        _compared(model, made, args, kwargs)
        before, after = in_turns([lambda: model(*args, **kwargs), lambda: made(*args, **kwargs)], rounds)
    if after > SLOWER * before and any(c.r for c in choices):
        notes.append(f"with sparse layers the model took {after * 1e3:.2f} ms, without {before * 1e3:.2f} ms: all layers stay dense")
        made, after = copy.deepcopy(model).eval(), before
        choices = [Choice(c.layer, c.zeros, c.dense, c.sparse, 0, "slower as a whole") for c in choices]
    return Converted(made, choices, before, after, torch.get_num_threads(), notes)


def _inputs(model: nn.Module, args: tuple, kwargs: Mapping[str, Any]) -> dict[str, Tensor]:
    """What each layer with enough zeros takes in, at its first call."""
    found: dict[str, Tensor] = {}
    handles = []
    inside = {id(m.layer) for m in model.modules() if isinstance(m, Rectified)}
    for name, module in model.named_modules():
        if name and id(module) not in inside and not why_not(module) and zeros_of(module) >= LEAST:
            handles.append(module.register_forward_pre_hook(lambda m, a, n=name: found.setdefault(n, a[0].detach()) if a else None))
    try:
        model(*args, **kwargs)
    finally:
        for handle in handles:
            handle.remove()
    return {n: x for n, x in found.items() if x.dtype == torch.float32 and x.device.type == "cpu"}


def zeros_of(layer: nn.Module) -> float:
    """The share of zeros of its weight."""
    return float((inner(layer).get_parameter("weight") == 0).float().mean())


def _chosen(name: str, layer: nn.Module, x: Tensor, rounds: int) -> tuple[Choice, SparseLayer | None]:
    """The quickest form of a layer on its input."""
    weight, zeros = inner(layer).get_parameter("weight").flatten(1), zeros_of(layer)
    fewest = min(n * len(Layout.of(weight, n).index) for n in ROWS)
    forms = [sparse(layer, r) for r in ROWS if r * len(Layout.of(weight, r).index) <= max(2 * fewest, 1)]
    dense, *times = in_turns([lambda: layer(x), *(_call(f, x) for f in forms)], rounds, SECONDS)
    quickest = min(range(len(forms)), key=times.__getitem__)
    if times[quickest] > GAIN * dense:
        return Choice(name, zeros, dense, times[quickest], 0, "dense is as quick"), None
    return Choice(name, zeros, dense, times[quickest], forms[quickest].r), forms[quickest]


def _call(layer: nn.Module, x: Tensor) -> Callable[[], Any]:
    return lambda: layer(x)


def in_turns(calls: list[Callable[[], Any]], rounds: int, seconds: float | None = None) -> list[float]:
    """Median seconds of each call, timed in turns so that all see the same machine; fewer rounds where `seconds` are over."""
    times: list[list[float]] = [[] for _ in calls]
    for call in calls:
        call()
    begin = time.perf_counter()
    for turn in range(rounds):
        for i, call in enumerate(calls):
            at = time.perf_counter()
            call()
            times[i].append(time.perf_counter() - at)
        if seconds is not None and turn >= 2 and time.perf_counter() - begin > seconds:
            break
    return [median(t) for t in times]


def _compared(model: nn.Module, made: nn.Module, args: tuple, kwargs: Mapping[str, Any]) -> None:
    with at_rest(model), torch.inference_mode():
        pairs = zip(tree_leaves(model(*args, **kwargs)), tree_leaves(made(*args, **kwargs)), strict=True)
        for a, b in pairs:
            if isinstance(a, Tensor) and a.is_floating_point() and a.numel():
                apart, largest = float((a - b).abs().max()), float(a.abs().max())
                if not apart <= TOLERANCE * largest:  # NaN too
                    raise ProofError(f"with sparse layers the outputs are {apart:.2e} apart, of {largest:.2e}; {TOLERANCE:g} of that is accepted.\n"
                                     "  Nothing was changed. This is a fault of secateur: please report the model.")  # fmt: skip


def _put(model: nn.Module, name: str, layer: nn.Module) -> None:
    path, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(path), leaf, layer)
