"""BatchNorm statistics of the cut model, estimated anew from data.

After a cut every layer sees other inputs, so the running mean and variance of the dense model are wrong. They are
replaced by the average over batches of what really arrives (Li et al. 2020, "EagleEye", calls it adaptive batch norm).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from secateur.calibrate.batches import arriving, run
from secateur.errors import DataError
from secateur.processes import ALONE, Alone, Fingerprint, check_data
from secateur.trace.capture import evaluating

_OPS = ("aten::native_batch_norm", "aten::_native_batch_norm_legit_no_training", "aten::cudnn_batch_norm")


class _Collect(TorchDispatchMode):
    """Normalises with the statistics of the batch and adds them up, per running-mean buffer of the model."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.own = {id(t) for t in (*model.buffers(), *model.parameters())}  # an InstanceNorm hands over copies of its own
        self.sums: dict[int, list] = {}  # id of the running mean -> [mean buffer, var buffer, sum of means, of variances, n]
        self.single = False  # whether a batch has one value in a channel, which has no variance

    def seen(self) -> dict[int, list]:
        return {k: row[2:] for k, row in self.sums.items()}

    def back(self, seen: dict[int, list]) -> None:
        """Forget the values that were seen since."""
        self.single = False
        for k, row in self.sums.items():
            row[2:] = seen.get(k, [row[2] * 0, row[3] * 0, 0])

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func._schema.name not in _OPS or id(args[3]) not in self.own:
            return func(*args, **(kwargs or {}))
        x, running_mean, running_var = args[0], args[3], args[4]
        over = [d for d in range(x.dim()) if d != 1]
        var, mean = torch.var_mean(x.float() if x.dtype in (torch.float16, torch.bfloat16) else x, over, correction=0)
        n = x.numel() // x.shape[1]
        self.single |= n == 1
        row = self.sums.setdefault(id(running_mean), [running_mean, running_var, 0.0, 0.0, 0])
        row[2] = row[2] + mean.double() * n
        row[3] = row[3] + var.double() * (n * n / max(1, n - 1))
        row[4] += n  # a last batch of few rows counts for few
        replaced = (*args[:3], mean.to(running_mean.dtype), var.to(running_var.dtype), *args[5:])
        return func(*replaced, **(kwargs or {}))


    def share(self, processes: Alone) -> None:
        """Sums over the batches of all processes; each has run the model, so all have seen its batch norms in the same order."""
        if processes.world == 1:
            return
        own = {f"{k} {i}": torch.as_tensor(row[i]) for k, row in enumerate(self.sums.values()) for i in (2, 3, 4)}
        found = processes.total("batch norms", own)
        for k, row in enumerate(self.sums.values()):
            row[2:] = (found[f"{k} {i}"] for i in (2, 3, 4))


def batch_norm_statistics(model: nn.Module, batches: Iterable[tuple[tuple, Mapping]], processes: Alone = ALONE) -> int:
    """Re-estimate running means and variances in place, from batches of (args, kwargs); each of several `processes`, which are given the
    same batches, runs a share of them.

    Returns the number of batches read, 0 when the model has no batch norm with statistics. The statistics change
    only at the end, after every batch ran. A batch that gives one value to a channel, as one row without positions does, has no
    variance and is left out.

    Raises:
        DataError: no batch, one without rows, one that the model cannot run, none with a variance, or one that gives non-finite statistics.
        ProcessError: the processes were not given the same.
    """
    used = 0
    collect = _Collect(model)
    with torch.no_grad(), evaluating(model), collect:
        ran, seen = False, Fingerprint()
        for used, (args, kwargs) in enumerate(arriving(batches), 1):
            if processes.world > 1:
                seen.add((args, kwargs))
            if not processes.mine(used - 1):
                continue
            before = collect.seen()
            run(model, used, args, kwargs)
            if collect.single:
                collect.back(before)
            ran = True
            if not collect.sums:
                break
        if used and not ran:  # more processes than batches: one is run for the names, and counts for nothing
            run(model, used, args, kwargs)
            collect.back({})
    if not used:
        raise DataError("data holds no batch, so no batch-norm statistics can be estimated.\n  Pass at least one batch, or data=None.")
    collect.share(processes)
    if collect.sums:
        check_data(processes, seen)
    for mean, var, sum_mean, sum_var, n in collect.sums.values():
        if not n:
            raise DataError("every batch of data gives one value to a channel of a batch norm, which has no variance.\n"
                            "  Give batches of two rows or more.")  # fmt: skip
        if not bool(torch.isfinite(sum_mean).all() and torch.isfinite(sum_var).all()):
            raise DataError("a batch gives batch-norm statistics that are not finite.\n  Check the data for NaN and infinities.")
        mean.copy_((sum_mean / n).to(mean.dtype))
        var.copy_((sum_var / n).to(var.dtype))
    return used if collect.sums else 0
