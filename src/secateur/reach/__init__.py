"""Targets that are measured: the plan that meets them is looked for with real cuts."""

from secateur.reach.search import Options, Reached, Try, reach
from secateur.reach.stage import achieved, measured_again, within

__all__ = ["Options", "Reached", "Try", "achieved", "measured_again", "reach", "within"]
