"""`python -m benchmarks.recipes dense`, then `cut`, then `train`: which way of training back is best, without a look at the test images.

10,000 training images are left out of everything: a ResNet-56 is trained from the start on the other 40,000 (`dense`, a GPU), cut by the library's
one call with calibration images among those (`cut`, a CPU), and trained back for 20 epochs in several ways, with its dense network as teacher
(`train`, a GPU). The images left out judge. Networks that have seen them are no judges: the published ResNet-56 has learned all 50,000.

Trainings lie side by side in one process, each step a CUDA graph on a stream of its own: the arithmetic is that of `secateur.recover` with SGD and
bfloat16 (`tests/test_recipes.py` compares a step), but rows are drawn on the GPU and what is left of an epoch's last batch is dropped.
Files lie in `build/recipes`, the results in `results/recipes.json`; the committed ones are by an earlier form of this script, in three processes of
two trainings each.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import json
import math
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks import cifar
from benchmarks.no_training.methods import ours
from benchmarks.no_training.tasks import TASKS, batched
from benchmarks.recover import shaped, training_images

RESULTS = Path(__file__).parent / "results" / "recipes.json"
BUILD = Path(__file__).parents[1] / "build" / "recipes"
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
HELD_OUT, SHARES, BATCH, HALF = 10_000, ("2.57", "2.1"), 128, torch.bfloat16


@dataclass(frozen=True)
class Recipe:
    """How one network is trained; the defaults are those of `secateur.recover`. `cutmix`, `mixup`: shares of the steps."""

    epochs: int = 20
    lr: float = 0.02
    cutmix: float = 0.0
    mixup: float = 0.0
    mirror: bool = False
    distil: float = 0.9
    temperature: float = 4.0
    clip: float = 5.0
    weight_decay: float = 5e-4
    warmup: float = 0.05
    seed: int = 0


RECIPES = {
    "base": Recipe(),
    "mirror, cutmix 0.5": Recipe(mirror=True, cutmix=0.5),
    "mirror, cutmix 0.5, mixup 0.5": Recipe(mirror=True, cutmix=0.5, mixup=0.5),
}


def halved(model: nn.Module) -> nn.Module:
    """Weights of convolutions and linear layers in bfloat16, norms as they are: what autocast computes with."""
    for module in model.modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            module.to(HALF)
    return model


class Run:
    """One training, all of it on the device: a step takes no number from outside."""

    def __init__(self, model: nn.Module, teacher: nn.Module | None, rows: tuple[Tensor, Tensor], how: Recipe):
        self.how, (self.x, self.y) = how, rows
        self.model = model.to(DEVICE).train().to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        for module in self.model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.num_batches_tracked = None  # a kernel for each in every step, for a number that nothing reads
        self.teacher = None if teacher is None else halved(copy.deepcopy(teacher).to(DEVICE).eval().to(memory_format=torch.channels_last))  # type: ignore[call-overload]
        self.each = len(self.x) // BATCH
        self.random = torch.Generator(DEVICE).manual_seed(how.seed)
        n = self.each * BATCH
        self.images, self.labels = torch.empty((n, *self.x.shape[1:]), device=DEVICE), torch.empty(n, dtype=torch.long, device=DEVICE)
        self.step, self.loss, self.at = (torch.zeros(1, dtype=d, device=DEVICE) for d in (torch.float32, torch.float32, torch.long))
        self.own, self.rows = torch.ones(self.each, 1, 32, 32, device=DEVICE), torch.arange(BATCH, device=DEVICE)
        named = dict(self.model.named_parameters())
        self.params = sorted(named.values(), key=lambda p: p.dim() < 2)  # those that decay first
        self.decayed = sum(p.dim() > 1 for p in self.params)
        self.half = {n: p.detach().to(HALF, copy=True).requires_grad_() for n, p in named.items() if p.dim() > 1 or n == "linear.bias"}
        names = {p: n for n, p in named.items()}
        self.leaves = [self.half.get(names[p], p) for p in self.params]
        self.whole = [named[n] for n in self.half]
        self.grads, self.momenta = ([torch.zeros_like(p) for p in self.params] for _ in range(2))
        self.stream = torch.cuda.Stream() if DEVICE == "cuda" else None
        self.graph: Any = None

    def drawn(self, *shape: int) -> Tensor:
        return torch.rand(shape, device=DEVICE, generator=self.random)

    def epoch(self) -> None:
        """New rows, flips, crops and mixtures for an epoch."""
        order = torch.randperm(len(self.x), device=DEVICE, generator=self.random)[: len(self.images)]
        self.labels.copy_(self.y[order])
        flip = self.drawn(len(order)) < 0.5
        corner = (self.drawn(2, len(order)) * 9).long()
        span, channels = torch.arange(32, device=DEVICE), torch.arange(3, device=DEVICE)
        for rows in torch.arange(len(order), device=DEVICE).split(8192):
            x = self.x[order[rows]]
            x = F.pad(torch.where(flip[rows].view(-1, 1, 1, 1), x.flip(-1), x), (4, 4, 4, 4))
            down, right = (corner[i, rows, None] + span for i in range(2))
            own = torch.arange(len(rows), device=DEVICE)[:, None, None, None]
            self.images[rows] = x[own, channels[:, None, None], down[:, None, :, None], right[:, None, None, :]]
        which, area = self.drawn(self.each), self.drawn(self.each)
        side, middle = (area.sqrt() * 32).round(), (self.drawn(2, self.each) * 32).floor()
        inside = [(span >= (m - side / 2)[:, None]) & (span < (m + side / 2)[:, None]) for m in middle]
        box = (inside[0][:, :, None] & inside[1][:, None, :]) & (which < self.how.cutmix)[:, None, None]
        share = torch.where((which >= self.how.cutmix) & (which < self.how.cutmix + self.how.mixup), area, torch.ones_like(area))
        self.own.copy_(((~box).float() * share[:, None, None])[:, None])
        self.at.zero_()

    def body(self) -> None:
        """One step."""
        how, rows = self.how, self.rows + self.at * BATCH
        x, y, own = self.images[rows], self.labels[rows], self.own.index_select(0, self.at)
        x = (own * x + (1 - own) * x.flip(0)).to(HALF).contiguous(memory_format=torch.channels_last)
        with torch.no_grad():
            torch._foreach_copy_(list(self.half.values()), self.whole)
        scores = torch.func.functional_call(self.model, self.half, (x,)).float()
        loss = own.mean() * F.cross_entropy(scores, y) + (1 - own.mean()) * F.cross_entropy(scores, y.flip(0))
        if self.teacher is not None:
            with torch.no_grad():
                wanted = self.teacher(x).float()
                if how.mirror:
                    wanted = (wanted + self.teacher(x.flip(-1)).float()) / 2
            s, t = ((v / how.temperature).log_softmax(1) for v in (scores, wanted))
            loss = how.distil * how.temperature**2 * F.kl_div(s, t, reduction="batchmean", log_target=True) + (1 - how.distil) * loss
        found = torch.autograd.grad(loss, self.leaves)
        with torch.no_grad():
            self._stepped(list(found))
            self.loss += loss.detach()
            self.step += 1
            self.at += 1

    def _stepped(self, found: list[Tensor]) -> None:
        """SGD with Nesterov's momentum; the rate rises and falls as in `Training.at`."""
        how, steps, grads = self.how, self.how.epochs * self.each, self.grads
        torch._foreach_copy_(grads, found)
        norm = torch.stack(torch._foreach_norm(grads)).norm()
        torch._foreach_mul_(grads, (how.clip / (norm + 1e-6)).clamp(max=1.0))
        torch._foreach_add_(grads[: self.decayed], self.params[: self.decayed], alpha=how.weight_decay)
        torch._foreach_mul_(self.momenta, 0.9)
        torch._foreach_add_(self.momenta, grads)
        torch._foreach_add_(grads, self.momenta, alpha=0.9)
        rising = how.warmup * steps
        falls = 0.5 * (1 + torch.cos(math.pi * (self.step - rising) / max(1.0, steps - rising)))
        rate = how.lr * torch.where(self.step < rising, (self.step + 1) / (rising + 1), falls)
        torch._foreach_mul_(grads, -rate[0])
        torch._foreach_add_(self.params, grads)

    @contextlib.contextmanager
    def here(self) -> Iterator[None]:
        with torch.cuda.stream(self.stream) if self.stream else contextlib.nullcontext():
            yield

    def captured(self) -> None:
        """The step as a graph; what the runs before it changed is put back."""
        if self.stream is None:
            return
        state = [*self.model.state_dict().values(), *self.momenta, self.step, self.loss]
        kept = [t.clone() for t in state]
        torch.cuda.synchronize()
        with self.here():
            self.epoch()
            for _ in range(3):
                self.body()
        torch.cuda.synchronize()
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph, stream=self.stream):
            self.body()
        with torch.no_grad():
            torch._foreach_copy_(state, kept)
        self.random.manual_seed(self.how.seed)
        torch.cuda.synchronize()

    def go(self) -> None:
        with self.here():
            if self.graph is None:
                self.body()
            else:
                self.graph.replay()


