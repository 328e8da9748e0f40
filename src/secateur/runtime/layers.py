"""Layers that compute with sparse weights. Where there are no kernels (no compiler, another dtype or device) they compute with dense ones."""

from __future__ import annotations

from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from secateur.errors import InputError
from secateur.runtime.layout import ROWS, Layout, dense
from secateur.runtime.ops import Window, kept, lifted, lowered, takes


class SparseLayer(nn.Module):
    """What they share: `values` (n, r) is a parameter; `index` and `starts` are buffers (`secateur.runtime.layout`). The file of a state
    dict holds what is not zero, and nothing else. Training keeps zeros: those that a block of rows brings with it have no derivative.

    Attributes:
        rows, columns, r, set: of the layout.
        relu: the layer ends with a ReLU.
    """

    def __init__(self, layout: Layout, bias: Tensor | None, relu: bool = False):
        super().__init__()
        self.values = nn.Parameter(layout.values)
        self.index: Tensor
        self.starts: Tensor
        self.register_buffer("index", layout.index)
        self.register_buffer("starts", layout.starts)
        self.bias: nn.Parameter | None
        self.register_parameter("bias", None if bias is None else nn.Parameter(bias.detach().to(torch.float32).clone()))
        self.rows, self.columns, self.r, self.set, self.relu = layout.rows, layout.columns, layout.r, layout.set, relu

    def tensors(self) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """values, index, starts and bias, past the look-up of modules, which takes longer than what a small layer computes."""
        own, held = self._parameters, self._buffers
        if "values" in own and "bias" in own:
            return own["values"], held["index"], held["starts"], own["bias"]  # type: ignore[return-value]
        return self.values, self.index, self.starts, self.bias  # parametrized: a module then looks them up itself

    def matrix(self) -> Tensor:
        """The weight (rows, columns) with its zeros."""
        return dense(kept(self.values), self.index, self.starts, (self.rows, self.columns, self.r, self.set))

    @property
    def weight(self) -> Tensor:
        """The weight with its zeros, made anew at every look; for code that asks a layer for its dtype or device."""
        return self.matrix()

    @property
    def density(self) -> float:
        """The share of the weights that is stored, those included that a block of rows brings with it."""
        return self.values.numel() / (self.rows * self.columns)

    def _learns_as(self, layer: nn.Linear | nn.Conv1d | nn.Conv2d) -> Self:
        """With what is frozen in the dense layer frozen."""
        self.values.requires_grad_(layer.weight.requires_grad)
        if self.bias is not None and layer.bias is not None:
            self.bias.requires_grad_(layer.bias.requires_grad)
        return self

    def _ended(self, y: Tensor, plus: Tensor | None = None) -> Tensor:
        y = y if plus is None else (y + plus).to(y.dtype)  # as a sum in place
        return F.relu(y) if self.relu else y


class SparseLinear(SparseLayer):
    """y = x W^T + b for x (..., columns), W sparse."""

    @property
    def in_features(self) -> int:
        return self.columns

    @property
    def out_features(self) -> int:
        return self.rows

    @classmethod
    def of(cls, layer: nn.Linear, r: int | None = None, relu: bool = False) -> Self:
        """
        Args:
            layer: with zeros in its weight. r: rows of a block, 1, 4 or 8; None chooses.

        Raises:
            InputError: no such r.
        """
        return cls(Layout.of(layer.weight, _known(r)), layer.bias, relu)._learns_as(layer)

    def forward(self, input: Tensor) -> Tensor:
        x = lifted(input)  # named as that of nn.Linear, for calls by keyword
        values, index, starts, bias = self.tensors()
        if takes(x, values):
            shape = self.rows, self.columns, self.r, self.set
            return lowered(torch.ops.secateur.sparse_linear(x.contiguous(), values, index, starts, bias, *shape, self.relu))
        return self._ended(F.linear(x, self.matrix().to(x.dtype), None if self.bias is None else self.bias.to(x.dtype)))

    def extra_repr(self) -> str:
        return f"{self.columns}, {self.rows}, density={self.density:.3f}, r={self.r}"


