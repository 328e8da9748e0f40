"""Tensors as plain bit patterns. A weight is zero where all of its bits are, so that -0.0 and NaN payloads are values like others."""

from __future__ import annotations

from typing import NoReturn

import numpy as np
import torch
from torch import Tensor

from secateur.errors import FormatError

DTYPES = {str(t).removeprefix("torch."): t for t in (torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int8, torch.uint8)}
_WHOLE = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
CHUNK = 1 << 16  # weights at a time: what fits into a cache, and bounds the memory for places


def refuse(what: str, said: str) -> NoReturn:
    """
    Raises:
        FormatError: always; `what` is named, `said` is what is wrong with it.
    """
    raise FormatError(f"{what}: {said}.\n  The file is damaged or was altered: copy it again, or save the model again.")


def raw(tensor: Tensor) -> np.ndarray:
    """The bits of a tensor, row by row: unsigned integers (n,) of the size of its elements."""
    size = tensor.element_size()
    return tensor.detach().cpu().contiguous().reshape(-1).view(_WHOLE[size]).numpy().view(f"u{size}")


def tensor_of(bits: np.ndarray, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """The inverse of `raw`; shares its memory."""
    return torch.from_numpy(bits.view(f"i{bits.itemsize}")).view(dtype).reshape(shape)


def chosen(bits: np.ndarray, stored: np.ndarray) -> np.ndarray:
    """Values (k,) at the k places of `stored` (n,), in order."""
    out, at = np.empty(np.count_nonzero(stored), bits.dtype), 0
    for start in range(0, len(bits), CHUNK):
        where = np.flatnonzero(stored[start : start + CHUNK])
        out[at : at + len(where)] = bits[start : start + CHUNK][where]
        at += len(where)
    return out


def scattered(values: np.ndarray, stored: np.ndarray) -> np.ndarray:
    """The inverse of `chosen`, with zeros everywhere else. `stored` has as many places as there are values."""
    out, at = np.zeros(len(stored), values.dtype), 0
    for start in range(0, len(stored), CHUNK):
        where = np.flatnonzero(stored[start : start + CHUNK])
        out[start : start + CHUNK][where] = values[at : at + len(where)]
        at += len(where)
    return out
