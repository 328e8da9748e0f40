"""Files that other runtimes run, each checked against the model and measured in its runtime.

    from secateur import export
    done = export.onnx(result.model, (x,), "out-onnx")        # also openvino, executorch, pt2, hf
    print(done.deviation, done.seconds, done.bytes)

Every export is written, run in a process of its own on the inputs given (and on other batch sizes where the batch is free), compared with
the model, timed beside the dense one if that is given, and only then put in place; `export.json` beside the file holds the facts.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

from secateur.export.check import Deviation
from secateur.export.runner import Call, File, Run, race, run
from secateur.export.stages import BATCHES, NAMES, Exported, How
from secateur.export.stages import export as to
from secateur.export.to_onnx import onnx_file

__all__ = [
    "BATCHES", "NAMES", "Call", "Deviation", "Exported", "File", "How", "Run",
    "executorch", "hf", "onnx", "onnx_file", "openvino", "pt2", "race", "run", "to",
]  # fmt: skip


def onnx(model: nn.Module, args: tuple, folder: str | Path, kwargs: Mapping[str, Any] | None = None, *, dense: nn.Module | None = None,
         how: How | None = None) -> Exported:  # fmt: skip
    """`model.onnx` by torch's exporter, with a free batch where that can be, checked and timed in ONNX Runtime.

    Args:
        model: on the CPU, not in bfloat16, without sparse layers of `runtime.convert`; it is left as it was.
        args, kwargs: inputs as the model is called.
        folder: for the file and `export.json`; replaced whole once everything has worked.
        dense: the model before pruning, exported to the same format to be timed beside; it is not kept.
        how: tolerance, threads, rounds, batch sizes.

    Raises:
        ModelError: a package is missing; an operator has no form there (the message names it and its layer); the file does not run, or
            deviates from the model by more than the tolerance. Nothing is left behind.
        CaptureError: `torch.export` cannot follow the model. InputError: the folder holds something else, or settings that cannot be meant.
        FormatError: the disk is full or not writable.
    """
    return to("onnx", model, (args, kwargs or {}), folder, dense=dense, how=how)


def openvino(model: nn.Module, args: tuple, folder: str | Path, kwargs: Mapping[str, Any] | None = None, *, dense: nn.Module | None = None,
             how: How | None = None) -> Exported:  # fmt: skip
    """`model.xml` and `model.bin`, float32, by way of ONNX, checked and timed in OpenVINO on the CPU. Arguments and errors as `onnx`."""
    return to("openvino", model, (args, kwargs or {}), folder, dense=dense, how=how)


def executorch(model: nn.Module, args: tuple, folder: str | Path, kwargs: Mapping[str, Any] | None = None, *, dense: nn.Module | None = None,
               how: How | None = None) -> Exported:  # fmt: skip
    """`model.pte`, lowered to XNNPACK, checked and timed in ExecuTorch. Its batch is that of the inputs: memory is planned ahead.
    Arguments and errors as `onnx`."""
    return to("executorch", model, (args, kwargs or {}), folder, dense=dense, how=how)


def pt2(model: nn.Module, args: tuple, folder: str | Path, kwargs: Mapping[str, Any] | None = None, *, dense: nn.Module | None = None,
        how: How | None = None) -> Exported:  # fmt: skip
    """`model.pt2`, the archive of `torch.export`, checked and timed in torch without the code of the model. Arguments and errors as `onnx`."""
    return to("pt2", model, (args, kwargs or {}), folder, dense=dense, how=how)


def hf(model: nn.Module, args: tuple, folder: str | Path, kwargs: Mapping[str, Any] | None = None, *, dense: nn.Module | None = None,
       how: How | None = None) -> Exported:  # fmt: skip
    """A folder for `from_pretrained` of transformers, run with transformers alone. Arguments and errors as `onnx`.

    Where every layer has the same widths, its config.json is a plain one, and any engine that knows the type loads it. Where widths differ,
    `modeling_pruned.py` of twenty lines lies beside it, and it is loaded with `trust_remote_code=True`. A tokenizer is copied along from the
    folder that the model came from.

    Raises: besides, ModelError for a model that is not of transformers' own class, or has other modules than its configuration builds.
    """
    return to("hf", model, (args, kwargs or {}), folder, dense=dense, how=how)