class SparseConv2d(SparseLayer):
    """A convolution of x (N, C, H, W), one group, zeros outside the image, W sparse. `plus`, of the output's shape, is added to it before its
    ReLU. What code asks of a dense convolution (`stride`, `in_channels`) it answers as that one would."""

    groups, transposed, padding_mode = 1, False, "zeros"  # `why_not` lets no others in

    def __init__(self, layout: Layout, bias: Tensor | None, window: Window, relu: bool = False):
        super().__init__(layout, bias, relu)
        self.window = window

    @property
    def in_channels(self) -> int:
        return self.columns // (self.window[0] * self.window[1])

    @property
    def out_channels(self) -> int:
        return self.rows

    def _sizes(self, at: int) -> tuple[int, ...]:
        return self.window[at : at + 2]

    @property
    def kernel_size(self) -> tuple[int, ...]:
        return self._sizes(0)

    @property
    def stride(self) -> tuple[int, ...]:
        return self._sizes(2)

    @property
    def padding(self) -> tuple[int, ...]:
        return self._sizes(4)

    @property
    def dilation(self) -> tuple[int, ...]:
        return self._sizes(6)

    @property
    def weight(self) -> Tensor:
        return self.matrix().view(self.rows, self.in_channels, *self.kernel_size)

    @classmethod
    def of(cls, layer: nn.Conv2d | nn.Conv1d, r: int | None = None, relu: bool = False) -> Self:
        """
        Args:
            layer: with zeros in its weight. r: rows of a block, 1, 4 or 8; None chooses.

        Raises:
            InputError: no such r, or a convolution with groups, with padding that is not zeros, or given in words.
        """
        if why := why_not(layer):
            raise InputError(f"{layer} cannot be made a sparse layer: {why}.\n  Leave it dense.")
        flat = isinstance(layer, nn.Conv1d)
        one, zero = ((1,), (0,)) if flat else ((), ())
        sizes = [(*one, *layer.kernel_size), (*one, *layer.stride), (*zero, *layer.padding), (*one, *layer.dilation)]
        window: Any = tuple(int(n) for pair in sizes for n in pair)
        taps, weight = window[0] * window[1], layer.weight.flatten(1)
        return cls(Layout.of(weight, _known(r), taps=taps), layer.bias, window, relu)._learns_as(layer)

    def forward(self, input: Tensor, plus: Tensor | None = None) -> Tensor:
        x, w = lifted(input), self.window
        if x.dim() == 3:  # an image by itself
            return SparseConv2d.forward(self, x[None], None if plus is None else plus[None])[0]
        values, index, starts, bias = self.tensors()
        plus = None if plus is None else lifted(plus)
        if takes(x, values) and (plus is None or plus.dtype == x.dtype):
            added = None if plus is None else plus.contiguous()
            shape = self.rows, self.columns, self.r, self.set
            return lowered(torch.ops.secateur.sparse_conv2d(x.contiguous(), values, index, starts, bias, added, *shape, self.relu, w))
        weight = self.matrix().view(self.rows, -1, *w[:2]).to(x.dtype)
        return self._ended(F.conv2d(x, weight, None if self.bias is None else self.bias.to(x.dtype), w[2:4], w[4:6], w[6:8]), plus)

    def extra_repr(self) -> str:
        w = self.window
        return (f"{self.in_channels}, {self.rows}, kernel={w[:2]}, stride={w[2:4]}, padding={w[4:6]}, density={self.density:.3f}, "
                f"r={self.r}")  # fmt: skip


class SparseConv1d(SparseConv2d):
    """A convolution of x (N, C, L)."""

    def _sizes(self, at: int) -> tuple[int, ...]:
        return self.window[at + 1 : at + 2]

    def forward(self, input: Tensor, plus: Tensor | None = None) -> Tensor:
        return super().forward(input.unsqueeze(-2), None if plus is None else plus.unsqueeze(-2)).squeeze(-2)


class Fused(nn.Module):
    """A layer, what is added to its output, and the ReLU behind them."""

    def __init__(self, layer: nn.Module, relu: bool):
        super().__init__()
        self.layer, self.relu = layer, relu

    def forward(self, x: Tensor, plus: Tensor | None = None) -> Tensor:
        y = self.layer(x)
        y = y if plus is None else y.add_(plus)
        return F.relu_(y) if self.relu else y


def why_not(layer: nn.Module) -> str:
    """Why a layer has no sparse form, '' where it has one."""
    layer = inner(layer)
    if layer._forward_hooks or layer._forward_pre_hooks or layer._backward_hooks:
        return "it has hooks"
    if type(layer) is nn.Linear:
        return ""
    if not isinstance(layer, (nn.Conv1d, nn.Conv2d)) or type(layer) not in (nn.Conv1d, nn.Conv2d):
        return f"{type(layer).__name__} is no plain linear layer or convolution"
    if layer.groups != 1:
        return f"it has {layer.groups} groups"
    if layer.padding_mode != "zeros" or isinstance(layer.padding, str):
        return f"its padding is {layer.padding_mode if layer.padding_mode != 'zeros' else layer.padding!r}"
    taps = layer.weight[0, 0].numel()
    return f"its window has {taps} taps" if taps > 65536 else ""


def inner(layer: nn.Module) -> nn.Module:
    """The layer that holds the weight."""
    return layer.layer if isinstance(layer, Fused) else layer


def sparse(layer: nn.Module, r: int | None = None, relu: bool = False) -> SparseLayer:
    """The sparse form of a layer with zeros in its weight.

    Raises:
        InputError: it has none.
    """
    layer, relu = inner(layer), relu or (isinstance(layer, Fused) and layer.relu)
    if why := why_not(layer):
        raise InputError(f"{layer} cannot be made a sparse layer: {why}.\n  Leave it dense.")
    weight = layer.get_parameter("weight")
    if weight.dtype != torch.float32 or not weight.numel():
        raise InputError(f"{layer} cannot be made a sparse layer: its weight is {weight.dtype} of shape {tuple(weight.shape)}.\n"
                         "  Kernels are for float32, and for a weight that is not empty; leave it dense.")  # fmt: skip
    if isinstance(layer, nn.Linear):
        return SparseLinear.of(layer, r, relu)
    assert isinstance(layer, (nn.Conv1d, nn.Conv2d))  # `why_not` knows no others
    return (SparseConv1d if isinstance(layer, nn.Conv1d) else SparseConv2d).of(layer, r, relu)


def _known(r: int | None) -> int | None:
    if r is not None and r not in ROWS:
        raise InputError(f"r={r}: there are kernels for blocks of {', '.join(map(str, ROWS))} rows.\n  Choose one of them, or None.")
    return r
