"""Sparse weights: which single weights stay, and what values they take."""

from secateur.masks.budgets import BUDGETS
from secateur.masks.exact import wrong_zeros
from secateur.masks.methods import METHODS, Method, find
from secateur.masks.network import Asked, LayerMask, MaskedNetwork, Means, mean_squares, solved
from secateur.masks.permute import permuted
from secateur.masks.search import searched
from secateur.masks.select import Selection, mask_alone, select, spread

__all__ = [
    "BUDGETS",
    "METHODS",
    "Asked",
    "LayerMask",
    "MaskedNetwork",
    "Means",
    "Method",
    "Selection",
    "find",
    "mask_alone",
    "mean_squares",
    "searched",
    "select",
    "solved",
    "spread",
    "wrong_zeros",
]  # fmt: skip
