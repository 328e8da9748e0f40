"""What every structure case is made of, and how a case is compared with its hand-written reference.

A case is an `nn.Module` class with four extra names:

- `units`: logical unit name -> `Unit`, declared by hand: which positions of which tensor dimension each unit owns;
- `fixed`: (tensor name, dim) pairs no group may touch;
- `example()`: positional and keyword inputs (default: random tensors of `shapes`);
- `reference(keep, *args, **kwargs)`: straight tensor code for the network without the units whose mask is False.

Nothing in a reference, and nothing in this file up to `logical_keep`, uses secateur.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

Sets = tuple[frozenset[int], ...]


@dataclass(frozen=True)
class Unit:
    """Units of one logical axis: unit i owns the positions `sets[i]` of `tensor` along `dim`."""

    tensor: str
    dim: int
    sets: Sets
    must: bool = True  # False: freezing this axis is a legal answer too

    @property
    def size(self) -> int:
        return len(self.sets)


def prod(shape: Sequence[int], axis: int, start: int = 0) -> list[list[int]]:
    """Positions owned by each unit of factor `axis` in a row-major product of `shape`, shifted by `start`."""
    grid = torch.arange(math.prod(shape)).view(*shape) + start
    return grid.movedim(axis, 0).reshape(shape[axis], -1).tolist()


def span(start: int, stop: int) -> list[list[int]]:
    """One position per unit, from `start` to `stop`."""
    return [[i] for i in range(start, stop)]


def U(tensor: str, dim: int, what: int | Sequence[Sequence[int]], must: bool = True) -> Unit:
    """A `Unit` from a size (one position each) or from explicit position lists."""
    rows = span(0, what) if isinstance(what, int) else what
    return Unit(tensor, dim, tuple(frozenset(row) for row in rows), must)


class Case(nn.Module):
    """Base of every structure: sizes are tiny, values are random, everything is float64."""

    units: dict[str, Unit] = {}
    fixed: tuple[tuple[str, int], ...] = ()
    least = 1  # units a group must keep for the network to be defined at all
    shapes: tuple[tuple[int, ...], ...] = ((2, 6),)

    def example(self) -> tuple[tuple, dict]:
        generator = torch.Generator().manual_seed(7)
        args = tuple(torch.randn(shape, generator=generator, dtype=torch.float64) for shape in self.shapes)
        return args, {}


def build(case: type[Case], seed: int = 0) -> Case:
    """The case in float64, evaluation mode, with every parameter and running statistic distinct and random."""
    torch.manual_seed(seed)
    model = case().double().eval()
    with torch.no_grad():
        for name, value in list(model.named_parameters()) + list(model.named_buffers()):
            if name.endswith("running_var"):
                value.uniform_(0.5, 1.5)
            elif name.endswith("running_mean"):
                value.normal_(0, 0.5)
            elif isinstance(value, nn.Parameter):
                fan = max(1, value.numel() // value.shape[0]) if value.ndim > 1 else 4
                value.normal_(0, 1 / math.sqrt(fan))
                if value.ndim == 1 and name.endswith("weight"):
                    value.mul_(0.5).add_(1)
    return model


def everything(model: Case) -> dict[str, Tensor]:
    """The keep masks of a network nothing was cut from."""
    return {name: torch.ones(unit.size, dtype=torch.bool) for name, unit in model.units.items()}


def leaves(out: object) -> list[Tensor]:
    """The tensors of any nesting of lists, tuples and dicts, in order."""
    return [leaf for leaf in tree_leaves(out) if isinstance(leaf, Tensor)]


Gradients = tuple[list[Tensor], list[Tensor], dict[str, Tensor]]


def gradients(model: nn.Module, call, args: tuple, kwargs: dict) -> Gradients:
    """Outputs, input gradients and parameter gradients of a fixed random projection of the outputs of `call`."""
    args, kwargs = torch.utils._pytree.tree_map_only(
        Tensor, lambda t: t.clone().requires_grad_(t.is_floating_point()), (args, kwargs)
    )
    for parameter in model.parameters():
        parameter.requires_grad_(True)
    model.zero_grad(set_to_none=True)
    outs = leaves(call(*args, **kwargs))
    generator = torch.Generator().manual_seed(11)
    loss = sum((o * torch.randn(o.shape, generator=generator, dtype=o.dtype)).sum() for o in outs)
    loss.backward()
    floats = [t for t in leaves((args, kwargs)) if t.is_floating_point()]
    ins = [t.grad if t.grad is not None else torch.zeros_like(t) for t in floats]
    named = {n: p.grad if p.grad is not None else torch.zeros_like(p) for n, p in model.named_parameters()}
    return [o.detach() for o in outs], ins, named


def relative(a: Tensor, b: Tensor) -> float:
    """Largest deviation of `a` from `b`, relative to the largest value of `b` (or to 1e-3 if `b` is tiny)."""
    assert a.shape == b.shape, f"shape {tuple(a.shape)} against {tuple(b.shape)}"
    if not b.numel():
        return 0.0
    return float((a - b).abs().max() / b.abs().max().clamp_min(1e-3))


def positions_by_value(small: Tensor, large: Tensor) -> Tensor:
    """Flat positions in `large` of the values of `small`: dense values are distinct, so no index lists are needed."""
    values, order = large.detach().flatten().sort()
    at = torch.searchsorted(values, small.detach().flatten()).clamp_max(values.numel() - 1)
    assert torch.equal(values[at], small.detach().flatten()), "the cut model holds a value the dense one does not"
    return order[at].view(small.shape)


# --- from secateur's groups to the logical units of a case ---------------------------------------------------------


def unit_sets(group, tensor: str, dim: int) -> Sets | None:
    """Positions each unit of a secateur group owns on (tensor, dim), or None where the group has no slot there."""
    owned: list[set[int]] = [set() for _ in range(group.size)]
    for slot in group.slots:
        if slot.tensor == tensor and slot.dim == dim:
            for unit, row in enumerate(slot.positions.tolist()):
                owned[unit].update(row if isinstance(row, list) else [row])
    return tuple(frozenset(s) for s in owned) if any(owned) else None


def lost_positions(graph, keep: Mapping[str, Tensor], name: str, tensor: str, dim: int) -> frozenset[int]:
    """Positions of (tensor, dim) that go with the dropped units of one group."""
    sets = unit_sets(graph.groups[name], tensor, dim) or ()
    return frozenset().union(*[s for s, stays in zip(sets, keep[name].tolist(), strict=False) if not stays])


def logical_keep(model: Case, graph, keep: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The masks of the logical units that say the same as `keep` (masks of secateur's groups)."""
    logical = everything(model)
    for name in keep:
        explained = bool(keep[name].all())
        for tensor, dim in {(u.tensor, u.dim) for u in model.units.values()}:
            lost, covered = lost_positions(graph, keep, name, tensor, dim), set()
            for label, unit in model.units.items():
                for i, owned in enumerate(unit.sets):
                    if (unit.tensor, unit.dim) == (tensor, dim) and owned <= lost:
                        logical[label][i] = False
                        covered |= owned
            explained |= bool(lost) and covered == lost
        assert explained, f"no declared units are the ones group {name} loses: {keep[name].tolist()}"
    return logical


