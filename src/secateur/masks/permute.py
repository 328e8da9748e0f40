"""Inputs put into an order in which an N:M pattern loses less (Pool & Yu 2021, "Channel Permutations for N:M Sparsity").

The units of a group (`secateur.trace.Group`) are named anew: what writes them and what reads them changes place together, so the
network stays the same function, and no op is added. Looked for is the order that keeps most of w^2 E[x^2] over all layers that read
the group. Groups of M columns are paired at random; of each pair the two columns whose exchange gains most change place.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from secateur.errors import CutError
from secateur.masks.select import Selection
from secateur.pattern import NM
from secateur.repair import put_into
from secateur.repair.layers import Layer
from secateur.surgery.cut import same_values, state_of
from secateur.trace import Graph, Group

Call = tuple[tuple, dict[str, Any]]

ROUNDS = 300
PATIENCE = 30  # rounds without gain
LITTLE = 5e-4  # of w^2 E[x^2]: a gain that is none
ROWS = 4096  # of a score matrix at most: every k-th of more


@dataclass(frozen=True)
class Order:
    """A group's new order: unit `order[i]` comes to place i. `before`, `after`: share of w^2 E[x^2] that the pattern keeps."""

    group: str
    order: Tensor
    before: float
    after: float


def permuted(
    model: nn.Module, graph: Graph, chosen: Selection, squares: Mapping[str, Tensor], pattern: NM, seed: int = 0,
    feeds: Sequence[Call] = (),
) -> tuple[nn.Module, str]:  # fmt: skip
    """A copy of the model with its units in the best orders that were found, and what is to be said of it; the model itself, with the
    reason, where there are none. An order that makes it another function is left out.

    Args:
        squares: E[x_j^2] of the inputs of each layer, by weight. feeds: inputs to compare outputs on, besides the example's and random ones.

    Raises:
        CutError: the model cannot be copied.
    """
    state = {n: t for n, t in state_of(model).items() if n in model.state_dict() and t.is_floating_point()}
    found = orders(graph, chosen, state, squares, pattern, seed)
    if not found:
        return model, "no inputs were reordered: no group of units that the pattern divides, and that layers read as they are, has a better order"
    made, others = _made(model, graph, found), [graph.program.example_inputs, *feeds, *_random(graph, seed)]
    if why := _differs(made, model, others):
        found = [one for one in found if not _differs(_made(model, graph, [one]), model, others)]
        made = _made(model, graph, found)
        if not found or _differs(made, model, others):
            return model, f"no inputs were reordered: {why}"
    best = max(found, key=lambda one: one.after - one.before)
    return made, (f"the units of {len(found)} groups were reordered, which leaves the model the same function; the pattern keeps {best.after:.1%} "
                  f"instead of {best.before:.1%} of the weight of {best.group}, the best of them")  # fmt: skip


def _made(model: nn.Module, graph: Graph, found: Sequence[Order]) -> nn.Module:
    try:
        made = copy.deepcopy(model).eval()
    except Exception as error:  # whatever a user's __deepcopy__ raises
        raise CutError(f"{type(model).__name__} cannot be copied: {error}.\n  Nothing was changed. Make it copy.deepcopy-able.") from error
    everything = {n: torch.ones(g.size, dtype=torch.bool) for n, g in graph.groups.items()}
    put_into(made, graph, everything, reordered(graph, state_of(model), found))
    return made


def _random(graph: Graph, seed: int) -> list[Call]:
    """Inputs as the example's, with other numbers where they are of floating point: an example of zeros tells nothing."""
    generator = torch.Generator().manual_seed(seed)
    args, kwargs = graph.program.example_inputs

    def drawn(t: Tensor) -> Tensor:
        return torch.randn(t.shape, generator=generator).to(t) if t.is_floating_point() else t

    return [tree_map_only(Tensor, drawn, (args, kwargs))]


def _differs(made: nn.Module, model: nn.Module, feeds: Sequence[Call]) -> str:
    """Why the two are not known to be the same function, '' where they are."""
    try:
        same = all(same_values(made, model, tuple(args), dict(kwargs)) for args, kwargs in feeds)
    except Exception as error:  # a model that cannot run in float64
        return f"its outputs cannot be compared in float64 ({(str(error).splitlines() or [type(error).__name__])[0][:120]})"
    return "" if same else "the model was not the same function afterwards"


