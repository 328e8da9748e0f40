"""One training run in this process, which may be one of several that torchrun started: `python worker.py KIND FOLDER OUT EPOCHS STEPS`.

FOLDER may hold RANK, for a disk of its own. KIND is copies, shard or lora for `recover`, with an average of the weights (MEAN),
ignored where not all labels count, taught where a teacher
has a say on them besides, tokens and column where a model computes its own loss of labels (N, L) and (N, 1);
or a kind of schedule in a loop of its own, the weights spread over the processes.
"""

import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn

import secateur as sc
from secateur.models.data import Batches
from secateur.models.quality import accuracy
from secateur.recover import Gradual, Schedule, Training, recover
from secateur.recover.checkpoint import full, state_of
from secateur.recover.order import part_of

SOME, OWN = ("ignored", "taught"), ("tokens", "column")
MEAN = {"mean": {"average": 0.5}, "shard-mean": {"average": 0.5}, "shard-ema": {"ema": 0.8}}


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


def some_ignored():
    """Half of the labels do not count: of few rows one of two processes may have none that does."""
    data = rows()
    data.labels[::2] = -100
    return data


class Tagger(nn.Module):
    """A class for each token, or one for all of them, and its own loss of it. A layer of it is in no output."""

    def __init__(self, each):
        super().__init__()
        self.each, self.words, self.mixer, self.idle = each, nn.Embedding(12, 16), nn.ModuleList([Block(16)]), nn.Linear(3, 3)
        self.head = nn.Linear(16, 4)

    def forward(self, words, labels=None):
        x = self.mixer[0](self.words(words))
        logits = self.head(x if self.each else x.mean(1))
        loss = None if labels is None else nn.functional.cross_entropy(logits.flatten(0, -2), labels.flatten())
        return {"loss": loss, "logits": logits}


def tagged(each):
    """Of some rows half of the labels do not count, of the others all do."""
    g = torch.Generator().manual_seed(0)
    words = torch.randint(0, 12, (60, 6), generator=g)
    labels = (words // 3 if each else words[:, :1] // 3).clone()
    if each:
        labels[::3, :3] = -100
    return [{"words": words[i : i + 12], "labels": labels[i : i + 12]} for i in range(0, 60, 12)]


class Stop(Exception):
    pass


def scheduled(kind, out, epochs):
    world, rank = int(os.environ.get("WORLD_SIZE", "1")), int(os.environ.get("RANK", "0"))
    model, data = Mixer(), rows()
    if world > 1:
        from torch.distributed.fsdp import fully_shard

        dist.init_process_group("gloo")
        for block in model.blocks:
            fully_shard(block)
        fully_shard(model)
    optimizer = torch.optim.AdamW(model.parameters(), 0.01)
    schedule = Schedule(model, optimizer, Gradual("20%", kind=kind, budget="lamp", every=2), int(epochs) * len(data))
    halfway = None
    for epoch in range(int(epochs)):
        for whole in data:
            x, y = part_of(whole, rank, world)
            loss = nn.functional.cross_entropy(model(x), y) * len(y) * world / len(whole[1])
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        if epoch == 0:
            halfway = schedule.state_dict()
    again = Schedule(model, torch.optim.AdamW(model.parameters(), 0.01), Gradual("20%", kind=kind, budget="lamp", every=2), schedule.steps)
    again.load_state_dict(halfway)
    assert again.step == len(data) and all(torch.equal(m, halfway["masks"][n]) for n, m in again.masks.items())
    again.remove()
    for name, mask in again.masks.items():
        assert again.time.dense(again.step) or not full(model.get_parameter(name))[~mask].any()
    state, mean = state_of(model), loss.detach() / world
    if world > 1:
        dist.all_reduce(mean)
    if rank == 0:
        torch.save({"state": state, "loss": float(mean), "plan": dict(schedule.plan().weights)}, Path(out))
    if world > 1:
        dist.barrier()
        dist.destroy_process_group()


def main(kind, folder, out, epochs, steps):
    torch.set_num_threads(1)
    torch.manual_seed(0)
    if kind not in ("copies", "shard", "lora", *SOME, *MEAN, *OWN):
        return scheduled(kind, out, epochs)
    data = tagged(kind == "tokens") if kind in OWN else some_ignored() if kind in SOME else rows()
    teacher = Mixer().eval() if kind == "taught" else None
    model, args = (Tagger(kind == "tokens"), (data[0]["words"],)) if kind in OWN else (Mixer(), (data.inputs[:2],))
    result = sc.sparsify(model.eval(), args, sc.Sparse(keep="40%", by="magnitude", refit=False))
    how = Training(epochs=float(epochs), optimizer="adamw", lr=0.01, shard=kind.startswith("shard"), every=0.0, **MEAN.get(kind, {}),
                   train="lora" if kind == "lora" else "all", batch=None if kind in OWN else 8 if kind in SOME else 32)  # fmt: skip

    def progress(step, total, loss):
        if step == int(steps):
            raise Stop

    try:
        valid = data if kind in MEAN else None
        done = recover(result.model, data, how, plan=result.plan, teacher=teacher, valid=valid, progress=progress,
                       folder=folder.replace("RANK", os.environ.get("RANK", "0")))  # fmt: skip
    except Stop:
        return
    if kind in MEAN:  # what was measured is what comes back, and a look leaves it as it is
        found = {accuracy(done.model, data) for _ in range(2)} | {done.history[-1]["valid"]}
        assert len(found) == 1, found
    state = state_of(done.model)
    if not dist.is_initialized() or dist.get_rank() == 0:
        torch.save({"state": state, "loss": done.history[-1]["loss"], "plan": dict(result.plan.weights)}, Path(out))
    if dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
