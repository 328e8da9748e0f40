"""The problem that the golden errors were measured on, and those errors (relative squared error of the output)."""

from fractions import Fraction

import numpy as np
import torch

from secateur.pattern import NM, Free

COLUMNS = ("50%", "60%", "70%", "80%", "90%", "2:4")
GOLDEN = {
    "magnitude": (0.0703, 0.1205, 0.2054, 0.3292, 0.5551, 0.1354),
    "wanda": (0.0208, 0.0394, 0.0723, 0.1231, 0.2425, 0.0724),
    "sparsegpt, mask alone": (0.0192, 0.0351, 0.0639, 0.1156, 0.2294, 0.0575),
    "sparsegpt": (0.0111, 0.0224, 0.0433, 0.0848, 0.1888, 0.0330),
    "sparsegpt, 32 columns": (0.0105, 0.0209, 0.0401, 0.0780, 0.1720, 0.0330),
    "wanda, refit": (0.0088, 0.0178, 0.0357, 0.0682, 0.1539, 0.0319),
    "sparsegpt, refit": (0.0082, 0.0167, 0.0328, 0.0650, 0.1477, 0.0281),
    "obc per row": (0.0073, 0.0141, 0.0273, 0.0521, 0.1149, 0.0299),
    "alps": (0.0072, 0.0141, 0.0269, 0.0524, 0.1139, 0.0268),
}


def problem():
    """(W 128 x 256, H 256 x 256), float64: power-law correlated inputs with four outlier channels."""
    rng = np.random.default_rng(0)
    q, _ = np.linalg.qr(rng.standard_normal((256, 256)))
    x = (rng.standard_normal((4096, 256)) * np.sqrt(1 / (1 + np.arange(256)))) @ q.T
    x = x * np.exp(0.5 * rng.standard_normal(256))
    x[:, :4] *= 8
    w = rng.standard_normal((128, 256)) / np.sqrt(256)
    return torch.from_numpy(w), torch.from_numpy(x.T @ x / 4096)


def asked(column):
    """(pattern, share that stays); the columns say what goes."""
    if column == "2:4":
        return NM(2, of=4), Fraction(1, 2)
    return Free(), 1 - Fraction(int(column[:-1]), 100)