def orders(graph: Graph, chosen: Selection, state: Mapping[str, Tensor], squares: Mapping[str, Tensor], pattern: NM, seed: int) -> list[Order]:
    """The orders worth having, of groups whose units are the inputs of a layer, one by one and in order.

    Args:
        squares: E[x_j^2] of the inputs of each layer; without them only weights are looked at.
    """
    found = []
    for name, group in graph.groups.items():
        scores = [s for n, x in chosen.layers.items() if (s := _score(x, group, state[n], squares.get(n))) is not None]
        if not scores or group.size % pattern.of or group.size < 2 * pattern.of or any(s.tensor not in state for s in group.slots):
            continue  # or it has units in an index, a constant of forward() or a buffer that no file keeps
        score = torch.cat([s / s.sum().clamp_min(torch.finfo(s.dtype).tiny) for s in scores])
        order = best_order(score[:: -(-len(score) // ROWS)], pattern, seed)
        before, after = (float(kept(s, pattern).sum() / len(scores)) for s in (score, score[:, order]))
        if after > before + LITTLE:
            found.append(Order(name, order, before, after))
    return found


def _score(layer: Layer, group: Group, weight: Tensor, squares: Tensor | None) -> Tensor | None:
    """(rows, units) of what each weight of a layer counts for, by unit; None where the layer does not read the group so."""
    slot = next((s for s in group.slots if s.tensor == layer.weight and s.dim == (0 if layer.transposed else 1)), None)
    if slot is None or layer.groups > 1 or not torch.equal(slot.positions, torch.arange(weight.shape[slot.dim])[:, None]):
        return None
    score = layer.matrix(weight.detach().float())[0].square()
    if squares is not None:
        score = score * squares.float()
    return score.reshape(len(score), -1, layer.kernel).movedim(2, 1).reshape(-1, group.size)


def kept(score: Tensor, pattern: NM) -> Tensor:
    """What an N:M mask keeps of a score (rows, columns), for each group of M columns: (columns / M,)."""
    return score.reshape(len(score), -1, pattern.of).topk(pattern.n, -1).values.sum((0, 2))


def best_order(score: Tensor, pattern: NM, seed: int = 0) -> Tensor:
    """An order of the columns of a score (rows, columns) that keeps more of it: int64 (columns,)."""
    generator, m = torch.Generator().manual_seed(seed), pattern.of
    order, idle = torch.arange(score.shape[1]), 0
    for _ in range(ROUNDS):
        pairs = torch.randperm(score.shape[1] // m, generator=generator)
        pairs = pairs[: len(pairs) // 2 * 2].view(2, -1)
        places = pairs[..., None] * m + torch.arange(m)  # (2, pairs, M): places in `order`
        gain, which = _exchanges(score[:, order[places[0]]], score[:, order[places[1]]], pattern)
        better = (gain > 1e-7).nonzero()[:, 0]
        idle = 0 if len(better) else idle + 1
        if idle == PATIENCE:
            break
        here, there = (places[side][better, w[better]] for side, w in enumerate((which // m, which % m)))
        order[here], order[there] = order[there].clone(), order[here].clone()
    return order


def _exchanges(a: Tensor, b: Tensor, pattern: NM) -> tuple[Tensor, Tensor]:
    """For pairs of groups (rows, pairs, M) the largest gain of exchanging one column of each, and which: M * i + j."""
    m, n = pattern.of, pattern.n

    def without(x: Tensor) -> tuple[Tensor, Tensor]:
        """For each column left out what N of the others keep, and the least of those: (rows, pairs, M)."""
        rest = torch.stack([x[..., [k for k in range(m) if k != i]].topk(n, -1).values for i in range(m)], -2)
        return rest.sum(-1), rest[..., -1]

    (total_a, least_a), (total_b, least_b) = without(a), without(b)
    into_a = total_a[..., :, None] + (b[..., None, :] - least_a[..., :, None]).clamp_min(0)
    into_b = total_b[..., None, :] + (a[..., :, None] - least_b[..., None, :]).clamp_min(0)
    now = a.topk(n, -1).values.sum(-1) + b.topk(n, -1).values.sum(-1)
    gain = (into_a + into_b).sum(0).flatten(1) - now.sum(0)[:, None]
    best = gain.max(1)
    return best.values, best.indices


def reordered(graph: Graph, state: Mapping[str, Tensor], found: Sequence[Order]) -> dict[str, Tensor]:
    """The tensors that hold units of these groups, with the units in their new order."""
    new: dict[str, Tensor] = {}
    for one in found:
        for slot in graph.groups[one.group].slots:
            tensor = new.get(slot.tensor, state[slot.tensor].detach())
            index = torch.arange(tensor.shape[slot.dim])
            index[slot.positions] = slot.positions[one.order]
            new[slot.tensor] = tensor.index_select(slot.dim, index.to(tensor.device))
    return new
