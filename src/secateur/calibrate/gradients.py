"""Gradients of the loss, added up over batches. The model runs as the user wrote it, in eval mode, and is left as it was."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from inspect import Parameter, signature
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._pytree import tree_map_only

from secateur.calibrate.batches import Batch, does_not_run
from secateur.calibrate.loss import Loss, loss_of
from secateur.errors import DataError, SecateurError
from secateur.measure.run import at_rest
from secateur.processes import ALONE, Alone
from secateur.trace import Graph


@dataclass(frozen=True)
class Gradients:
    """Means over batches, each weighted by its rows; g is the gradient of the mean loss of one batch.

    Attributes:
        mean: parameter name -> E[g].
        mean_square: parameter name -> E[g^2]. With batches of one row this is the diagonal of the empirical Fisher
            matrix; with more rows it is the square of an average, which is smaller where the rows disagree.
        first: group -> E|sum_w w g| over all trainable weights w of each unit, float64 (units,).
        second: group -> E[(sum_w w g)^2], likewise.
    """

    mean: Mapping[str, Tensor]
    mean_square: Mapping[str, Tensor]
    first: Mapping[str, Tensor]
    second: Mapping[str, Tensor]


@contextmanager
def differentiable(model: nn.Module) -> Iterator[Mapping[str, Tensor]]:
    """Its parameters of floating point by name, all of them asking for gradients, with the model in eval mode. Flags,
    buffers and what stands in `.grad` are afterwards as they were.

    Attention runs as plain arithmetic, because fused kernels cannot be differentiated twice.
    """
    parameters = {n: p for n, p in model.named_parameters() if p.is_floating_point() or p.is_complex()}
    flags = [(p, p.requires_grad) for p in parameters.values()]
    with at_rest(model):
        try:
            with torch.inference_mode(False), torch.enable_grad(), sdpa_kernel(SDPBackend.MATH):
                for p, _ in flags:
                    p.requires_grad_(True)
                yield parameters
        finally:
            for p, flag in flags:
                p.requires_grad_(flag)


def gradients(model: nn.Module, graph: Graph, data: Iterable[Batch], loss: Loss | None, processes: Alone = ALONE) -> Gradients:
    """One forward and one backward pass per batch. `data` is the share of this process.

    Raises:
        DataError: no batch, no labels where they are needed, a loss or gradient that is not finite.
        ProcessError: another process, which has a share of its own, stopped.
    """
    mean: dict[str, Tensor] = {}
    square: dict[str, Tensor] = {}
    first = {n: torch.zeros(g.size, dtype=torch.float64) for n, g in graph.groups.items()}
    second = {n: torch.zeros_like(v) for n, v in first.items()}
    rows = 0
    with differentiable(model) as parameters:
        for batch in data:
            rows += batch.rows
            found = _gradients(model, parameters, batch, loss)
            with torch.no_grad():
                products = {n: _wide(parameters[n].detach()) * g for n, g in found.items()}
                for n, g in found.items():
                    mean[n] = mean.get(n, 0) + batch.rows * g
                    square[n] = square.get(n, 0) + batch.rows * g.square()
                for n, each in _per_unit(graph, products).items():
                    first[n] += batch.rows * each.abs()
                    second[n] += batch.rows * each.square()
    each_row = {"E[g]": mean, "E[g^2]": square, "E|sum w g|": first, "E[(sum w g)^2]": second}
    rows = _some(rows, processes)
    return Gradients(*({n: v / rows for n, v in processes.total(f"gradients, {k}", own).items()} for k, own in each_row.items()))


def curvature(
    model: nn.Module, data: Iterable[Batch], loss: Loss | None, along: Mapping[str, Tensor], processes: Alone = ALONE
) -> dict[str, Tensor]:
    """H v by parameter name: the Hessian of the mean loss of all rows times the direction `along`.

    Two backward passes per batch: grad(sum_p <grad_p L, v_p>).

    Raises:
        DataError: as `gradients`; also where an op of the model has no second derivative.
    """
    out: dict[str, Tensor] = {}
    rows = 0
    with differentiable(model) as parameters:
        for batch in data:
            rows += batch.rows
            found = _gradients(model, parameters, batch, loss, twice=True)
            slope = sum((g * along[n].to(g.dtype)).sum() for n, g in found.items() if n in along)
            if isinstance(slope, Tensor) and slope.requires_grad:
                for n, h in zip(parameters, _again(slope, parameters, batch), strict=True):
                    if h is not None:
                        out[n] = out.get(n, 0) + batch.rows * _wide(h)
    rows = _some(rows, processes)
    return {n: v / rows for n, v in processes.total("H g", out).items()}


def _again(slope: Tensor, parameters: Mapping[str, Tensor], batch: Batch) -> tuple[Tensor | None, ...]:
    try:
        return torch.autograd.grad(slope, list(parameters.values()), allow_unused=True)
    except RuntimeError as error:
        said = (str(error).strip().splitlines() or ["?"])[0]
        raise DataError(
            f"the gradient cannot be differentiated once more on {batch}: {said}\n  Use a criterion of first order, such as 'taylor'."
        ) from error


def _gradients(model: nn.Module, parameters: Mapping[str, Tensor], batch: Batch, loss: Loss | None, twice: bool = False) -> dict[str, Tensor]:
    """d loss / d parameter, for those the loss depends on."""
    value = loss_of(_outputs(model, batch), batch, loss)
    if not value.requires_grad:
        raise DataError(
            f"the loss of {batch}, depends on no parameter of {type(model).__name__}.\n"
            "  Compute it from the outputs with torch ops, and run forward() without torch.no_grad()."
        )
    found = torch.autograd.grad(value, list(parameters.values()), allow_unused=True, create_graph=twice)
    out = {n: g if twice else _wide(g) for n, g in zip(parameters, found, strict=True) if g is not None}
    for name, g in out.items():
        if not bool(torch.isfinite(g.detach()).all()):
            bad = int((~torch.isfinite(g.detach())).sum())
            raise DataError(
                f"{batch}, gives a gradient of parameter {name!r} of which {bad} of {g.numel()} numbers are NaN or infinite.\n"
                "  Look for extreme values in that batch, or for a model that overflows in its dtype."
            )
    return out


def _outputs(model: nn.Module, batch: Batch) -> Any:
    """The model on copies: what it writes into its inputs must neither reach the user nor be undone before the backward pass."""
    kwargs = batch.kwargs if _takes_labels(model) else {k: v for k, v in batch.kwargs.items() if k != "labels"}
    args, kwargs = tree_map_only(Tensor, lambda t: t.detach().clone(), (batch.args, dict(kwargs)))
    try:
        return model(*args, **kwargs)
    except SecateurError:
        raise
    except Exception as error:  # a user's forward may raise anything
        said = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise does_not_run(batch.number, args, kwargs, said) from error


def _takes_labels(model: nn.Module) -> bool:
    try:
        found = signature(model.forward).parameters
    except (TypeError, ValueError):
        return True
    return "labels" in found or any(p.kind is Parameter.VAR_KEYWORD for p in found.values())


def _per_unit(graph: Graph, products: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Signed sums over all trainable weights of each unit: {group: float64 (units,)}."""
    found = {}
    for name, group in graph.groups.items():
        total = torch.zeros(group.size, dtype=torch.float64)
        for s in group.slots:
            if s.tensor in products:
                value = products[s.tensor]
                others = [d for d in range(value.dim()) if d != s.dim]
                each = (value.sum(others) if others else value).double().cpu()
                total += each[s.positions].sum(1)
        found[name] = total
    return found


def _wide(t: Tensor) -> Tensor:
    """Half precision as float32; the real part of what is complex."""
    t = t.real if t.is_complex() else t
    return t if t.dtype == torch.float64 else t.float()


def _some(rows: int, processes: Alone) -> int:
    """The rows of all processes."""
    rows = int(processes.total("rows", {"rows": torch.tensor(rows)})["rows"])
    if not rows:
        raise DataError("data holds no batch, so no gradient can be taken.\n  Pass at least one batch.")
    return rows
