"""`python -m benchmarks.convert [--threads 1 2] [--rounds 21]`: what `runtime.convert` does where sparse layers hardly pay.

Every second layer is dense, the others have 30 % zeros: the model that comes back may not be slower than the one given. Both are timed again
afterwards, in turns; `results/convert.json` has medians in seconds, without and with folding.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch
from torch import nn

from benchmarks import threads
from benchmarks.kernels import pruned
from benchmarks.sparse_models import MODELS
from secateur.runtime import convert
from secateur.runtime.convert import in_turns

RESULTS = Path(__file__).parent / "results" / "convert.json"
ZEROS = 0.3


def partly(model: nn.Module) -> nn.Module:
    """A copy in which every second layer has zeros."""
    model = copy.deepcopy(model)
    layers = [m for m in model.modules() if isinstance(m, (nn.Conv2d, nn.Linear)) and getattr(m, "groups", 1) == 1]
    for layer in layers[1::2]:
        pruned(layer, ZEROS, 1)
    return model


def measured(name: str, fold: bool, rounds: int) -> dict[str, Any]:
    torch.manual_seed(0)
    model, shape = MODELS[name]()
    model, x = partly(model.eval()), torch.randn(shape)
    found = convert(model, (x,), fold=fold)
    dense, sparse = in_turns([lambda: model(x), lambda: found.model(x)], rounds)
    row = {"model": name, "fold": fold, "layers": len(found.choices), "sparse_layers": len(found.chosen)}
    row |= {"dense_seconds": dense, "sparse_seconds": sparse, "slower_percent": 100 * (sparse / dense - 1)}
    print(torch.get_num_threads(), row, flush=True)
    return row


def main() -> None:
    given = threads.options(__doc__, 21, model={"nargs": "+", "default": list(MODELS), "choices": list(MODELS)})
    with torch.no_grad():
        threads.measured(RESULTS, given, lambda: [measured(n, fold, given.rounds) for n in given.model for fold in (False, True)], zeros=ZEROS)


if __name__ == "__main__":
    main()
