"""Closed-form repair: every layer behind a cut is fitted anew, in the order in which layers run, without gradients.

For a layer with input x^ in the pruned network and target t (see `secateur.repair.target`)

    min over W, b of  E|t - W x^ - b|^2 + lambda |W - W0|^2

so that each layer also corrects the error made before it (He et al. 2017, "Channel pruning"; Meng et al. 2024, "OSSCAR").
A layer whose fit is no better than the plain cut on calibration rows held out of it keeps the plain cut.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, fx

from secateur.axes import axes_of, mask
from secateur.calibrate.moments import Moments, begun
from secateur.measure.run import batch_of
from secateur.processes import ALONE, Alone
from secateur.repair.attention import Attention, ScoreMoments, find_attentions, kept_of, write_scores
from secateur.repair.fit import Affine, LayerRepair, bias_only, folded, least_squares, written
from secateur.repair.flow import Flow, Runner, sources
from secateur.repair.layers import Layer, find_layers, norm_names
from secateur.repair.norms import Channels, Norm, find_norms, write_norm
from secateur.repair.rectified import BYTES, Rows, rectified
from secateur.repair.refit import branches, refit
from secateur.repair.sample import Sample
from secateur.repair.solve import RIDGE
from secateur.repair.target import Target, find_target
from secateur.trace import Graph
from secateur.trace.call import bind, op_name, tensors_in

Feeds = Sequence[tuple[tuple, Mapping]]


@dataclass(frozen=True)
class Settings:
    """How to fit.

    Attributes:
        ridge: relative to the mean variance of a layer's inputs.
        rows: of calibration per layer at most, as a multiple of its features (sampled positions); never under `least`.
        held_out: every n-th chunk judges the fit.
        everywhere: also layers none of whose inputs went, to correct what went wrong upstream.
        sampled: bytes of rows that a fit through a ReLU may keep.
        only_bias: correct biases only (and the means of batch norms).
        branches: fit whole branches as well, after their layers.
        processes: those that share the chunks. Each runs its own chunks and has the same sums, and what process 0 fits is written in all.
    """

    ridge: float = RIDGE
    rows: int = 400
    least: int = 100_000
    held_out: int = 8
    everywhere: bool = True
    only_bias: bool = False
    branches: bool = False
    sampled: int = BYTES
    seed: int = 0
    processes: Alone = ALONE


class Repair:
    """Fits a masked network to the dense one. `state` ends as the repaired tensors, of the dense shapes: cutting them by
    the same plan gives the repaired model.

    Args:
        graph: a trace at the batch size of the feeds.
        keep: masks by group. dense: every tensor of the model by state name, left as it is.
        feeds: calibration chunks as (args, kwargs), all of the shapes of the trace.
    """

    def __init__(
        self,
        graph: Graph,
        keep: Mapping[str, Tensor],
        dense: Mapping[str, Tensor],
        feeds: Feeds,
        settings: Settings | None = None,
    ):
        self.settings = settings or Settings()
        self.processes = self.settings.processes
        self.graph, self.keep = graph, dict(keep)
        dense = {n: t.detach() if t.requires_grad else t for n, t in dense.items()}
        self.state = dict(dense)
        self.layers = find_layers(graph)
        self.chunks, self.samples = len(feeds), sum(batch_of(*f) for f in feeds)
        self.own = [chunk for chunk in range(self.chunks) if self.processes.mine(chunk)]
        reads = sources(graph.capture.graph)
        self.dense = Flow(Runner(graph, {}, dict(dense)), feeds, reads)
        self.pruned = Flow(Runner(graph, self.keep, self.state), feeds, reads)
        runs = set(self.pruned.needed)
        self.layers = [x for x in self.layers if x.node in runs]  # a removed block needs no repair, and is not held for it
        for flow in (self.dense, self.pruned):
            flow.runner.zeroed_weights = {x.node for x in self.layers}
        self.norms = [x for x in find_norms(graph, self.layers) if x.node in runs]
        self.by_node: dict[fx.Node, Layer | Norm] = {**{x.node: x for x in self.layers}, **{x.node: x for x in self.norms}}
        self.upstream = _upstream(graph, reads, self.pruned.runner, set(self.by_node))
        self.targets = {x.node: find_target(x) for x in self.layers if not x.why_not}
        self.affected = _affected(graph, reads, self.keep)
        self.attentions = find_attentions(graph, self.layers)
        self.branches = branches(self) if self.settings.branches and self.chunks > 1 else []  # one chunk alone has nothing to be judged by
        self.done: set[fx.Node] = set()
        self.busy: set[fx.Node] = set()
        self.rows: list[LayerRepair] = []
        for layer in self.layers:
            self._zero_columns(layer)

    def run(self, progress: Callable[[str], None] | None = None) -> list[LayerRepair]:
        """Fit every layer; returns what became of each."""
        for item in self.by_node.values():  # values that a fit will ask for must not be dropped before
            for flow, node in self._asked(item):
                flow.hold(node)
        for attention in self.attentions:
            for flow, node in self._asked_for_scores(attention):
                flow.hold(node)
        for waiting in self.branches:
            for flow, node in waiting.asked(self):
                flow.hold(node)
        place = {n: i for i, n in enumerate(self.graph.capture.graph.nodes)}
        for item in sorted(self.by_node.values(), key=lambda x: place[x.node]):
            if progress:
                progress(item.name)
            self.fit(item)
        return self.rows

    def _asked(self, layer: Layer | Norm) -> list[tuple[Flow, fx.Node]]:
        if isinstance(layer, Norm):
            return [(self.dense, layer.node), (self.pruned, layer.source)]
        if layer.why_not:
            return []
        t = self.targets[layer.node]
        asked = [(self.dense, layer.end), (self.pruned, layer.source)]
        return asked + ([(self.dense, t.join), (self.pruned, t.other)] if t.join is not None and t.other is not None else [])

    def fit(self, layer: Layer | Norm) -> None:
        """Fit one layer or norm, and before it those that its target waits for."""
        if layer.node in self.done or layer.node in self.busy:
            return
        self.busy.add(layer.node)
        if isinstance(layer, Norm):
            self._fit_norm(layer)
        elif not layer.why_not and self._wanted(layer):
            for x in self.upstream[layer.source]:
                self.fit(self.by_node[x])
            target = self.targets[layer.node]
            if target.other is not None:
                before = self.upstream[target.other]
                if any(x in self.busy for x in before):
                    target = Target()  # the other branch is being fitted right now, and waits for this one
                else:
                    for x in before:
                        self.fit(self.by_node[x])
            self._decide(layer, self._moments(layer, target))
            self.settle(layer.weight, layer.bias, *(norm_names(self.graph, layer.norm).values() if layer.norm else ()))
        for flow, node in self._asked(layer):
            flow.release(node)
        self.busy.discard(layer.node)
        self.done.add(layer.node)
        for w in [w for w in self.branches if self.done.issuperset(x.node for x in w.branch.layers)]:
            self.branches.remove(w)
            refit(self, w, _rectified(w.branch.end))
            for flow, node in w.asked(self):
                flow.release(node)
        for a in self.attentions:
            if layer.node in (a.query.node, a.key.node) and {a.query.node, a.key.node} <= self.done:
                self._fit_scores(a)

    def settle(self, *names: str | None) -> None:
        """What process 0 has written is what all go on with, whose last bits may differ on other hardware."""
        self.state.update(self.processes.lent("weights", {n: self.state[n] for n in names if n}))

    def _fit_norm(self, norm: Norm) -> None:
        if norm.source not in self.affected:
            return
        for x in self.upstream[norm.source]:
            self.fit(self.by_node[x])
        channels = Channels()
        for chunk in self.own:
            channels.add(self.pruned.once(chunk, norm.node), self.dense.value(chunk, norm.node), norm.dim)
        channels.sums = self.processes.total(f"channels of {norm.name}", channels.sums)
        kept = torch.from_numpy(mask(self.graph.tensors[norm.weight][0], self.graph.keep_axes(self.keep)).copy())
        a, c, before, after = channels.fitted(norm.bias is not None, not self.settings.only_bias)
        better = kept & (after < before)
        write_norm(norm, self.state, a, c, better)
        self.settle(norm.weight, norm.bias)
        scale = float(channels.variance()[kept].sum()) or 1.0
        plain, repaired = float(before[kept].sum()) / scale, float(torch.where(better, after, before)[kept].sum()) / scale
        used, why = ("least squares", "") if bool(better.any()) else ("plain", "the fit is no better")
        self.rows.append(LayerRepair(norm.name, channels.rows, plain, plain, repaired, used, why))

    def _asked_for_scores(self, a: Attention) -> list[tuple[Flow, fx.Node]]:
        return [x for layer in (a.query, a.key) for x in ((self.dense, layer.end), (self.pruned, layer.source))]

    def _fit_scores(self, a: Attention) -> None:
        """Refit the queries of an attention that lost dimensions, before anything reads them."""
        heads, kept = kept_of(self.graph, a, self.graph.keep_axes(self.keep))
        if not bool(kept.all()) and not self.settings.only_bias:
            moments = ScoreMoments(a, heads, kept)
            for chunk in self.own:
                values = []
                for layer in (a.query, a.key):
                    x = self.pruned.value(chunk, layer.source)
                    w, b = self.state[layer.weight], self.state[layer.bias] if layer.bias else None
                    pruned = torch.nn.functional.linear(x, layer.matrix(w)[0], b)
                    values += [y.reshape(-1, y.shape[-1]) for y in (pruned, self.dense.value(chunk, layer.end))]
                moments.add(*values)
            moments.sums = self.processes.total(a.name, moments.sums)
            m, plain, repaired = moments.fitted(self.settings.ridge)
            if repaired < plain:
                write_scores(a, self.state, m, heads, kept)
            self.settle(a.query.weight, a.query.bias)
            used, why = ("least squares", "") if repaired < plain else ("plain", "the fit is no better")
            self.rows.append(LayerRepair(a.name, moments.rows, plain, plain, repaired, used, why))
        for flow, node in self._asked_for_scores(a):
            flow.release(node)

    def is_held_out(self, chunk: int) -> bool:
        return chunk % self.settings.held_out == self.settings.held_out - 1 or chunk == self.chunks - 1 > 0

    def _wanted(self, layer: Layer) -> bool:
        return not bool(self.kept_inputs(layer).all()) or (self.settings.everywhere and layer.source in self.affected)

    # ------------------------------------------------------------ masks
    def masks(self, layer: Layer) -> tuple[Tensor, Tensor]:
        """Which stored inputs and outputs stay: (inputs of the weight,), (groups, outputs)."""
        dims, by_axis = self.graph.tensors[layer.weight], self.graph.keep_axes(self.keep)
        i, o = (0, 1) if layer.transposed else (1, 0)
        inputs, outputs = (torch.from_numpy(mask(dims[d], by_axis).copy()) for d in (i, o))
        return inputs, outputs.reshape(layer.groups, -1)

    def kept_inputs(self, layer: Layer) -> Tensor:
        inputs, _ = self.masks(layer)
        return inputs.repeat_interleave(layer.kernel) if layer.window else inputs

    def _zero_columns(self, layer: Layer) -> None:
        inputs, _ = self.masks(layer)
        if not bool(inputs.all()):
            w = self.state[layer.weight].detach()
            shape = [1] * w.dim()
            shape[0 if layer.transposed else 1] = -1
            self.state[layer.weight] = torch.where(inputs.view(shape), w, torch.zeros((), dtype=w.dtype))

    # ------------------------------------------------------------ statistics
    def _moments(self, layer: Layer, target: Target) -> Sample:
        """Moments of what the layer sees and should give, for the fit and held out."""
        s, places = self.settings, layer.places
        features = layer.features(self.state[layer.weight])
        wanted = max(s.least, s.rows * features)
        take = min(places, max(1, -(-wanted // max(1, self.samples))))
        random = torch.Generator().manual_seed(s.seed)
        outputs = self.state[layer.weight].shape[1 if layer.transposed else 0]
        fit, held = (Moments(layer.groups, features, outputs // layer.groups) for _ in range(2))
        sample = Sample(fit, held, Rows(limit=s.sampled), Rows(limit=s.sampled), _rectified(target.join or layer.end))
        for chunk in range(self.chunks):
            at = None if take == places else torch.randperm(places, generator=random)[:take].sort()[0]  # the same for any number of processes
            if not self.processes.mine(chunk):
                continue
            x = self.pruned.value(chunk, layer.source)
            rows, (whole, beside) = layer.rows(x, at), self._target(chunk, layer, target)
            t = layer.outputs(whole, at)
            out = self.is_held_out(chunk)
            if chunk == self.own[0]:
                begun(layer.name, self.processes, (rows, t) if chunk == 0 else None, fit, held)
            (held if out else fit).add(rows, t)
            if sample.rectified:
                share = s.sampled / (4.0 * self.chunks * (rows.numel() + 2 * t.numel()))
                o = None if beside is None else layer.outputs(beside, at)
                (sample.held_rows if out else sample.fit_rows).add(rows, t, o, min(1.0, share), chunk)
        if not self.own:  # more processes than chunks
            begun(layer.name, self.processes, None, fit, held)
        sample.share(layer.name, self.processes)
        fit.check(layer.name)
        return sample

    def _target(self, chunk: int, layer: Layer, target: Target) -> tuple[Tensor, Tensor | None]:
        """The target in the shape of the layer's end, and what the other branch delivers there."""
        if target.join is None or target.other is None:
            return self.dense.value(chunk, layer.end), None
        other = self.pruned.value(chunk, target.other)
        return target.pull(self.dense.value(chunk, target.join) - other), target.pull(other)

    # ------------------------------------------------------------ the decision
    def _decide(self, layer: Layer, sample: Sample) -> None:
        names = norm_names(self.graph, layer.norm) if layer.norm else None
        eps = float(bind(layer.norm)["eps"]) if layer.norm else 0.0
        before = folded(layer, self.state, names, eps)
        with_bias = bool(names or layer.bias)
        inputs, (_, outputs) = self.kept_inputs(layer), self.masks(layer)
        if not bool(inputs.all()):
            before = Affine(torch.where(inputs, before.w, torch.zeros((), dtype=torch.float64)), before.b)

        def tries(m: Moments) -> dict[str, Affine]:
            found = {"plain": before, "bias": bias_only(m, before) if with_bias else before}
            if self.settings.only_bias:
                return found
            found["least squares"] = least_squares(m, before, inputs, with_bias, self.settings.ridge)
            if sample.rectified and with_bias:
                found["rectified"] = rectified(m, found["least squares"], inputs, sample.fit_rows, self.settings.ridge)
            return found

        fits = tries(sample.fit)
        errors = {k: sample.error(v, outputs) for k, v in fits.items()}
        used = min(errors, key=lambda k: (errors[k], k != "plain"))
        if used != "plain":
            written(layer, self.state, fits[used], names, (sample.fit, eps, outputs))
        best = min((v for k, v in errors.items() if k not in ("plain", "bias")), default=errors["bias"])
        why = "on held-out rows the fit is no better" if used in ("plain", "bias") else ""
        self.rows.append(LayerRepair(layer.name, sample.fit.rows, errors["plain"], errors["bias"], best, used, why))


