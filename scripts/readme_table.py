"""Write the results table of README.md from benchmarks/results/*.json, or check that it is what they say.

Run as `python scripts/readme_table.py` to write, with `--check` to fail if writing would change anything.
"""

from __future__ import annotations

import json
import math
import statistics
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
BEGIN, END = "<!-- results -->", "<!-- /results -->"
Rows = Iterator[tuple[str, str]]


def coverage(data: dict[str, Any]) -> Rows:
    """benchmarks/results/zoo.json: how many models were captured, proven, and brought to half of their MACs.

    Nothing while the suite has only been run in part: a model not yet tried would read as a failure.
    """
    if any(model["secateur"] is None for model in data["models"]):
        return
    for kind, n in data["counts"].items():
        if kind == "all":  # by kind: benchmarks/results/zoo.md
            yield (
                f"half of the MACs: {kind}, {n['models']} models",
                f"captured {n['captured']}, proven {n['proven']}, at 50 % {n['at_half']}, stop short {n['stop_short']} "
                f"(Torch-Pruning finishes {n['torch_pruning']} of {n['torch_pruning_tried']} tried, values unchecked)",
            )


SHOWN = ("resnet56", "fashion_vit", "lm_shakespeare")  # of the networks; all of them are in no_training.md


def no_training(folder: Path) -> Rows:
    """benchmarks/results/no_training/TASK.jsonl: a line per network shown, at each ratio the mean over the seeds beside the best of the others."""
    for path in [p for name in SHOWN if (p := folder / f"{name}.jsonl").exists()]:
        rows = [row for line in path.read_text().splitlines() if "error" not in (row := json.loads(line))]
        dense = next((row for row in rows if row["method"] == "dense"), {})
        metric = next((m for m in ("top1", "cosine", "perplexity") if m in dense), "top1")
        cells = []
        for ratio in sorted({row["ratio"] for row in rows if row["method"] == "ours"}):
            by_method = _by_method(rows, ratio, metric)
            ours = by_method.pop("ours")
            by_method.pop("ours_layers", None)
            better = min if metric == "perplexity" else max
            others = [(statistics.fmean(v), m.replace("_", " ")) for m, v in by_method.items() if "/" not in m]
            beside = " ({1} {0:.2f})".format(*better(others)) if others else ""
            cells.append(f"{ratio} **{_spread(ours)}**{beside}")
        if cells:
            yield f"no training, {path.stem}, {metric}, dense {dense.get(metric, math.nan):.2f} (best of the others)", ", ".join(cells)


def masks(folder: Path) -> Rows:
    """benchmarks/results/masks/TASK.jsonl: a line per network (of top-1 or perplexity), the default beside SparseGPT or magnitude at each
    sparsity."""
    for path in sorted(folder.glob("*.jsonl")):
        rows = [row for line in path.read_text().splitlines() if "error" not in (row := json.loads(line))]
        metric = next((m for m in ("top1", "perplexity") if m in rows[0]), "")
        cells = []
        for point in sorted({row["ratio"] for row in rows if metric and row["method"] == "alps, ours"}):
            by_method = _by_method(rows, point, metric)
            others = [m for m in ("sparsegpt + BN", "sparsegpt", "magnitude + BN", "magnitude") if m in by_method]
            beside = [f"{m} {statistics.fmean(by_method[m]):.2f}" for m in others]
            cells.append(f"{point} **{_spread(by_method['alps, ours'])}**" + (f" ({beside[0]})" if beside else ""))
        if cells:
            yield f"no training, {path.stem}, single weights gone, {metric}", ", ".join(cells)


def _by_method(rows: list[dict[str, Any]], ratio: str, metric: str) -> dict[str, list[float]]:
    found: dict[str, list[float]] = {}
    for row in rows:
        if row["ratio"] == ratio:
            found.setdefault(row["method"], []).append(row[metric])
    return found


def _spread(values: list[float]) -> str:
    """Mean ± sample standard deviation; fewer than three seeds are told."""
    if len(values) == 1:
        return f"{values[0]:.2f} (1 seed)"
    return f"{statistics.fmean(values):.2f} ± {statistics.stdev(values):.2f}{' (2 seeds)' if len(values) == 2 else ''}"


def speed(data: dict[str, Any]) -> Rows:
    """benchmarks/results/speed.json: seconds to trace, plan and cut."""
    cells = []
    for row in data["side_by_side"]:
        ours, theirs = row["secateur"], row["torch_pruning"]
        cells.append(
            f"{row['model']} {ours['all']:.2f} s, of it {ours['export']:.2f} s torch.export (Torch-Pruning: one step {theirs['all']:.2f} s, "
            f"search for the ratio {theirs['search']:.2f} s)"
        )
    cells += [f"{row['model']} {row['seconds']['all']:.2f} s" for row in data["alone"] if "seconds" in row]
    yield "trace, plan and cut to half of the MACs (Llama: traced and planned)", "; ".join(cells)