def check_groups(model: Case, graph) -> None:
    """Every axis that must be prunable is, unit by unit; nothing fixed is; no group is unknown to the case."""
    anchors = {(u.tensor, u.dim) for u in model.units.values()}
    for name, group in graph.groups.items():
        touched = {(slot.tensor, slot.dim) for slot in group.slots}
        assert touched & anchors, f"group {name} ({group.size}) touches {sorted(touched)}, no declared unit"
        assert not touched & set(model.fixed), f"group {name} touches a fixed axis: {touched & set(model.fixed)}"
    for label, unit in model.units.items():
        if unit.must:
            found = set()
            for group in graph.groups.values():
                found |= set(unit_sets(group, unit.tensor, unit.dim) or ())
            missing = [sorted(s) for s in unit.sets if s not in found]
            assert not missing, f"unit {label!r} on {unit.tensor}:{unit.dim} not prunable: {missing} {reasons(graph)}"


def reasons(graph) -> str:
    """What the graph says about its frozen axes, for a failure message."""
    return "; ".join(f"{f.reason} {list(f.where)[:4]}" for f in graph.frozen)[:1500]


def random_keep(graph, seed: int, least: int = 1) -> dict[str, Tensor]:
    """A random mask per group: at least `least` units kept and, where there are more, at least one removed."""
    generator = torch.Generator().manual_seed(seed)
    keep = {}
    for name, group in sorted(graph.groups.items()):
        count = int(torch.randint(least, max(least + 1, group.size), (1,), generator=generator))
        mask = torch.zeros(group.size, dtype=torch.bool)
        mask[torch.randperm(group.size, generator=generator)[:count]] = True
        keep[name] = mask
    return keep


def expected_size(graph, keep: Mapping[str, Tensor], tensor: str, dim: int, dense: int) -> int:
    """How many positions of (tensor, dim) survive the plan."""
    return dense - len(frozenset().union(*[lost_positions(graph, keep, name, tensor, dim) for name in keep]))
