"""One training run in this process, which may be one of several that torchrun started: `python worker.py KIND FOLDER OUT EPOCHS STEPS`."""

import sys
from pathlib import Path

import torch
from torch import nn

import secateur as sc
from secateur.models.data import Batches
from secateur.recover import Training, recover


class Block(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(width), nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, x):
        return x + self.down(torch.nn.functional.gelu(self.up(self.norm(x))))


class Mixer(nn.Module):
    """A small transformer without batch norms, whose statistics would be those of one process."""

    def __init__(self, width=16):
        super().__init__()
        self.first, self.last = nn.Linear(8, width), nn.Linear(width, 4)
        self.blocks = nn.ModuleList([Block(width) for _ in range(2)])

    def forward(self, x):
        x = self.first(x[:, 0])
        for block in self.blocks:
            x = block(x)
        return self.last(x.mean(1))


def rows(n=120):
    g = torch.Generator().manual_seed(0)
    labels = torch.randint(0, 4, (n,), generator=g)
    waves = torch.stack([torch.sin(torch.arange(8) * (k + 1) * 0.7) for k in range(4)])
    return Batches(waves[labels][:, None, None, :] + 0.3 * torch.randn(n, 1, 8, 8, generator=g), labels, 32)


class Stop(Exception):
    pass


def main(kind, folder, out, epochs, steps):
    torch.set_num_threads(1)
    torch.manual_seed(0)
    data = rows()
    result = sc.sparsify(Mixer().eval(), (data.inputs[:2],), sc.Sparse(keep="40%", by="magnitude", refit=False))
    how = Training(epochs=float(epochs), optimizer="adamw", lr=0.01, shard=kind == "shard", every=0.0)

    def progress(step, total, loss):
        if step == int(steps):
            raise Stop

    try:
        done = recover(result.model, data, how, plan=result.plan, folder=folder, progress=progress)
    except Stop:
        return
    from secateur.recover.checkpoint import state_of

    state = state_of(done.model)
    if not torch.distributed.is_initialized() or torch.distributed.get_rank() == 0:
        torch.save({"state": state, "loss": done.history[-1]["loss"], "plan": dict(result.plan.weights)}, Path(out))
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
