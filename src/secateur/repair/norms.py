"""Norms that no fitted layer absorbs: one scale and one shift per channel.

After a cut a norm normalises over fewer channels, or by statistics of the dense network. Of the values y that it gives now
the nearest to the dense ones t are a y + c,

    a = cov(y, t) / var(y),   c = mean t - a mean y      (a = E[y t] / E[y^2] where the norm has no bias)

and a and c go into its weight and bias (mean and variance correction of norms: CompensatedLayerNorm, arXiv 2606.14346).
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor, fx

from secateur.repair.layers import Layer, state_name
from secateur.trace import Graph
from secateur.trace.call import bind, op_name, shape_of

_LAST = ("layer_norm", "rms_norm")
_SECOND = ("batch_norm", "group_norm")


@dataclass
class Norm:
    """A norm with a weight of its own, one number per channel; `dim` is where its channels are."""

    node: fx.Node
    source: fx.Node
    weight: str
    bias: str | None
    dim: int

    @property
    def name(self) -> str:
        return self.weight.removesuffix(".weight")


def find_norms(graph: Graph, layers: list[Layer]) -> list[Norm]:
    """Norms whose weight (and bias) nothing else uses, except those that are fitted with the layer before them."""
    taken = {x.norm for x in layers if x.norm is not None}
    found = []
    for node in graph.capture.graph.nodes:
        op = op_name(node) if node.op == "call_function" else ""
        if node in taken or op not in (*_LAST, *_SECOND):
            continue
        args = bind(node)
        weight, bias = (state_name(graph, args.get(k)) for k in ("weight", "bias"))
        parameters = [args[k] for k in ("weight", "bias") if isinstance(args.get(k), fx.Node)]
        shape = shape_of(node.meta["val"]) if isinstance(node.meta["val"], Tensor) else []
        single = all(len(p.users) == 1 and len(shape_of(p.meta["val"])) == 1 for p in parameters)
        if weight in graph.capture.trainable and single and weight and (bias or args.get("bias") is None):
            found.append(Norm(node, args["input"], weight, bias, len(shape) - 1 if op in _LAST else 1))
    return found


@dataclass
class Channels:
    """Sums over all positions, channel by channel, float64; `n` counts them."""

    sums: dict[str, Tensor] = field(default_factory=dict)

    def add(self, y: Tensor, t: Tensor, dim: int) -> None:
        y, t = (v.double().movedim(dim, -1).flatten(0, -2) for v in (y, t))
        self.sums["n"] = self.sums.get("n", torch.zeros((), dtype=torch.float64)) + len(y)
        for name, value in (("y", y), ("t", t), ("yy", y * y), ("yt", y * t), ("tt", t * t)):
            self.sums[name] = self.sums.get(name, torch.zeros((), dtype=torch.float64)) + value.sum(0)

    @property
    def rows(self) -> int:
        return int(self.sums["n"])

    def fitted(self, with_bias: bool, scale: bool = True) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """a, c, and the squared errors per channel before and after, (channels,) each; with `scale` off a is 1."""
        m = {k: v / self.sums["n"] for k, v in self.sums.items()}
        y, t = (m["y"], m["t"]) if with_bias else (torch.zeros_like(m["y"]), torch.zeros_like(m["t"]))
        var, cov = m["yy"] - y * y, m["yt"] - y * t
        a = torch.where(var > 1e-12, cov / var.clamp_min(1e-12), torch.ones_like(var)) if scale else torch.ones_like(var)
        c = t - a * y
        before = m["tt"] - 2 * m["yt"] + m["yy"]
        after = before + (a * a - 1) * m["yy"] - 2 * (a - 1) * m["yt"] + 2 * c * (a * m["y"] - m["t"]) + c * c
        return a, c, before.clamp_min(0), after.clamp_min(0)

    def variance(self) -> Tensor:
        m = {k: v / self.sums["n"] for k, v in self.sums.items()}
        return (m["tt"] - m["t"] ** 2).clamp_min(0)


def write_norm(norm: Norm, state: dict[str, Tensor], a: Tensor, c: Tensor, kept: Tensor) -> None:
    """y becomes a y + c in the channels that stay: the weight times a, the bias times a plus c."""
    weight = state[norm.weight].detach().clone()
    weight[kept] = (weight.double() * a)[kept].to(weight.dtype)
    state[norm.weight] = weight
    if norm.bias:
        bias = state[norm.bias].detach().clone()
        bias[kept] = (bias.double() * a + c)[kept].to(bias.dtype)
        state[norm.bias] = bias
