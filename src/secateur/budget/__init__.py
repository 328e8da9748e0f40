"""Scores and targets -> a `Plan`."""

from secateur.budget.allocate import plan
from secateur.budget.measured import Latency, MeasuredTarget, PeakMemory, Reading
from secateur.budget.targets import Bytes, MACs, Params, Target
from secateur.budget.written import parse, parse_points

__all__ = ["Bytes", "Latency", "MACs", "MeasuredTarget", "Params", "PeakMemory", "Reading", "Target", "parse", "parse_points", "plan"]
