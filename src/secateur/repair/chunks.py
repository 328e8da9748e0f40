"""Calibration data in chunks of one size, and the trace that fits them.

The captured graph has sizes of its example inputs written into it, so all chunks have the shapes of one trace.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_unflatten

from secateur.calibrate.batches import arriving, batches, no_rows, run, taken
from secateur.errors import CaptureError, DataError
from secateur.measure.run import batch_of, shapes
from secateur.processes import Fingerprint, check_data, of
from secateur.trace import Graph

ROWS = 2048  # of calibration at most
MEMORY = 4 * 2**30  # bytes that the values held by a repair may take: fewer rows of a large network
HELD = 6  # values as large as the largest that are held at once, in the dense and in the pruned flow
SIZE = 64  # rows of a chunk
FEWEST = 4  # chunks, where there are rows enough: some are for the fits, and the last one judges them

Call = tuple[tuple, dict[str, Any]]


@dataclass
class Chunks:
    """Chunks as (args, kwargs), the graph traced with the first of them, and what was left out."""

    graph: Graph
    feeds: list[Call]
    rows: int
    left_out: int


def chunks(
    data: Iterable[Any], graph: Graph, again: Callable[[tuple, Mapping], Graph], model: nn.Module | None = None, rows: int = ROWS, size: int = SIZE
) -> Chunks:
    """Read at most `rows` rows of data into chunks of `size` (smaller ones where that makes fewer than 4), and trace the model
    with one of them. Batches of other shapes than the first are left out, and counted.

    Args:
        data: as `secateur.calibrate.batches` reads it; labels are dropped. Processes that share it all have all chunks; who runs which
            is said by `Processes.mine`.
        graph: the trace that the plan is for; `again(args, kwargs)` traces the model with other inputs.
        model: runs once on every shape that occurs, so that data it cannot take is refused and not left out.

    Raises:
        DataError: no rows, a batch that the model cannot run, or the model has other groups on the data than on its example inputs.
        ProcessError: processes that share the data were not given the same.
    """
    args, kwargs = graph.program.example_inputs
    found, left_out, call = _rows(data, (args, kwargs), min(rows, fitting(graph)), model)
    if of(data).world > 1:
        seen = Fingerprint()
        seen.add(found)
        check_data(of(data), seen)
    n = min(size, max(1, len(found[0]) // FEWEST)) if found and len(found[0]) else 0
    if not n:
        raise DataError("there is no row of calibration data.\n  Give at least one batch.")
    count = len(found[0]) // n
    whole = [column[: count * n].split(n) for column in found]
    feeds: list[Call] = [call([c[i].clone() for c in whole]) for i in range(count)]
    alike = tree_flatten((args, kwargs))[1] == tree_flatten(feeds[0])[1]  # names and their order too
    same = alike and batch_of(args, kwargs) == n and shapes(args, kwargs) == shapes(*feeds[0])
    traced = graph if same else _traced(again, feeds[0], shapes(args, kwargs))
    if {k: g.size for k, g in traced.groups.items()} != {k: g.size for k, g in graph.groups.items()}:
        odd = sorted(set(traced.groups) ^ set(graph.groups)) or ["the sizes"]
        raise DataError(
            f"the model has other groups on the data ({shapes(*feeds[0])}) than on its example inputs ({shapes(args, kwargs)}); "
            f"they differ in {odd[0]!r}.\n  Give example inputs of the shapes of the data, with two rows or more."
        )
    return Chunks(traced, feeds, count * n, left_out + len(found[0]) - count * n)


def fitting(graph: Graph) -> int:
    """Rows whose values fit into `MEMORY`; a chunk's worth at least."""
    args, kwargs = graph.program.example_inputs
    values = [n.meta.get("val") for n in graph.capture.graph.nodes if n.op == "call_function"]
    largest = max((v.numel() * v.element_size() for v in values if isinstance(v, Tensor)), default=1)
    return max(SIZE, MEMORY * max(1, batch_of(args, kwargs)) // (HELD * max(1, largest)))


def _traced(again: Callable[[tuple, Mapping], Graph], feed: Call, example: str) -> Graph:
    try:
        return again(*feed)
    except CaptureError as error:
        said = next((line.strip() for line in str(error).splitlines() if "Error:" in line), str(error).splitlines()[0])
        raise DataError(
            f"data of {shapes(*feed)} cannot be traced; the example inputs are {example}. {said}\n"
            "  Pass batches like the example inputs: of the same shapes but for the number of rows, and in the model's dtype."
        ) from error


def _rows(data: Iterable[Any], example: tuple[tuple, Mapping], most: int, model: nn.Module | None) -> tuple[list[Tensor], int, Any]:
    """Every input tensor over all rows taken, the number of rows with other shapes, and what makes a call of some of their rows."""
    args, kwargs = example
    seen: list = []
    columns: list[list[Tensor]] = []
    kind: Any = None
    spec: Any = None
    rest: list = []  # of a call: what is no tensor
    rows = left_out = 0
    for number, (found, named) in enumerate(batches(arriving(data), args, kwargs), 1):
        named = taken(named, kwargs)
        leaves, this = tree_flatten((found, named))
        n = batch_of(found, named)
        if n == 0:
            raise no_rows(number, found, named)
        tensors, others = [t for t in leaves if isinstance(t, Tensor)], [Tensor if isinstance(t, Tensor) else t for t in leaves]
        shape = (shapes_after_rows(leaves), repr(others))
        if model is not None and shape not in seen:
            seen.append(shape)
            run(model, number, found, named)
        if not all(t.dim() and t.shape[0] == n for t in tensors):
            raise DataError(
                f"an input of {shapes(found, named)} has no row for each of the {n} samples, so it cannot be split.\n"
                "  Give inputs whose first dimension is the batch, or rank by the weights alone: prune(score='l2'), sparsify() without data."
            )
        if any(bool(t.isnan().any()) for t in tensors if t.is_floating_point()):
            raise DataError(f"batch {number} of data, {shapes(found, named)}, holds NaN.\n  Leave such rows out.")
        kind = kind or shape
        if shape != kind or (spec is not None and this != spec):
            left_out += n
            continue
        spec, rest = this, others
        columns = columns or [[] for _ in tensors]
        for column, t in zip(columns, tensors, strict=True):
            column.append(t.detach()[: most - rows])
        rows += min(n, most - rows)
        if rows >= most:
            break

    def call(own: list[Tensor]) -> Call:
        left = iter(own)
        return tree_unflatten([next(left) if t is Tensor else t for t in rest], spec)

    return [torch.cat(c) for c in columns], left_out, call


def shapes_after_rows(leaves: list) -> list:
    """Shape without the batch, and dtype, of every tensor."""
    return [(t.shape[1:], t.dtype) for t in leaves if isinstance(t, Tensor)]
