"""Thresholds that are learnt with the weights (Kusupati et al. 2020, "Soft Threshold Weight Reparameterization for Learnable Sparsity", STR).

    w = sign(v) relu(|v| - sigmoid(s)),   one s for each layer

Weight decay on s and v drives the thresholds up, so the sparsity that comes out is not set but found: more decay, more zeros.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from secateur.errors import InputError, PlanError
from secateur.masks.select import Selection
from secateur.pattern import FREE, written
from secateur.plan import Cost, Plan
from secateur.recover.sparse_layers import layers_of, plain
from secateur.trace.tracer import patterns


class SoftThreshold(nn.Module):
    """The parametrization of one weight; `s` is its only parameter, a number."""

    def __init__(self, like: Tensor, init: float):
        super().__init__()
        self.s = nn.Parameter(torch.full((), init, dtype=like.dtype, device=like.device))

    def forward(self, v: Tensor) -> Tensor:
        """v -> w."""
        return v.sign() * torch.relu(v.abs() - torch.sigmoid(self.s))

    def right_inverse(self, w: Tensor) -> Tensor:
        """A v that gives w, so that putting the threshold on changes nothing that the model computes, but for rounding."""
        return w.sign() * (w.abs() + torch.sigmoid(self.s))


class SoftThresholds:
    """What `soft_threshold` put on a model."""

    def __init__(self, model: nn.Module, chosen: Selection):
        self.model, self.layers, self.left = model, chosen.layers, chosen.left
        self._orders = {m: list(m._parameters) for m in model.modules()}  # what torch puts back it puts last
        self._on = True

    @property
    def sparsity(self) -> float:
        """The share of zeros now among the weights under thresholds, from 0 to 1."""
        stays = self._stays().values()
        return 1 - sum(int(m.sum()) for m in stays) / sum(m.numel() for m in stays)

    def plan(self) -> Plan:
        """The zeros as they are now, as `hold`, `mask` and `save` take them; for the model after `remove()`. Costs count no operations.

        Raises:
            PlanError: nothing is zero now.
        """
        zero = self._stays()
        if all(bool(m.all()) for m in zero.values()):
            raise PlanError("no weight is under its threshold.\n  Train on with weight decay on the thresholds too, or start with a higher init.")
        own = {id(m.s) for m in self.model.modules() if isinstance(m, SoftThreshold)}
        parameters = [p for p in self.model.parameters() if id(p) not in own]
        size = sum(t.numel() * t.element_size() for t in (*parameters, *self.model.buffers()))
        cost = Cost(0, sum(p.numel() for p in parameters), size)
        names = {n: written(FREE, x.transposed) for n, x in self.layers.items()}
        return Plan({}, cost, cost, {"score": "soft_threshold", "pattern": "free"}, zero, names)

    def remove(self) -> None:
        """Bake the thresholds in: weights are plain parameters again, with zeros in them. `hold` the plan to train on."""
        if not self._on:
            return
        for name in self.layers:
            module, own = _place(self.model, name)
            parametrize.remove_parametrizations(module, own, leave_parametrized=True)
            with torch.no_grad():
                module.get_parameter(own).add_(0)  # of -0 this makes 0
            for known in self._orders[module]:
                module._parameters[known] = module._parameters.pop(known)
        self._on = False

    def _stays(self) -> dict[str, Tensor]:
        with torch.no_grad():
            return {n: (getattr(*_place(self.model, n)) != 0).cpu() for n in self.layers}


def soft_threshold(model: nn.Module, init: float = -5.0, ignore: Sequence[str] = ()) -> SoftThresholds:
    """Put a threshold on each linear layer and convolution, in place. Make the optimizer afterwards: the thresholds are new parameters.

    Args:
        model: what will be trained.
        init: s at the beginning; its threshold is sigmoid(init), 0.0067 at -5. The lower, the later weights go.
        ignore: names or patterns of modules or weights that stay dense.

    Raises:
        InputError: no module, no layer of it can be made sparse, or `init` is no finite number. Nothing was changed.
    """
    if isinstance(init, bool) or not isinstance(init, (int, float)) or not -100 <= init <= 100:
        raise InputError(f"init={init!r} is no start for a threshold of sigmoid(init).\n  Pass a number like -5.")
    model = plain(model)
    chosen = layers_of(model, FREE, patterns(ignore))
    held = SoftThresholds(model, chosen)
    for name in chosen.layers:
        module, own = _place(model, name)
        parametrize.register_parametrization(module, own, SoftThreshold(getattr(module, own), init))
    return held


def _place(model: nn.Module, name: str) -> tuple[nn.Module, str]:
    """The module that holds a weight, and what it calls it."""
    path, _, own = name.rpartition(".")
    return model.get_submodule(path), own
