"""A language model of about five million parameters in the Llama form, trained on tiny Shakespeare, and the masks of every tool on it.

    python -m benchmarks.masks.sibling train [--steps 1500]     # resumable; about half an hour on one core
    python -m benchmarks.masks.sibling masks [--point "60 %" ...] [--method NAME ...] [--seeds 0 1 2]

Characters are tokens. The model lies in `build/sibling/dense` as an ordinary Hugging Face folder and is not committed. Rows go to
`results/masks/sibling.jsonl`: perplexity per character on the last tenth of the text.
"""

from __future__ import annotations

import argparse
import math
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import secateur as sc
from benchmarks.masks.__main__ import FOLDER, POINTS
from benchmarks.no_training import split
from benchmarks.no_training.__main__ import versions
from benchmarks.no_training.rows import Row, Store
from benchmarks.no_training.tasks import shakespeare
from secateur.models.hf import import_transformers
from secateur.stream.hf import mask_folder

BUILD = Path("build/sibling")
LENGTH, BATCH, RATE = 256, 8, 2e-3
SAMPLES = 128
CONFIG = {
    "vocab_size": 65, "hidden_size": 256, "intermediate_size": 832, "num_hidden_layers": 6, "num_attention_heads": 8, "num_key_value_heads": 4,
    "max_position_embeddings": LENGTH, "tie_word_embeddings": False,
}  # fmt: skip
# name -> (method, refit)
METHODS = {
    "magnitude": ("magnitude", False), "wanda": ("wanda", False), "sparsegpt": ("sparsegpt", False), "wanda, refit": ("wanda", True),
    "sparsegpt, refit": ("sparsegpt", True), "alps": ("alps", True), "obc": ("obc", True),
}  # fmt: skip


def model() -> Any:
    transformers = import_transformers()
    torch.manual_seed(0)
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**CONFIG))


def batch(ids: Tensor, step: int) -> Tensor:
    """Windows of the training part, drawn by the step, so that a run that is taken up sees what it would have seen."""
    starts = torch.randint(0, len(ids) - LENGTH - 1, (BATCH,), generator=torch.Generator().manual_seed(step))
    return torch.stack([ids[s : s + LENGTH + 1] for s in starts])


def train(steps: int) -> None:
    """Adam with warm-up and a cosine, a checkpoint every hundred steps."""
    ids = shakespeare()[: split.characters(len(shakespeare()))[0].stop]
    net, path = model().train(), BUILD / "checkpoint.pt"
    optimizer = torch.optim.AdamW(net.parameters(), RATE, betas=(0.9, 0.95), weight_decay=0.1)
    first = 0
    if path.is_file():
        held = torch.load(path, weights_only=True)
        net.load_state_dict(held["model"])
        optimizer.load_state_dict(held["optimizer"])
        first = held["step"]
    BUILD.mkdir(parents=True, exist_ok=True)
    begin = time.perf_counter()
    for step in range(first, steps):
        rate = RATE * min(1, (step + 1) / 100) * (0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * step / steps)))
        for group in optimizer.param_groups:
            group["lr"] = rate
        rows = batch(ids, step)
        loss = F.cross_entropy(net(input_ids=rows[:, :-1]).logits.flatten(0, 1), rows[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        optimizer.step()
        if (step + 1) % 100 == 0 or step + 1 == steps:
            torch.save({"model": net.state_dict(), "optimizer": optimizer.state_dict(), "step": step + 1}, path.with_suffix(".new"))
            path.with_suffix(".new").replace(path)
            print(step + 1, f"{loss.item():.3f}", f"{time.perf_counter() - begin:.0f} s", flush=True)
    net.eval().save_pretrained(BUILD / "dense")


def perplexity(folder: Path) -> float:
    transformers = import_transformers()
    return judged(transformers.LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32).eval())


def judged(net: nn.Module) -> float:
    """Perplexity per character, of the last tenth of the text in windows that do not overlap."""
    ids = shakespeare()[split.characters(len(shakespeare()))[1].start :]
    rows = ids[: len(ids) // (LENGTH + 1) * (LENGTH + 1)].view(-1, LENGTH + 1)
    with torch.no_grad():
        each = [F.cross_entropy(net(input_ids=r[:, :-1]).logits.flatten(0, 1), r[:, 1:].flatten(), reduction="none") for r in rows.split(16)]
    return math.exp(float(torch.cat(each).mean()))


def tokens(seed: int) -> Tensor:
    """The calibration windows of a seed: (samples, length)."""
    ids = shakespeare()[: split.characters(len(shakespeare()))[0].stop]
    whole = ids[: len(ids) // LENGTH * LENGTH].view(-1, LENGTH)
    return whole[split.chosen(len(whole), SAMPLES, seed)]


def measured(name: str, point: str, seed: int) -> Row:
    by, refit = METHODS[name]
    keep, pattern = POINTS[point]
    with tempfile.TemporaryDirectory() as parent:
        begin = time.perf_counter()
        done = mask_folder(BUILD / "dense", Path(parent) / "out", sc.Sparse(keep, by, pattern, refit=refit), tokens(seed))
        seconds = time.perf_counter() - begin
        kept, size = sum(m.kept for m in done.masks), sum(m.size for m in done.masks)
        return {"perplexity": round(perplexity(Path(parent) / "out"), 4), "kept": kept, "of_weights": size, "seconds": round(seconds, 1)}


def masks(options: argparse.Namespace) -> None:
    store = Store(FOLDER / "sibling.jsonl")
    done = store.done()
    if ("sibling", "1", "dense", 0) not in done:
        store.append({"task": "sibling", "ratio": "1", "method": "dense", "seed": 0, "perplexity": round(perplexity(BUILD / "dense"), 4)})
    for point in options.point:
        for name in options.method:
            for seed in options.seeds[:1] if name == "magnitude" else options.seeds:
                if ("sibling", point, name, seed) not in done:
                    row = {"task": "sibling", "ratio": point, "method": name, "seed": seed, **measured(name, point, seed), "versions": versions()}
                    store.append(row)
                    print(point, name, seed, row["perplexity"], row["seconds"], flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["train", "masks"])
    parser.add_argument("--steps", type=int, default=1500)
    parser.add_argument("--method", nargs="+", default=list(METHODS), choices=list(METHODS))
    parser.add_argument("--point", nargs="+", default=["50 %", "60 %", "70 %", "2:4", "4x1, 50 %"], choices=list(POINTS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    train(options.steps) if options.what == "train" else masks(options)


if __name__ == "__main__":
    main()
