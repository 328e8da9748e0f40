"""int8 beside pruning: a model in whole numbers of 8 bits, made by `secateur.quantise` and run by ONNX Runtime."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from secateur.export import run
from secateur.measure.run import batch_of
from secateur.measure.runtimes.onnx_file import arrays
from secateur.measure.runtimes.onnx_runtime import opened
from secateur.models import Data
from secateur.quantise import How, quantise
from secateur.quantise.rows import parts, scores_at

RUNTIME, QUICK = "onnxruntime int8", 64  # rows that `quantise` itself compares on; the rest is done here


@dataclass(frozen=True)
class Int8:
    """`outputs`: of every part of the held-out rows, with the labels; `call` is one timed call; `bytes` of the file, `process_bytes` what its
    process took on top of the runtime."""

    outputs: list[tuple[Tensor, Tensor | None]]
    call: Callable[[], Any]
    bytes: int
    process_bytes: int
    notes: list[str]


def int8(
    model: nn.Module, inputs: tuple[tuple, dict[str, Any]], data: tuple[Any, Sequence[Any], bool], timed: tuple[tuple, dict[str, Any]],
    folder: Path, threads: int, say: Callable[[str], None],
) -> Int8:  # fmt: skip
    """Quantise a model as `secateur quantise` does, and run the file on the held-out rows.

    Args:
        inputs, timed: (args, kwargs) that it is exported with, and of the timed call.
        data: batches to calibrate with, those held out, and whether they have labels.
        folder: for `model-int8.onnx` and its facts.

    Raises:
        ModelError: a package is not installed (the message says which), or the model cannot be exported or quantised.
    """
    train, test, labelled = data
    rows = sum(batch_of((batch,)) for batch in train)
    few = [part.given if part.labels is None else (*part.given, part.labels) for part in parts(test, inputs, None, whole=False, at_most=QUICK)]
    done = quantise(model, inputs, Data("held out", train, few, labelled), folder, how=How(rows=rows, threads=threads, rounds=2), progress=say)
    session = opened(done.path, threads)
    size = session.get_inputs()[0].shape[0] if session.get_inputs()[0].shape else None
    fixed = size if isinstance(size, int) else None
    held = parts(test, inputs, fixed, whole=fixed is not None, at_most=None)
    say("held-out rows")
    found = run(done.path, [part.call for part in held], threads=threads)
    at = scores_at(model, held[0].call) if labelled else next((n for n, v in enumerate(found.outputs[0]) if np.issubdtype(v.dtype, np.floating)), 0)
    outputs = [(torch.from_numpy(each[at]), part.labels) for each, part in zip(found.outputs, held, strict=True)]
    feed = arrays(*timed, [i.name for i in session.get_inputs()], "onnxruntime")
    size = sum(path.stat().st_size for path in done.path.parent.glob(f"{done.path.name}*"))
    return Int8(outputs, lambda: session.run(None, feed), size, max(0, found.peak_bytes - found.idle_bytes), [*done.notes, *done.warnings])
