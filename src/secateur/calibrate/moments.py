"""Second moments of a layer's inputs with themselves and with a target, streamed.

    A = E[(x - mean x)(x - mean x)^T],   B = E[(x - mean x)(t - mean t)^T],   T = E[(t - mean t)^2]

x is one row per token of a linear layer, or one row per output position of a convolution: its unfolded patch. Products of
a chunk are formed in float32 and added up in float64; chunks are shifted by the first chunk's mean, so that nothing
cancels, in all processes that share the chunks. A leading dimension counts the groups of a grouped convolution, each with
moments of its own.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from secateur.errors import DataError
from secateur.processes import Alone


@dataclass
class Moments:
    """Sums over rows; `features` and `outputs` are those of one of the `groups`."""

    groups: int
    features: int
    outputs: int
    rows: int = 0

    def __post_init__(self) -> None:
        g, d, o = self.groups, self.features, self.outputs
        self._shift_x = self._shift_t = torch.empty(0)
        self._shifted = False
        self._xx = torch.zeros(g, d, d, dtype=torch.float64)
        self._xt = torch.zeros(g, d, o, dtype=torch.float64)
        self._tt = torch.zeros(g, o, dtype=torch.float64)
        self._x = torch.zeros(g, d, dtype=torch.float64)
        self._t = torch.zeros(g, o, dtype=torch.float64)

    def add(self, x: Tensor, t: Tensor) -> None:
        """`x` (groups, rows, features), `t` (groups, rows, outputs): any floating dtype."""
        x, t = x.float(), t.float()
        if not self._shifted:
            self._shift_x, self._shift_t, self._shifted = x.mean(1, keepdim=True), t.mean(1, keepdim=True), True
        x, t = x - self._shift_x, t - self._shift_t
        self.rows += x.shape[1]
        if self.groups == 1:  # one product, which is threaded better than a batch of one
            self._xx[0] += x[0].mT @ x[0]
            self._xt[0] += x[0].mT @ t[0]
        else:
            self._xx += torch.bmm(x.mT, x)
            self._xt += torch.bmm(x.mT, t)
        self._tt += (t * t).sum(1)
        self._x += x.sum(1)
        self._t += t.sum(1)

    def around(self, shift_x: Tensor, shift_t: Tensor) -> Moments:
        """Itself, empty, ready for rows near that shift, float32 (groups, 1, features) and (groups, 1, outputs)."""
        self._shift_x, self._shift_t, self._shifted = shift_x, shift_t, True
        return self

    def mean(self) -> tuple[Tensor, Tensor]:
        """(groups, features) and (groups, outputs), float64."""
        return self._shift_x[:, 0].double() + self._x / self.rows, self._shift_t[:, 0].double() + self._t / self.rows

    def central(self) -> tuple[Tensor, Tensor, Tensor]:
        """A (groups, features, features), B (groups, features, outputs), T (groups, outputs), all around the mean."""
        x, t, n = self._x / self.rows, self._t / self.rows, self.rows
        a = self._xx / n - x[:, :, None] * x[:, None, :]
        b = self._xt / n - x[:, :, None] * t[:, None, :]
        return a, b, (self._tt / n - t * t).clamp_min(0)

    def check(self, layer: str) -> None:
        """
        Raises:
            DataError: what `layer` takes in, or should give, is not finite.
        """
        if not all(bool(torch.isfinite(v).all()) for v in (self._xx, self._xt, self._tt)):
            raise DataError(
                f"layer {layer!r} takes in or gives numbers that are not finite on the calibration data, so nothing can be fitted to them.\n"
                "  Look for values out of the data's usual range, or use repair='none'."
            )

    def raw(self) -> tuple[Tensor, Tensor, Tensor]:
        """The same around zero: for a layer that can have no bias."""
        a, b, tt = self.central()
        x, t = self.mean()
        return a + x[:, :, None] * x[:, None, :], b + x[:, :, None] * t[:, None, :], tt + t * t


def variance(*parts: Moments) -> Tensor:
    """Of the targets over the rows of all parts, (groups, outputs), float64; the parts share one shift."""
    n = sum(m.rows for m in parts)
    mean = sum((m._t for m in parts), torch.zeros(())) / n
    return (sum((m._tt for m in parts), torch.zeros(())) / n - mean * mean).clamp_min(0)


def begun(what: str, processes: Alone, first: tuple[Tensor, Tensor] | None, *parts: Moments) -> None:
    """Give all parts, in all processes, the shift of chunk 0: its means. `first`: x and t of that chunk, where this process runs it."""
    own = {} if first is None else {name: v.float().mean(1, keepdim=True) for name, v in zip("xt", first, strict=True)}
    shift = processes.lent(f"shift of {what}", own)
    for m in parts:
        m.around(shift["x"], shift["t"])


def shared(what: str, processes: Alone, *parts: Moments) -> None:
    """Moments over the rows of all processes, in place; they have begun with one shift. Float32 products of chunks added up in float64 leave
    next to nothing to round, so that it does not matter who has added which."""
    if processes.world == 1:
        return
    for number, m in enumerate(parts):
        own = {"rows": torch.tensor(m.rows), **{name: getattr(m, name) for name in ("_xx", "_xt", "_tt", "_x", "_t")}}
        found = processes.total(f"{what}, part {number}", own)
        m.rows = int(found.pop("rows"))
        for name, value in found.items():
            setattr(m, name, value)


def patches(x: Tensor, kernel: list[int], stride: list[int], padding: list[int], dilation: list[int], at: Tensor | None) -> Tensor:
    """Patches of a convolution input as rows.

    Args:
        x: (batch, channels, *space).
        kernel, stride, padding, dilation: one entry per dimension of space.
        at: indices into the flattened output positions, None for all.

    Returns (batch * positions, channels, kernel size), in the order of the weight's columns.
    """
    n = len(kernel)
    if any(padding):
        x = torch.nn.functional.pad(x, [p for q in reversed(padding) for p in (q, q)])
    out = [(x.shape[2 + i] - dilation[i] * (kernel[i] - 1) - 1) // stride[i] + 1 for i in range(n)]
    x = x.contiguous()
    s = x.stride()
    view = x.as_strided(
        (x.shape[0], x.shape[1], *out, *kernel),
        (s[0], s[1], *(s[2 + i] * stride[i] for i in range(n)), *(s[2 + i] * dilation[i] for i in range(n))),
    )
    if at is None:
        rows = view.movedim(1, 1 + n)  # batch, *out, channels, *kernel
    else:
        where = torch.unravel_index(at, out)
        rows = view.permute(*range(2, 2 + n), 0, 1, *range(2 + n, 2 + 2 * n))[where].transpose(0, 1)
    return rows.reshape(-1, x.shape[1], int(torch.tensor(kernel).prod()))
