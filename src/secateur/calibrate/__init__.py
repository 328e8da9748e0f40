"""Statistics streamed from the user's batches: activations, inputs of layers, gradients, moments."""

from secateur.calibrate.batches import Anew, Reread, batches, many_times, taken
from secateur.calibrate.calibration import Calibration

__all__ = ["Anew", "Calibration", "Reread", "batches", "many_times", "taken"]
