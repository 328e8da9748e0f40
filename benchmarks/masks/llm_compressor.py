"""llm-compressor's SparseGPT and Wanda beside ours, in a Python that has it: `pip install llmcompressor` in an environment of its own.

    PYTHONPATH=src python -m benchmarks.masks.llm_compressor sibling [--seeds 0 1 2]   # rows to results/masks/sibling.jsonl
    PYTHONPATH=src python -m benchmarks.masks.llm_compressor layer [--threads 1]       # results/masks_layer.json

The sibling gets the same windows of calibration as ours and is judged by the same function. `layer` times SparseGPT on one matrix, with
the same second moments, in turns, and reads both errors from them.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from fractions import Fraction
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from llmcompressor import oneshot
from llmcompressor.modifiers.pruning import SparseGPTModifier, WandaPruningModifier
from llmcompressor.modifiers.pruning.sparsegpt.sgpt_sparsify import sparsify_weight
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from torch import Tensor, nn

import secateur as sc
from benchmarks.masks.__main__ import FOLDER
from benchmarks.masks.sibling import BUILD, LENGTH, SAMPLES, judged, tokens
from benchmarks.no_training.rows import Row, Store
from secateur.masks.problem import Problem, error
from secateur.masks.sparsegpt import sparsegpt
from secateur.models.hf import import_transformers

LAYER = Path(__file__).parents[1] / "results" / "masks_layer.json"
MODIFIERS = {"llm-compressor SparseGPT": SparseGPTModifier, "llm-compressor Wanda": WandaPruningModifier}
SHARES = {"50 %": (0.5, "0:0"), "60 %": (0.6, "0:0"), "70 %": (0.7, "0:0"), "2:4": (0.5, "2:4")}  # it has no R x 1 blocks
SHAPES = ((1536, 1536), (8960, 1536), (1536, 8960))  # (outputs, inputs): of Qwen2-1.5B
TOKENS, ROUNDS = 4096, 2


def versions() -> dict[str, str]:
    return {n: version(n) for n in ("llmcompressor", "compressed-tensors", "transformers", "torch")}


def measured(name: str, point: str, seed: int) -> Row:
    transformers = import_transformers()
    net = transformers.LlamaForCausalLM.from_pretrained(BUILD / "dense", dtype=torch.float32).eval()
    rows = tokens(seed)
    data = Dataset.from_dict({"input_ids": rows.tolist(), "attention_mask": torch.ones_like(rows).tolist()})
    share, structure = SHARES[point]
    recipe = MODIFIERS[name](sparsity=share, mask_structure=structure, targets=["Linear"], ignore=["re:.*lm_head"])
    unused = transformers.PreTrainedTokenizerFast(tokenizer_object=Tokenizer(WordLevel({"<unk>": 0}, "<unk>")), pad_token="<unk>")  # it wants one
    begin = time.perf_counter()
    oneshot(model=net, processor=unused, dataset=data, recipe=recipe, num_calibration_samples=SAMPLES, max_seq_length=LENGTH,
            shuffle_calibration_samples=False)  # fmt: skip
    seconds = time.perf_counter() - begin
    inside = [m.weight for n, m in net.named_modules() if isinstance(m, nn.Linear) and "lm_head" not in n]
    kept = sum(int((w != 0).sum()) for w in inside)
    return {"perplexity": round(judged(net), 4), "kept": kept, "of_weights": sum(w.numel() for w in inside), "seconds": round(seconds, 1)}


def sibling(options: argparse.Namespace) -> None:
    store = Store(FOLDER / "sibling.jsonl")
    done = store.done()
    for seed in options.seeds:
        for point in SHARES:
            for name in MODIFIERS:
                if ("sibling", point, name, seed) not in done:
                    row = {"task": "sibling", "ratio": point, "method": name, "seed": seed, **measured(name, point, seed), "versions": versions()}
                    store.append(row)
                    print(point, name, seed, row["perplexity"], row["seconds"], flush=True)


def problem(rows: int, cols: int) -> tuple[Tensor, Tensor]:
    """Weights, and second moments of inputs with columns of unlike size that go together."""
    g = torch.Generator().manual_seed(0)
    common = torch.randn(TOKENS, 64, generator=g) @ torch.randn(64, cols, generator=g) / 8
    x = (common + torch.randn(TOKENS, cols, generator=g)) * torch.exp(0.5 * torch.randn(cols, generator=g))
    return torch.randn(rows, cols, generator=g) * 0.02, x.mT @ x / TOKENS


def theirs(layer: nn.Linear, h: Tensor, nm: tuple[int, int]) -> Tensor:
    return sparsify_weight(layer, {layer: h}, 0.5, *nm, 128, 0.01, False)[1].detach()


def timed(work: Any) -> tuple[float, Any]:
    begin = time.perf_counter()
    found = work()
    return time.perf_counter() - begin, found


def layer() -> None:
    found = []
    for shape in SHAPES:
        w, h = problem(*shape)
        for pattern, nm in ((sc.NM(2, of=4), (2, 4)), (sc.Free(), (0, 0))):
            ours, other, errors = [], [], (0.0, 0.0)
            for _ in range(ROUNDS):
                a, mine = timed(lambda w=w, h=h, p=pattern: sparsegpt(Problem(w, h, p, Fraction(1, 2))).w)
                dense = nn.utils.skip_init(nn.Linear, w.shape[1], w.shape[0], bias=False)
                dense.weight.data = w.clone()
                twice = 2 * h  # it counts moments so, and writes over them
                b, its = timed(lambda dense=dense, twice=twice, nm=nm: theirs(dense, twice, nm))
                ours, other, errors = [*ours, a], [*other, b], (error(w, mine, h), error(w, its, h))
            row = {
                "outputs_inputs": shape, "pattern": str(pattern), "seconds": statistics.median(ours),
                "llm_compressor_seconds": statistics.median(other),
                "ratio": statistics.median(b / a for a, b in zip(ours, other, strict=True)), "error": errors[0], "llm_compressor_error": errors[1],
            }  # fmt: skip
            found.append(row)
            print(row, flush=True)
    facts = {"threads": torch.get_num_threads(), "rounds": ROUNDS, "tokens": TOKENS, "rows": found, "versions": versions()}
    LAYER.write_text(json.dumps(facts, indent=1) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["sibling", "layer"])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    sibling(options) if options.what == "sibling" else layer()


if __name__ == "__main__":
    main()
