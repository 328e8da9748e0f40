"""Two baselines written out here, so that they do not move when the library does: Taylor and a FLAP-like one.

Both are criteria in the library's sense, functions `(graph, model, seed)` -> {group: one number per unit}.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator

import torch
from torch import Tensor, nn

import secateur as sc

Score = Callable[[sc.Graph, nn.Module, int], dict[str, Tensor]]
LAYERS = (nn.Linear, nn.Conv2d)


def taylor(batches: Iterable[tuple[Tensor, Tensor]], loss: Callable[[Tensor, Tensor], Tensor]) -> Score:
    """Molchanov et al. 2019, squared: sum over tensors and batches of (sum over the unit's weights of w * dloss/dw) ** 2.

    Tensors are those that produce the unit (weights, biases, norms); gradients are of the mean loss of a batch, in eval mode.
    Each group is divided by its mean: ranked raw, whole layers close (keywords 7.8 % where this leaves 42 %). Of ten forms
    (absolute values, squares, per batch or per sample, raw or divided) this one did best on the small tasks.
    """

    def score(graph: sc.Graph, model: nn.Module, seed: int = 0) -> dict[str, Tensor]:
        found = {name: torch.zeros(g.size, dtype=torch.float64) for name, g in graph.groups.items()}
        state = dict(model.named_parameters(remove_duplicate=False))
        for x, y in batches:
            model.zero_grad(set_to_none=True)
            loss(model(x), y).backward()
            for name, group in graph.groups.items():
                for slot in group.slots:
                    w = state.get(slot.tensor)
                    if slot.dim == 0 and w is not None and w.grad is not None:
                        each = (w * w.grad).detach().double().flatten(1).sum(1) if w.dim() > 1 else (w * w.grad).detach().double()
                        found[name] += each[slot.positions].sum(1).square()
        model.zero_grad(set_to_none=True)
        return {name: f / f.mean() if f.mean() > 0 else f for name, f in found.items()}

    return score


def inside(score: Score, writers: Collection[str]) -> Score:
    """The same criterion, with every unit kept that one of these layers writes: the residual stream stays whole."""

    def kept(graph: sc.Graph, model: nn.Module, seed: int = 0) -> dict[str, Tensor]:
        found = dict(score(graph, model, seed))
        for name, group in graph.groups.items():
            if any(s.dim == 0 and s.tensor.rpartition(".")[0] in writers for s in group.slots):
                found[name] = torch.full_like(found[name], torch.inf)
        return found

    return kept


def consumers(graph: sc.Graph, model: nn.Module, group: sc.Group) -> Iterator[tuple[str, nn.Module, Tensor]]:
    """(name, layer, positions (units, r)) of every linear layer and plain convolution that reads the group's units."""
    for slot in group.slots:
        name = slot.tensor.removesuffix(".weight")
        layer = dict(model.named_modules()).get(name)
        if slot.dim == 1 and isinstance(layer, LAYERS) and getattr(layer, "groups", 1) == 1:
            yield name, layer, slot.positions


class Moments:
    """Mean and variance of every input of every linear layer and plain convolution, over batches, rows and positions."""

    def __init__(self, model: nn.Module, inputs: Iterable[Tensor]) -> None:
        self.sums: dict[str, list[Tensor | int]] = {}
        handles = [m.register_forward_hook(self._hook(n)) for n, m in model.named_modules() if isinstance(m, LAYERS)]
        with torch.no_grad():
            for x in inputs:
                model(x)
        for handle in handles:
            handle.remove()

    def _hook(self, name: str) -> Callable[..., None]:
        def add(layer: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
            x = args[0].double()
            flat = x.transpose(0, 1).flatten(1) if isinstance(layer, nn.Conv2d) else x.flatten(0, -2).T
            row = self.sums.setdefault(name, [torch.zeros(len(flat)), torch.zeros(len(flat)), 0])
            row[0] = row[0] + flat.sum(1)
            row[1] = row[1] + flat.square().sum(1)
            row[2] = row[2] + flat.shape[1]

        return add

    def mean(self, name: str) -> Tensor:
        total, _, n = self.sums[name]
        return total / n

    def variance(self, name: str) -> Tensor:
        _, squares, n = self.sums[name]
        return (squares / n - self.mean(name).square()).clamp(min=0)


def flap(moments: Moments) -> Score:
    """FLAP (An et al. 2024): fluctuation of an input times the squared norm of its weights, var(x_j) * |W_:j|^2, summed
    over a unit and its consumers, divided by the mean of its group so that all groups are ranked together. (The paper
    standardises; two key-value groups then always come first, and lm_shakespeare at -20 % has perplexity 9.9, not 5.8.)
    Groups that no linear layer reads (the dimensions of queries and keys) stay."""

    def score(graph: sc.Graph, model: nn.Module, seed: int = 0) -> dict[str, Tensor]:
        found = {}
        for name, group in graph.groups.items():
            total = torch.zeros(group.size, dtype=torch.float64)
            read = False
            for layer_name, layer, positions in consumers(graph, model, group):
                w = layer.weight.detach().double()
                each = moments.variance(layer_name) * w.transpose(0, 1).flatten(1).square().sum(1)
                total, read = total + each[positions].sum(1), True
            mean = total.mean() if total.mean() > 0 else total.new_ones(())
            found[name] = total / mean if read else torch.full_like(total, torch.inf)
        return found

    return score


def compensate(result: sc.Result, dense: nn.Module, moments: Moments) -> int:
    """Add to the bias of every consumer what the removed inputs gave on average; returns how many layers changed.

    bias += sum over removed j of W_:j * mean(x_j). At the border of a padded convolution that is an approximation.
    """
    if result.cut.how != "attributes":
        raise ValueError(f"biases are added to the user's own class, and this result is a rewritten graph: {result.cut.why}")
    removed: dict[str, set[int]] = {}
    for name, group in result.graph.groups.items():
        gone = ~result.plan.keep[name] if name in result.plan.keep else torch.zeros(group.size, dtype=torch.bool)
        for layer_name, _, positions in consumers(result.graph, dense, group):
            removed.setdefault(layer_name, set()).update(positions[gone].flatten().tolist())
    outputs = _kept_outputs(result)
    for name, inputs in removed.items():
        layer, small = dense.get_submodule(name), result.model.get_submodule(name)
        columns = torch.tensor(sorted(inputs), dtype=torch.long)
        w = layer.weight.detach().double()
        w = w.flatten(2).sum(2) if w.dim() > 2 else w
        added = (w[:, columns] @ moments.mean(name)[columns])[outputs.get(name, slice(None))].to(small.weight.dtype)
        before = small.bias.detach() if small.bias is not None else torch.zeros_like(added)
        small.bias = nn.Parameter(before + added)
    return len(removed)


def _kept_outputs(result: sc.Result) -> dict[str, Tensor]:
    """For layers whose outputs were cut: the numbers of those that stay."""
    gone: dict[str, set[int]] = {}
    for name, group in result.graph.groups.items():
        for slot in group.slots:
            if slot.dim == 0 and slot.tensor.endswith(".weight") and name in result.plan.keep:
                out = slot.positions[~result.plan.keep[name]].flatten().tolist()
                gone.setdefault(slot.tensor.removesuffix(".weight"), set()).update(out)
    state = result.dense.state_dict() if result.dense is not None else {}
    kept = {}
    for name, out in gone.items():
        all_of_them = range(len(state[f"{name}.weight"]))
        kept[name] = torch.tensor([i for i in all_of_them if i not in out], dtype=torch.long)
    return kept
