"""Models and data from a name or a path; pruned models to a folder and back."""

from __future__ import annotations

from secateur.models.data import Data, load_data
from secateur.models.folder import load, save
from secateur.models.source import LoadedModel, load_model

__all__ = ["Data", "LoadedModel", "load", "load_data", "load_model", "save"]
