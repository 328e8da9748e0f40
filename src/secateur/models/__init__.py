"""Models and data from a name or a path; pruned models to a folder and back."""

from __future__ import annotations

from .data import Data, load_data
from .folder import load, save
from .source import LoadedModel, load_model

__all__ = ["Data", "LoadedModel", "load", "load_data", "load_model", "save"]