def kernels(data: dict[str, Any]) -> Rows:
    """benchmarks/results/kernels.json: layers with zeros beside the quickest dense way."""
    cells = []
    for threads, found in data["threads"].items():
        for pattern in ("4x1", "single"):
            rows = [row for row in found["summary"] if row["pattern"] == pattern]
            figures = " / ".join(f"{row['median_speedup']:.1f}" for row in rows)
            cells.append(f"{threads} thread{'s' if threads != '1' else ''}, {pattern} **{figures}**")
    shares = " / ".join(f"{row['zeros']:.0%}"[:-1] for row in rows)
    yield f"sparse layers, {shares} % zeros, times as fast as the best of torch, torch.compile and ONNX Runtime (medians)", "; ".join(cells)


def networks(data: dict[str, Any]) -> Rows:
    """benchmarks/results/sparse_models.json: whole networks at 90 % zeros."""
    cells = []
    for threads, rows in data["threads"].items():
        ups = {(row["model"], row["way"]): row["speedup"] for row in rows if "speedup" in row}
        for name in dict.fromkeys(model for model, _ in ups):
            best = {p: max(ups[name, p], ups[name, f"{p}, AOTInductor"]) for p in ("4x1", "single")}
            cells.append(f"{name}, {threads} thread{'s' if threads != '1' else ''}: 4x1 **{best['4x1']:.1f}**, single **{best['single']:.1f}**")
    yield "whole networks, 90 % zeros, the same comparison", "; ".join(cells)


def recovered(rows: list[dict[str, Any]]) -> Rows:
    """benchmarks/results/recover.json: training back; the runs on the smallest network and without the test images are in the file alone."""
    groups: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    keys = ("what", "task", "share", "keep", "epochs", "method", "kind", "lr", "features", "cutmix", "mirror", "average")
    for row in rows:
        if row["task"] != "ic_resnet8" and not row.get("held_out"):
            groups.setdefault(tuple(row.get(key) for key in keys), []).append(row)
    cuts, before, sparse = dict[str, list[str]](), dict[str, dict[int, float]](), []
    for (what, task, share, keep, epochs, method, kind, lr, *with_), same in groups.items():
        if what == "cut":
            words = [word for word, given in zip(("features", "CutMix", "mirror images", "mean weights"), with_, strict=True) if given]
            words = ([f"a rate of {lr:g}"] if lr else []) + words
            name = f"{task} ÷{share:g}, {epochs:g} epochs, {method.split('/')[0].replace('_', ' ')}"
            before.setdefault(name, {}).update({row["seed"]: row["without_training"] for row in same})
            how = f"with {', '.join(words)}" if words else "defaults"
            cuts.setdefault(name, []).append(f"{how} **{_spread([row['recovered'] for row in same])}**")
        else:
            name = f"{task} with {keep:.0%} of its weights, {epochs:g} epochs, {kind.replace('_', '-')}"
            sparse.append(f"{name} **{_spread([row['top1'] for row in same])}**")
    if cuts:
        cells = [f"{name} ({statistics.fmean(before[name].values()):.2f} before): {', '.join(found)}" for name, found in cuts.items()]
        yield "CIFAR-10, trained back with the dense network as teacher, top-1", "; ".join(cells)
    if sparse:
        yield "CIFAR-10, weights gone by a schedule while the trained network is trained on, top-1", "; ".join(sparse)


def regularised(data: dict[str, Any]) -> Rows:
    """benchmarks/results/generalise.json: the share chosen by validation data, and early stopping, against the dense network trained as long."""
    cells = []
    for name, found in data["settings"].items():
        ways = [found["summary"][way]["against_dense"] for way in ("chosen", "stopped")]
        figures = [f"{100 * way['mean']:+.1f} ± {100 * way['half']:.1f}" for way in ways]
        if "wide" in name or name.endswith("_40"):
            cells.append(f"{name.replace('_', ' ').replace(' 40', ', 40 % random labels')} **{figures[0]}** (early stopping {figures[1]})")
    yield f"pruning as a regulariser, points of test accuracy, 95 % intervals over {data['seeds']} seeds", "; ".join(cells)


