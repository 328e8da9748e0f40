"""How much of each layer stays, found by trying (after Sieberling et al. 2025, "EvoPress: Accurate Dynamic Model Compression via
Evolutionary Search"): a budget is judged by what the network's output says with it.

The best of the rules in `budgets` is the first parent. A child moves weights from a layer to another, one to three times. Children
are judged on one batch, the best few and the parent on all; the best is the next parent, so it never gets worse. A layer with so many
weights is what SparseGPT makes of it from the dense network's moments, when it is first asked for: there is no store of solved layers.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Mapping
from fractions import Fraction
from functools import lru_cache

import torch
from torch import Tensor

from secateur.errors import DataError
from secateur.masks.budgets import BUDGETS, LEAST, Budget, Weight, Weights
from secateur.masks.network import columns, second_moments
from secateur.masks.problem import Problem
from secateur.masks.select import Selection
from secateur.masks.sparsegpt import sparsegpt
from secateur.measure.run import at_rest
from secateur.pattern import Pattern, of_kernel
from secateur.repair.sensitivity import Output
from secateur.repair.study import FEW, Study

GENERATIONS, CHILDREN, SECOND_LOOK = 60, 8, 2
MOVES = 3  # of a child at most
STEPS = 5  # that an average layer's weights are moved in

Counts = dict[str, int]
Apart = Callable[[Mapping[str, int], int], float]  # divergence with so many weights of each layer, on the first so many batches


def searched(study: Study, chosen: Selection, pattern: Pattern, keep: Fraction, seed: int, say: Callable[[str], None]) -> Budget:
    """The shares of all layers, on the calibration data of a study. Patterns with a share of their own have nothing to search."""
    say("moments of the dense model")
    moments = second_moments(study, chosen.layers)
    matrices = {n: x.matrix(study.state[n].detach().to(moments[n].dtype)) for n, x in chosen.layers.items()}
    weights = {n: Weight(w.reshape(-1, w.shape[-1]), tuple(study.state[n].shape), moments[n].diagonal(0, 1, 2).mean(0)) for n, w in matrices.items()}
    with at_rest(study.model):
        outputs = [Output(study.chunks.graph, study.state, [f]) for f in study.chunks.feeds[:FEW]]  # each judged by one process

        @lru_cache(maxsize=4 * len(weights))
        def solved(name: str, count: int) -> Tensor:
            """The weight as it is stored, `count` of its numbers left."""
            layer, w, h = chosen.layers[name], matrices[name], moments[name]
            order, new = columns(layer, pattern, w.shape[-1]), torch.empty_like(w)
            share = Fraction(count, weights[name].size)
            for g in range(len(w)):
                p = Problem(w[g][:, order], h[g][order][:, order], of_kernel(pattern, layer.kernel), share, name=layer.name)
                new[g][:, order] = sparsegpt(p).w
            return layer.stored(new, study.state[name])

        def apart(counts: Mapping[str, int], batches: int) -> float:
            state = {**study.state, **{n: solved(n, c) for n, c in counts.items()}}
            own = sum(o.divergence({}, state) for i, o in enumerate(outputs[:batches]) if study.processes.mine(i))
            return float(study.processes.total("divergence", {"sum": torch.tensor(own, dtype=torch.float64)})["sum"]) / batches

        found = evolved(weights, keep, apart, len(outputs), (seed, say))
    return {n: Fraction(c, weights[n].size) for n, c in found.items()}


def evolved(weights: Weights, keep: Fraction, apart: Apart, batches: int, how: tuple[int, Callable[[str], None]]) -> Counts:
    """How many weights of each layer stay; as many in all as the best rule leaves. `how`: the seed, and who is told of progress.

    Raises:
        DataError: outputs are not finite whatever is tried.
    """
    (seed, say), sizes = how, {n: x.size for n, x in weights.items()}
    draw, least = random.Random(seed), {n: max(1, int(LEAST * float(keep) * s)) for n, s in sizes.items()}
    starts = [{n: max(1, int(sizes[n] * d)) for n, d in rule(weights, keep).items()} for rule in BUDGETS.values()]
    value, parent = min(((_finite(apart(s, batches)), s) for s in starts), key=lambda pair: pair[0])
    if math.isinf(value):
        raise DataError("budget='search' compares outputs, and with every budget tried they are not finite.\n"
                        "  Look for infinities in what the model returns, or use budget='erk'.")  # fmt: skip
    step = max(1, sum(parent.values()) // (STEPS * len(sizes)))
    for generation in range(GENERATIONS if len(sizes) > 1 else 0):
        say(f"budget {generation + 1} of {GENERATIONS}: divergence {value:.4g}")
        children = [moved(parent, sizes, least, step, draw) for _ in range(CHILDREN)]
        firsts = sorted(children, key=lambda c: _finite(apart(c, 1)))[:SECOND_LOOK]
        for judged, child in ((_finite(apart(c, batches)), c) for c in firsts):
            if judged < value:
                value, parent = judged, child
    return parent


def _finite(divergence: float) -> float:
    return divergence if math.isfinite(divergence) else math.inf


def moved(parent: Mapping[str, int], sizes: Mapping[str, int], least: Mapping[str, int], step: int, draw: random.Random) -> Counts:
    """A child: up to `step` weights go from one layer to another, as many as the one can give and the other take, a few times."""
    child, names = dict(parent), list(parent)
    for _ in range(min(draw.randint(1, MOVES), draw.randint(1, MOVES))):
        giver, taker = draw.sample(names, 2)
        amount = max(0, min(step, child[giver] - least[giver], sizes[taker] - child[taker]))
        child[giver] -= amount
        child[taker] += amount
    return child
