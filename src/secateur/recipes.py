"""Papers by name: each is `sparsify` with the settings of one paper, every layer against its own output and without a refit.

`sparsify` with its defaults (ALPS, targets corrected for what went wrong before a layer) does better on every network measured.
"""

from __future__ import annotations

from collections.abc import Iterable
from fractions import Fraction
from typing import Any

from torch import nn

from secateur.mend import Result
from secateur.pattern import FREE, Free, Pattern
from secateur.sparsify import Sparse, sparsify

Share = str | float | Fraction | None


def magnitude(model: nn.Module, args: tuple, keep: Share = None, pattern: Pattern = FREE) -> Result:
    """The largest weights of each layer stay (Han et al. 2015). Raises as `sparsify`."""
    return sparsify(model, args, Sparse(keep, "magnitude", pattern))


def wanda(model: nn.Module, args: tuple, data: Iterable[Any], keep: Share = None, pattern: Pattern = Free("row")) -> Result:  # noqa: B008  # frozen
    """Weights times the size of their input, ranked in each row (Sun et al. 2024). Raises as `sparsify`."""
    return sparsify(model, args, _paper("wanda", keep, pattern), data)


def sparsegpt(model: nn.Module, args: tuple, data: Iterable[Any], keep: Share = None, pattern: Pattern = FREE) -> Result:
    """Column by column with the inverse Hessian (Frantar & Alistarh 2023). Raises as `sparsify`."""
    return sparsify(model, args, _paper("sparsegpt", keep, pattern), data)


def obc(model: nn.Module, args: tuple, data: Iterable[Any], keep: Share = None, pattern: Pattern = FREE) -> Result:
    """One weight after the other, each time the cheapest (Frantar & Alistarh 2022). Raises as `sparsify`."""
    return sparsify(model, args, _paper("obc", keep, pattern), data)


def alps(model: nn.Module, args: tuple, data: Iterable[Any], keep: Share = None, pattern: Pattern = FREE) -> Result:
    """Mask and weights together by ADMM (Meng et al. 2024). Raises as `sparsify`."""
    return sparsify(model, args, _paper("alps", keep, pattern), data)


def _paper(by: str, keep: Share, pattern: Pattern) -> Sparse:
    return Sparse(keep, by, pattern, refit=False, corrected=False)
