"""Statistics streamed from the user's batches: activations, inputs of layers, gradients, moments."""

from secateur.calibrate.batches import batches
from secateur.calibrate.calibration import Calibration

__all__ = ["Calibration", "batches"]
