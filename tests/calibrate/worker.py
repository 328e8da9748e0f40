"""What one of several processes finds out: `python worker.py KIND OUT`, by itself or under torchrun. Process 0 writes it to OUT, with the
digest of every process."""

import sys
from pathlib import Path

import torch
from torch import distributed, nn
from torch.nn import functional as F

import secateur as sc
from secateur.calibrate import Calibration
from secateur.mend import study_of
from secateur.processes import ALONE, Shared, digest
from secateur.surgery.cut import state_of


class Residual(nn.Module):
    def __init__(self, width, inner):
        super().__init__()
        self.a, self.b = nn.Conv2d(width, inner, 3, padding=1), nn.Conv2d(inner, width, 3, padding=1)
        self.n, self.m = nn.BatchNorm2d(inner), nn.BatchNorm2d(width)

    def forward(self, x):
        return F.relu(x + self.m(self.b(F.relu(self.n(self.a(x))))))


class ResNet(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 12, 3, padding=1), nn.BatchNorm2d(12)
        self.one, self.two, self.head = Residual(12, 24), Residual(12, 16), nn.Linear(12, 5)

    def forward(self, x):
        return self.head(self.two(self.one(F.relu(self.norm(self.stem(x))))).mean((2, 3)))


class Block(nn.Module):
    def __init__(self, width, heads):
        super().__init__()
        self.heads = heads
        self.n, self.m = nn.LayerNorm(width), nn.LayerNorm(width)
        self.q, self.k, self.v, self.o = (nn.Linear(width, width) for _ in range(4))
        self.up, self.down = nn.Linear(width, 3 * width), nn.Linear(3 * width, width)

    def forward(self, x):
        y = self.n(x)
        q, k, v = (layer(y).unflatten(-1, (self.heads, -1)).transpose(1, 2) for layer in (self.q, self.k, self.v))
        x = x + self.o(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        return x + self.down(F.gelu(self.up(self.m(x))))


class Transformer(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.blocks, self.last = nn.Linear(6, 16), nn.Sequential(Block(16, 2), Block(16, 2)), nn.Linear(16, 5)

    def forward(self, x):
        return self.last(self.blocks(self.first(x)).mean(1))


def made(kind):
    """A model that no layer of is at its first values, and 301 rows in batches of 40: the last one is smaller."""
    torch.manual_seed(0)
    model = (ResNet if kind == "resnet" else Transformer)().eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn_like(p))
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.running_mean.normal_(0, 0.2)
                module.running_var.uniform_(0.5, 1.5)
        model.get_parameter("head.weight" if kind == "resnet" else "last.weight").mul_(10)  # so that outputs differ by more than rounding
    x = torch.randn(301, *((3, 8, 8) if kind == "resnet" else (7, 6)))
    y = torch.randint(0, 5, (301,))
    return model, list(zip(x.split(40), y.split(40), strict=True))


def statistics(model, x, data):
    graph = sc.trace(model, x)
    found = Calibration(model, graph, data, args=x)
    seen = {f"{g} {k}": getattr(a, k) for g, a in found.activations.items() for k in ("mean", "mean_square", "mean_abs", "zeros")}
    seen |= {f"{g} {row.layer} {k}": getattr(row, k) for g, some in found.inputs.items() for row in some for k in ("mean", "mean_square")}
    seen |= {f"{k} {n}": t for k in ("mean", "mean_square", "first", "second") for n, t in getattr(found.gradients, k).items()}
    study = study_of(model, graph, data)
    return seen | {f"A {n.name}": r.a for n, r in study.readers.items()} | {f"curve {g}": c.error for g, c in study.curves.items()}


def results(model, x, data):
    first = next(iter(dict(model.named_children())))  # reads three channels
    yield "structures", sc.prune(model, x, sc.MACs("60%"), data=data)
    yield "taylor", sc.prune(model, x, sc.MACs("70%"), data=data, score="taylor", repair="batch_norm")
    yield "bias", sc.prune(model, x, sc.MACs("70%"), data=data, allocation="sensitivity", repair="bias")
    yield "weights", sc.sparsify(model, x, sc.Sparse(keep="30%", budget="owl"), data)
    yield "pattern", sc.sparsify(model, x, sc.Sparse(by="sparsegpt", pattern=sc.NM(2, of=4), permute=True, ignore=[first]), data)


def main(kind, out):
    torch.set_num_threads(1)
    model, batches = made(kind)
    many = distributed.is_torchelastic_launched()
    if many:
        distributed.init_process_group("gloo")
    data = Shared(batches) if many else batches
    processes = data.processes if many else ALONE
    x = (batches[0][0][:2],)
    found = {"statistics": statistics(model, x, data)}
    for name, result in results(model, x, data):
        masks = result.plan.weights or result.plan.keep
        found[name] = {"masks": dict(masks), "state": {n: t.detach() for n, t in state_of(result.model).items()}}
        found[name] |= {"fitted": [f"{r.layer}: {r.used}" for r in result.repairs] + [f"{m.layer}: {m.used}" for m in result.masks]}
        found[name] |= {"why": result.plan.why.get("repair"), "rows": result.plan.why.get("calibration_rows")}
        own = digest({**{f"mask {n}": m for n, m in masks.items()}, **state_of(result.model)})
        everyone = processes.gathered("digests", {str(processes.rank): torch.frombuffer(bytearray(own.encode()), dtype=torch.uint8)})
        found[name]["digests"] = [bytes(d.tolist()).decode() for d in everyone.values()]
    if processes.rank == 0:
        torch.save(found, Path(out))
    if many:
        distributed.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