def together(runs: list[Run]) -> list[list[float]]:
    """Runs of the same number of steps, side by side; the mean loss of every epoch of each."""
    curves: list[list[float]] = [[] for _ in runs]
    for run in runs:
        run.captured()
    for _ in range(runs[0].how.epochs):
        for run in runs:
            with run.here():
                run.epoch()
                run.loss.zero_()
        for _ in range(runs[0].each):
            for run in runs:
                run.go()
        if DEVICE == "cuda":
            torch.cuda.synchronize()
        for run, curve in zip(runs, curves, strict=True):
            curve.append(float(run.loss) / run.each)
        print(len(curves[0]), [round(c[-1], 3) for c in curves], flush=True)
    return curves


def images(first: int | None) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """The rows that are trained on, and those that judge, on the device."""
    parts = training_images(False, HELD_OUT)
    kept, held = [(p.inputs[:first].to(DEVICE), p.labels[:first].to(DEVICE)) for p in parts]  # type: ignore[union-attr]
    return kept, held


def top1(model: nn.Module, rows: tuple[Tensor, Tensor]) -> float:
    return cifar.accuracy(model.float().eval(), *rows)


def saved(model: nn.Module, name: str) -> None:
    BUILD.mkdir(parents=True, exist_ok=True)
    torch.save({n: t.cpu().contiguous() for n, t in model.state_dict().items()}, BUILD / f"{name}.pt")


