"""BatchNorm statistics of the cut model, estimated anew from data.

After a cut every layer sees other inputs, so the running mean and variance of the dense model are wrong. They are
replaced by the average over batches of what really arrives (Li et al. 2020, "EagleEye", calls it adaptive batch norm).

That alone would also replace what the dense model has learned: its statistics are of training, of other images or of augmented ones, and its
weights rely on them. So where the dense model is at hand it runs the same batches, and every channel is given the statistics (mu, s2) with which
its output has the mean and the variance over the data that it has in the dense model:

    s2 + eps = v (s2' + eps) / v'        mu = m - (m' - mu') sqrt((s2 + eps) / (s2' + eps))

m, v: of what arrives; m', v', mu', s2': the same of the dense model, and its statistics. A model without a cut keeps its own. That is exact for
the first norm, and for all with one batch; those behind are fitted to inputs by what was known of the norms before them, batch by batch. Where less
than eps of the variance is left, even s2 = 0 gives less variance than in the dense model.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from secateur.calibrate.batches import arriving, run
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
    """The model before the cut; `part(name, values)`: of the values of all channels of a buffer those that stayed."""

    model: nn.Module
    part: Callable[[str, Tensor], Tensor]


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
    """What arrives at the batch norms of a model in one batch: sums of every call, by the name of the running mean. `given(name, x)`: mean and
    variance that a call is normalised with; None for the buffers."""

    def __init__(self, model: nn.Module, given: Callable[[str, Tensor], Pair | None] = lambda name, x: None) -> None:
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
        found = self.given(name, args[0])
        if found is None:
            return func(*args, **(kwargs or {}))
        return func(*args[:3], *(t.to(r.dtype) for t, r in zip(found, args[3:5], strict=True)), *args[5:], **(kwargs or {}))


class _Estimate:
    """The statistics of a model, from batches that are run one by one; where the dense one is known it runs beside."""

    def __init__(self, model: nn.Module, dense: Dense | None) -> None:
        self.model, self.dense = model, dense
        self.own, self.theirs = _Seen(model, self._given), _Seen(dense.model) if dense else None
        self.sums, self.wanted = dict[str, _Sums](), dict[str, _Sums]()  # of the batches before, here and in the dense model
        self.names: set[str] | None = None  # of the norms that get statistics, known after the first batch

    def run(self, number: int, args: tuple, kwargs: Mapping, counts: bool = True) -> None:
        """One batch through both; it counts where every norm has a variance."""
        if self.dense and self.theirs is not None and self.names != set():
            self.theirs.calls = {}
            with self.theirs:
                run(self.dense.model, number, *like(self.dense.model, (args, dict(kwargs))))
        if self.names is None:
            self._compared(number, args, kwargs)
        self.own.calls = {}
        with self.own:
            run(self.model, number, args, kwargs)
        counts &= all(call.n > 1 for name in self.names or () for call in self.own.calls.get(name, []))
        for name in self.names or ():
            for sums, found in ((self.sums, self.own.calls.get(name, [])), (self.wanted, self._there(name))):
                for call in found:
                    sums[name] = sums.get(name, call.zero()) + (call if counts else call.zero())

    def _compared(self, number: int, args: tuple, kwargs: Mapping) -> None:
        """Which norms get statistics: all, or those that see as many values as in the dense model. Where a norm is called less often, or takes its
        mean over positions of which some went, nothing says what it should give, and it keeps what it has."""
        with (seen := _Seen(self.model)):
            run(self.model, number, args, kwargs)
        self.names, self.own.running, self.own.eps = set(seen.calls), seen.running, seen.eps
        if self.dense is not None:
            self.names = {name for name, calls in seen.calls.items() if self._alike(name, calls)}

    def _alike(self, name: str, calls: list[_Sums]) -> bool:
        there = self._there(name)
        shapes = {self._part(name, call.mean).shape for call in there} | {call.mean.shape for call in calls}
        return len(shapes) == 1 and [c.n for c in calls] == [c.n for c in there]

    def _there(self, name: str) -> list[_Sums]:
        """Calls of the same norm in the dense model."""
        return self.theirs.calls.get(self.theirs.name(name), []) if self.theirs is not None else []

    def _part(self, name: str, values: Tensor) -> Tensor:
        assert self.dense is not None
        return self.dense.part(name, values.double())

    def _given(self, name: str, x: Tensor) -> Pair | None:
        """By all that was seen before, and this call; without a dense model its own mean and variance."""
        if name not in (self.names or ()):
            return None
        calls = self.own.calls[name]
        if self.theirs is None:
            mean, var = calls[-1].mean_of_batches()
            n = calls[-1].n
            return mean, var * ((n - 1) / n)  # as a batch norm in training
        sums = [sum(some, before.get(name, some[0].zero())) for before, some in
                ((self.sums, calls), (self.wanted, self._there(name)[: len(calls)]))]  # fmt: skip
        return self._like_dense(name, *sums) if all(s.n > 0 for s in sums) else None

    def found(self, name: str) -> Pair:
        """The statistics of a norm by all batches, as its buffers hold them.

        Raises:
            DataError: there are none, or they are not finite.
        """
        sums = self.sums[name]
        if not sums.n > 0:
            raise DataError("every batch of data gives one value to a channel of a batch norm, which has no variance.\n"
                            "  Give batches of two rows or more.")  # fmt: skip
        mean, var = self._like_dense(name, sums, self.wanted[name]) if self.theirs is not None else sums.mean_of_batches()
        running = self.own.running[name]
        found = mean.to(running[0].dtype), var.to(running[1].dtype)
        if not all(bool(torch.isfinite(t).all()) for t in found):
            raise DataError("a batch gives batch-norm statistics that are not finite.\n  Check the data for NaN and infinities.")
        return found

    def _like_dense(self, name: str, sums: _Sums, wanted: _Sums) -> Pair:
        """The statistics with which a norm gives what it gives in the dense model."""
        assert self.theirs is not None
        mean, var = sums.whole()
        there = self.theirs.name(name)
        m, v, mu, s2 = (self._part(name, t).to(mean.device) for t in (*wanted.whole(), *self.theirs.running[there]))
        base, eps = s2 + self.theirs.eps[there], self.own.eps[name]
        moves = v > _STILL * base
        new = torch.where(moves, var * base / v.where(moves, torch.ones_like(v)) - eps, s2).clamp_min(0)
        scale = torch.where(base > 0, (new + eps) / base.where(base > 0, torch.ones_like(base)), torch.ones_like(base))
        return mean - (m - mu) * scale.sqrt(), new

    def share(self, processes: Alone) -> None:
        """Sums over the batches of all processes; each has run the models, so all have seen the same batch norms."""
        if processes.world == 1:
            return
        held = {"own": self.sums, "dense": self.wanted}
        own = {f"{side} {name} {f.name}": getattr(s, f.name) for side, sums in held.items() for name, s in sums.items() for f in fields(s)}
        found = processes.total("batch norms", own)
        for side, sums in held.items():
            for name in sums:
                sums[name] = _Sums(*(found[f"{side} {name} {f.name}"] for f in fields(_Sums)))


def batch_norm_statistics(
    model: nn.Module, batches: Iterable[tuple[tuple, Mapping]], processes: Alone = ALONE, dense: Dense | None = None
) -> int:
    """Re-estimate running means and variances in place, from batches of (args, kwargs); each of several `processes`, which are given the
    same batches, runs a share of them. With `dense`, such that outputs of batch norms have the mean and the variance that they have there; a norm
    that sees fewer values than there (shared with a block that went, or over positions that were cut) keeps its own.

    Returns the number of batches read, 0 when the model has no batch norm with statistics. The statistics change
    only at the end, after every batch ran. A batch that gives one value to a channel, as one row without positions does, has no
    variance and is left out.

    Raises:
        DataError: no batch, one without rows, one that the model cannot run, none with a variance, or one that gives non-finite statistics.
        ProcessError: the processes were not given the same.
    """
    used, ran, seen, estimate = 0, False, Fingerprint(), _Estimate(model, dense)
    with torch.no_grad(), evaluating(model), evaluating(dense.model) if dense else nullcontext():
        for used, (args, kwargs) in enumerate(arriving(batches), 1):
            if processes.world > 1:
                seen.add((args, kwargs))
            if not processes.mine(used - 1):
                continue
            estimate.run(used, args, kwargs)
            ran = True
            if not estimate.names:
                break
        if used and not ran:  # more processes than batches: one is run for the names, and counts for nothing
            estimate.run(used, args, kwargs, counts=False)
    if not used:
        raise DataError("data holds no batch, so no batch-norm statistics can be estimated.\n  Pass at least one batch, or data=None.")
    estimate.share(processes)
    if estimate.names:
        check_data(processes, seen)
    found = {name: estimate.found(name) for name in estimate.sums}
    with torch.no_grad():
        for name, values in found.items():
            for running, value in zip(estimate.own.running[name], values, strict=True):
                running.copy_(value)
    return used if found else 0
