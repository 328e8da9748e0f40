"""int8 ONNX files by the tools of ONNX Runtime (`onnxruntime.quantization`)."""

from __future__ import annotations

import os
import platform
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

from secateur.errors import ModelError
from secateur.measure.runtimes.onnx_file import quietly, required

Feed = Mapping[str, np.ndarray]
RANGES = {"minmax": "MinMax", "percentile": "Percentile", "entropy": "Entropy"}
ROWS = 16  # of a batch: histograms hold every activation of one
_PERCENTILE = 99.99
_OF_ATTENTION = {"Softmax", "LayerNormalization", "RMSNormalization", "SimplifiedLayerNormalization"}
_LARGE = 2**30  # bytes of a file; protobuf holds 2 GiB, so the weights of larger ones lie beside it


class Reader:
    """Calibration batches one by one, and a stretch of them at a time, as the calibrators ask for them."""

    def __init__(self, feeds: Sequence[Feed]):
        self.feeds = list(feeds)
        self.set_range(0, len(self.feeds))

    def get_next(self) -> Feed | None:
        return next(self.left, None)

    def __iter__(self) -> Iterator[Feed]:
        return self.left

    def __len__(self) -> int:
        return len(self.feeds)

    def set_range(self, start_index: int, end_index: int) -> None:
        self.left = iter(self.feeds[start_index:end_index])


def static(source: Path, target: Path, feeds: Sequence[Feed], ranges: str | None = None) -> list[str]:
    """Weights and activations as whole numbers of 8 bits: QuantizeLinear and DequantizeLinear around every operator (QDQ).

    Weights are symmetric, one scale for every output channel; activations have one scale and zero point, from the ranges that the
    calibration rows take. Networks with attention keep everything but their linear layers and convolutions in float32.

    Args:
        source: an ONNX file in float32. target: the file to write; what is there is only replaced by a complete one.
        feeds: calibration batches by the names of the inputs.
        ranges: minmax, percentile (99.99 of the values) or entropy; None is minmax.

    Returns notes. Raises ModelError: a package is missing, or the tool cannot quantise the model.
    """
    with _tool(source, target) as (prepared, fresh):
        from onnxruntime import quantization as tool

        linear_only = bool(_operators(prepared) & _OF_ATTENTION)
        narrow = not multiplies_int8()
        tool.quantize_static(
            prepared, fresh, Reader(feeds), quant_format=tool.QuantFormat.QDQ, per_channel=True, reduce_range=narrow,
            op_types_to_quantize=["Conv", "Gemm", "MatMul"] if linear_only else None, activation_type=tool.QuantType.QUInt8,
            weight_type=tool.QuantType.QInt8, calibrate_method=tool.CalibrationMethod[RANGES[ranges or "minmax"]],
            use_external_data_format=_is_large(source),
            extra_options={"WeightSymmetric": True, "CalibPercentile": _PERCENTILE, "CalibStridedMinMax": 1},
        )  # fmt: skip
    notes = ["attention: only linear layers and convolutions are int8, softmax and norms stay float32"] if linear_only else []
    if narrow:
        notes.append("weights have 7 bits: this processor adds pairs of int8 products in 16 bits (it has no VNNI), where 8 bits would overflow")
    return notes


def weights(source: Path, target: Path) -> list[str]:
    """Weights as whole numbers of 8 bits, without data.

    Linear layers and LSTMs run in int8, their activations scaled as they come (`quantize_dynamic`). Weights of convolutions are stored as
    int8, one scale for every output channel, and multiplied out when they are used: the tool's own form of them is many times slower than
    float32. Arguments and errors as `static`.
    """
    with _tool(source, target) as (prepared, fresh):
        from onnxruntime import quantization as tool

        tool.quantize_dynamic(
            prepared, fresh, op_types_to_quantize=["MatMul", "Gather", "LSTM", "Attention"], per_channel=True,
            weight_type=tool.QuantType.QInt8, use_external_data_format=_is_large(source), extra_options={"WeightSymmetric": True},
        )  # fmt: skip
        stored = _store_convolutions(fresh)
    return [f"{stored} convolutions store int8 weights and run in float32"] if stored else []


