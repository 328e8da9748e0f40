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

from secateur.errors import InputError, ProofError
from secateur.measure.run import at_rest
from secateur.runtime.decode import TOKENS, DecodeLinear
from secateur.runtime.fold import fold as folded
from secateur.runtime.layers import Rectified, inner, sparse, why_not
from secateur.runtime.layout import ROWS, Layout
from secateur.runtime.ops import available

DENSE, BITS = "dense", "bits"
FORMS = (DENSE, *(f"{r}x1" for r in ROWS), BITS)  # blocks of rows that share their columns; a bit for every weight
LEAST = 0.3  # share of zeros below which a layer stays dense unseen
GAIN = 0.97  # of the dense time: what a sparse layer takes at most
ROUNDS, SECONDS = 15, 0.3  # of one layer: timings each way, and time for all of them
COARSE = 0.05  # the same in bfloat16
TOLERANCE = 1e-3  # of the largest output: sums in another order
SLOWER = 1.01  # end to end: a model that takes longer than this is not handed back


@dataclass(frozen=True)
class Choice:
    """What became of one layer. Seconds are medians of one call; `form`: "dense", or what the weight is stored as (`FORMS`)."""

    layer: str
    zeros: float
    dense: float
    sparse: float
    form: str
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

    @property
    def chosen(self) -> dict[str, str]:
        """{layer: form} of those that are not dense."""
        return {c.layer: c.form for c in self.choices if c.form != DENSE}

    def to_json(self) -> dict[str, Any]:
        return {"dense_seconds": self.dense, "sparse_seconds": self.sparse, "threads": self.threads, "notes": self.notes,
                "layers": [c.to_json() for c in self.choices]}  # fmt: skip


def convert(
    model: nn.Module, args: tuple, kwargs: Mapping[str, Any] | None = None, *, chosen: Mapping[str, str] | None = None, rounds: int = ROUNDS,
    fold: bool = False,
) -> Converted:  # fmt: skip
    """Sparse layers in place of those that are quicker so, on this machine, with these inputs and torch's number of threads now.

    Args:
        model: with zeros in its weights; it is not changed. args, kwargs: what it is called with, of the batch size that counts.
        chosen: {layer: form}: take these and time nothing, as `chosen` of an earlier result says.
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
        for name, form in chosen.items():
            _put(made, name, formed(made.get_submodule(name), form))
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
    if after > SLOWER * before and any(c.form != DENSE for c in choices):
        notes.append(f"with sparse layers the model took {after * 1e3:.2f} ms, without {before * 1e3:.2f} ms: all layers stay dense")
        made, after = copy.deepcopy(model).eval(), before
        choices = [Choice(c.layer, c.zeros, c.dense, c.sparse, DENSE, "slower as a whole") for c in choices]
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
    return {n: x for n, x in found.items() if x.device.type == "cpu" and _forms(model.get_submodule(n), x)}


def zeros_of(layer: nn.Module) -> float:
    """The share of zeros of its weight."""
    return float((inner(layer).get_parameter("weight") == 0).float().mean())


def _forms(layer: nn.Module, x: Tensor) -> list[str]:
    """The forms that a layer may take for such an input."""
    weight = inner(layer).get_parameter("weight").flatten(1)
    few = type(layer) is nn.Linear and x.numel() <= TOKENS * weight.shape[1]
    bits = [BITS] if few and x.dtype == weight.dtype in (torch.float32, torch.bfloat16) else []
    if not x.dtype == weight.dtype == torch.float32:
        return bits
    stored = {r: r * len(Layout.of(weight, r).index) for r in ROWS}
    return [f"{r}x1" for r, n in stored.items() if n <= max(2 * min(stored.values()), 1)] + bits


def formed(layer: nn.Module, form: str) -> nn.Module:
    """A layer in another form.

    Raises:
        InputError: there is no such form, or not of this layer.
    """
    if form not in FORMS:
        raise InputError(f"form {form!r}: there are {', '.join(FORMS)}.\n  Choose one of them.")
    if form == BITS:
        if type(layer) is not nn.Linear:
            raise InputError(f"{type(layer).__name__} has no form {BITS!r}: only linear layers have.\n  Choose another.")
        return DecodeLinear.of(layer)
    return layer if form == DENSE else sparse(layer, int(form[0]))


def _chosen(name: str, layer: nn.Module, x: Tensor, rounds: int) -> tuple[Choice, nn.Module | None]:
    """The quickest form of a layer on its input."""
    zeros, forms = zeros_of(layer), _forms(layer, x)
    made = [formed(layer, form) for form in forms]
    dense, *times = in_turns([lambda: layer(x), *(_call(f, x) for f in made)], rounds, SECONDS)
    quickest = min(range(len(forms)), key=times.__getitem__)
    if times[quickest] > GAIN * dense:
        return Choice(name, zeros, dense, times[quickest], DENSE, "dense is as quick"), None
    return Choice(name, zeros, dense, times[quickest], forms[quickest]), made[quickest]


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
                tolerance = TOLERANCE if a.dtype == torch.float32 else COARSE
                apart, largest = float((a - b).abs().max()), float(a.abs().max())
                if not apart <= tolerance * largest:  # NaN too
                    raise ProofError(f"with sparse layers the outputs are {apart:.2e} apart, of {largest:.2e}; {tolerance:g} of that is accepted.\n"
                                     "  Nothing was changed. This is a fault of secateur: please report the model.")  # fmt: skip


def _put(model: nn.Module, name: str, layer: nn.Module) -> None:
    path, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(path), leaf, layer)
