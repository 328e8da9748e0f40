"""What flows through a network: sums over its activations, and over what its layers take in. Only sums are kept."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx

from secateur.axes import Axis, Dim, axes_of, occurrences
from secateur.calibrate.batches import Batch
from secateur.calibrate.replay import Replay
from secateur.calibrate.sites import Layer, consumers, sites
from secateur.errors import DataError
from secateur.processes import ALONE, Alone
from secateur.trace import Graph
from secateur.trace.call import module_of, op_name


@dataclass(frozen=True)
class Activity:
    """One group's activations, each float64 (units,): means over rows, positions and the places it is looked at
    (`where`, module names), each place counting alike.

        mean = E[x],  mean_square = E[x^2],  mean_abs = E|x|,  zeros = share of x == 0
    """

    mean: Tensor
    mean_square: Tensor
    mean_abs: Tensor
    zeros: Tensor
    where: tuple[str, ...]


@dataclass(frozen=True)
class Inputs:
    """What one layer takes in of one group, float64, one number per input position of the layer (channel or feature).

    `mean` and `mean_square` are E[x] and E[x^2] over rows and positions in space; `column_abs` and `column_square` are
    the sums of |w| and w^2 over all weights that multiply that input.
    """

    layer: str
    mean: Tensor
    mean_square: Tensor
    column_abs: Tensor
    column_square: Tensor
    units: Tensor
    positions: Tensor
    size: int

    def per_unit(self, values: Tensor) -> Tensor:
        """Numbers per input position, summed over the positions of each unit: (units,)."""
        return torch.zeros(self.size, dtype=torch.float64).index_add_(0, self.units, values[self.positions])


@dataclass
class _Sums:
    """Sums along one dimension of a tensor, float64 on the CPU; each batch is summed in float32 on its device."""

    dim: int
    count: int = 0  # elements per position
    names: tuple[str, ...] = ()
    sums: dict[str, Tensor] = field(default_factory=dict)

    def add(self, x: Tensor) -> None:
        x = x.abs() if x.is_complex() else x
        x = x if x.dtype == torch.float64 else x.float()
        dim = self.dim % x.dim()
        over = [d for d in range(x.dim()) if d != dim]
        self.count += x.numel() // max(1, x.shape[dim])
        for name in self.names:
            each = _OF[name](x)
            each = each.sum(over) if over else each
            self.sums[name] = self.sums.get(name, 0) + each.double().cpu()

    def mean(self, name: str) -> Tensor:
        return self.sums[name] / self.count


_OF: dict[str, Callable[[Tensor], Tensor]] = {
    "mean": lambda x: x,
    "mean_square": torch.square,
    "mean_abs": torch.abs,
    "zeros": lambda x: (x == 0).to(x.dtype),
}


class Observer:
    """Adds up, batch by batch, what `sites` and `consumers` of a graph see."""

    def __init__(self, graph: Graph):
        self.graph = graph
        self.sites, self.consumers = sites(graph), consumers(graph)
        self.outputs: dict[tuple[fx.Node, int], _Sums] = {}
        self.inputs: dict[fx.Node, tuple[Layer, _Sums]] = {}
        self.columns: dict[fx.Node, tuple[Tensor, Tensor]] = {}
        self.read_in = 0  # batches
        for name, nodes in self.sites.items():
            for node in nodes:
                dim = _dim_of(graph.env[node], graph.axes[name])
                self.outputs[node, dim] = _Sums(dim, names=tuple(_OF))
        for found in self.consumers.values():
            for layer in found:
                self.inputs[layer.node] = layer, _Sums(layer.channel, names=("mean", "mean_square"))
        self.watched: dict[fx.Node, list[_Sums]] = {}
        for (node, _), sums in self.outputs.items():
            self.watched.setdefault(node, []).append(sums)

    def read(self, replay: Replay, data: Iterable[Batch], processes: Alone = ALONE) -> int:
        """Adds every batch; returns their number, over all processes, of which each has a share.

        Raises:
            DataError: no batch, or one whose activations are not finite: the message names the layer and the batch.
        """
        number = 0
        for batch in data:
            replay.run(batch, partial(self._see, batch))
            number += 1
        self._share(number, processes)
        if not self.read_in:
            raise DataError("data holds no batch, so nothing can be learnt from it.\n  Pass at least one batch.")
        return self.read_in

    def _share(self, number: int, processes: Alone) -> None:
        """Sums over all processes in the place of those of this one."""
        seen = {f"{node.name} {dim}": sums for (node, dim), sums in self.outputs.items()}
        seen |= {f"into {node.name}": sums for node, (_, sums) in self.inputs.items()}
        counts = {"batches": torch.tensor(number), **{name: torch.tensor(s.count) for name, s in seen.items()}}
        counts = processes.total("activations, counts", counts)
        found = processes.total("activations", {f"{name}: {n}": v for name, s in seen.items() for n, v in s.sums.items()})
        for name, s in seen.items():
            s.count, s.sums = int(counts[name]), {n: found[f"{name}: {n}"] for n in s.names if f"{name}: {n}" in found}
        self.read_in = int(counts["batches"])
        columns = {f"{node.name}: {i}": t for node, pair in self.columns.items() for i, t in enumerate(pair)}
        columns = processes.lent("columns of weights", columns)
        for node in self.inputs:
            if f"{node.name}: 0" in columns:
                self.columns[node] = columns[f"{node.name}: 0"], columns[f"{node.name}: 1"]

    def _see(self, batch: Batch, node: fx.Node, value: Any, of: Callable[[fx.Node], Any]) -> None:
        for sums in self.watched.get(node, ()):
            self._add(batch, node, sums, value)
        if node in self.inputs:
            layer, sums = self.inputs[node]
            self._add(batch, node, sums, of(layer.data))
            if node not in self.columns:
                self.columns[node] = _columns(layer, of(layer.weight))

    def _add(self, batch: Batch, node: fx.Node, sums: _Sums, value: Tensor) -> None:
        sums.add(value)
        if not bool(torch.isfinite(sums.sums["mean_square"]).all()):
            bad = int((~torch.isfinite(value)).sum())
            place = module_of(node) or "the model itself"
            raise DataError(
                f"{batch}, gives {bad} of {value.numel()} activations that are NaN or infinite, or too large to be squared, "
                f"at {op_name(node)} in {place!r}.\n"
                "  Look for NaN or unscaled values in that batch, or for a model that overflows in its dtype."
            )

    # ------------------------------------------------------------ what came of it
    def activity(self) -> dict[str, Activity]:
        """By group; groups that no tensor shows are left out."""
        found = {}
        for name, nodes in self.sites.items():
            axis, rows = self.graph.axes[name], []
            for node in nodes:
                dim = _dim_of(self.graph.env[node], axis)
                sums = self.outputs[node, dim]
                units, positions = _places(self.graph.env[node][dim], axis)
                each = torch.bincount(units, minlength=axis.size)
                zero = torch.zeros(axis.size, dtype=torch.float64)
                rows.append({n: zero.index_add(0, units, sums.mean(n)[positions]) / each for n in _OF})
            if rows:
                means = {n: torch.stack([row[n] for row in rows]).mean(0) for n in _OF}
                found[name] = Activity(**means, where=tuple(dict.fromkeys(module_of(n) for n in nodes)))
        return found

    def taken_in(self) -> dict[str, list[Inputs]]:
        """By group, one entry per layer that contracts it."""
        out: dict[str, list[Inputs]] = {}
        for name, found in self.consumers.items():
            axis = self.graph.axes[name]
            for layer in found:
                sums = self.inputs[layer.node][1]
                units, positions = _places(self.graph.env[layer.data][layer.channel], axis)
                row = Inputs(module_of(layer.node), sums.mean("mean"), sums.mean("mean_square"), *self.columns[layer.node],
                             units, positions, axis.size)  # fmt: skip
                out.setdefault(name, []).append(row)
        return out


def _dim_of(dims: tuple[Dim, ...], axis: Axis) -> int:
    return next(i for i, d in enumerate(dims) if axis in axes_of(d))


def _places(dim: Dim, axis: Axis) -> tuple[Tensor, Tensor]:
    units, positions = occurrences(dim)[axis]
    return torch.from_numpy(np.ascontiguousarray(units)), torch.from_numpy(np.ascontiguousarray(positions))


def _columns(layer: Layer, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Sums of |w| and of w^2 over what multiplies each input of the layer, float64 (inputs,)."""
    w = weight.detach()
    w = (w.abs() if w.is_complex() else w).double()
    if layer.grouped:  # (groups, out per group, in per group, kernel)
        groups = _groups(layer)
        w = w.reshape(groups, w.shape[0] // groups, w.shape[1], -1).transpose(1, 2).flatten(0, 1)
    else:
        w = w.movedim(layer.contracted, 0)
    w = w.flatten(1)
    return w.abs().sum(1).cpu(), w.square().sum(1).cpu()


def _groups(layer: Layer) -> int:
    return layer.data.meta["val"].shape[layer.channel] // layer.weight.meta["val"].shape[1]