def _rectified(node: fx.Node) -> bool:
    return len(node.users) == 1 and op_name(next(iter(node.users))) == "relu"


def _upstream(graph: Graph, reads: Mapping, runner: Runner, layers: set[fx.Node]) -> dict[fx.Node, list[fx.Node]]:
    """Layers that each node's value depends on, itself where it is one, in the order in which they run."""
    above: dict[fx.Node, dict[fx.Node, None]] = {}
    for node in graph.capture.graph.nodes:
        found: dict[fx.Node, None] = {}
        for real in [runner.bypass[node]] if node in runner.bypass else reads[node].values():
            found |= above[real]
        if node in layers:
            found[node] = None
        above[node] = found
    return {n: list(v) for n, v in above.items()}


def _affected(graph: Graph, reads: Mapping, keep: Mapping[str, Tensor]) -> set[fx.Node]:
    """Nodes whose value is not the dense one (or where units of it went)."""
    cut = {graph.axes[n] for n, k in keep.items() if n in graph.axes and not bool(k.bool().all())}
    gone = {b.join for b in graph.removed_blocks(keep)}
    found: set[fx.Node] = set()
    for node in graph.capture.graph.nodes:
        masked = any(a in cut for dims in tensors_in(graph.env.get(node)) for d in dims for a in axes_of(d))
        if masked or node in gone or any(r in found for r in reads[node].values()):
            found.add(node)
    return found
