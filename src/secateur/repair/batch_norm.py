"""BatchNorm statistics of the cut model, estimated anew from data.

After a cut every layer sees other inputs, so the running mean and variance of the dense model are wrong. They are
replaced by the average over batches of what really arrives (Li et al. 2020, "EagleEye", calls it adaptive batch norm).

That alone would also replace what the dense model has learned: its statistics are of training, of other images or of augmented ones, and its
weights rely on them. So where the dense model is at hand it runs the same batches, and every channel is given the statistics (mu, s2) with which
its output has the mean and the variance over the data that it has in the dense model:

    s2 + eps = v (s2' + eps) / v'        mu = m - (m' - mu') sqrt((s2 + eps) / (s2' + eps))

m, v: of what arrives; m', v', mu', s2': the same of the dense model, and its statistics. A model without a cut keeps its own. That is exact for
the first norm, and for all with one batch; those behind see inputs by what a first pass gave to the norms before them. Where less than eps of the
variance is left, even s2 = 0 gives less variance than in the dense model.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field, fields
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from secateur.calibrate.batches import arriving, many_times, run
from secateur.errors import DataError
from secateur.measure.run import like
from secateur.processes import ALONE, Alone, Fingerprint, check_data
from secateur.surgery.cut import state_of
from secateur.trace.capture import evaluating

_OPS = ("aten::native_batch_norm", "aten::_native_batch_norm_legit_no_training", "aten::cudnn_batch_norm")
Pair = tuple[Tensor, Tensor]  # mean, variance
_STILL = 1e-3  # a variance below this share of the running one is that of a channel that hardly moves: its ratio would be chance


@dataclass(frozen=True)
class Dense:
    """The model before the cut; `part(name, values)`: of the values of all channels of a buffer those that stayed. `kept`: afterwards the norms
    that kept their statistics, since nothing says what they should give."""

    model: nn.Module
    part: Callable[[str, Tensor], Tensor]
    kept: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class _Sums:
    """What arrived at a batch norm, added up over batches and calls: means, variances and squares of means, weighted by their number of values."""

    mean: Tensor
    var: Tensor
    square: Tensor
    n: Tensor  # a last batch of few rows counts for few

    @classmethod
    def of(cls, x: Tensor) -> _Sums:
        wide = x.float() if x.dtype in (torch.float16, torch.bfloat16) else x
        var, mean = torch.var_mean(wide, [d for d in range(x.dim()) if d != 1], correction=0)
        n = x.numel() // x.shape[1]
        var, mean = var.double() * (n / max(1, n - 1)), mean.double()
        return cls(mean * n, var * n, mean * mean * n, torch.tensor(float(n), dtype=torch.float64))

    def __add__(self, other: _Sums) -> _Sums:
        return _Sums(*(getattr(self, f.name) + getattr(other, f.name) for f in fields(self)))

    def zero(self) -> _Sums:
        return _Sums(*(torch.zeros_like(getattr(self, f.name)) for f in fields(self)))

    def mean_of_batches(self) -> Pair:
        return self.mean / self.n, self.var / self.n

    def whole(self) -> Pair:
        """Of all values together."""
        mean = self.mean / self.n
        return mean, (self.var + self.square) / self.n - mean * mean


class _Seen(TorchDispatchMode):
    """What arrives at the batch norms of a model in one batch: sums of every call, by the name of the running mean. `given(name)`: mean and
    variance that the call just added is normalised with; None for the buffers."""

    def __init__(self, model: nn.Module, given: Callable[[str], Pair | None] = lambda name: None) -> None:
        super().__init__()
        self.state = state_of(model)
        # an InstanceNorm hands over copies of its own; a buffer with two names goes by the first
        self.names = {id(t): n for n, t in reversed(self.state.items())}
        self.given = given
        self.running, self.eps = dict[str, Pair](), dict[str, float]()
        self.calls = dict[str, list[_Sums]]()

    def name(self, name: str) -> str:
        """The first name of a buffer, by any of them."""
        return self.names.get(id(self.state.get(name)), "")

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func._schema.name not in _OPS or id(args[3]) not in self.names:
            return func(*args, **(kwargs or {}))
        name = self.names[id(args[3])]
        self.running[name], self.eps[name] = (args[3], args[4]), args[-1]
        self.calls.setdefault(name, []).append(_Sums.of(args[0]))
        found = self.given(name)
        if found is None:
            return func(*args, **(kwargs or {}))
        return func(*args[:3], *(t.to(r.dtype) for t, r in zip(found, args[3:5], strict=True)), *args[5:], **(kwargs or {}))


class _Estimate:
    """The statistics of a model, from batches that are run one by one."""

    def __init__(self, model: nn.Module) -> None:
        self.model, self.own = model, _Seen(model, self._given)
        self.sums = dict[str, _Sums]()

    def run(self, number: int, args: tuple, kwargs: Mapping, counts: bool = True) -> None:
        """One batch, which counts where every norm has a variance."""
        self.own.calls = {}
        with self.own:
            run(self.model, number, args, kwargs)
        counts &= all(call.n > 1 for calls in self.own.calls.values() for call in calls)
        for name, calls in self.own.calls.items():
            self._added(name, calls, counts)

    def _added(self, name: str, calls: list[_Sums], counts: bool) -> None:
        _add(self.sums, name, calls, counts)

    def _given(self, name: str) -> Pair | None:
        """Its own mean and variance, as in training."""
        call = self.own.calls[name][-1]
        mean, var = call.mean_of_batches()
        return mean, var * ((call.n - 1) / call.n)

    def _statistics(self, name: str) -> Pair:
        return self.sums[name].mean_of_batches()

    def found(self) -> dict[str, Pair]:
        """The statistics by all batches, as the buffers hold them.

        Raises:
            DataError: there are none for a norm, or they are not finite.
        """
        found = {}
        for name in self.sums:
            if not self.sums[name].n > 0:
                raise DataError("every batch of data gives one value to a channel of a batch norm, which has no variance.\n"
                                "  Give batches of two rows or more.")  # fmt: skip
            if name not in self.own.running:
                raise DataError(f"batch norm {name.removesuffix('.running_mean')!r} is run by some batches only, which another process was given.\n"
                                "  Give batches that all run the same layers, or use one process.")  # fmt: skip
            mean, var = self._statistics(name)
            running = self.own.running[name]
            found[name] = mean.to(running[0].dtype), var.to(running[1].dtype)
            if not all(bool(torch.isfinite(t).all()) for t in found[name]):
                raise DataError("a batch gives batch-norm statistics that are not finite.\n  Check the data for NaN and infinities.")
        return found

    def share(self, processes: Alone) -> None:
        """Sums over the batches of all processes; each has run the model, so all have seen the same batch norms."""
        self.sums = _shared("batch norms", self.sums, processes)


class _ByDense(_Estimate):
    """The same with the dense model beside, in two passes over the batches. In the first one a norm is given what makes it alike on that batch, in
    the second one what the first found by all: whatever the order of the batches, and whichever process has them."""

    def __init__(self, model: nn.Module, dense: Dense) -> None:
        super().__init__(model)
        self.dense, self.theirs = dense, _Seen(dense.model)
        self.wanted, self.odd = dict[str, _Sums](), dict[str, _Sums]()  # of the dense model; of norms that see other values than there
        self.first: dict[str, Pair] | None = None  # what the first pass found
        held = [(t, self.theirs.state[n]) for n, t in self.own.state.items() if n in self.theirs.state]
        self.alike = all(a.dtype == b.dtype and a.device == b.device for a, b in held)

    def run(self, number: int, args: tuple, kwargs: Mapping, counts: bool = True) -> None:
        self.theirs.calls = {}
        with self.theirs:
            run(self.dense.model, number, *((args, kwargs) if self.alike else like(self.dense.model, (args, dict(kwargs)))))
        super().run(number, args, kwargs, counts)

    def again(self) -> None:
        """The second pass begins."""
        self.first = self.found()
        self.sums, self.wanted, self.odd = {}, {}, {}

    def _there(self, name: str) -> list[_Sums]:
        """Calls of the same norm in the dense model."""
        return self.theirs.calls.get(self.theirs.name(name), [])

    def _added(self, name: str, calls: list[_Sums], counts: bool) -> None:
        there = self._there(name)
        same = len(calls) == len(there) and all(self._comparable(name, a, b) for a, b in zip(calls, there, strict=True))
        _add(self.sums if same else self.odd, name, calls, counts)
        if same:
            _add(self.wanted, name, there, counts)

    def _comparable(self, name: str, own: _Sums, other: _Sums) -> bool:
        """Not where a norm takes its mean over positions of which some went."""
        return bool(own.n == other.n) and own.mean.shape == self._part(name, other.mean).shape

    def _part(self, name: str, values: Tensor) -> Tensor:
        return self.dense.part(name, values.double())

    def _given(self, name: str) -> Pair | None:
        if self.first is not None:
            return self.first.get(name)
        calls, there = self.own.calls[name], self._there(name)
        if len(calls) > len(there) or not self._comparable(name, calls[-1], there[len(calls) - 1]):
            return None
        return self._alike(name, calls[-1], there[len(calls) - 1])

    def _statistics(self, name: str) -> Pair:
        return self._alike(name, self.sums[name], self.wanted[name])

    def found(self) -> dict[str, Pair]:
        self.dense.kept[:] = self.odd
        self.sums = {name: sums for name, sums in self.sums.items() if name not in self.odd}
        return super().found()

    def _alike(self, name: str, sums: _Sums, wanted: _Sums) -> Pair:
        """The statistics with which a norm gives what it gives in the dense model."""
        mean, var = sums.whole()
        there = self.theirs.name(name)
        m, v, mu, s2 = (self._part(name, t).to(mean.device) for t in (*wanted.whole(), *self.theirs.running[there]))
        base, eps = s2 + self.theirs.eps[there], self.own.eps[name]
        moves = (v > _STILL * base) & (var > _STILL * v)
        new = torch.where(moves, var * base / v.where(moves, torch.ones_like(v)) - eps, s2).clamp_min(0)
        scale = torch.where(base > 0, (new + eps) / base.where(base > 0, torch.ones_like(base)), torch.ones_like(base))
        return mean - (m - mu) * scale.sqrt(), new

    def share(self, processes: Alone) -> None:
        super().share(processes)
        self.wanted = _shared("batch norms of the dense model", self.wanted, processes)
        self.odd = _shared("batch norms that differ from the dense model", self.odd, processes)


def _add(sums: dict[str, _Sums], name: str, calls: Iterable[_Sums], counts: bool) -> None:
    for call in calls:
        sums[name] = sums.get(name, call.zero()) + (call if counts else call.zero())


def _shared(what: str, sums: Mapping[str, _Sums], processes: Alone) -> dict[str, _Sums]:
    if processes.world == 1:
        return dict(sums)
    parts = [f.name for f in fields(_Sums)]
    found = processes.total(what, {f"{name} {part}": getattr(s, part) for name, s in sums.items() for part in parts})
    return {name: _Sums(*(found[f"{name} {part}"] for part in parts)) for name in dict.fromkeys(key.rpartition(" ")[0] for key in found)}


def batch_norm_statistics(
    model: nn.Module, batches: Iterable[tuple[tuple, Mapping]], processes: Alone = ALONE, dense: Dense | None = None
) -> int:
    """Re-estimate running means and variances in place, from batches of (args, kwargs); each of several `processes`, which are given the
    same batches, runs a share of them. With `dense`, such that outputs of batch norms have the mean and the variance that they have there: the
    batches are gone through twice, and a norm that sees other values than there (shared with a block that went, or over positions that were cut)
    keeps its own.

    Returns the number of batches read, 0 when no batch norm got statistics. The statistics change
    only at the end, after every batch ran. A batch that gives one value to a channel, as one row without positions does, has no
    variance and is left out.

    Raises:
        DataError: no batch, one without rows, one that the model cannot run, none with a variance, or one that gives non-finite statistics.
        ProcessError: the processes were not given the same.
    """
    estimate = _Estimate(model) if dense is None else _ByDense(model, dense)
    batches = batches if dense is None else many_times(batches)
    with torch.no_grad(), evaluating(model), evaluating(dense.model) if dense else nullcontext():
        used = _gone_through(estimate, batches, processes)
        if isinstance(estimate, _ByDense):
            estimate.again()
            used = _gone_through(estimate, batches, processes)
    found = estimate.found()
    with torch.no_grad():
        for name, values in found.items():
            for running, value in zip(estimate.own.running[name], values, strict=True):
                running.copy_(value)
    return used if found else 0


def _gone_through(estimate: _Estimate, batches: Iterable[tuple[tuple, Mapping]], processes: Alone) -> int:
    """All batches once; returns their number."""
    used, ran, seen = 0, False, Fingerprint()
    for used, (args, kwargs) in enumerate(arriving(batches), 1):
        if processes.world > 1:
            seen.add((args, kwargs))
        if not processes.mine(used - 1):
            continue
        estimate.run(used, args, kwargs)
        ran = True
        if not estimate.own.running:
            break
    if not used:
        raise DataError("data holds no batch, so no batch-norm statistics can be estimated.\n  Pass at least one batch, or data=None.")
    if not ran:  # more processes than batches: one is run for the names, and counts for nothing
        estimate.run(used, args, kwargs, counts=False)
    estimate.share(processes)
    if estimate.own.running:
        check_data(processes, seen)
    return used
