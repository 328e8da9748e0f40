"""Seconds to trace, plan and cut, beside Torch-Pruning in one run; windows and grids; seven billion weights on meta.

Run as `python -m benchmarks.speed_vs_torch_pruning`; writes `benchmarks/results/speed.json`. Rounds of the two
libraries alternate, medians are reported. Seconds are processor seconds of one thread, so that other work on the
machine does not count (`wall_s` is what the clock on the wall said, for a whole process). Each measurement builds a
fresh model outside the clock.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import sys
from pathlib import Path
from time import process_time as clock
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.zoo import catalogue, guard, torch_pruning
from benchmarks.zoo.timing import exports, stages
from secateur.measure import count

RESULTS = Path(__file__).parent / "results"
HALF = "50%"
TRIES = 10
WINDOWED = ("torchvision/swin_t", "torchvision/maxvit_t")


def ours(model: nn.Module, args: tuple[Tensor, ...]) -> dict[str, float]:
    """Seconds of each stage of secateur, and of all three together (the proof is apart: nobody else makes one)."""
    import secateur as sc
    from secateur.trace import tracer

    with exports(clock) as export, stages(tracer, ("analyse",), clock) as inner:
        start = clock()
        graph = sc.trace(model, args)
        traced = clock()
        in_trace = sum(export)
        plan = sc.plan(graph, sc.score.l2(graph, model), sc.MACs(at_most=HALF), allocation="global")
        planned = clock()
        cut = sc.cut(model, graph, plan, values=False)  # the proof compares values, as it does in `prune`
        end = clock()
    proof = clock()
    sc.prove(model, graph, plan.keep, cut.model)
    return {
        "export": in_trace,
        "axes": inner["analyse"],
        "plan": planned - traced,
        "cut": end - planned,
        "all": end - start,
        "proof": clock() - proof,
    }


def step(name: str, model: nn.Module, args: tuple[Tensor, ...], ratio: float) -> float:
    """Seconds of Torch-Pruning at one channel ratio, in place: dependency graph, pruner and step."""
    import torch_pruning as tp

    heads, places = torch_pruning.attention(model)
    layers = torch_pruning.ignored(name, model, model(*args))
    start = clock()
    importance = tp.importance.MagnitudeImportance(p=2)
    options: dict[str, Any] = {"ignored_layers": layers, "num_heads": heads}
    shared = [m.num_heads for m in model.modules() if isinstance(m, nn.MultiheadAttention)]
    options["round_to"] = max(shared, default=None)  # as its own example does for torch's attention module
    pruner = tp.pruner.BasePruner(model, args, importance=importance, pruning_ratio=ratio, **options)
    pruner.step()
    seconds = clock() - start
    torch_pruning.repair(places, pruner.num_heads)
    if hasattr(model, "hidden_dim") and hasattr(model, "conv_proj"):
        model.hidden_dim = model.conv_proj.out_channels
    return seconds


def theirs(name: str, model: nn.Module, args: tuple[Tensor, ...]) -> dict[str, float]:
    """Seconds of Torch-Pruning: one step at half of the channels, and steps until half of the MACs are left.

    It takes channel ratios only. To leave half of the MACs (within 1 %, as secateur does) its user searches the ratio:
    here by bisection, each try on a fresh copy; only the tries themselves are on the clock, not the counting.
    """
    dense = count(model, args).macs
    out = {"all": step(name, copy.deepcopy(model), args, 0.5), "search": 0.0, "tries": 0.0}
    low, high = 0.0, 1.0
    while out["tries"] < TRIES:
        trial, ratio = copy.deepcopy(model), (low + high) / 2
        out["search"] += step(name, trial, args, ratio)
        out["tries"] += 1
        left = count(trial, args).macs / dense
        if 0.495 <= left <= 0.5:
            break
        low, high = (ratio, high) if left > 0.5 else (low, ratio)
    return out


def medians(rows: list[dict[str, float]]) -> dict[str, float]:
    """The median of every key."""
    return {key: round(statistics.median(row[key] for row in rows), 4) for key in rows[0]}


def side_by_side(name: str, rounds: int) -> dict[str, Any]:
    """Alternate the two libraries on one model; the first round of each warms up and does not count."""
    rows: dict[str, list[dict[str, float]]] = {"secateur": [], "torch_pruning": []}
    for index in range(rounds + 1):
        for tool in rows:
            example = catalogue.find(name).build()
            args = (torch.randn(1, 3, 224, 224),)
            seconds = ours(example.model, args) if tool == "secateur" else theirs(name, example.model, args)
            if index:
                rows[tool].append(seconds)
            print(name, tool, {k: round(v, 3) for k, v in seconds.items()}, flush=True)
    a, b = medians(rows["secateur"]), medians(rows["torch_pruning"])
    spread = {t: [round(min(r["all"] for r in rs), 3), round(max(r["all"] for r in rs), 3)] for t, rs in rows.items()}
    return {"model": name, "rounds": rounds, "secateur": a, "torch_pruning": b, "range_all": spread,
            "their_step_over_ours": round(b["all"] / a["all"], 2),
            "their_search_over_ours": round(b["search"] / a["all"], 2)}  # fmt: skip


def windowed(name: str, out: Path) -> None:
    """One model alone in this process: seconds of each stage."""
    example = catalogue.find(name).build()
    guard.write(out, {"model": name, "seconds": {k: round(v, 3) for k, v in ours(example.model, example.args).items()}})


def seven_billion(_: str, out: Path) -> None:
    """A Llama of the default (7-billion) configuration on the meta device, traced and planned at half the MACs."""
    import transformers

    import secateur as sc
    from secateur.trace import tracer

    config = transformers.LlamaConfig(use_cache=False)
    with torch.device("meta"):
        model = transformers.LlamaForCausalLM(config).eval()
        tokens = torch.zeros(1, 16, dtype=torch.long)
    with exports(clock) as export, stages(tracer, ("analyse",), clock) as inner:
        start = clock()
        graph = sc.trace(model, (), {"input_ids": tokens, "use_cache": False})
        traced = clock()
        in_export = sum(export)
    # Weights on meta have no values, so the criterion that needs none.
    plan = sc.plan(graph, sc.score.random(graph, model), sc.MACs(at_most=HALF), allocation="global")
    planned = clock()
    kinds: dict[str, int] = {}
    for group in graph.groups.values():
        key = f"{group.size} x {group.kind}"
        kinds[key] = kinds.get(key, 0) + 1
    seconds = {"export": in_export, "axes": inner["analyse"], "plan": planned - traced}
    seconds["all"] = planned - start
    row: dict[str, Any] = {"model": "Llama 7B on meta", "sequence": 16, "groups": kinds}
    row |= {"params": plan.before.params, "macs": plan.before.macs, "macs_after": plan.after.macs}
    guard.write(out, row | {"seconds": {k: round(v, 3) for k, v in seconds.items()}})


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path, default=RESULTS / "speed.json")
    options = parser.parse_args()
    torch.set_num_threads(1)
    guard.preload()
    page: dict[str, Any] = {
        "seconds": "processor seconds, one thread",
        "threads": 1,
        "torch": torch.__version__,
        "python": sys.version.split()[0],
    }
    limits = guard.Limits(seconds=300)
    page["alone"] = [guard.run(windowed, name, limits) for name in WINDOWED]
    page["alone"].append(guard.run(seven_billion, "llama", limits))
    print(json.dumps(page["alone"], indent=1), flush=True)
    names = ("torchvision/resnet50", "torchvision/vit_b_16")
    page["side_by_side"] = [side_by_side(name, options.rounds) for name in names]
    options.out.write_text(json.dumps(page, indent=1) + "\n")


if __name__ == "__main__":
    main()