def _store_convolutions(path: Path) -> int:
    """Put `DequantizeLinear(int8 weights)` for the float32 weights of convolutions; returns how many there are."""
    import onnx
    from onnx import helper, numpy_helper

    model = onnx.load(path)
    graph = model.graph
    held = {tensor.name: tensor for tensor in graph.initializer}
    names = {node.input[1] for node in graph.node if node.op_type == "Conv" and node.input[1] in held}
    others = {name for node in graph.node for i, name in enumerate(node.input) if node.op_type != "Conv" or i != 1}
    found = [name for name in sorted(names - others) if held[name].data_type == onnx.TensorProto.FLOAT]
    for name in found:
        codes, scale = symmetric(numpy_helper.to_array(held[name]))
        graph.initializer.remove(held[name])
        graph.initializer.extend([numpy_helper.from_array(codes, f"{name}_quantized"), numpy_helper.from_array(scale, f"{name}_scale")])
        graph.node.insert(0, helper.make_node("DequantizeLinear", [f"{name}_quantized", f"{name}_scale"], [name], axis=0))
    if found:
        onnx.save(model, path, save_as_external_data=_is_large(path), location=f"{path.name}.data")
    return len(found)


def symmetric(weight: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """int8 codes -127..127 and float32 scales, one for every entry of the first dimension: `weight ~ codes * scale`, and zeros stay zero.

    `weight` is float32 (outputs, ...); the scale is the largest absolute value over 127, and 1 where all weights are zero. Every weight
    is off by half a scale at most.
    """
    largest = np.abs(weight).reshape(len(weight), -1).max(1)
    scale = np.where(largest > 0, largest / 127, 1).astype(np.float32)
    codes = np.rint(weight / scale.reshape(-1, *[1] * (weight.ndim - 1))).clip(-127, 127).astype(np.int8)
    return codes, scale


def has_int8(path: Path) -> bool:
    """Whether any tensor is stored, or any value made, as whole numbers of 8 bits."""
    import onnx

    graph = onnx.load(path, load_external_data=False).graph
    eight = (onnx.TensorProto.INT8, onnx.TensorProto.UINT8)
    return any(t.data_type in eight and len(t.dims) > 1 for t in graph.initializer) or any("QuantizeLinear" in n.op_type for n in graph.node)


def zeros(path: Path) -> tuple[int, int]:
    """How many weights (entries of stored tensors of two dimensions or more) a file has, and how many of them are exactly zero.

    int8 tensors count by their zero point, which is 0 in symmetric ones.
    """
    import onnx
    from onnx import numpy_helper

    size = zero = 0
    for tensor in onnx.load(path).graph.initializer:
        if len(tensor.dims) > 1 and tensor.data_type in (onnx.TensorProto.FLOAT, onnx.TensorProto.INT8):
            values = numpy_helper.to_array(tensor)
            size, zero = size + values.size, zero + int((values == 0).sum())
    return size, zero


def worst(source: Path, quantised: Path, feeds: Sequence[Feed], count: int = 3) -> list[str]:
    """The layers behind which the relative error of activations grows most, as "layer (from 3 % to 40 %)"; of a file that `static` made.

    The error of an activation is |int8 - float32| / |float32| over the first batch of `feeds` (`qdq_loss_debug`); a layer's growth is from
    the largest error among its inputs.
    """
    import onnx

    with TemporaryDirectory(prefix="secateur-int8-", ignore_cleanup_errors=True) as folder, quietly():
        from onnxruntime.quantization import qdq_loss_debug as tool

        prepared = _prepared(source, Path(folder))
        found = []
        for name, path in (("float", prepared), ("int8", quantised)):
            wide = Path(folder) / f"{name}_wide.onnx"
            tool.modify_model_output_intermediate_tensors(path, wide, save_as_external_data=_is_large(source))
            found.append(tool.collect_activations(str(wide), Reader(feeds[:1])))
        pairs = {name: pair for name, pair in tool.create_activation_matching(found[1], found[0]).items() if "float" in pair}
        errors = {name: 10 ** (-row["xmodel_err"] / 20) for name, row in tool.compute_activation_error(pairs).items()}
        graph = onnx.load(prepared, load_external_data=False).graph
    grown = _growth(graph, errors)
    most = sorted((name for name, (before, after) in grown.items() if after > before), key=lambda name: grown[name][0] - grown[name][1])[:count]
    return [f"{name} (from {100 * grown[name][0]:.1f} % to {100 * grown[name][1]:.1f} %)" for name in most]


def _growth(graph: Any, errors: Mapping[str, float]) -> dict[str, tuple[float, float]]:
    """By layer: the largest error among its inputs, and its own. A layer is the parameter that its node reads, without its last word; an
    activation function belongs to the layer before it. A tensor without an error of its own has that of what it is made from."""
    parameters = {tensor.name for tensor in graph.initializer}
    known: dict[str, tuple[float, str]] = {}
    found: dict[str, tuple[float, float]] = {}
    for node in graph.node:  # in running order
        before = max((known[name] for name in node.input if name in known), default=(0.0, node.name))
        layer = next((name.rpartition(".")[0] for name in node.input if name in parameters and "." in name), before[1])
        for out in node.output:
            known[out] = (errors.get(out, before[0]), layer)
            if out in errors:
                found[layer] = (found.get(layer, before)[0], errors[out])
    return found


def multiplies_int8() -> bool:
    """Whether the processor sums products of int8 in 32 bits (VNNI on x86; every ARM does); where the system does not say, False on x86."""
    if platform.machine().lower() not in ("x86_64", "amd64", "i686", "i386"):
        return True
    try:
        lines = Path("/proc/cpuinfo").read_text(errors="replace").splitlines()
    except OSError:
        return False
    return any("vnni" in line for line in lines if line.startswith("flags"))


@contextmanager
def _tool(source: Path, target: Path) -> Iterator[tuple[Path, Path]]:
    """The prepared source and a new file to write to, which takes the place of `target` if nothing went wrong."""
    required("onnx", "onnxruntime", "onnx", "onnxscript")
    with TemporaryDirectory(prefix=f".{target.name}.", dir=target.parent) as folder, quietly(), open(os.devnull, "w") as null:
        fresh = Path(folder) / "fresh" / target.name
        fresh.parent.mkdir()
        try:
            with redirect_stdout(null):  # the calibrators print
                yield _prepared(source, Path(folder)), fresh
        except ModelError:
            raise
        except Exception as error:  # the tool raises many unrelated types
            raise cannot("onnxruntime.quantization", source, error) from error
        put(fresh.parent, target)


def put(fresh: Path, target: Path) -> None:
    """Move all files of a folder beside `target`, the weights first and last what names them."""
    for made in sorted(fresh.iterdir(), key=lambda p: p.name == target.name):
        os.replace(made, target.parent / made.name)


def cannot(tool: str, source: Path, error: Exception) -> ModelError:
    """What a tool could not do."""
    first = next((line for line in str(error).strip().splitlines() if line.strip()), type(error).__name__)
    return ModelError(
        f"{tool} cannot quantise {source.name}: {type(error).__name__}: {first[:300]}\n"
        "  Nothing was written. Try the other kind (static or weights) or the other runtime, or stay in float32."
    )


def _prepared(source: Path, folder: Path) -> Path:
    """The file with shapes inferred and constants folded, as the quantisers want it."""
    from onnxruntime.quantization.shape_inference import quant_pre_process

    path = folder / "prepared.onnx"
    quant_pre_process(source, path, skip_symbolic_shape=True, save_as_external_data=_is_large(source))
    return path


def _operators(path: Path) -> set[str]:
    import onnx

    return {node.op_type for node in onnx.load(path, load_external_data=False).graph.node}


def _is_large(path: Path) -> bool:
    beside = path.with_name(f"{path.name}.data")
    return path.stat().st_size + (beside.stat().st_size if beside.exists() else 0) > _LARGE
