"""The predicted graph: the captured one with its constants rewritten and its tensors cut.

It is the yardstick for the cut module (op by op) and, where the module's own Python cannot follow, what is handed
back: a trainable, exportable `torch.fx.GraphModule`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import fx, nn
from torch.utils._pytree import tree_leaves

from secateur.axes import Axis, mask
from secateur.surgery.batch import free_the_batch
from secateur.surgery.constants import changes
from secateur.surgery.fixed import hold_inputs
from secateur.surgery.rewritten import Rewritten, called_with, hide, unregister
from secateur.trace import Graph
from secateur.trace.blocks import bypassed, copied, live
from secateur.trace.call import Call, op_name

Keep = Mapping[Axis, np.ndarray]


@dataclass
class Change:
    """One constant of the graph that takes a new value."""

    node: fx.Node
    name: str
    old: Any
    new: Any


@dataclass
class Prediction:
    """The cut graph: a plain callable module, the constants that changed, and index tensors that were renumbered."""

    module: fx.GraphModule
    changed: list[Change] = field(default_factory=list)
    indices: dict[str, torch.Tensor] = field(default_factory=dict)  # state name of an index buffer -> new value
    nodes: dict[fx.Node, fx.Node] = field(default_factory=dict)  # of the captured graph -> of the cut one


def cut_tensor(tensor: torch.Tensor, dims, keep: Keep) -> torch.Tensor:
    """The kept positions of every dimension, as a tensor of its own."""
    out = tensor.detach()
    for i, d in enumerate(dims):
        kept = mask(d, keep)
        if not kept.all():
            out = out.index_select(i, torch.from_numpy(np.flatnonzero(kept)).to(out.device))
    if out.dim() == 4 and out.layout == torch.strided and tensor.is_contiguous(memory_format=torch.channels_last) and not tensor.is_contiguous():
        out = out.contiguous(memory_format=torch.channels_last)
    return out.clone() if out.layout != torch.strided or out.data_ptr() == tensor.data_ptr() or out is tensor else out


def predict(
    graph: Graph, plan_keep: Mapping[str, torch.Tensor], state: Mapping[str, torch.Tensor], free_batch: bool = False
) -> Prediction:
    """Rewrite the captured graph for the kept units of `plan_keep`. `state` holds the dense tensors by state name. With
    `free_batch` sizes that count the batch are read off the first input instead of written down."""
    capture = graph.capture
    keep = graph.keep_axes(plan_keep)
    unused, bypass = graph.unused_tensors(plan_keep), bypassed(graph.removed_blocks(plan_keep))
    runs, copies = live(capture.graph, bypass), copied(capture.graph, bypass)
    result = Prediction(Rewritten({}, fx.Graph()))
    root = nn.Module()
    new = fx.Graph()
    env = result.nodes
    for node in capture.graph.nodes:
        if node.op == "placeholder" and node.name in capture.tensors:
            name = capture.tensors[node.name]
            name = capture.aliases.get(name, name)
            if name in unused:
                continue
            _attach(root, name, _cut_state(graph, name, keep, state))
            env[node] = new.get_attr(_attribute(name))
        elif node in bypass and node in runs:  # else it was within another one that goes
            stream = env[bypass[node]]
            env[node] = new.call_function(torch.ops.aten.clone.default, (stream,)) if node in copies else stream
        elif node.op == "call_function" and (op_name(node) == "_assert_tensor_metadata" or (bypass and node not in runs)):
            continue
        elif node.op == "call_function":
            env[node] = _rewrite(graph, node, new, env, keep, result, root)
        else:
            env[node] = new.node_copy(node, lambda n: env[n])
    spec = capture.program.call_spec
    if free_batch:
        free_the_batch(graph, new, env)
    hold_inputs(new, tree_leaves(capture.program.example_inputs))
    new.set_codegen(called_with(_argument_names(spec.in_spec), spec.in_spec, spec.out_spec))
    result.module = Rewritten(root, new)
    unregister(result.module, [_attribute(n) for n in capture.program.constants if n not in state])
    hide(result.module, [_attribute(n) for n in capture.program.constants if n in state])
    result.module.eval()
    return result


def _argument_names(in_spec) -> list[str]:
    """One name per positional argument, then the keyword names, as the pytree calling convention wants them."""
    positional, keywords = in_spec.child(0), in_spec.child(1)
    return [f"arg_{i}" for i in range(positional.num_children)] + list(keywords.context or [])


def _attribute(name: str) -> str:
    return name if "." in name or name.isidentifier() else f"constant_{name}"


def _cut_state(graph: Graph, name: str, keep: Keep, state: Mapping[str, torch.Tensor]) -> torch.Tensor:
    dense = state[name] if name in state else graph.capture.values[name]
    cut = cut_tensor(dense, graph.tensors[name], keep)
    if isinstance(dense, nn.Parameter) or name in graph.capture.trainable:
        return nn.Parameter(cut, requires_grad=cut.is_floating_point() and dense.requires_grad)
    return cut


def _attach(root: nn.Module, name: str, tensor: torch.Tensor) -> None:
    """Register `tensor` under its dotted state name, making plain modules on the way."""
    *path, leaf = _attribute(name).split(".")
    owner = root
    for part in path:
        child = owner._modules.get(part)
        if child is None:
            child = nn.Module()
            owner.add_module(part, child)
        owner = child
    if isinstance(tensor, nn.Parameter):
        owner.register_parameter(leaf, tensor)
    else:
        owner.register_buffer(leaf, tensor)


def _rewrite(graph: Graph, node: fx.Node, new: fx.Graph, env: dict, keep: Keep, result: Prediction, root: nn.Module):
    copy = new.node_copy(node, lambda n: env[n])
    if not hasattr(node.target, "_schema"):
        return copy
    c = Call(node, graph.env)
    found = changes(c, graph.env.get(node), keep)
    if "#index" in found:
        _renumber(graph, node, copy, found["#index"], result, root, new)
        return copy
    if "#op" in found:
        copy.target, copy.args, copy.kwargs = found["#op"], (copy.args[0], *found["#args"]), {}
        result.changed.append(Change(node, "split_sizes", None, list(found["#args"][0])))
        return copy
    for name, value in found.items():
        position = next(i for i, a in enumerate(node.target._schema.arguments) if a.name == name)
        if position < len(copy.args):
            copy.update_arg(position, value)
        else:
            copy.update_kwarg(name, value)
        result.changed.append(Change(node, name, c[name], value))
    return copy


def _renumber(graph: Graph, node: fx.Node, copy: fx.Node, index, result: Prediction, root: nn.Module, new: fx.Graph) -> None:
    d, kept_in, kept_out = index
    source = node.args[1][d] if isinstance(node.args[1], (list, tuple)) else node.args[2]
    order = _known(graph, source)
    rank = np.cumsum(kept_in) - 1
    fresh = torch.from_numpy(rank[np.where(order < 0, order + len(order), order)[kept_out]].copy())
    name = f"renumbered_{node.name}"
    root.register_buffer(name, fresh)
    with new.inserting_before(copy):
        constant = new.get_attr(name)
    if isinstance(node.args[1], (list, tuple)):
        copy.update_arg(1, [constant if i == d else v for i, v in enumerate(copy.args[1])])
    else:
        copy.update_arg(2, constant)
    if source.op == "placeholder":
        result.indices[graph.capture.tensors[source.name]] = fresh
    result.changed.append(Change(node, "index", None, None))


def _known(graph: Graph, node: fx.Node) -> np.ndarray:
    from secateur.trace.tracer import Tracer

    value = Tracer(graph.capture).known(node)
    assert value is not None, "an index that was constant when it was traced"
    return value
