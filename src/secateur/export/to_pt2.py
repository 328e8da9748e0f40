"""The exported program as torch itself keeps it: `torch.export.load(path).module()` runs it without the code of the model."""

from __future__ import annotations

from pathlib import Path

import torch

from secateur.errors import InputError
from secateur.export.capture import Captured
from secateur.export.runner import File
from secateur.measure.runtimes.onnx_file import quietly
from secateur.models.example import describe, rebuild


def write(captured: Captured, path: Path) -> File:
    """The archive. Its example inputs are random ones of the same shapes: those given may be somebody's data."""
    try:
        held = captured.program.example_inputs
        captured.program.example_inputs = None if held is None else rebuild(describe(*held))
    except InputError:  # an input of a type that has no description
        captured.program.example_inputs = None
    with quietly():
        torch.export.save(captured.program, path)
    return File(path, "pt2", captured.inputs)
