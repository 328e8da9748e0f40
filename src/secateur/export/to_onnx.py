"""ONNX by torch's exporter (`dynamo=True`), for ONNX Runtime."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from torch import nn

from secateur.errors import FormatError, InputError, ModelError
from secateur.export.capture import Captured, capture, named, named_within
from secateur.export.runner import File
from secateur.measure.runtimes.onnx_file import quietly, required, write_onnx

_COLOUR = re.compile(r"\x1b\[[0-9;]*m")


def onnx_file(model: nn.Module, args: tuple, path: str | Path, kwargs: Mapping[str, Any] | None = None) -> Path:
    """Write an ONNX file of the model in evaluation mode, with a free batch where it can be; returns its path.

    The file alone, unchecked: `secateur.export.onnx` checks and measures it too, `secateur.export.run` runs it in a fresh process.

    Args:
        model: on the CPU, float32, float64 or float16; it is left as it was.
        args, kwargs: example inputs, as the model is called.
        path: of the file; it is replaced when the new one is complete. Weights of 2 GB and more lie beside it in `NAME.onnx.data`.

    Raises:
        ModelError: a package is missing, the model has sparse layers, or an operator has no form in ONNX (the message names it and its layer).
        CaptureError: `torch.export` cannot follow the model. InputError: the path is a folder. FormatError: it cannot be written to.
    """
    required("onnx", "onnxruntime", "onnx", "onnxscript")
    path = Path(path)
    if path.is_dir():
        raise InputError(f"{path} is a folder; the file needs a name.\n  Add one: {path / 'model.onnx'}.")
    captured = capture(model, args, kwargs)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with TemporaryDirectory(prefix=f".{path.name}.", dir=path.parent) as folder:
            write(captured, Path(folder) / path.name)
            for made in sorted(Path(folder).iterdir(), key=lambda p: p.name == path.name):  # the weights first, what names them last
                os.replace(made, path.parent / made.name)
    except OSError as error:
        raise FormatError(f"{path} could not be written: {error.strerror or error}.\n  Make room, or choose another folder.") from error
    return path


def write(captured: Captured, path: Path) -> File:
    """The file of a captured program; see `onnx_file`."""
    required("onnx", "onnxruntime", "onnx", "onnxscript")
    with quietly():
        try:
            write_onnx(captured.program, path, batch=captured.dynamic)
        except Exception as error:  # the exporter wraps whatever failed below it
            raise refused("torch.onnx", captured, error) from error
    return File(path, "onnx", captured.inputs)


def refused(who: str, captured: Captured, error: Exception) -> ModelError:
    """What a converter could not do, and where in the model."""
    chain: list[BaseException] = [error]
    while (deeper := chain[-1].__cause__ or chain[-1].__context__) is not None and deeper not in chain:
        chain.append(deeper)
    whole = _COLOUR.sub("", "\n".join(map(str, chain)))
    lines = [line for line in _COLOUR.sub("", str(chain[-1])).strip().splitlines() if line.strip()] or [type(chain[-1]).__name__]
    where = named(whole, captured.program) or named_within(whole, captured.program)
    what = f"cannot export {where}" if where else f"cannot export {captured.name}"
    return ModelError(
        f"{who} {what}: {lines[0][:300]}\n  Nothing was written. Replace the operator in forward(), export the part without it, "
        "or choose another format."
    )
