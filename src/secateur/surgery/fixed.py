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


def hold_sizes(graph: fx.Graph, places: Sequence[tuple[int, int]], inputs: Sequence[Any], rows: Sequence[tuple[int, int]]) -> list[str]:
    """An assertion for every one of these dimensions, after all placeholders: it is as long as that of the inputs.

    Args:
        places: number of the input, dimension.
        inputs: of the captured call, flat, one for each placeholder.
        rows: those of the places that count the batch.

    Returns:
        What is held, in words.
    """
    nodes, said = [n for n in graph.nodes if n.op == "placeholder"], []
    for number, dim in reversed(places):
        node, size = nodes[number], int(inputs[number].shape[dim])
        what = f"the batch size was {size} (of {node.name})" if (number, dim) in rows else f"{node.name} had size {size} in dimension {dim}"
        with graph.inserting_after(nodes[-1]):
            found = graph.call_function(torch.ops.aten.sym_size.int, (node, dim))
        with graph.inserting_after(found):
            _held(graph, operator.eq, found, size, what, "with an example of the size that you need")
        said.append(f"{size} in dimension {dim} of {node.name}")
    return said[::-1]


def _held(graph: fx.Graph, same: Any, node: fx.Node, value: Any, said: str, how: str = "as called otherwise") -> None:
    right = graph.call_function(same, (node, value))
    with graph.inserting_after(right):
        graph.call_function(torch._assert, (right, f"{said} when this graph was captured, and is a part of it: prune the model {how}"))
