"""onnxruntime: the exported module in an inference session on the CPU."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import nn

from secateur.measure.runtimes.onnx_file import agree, arrays, exported, required


@contextmanager
def prepare(model: nn.Module, args: tuple, kwargs: dict[str, Any], threads: int) -> Iterator[Callable[[], Any]]:
    """One run of a session with all graph optimizations and `threads` threads inside an operator.

    Raises:
        ModelError: a package is missing, the model cannot be exported, or the session computes something else.
    """
    required("onnx", "onnxruntime", "onnx", "onnxscript")
    with exported(model, args, kwargs) as path:
        session = opened(path, threads)
    feed = arrays(args, kwargs, [i.name for i in session.get_inputs()], "onnxruntime")
    agree(model, args, kwargs, lambda: session.run(None, feed), "onnxruntime")
    yield lambda: session.run(None, feed)


def opened(path: Path, threads: int) -> Any:
    """A session of an ONNX file on the CPU, with all graph optimizations and `threads` threads inside an operator.

    Raises:
        ModelError: onnxruntime is not installed.
    """
    ort = required("onnx", "onnxruntime")
    options = ort.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
    options.log_severity_level = 3
    # threads that wait for work in a loop would take the time of whatever is measured beside this session
    options.add_session_config_entry("session.force_spinning_stop", "1")
    return ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
