"""One layer's fit: from moments to new weights, judged on held-out moments."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from secateur.calibrate.moments import Moments
from secateur.repair.layers import Layer
from secateur.repair.solve import RIDGE, solve


@dataclass(frozen=True)
class LayerRepair:
    """What became of one layer. Errors are relative: E|t - y|^2 on held-out calibration rows / E|t - mean t|^2 on all of them.
    Norms and attention scores, which have few free numbers, are judged on the rows of their fit. Of a whole branch `plain` is the error
    with its layers fitted one by one, `repaired` that of the branch fitted as one, and "least squares" says that this was no better.

    Attributes:
        layer: the layer's name. rows: calibration rows that were used.
        plain: error with the plain cut. bias: with the bias corrected only. repaired: with the least-squares fit.
        used: "plain", "bias", "least squares", "rectified" (through the ReLU) or "gauss-newton" (the branch as a
            whole). why: why it is not the fit, '' where it is.
        layers: how many layers were fitted as one.
    """

    layer: str
    rows: int
    plain: float
    bias: float
    repaired: float
    used: str
    why: str = ""
    layers: int = 1

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


@dataclass
class Affine:
    """y = x W^T + b in the space that is fitted: W (groups, outputs, features) float64, b (groups, outputs)."""

    w: Tensor
    b: Tensor

    def error(self, m: Moments, rows: Tensor) -> float:
        """E|t - y|^2 over the outputs that stay, `rows` (groups, outputs) booleans."""
        a, b, tt = m.central()
        x, t = m.mean()
        off = t - (self.w @ x[..., None])[..., 0] - self.b
        each = tt - 2 * (self.w * b.mT).sum(2) + ((self.w @ a) * self.w).sum(2) + off**2
        return float(each[rows].clamp_min(0).sum())


def folded(layer: Layer, state: Mapping[str, Tensor], norm: Mapping[str, str] | None, eps: float) -> Affine:
    """The layer, and the batch norm after it, as one affine map."""
    w = layer.matrix(state[layer.weight].detach().double())
    b = state[layer.bias].detach().double() if layer.bias else torch.zeros(w.shape[0] * w.shape[1], dtype=torch.float64)
    b = b.reshape(w.shape[:2])
    if norm:
        gamma, beta, mean, var = (state[norm[k]].detach().double().reshape(b.shape) for k in ("weight", "bias", "running_mean", "running_var"))
        s = gamma / (var + eps).sqrt()
        w, b = w * s[..., None], (b - mean) * s + beta
    return Affine(w, b)


def least_squares(m: Moments, before: Affine, inputs: Tensor, with_bias: bool, ridge: float = RIDGE) -> Affine:
    """The ridge solution over the features where `inputs` (features,) is True; zeros elsewhere."""
    a, b, _ = m.central() if with_bias else m.raw()
    s = torch.nonzero(inputs)[:, 0]
    prior = before.w.mT[:, s]
    w = torch.zeros_like(before.w)
    w[:, :, s] = solve(a[:, s][:, :, s], b[:, s], prior, ridge).mT
    x, t = m.mean()
    return Affine(w, t - (w @ x[..., None])[..., 0] if with_bias else before.b.clone())


def bias_only(m: Moments, before: Affine) -> Affine:
    """The same weights with the bias that makes the mean error zero (FLAP: An et al. 2024)."""
    x, t = m.mean()
    return Affine(before.w, t - (before.w @ x[..., None])[..., 0])


def written(layer: Layer, state: dict[str, Tensor], fit: Affine, norm: Mapping[str, str] | None, moments: tuple[Moments, float, Tensor]) -> None:
    """Put a fit into the state, for the outputs that stay.

    With a batch norm the fit goes into the convolution and the norm becomes the identity plus a bias: its statistics are
    those of the new output, its scale undoes them. Training on therefore starts from what was fitted.
    """
    m, eps, rows = moments
    rows_flat = rows.reshape(-1)
    old = state[layer.weight]
    w = layer.matrix(old.detach().double()).clone()
    w[rows] = fit.w[rows]
    state[layer.weight] = layer.stored(w, old)
    if norm is None:
        if layer.bias:
            _put(state, layer.bias, fit.b, rows_flat)
        return
    a, _, _ = m.central()
    x, _ = m.mean()
    mean = (fit.w @ x[..., None])[..., 0]
    var = ((fit.w @ a) * fit.w).sum(2).clamp_min(0)
    if layer.bias:
        _put(state, layer.bias, torch.zeros_like(mean), rows_flat)
    _put(state, norm["running_mean"], mean, rows_flat)
    _put(state, norm["running_var"], var, rows_flat)
    _put(state, norm["weight"], (var + eps).sqrt(), rows_flat)
    _put(state, norm["bias"], fit.b + mean, rows_flat)


def _put(state: dict[str, Tensor], name: str, value: Tensor, rows: Tensor) -> None:
    new = state[name].detach().clone()
    new[rows] = value.reshape(-1)[rows].to(new.dtype)
    state[name] = new


def written_plainly(layer: Layer, state: dict[str, Tensor], fit: Affine, norm: Mapping[str, str] | None, eps: float) -> None:
    """Put a map into the state for a trial: with a batch norm, the norm becomes the identity plus the bias."""
    state[layer.weight] = layer.stored(fit.w, state[layer.weight])
    flat = fit.b.reshape(-1)
    names = {layer.bias: flat} if layer.bias and norm is None else {}
    if norm is not None:
        one, zero = torch.ones_like(flat), torch.zeros_like(flat)
        names = {norm["running_mean"]: zero, norm["running_var"]: one - eps, norm["weight"]: one, norm["bias"]: flat}
        if layer.bias:
            names[layer.bias] = zero
    for name, value in names.items():
        state[name] = value.to(state[name].dtype)
