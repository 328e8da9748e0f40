"""Methods that make one layer sparse, by name: each is a function of a `Problem`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Literal

from secateur.errors import InputError
from secateur.masks.alps import alps
from secateur.masks.obc import obc
from secateur.masks.problem import Problem, Solution
from secateur.masks.ranked import magnitude, ria, wanda
from secateur.masks.sparsegpt import sparsegpt

Solve = Callable[[Problem], Solution]


@dataclass(frozen=True)
class Method:
    """A way to choose the weights of a layer that stay, and what `secateur explain` says about it.

    Attributes:
        name: as `by=` takes it.
        function: `Problem` -> `Solution`.
        formula: in plain characters; w is a weight, x its input, H = E[x x^T].
        needs: "weights", or "inputs" (data, no labels).
        cost: what it takes to compute. when: what it is good for. paper: where it comes from.
    """

    name: str
    function: Solve
    formula: str
    needs: Literal["weights", "inputs"]
    cost: str
    when: str
    paper: str

    def facts(self) -> dict[str, str]:
        """Everything but the function, as plain JSON values."""
        return {k: v for k, v in asdict(self).items() if k != "function"}


METHODS: dict[str, Method] = {
    "magnitude": Method(
        "magnitude", magnitude, "w^2", "weights", "one look at the weights",
        "Without data, or before a long fine-tuning.", "Han et al. 2015, Learning both Weights and Connections for Efficient Neural Networks",
    ),
    "wanda": Method(
        "wanda", wanda, "w_oj^2 E[x_j^2], ranked within each output", "inputs", "one pass over the data, the diagonal of H",
        "Language models at 50 %, quickly.", "Sun et al. 2024, A Simple and Effective Pruning Approach for Large Language Models",
    ),
    "ria": Method(
        "ria", ria, "((|w_oj| / sum_o |w_oj| + |w_oj| / sum_j |w_oj|) E[x_j^2]^(1/4))^2, ranked within each output", "inputs", "as wanda",
        "As wanda, where whole rows or columns would otherwise go; N:M.",
        "Zhang et al. 2024, Plug-and-Play: An Efficient Post-training Pruning Method for Large Language Models",
    ),
    "sparsegpt": Method(
        "sparsegpt", sparsegpt, "w_oj^2 / U_jj^2, U the upper Cholesky factor of H^-1; then w_o,k>j -= w_oj U_jk / U_jj", "inputs",
        "H, its inverse, and one pass over the columns", "Language models and convolutions at 50 to 70 %; a refit improves it.",
        "Frantar & Alistarh 2023, SparseGPT: Massive Language Models Can Be Accurately Pruned in One-Shot",
    ),
    "obc": Method(
        "obc", obc, "one weight after the other by w_p^2 / [H^-1]_pp; then w -= H^-1_:p w_p / [H^-1]_pp", "inputs",
        "outputs x inputs^3: layers of up to about 2,000 inputs", "Convolutions, and small layers at high sparsity.",
        "Frantar & Alistarh 2022, Optimal Brain Compression",
    ),
    "alps": Method(
        "alps", alps, "min tr((W - W') H (W - W')^T) with W' on a mask, by ADMM on mask and weights together", "inputs",
        "an eigendecomposition of H, then up to 300 products with it", "The best masks for large layers, from 60 % on.",
        "Meng et al. 2024, ALPS: Improved Optimization for Highly Sparse One-Shot Pruning for Large Language Models",
    ),
}  # fmt: skip


def find(name: str) -> Method:
    """The method of that name.

    Raises:
        InputError: there is none.
    """
    if name not in METHODS:
        raise InputError(f"unknown method {name!r}.\n  There are: {', '.join(METHODS)}.")
    return METHODS[name]
