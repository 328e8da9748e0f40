"""openvino: the exported module compiled for the CPU, in float32."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

from secateur.measure.runtimes.onnx_file import agree, arrays, exported, required


@contextmanager
def prepare(model: nn.Module, args: tuple, kwargs: dict[str, Any], threads: int) -> Iterator[Callable[[], Any]]:
    """One inference of one stream with `threads` threads.

    Raises:
        ModelError: a package is missing, the model cannot be exported, or the compiled model computes something else.
    """
    ov = required("openvino", "openvino", "onnx", "onnxscript")
    settings = {
        "INFERENCE_NUM_THREADS": threads, "NUM_STREAMS": 1, "PERFORMANCE_HINT": "LATENCY",
        "INFERENCE_PRECISION_HINT": "f32",  # else bfloat16 where the processor has it
        "ENABLE_CPU_PINNING": False,  # a pinned thread waits for its core while others are free
    }  # fmt: skip
    with exported(model, args, kwargs) as path:
        compiled = ov.Core().compile_model(str(path), "CPU", settings)
    request = compiled.create_infer_request()
    feed = arrays(args, kwargs, [port.get_any_name() for port in compiled.inputs], "openvino")
    inputs = dict(enumerate(feed[port.get_any_name()] for port in compiled.inputs))

    def run() -> list[Any]:
        found = request.infer(inputs, share_inputs=True, share_outputs=True)
        return [found[port] for port in compiled.outputs]

    agree(model, args, kwargs, run, "openvino")
    yield run
