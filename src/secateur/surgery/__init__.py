"""Cutting: a plan carried out on a copy of the model."""

from secateur.surgery.attributes import Edit
from secateur.surgery.cut import Cut, cut

__all__ = ["Cut", "Edit", "cut"]