def dense() -> nn.Module:
    model = cifar.resnet56()
    model.load_state_dict(torch.load(BUILD / "dense.pt", weights_only=True), strict=False)  # without the counts of batches
    return model.eval()


def from_the_start(options: argparse.Namespace) -> None:
    torch.manual_seed(0)
    model, (kept, held) = cifar.resnet56(), images(options.first)
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out")
    together([run := Run(model, None, kept, Recipe(options.epochs or 30, lr=0.1))])
    print("dense", top1(run.model, held))
    saved(run.model, "dense")


def cut(options: argparse.Namespace) -> None:
    kept, held = (tuple(t.cpu() for t in rows) for rows in images(None))
    rows = torch.randperm(len(kept[0]), generator=torch.Generator().manual_seed(0))[:2048]
    calibration = batched(kept[0][rows], kept[1][rows])
    for share in SHARES:
        task = replace(TASKS["resnet56"], dense=dense, calibrate=lambda seed: calibration)
        model, _ = ours(task, 1 / float(share), 0)
        print(share, top1(model, held), flush=True)
        saved(model, share)


def train(options: argparse.Namespace) -> None:
    kept, held = images(options.first)
    names = [(name, share) for name in RECIPES for share in SHARES]
    pruned = {s: torch.load(BUILD / f"{s}.pt", weights_only=True) for s in SHARES}
    hows = [replace(RECIPES[n], seed=options.seed, epochs=options.epochs or 20) for n, _ in names]
    before = {s: top1(shaped(dense(), pruned[s]).to(DEVICE), held) for s in SHARES}
    begin = time.monotonic()
    curves = together(runs := [Run(shaped(dense(), pruned[s]), dense(), kept, how) for (_, s), how in zip(names, hows, strict=True)])
    facts = {"device": torch.cuda.get_device_name() if DEVICE == "cuda" else "cpu", "torch": torch.__version__, "seconds": time.monotonic() - begin}
    whole = top1(dense().to(DEVICE), held)
    found = [{"recipe": name, "share": share, "how": asdict(run.how), "dense": whole, "without_training": before[share],
              "held_out": top1(run.model, held), "losses": curve, **facts}
             for (name, share), run, curve in zip(names, runs, curves, strict=True)]  # fmt: skip
    for row in found:
        print(row["recipe"], row["share"], row["held_out"])
    if not options.first:
        RESULTS.write_text(json.dumps(found, indent=1) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["dense", "cut", "train"])
    parser.add_argument("--epochs", type=int, help="30 for `dense`, 20 for `train`")
    parser.add_argument("--first", type=int, help="only so many images, to see that it runs")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    {"dense": from_the_start, "cut": cut, "train": train}[options.what](options)


if __name__ == "__main__":
    main()
