"""A model with sparse layers where they are quicker here: every layer is timed both ways, on the inputs it really gets."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils._pytree import tree_leaves, tree_map_only

from secateur.errors import InputError, ProofError, first_line
from secateur.measure.run import at_rest
from secateur.runtime.chain import chained, pooled
from secateur.runtime.fold import fold as folded
from secateur.runtime.forms import DENSE, formed, forms_for, in_turns, zeros_of
from secateur.runtime.layers import Fused, why_not
from secateur.runtime.ops import available
from secateur.runtime.semi import is_two_of_four

LEAST = 0.3  # share of zeros below which a layer stays dense unseen
GAIN = 0.97  # of the dense time: what a sparse layer takes at most
ROUNDS, SECONDS = 15, 0.3  # of one layer: timings each way, and time for all of them
TOLERANCE = 1e-3  # of the largest output: sums in another order
COARSE = 0.05  # the same in bfloat16
SLOWER = 1.01  # end to end: a model that takes longer than this is not handed back
WHOLE = (nn.TransformerEncoderLayer, nn.MultiheadAttention)  # torch may compute these as one, from the weights of their layers


@dataclass(frozen=True)
class Choice:
    """What became of one layer. Seconds are medians of one call; `form`: "dense", or what the weight is stored as (`secateur.runtime.forms`)."""

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
        fold: take batch norms, sums and rectifiers into the layers before them first, and call sparse convolutions that follow one another at
            once; what comes back is then the captured graph, for inference and for inputs of these shapes.

    The whole model is timed too: what is handed back is not slower than the model given, or is a copy of it; and its outputs are compared. A layer of
    which the model reads what a sparse one has not stays dense.

    Raises:
        InputError: `chosen` names a layer that has no sparse form. CaptureError: with `fold`, torch.export cannot follow the model.
        ProofError: the outputs differ by more than float32 explains, or the model cannot run with the layers of `chosen`.
    """
    kwargs = dict(kwargs or {})
    with torch.inference_mode(False), torch.no_grad():
        made = folded(model, _own(args), _own(kwargs)) if fold else copy.deepcopy(model).eval()
    if chosen is not None:
        for name, form in chosen.items():
            _put(made, name, formed(_named(made, name), form))
        made = pooled(chained(made)) if isinstance(made, fx.GraphModule) and fold else made
        _compared(model, made, args, kwargs)
        return Converted(made, [], 0.0, 0.0, torch.get_num_threads())
    if not available():
        plain = copy.deepcopy(model).eval()
        return Converted(plain, [], 0.0, 0.0, torch.get_num_threads(), ["no kernels here, so every layer stays dense"])
    notes, choices, taken = list[str](), list[Choice](), dict[str, nn.Module]()
    with _at_rest(model, made):
        for name, given in _inputs(made, args, kwargs).items():
            choice, layer = _chosen(name, made.get_submodule(name), given, rounds)
            choices.append(choice)
            if layer is not None:
                taken[name] = _put(made, name, layer)
        refused = _put_back(made, taken, args, kwargs)
        choices = [replace(c, form=DENSE, why=refused[c.layer]) if c.layer in refused else c for c in choices]
        made = pooled(chained(made)) if isinstance(made, fx.GraphModule) and fold else made
    paired = sum(zeros_of(m) > 0 and is_two_of_four(m.weight) for m in made.modules() if type(m) is nn.Linear)
    if paired and not torch.cuda.is_available():
        notes.append(f"{paired} linear layers left dense are 2:4, which GPUs compute quicker; there is none here")
    if not choices and isinstance(model, fx.GraphModule) and not fold:
        notes.append("this model is a graph of operators, not of layers: fold=True finds its layers")
    _compared(model, made, args, kwargs)
    own, named = _own(args), _own(kwargs)
    with _at_rest(model, made):
        before, after = in_turns([lambda: model(*own, **named), lambda: made(*own, **named)], rounds)
    if after > SLOWER * before and (fold or any(c.form != DENSE for c in choices)):
        notes.append(f"with sparse layers the model took {after * 1e3:.2f} ms, without {before * 1e3:.2f} ms: all layers stay dense")
        made, after = copy.deepcopy(model).eval(), before
        choices = [replace(c, form=DENSE, why="slower as a whole") for c in choices]
    return Converted(made, choices, before, after, torch.get_num_threads(), notes)


@contextmanager
def _at_rest(*models: nn.Module) -> Iterator[None]:
    """All of them, with the same random numbers, and as torch itself would compute them."""
    fast = torch.backends.mha.get_fastpath_enabled()
    with at_rest(models[0]), at_rest(models[-1]), torch.random.fork_rng(devices=[]):
        torch.backends.mha.set_fastpath_enabled(fast)
        yield


