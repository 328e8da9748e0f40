"""Scores and targets -> a `Plan`."""

from secateur.budget.allocate import plan
from secateur.budget.targets import Bytes, MACs, Params, Target, parse

__all__ = ["Bytes", "MACs", "Params", "Target", "parse", "plan"]
