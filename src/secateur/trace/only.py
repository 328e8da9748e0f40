"""Which groups may lose units, where not all may."""

from __future__ import annotations

from collections.abc import Sequence
from fnmatch import fnmatchcase

from secateur.errors import InputError
from secateur.trace.graph import Graph, Group
from secateur.trace.tracer import prefixes

NEURONS = "neurons"


def named(graph: Graph, only: Sequence[str]) -> set[str]:
    """The groups and residual blocks that `only` names: patterns of groups or of the modules that make them, or "neurons".

    Raises:
        InputError: it names none.
    """
    every = [*graph.groups, *graph.blocks]
    found = {n for n in every for p in [n.partition(":")[0], *prefixes(n)] if any(fnmatchcase(p, one) for one in only)}
    if NEURONS in only:
        found |= set(neurons(graph))
    if not found:
        what = "hidden units of linear layers that one layer reads" if list(only) == [NEURONS] else f"a group named by {', '.join(only)}"
        raise InputError(
            f"only={list(only)!r}: of the {len(every)} groups of this model ({', '.join(every[:3])} ...) none is {what}.\n"
            "  `secateur inspect MODEL` lists the groups; leave `only` out, and all of them may lose units."
        )
    return found


def neurons(graph: Graph) -> list[str]:
    """The groups that are hidden units of linear layers: one layer reads them (or alone makes them), and nothing else than linear layers and
    vectors holds them. Filters, heads and residual streams are none."""
    return [name for name, group in graph.groups.items() if _is_hidden(graph, group)]


def _is_hidden(graph: Graph, group: Group) -> bool:
    sides: tuple[list[str], list[str]] = ([], [])
    for slot in group.slots:
        dims = graph.tensors[slot.tensor]
        whole = slot.positions.shape[1] == 1 and len(dims) <= 2
        if not whole or dims[slot.dim].size != group.size:
            return False
        if len(dims) == 2:
            sides[slot.dim].append(slot.tensor)
    return group.kind == "channel" and all(sides) and min(map(len, sides)) == 1
