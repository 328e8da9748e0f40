"""Training that makes units small before they are cut: what is added to the loss.

    loss = F.cross_entropy(model(x), y) + 1e-4 * group_lasso(graph, model)

Each is a scalar tensor that gradients flow through; its strength is the factor that the caller puts before it.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from secateur.errors import InputError, PlanError
from secateur.plan import Plan
from secateur.recover.sparse_layers import plain
from secateur.trace import Graph


def bn_l1(model: nn.Module) -> Tensor:
    """sum |gamma| over the scales of all batch norms   (Liu et al. 2017, "Network Slimming"; they put 1e-4 before it). Cut by "bn_scale".

    Raises:
        InputError: the model has no batch norm with a scale.
    """
    norms = [m for m in plain(model).modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    scales = {id(m.weight): m.weight for m in norms if m.weight is not None}
    if not scales:
        raise InputError(f"bn_l1 makes scales of batch norms small, and {type(model).__name__} has {len(norms)} batch norms, none with a scale.\n"
                         "  Use group_lasso(graph, model).")  # fmt: skip
    return _sum([w.abs().sum() for w in scales.values()])


def group_lasso(graph: Graph, model: nn.Module) -> Tensor:
    """sum over groups and their units u of ||w_u||, w_u all trainable weights that go when the unit goes: its row in the layer that makes it, its
    bias and scale, its columns in the layers that take it in   (Yuan & Lin 2006; Wen et al. 2016, "Structured Sparsity"; Fang et al. 2023,
    "DepGraph", for units coupled over many layers). At a unit of zeros alone the gradient is 0.

    Args:
        graph: `trace(model, args)`.
        model: the module that was traced, or one with the same names and shapes.

    Raises:
        InputError: the graph is of another model, or has no group that can be cut.
    """
    return _sum([_root(s).sum() for s in _squares(graph, model).values()])


@dataclass(frozen=True)
class Growth:
    """How the factor of `growing` grows: by `rate` every `every` steps, up to `most`; the defaults are those of Wang et al.

    Raises:
        InputError: a value that is not above 0.
    """

    rate: float = 1e-4
    every: int = 10
    most: float = 1.0

    def __post_init__(self) -> None:
        for name in ("rate", "every", "most"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int if name == "every" else (int, float)) or not 0 < value < float("inf"):
                raise InputError(f"{name}={value!r} makes nothing grow.\n  Pass a {'whole ' if name == 'every' else ''}number above 0.")

    def at(self, step: int) -> float:
        """The factor after so many steps."""
        return min(self.most, self.rate * (step // self.every))


def growing(graph: Graph, model: nn.Module, step: int, plan: Plan | None = None, growth: Growth = Growth()) -> Tensor:
    """lambda_t / 2  sum over units u of  c_u ||w_u||^2,   lambda_t = min(most, rate * (t // every))   (Wang et al. 2021, "Neural Pruning via Growing
    Regularization"). It is strength in itself: add it to the loss without a factor. w_u is as in `group_lasso`.

    Args:
        graph, model: as in `group_lasso`.
        step: t, steps of the optimizer so far.
        plan: c_u is 1 for the units that it removes, and 0 for the others (GReg-1). None: c_u = (max - I_u) / (max - min) with I_u = ||w_u|| now and
            max and min over the group, so that small units are pressed most (as DepGraph's regularisation grows).
        growth: of lambda.

    Raises:
        InputError: as `group_lasso`; `step` is no count. PlanError: the plan removes no unit, or names other groups.
    """
    if isinstance(step, bool) or not isinstance(step, int) or step < 0:
        raise InputError(f"step={step!r} is no number of steps.\n  Pass how often the optimizer has stepped: 0, 1, 2, ...")
    squares = _squares(graph, model)
    if plan is None:
        pressed = {n: _smallness(s.detach()) for n, s in squares.items()}
    else:
        graph.keep_axes(plan.keep)
        pressed = {n: (~plan.keep[n]).to(squares[n]) for n in plan.removed if n in squares}
        if not pressed:
            raise PlanError(f"the plan removes no unit of the {len(squares)} groups of the graph, so no weight is to become small.\n"
                            "  Pass a plan of the units that will go, or none.")  # fmt: skip
    return growth.at(step) / 2 * _sum([(c * squares[n]).sum() for n, c in pressed.items()])


def _smallness(squares: Tensor) -> Tensor:
    """1 for the smallest unit of a group, 0 for the largest; 0 for all where they are equal."""
    norms = squares.sqrt()
    least, most = norms.min(), norms.max()
    return (most - norms) / (most - least) if bool(most > least) else torch.zeros_like(norms)


def _squares(graph: Graph, model: nn.Module) -> dict[str, Tensor]:
    """||w_u||^2 of the units of every group: (units,), differentiable.

    Raises:
        InputError: the graph is of another model, or has no group that can be cut.
    """
    state = dict(plain(model).named_parameters(remove_duplicate=False))
    found = {}
    for name, group in graph.groups.items():
        slots = [s for s in group.slots if s.tensor in graph.capture.trainable]
        if not slots:
            continue
        parts = []
        for s in slots:
            w = state.get(s.tensor)
            if w is None or w.shape != graph.capture.values[s.tensor].shape:
                have = "missing" if w is None else tuple(w.shape)
                raise InputError(f"{s.tensor!r} is {tuple(graph.capture.values[s.tensor].shape)} in the graph and {have} in the model.\n"
                                 "  Trace this model: graph = trace(model, args).")  # fmt: skip
            others = [d for d in range(w.dim()) if d != s.dim]
            each = w.abs().square()
            parts.append((each.sum(others) if others else each)[s.positions.to(w.device)].sum(1))
        total = parts[0]
        for part in parts[1:]:
            total = total + part.to(total)
        found[name] = total
    if not found:
        raise InputError(f"{type(model).__name__} has {len(graph.groups)} groups of trained units.\n  Trace without ignore=, or leave it out.")
    return found


def _root(squares: Tensor) -> Tensor:
    """Square roots with the gradient 0, not infinity, at 0."""
    some = squares > 0
    return torch.where(some, squares, 1).sqrt() * some


def _sum(parts: list[Tensor]) -> Tensor:
    total = parts[0]
    for part in parts[1:]:
        total = total + part.to(total.device)
    return total
