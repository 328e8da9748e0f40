"""`python -m benchmarks.recover cut --task resnet56 --share 2.57 [--method ours] [--epochs 20]` and
`python -m benchmarks.recover sparse --task resnet20 --keep 0.05 [--kind cubic ...]`: training back on CIFAR-10.

`cut`: a cut by the library's one call (repaired, without training) or by a variant of Torch-Pruning (BatchNorm re-estimated), then the same
training for both: `secateur.recover` with the dense network as teacher, flips and crops, its default rates. `sparse`: single weights go by a
schedule while the trained network is trained on, every kind for the same steps and rates, without a teacher; "rigl" and "set" begin from the
largest weights, "static" from a random mask. All 50,000 training images, the last epoch counts, all 10,000 test images; with `--held-out` some
training images are left out and the network is compared with its teacher on them, for choices that must not see the test images. Rows that are in
`results/recover.json` already are left alone; a run that was killed goes on from `build/recover`. What the teacher gives to a batch is kept there
too: runs of one seed see the same batches in the same order, whatever they train.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import os
import time
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from benchmarks import cifar
from benchmarks.no_training.__main__ import versions
from benchmarks.no_training.methods import method
from benchmarks.no_training.tasks import TASKS, Task
from secateur.measure import count
from secateur.models.data import Batches
from secateur.recover import Gradual, Schedule, Training, recover
from secateur.recover.images import augmented, shown
from secateur.recover.order import Order, mixed

RESULTS = Path(__file__).parent / "results" / "recover.json"
BUILD = Path(__file__).parents[1] / "build" / "recover"


def training_images(raw: bool, held_out: int = 0) -> tuple[Batches, Batches]:
    """Those that are trained on, and as many of the others as asked for."""
    parts = [cifar.pixels(f"train_{i}") for i in range(5)]
    x, y = (torch.cat(p) for p in zip(*parts, strict=True))
    x = x.float() if raw else cifar.normalised(x)
    if not held_out:
        return Batches(x, y, 128), Batches(x[:0], y[:0], 128)
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(7))
    kept, held = order[:-held_out], order[-held_out:]
    return Batches(x[kept], y[kept], 128), Batches(x[held], y[held], 250)


def top1(task: Task, model: nn.Module) -> float:
    return task.evaluate(model.eval().to(memory_format=torch.contiguous_format), None)["top1"]  # type: ignore[call-overload]


@torch.no_grad()
def like(model: nn.Module, teacher: nn.Module, held: Batches) -> dict[str, float]:
    """Over images that were not trained on: KL(teacher || model) in nats, and the share of them that both put into the same class."""
    model, apart, same = model.eval().to(memory_format=torch.contiguous_format), 0.0, 0  # type: ignore[call-overload]
    for x, _ in held:
        ours, theirs = model(x).log_softmax(1), teacher(x).log_softmax(1)
        apart += float(F.kl_div(ours, theirs, log_target=True, reduction="sum"))
        same += int((ours.argmax(1) == theirs.argmax(1)).sum())
    return {"kl": apart / len(held.inputs), "agree": same / len(held.inputs)}


class Remembered(nn.Module):
    """A teacher that looks up what it gave to the same bytes before, in this process or another. `quick`: compiled, its weights as constants; a
    third less time on a CPU."""

    def __init__(self, teacher: nn.Module, folder: Path, quick: bool = False):
        super().__init__()
        self.teacher, self.folder = teacher, folder
        folder.mkdir(parents=True, exist_ok=True)
        if quick:
            torch._inductor.config.freezing = True
            teacher.compile(dynamic=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        kept = self._kept(x)
        if not kept.exists():
            self.keep(x)
        return torch.load(kept, weights_only=True)  # type: ignore[no-any-return]

    def _kept(self, x: torch.Tensor) -> Path:
        return self.folder / hashlib.sha1(x.contiguous().numpy()).hexdigest()

    def keep(self, *batches: torch.Tensor) -> None:
        """What it gives to batches of one size, in one call."""
        for x, given in zip(batches, self.teacher(torch.cat(batches)).chunk(len(batches)), strict=True):
            torch.save(given.clone(), part := self._kept(x).with_suffix(f".{os.getpid()}"))
            part.replace(self._kept(x))

    def keeps(self, *batches: torch.Tensor) -> bool:
        return all(self._kept(x).exists() for x in batches)


def training(options: argparse.Namespace, seed: int) -> Training:
    return Training(options.epochs, lr=options.lr, distil=0.9, features=options.features or 0.0, precision="bfloat16", channels_last=True,
                    augment="flip_crop", cutmix=options.cutmix or 0.0, mirror=options.mirror, average=options.average or 0.0, seed=seed)  # fmt: skip


def teach(task: Task, options: argparse.Namespace, seed: int) -> None:
    """All that the teacher is asked in a run of `cut` with these options, or one part of it."""
    own, parts = map(int, options.part.split("/"))
    dense = task.dense().to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    teacher, how = Remembered(dense, BUILD / f"teacher-{task.name}", quick=True), training(options, seed)
    order = Order(training_images(task.name == "ic_resnet8", options.held_out)[0], None, seed)
    batches = (batch for epoch in range(math.ceil(options.epochs)) for batch in order.epoch(epoch))
    for step, (x, y) in zip(range(round(options.epochs * order.steps)), batches, strict=False):
        if step % parts != own:
            continue
        (x,), _ = shown((x,), y, how, (step, 0))
        asked = (x, x.flip(-1)) if how.mirror else (x,)
        if not teacher.keeps(*asked):
            with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
                teacher.keep(*asked)
        told(step, round(options.epochs * order.steps), 0.0)


def shaped(model: nn.Module, state: dict[str, torch.Tensor]) -> nn.Module:
    """A network with the widths of a cut one, and its weights; the numbers in its code, such as those of a shortcut, stay."""
    for name, layer in model.named_modules():
        if isinstance(layer, nn.Conv2d):
            layer.out_channels, layer.in_channels = (n * (1 if i == 0 else layer.groups) for i, n in enumerate(state[f"{name}.weight"].shape[:2]))
        elif isinstance(layer, nn.BatchNorm2d):
            layer.num_features = len(state[f"{name}.weight"])
        for own, value in [*layer._parameters.items(), *layer._buffers.items()]:
            if value is not None and value.shape != (wanted := state[f"{name}.{own}"]).shape:
                setattr(layer, own, nn.Parameter(wanted.clone()) if own in layer._parameters else wanted.clone())
    model.load_state_dict(state)
    return model


def further(options: argparse.Namespace) -> str:
    """What the name of a run says beside its cut: the choices that are not the defaults."""
    named = {"features": options.features, "without": options.held_out, "cutmix": options.cutmix, "mirror": options.mirror,
             "average": options.average}  # fmt: skip
    rate = "" if options.lr is None else f"-{options.lr:g}"
    return rate + "".join(f"-{name}{'' if value is True else f'{value:g}'}" for name, value in named.items() if value)


def cut(task: Task, options: argparse.Namespace, seed: int) -> dict[str, Any]:
    name = f"{task.name}-{options.share}-{options.method.replace('/', '_')}-{options.epochs:g}-{seed}"
    BUILD.mkdir(parents=True, exist_ok=True)
    kept = BUILD / f"{name}.pt"
    name += further(options)
    seconds = None
    if kept.exists():  # by a run before
        model = shaped(task.dense(), torch.load(kept, weights_only=True))
    else:
        begin = time.monotonic()
        model, _ = method(options.method)(task, 1 / options.share, seed)
        seconds = time.monotonic() - begin
        torch.save(model.state_dict(), kept)
    before = top1(task, model)
    print(name, "without training", before, flush=True)
    how = training(options, seed)
    dense = task.dense().to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    teacher = dense if options.features else Remembered(dense, BUILD / f"teacher-{task.name}")  # what its blocks give is not kept
    data, held = training_images(task.name == "ic_resnet8", options.held_out)
    done = recover(model, data, how, teacher=teacher, folder=BUILD / name, progress=told)
    macs = [count(m, task.args()).macs for m in (task.dense(), model)]
    found = like(model, task.dense().eval(), held) if options.held_out else {"recovered": top1(task, model)}
    return {"share": options.share, "method": options.method, "macs": macs[1] / macs[0], "without_training": before, **found,
            "seconds_of_pruning": seconds, "history": done.history}  # fmt: skip


def told(step: int, steps: int, loss: float) -> None:
    if step % 50 == 0:
        print(f"{step}/{steps} {loss:.4f}", flush=True)


def sparse(task: Task, kind: str, keep: float, options: argparse.Namespace, seed: int) -> dict[str, Any]:
    model, (data, _) = task.dense().train().to(memory_format=torch.channels_last), training_images(task.name == "ic_resnet8")  # type: ignore[call-overload]
    how, order = Training(options.epochs, seed=seed), Order(data, None, seed)
    optimizer, steps = how.made(model, data.size), round(options.epochs * order.steps)
    rates = [g["lr"] for g in optimizer.param_groups]
    schedule = Schedule(model, optimizer, Gradual(keep=keep, kind=kind, start="magnitude", seed=seed), steps)  # type: ignore[arg-type]
    begin, step = time.monotonic(), 0
    for epoch in range(-(-steps // order.steps)):
        for x, y in order.epoch(epoch):
            if step == steps:
                break
            for group, rate in zip(optimizer.param_groups, rates, strict=True):
                group["lr"] = rate * how.at(step, steps)
            with torch.autocast("cpu", torch.bfloat16):
                loss = F.cross_entropy(model(augmented(x, "flip_crop", mixed(seed, step, 0)).to(memory_format=torch.channels_last)).float(), y)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            step += 1
            told(step, steps, float(loss.detach()))
    schedule.remove()
    return {"kind": kind, "keep": keep, "kept": 1 - schedule.sparsity, "top1": top1(task, model), "seconds": time.monotonic() - begin}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["cut", "sparse", "teach"])
    parser.add_argument("--task", default="resnet56", choices=["resnet56", "resnet20", "ic_resnet8"])
    parser.add_argument("--share", type=float, default=2.57, help="the dense multiply-accumulates are divided by this")
    parser.add_argument("--method", default="ours", help="ours, or a variant such as torch_pruning/taylor/local/inner")
    parser.add_argument("--keep", type=float, nargs="+", default=[0.05])
    parser.add_argument("--kind", nargs="+", default=["one_shot", "cubic", "iterative", "ac_dc", "rigl", "static"])
    parser.add_argument("--epochs", type=float, default=20.0)
    parser.add_argument("--lr", type=float, help="the highest rate of `cut`; without it the library's own")
    parser.add_argument("--features", type=float, help="weight of the distance between the outputs of the blocks, of `cut`; without it none")
    parser.add_argument("--cutmix", type=float, help="share of the steps with boxes of other images, of `cut`; without it none")
    parser.add_argument("--mirror", action="store_true", help="the teacher of `cut` sees mirror images too")
    parser.add_argument("--average", type=float, help="share of the steps whose mean weights are taken, of `cut`; without it none")
    parser.add_argument("--part", default="0/1", help="of `teach`: every so manieth step")
    parser.add_argument("--held-out", type=int, default=0, help="training images that `cut` is compared with the teacher on, instead of the test")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    options = parser.parse_args()
    task = TASKS[options.task]
    jobs = [(kind, keep) for kind in options.kind for keep in options.keep] if options.what == "sparse" else [("", 0.0)]
    for seed in options.seeds:
        if options.what == "teach":
            teach(task, options, seed)
            continue
        for kind, keep in jobs:
            same = {"what": options.what, "task": options.task, "seed": seed, "epochs": options.epochs}
            cutting = {"share": options.share, "method": options.method, "lr": options.lr, "features": options.features,
                       "held_out": options.held_out or None, "cutmix": options.cutmix, "mirror": options.mirror or None,
                       "average": options.average}  # fmt: skip
            same |= {"kind": kind, "keep": keep} if kind else cutting
            rows = json.loads(RESULTS.read_text()) if RESULTS.exists() else []
            if any(all(row.get(k) == v for k, v in same.items()) for row in rows):
                continue
            row = cut(task, options, seed) if options.what == "cut" else sparse(task, kind, keep, options, seed)
            row = {**same, **row, "threads": torch.get_num_threads(), "versions": versions()}
            print({k: v for k, v in row.items() if k not in ("history", "versions")}, flush=True)
            rows = json.loads(RESULTS.read_text()) if RESULTS.exists() else []  # another process may have added some
            RESULTS.write_text(json.dumps([*rows, row], indent=1) + "\n")


if __name__ == "__main__":
    main()
