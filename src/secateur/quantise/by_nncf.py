"""int8 OpenVINO files by NNCF, which OpenVINO's makers keep for that."""

from __future__ import annotations

import importlib
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

from secateur.errors import ModelError
from secateur.measure.runtimes.onnx_file import quietly, required
from secateur.quantise.by_onnxruntime import cannot, put
from secateur.quantise.rows import error

Feed = Mapping[str, np.ndarray]
RANGES = {"minmax": "MINMAX", "percentile": "MEAN_QUANTILE", "mean_minmax": "MEAN_MINMAX"}
ROWS = 1  # of a batch: ranges are averaged over batches, so that larger ones would widen them
JUDGED = 32  # calibration batches that choose between two ways
_OF_ATTENTION = {"Softmax", "ScaledDotProductAttention", "MVN"}


def static(source: Path, target: Path, feeds: Sequence[Feed], ranges: str | None = None) -> list[str]:
    """Weights and activations as whole numbers of 8 bits (`nncf.quantize`): weights symmetric with a scale for every output channel, biases
    corrected for what rounding shifts.

    Networks with attention are quantised by NNCF's rules for transformers, with SmoothQuant (Xiao et al. 2023: sizes move from activations
    into weights) and without, and the one whose outputs are nearer to float32 on the calibration rows is kept.

    Args:
        source: an .xml in float32, its .bin beside it. target: the .xml to write; what is there is only replaced by complete files.
        feeds: calibration batches by the names of the inputs.
        ranges: minmax, mean_minmax or percentile; None is minmax.

    Returns notes. Raises ModelError: a package is missing, or the tool cannot quantise the model.
    """
    notes = []
    with _tool(source, target) as (nncf, model, write):
        attention = bool({op.get_type_name() for op in model.get_ops()} & _OF_ATTENTION)
        kind = nncf.ModelType.TRANSFORMER if attention else None
        tried = {}
        for smooth in ("with", "without") if attention else ("without",):
            chosen = _advanced(nncf, RANGES[ranges or "minmax"], smooth == "with")
            rows = nncf.Dataset([dict(feed) for feed in feeds])
            tried[smooth] = nncf.quantize(model.clone(), rows, subset_size=len(feeds), model_type=kind, advanced_parameters=chosen)
        best = next(iter(tried))
        if attention:
            off = {smooth: _error(found, model, feeds[:JUDGED]) for smooth, found in tried.items()}
            best = min(off, key=off.__getitem__)
            said = ", ".join(f"{smooth} {100 * value:.1f} %" for smooth, value in off.items())
            notes.append(f"attention: quantised by NNCF's rules for transformers, {best} SmoothQuant (outputs off float32: {said})")
        write(tried[best])
    return notes


def weights(source: Path, target: Path) -> list[str]:
    """Weights as whole numbers of 8 bits, symmetric, one scale for every output channel; no data (`nncf.compress_weights`). Arguments and
    errors as `static`."""
    with _tool(source, target) as (nncf, model, write):
        write(nncf.compress_weights(model, mode=nncf.CompressWeightsMode.INT8_SYM))
    return []


def has_int8(path: Path) -> bool:
    """Whether any constant is stored, or any value rounded, as whole numbers of 8 bits."""
    import openvino as ov

    ops = ov.Core().read_model(path).get_ops()
    stored = (op.get_element_type().get_type_name() in ("i8", "u8") for op in ops if op.get_type_name() == "Constant" and len(op.shape) > 1)
    return any(stored) or any(op.get_type_name() == "FakeQuantize" for op in ops)


def zeros(path: Path) -> tuple[int, int]:
    """How many weights (entries of constants of two dimensions or more) a file has, and how many of them are exactly zero."""
    import openvino as ov

    size = zero = 0
    for op in ov.Core().read_model(path).get_ops():
        if op.get_type_name() == "Constant" and op.get_element_type().get_type_name() in ("f32", "i8"):
            values = op.data
            if values.ndim > 1 and max(values.shape) < values.size:  # scales are as long as their longest side
                size, zero = size + values.size, zero + int((values == 0).sum())
    return size, zero


def worst(source: Path, quantised: Path, feeds: Sequence[Feed], count: int = 3) -> list[str]:
    """NNCF does not tell layers apart: none."""
    return []


def _advanced(nncf: Any, name: str, smooth: bool) -> Any:
    from nncf.quantization.range_estimator import RangeEstimatorParametersSet

    found = getattr(RangeEstimatorParametersSet, name)
    off = {} if smooth else {"smooth_quant_alpha": -1}  # the tool's word for none
    return nncf.AdvancedQuantizationParameters(activations_range_estimator_params=found, **off)


def _error(found: Any, model: Any, feeds: Sequence[Feed]) -> float:
    """How far the outputs of one model are from those of another, as `rows.error`; infinite where they are no numbers.

    One Core for both: each one gives this thread a signal stack while it lives, and when two of them end in the order in which they began, the
    thread is left with one whose memory is gone. The next signal (Ctrl-C, the end of a child) would then end the process.
    """
    import openvino as ov

    core, outputs = ov.Core(), []
    for each in (found, model):
        request = core.compile_model(each, "CPU", {"INFERENCE_PRECISION_HINT": "f32"}).create_infer_request()
        outputs.append([[np.array(value) for value in request.infer(dict(feed)).values()] for feed in feeds])
    off = error(*outputs)
    return off if math.isfinite(off) else math.inf


def imported() -> Any:
    """The package nncf, imported so that it reports nothing to anybody: it asks these variables once, when it is imported.

    Raises:
        ModelError: it is not installed.
    """
    quiet = {"NNCF_CI": "1", "CI": "true"}
    before = {name: os.environ.get(name) for name in quiet}
    os.environ.update(quiet)
    try:
        required("int8", "openvino", "nncf")
        return importlib.import_module("nncf")
    finally:
        for name, value in before.items():
            os.environ.pop(name) if value is None else os.environ.update({name: value})


@contextmanager
def _tool(source: Path, target: Path) -> Iterator[tuple[Any, Any, Any]]:
    """nncf, the model, and a function that writes one; the files take the place of `target` if nothing went wrong."""
    required("openvino", "openvino")
    import openvino as ov

    with TemporaryDirectory(prefix=f".{target.name}.", dir=target.parent) as folder, quietly(), open(os.devnull, "w") as null:
        try:
            with redirect_stdout(null):  # it draws progress bars
                nncf = imported()
                model = ov.Core().read_model(source)
                yield nncf, model, lambda found: ov.save_model(found, Path(folder) / target.name, compress_to_fp16=False)
        except ModelError:
            raise
        except Exception as error:  # NNCF and OpenVINO raise many unrelated types
            raise cannot("nncf", source, error) from error
        put(Path(folder), target)
