"""What a graph took in as fixed when it was captured, and says so when it is given something else."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any

import torch
from torch import fx

_PLAIN = (bool, int, float, str, type(None))


def hold_inputs(graph: fx.Graph, values: Sequence[Any]) -> None:
    """An assertion for every input that is no tensor: its value is written into the graph, which would go on with it whatever is passed.

    Args:
        values: of the captured call, flat, one for each placeholder.
    """
    places = [n for n in graph.nodes if n.op == "placeholder"]
    if not places:
        return
    with graph.inserting_after(places[-1]):
        for place, value in reversed(list(zip(places, values, strict=True))):
            if isinstance(value, _PLAIN) and value == value and not place.users:  # NaN is no value to compare with
                _held(graph, operator.is_ if value is None else operator.eq, place, value, f"{place.name} was {value!r}")


def hold_batch(graph: fx.Graph, size: int) -> None:
    """An assertion that the first input that is a tensor has `size` rows, after all placeholders."""
    places = [n for n in graph.nodes if n.op == "placeholder"]
    first = next(n for n in places if isinstance(n.meta.get("val"), torch.Tensor) and n.meta["val"].dim())
    with graph.inserting_after(places[-1]):
        rows = graph.call_function(torch.ops.aten.sym_size.int, (first, 0))
    with graph.inserting_after(rows):
        _held(graph, operator.eq, rows, size, f"the batch size was {size}")


def _held(graph: fx.Graph, same: Any, node: fx.Node, value: Any, said: str) -> None:
    right = graph.call_function(same, (node, value))
    with graph.inserting_after(right):
        graph.call_function(torch._assert, (right, f"{said} when this graph was captured, and is a part of it: prune the model as called otherwise"))
