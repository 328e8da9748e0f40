"""Two layouts of compressed-tensors that its own later versions no longer read: `sparse-bitmask` and `sparse-24-bitmask`.

A weight NAME.weight is stored as NAME.shape, NAME.compressed (its values, row by row), NAME.bitmask (of each row ceil(columns / 8) bytes, the
first weight in the least significant bit) and, in `sparse-bitmask`, NAME.row_offsets (values before each row). In `sparse-24-bitmask` every 4
weights of a row have 2 bits set, and NAME.compressed is (rows, columns / 2). Early files have NAME.weight.shape and so on.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from secateur.errors import FormatError
from secateur.pack.archive import read_archive
from secateur.pack.header import MOST_WEIGHTS
from secateur.pack.raw import raw, refuse, scattered, tensor_of

PARTS, OFFSETS = ("shape", "compressed", "bitmask"), "row_offsets"
INDEX = "model.safetensors.index.json"


def read_compressed_tensors(path: str | Path) -> dict[str, Tensor]:
    """Every tensor of a safetensors file, or of the shards of a folder, by name; those in `sparse-bitmask` and `sparse-24-bitmask` dense.

    A tensor of another layout (quantised values, say) is handed back as it is stored.

    Raises:
        FormatError: nothing is there, a file is damaged, or the parts of a weight contradict one another.
    """
    path = Path(path)
    tensors = dict[str, Tensor]()
    for file in _files(path):
        for name, tensor in read_archive(file).items():
            if name in tensors:
                refuse(str(file), f"the tensor {name} is in another shard too")
            tensors[name] = tensor
    for name in [n.removesuffix(".bitmask") for n in tensors if n.endswith(".bitmask")]:
        if all(f"{name}.{part}" in tensors for part in PARTS):
            parts = {part: tensors.pop(f"{name}.{part}") for part in PARTS}
            offsets = tensors.pop(f"{name}.{OFFSETS}", None)
            whole = name if name == "weight" or name.endswith(".weight") else f"{name}.weight"
            if whole in tensors:
                refuse(f"{path}, {whole}", "it is there both dense and compressed")
            tensors[whole] = _dense(parts, offsets, f"{path}, {whole}")
    return tensors


def _files(path: Path) -> list[Path]:
    if path.is_file():
        return [path]
    if (path / INDEX).is_file():
        try:
            names = set(json.loads((path / INDEX).read_text())["weight_map"].values())
        except (ValueError, OSError, KeyError, AttributeError, TypeError, RecursionError) as error:
            raise FormatError(f"{path / INDEX} cannot be read: {error}.\n  Copy the folder again.") from error
        if odd := [n for n in names if not isinstance(n, str) or Path(n).name != n]:
            raise FormatError(f"{path / INDEX} names {str(odd[0])[:80]!r}, which is no file of this folder.\n  Copy the folder again.")
        files = [path / name for name in sorted(names)]
    else:
        files = sorted(path.glob("*.safetensors"))
    if missing := [file for file in files if not file.is_file()] or ([] if files else [path / "*.safetensors"]):
        raise FormatError(f"{missing[0]} does not exist.\n  Give a safetensors file, or the folder of a model with all of its shards.")
    return files


def _dense(parts: Mapping[str, Tensor], offsets: Tensor | None, what: str) -> Tensor:
    values, bits = parts["compressed"].reshape(-1), parts["bitmask"]
    shape = _shape(parts["shape"], what)
    rows, columns = math.prod(shape[:-1]), shape[-1]
    if bits.dtype != torch.uint8 or bits.numel() != rows * -(-columns // 8):
        refuse(what, f"its bitmask is {bits.dtype} {list(bits.shape)}, and the shape {list(shape)} needs {rows} x {-(-columns // 8)} bytes")
    if not rows * columns:  # its other dimensions may be anything, and are not walked along
        if len(values):
            refuse(what, f"its shape is {list(shape)}, and there are {len(values)} values")
        return values.reshape(shape)
    flags = np.unpackbits(raw(bits).reshape(rows, -(-columns // 8)), axis=1, bitorder="little").view(bool)
    if flags[:, columns:].any():
        refuse(what, f"a bit is set behind the last of its {columns} columns")
    mask = flags[:, :columns]
    if (places := int(np.count_nonzero(mask))) != len(values):
        refuse(what, f"its bitmask has {places} places, and there are {len(values)} values")
    if offsets is not None:
        _check_offsets(offsets, mask, shape, what)
    elif columns % 4 or bool((mask.reshape(-1, 4).sum(axis=1) != 2).any()):
        refuse(what, "it has no row_offsets, so it is 2:4, and not every 4 weights of a row have 2 bits set")
    return tensor_of(scattered(raw(values), np.ascontiguousarray(mask).reshape(-1)), shape, values.dtype)


def _shape(tensor: Tensor, what: str) -> tuple[int, ...]:
    if tensor.dtype not in (torch.int64, torch.int32) or not 0 < tensor.numel() <= 64:
        refuse(what, f"its shape is {tensor.dtype} {list(tensor.shape)}, and should be one to 64 whole numbers")
    shape = tuple(tensor.reshape(-1).tolist())
    if min(shape) < 0 or math.prod(max(1, d) for d in shape) >= MOST_WEIGHTS:
        refuse(what, f"its shape is {list(shape)}, and no tensor can have that")
    return shape


def _check_offsets(offsets: Tensor, mask: np.ndarray, shape: tuple[int, ...], what: str) -> None:
    if offsets.dtype.is_floating_point or offsets.dtype.is_complex or offsets.numel() != len(mask):
        refuse(what, f"its row_offsets are {offsets.dtype} {list(offsets.shape)}, and there are {len(mask)} rows")
    counts = mask.sum(axis=1).reshape(shape[:-1])
    wanted = np.cumsum(counts, axis=0) - counts if len(shape) > 1 else np.zeros((), np.int64)
    if not np.array_equal(offsets.reshape(-1).to(torch.int64).numpy(), wanted.reshape(-1)):
        refuse(what, "its row_offsets are not the numbers of values before each row")
