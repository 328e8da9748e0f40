"""One of several processes that meet trouble: `python troubles.py RANK WORLD MEETING`. Prints one JSON object: by name of the trouble what
came of it here."""

import json
import os
import sys
from datetime import timedelta

import torch
from torch import distributed, nn

import secateur as sc
import secateur.masks.search
from secateur.calibrate import Calibration
from secateur.errors import SecateurError
from secateur.processes import Shared, digest
from secateur.surgery.cut import state_of


class Net(nn.Module):
    """With a batch norm, and a second input that no row can be cut out of."""

    def __init__(self):
        super().__init__()
        self.a, self.n, self.b, self.c = nn.Conv2d(1, 8, 3, padding=1), nn.BatchNorm2d(8), nn.Conv2d(8, 12, 3, padding=1), nn.Linear(12, 4)

    def forward(self, x, by=None):
        x = self.n(self.a(x)).relu()
        x = self.c(self.b(x).relu().mean((2, 3)))
        return x if by is None else x * by


class Without(torch.autograd.Function):
    """An op that has no derivative."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()


class Breaks:
    """Batches that cannot be read to the end."""

    def __init__(self, batches):
        self.batches = batches

    def __iter__(self):
        yield from self.batches[:2]
        raise OSError("the disk is gone")


def rows(*sizes):
    g = torch.Generator().manual_seed(1)
    return [(torch.randn(n, 1, 6, 6, generator=g), torch.randint(0, 4, (n,), generator=g)) for n in sizes]


def net():
    torch.manual_seed(0)
    return Net().eval()


X = (torch.randn(2, 1, 6, 6, generator=torch.Generator().manual_seed(2)),)


def activations(data):
    model = net()
    return Calibration(model, sc.trace(model, X), data, args=X).activations


def a_loader_fails(rank, world):
    activations(Shared(Breaks(rows(4, 4, 4, 4)) if rank == 1 else rows(4, 4, 4, 4)))


def a_repair_meets_it(rank, world):
    """Here an error is caught and made up for by another repair, which must not be done in one process alone."""
    data = rows(64, 64, 64, 64)
    sc.prune(net(), X, sc.MACs("60%"), data=Shared(Breaks(data) if rank == 1 else data), score="l2")


def another_order(rank, world):
    data = rows(4, 4, 4, 4)
    activations(Shared(data[::-1] if rank == world - 1 else data))


def fewer_batches(rank, world):
    data = rows(64, 64, 64, 64)
    sc.prune(net(), X, sc.MACs("60%"), data=Shared(data[:3] if rank == 1 else data))


def other_weights(rank, world):
    """A model that is not the same: its statistics add up, and its plan may be the same too."""
    model = net()
    with torch.no_grad():
        model.c.bias.add_(rank)
    sc.prune(model, X, sc.MACs("60%"), data=Shared(rows(64, 64, 64, 64)), repair="none")


def another_way(rank, world):
    data = Shared(rows(4, 4, 4, 4))
    with data.processes.watched():
        data.processes.total("apples" if rank else "pears", {"sum": torch.ones(1)})


def a_callback_fails(rank, world):
    def each(result):
        if rank == 0:
            raise OSError("no space left")

    sc.sweep(net(), X, [sc.MACs("60%"), sc.MACs("50%")], data=Shared(rows(16, 16)), each=each, score="l2")


def read_once(rank, world):
    Shared(iter(rows(4)))


# ---------------------------------------------------------------- what is no trouble in the end
def alike(one, other):
    """As far as one process tells: the same masks, nearly the same weights."""
    masks = [r.plan.weights or r.plan.keep for r in (one, other)]
    assert all(torch.equal(m, masks[1][n]) for n, m in masks[0].items())
    for name, t in state_of(one.model).items():  # of so few rows a fit is badly conditioned
        assert float((state_of(other.model)[name] - t).detach().float().norm()) <= 1e-2 * float(t.detach().float().norm()), name
    return other


def more_processes_than_batches(rank, world):
    data, target = rows(1, 3), sc.MACs("60%")
    found = [alike(sc.prune(net(), X, target, data=data, **how), sc.prune(net(), X, target, data=Shared(data), **how))
             for how in ({}, {"score": "taylor", "repair": "batch_norm"}, {"depth": True})]  # fmt: skip
    secateur.masks.search.GENERATIONS = 2
    how = sc.Sparse(keep="40%", budget="search")
    found.append(alike(sc.sparsify(net(), X, how, data), sc.sparsify(net(), X, how, Shared(data))))
    assert not torch.equal(state_of(found[1].model)["n.running_mean"], torch.zeros_like(state_of(found[1].model)["n.running_mean"]))
    return [digest(state_of(r.model)) for r in found]


def one_chunk_without_a_derivative(rank, world):
    """What only the processes that have a chunk notice: all go on without the fit that needs derivatives."""
    data = Shared(rows(4))
    try:
        data.processes.together("a gradient", lambda: torch.ones(1).backward() if rank == 1 else None)
    except RuntimeError as error:
        return f"RuntimeError: {str(error).splitlines()[0]}"


def all_refuse_alike(rank, world):
    """A repair that no process can do: all re-estimate the batch norms instead."""
    data, by = rows(16, 16, 16, 16), torch.ones(3, 1)[:1]
    model, x = net(), (X[0], by)
    one, other = (sc.prune(model, x, sc.MACs("60%"), data=d, score="l2") for d in ([(t, by) for t, _ in data], Shared([(t, by) for t, _ in data])))
    assert other.plan.why["repair"] == "batch_norm" and any("not repaired" in note for note in other.notes)
    return [digest(state_of(alike(one, other).model))]


def latency(rank, world):
    """Every process gets the readings of the first."""
    result = sc.prune(net(), X, sc.Latency("90%"), data=Shared(rows(16, 16)), score="l2", repair="none")
    return [digest({**result.plan.keep}), json.dumps(result.plan.why["achieved"][0]["achieved"])]


TROUBLES = [a_loader_fails, a_repair_meets_it, another_order, fewer_batches, other_weights, another_way, a_callback_fails, read_once,
            more_processes_than_batches, one_chunk_without_a_derivative, all_refuse_alike, latency]  # fmt: skip


def gone(rank, world):
    """One process ends without a word."""
    data = Shared(rows(4, 4, 4, 4))
    if rank == 1:
        sys.stdout.flush()
        os._exit(0)
    activations(data)


def main(rank, world, meeting):
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=world, timeout=timedelta(seconds=300))
    for trouble in [*TROUBLES, gone]:
        if trouble is gone and rank == 1:
            print(json.dumps({"gone": None}), flush=True)
        try:
            came = trouble(rank, world)
        except SecateurError as error:
            came = f"{type(error).__name__}: {error}"
        except OSError as error:
            came = f"OSError: {error}"
        print(json.dumps({trouble.__name__: came}), flush=True)
    os._exit(0)  # a process that is gone cannot take part in ending the group


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3])
