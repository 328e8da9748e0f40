"""Whole branches fitted again after their layers were fitted one by one: from a `Repair` to `gauss_newton` and back."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import fx

from secateur.repair.branch import LAYERS, Branch, Narrow, find_branch
from secateur.repair.fit import LayerRepair
from secateur.repair.gauss_newton import BranchFit, Member, gauss_newton
from secateur.repair.layers import Layer, norm_names

if TYPE_CHECKING:
    from secateur.repair.flow import Flow
    from secateur.repair.least_squares import Repair

USED = "gauss-newton"
FEW = 12  # branches up to which each is fitted, however much it overlaps with others


@dataclass(frozen=True)
class Waiting:
    """A branch whose layers are not all fitted yet; `last` names it."""

    branch: Branch
    last: Layer

    def asked(self, repair: Repair) -> list[tuple[Flow, fx.Node]]:
        return [(repair.dense, self.branch.end), *((repair.pruned, n) for n in self.branch.boundary)]


def branches(repair: Repair) -> list[Waiting]:
    """The branches worth fitting: those inside of which units went, one for each end."""
    by_node = {x.node: x for x in repair.layers}
    found: dict[fx.Node, Waiting] = {}
    for layer in repair.layers:
        if layer.why_not:
            continue
        end = repair.targets[layer.node].join or layer.end
        branch = find_branch(repair.pruned, end, by_node)
        if branch is None or not all(repair.state[x.weight].dtype in (torch.float32, torch.float64) for x in branch.layers):
            continue
        if any(not bool(repair.masks(x)[1].all()) for x in branch.layers if x is not layer):
            found[end] = Waiting(branch, layer)
    return _spread(list(found.values()))


def _spread(found: list[Waiting]) -> list[Waiting]:
    """All branches of a small network. Of a large one, those of overlapping branches that bring half of `LAYERS` with them, and the
    last: a layer is fitted once or twice."""
    if len(found) <= FEW:
        return found
    chosen: list[Waiting] = []
    for w in found:
        before = {x.node for c in chosen for x in c.branch.layers}
        new = [x for x in w.branch.layers if x.node not in before]
        if 2 * len(new) >= LAYERS or w is found[-1]:
            chosen.append(w)
    return chosen


def refit(repair: Repair, waiting: Waiting, rectified: bool) -> None:
    """Fit a branch as one, where that helps on held-out chunks; writes the weights and the values."""
    branch = waiting.branch
    narrow = Narrow(repair.pruned, branch, repair.keep)
    members = [member(repair, narrow, x) for x in branch.layers]
    dims = repair.graph.env[branch.end]
    processes, some = repair.processes, next(iter(repair.own), 0)
    fit = BranchFit(
        narrow, members, lambda c: narrow.cut(repair.dense.value(c, branch.end), dims), rectified, repair.settings.ridge, processes, some
    )
    held = [c for c in range(repair.chunks) if repair.is_held_out(c)]
    fitting = [c for c in range(repair.chunks) if c not in held]
    random, why = torch.Generator().manual_seed(repair.settings.seed), ""
    try:
        weights, before, after = gauss_newton(fit, fitting, held, random)
        if after == before:
            n = fit.chunks_for(fit.wanted(some).numel(), len(fitting))
            too_many = f"{fit.unknowns:,} weights are too many to be fitted as a whole to this data"
            why = "as a whole it is no better on held-out rows" if n else too_many
    except RuntimeError as error:  # an op without a derivative: what its layers gave one by one stays
        weights, before = {}, fit.error(held, fit.start())
        after, why = before, f"it cannot be fitted as a whole: {str(error).splitlines()[0]}"
    variance = fit.summed(held, lambda c: (fit.wanted(c) - fit.wanted(c).mean(0, keepdim=True)).square().sum()) or 1.0
    better = after < before
    if better:
        repair.state.update({n: narrow.spread(n, w) for n, w in weights.items()})
        repair.settle(*weights)
        for chunk in repair.own:
            repair.pruned.run_again(chunk, branch.nodes, branch.boundary)
    name = f"{waiting.last.name} (branch of {len(members)} layers)"
    rows = repair.samples * waiting.last.places
    before, after = before / variance, after / variance
    repair.rows.append(LayerRepair(name, rows, before, before, after, USED if better else "least squares", why, len(members)))


def member(repair: Repair, narrow: Narrow, layer: Layer) -> Member:
    """A layer of a branch with as many groups as stay; the bias of a batch norm behind it is its own."""
    bias = norm_names(repair.graph, layer.norm)["bias"] if layer.norm else layer.bias
    return Member(replace(layer, groups=narrow.layer_groups(layer)), bias)
