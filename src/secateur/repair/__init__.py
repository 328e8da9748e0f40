"""After the cut: what can be put right from data without gradients or labels."""

from secateur.repair.batch_norm import batch_norm_statistics

__all__ = ["batch_norm_statistics"]