def exported(data: dict[str, Any]) -> Rows:
    """benchmarks/results/export.json: half of the MACs in other runtimes; of the ways of cutting the quickest."""
    best: dict[tuple[str, str], float] = {}
    for row in data["rows"]:
        if "speedup" in row:
            key = row["network"], row["runtime"].split()[0]
            best[key] = max(best.get(key, 0.0), row["speedup"])
    cells = []
    for name in dict.fromkeys(network for network, _ in best):
        cells.append(f"{name}: " + ", ".join(f"{runtime} **{up:.1f}**" for (network, runtime), up in best.items() if network == name))
    worst = max(row["deviation"] for row in data["rows"] if "deviation" in row)
    yield f"half of the MACs, exported, batch 1, one thread: times as fast as dense; largest deviation {worst:.0e}", "; ".join(cells)


def quantised(data: dict[str, Any]) -> Rows:
    """benchmarks/results/quantise.json: dense, pruned, and both in int8."""
    cells = []
    for found in data["rows"]:
        if found["kind"] != "static" or found["model"] == "resnet20":
            continue
        each = []
        for row in found["rows"][1:]:
            accuracy = f"{100 * row['accuracy']:.1f} %, " if row["accuracy"] is not None else ""
            each.append(f"{row['name']} {accuracy}**{row['ratio']:.2f}**")
        accuracy = found["rows"][0]["accuracy"]
        dense = f" (dense {100 * accuracy:.1f} %)" if accuracy is not None else ""
        cells.append(f"{found['model']}{dense}, {found['runtime'].split()[0]}: " + ", ".join(each))
    yield "int8 beside half of the MACs (no training), one thread: time, of the dense time", "; ".join(cells)


def advised(data: dict[str, Any]) -> Rows:
    """benchmarks/results/advise.json: one command that tries every way."""
    tried = [row for row in data["rows"] if row["state"] == "measured"]
    cells = [f"{row['name']} **{row['ratio']:.2f}** for {row['lost']:.1f} ± {row['interval']:.1f} points" for row in tried]
    what = f"`secateur advise` on {data['model']}: {len(tried)} points in {data['seconds']:.0f} s, no training; time, of the dense time"
    yield what, "; ".join(cells)


def blockwise(rows: list[dict[str, Any]]) -> Rows:
    """benchmarks/results/blocks.json: blocks trained to give what the dense ones give."""
    cells = [f"{row['task']} {row['start']} {row['without']:.2f} -> **{row['with']:.2f}**" for row in rows]
    yield "block by block towards the dense network, without labels (1 seed; top-1 or perplexity)", "; ".join(cells)


SOURCES: dict[str, tuple[str, Callable[[Any], Rows]]] = {
    "zoo.json": ("make zoo", coverage),
    "speed.json": ("make bench", speed),
    "kernels.json": ("python -m benchmarks.kernels", kernels),
    "sparse_models.json": ("python -m benchmarks.sparse_models", networks),
    "generalise.json": ("python -m benchmarks.generalise", regularised),
    "recover.json": ("python -m benchmarks.recover", recovered),
    "blocks.json": ("python -m benchmarks.blocks", blockwise),
    "export.json": ("python -m benchmarks.export", exported),
    "quantise.json": ("python -m benchmarks.quantise", quantised),
    "advise.json": ("python -m benchmarks.advise", advised),
}


def by_source(folder: Path) -> dict[tuple[str, str], list[tuple[str, str]]]:
    """(command, file in `folder`) -> its rows, of the results that are there."""
    found = {}
    for name, (command, rows) in SOURCES.items():
        if (folder / name).exists():
            found[command, name] = list(rows(json.loads((folder / name).read_text())))
    found["python -m benchmarks.no_training", "no_training.md"] = list(no_training(folder / "no_training"))
    found["python -m benchmarks.masks", "masks.md"] = list(masks(folder / "masks"))
    return {source: rows for source, rows in found.items() if rows}


def table(folder: Path) -> str:
    """The Markdown table of the results files that are there."""
    lines = ["| what | result | from |", "| --- | --- | --- |"]
    for (command, name), rows in by_source(folder).items():
        lines += [f"| {what} | {figure} | [`{command}`](benchmarks/results/{name}) |" for what, figure in rows]
    return "\n".join(lines) if len(lines) > 2 else "No results have been committed yet."


def written(readme: str, rows: str) -> str:
    """The README with the text between the two markers replaced."""
    head, rest = readme.split(BEGIN)
    return f"{head}{BEGIN}\n{rows}\n{END}{rest.split(END)[1]}"


def main() -> int:
    path = ROOT / "README.md"
    old = path.read_text()
    new = written(old, table(ROOT / "benchmarks" / "results"))
    if "--check" in sys.argv:
        return int(old != new)
    path.write_text(new)
    return 0


if __name__ == "__main__":
    sys.exit(main())
