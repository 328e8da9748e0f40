"""`python -m benchmarks.masks.table [--out FILE]`: the rows as Markdown, one line per method, one column per share or pattern."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.masks.__main__ import FOLDER, METHODS, POINTS
from benchmarks.no_training.rows import Row, every_row
from benchmarks.no_training.table import digits, spread
from benchmarks.no_training.tasks import TASKS

TITLES = {
    "magnitude": "magnitude", "magnitude + BN": "magnitude, BN re-estimated", "wanda": "Wanda", "wanda + BN": "Wanda, BN re-estimated",
    "sparsegpt": "SparseGPT", "sparsegpt + BN": "SparseGPT, BN re-estimated", "sparsegpt, permuted": "SparseGPT, units reordered first",
    "sparsegpt, searched": "SparseGPT, layers' shares searched", "alps, own targets": "ALPS with refit, each layer's own output",
    "sparsegpt, ours": "**SparseGPT, refit, corrected targets**", "obc, ours": "**OBC, refit, corrected targets**",
    "alps, ours": "**ALPS, refit, corrected targets** (the default)", "alps, permuted": "the same, units reordered first (`permute=True`)",
    "alps, erk": "the same, more in small layers (ERK)", "alps, searched": "the same, layers' shares searched (`budget='search'`)",
}  # fmt: skip
DENSE = {"resnet56": 93.39, "resnet20": 91.73, "lm_shakespeare": 4.5422, "minilm": 1.0}
STREAMED = {
    "llm-compressor Wanda": "llm-compressor's Wanda", "llm-compressor SparseGPT": "llm-compressor's SparseGPT", "magnitude": "magnitude",
    "wanda": "Wanda", "sparsegpt": "SparseGPT", "wanda, refit": "**Wanda, refit**", "sparsegpt, refit": "**SparseGPT, refit**",
    "obc": "**OBC, refit**", "alps": "**ALPS, refit** (the default)",
}  # fmt: skip


def cell(metric: str, rows: Sequence[Row]) -> str:
    """Mean ± standard deviation, and the number of seeds where it is two."""
    good = [row[metric] for row in rows if "error" not in row]
    if not good:
        return "failed" if rows else ""
    return spread(good, digits(metric)) + (" (2)" if len(good) == 2 else "")


def lines(metric: str, rows: Sequence[Row], titles: Mapping[str, str]) -> list[str]:
    points = [p for p in POINTS if any(row["ratio"] == p for row in rows)]
    found = [f"| method | {' | '.join(points)} |", f"| {' | '.join(['---'] * (len(points) + 1))} |"]
    for name, title in titles.items():
        mine = [row for row in rows if row["method"] == name]
        if mine:
            found.append(f"| {title} | {' | '.join(cell(metric, [r for r in mine if r['ratio'] == p]) for p in points)} |")
    return found


SEEDS = "± over three calibration seeds, one seed where there is no ±."


def section(name: str, rows: Sequence[Row]) -> str:
    task = TASKS[name]
    text = [f"### {name}: {task.metric}, dense {DENSE[name]:.{digits(task.metric)}f}", "",
            f"What goes of the weights of linear layers and convolutions. Calibrated from {task.calibration}, no labels, no training; {SEEDS}", "",
            *lines(task.metric, rows, {n: TITLES[n] for n in METHODS})]  # fmt: skip
    for also in ("spearman", "other_half") if name == "minilm" else ():
        said = {"spearman": "rank correlation of all pairwise similarities with the dense model's",
                "other_half": "texts whose nearest is their other half, percent"}[also]  # fmt: skip
        text += ["", f"{name}, {said}:", "", *lines(also, rows, {n: TITLES[n] for n in METHODS})]
    return "\n".join(text) + "\n"


def sibling(rows: Sequence[Row]) -> str:
    dense = next(row["perplexity"] for row in rows if row["method"] == "dense")
    return "\n".join([
        f"### sibling: perplexity, dense {dense:.3f}", "",
        "A Llama of five million parameters, trained on the text of lm_shakespeare (`python -m benchmarks.masks.sibling train`), made sparse from",
        "folder to folder as with `secateur mask --stream`; every method, llm-compressor's too, with the same 128 windows of 256 tokens for a seed,",
        f"judged by the same function; {SEEDS}", "", *lines("perplexity", rows, STREAMED),
    ]) + "\n"  # fmt: skip


def per_layer(found: Mapping[str, Any]) -> str:
    text = ["### SparseGPT on one matrix, seconds", "",
            f"Beside llm-compressor {found['versions']['llmcompressor']}, the same moments, 50 %, in turns in one process, medians of "
            f"{found['rounds']} rounds, {found['threads']} thread(s). Error: of the output, relative.", "",
            "| outputs x inputs | pattern | secateur | llm-compressor | times as fast | error | its error |",
            "| --- | --- | --- | --- | --- | --- | --- |"]  # fmt: skip
    for r in found["rows"]:
        text.append(f"| {' x '.join(map(str, r['outputs_inputs']))} | {r['pattern']} | {r['seconds']:.2f} | {r['llm_compressor_seconds']:.2f} "
                    f"| {r['ratio']:.1f} | {r['error']:.4f} | {r['llm_compressor_error']:.4f} |")  # fmt: skip
    return "\n".join(text) + "\n"


def streamed(found: Mapping[str, Any]) -> str:
    kills = len(found["exit_codes"]) - 1
    return "\n".join([
        "### A 1.5-billion-parameter model made 2:4 from disk to disk", "",
        f"`python -m benchmarks.masks.large`: {found['parameters']:,} parameters, {found['bytes'] / 1e9:.2f} GB in bfloat16, SparseGPT, "
        f"{found['samples']} windows of {found['tokens_each']} tokens, {found['threads']} thread(s): {found['seconds']:,.0f} s, at most "
        f"{found['peak_bytes'] / 1e9:.2f} GB resident. Killed {kills} times at random moments and taken up again: "
        f"{'the same bytes in every file' if found['same_bytes'] else 'OTHER BYTES'}; `verify`: {' '.join(found['verify'])}.",
    ]) + "\n"  # fmt: skip


def table(folder: Path = FOLDER) -> str:
    rows = every_row(folder)
    parts = [section(name, [r for r in rows if r["task"] == name]) for name in sorted({r["task"] for r in rows} & TASKS.keys())]
    of_sibling = [r for r in rows if r["task"] == "sibling"]
    parts += [sibling(of_sibling)] if of_sibling else []
    parts += [make(json.loads(path.read_text())) for path, make in _files(folder) if path.is_file()]
    return "\n".join(parts)


def _files(folder: Path) -> Iterable[tuple[Path, Any]]:
    return (folder.parent / "masks_layer.json", per_layer), (folder.parent / "masks_large.json", streamed)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    if options.out:
        options.out.write_text(table())
    else:
        print(table())


if __name__ == "__main__":
    main()
