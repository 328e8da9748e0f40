"""Model and example inputs -> `Graph`: the axes of every tensor and the groups of units that live or die together."""

from secateur.trace.graph import Frozen, Graph, Group, Slot
from secateur.trace.parts import Part, parts
from secateur.trace.tracer import analyse, trace

__all__ = ["Frozen", "Graph", "Group", "Part", "Slot", "analyse", "parts", "trace"]
