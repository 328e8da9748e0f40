"""OpenVINO's intermediate representation: an .xml with the graph and a .bin with the weights, from the ONNX file."""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory

from secateur.export import to_onnx
from secateur.export.capture import Captured
from secateur.export.runner import File
from secateur.measure.runtimes.onnx_file import required


def write(captured: Captured, path: Path) -> File:
    """`path` (.xml) and its .bin. Raises ModelError: a package is missing, or an operator has no form in ONNX or OpenVINO."""
    ov = required("openvino", "openvino", "onnx", "onnxscript")
    with TemporaryDirectory(prefix="secateur-onnx-", ignore_cleanup_errors=True) as folder:
        between = Path(folder) / "model.onnx"
        to_onnx.write(captured, between)
        try:
            ov.save_model(ov.convert_model(str(between)), str(path), compress_to_fp16=False)
        except Exception as error:  # its front ends raise RuntimeError and types of their own
            raise to_onnx.refused("OpenVINO", captured, error) from error
    return File(path, "openvino", captured.inputs)
