"""What is handed back where the class cannot follow: a graph that takes any size that it is right with, and says so at others."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import fx, nn
from torch.utils._pytree import TreeSpec, tree_leaves

from secateur.measure.run import batch_of
from secateur.plan import Plan
from secateur.surgery.batch import batch_is_free
from secateur.surgery.fixed import hold_sizes
from secateur.surgery.predict import predict
from secateur.surgery.sizes import held_sizes, rows_of
from secateur.trace import Graph


def handed_back(model: nn.Module, graph: Graph, plan: Plan, state: Mapping[str, torch.Tensor], fixed: fx.GraphModule) -> tuple[nn.Module, list[str]]:
    """The rewritten graph, which refuses the sizes that it would go wrong with, and notes on what it takes.

    Args:
        model: the dense model, as its trace `graph` has it; `state`: its tensors by name.
        fixed: the rewritten graph with all sizes of the example inputs in it.
    """
    args, kwargs = graph.capture.program.example_inputs
    everything = {n: torch.ones(g.size, dtype=torch.bool) for n, g in graph.groups.items()}
    rows, one = rows_of(args, kwargs), batch_of(args, kwargs) == 1
    made = predict(graph, plan.keep, state, free_batch=True).module
    refused = "" if one else batch_is_free(made, fixed, args, kwargs)
    for free in (True, False) if one else (not refused,):  # of one row it is only a guess what counts it
        held = set(held_sizes(model, predict(graph, everything, state, free_batch=free).module, args, kwargs))
        made = made if free else fixed
        if held.isdisjoint(rows):
            break
    if refused or not held.isdisjoint(rows):
        refused = refused or ("trace with a batch of two or more to free it" if one else "at another one the model does something else")
        made = fixed
        held.update(rows)
    leaves = tree_leaves((args, dict(kwargs)))
    said = hold_sizes(made.graph, sorted(held), leaves, rows)
    made.recompile()
    notes = [f"the rewritten graph takes only the batch size of the example inputs: {refused}"] if refused else []
    if said := [words for place, words in zip(sorted(held), said, strict=True) if place not in rows]:
        notes.append(f"the rewritten graph takes only these sizes of the example inputs, which are a part of it: {', '.join(said)}")
    return made, notes + _numbers(graph)


def _numbers(graph: Graph) -> list[str]:
    """A note on outputs that are numbers: they were written down."""
    spec = graph.capture.program.call_spec.out_spec
    output = next(n for n in reversed(graph.capture.graph.nodes) if n.op == "output")
    values = tree_leaves(output.args[0])[-spec.num_leaves :] if spec.num_leaves else []
    found = [f"{where or 'the output'} = {v}" for where, v in zip(_leaves(spec), values, strict=True) if isinstance(v, (int, float))]
    if not found:
        return []
    more = f" and {len(found) - 4} more" if len(found) > 4 else ""
    return [f"outputs that are numbers and no tensors stay those of the model with the example inputs: {', '.join(found[:4])}{more}"]


def _leaves(spec: TreeSpec, where: str = "") -> list[str]:
    """How one reaches each leaf, as it is written in Python."""
    if spec.is_leaf():
        return [where]
    keys = spec.context if spec.type is dict else range(spec.num_children)
    return [leaf for key, child in zip(keys, spec.children(), strict=True) for leaf in _leaves(child, f"{where}[{key!r}]")]
