"""`python -m benchmarks.decode [--threads 1 2] [--rounds 15] [--layers 16]`: one token of a language model of a billion parameters, bfloat16.

The shape of Llama-3.2-1B (2,048 wide, 16 layers, 32 heads of 64 with 8 for keys and values, 8,192 in the middle) with random weights and a cache
of 128 tokens; the table of tokens is small, since its product is the same dense and sparse. Dense is torch in bfloat16, as it lies and with
torch.compile; sparse is `runtime.convert` at 50, 70 and 90 % of zeros. In turns in one process; `results/decode.json` has medians in seconds.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks import threads
from secateur.runtime import convert
from secateur.runtime.convert import in_turns

RESULTS = Path(__file__).parent / "results" / "decode.json"
ZEROS = (0.5, 0.7, 0.9)
WIDTH, MIDDLE, HEADS, PAIRS, PAST = 2048, 8192, 32, 8, 128
AIM = {0.7: 1.8}


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        size = WIDTH // HEADS
        self.q, self.k, self.v, self.o = (nn.Linear(WIDTH, n, bias=False) for n in (WIDTH, PAIRS * size, PAIRS * size, WIDTH))
        self.gate, self.up = (nn.Linear(WIDTH, MIDDLE, bias=False) for _ in range(2))
        self.down = nn.Linear(MIDDLE, WIDTH, bias=False)
        self.one, self.two = nn.RMSNorm(WIDTH), nn.RMSNorm(WIDTH)
        self.register_buffer("past", torch.randn(2, 1, PAIRS, PAST, size), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        y = self.one(x)
        q, k, v = (f(y).view(1, 1, -1, WIDTH // HEADS).transpose(1, 2) for f in (self.q, self.k, self.v))
        keys, values = (torch.cat([old, new], 2) for old, new in zip(self.past, (k, v), strict=True))
        x = x + self.o(F.scaled_dot_product_attention(q, keys, values, enable_gqa=True).transpose(1, 2).flatten(2))
        y = self.two(x)
        return x + self.down(F.silu(self.gate(y)) * self.up(y))


def zeroed(model: nn.Module, zeros: float) -> nn.Module:
    """In place: more zeros in every layer."""
    with torch.no_grad():
        for m in model.modules():
            if isinstance(m, nn.Linear):
                m.weight.mul_(torch.rand(m.weight.shape) >= zeros)
    return model


def measured(layers: int, rounds: int, shares: list[float]) -> list[dict[str, Any]]:
    torch.manual_seed(0)
    dense = nn.Sequential(*(Block() for _ in range(layers))).to(torch.bfloat16).eval()
    x = torch.randn(1, 1, WIDTH, dtype=torch.bfloat16)
    parameters = sum(p.numel() for p in dense.parameters())
    compiled = torch.compile(dense)
    rows = []
    for zeros in shares:  # one sparse model in memory at a time
        model = nn.Sequential(*(Block() for _ in range(layers))).to(torch.bfloat16).eval()
        found = convert(zeroed(model, zeros), (x,), rounds=5)
        del model
        calls: dict[str, Callable[[], Any]] = {"torch": lambda: dense(x), "torch.compile": lambda: compiled(x), "sparse": lambda m=found.model: m(x)}  # type: ignore[misc]
        times = dict(zip(calls, in_turns(list(calls.values()), rounds), strict=True))
        best = min(times["torch"], times["torch.compile"])
        rows.append({"zeros": zeros, "parameters": parameters, "seconds": times, "speedup": best / times["sparse"], "aim": AIM.get(zeros),
                     "sparse_layers": len(found.chosen), "layers": len(found.choices)})  # fmt: skip
        print(rows[-1], flush=True)
    return rows


def main() -> None:
    given = threads.options(__doc__, 15, layers={"type": int, "default": 16}, zeros={"nargs": "+", "type": float, "default": list(ZEROS)})
    with torch.no_grad():
        threads.measured(RESULTS, given, lambda: measured(given.layers, given.rounds, given.zeros))


if __name__ == "__main__":
    main()
