"""What is known of one model on one set of calibration data, each asked for once: chunks, moments, error curves, the
sensitivity of the output. Plans for any number of budgets are made from it."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, fx, nn

from secateur.budget.curves import Curve, allocate
from secateur.budget.targets import Target
from secateur.errors import TargetError
from secateur.measure.run import at_rest
from secateur.plan import Plan
from secateur.processes import Alone, of
from secateur.repair.chunks import Chunks, chunks
from secateur.repair.curves import (
    Reader,
    block_curves,
    collect,
    collect_scores,
    error_curves,
    in_running_order,
    readers_of,
)
from secateur.repair.fit import LayerRepair
from secateur.repair.least_squares import Repair, Settings
from secateur.repair.sensitivity import Output, Point, calibrated, sensitivity
from secateur.trace import Graph

ROWS_FOR_CURVES = 50_000
FEW = 4  # chunks that curves and sensitivities are taken from
QUICK_ROWS = 100  # per feature, where a repair only decides between two plans
TILT = 2.5
TRIED = ((TILT, False), (0.0, False), (0.0, True))  # by "search": tilt; whether residual streams may be cut

BY_CURVES = ("curves", "sensitivity", "search")

Progress = Callable[[str], None]


@dataclass
class Study:
    """The model is left as it is. `again(args, kwargs)` traces it with other inputs. Processes that share the data (`secateur.processes`)
    have the same study each."""

    model: nn.Module
    graph: Graph
    data: Iterable[Any]
    again: Callable[[tuple, Mapping], Graph]
    seed: int = 0
    say: Progress = lambda stage: None

    @property
    def processes(self) -> Alone:
        return of(self.data)

    @cached_property
    def chunks(self) -> Chunks:
        with at_rest(self.model):
            return chunks(self.data, self.graph, self.again, self.model)

    @cached_property
    def state(self) -> dict[str, Tensor]:
        """Every tensor of the graph by state name: those of the model, and constants of its forward."""
        named = {**dict(self.model.named_parameters(remove_duplicate=False)), **dict(self.model.named_buffers(remove_duplicate=False))}
        return {**self.chunks.graph.capture.values, **{k: v.detach() for k, v in named.items()}}

    @cached_property
    def readers(self) -> dict[fx.Node, Reader]:
        self.say("moments of the dense model")
        return collect(self.chunks.graph, self.state, self.chunks.feeds[:FEW], ROWS_FOR_CURVES, self.processes)

    @cached_property
    def curves(self) -> dict[str, Curve]:
        """Error curves by group, in the order in which the groups are read."""
        self.say("error curves")
        scores = collect_scores(self.chunks.graph, self.state, self.chunks.feeds, self.readers, self.processes)
        return error_curves(self.chunks.graph, self.readers, scores, self.processes)

    @cached_property
    def blocks(self) -> dict[str, Curve]:
        """Residual blocks as groups of one unit: the error is what the branch contributes to the addition."""
        self.say("residual blocks")
        return block_curves(self.chunks.graph, self.state, self.chunks.feeds[:1], self.processes)

    @cached_property
    def points(self) -> dict[str, list[Point]]:
        """The output's sensitivity to each group alone."""
        self.say("sensitivity of the output")
        return sensitivity(self.chunks.graph, self.state, self.readers, self.curves, self.output, self.processes)

    @cached_property
    def streams(self) -> set[str]:
        """Groups that several layers read: residual streams."""
        return {n for n, some in readers_of(self.chunks.graph).items() if len(some) > 1}

    @cached_property
    def output(self) -> Output:
        return Output(self.chunks.graph, self.state, self.chunks.feeds[-FEW // 2 :])

    def scores(self) -> dict[str, Tensor]:
        """The error that each unit adds when it goes in its turn; infinite in groups that no layer reads: {group: (units,)}."""
        found = {n: torch.full((g.size,), math.inf, dtype=torch.float64) for n, g in self.graph.groups.items()}
        for name, c in self.curves.items():
            each = torch.cummax(torch.diff(c.error), 0)[0]
            found[name][c.order] = each
        return found

    def plan(self, *targets: Target, allocation: str = "curves", depth: bool = False, only: Collection[str] | None = None) -> Plan:
        """Who stays, by the curves. `allocation`: "curves", "sensitivity" or "search"; with `depth` whole residual blocks may go. `only`: the
        groups and blocks that may lose something; None for all.

        Raises:
            TargetError: the budget is out of reach of the groups that have a curve.
        """
        dense = self.graph.cost()
        limits = [(t, t.limit(dense)) for t in targets]
        curves = in_running_order(self.chunks.graph, {**self.curves, **self.blocks}) if depth else self.curves
        curves = curves if only is None else {n: c for n, c in curves.items() if n in only}
        if allocation == "sensitivity":
            curves = {n: calibrated(c, self.points[n]) if n in self.points else c for n, c in curves.items()}
        keep = self._searched(limits, curves) if allocation == "search" else self._allocated(limits, TILT, curves)
        why = {"targets": [str(t) for t in targets], "limits": [n for _, n in limits], "allocation": allocation}
        return Plan(keep, dense, self.graph.cost(keep), why)

    def _allocated(self, limits: list[tuple[Target, int]], tilt: float, curves: Mapping[str, Curve]) -> dict[str, Tensor]:
        removed = allocate(self.graph, corrected(curves, tilt, self.streams), limits)
        keep = {n: torch.ones(g.size, dtype=torch.bool) for n, g in self.graph.groups.items()}
        return keep | {n: curves[n].keep(removed[n]) for n in curves}

    def _searched(self, limits: list[tuple[Target, int]], curves: Mapping[str, Curve]) -> dict[str, Tensor]:
        """The best of a few ways to weigh the curves, each judged by the output of a quickly repaired network."""
        best: tuple[float, dict[str, Tensor]] | None = None
        several = self.streams
        for tilt, free in TRIED if several else [(tilt, True) for tilt in dict.fromkeys(t for t, _ in TRIED)]:
            self.say(f"trying tilt {tilt:g}{'' if free else ', residual streams whole'}")
            chosen = curves if free else {n: c for n, c in curves.items() if n not in several}
            try:
                keep = self._allocated(limits, tilt, chosen)
            except TargetError:
                if free and best is None:
                    raise
                continue
            state, _ = self.repaired(keep, few=True)
            apart = self.processes.fact("divergence", self.output.divergence(keep, state))
            apart = math.inf if math.isnan(apart) else apart  # NaN is no smaller than anything, and would win by coming first
            if best is None or apart < best[0]:
                best = (apart, keep)
        assert best is not None
        return best[1]

    def repaired(self, keep: Mapping[str, Tensor], few: bool = False, how: str = "gauss_newton") -> tuple[dict[str, Tensor], list[LayerRepair]]:
        """The tensors of the model, of the dense shapes, fitted for `keep`, and what became of every layer."""
        feeds = self.chunks.feeds[:FEW] if few else self.chunks.feeds
        settings = Settings(seed=self.seed, only_bias=how == "bias", branches=how == "gauss_newton", processes=self.processes)
        if few:
            settings = replace(settings, rows=QUICK_ROWS, least=QUICK_ROWS * 200, sampled=2**24, branches=False)
        with at_rest(self.model):
            repair = Repair(self.chunks.graph, keep, self.state, feeds, settings)
            rows = repair.run(lambda layer: self.say(f"repair {layer}"))
        return repair.state, rows


def corrected(curves: Mapping[str, Curve], tilt: float, streams: Collection[str] = ()) -> dict[str, Curve]:
    """Curves as they count for a network that is repaired afterwards: `error * exp(tilt * (place - 1/2))`.

    What goes wrong early is corrected by every fit behind it, so the same error weighs more the later it arises (place: 0 for
    the first group, 1 for the last and for residual streams, which are read to the end).
    """
    last = max(1, len(curves) - 1)
    place = {n: 1.0 if n in streams else i / last for i, n in enumerate(curves)}
    return {n: Curve(c.order, c.error.clamp_min(0) * math.exp(tilt * (place[n] - 0.5))) for n, c in curves.items()}
