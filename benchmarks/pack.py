"""Bytes on disk of packed weights beside dense ones, the theory and the entropy bound; and how long each file takes to load.

    python -m benchmarks.pack            # writes benchmarks/results/pack.json and prints its table

Weights are normal without their sign, their places drawn at random: exactly such a share of all of them, of every four, or of blocks of
4 outputs x 1 input. Sizes are those of whole safetensors files. Times are medians of interleaved rounds in one process on one thread, files
in the page cache, until every tensor is in memory of its own. Dense files are read as `load_file` does and copied, as loading a model does.
"""

from __future__ import annotations

import json
import platform
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from secateur.pack import read_archive, theory, write_archive
from secateur.pack.archive import KEY

RESULTS = Path(__file__).parent / "results" / "pack.json"
SHAPES = ((4096, 4096), (512, 512, 3, 3))
DTYPES = (torch.float32, torch.bfloat16)
PATTERNS = (0.5, 0.7, 0.8, 0.9, 0.95, "2:4", "4x1")  # a number: the share of zeros; blocks have 90 %
ROUNDS = 11


@dataclass(frozen=True)
class Row:
    """Bytes of the files, `dense` and `packed`, and by the books `bitmask`, `index`, `entropy`; milliseconds to load either.

    `theory` is packed / the smaller of bitmask and index; for 2:4 and blocks their own: one code of 3 bits for four weights, one bit a block.
    `slower` is the median over rounds of the time for packed / that for dense.
    """

    shape: list[int]
    dtype: str
    pattern: str
    deflate: bool
    layout: str
    dense: int
    packed: int
    bitmask: int
    index: int
    entropy: int
    smaller: float
    theory: float
    of_entropy: float
    ms_dense: float
    ms_packed: float
    slower: float


def mask(shape: tuple[int, ...], pattern: float | str, draw: torch.Generator) -> Tensor:
    """True stays: bool of that shape."""
    size = torch.Size(shape).numel()
    if pattern == "2:4":
        rows, columns, *kernel = shape
        groups = torch.rand(rows, columns // 4, 4, *kernel, generator=draw)
        return (groups.argsort(2).argsort(2) < 2).reshape(shape)
    units = size // 4 if pattern == "4x1" else size
    share = 0.9 if pattern == "4x1" else float(pattern)
    flat = torch.zeros(units, dtype=torch.bool)
    flat[torch.randperm(units, generator=draw)[: round(units * (1 - share))]] = True
    return flat.reshape(shape) if pattern != "4x1" else flat.reshape(shape[0] // 4, *shape[1:]).repeat_interleave(4, 0)


def measured(shape: tuple[int, ...], dtype: torch.dtype, pattern: float | str, deflate: bool, folder: Path) -> Row:
    draw = torch.Generator().manual_seed(0)
    stays = mask(shape, pattern, draw)
    weight = torch.where(stays, torch.randn(shape, generator=draw).abs_().clamp_(min=1e-3), torch.zeros(())).to(dtype)
    dense, packed = folder / "dense.safetensors", folder / "packed.safetensors"
    save_file({"weight": weight}, dense)
    write_archive({"weight": weight}, packed, {"weight"}, deflate)
    if not torch.equal(read_archive(packed)["weight"], weight):
        raise AssertionError("the packed tensor is another one")
    books = theory(weight.numel(), int(stays.sum()), weight.element_size())
    values = int(stays.sum()) * weight.element_size()
    own = {"2:4": values + weight.numel() * 3 / 32, "4x1": values + weight.numel() / 32}.get(str(pattern), min(books.bitmask, books.index))
    times = rounds({"dense": lambda: {k: t.clone() for k, t in load_file(dense).items()}, "packed": lambda: read_archive(packed)})
    bytes_of = {"dense": dense.stat().st_size, "packed": packed.stat().st_size}
    return Row(
        list(shape), str(dtype).removeprefix("torch."), str(pattern), deflate, layout(packed), bytes_of["dense"], bytes_of["packed"],
        round(books.bitmask), round(books.index), round(books.entropy),
        smaller=round(bytes_of["dense"] / bytes_of["packed"], 3), theory=round(bytes_of["packed"] / own, 4),
        of_entropy=round(bytes_of["packed"] / books.entropy, 4),
        ms_dense=round(1e3 * statistics.median(times["dense"]), 2), ms_packed=round(1e3 * statistics.median(times["packed"]), 2),
        slower=round(statistics.median(p / d for p, d in zip(times["packed"], times["dense"], strict=True)), 2),
    )  # fmt: skip


def layout(path: Path) -> str:
    with safe_open(path, "pt") as held:
        said = (held.metadata() or {}).get(KEY)
    header = json.loads(said)["tensors"]["weight"] if said else {"layout": "dense"}
    return header["layout"] + (" deflated" if "deflated" in header else "")


def rounds(calls: dict[str, Callable[[], object]]) -> dict[str, list[float]]:
    """Seconds of each call in each round, one after the other, the first round left out."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(ROUNDS + 1):
        for name, call in calls.items():
            start = time.perf_counter()
            held = call()
            times[name].append(time.perf_counter() - start)
            del held
    return {name: found[1:] for name, found in times.items()}


def table(rows: list[Row]) -> str:
    lines = ["| weight | dtype | pattern | layout | dense MB | packed MB | smaller | of theory | of entropy bound | load ms dense / packed |",
             "| --- | --- | --- | --- | --: | --: | --: | --: | --: | --: |"]  # fmt: skip
    for r in rows:
        name = f"{float(r.pattern):.0%}" if r.pattern[0] == "0" else r.pattern
        lines.append(f"| {'x'.join(map(str, r.shape))} | {r.dtype} | {name} | {r.layout} | {r.dense / 1e6:.2f} | {r.packed / 1e6:.2f} | "
                     f"{r.smaller:.2f} | {r.theory:.3f} | {r.of_entropy:.3f} | {r.ms_dense:.1f} / {r.ms_packed:.1f} |")  # fmt: skip
    return "\n".join(lines)


def main() -> None:
    torch.set_num_threads(1)
    rows = list[Row]()
    with tempfile.TemporaryDirectory() as place:
        for shape in SHAPES:
            for dtype in DTYPES:
                for pattern in PATTERNS:
                    rows += [measured(shape, dtype, pattern, deflate, Path(place)) for deflate in (False, True)]
    found = {"torch": torch.__version__, "python": platform.python_version(), "machine": platform.machine(), "rounds": ROUNDS,
             "rows": [asdict(row) for row in rows]}  # fmt: skip
    RESULTS.write_text(json.dumps(found, indent=1) + "\n")
    print(table(rows))


if __name__ == "__main__":
    main()