def _inputs(model: nn.Module, args: tuple, kwargs: Mapping[str, Any]) -> dict[str, tuple[Tensor, ...]]:
    """What each layer with enough zeros takes in, at its first call."""
    found: dict[str, tuple[Tensor, ...]] = {}
    handles = []
    inside = {id(m.layer) for m in model.modules() if isinstance(m, Fused)}
    inside |= {id(m) for one in model.modules() if isinstance(one, WHOLE) for m in one.modules()}

    def see(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, given: tuple, named: dict[str, Any]) -> None:
            taken = (*given, *named.values())
            if taken and all(isinstance(x, Tensor) for x in taken):
                found.setdefault(name, tuple(x.detach().clone() for x in taken))

        return hook

    taken = [(n, m) for n, m in model.named_modules() if n and id(m) not in inside and not why_not(m) and zeros_of(m) >= LEAST]
    for name, module in taken:
        handles.append(module.register_forward_pre_hook(see(name), with_kwargs=True))
    try:
        model(*_own(args), **_own(kwargs))
    finally:
        for handle in handles:
            handle.remove()
    return {n: given for n, given in found.items() if forms_for(model.get_submodule(n), given[0])}


def _own(given: Any) -> Any:
    """Inputs of its own for a model that may write into them."""
    return tree_map_only(Tensor, lambda t: t.detach().clone(), given)


def _chosen(name: str, layer: nn.Module, given: tuple[Tensor, ...], rounds: int) -> tuple[Choice, nn.Module | None]:
    """The quickest form of a layer on its input."""
    zeros, forms = zeros_of(layer), forms_for(layer, given[0])
    made = [formed(layer, form, given[0]) for form in forms]
    dense, *times = in_turns([_call(f, given) for f in (layer, *made)], rounds, SECONDS)
    quickest = min(range(len(forms)), key=times.__getitem__)
    if times[quickest] > GAIN * dense:
        return Choice(name, zeros, dense, times[quickest], DENSE, "dense is as quick"), None
    return Choice(name, zeros, dense, times[quickest], forms[quickest]), made[quickest]


def _call(layer: nn.Module, given: tuple[Tensor, ...]) -> Callable[[], Any]:
    return lambda: layer(*given)


def _compared(model: nn.Module, made: nn.Module, args: tuple, kwargs: Mapping[str, Any]) -> None:
    wanted = _answers(model, args, kwargs)
    try:
        found = _answers(made, args, kwargs)
    except Exception as error:  # a user's forward may raise anything
        raise ProofError(f"with sparse layers the model raises {type(error).__name__}: {first_line(error)}.\n"
                         "  Nothing was changed. Leave the layer that it asks for something out of `chosen`.") from error  # fmt: skip
    for a, b in zip(wanted, found, strict=True):
        if isinstance(a, Tensor) and a.is_floating_point() and a.numel():
            tolerance = TOLERANCE if a.dtype == torch.float32 else COARSE
            same = (a == b) | (a.isnan() & b.isnan())  # infinities too
            apart, largest = float(torch.where(same, 0.0, a - b).abs().max()), float(torch.where(a.isfinite(), a, 0.0).abs().max())
            if not apart <= tolerance * largest:  # NaN too
                raise ProofError(f"with sparse layers the outputs are {apart:.2e} apart, of {largest:.2e}; {tolerance:g} of that is accepted.\n"
                                 "  Nothing was changed. A model that answers otherwise each time cannot be compared; or report it.")  # fmt: skip


def _answers(model: nn.Module, args: tuple, kwargs: Mapping[str, Any]) -> list[Any]:
    with _at_rest(model):
        torch.manual_seed(0)
        return tree_leaves(model(*_own(args), **_own(kwargs)))


def _put_back(made: nn.Module, taken: Mapping[str, nn.Module], args: tuple, kwargs: Mapping[str, Any]) -> dict[str, str]:
    """{layer: what the model raises with its sparse form}; it is dense again then. `taken`: the dense layers that stood in those places."""
    if not taken or not _raised(made, args, kwargs):
        return {}
    sparse, found = {name: _put(made, name, layer) for name, layer in taken.items()}, dict[str, str]()
    for name, layer in sparse.items():
        _put(made, name, layer)
        if said := _raised(made, args, kwargs):
            _put(made, name, taken[name])
            found[name] = f"with it the model raises {said}"
    return found


def _raised(model: nn.Module, args: tuple, kwargs: Mapping[str, Any]) -> str:
    try:
        model(*_own(args), **_own(kwargs))
    except Exception as error:  # a user's forward may raise anything
        return f"{type(error).__name__}: {first_line(error)}"
    return ""


def _named(model: nn.Module, name: str) -> nn.Module:
    try:
        return model.get_submodule(name)
    except AttributeError:
        raise InputError(f"chosen names {name!r}, and the model has no such layer.\n  Take the names of an earlier result's `chosen`.") from None


def _put(model: nn.Module, name: str, layer: nn.Module) -> nn.Module:
    """In every place where the layer stands that has this name, which comes back."""
    old = model.get_submodule(name)
    for path in [n for n, m in model.named_modules(remove_duplicate=False) if m is old]:
        parent, _, leaf = path.rpartition(".")
        setattr(model.get_submodule(parent), leaf, layer)
    return old
