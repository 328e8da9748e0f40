"""Repaired tensors of the dense shapes, put into a model that is already cut."""

from __future__ import annotations

import copy
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from secateur.measure.proof import Proof, prove
from secateur.repair.batch_norm import Dense
from secateur.surgery.cut import state_of
from secateur.surgery.predict import cut_tensor
from secateur.trace import Graph


def changed(model: nn.Module, graph: Graph, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of `state` that are not the model's own any more."""
    own = state_of(model)
    return {n: v for n, v in state.items() if n in own and n in graph.tensors and not torch.equal(own[n].detach(), v.to(own[n].dtype))}


def put_into(cut_model: nn.Module, graph: Graph, keep: Mapping[str, Tensor], new: Mapping[str, Tensor]) -> None:
    """Copy the kept positions of `new` into the cut model, in place; tensors that it no longer has are passed over."""
    by_axis, have = graph.keep_axes(keep), state_of(cut_model)
    with torch.no_grad():
        for name, value in new.items():
            if name in have:
                have[name].copy_(cut_tensor(value, graph.tensors[name], by_axis))


def like_dense(model: nn.Module | None, graph: Graph, keep: Mapping[str, Tensor]) -> Dense | None:
    """The dense model, where it is known, as statistics go by it."""
    if model is None:
        return None
    by_axis = graph.keep_axes(keep)
    return Dense(model, lambda name, values: cut_tensor(values, graph.tensors[name], by_axis) if name in graph.tensors else values)


def proven(model: nn.Module, graph: Graph, keep: Mapping[str, Tensor], cut_model: nn.Module, new: Mapping[str, Tensor]) -> Proof:
    """The repaired cut model against the masked original with the same repaired tensors."""
    dense = copy.deepcopy(model)
    have = state_of(dense)
    with torch.no_grad():
        for name, value in new.items():
            have[name].copy_(value)
    return prove(dense, graph, keep, cut_model)
