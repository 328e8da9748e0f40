"""What a fit of one layer is made from and judged by."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from secateur.calibrate.moments import Moments, shared, variance
from secateur.processes import Alone
from secateur.repair.fit import Affine
from secateur.repair.rectified import Rows, rectified_error


@dataclass
class Sample:
    """What was seen of one layer: moments and sampled rows, for the fit and held out of it."""

    fit: Moments
    held: Moments
    fit_rows: Rows
    held_rows: Rows
    rectified: bool

    def error(self, fit: Affine, outputs: Tensor) -> float:
        """Relative error over the outputs that stay, on what was held out; after the ReLU where one follows."""
        if self.rectified:
            x, t, o = (self.held_rows if self.held_rows.x else self.fit_rows).joined()
            return rectified_error(fit, x, t, o, outputs) / self.scale(outputs)
        return fit.error(self.held if self.held.rows else self.fit, outputs) / self.scale(outputs)

    def scale(self, outputs: Tensor) -> float:
        """The variance of the target over all rows: of a few held-out rows alone it may be next to nothing."""
        if self.rectified:
            each = torch.cat(self.fit_rows.t + self.held_rows.t, 1).relu().var(1, correction=0).double()
        else:
            each = variance(self.fit, self.held)
        return float(each[outputs].sum()) or 1.0

    def share(self, layer: str, processes: Alone) -> None:
        """Moments over the rows of all processes, and the sampled rows of all of them, in the order of chunks."""
        shared(f"moments of {layer}", processes, self.fit, self.held)
        if self.rectified and processes.world > 1:
            for rows in (self.fit_rows, self.held_rows):
                own = {f"{name} {c:09}": v for name in "xto" for c, v in zip(rows.chunks, getattr(rows, name), strict=True)}
                found = processes.gathered(f"rows of {layer}", own)
                rows.x, rows.t, rows.o = ([found[n] for n in sorted(found) if n[0] == name] for name in "xto")
