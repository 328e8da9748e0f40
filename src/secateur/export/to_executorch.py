"""ExecuTorch: a .pte file for phones and boards, lowered to XNNPACK where it has the operators; the rest runs on portable kernels."""

from __future__ import annotations

import contextlib
import io
from collections import Counter
from pathlib import Path
from typing import Any

import torch

from secateur.export.capture import Captured
from secateur.export.runner import File
from secateur.export.to_onnx import refused
from secateur.measure.runtimes.onnx_file import quietly, required

_BOOKKEEPING = ("getitem", "executorch_call_delegate", "alloc", "sym_size")


def write(captured: Captured, path: Path) -> tuple[File, list[str]]:
    """The file, and a note on what XNNPACK does not take.

    Memory is planned when the file is made, so its batch is that of the example inputs.

    Raises ModelError: executorch is missing, or an operator cannot be lowered.
    """
    # it prints on import and while lowering
    with quietly(), contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        required("executorch", "executorch", "executorch.exir")
        from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
        from executorch.exir import to_edge_transform_and_lower

        try:
            with torch.no_grad():
                edge = to_edge_transform_and_lower(captured.program, partitioner=[XnnpackPartitioner()])
                lowered = edge.to_executorch()
        except Exception as error:  # its passes raise many unrelated types
            raise refused("ExecuTorch", captured, error) from error
    with path.open("wb") as file:
        lowered.write_to_file(file)
    return File(path, "executorch", captured.inputs), _left(edge.exported_program())


def _left(program: Any) -> list[str]:
    names = Counter(str(getattr(n.target, "__name__", n.target)) for n in program.graph.nodes if n.op == "call_function")
    left = {name: count for name, count in names.items() if not any(word in name for word in _BOOKKEEPING)}
    if not left:
        return []
    said = ", ".join(f"{name.removeprefix('aten.')} ({count})" for name, count in sorted(left.items(), key=lambda pair: -pair[1])[:6])
    return [f"{sum(left.values())} operators are not taken by XNNPACK and run on portable kernels: {said}{' ...' if len(left) > 6 else ''}"]
