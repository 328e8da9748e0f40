"""`python -m benchmarks.sparse_models [--threads 1 2] [--rounds 9] [--model NAME ...]`: whole networks with sparse layers, beside dense ones.

Dense: torch (as it lies, and channels last), torch.compile, ONNX Runtime, each with everything it can fuse. Sparse: `runtime.convert(fold=True)`
of the same network with zeros drawn at random, single weights and blocks of 4 outputs, at 90 %, called from Python and compiled by AOTInductor.
All ways are timed in turns in one process.
`results/sparse_models.json` has medians in seconds. What is timed does not depend on what the weights are, so they are random, but for ResNet-56.
"""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks import threads
from benchmarks.kernels import onnx_way, pause, pruned
from secateur.models.vision import import_torchvision
from secateur.runtime import convert
from secateur.runtime.convert import in_turns

RESULTS = Path(__file__).parent / "results" / "sparse_models.json"
ZEROS = 0.9
PATTERNS = {"single": 1, "4x1": 4}
AIMS = {"resnet50": {"single": 2.2, "4x1": 3.5}, "resnet56": {"single": 2.2, "4x1": 3.5}, "bert-base, 128 tokens": {"4x1": 4.0}}


def resnet50() -> tuple[nn.Module, tuple[int, ...]]:
    import_torchvision()
    import timm

    return timm.create_model("resnet50", zero_init_last=False), (1, 3, 224, 224)


def resnet56() -> tuple[nn.Module, tuple[int, ...]]:
    from benchmarks.no_training.tasks import TASKS

    return TASKS["resnet56"].dense(), (1, 3, 32, 32)


class Block(nn.Module):
    """A layer of BERT-base: 768 wide, 12 heads, 3,072 in the middle."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.o = (nn.Linear(768, 768) for _ in range(4))
        self.up, self.down, self.one, self.two = nn.Linear(768, 3072), nn.Linear(3072, 768), nn.LayerNorm(768), nn.LayerNorm(768)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (f(x).view(1, -1, 12, 64).transpose(1, 2) for f in (self.q, self.k, self.v))
        y = nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        x = self.one(x + self.o(y))
        return self.two(x + self.down(nn.functional.gelu(self.up(x))))


def bert() -> tuple[nn.Module, tuple[int, ...]]:
    return nn.Sequential(*(Block() for _ in range(12))), (1, 128, 768)


MODELS: dict[str, Callable[[], tuple[nn.Module, tuple[int, ...]]]] = {"resnet56": resnet56, "resnet50": resnet50, "bert-base, 128 tokens": bert}


def masked(model: nn.Module, r: int) -> nn.Module:
    """A copy with 90 % zeros in every layer of 64 inputs or more."""
    model = copy.deepcopy(model)
    for m in model.modules():
        if isinstance(m, (nn.Conv2d, nn.Linear)) and getattr(m, "groups", 1) == 1 and m.weight[0].numel() >= 64 and len(m.weight) % r == 0:
            pruned(m, ZEROS, r)
    return model


def aot_way(model: nn.Module, x: Tensor) -> Callable[[], Any]:
    """Compiled ahead of time, as a program without Python would load it."""
    with tempfile.TemporaryDirectory() as folder:
        path = torch._inductor.aoti_compile_and_package(torch.export.export(model, (x,)), package_path=f"{folder}/model.pt2")
        runner = torch._inductor.aoti_load_package(path)
    return lambda: runner(x)


def measured(name: str, rounds: int) -> list[dict[str, Any]]:
    torch.manual_seed(0)
    model, shape = MODELS[name]()
    model, x = model.eval(), torch.randn(shape)
    calls: dict[str, Callable[[], Any]] = {"torch": lambda: model(x)}
    if x.dim() == 4:
        turned, there = copy.deepcopy(model).to(memory_format=torch.channels_last), x.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        calls["torch, channels last"] = lambda: turned(there)
    compiled = torch.compile(model)
    calls |= {"torch.compile": lambda: compiled(x), "ONNX Runtime": onnx_way(model, x), "pause": pause}
    facts = {}
    for pattern, r in PATTERNS.items():
        found = convert(masked(model, r), (x,), fold=True)
        facts[pattern] = {"layers": len(found.choices), "sparse_layers": len(found.chosen), "notes": found.notes}
        calls[pattern] = lambda m=found.model: m(x)  # type: ignore[misc]
        calls[f"{pattern}, AOTInductor"] = aot_way(found.model, x)
    times = dict(zip(calls, in_turns(list(calls.values()), rounds), strict=True))
    times.pop("pause")
    kinds = {way: way.partition(",")[0] for way in times}
    best = min((t, way) for way, t in times.items() if kinds[way] not in PATTERNS)
    rows = [{"model": name, "way": way, "seconds": t, **facts.get(way, {})} for way, t in times.items()]
    for row in rows:
        if kinds[row["way"]] in PATTERNS:
            row |= {"zeros": ZEROS, "speedup": best[0] / row["seconds"], "over": best[1], "aim": AIMS[name].get(kinds[row["way"]])}
            print(row, flush=True)
    return rows


def main() -> None:
    given = threads.options(__doc__, 9, model={"nargs": "+", "default": list(MODELS), "choices": list(MODELS)})
    with torch.no_grad():
        threads.measured(RESULTS, given, lambda: [row for name in given.model for row in measured(name, given.rounds)])


if __name__ == "__main__":
    main()
