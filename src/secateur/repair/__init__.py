"""After the cut: what can be put right from data without gradients or labels."""

from secateur.repair.apply import changed, like_dense, proven, put_into
from secateur.repair.batch_norm import batch_norm_statistics
from secateur.repair.fit import LayerRepair
from secateur.repair.study import Study

FITTED = ("bias", "least_squares", "gauss_newton")
HOW = ("none", "batch_norm", *FITTED)

__all__ = ["FITTED", "HOW", "LayerRepair", "Study", "batch_norm_statistics", "changed", "like_dense", "proven", "put_into"]
