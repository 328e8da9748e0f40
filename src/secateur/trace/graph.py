"""What `trace` gives: the axes of every tensor, the groups of units that live or die together, what is frozen."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
import torch
from torch import fx

from secateur.axes import Axis, axes_of, count, is_frozen, occurrences, resolve
from secateur.errors import PlanError
from secateur.plan import Cost
from secateur.trace.blocks import Block, bypassed, live
from secateur.trace.call import Dims, Value
from secateur.trace.capture import Capture


@dataclass(frozen=True)
class Slot:
    """Where the units of a group live in one parameter or buffer: unit i at `positions[i]` of dimension `dim`."""

    tensor: str
    dim: int
    positions: torch.Tensor  # (units, positions per unit)


@dataclass(frozen=True)
class Group:
    """Units that live or die together. `kind`: channel, head, kv_group, head_dim, value_dim ..."""

    name: str
    size: int
    kind: str
    slots: tuple[Slot, ...]


@dataclass(frozen=True)
class Frozen:
    """An axis that keeps all its units, and why."""

    size: int
    reason: str
    where: tuple[str, ...]  # "tensor:dim"

    @property
    def op(self) -> str:
        """The op that froze it, '' where none did (inputs, outputs, ignore=)."""
        return self.reason.partition("(op ")[2].split(" ")[0].rstrip(")")


@dataclass(frozen=True)
class Term:
    """Multiply-accumulates of one op: the product of its dimensions. An op that turns into a plain multiplication when
    the dimensions it contracts have one unit left (einsum) names them in `contracted` and then counts none."""

    module: str
    op: str
    dims: Dims
    contracted: Dims = ()
    node: fx.Node | None = None

    def macs(self, keep: Mapping[Axis, np.ndarray]) -> int:
        if self.contracted and _product(self.contracted, keep) == 1:
            return 0
        return _product(self.dims, keep)


@dataclass
class Graph:
    """A traced model. Holds no copy of the weights beyond what the capture refers to.

    Attributes:
        groups: what can be cut, by stable name.
        blocks: residual blocks that can go as a whole, by stable name; a plan's `keep` holds one boolean for each it names.
        frozen: what cannot, with the reason.
        ignored, for_class: how it was traced, so that it can be traced alike with other inputs.
    """

    capture: Capture
    env: dict[fx.Node, Value]
    terms: list[Term]
    tensors: dict[str, Dims]  # every parameter and buffer the graph uses, by state name (tied ones once)
    sizes: dict[str, tuple[int, int, bool]]  # state name -> elements, bytes each, is a parameter (tied ones once)
    groups: dict[str, Group] = field(default_factory=dict)
    axes: dict[str, Axis] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    blocks: dict[str, Block] = field(default_factory=dict)
    ignored: tuple[str, ...] = ()
    for_class: bool = False

    @property
    def program(self):
        """The exported program of the dense model."""
        return self.capture.program

    @cached_property
    def frozen(self) -> list[Frozen]:
        """Axes of parameters that keep all their units; kernel sizes and other bare constants left out."""
        found: dict[Axis, list[str]] = {}
        for name, dims in self.tensors.items():
            for i, d in enumerate(dims):
                for axis in axes_of(d):
                    if axis.reason and not axis.reason.startswith("kernel size"):
                        found.setdefault(axis, []).append(f"{name}:{i}")
        return [Frozen(a.size, a.reason or "", tuple(dict.fromkeys(w))) for a, w in found.items()]

    def keep_axes(self, keep: Mapping[str, torch.Tensor] | None) -> dict[Axis, np.ndarray]:
        """`keep` by axis, for the functions of `secateur.axes`.

        Raises:
            PlanError: an unknown group, a mask of the wrong length, or a group left without units.
        """
        out = {}
        for name, mask in (keep or {}).items():
            if name in self.blocks and tuple(mask.shape) == (1,):
                continue
            if name not in self.groups:
                raise PlanError(
                    f"the plan names group {name!r}, which this model does not have.\n"
                    f"  It has {len(self.groups)} groups, the first {next(iter(self.groups), 'none')!r}; "
                    "the plan was made for another model or another ignore=."
                )
            if len(mask) != self.groups[name].size:
                raise PlanError(
                    f"group {name!r} has {self.groups[name].size} units and the plan decides on {len(mask)}.\n"
                    "  Make the plan from a trace of this very model."
                )
            if not bool(mask.any()):
                raise PlanError(f"group {name!r}: all {len(mask)} units would go, at least 1 must stay.\n  Keep one of them.")
            out[self.axes[name]] = mask.numpy()
        return out

    def cost(self, keep: Mapping[str, torch.Tensor] | None = None) -> Cost:
        """Exact cost with only the units of `keep`; groups that are not named stay whole. MACs are those of one call
        with the example inputs."""
        by_axis = self.keep_axes(keep)
        gone = self.removed_blocks(keep)
        runs = live(self.capture.graph, bypassed(gone)) if gone else None
        macs = sum(t.macs(by_axis) for t in self.terms if runs is None or t.node in runs)
        unused = self.unused_tensors(keep)
        params = size = 0
        for name, (elements, each, is_parameter) in self.sizes.items():
            if name in unused:
                continue
            n = _product(self.tensors[name], by_axis) if name in self.tensors else elements
            params += n if is_parameter else 0
            size += n * each
        return Cost(macs, params, size)

    def removed_blocks(self, keep: Mapping[str, torch.Tensor] | None) -> list[Block]:
        """The residual blocks that `keep` drops."""
        return [self.blocks[n] for n, mask in (keep or {}).items() if n in self.blocks and not bool(mask.all())]

    def unused_tensors(self, keep: Mapping[str, torch.Tensor] | None) -> set[str]:
        """State names of the tensors that only removed blocks used."""
        gone = self.removed_blocks(keep)
        if not gone:
            return set()
        runs = live(self.capture.graph, bypassed(gone))
        used: dict[str, bool] = {}
        for n in self.capture.graph.nodes:
            if n.op == "placeholder" and n.name in self.capture.tensors and n.users:
                name = self.capture.tensors[n.name]
                name = self.capture.aliases.get(name, name)
                used[name] = used.get(name, False) or n in runs
        unused = {name for name, yes in used.items() if not yes}
        rest = {n.rpartition(".")[0] for n, yes in used.items() if yes}
        own = {n.rpartition(".")[0] for n in unused} - rest  # modules of which nothing runs: counters go with them
        return unused | {n for n in self.sizes if n not in used and n.rpartition(".")[0] in own}

    def obstacles(self, keep: Mapping[Axis, np.ndarray], most: int = 3) -> list[str]:
        """The layers that cost most under `keep`, each with the reason why its dimensions stay."""
        rows = sorted(((t.macs(keep), t) for t in self.terms), key=lambda r: -r[0])
        out: dict[str, None] = {}
        for macs, term in rows[: 3 * most]:
            reasons = dict.fromkeys(a.reason for d in term.dims for a in axes_of(d) if a.reason and "space" not in a.reason)
            if reasons:
                out[f"{term.op} in {term.module!r} keeps {macs:,} MACs ({', '.join(list(reasons)[:2])})"] = None
        return list(out)[:most]

    def describe(self) -> list[dict]:
        """One row per group: name, kind, units, the tensors it lives in, and MACs and parameters of one unit."""
        dense = self.cost()
        rows = []
        for name, g in self.groups.items():
            less = torch.ones(g.size, dtype=torch.bool)
            less[-1] = False
            one = self.cost({name: less})
            rows.append(
                {
                    "name": name,
                    "kind": g.kind,
                    "units": g.size,
                    "tensors": sorted({s.tensor for s in g.slots}),
                    "macs_per_unit": dense.macs - one.macs,
                    "params_per_unit": dense.params - one.params,
                }
            )
        return rows


def _product(dims: Dims, keep: Mapping[Axis, np.ndarray]) -> int:
    n = 1
    for d in dims:
        n *= count(d, keep)
    return n


# ---------------------------------------------------------------- groups from axes
def find_groups(graph: Graph) -> None:
    """Fill `graph.groups` and `graph.axes` with the free axes that live in a trainable parameter."""
    slots: dict[Axis, list[Slot]] = {}
    for name, dims in graph.tensors.items():
        for i, dim in enumerate(dims):
            for axis, (units, positions) in occurrences(dim).items() if not is_frozen(dim) else ():
                if axis.reason is None:
                    order = np.lexsort((positions, units))
                    each = torch.from_numpy(positions[order].reshape(axis.size, -1))
                    slots.setdefault(axis, []).append(Slot(name, i, each))
    for axis, found in slots.items():
        if not any(s.tensor in graph.capture.trainable for s in found):
            continue
        name = _name(graph, axis, found)
        graph.axes[name] = axis
        graph.groups[name] = Group(name, axis.size, axis.kind or "channel", tuple(found))


def _name(graph: Graph, axis: Axis, slots: list[Slot]) -> str:
    """`module:role` of the first weight that produces the axis (its first dimension), else of the first slot."""
    producers = [s for s in slots if s.dim == 0 and len(graph.tensors[s.tensor]) > 1 and s.tensor in graph.capture.trainable]
    own = [s for s in slots if s.tensor in graph.capture.trainable]
    slot = (producers or own)[0]
    dim = resolve(graph.tensors[slot.tensor][slot.dim])
    module, _, leaf = slot.tensor.rpartition(".")
    base = module if leaf == "weight" and module else slot.tensor
    inner = [a for a in dict.fromkeys(axes_of(dim)) if a.reason is None]
    role = "out" if slot.dim == 0 else f"dim{slot.dim}"
    if len(inner) > 1:
        role += f".{axis.kind}" if axis.kind and sum(a.kind == axis.kind for a in inner) == 1 else f".{inner.index(axis)}"
    name, n = f"{base}:{role}", 2
    while name in graph.groups:
        name, n = f"{base}:{role}#{n}", n + 1
    return name
