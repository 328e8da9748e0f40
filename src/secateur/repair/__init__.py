"""After the cut: what can be put right from data without gradients or labels."""

from secateur.repair.apply import changed, proven, put_into
from secateur.repair.batch_norm import batch_norm_statistics
from secateur.repair.fit import LayerRepair
from secateur.repair.study import Study

HOW = ("none", "batch_norm", "bias", "least_squares")

__all__ = ["HOW", "LayerRepair", "Study", "batch_norm_statistics", "changed", "proven", "put_into"]
