"""Torch-Pruning 1.6 on the same tasks: every variant that makes sense, its channel ratio searched for the budget.

A variant is criterion / ranking / scope / attention, such as `torch_pruning/l2/global/inner/heads`. Scope "inner" leaves the
layers that write to the residual stream alone, "all" is the library's default. Attention loses whole "heads", head "dims", or
nothing ("ffn"). It takes channel ratios, so the smallest of
the 256ths that meets the budget is searched by bisection. BatchNorm is re-estimated from the same samples as for everybody.
"""

from __future__ import annotations

import copy
import math
import warnings
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.no_training.tasks import Task
from benchmarks.zoo import torch_pruning as zoo
from secateur.measure import count
from secateur.repair import batch_norm_statistics

PREFIX = "torch_pruning/"
STEPS = 256


def variants(task: Task) -> list[str]:
    """The names of all variants for one task."""
    model = task.dense()
    norms = any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in model.modules())
    criteria = ["l2", "taylor", "lamp", "fpgm", *(["bn_scale"] if norms else [])]
    scopes = [*(["all"] if not task.ignore else []), *(["inner"] if task.stream else [])]
    attention = [""]
    if heads(model)[0]:  # rotary positions and a task that asks for heads alone leave the head dimensions out
        attention = ["/heads", "/ffn"] if task.ignore else ["/heads", "/dims"]
    return [f"{PREFIX}{c}/{r}/{s}{a}" for c in criteria for r in ("local", "global") for s in scopes for a in attention]


def heads(model: nn.Module) -> tuple[dict[nn.Module, int], list[Any]]:
    """Head counts of every attention projection, and the modules whose attributes follow, for both kinds of blocks here."""
    found, places = zoo.attention(model)
    for module in model.modules():
        if isinstance(getattr(module, "qkv", None), nn.Linear) and hasattr(module, "hd"):
            found[module.qkv] = module.heads
        elif isinstance(getattr(module, "wq", None), nn.Linear):
            found |= {module.wq: module.heads, module.wk: module.kv, module.wv: module.kv}
    return found, places


def follow(model: nn.Module, left: dict[nn.Module, int], places: list[Any]) -> None:
    """Set the numbers that forward() reads, as the library's examples do after a cut."""
    zoo.repair(places, left)
    for module in model.modules():
        if isinstance(getattr(module, "qkv", None), nn.Linear) and hasattr(module, "hd"):
            module.heads = left[module.qkv]
            module.hd = module.qkv.out_features // 3 // module.heads
        elif isinstance(getattr(module, "wq", None), nn.Linear):
            module.heads, module.kv = left[module.wq], left[module.wk]
            module.hd = module.wq.out_features // module.heads


@dataclass(frozen=True)
class Variant:
    """One way to use the library."""

    criterion: str
    ranking: str
    scope: str
    attention: str = ""

    @classmethod
    def parse(cls, name: str) -> Variant:
        return cls(*name.removeprefix(PREFIX).split("/"))

    def importance(self) -> Any:
        import torch_pruning as tp

        named = {
            "l2": lambda: tp.importance.MagnitudeImportance(p=2),
            "taylor": tp.importance.TaylorImportance,
            "lamp": lambda: tp.importance.LAMPImportance(p=2),
            "fpgm": tp.importance.FPGMImportance,
            "bn_scale": tp.importance.BNScaleImportance,
        }
        return named[self.criterion]()

    def kept_whole(self, task: Task, model: nn.Module, args: tuple[Tensor, ...]) -> list[nn.Module]:
        """Layers it is told to ignore: those of the outputs, and for "inner" those that write to the residual stream."""
        kept = zoo.output_layers(model, model(*args))
        if self.scope == "inner":
            kept += [model.get_submodule(name) for name in task.writers(model)]
        if self.attention == "ffn":
            kept += list(heads(model)[0])
        return kept

    def step(self, task: Task, model: nn.Module, ratio: float) -> nn.Module:
        """Prune `model` in place at one ratio of channels (and of heads, where heads go)."""
        import torch_pruning as tp

        args = task.args()
        counts, places = heads(model)
        widths = {m: m.out_features // n for m, n in counts.items()}  # of one head; of fused projections of all three parts
        whole = self.attention == "heads"
        pruner = tp.pruner.BasePruner(
            model,
            args if len(args) > 1 else args[0],
            importance=self.importance(),
            global_pruning=self.ranking == "global",
            pruning_ratio=ratio,
            ignored_layers=self.kept_whole(task, model, args),
            num_heads=dict(counts),
            prune_num_heads=whole,
            prune_head_dims=not whole,
            head_pruning_ratio=ratio if whole else 0.0,
            in_channel_groups={},  # its defaults are dicts that it changes: one model's layers leak into the next
            out_channel_groups={},
        )
        pruner.step()
        # The head counts it keeps do not always fit its own layers (0 where 6 are left), so the widths are asked.
        follow(model, {m: m.out_features // widths[m] for m in counts} if whole else counts, places)
        return model

    def run(self, task: Task, share: float, seed: int) -> tuple[nn.Module, dict[str, Any]]:
        """The model at the smallest ratio that meets the budget.

        Raises:
            ValueError: no ratio meets it.
        """
        warnings.filterwarnings("ignore")
        model = task.dense()
        for parameter in model.parameters():
            parameter.requires_grad_(True)
        if self.criterion == "taylor":
            batches = task.calibrate(seed)
            for x, y in batches:
                (task.loss(model(x), y) / len(batches)).backward()
        limit = math.floor(share * count(model, task.args()).macs)
        low, high, best = 1, STEPS - 1, None
        while low <= high:
            middle = (low + high) // 2
            trial = self.step(task, _copy(model), middle / STEPS)
            if count(trial, task.args()).macs <= limit:
                best, high = (trial, middle), middle - 1
            else:
                low = middle + 1
        if best is None:
            raise ValueError(f"no ratio below 1 leaves {limit:,} multiply-accumulates")
        with torch.no_grad():
            batch_norm_statistics(best[0].eval(), [((x,), {}) for x in task.inputs(seed)])
        return best[0].eval(), {"channel_ratio": best[1] / STEPS, "labels": self.criterion == "taylor"}


def _copy(model: nn.Module) -> nn.Module:
    """A deep copy with its gradients, which `deepcopy` leaves behind."""
    twin = copy.deepcopy(model)
    for a, b in zip(model.parameters(), twin.parameters(), strict=True):
        b.grad = None if a.grad is None else a.grad.clone()
    return twin
