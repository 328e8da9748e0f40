"""One tensor with zeros and its packed form."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from secateur.errors import InputError
from secateur.pack.entropy import deflated, inflated
from secateur.pack.header import check_parts, most, read_header
from secateur.pack.places import (
    LAYOUTS,
    MOST_BLOCK,
    MOST_OF,
    counts,
    patterns,
    places,
    split,
    steps,
    stored,
    view,
    width,
)
from secateur.pack.raw import DTYPES, chosen, raw, scattered, tensor_of

GROUPS, BLOCKS = (2, 4, 8, 16), (2, 4, 8, 16)  # what `smallest` tries


@dataclass(frozen=True)
class Packed:
    """A packed tensor.

    Attributes:
        header: layout, shape, dtype and parameters; plain JSON values.
        tensors: "values" (k,) of the dtype of the dense tensor, and, by layout, "mask", "index" or "codes", uint8 (b,).
    """

    header: dict[str, Any]
    tensors: dict[str, Tensor]

    @property
    def layout(self) -> str:
        return self.header["layout"]

    @property
    def nbytes(self) -> int:
        """Bytes of the tensors; the header is not counted."""
        return sum(t.nbytes for t in self.tensors.values())


def pack(
    tensor: Tensor, layout: str, *, n: int | None = None, m: int | None = None, size: int | None = None, axis: int | None = None,
    entropy: bool = False,
) -> Packed:  # fmt: skip
    """A tensor in one layout. `unpack` gives back the same bits: a weight counts as zero only where all of its bits are 0, so -0.0, NaN with
    any payload and infinities are values.

    Args:
        tensor: any shape; float64, float32, float16, bfloat16, int8 or uint8. It is seen as (d0, d1, d2 * d3 * ...).
        layout: "bitmask", one bit a weight; "index", one byte of distance a value; "nm", one code a group; "blocks", one bit a block, whose
            zeros are values; "dense".
        n, m: for "nm": every whole group of m <= 16 weights has n that are not zero, or fewer.
        size: for "blocks": 2 to 64 weights.
        axis: of groups and blocks; 1, inputs, unless given for "nm", and 0, outputs, for "blocks".
        entropy: deflate the places; kept where that is smaller.

    Raises:
        InputError: another dtype, an unknown layout, parameters that it does not take, or a group with more than n weights.
    """
    name = str(tensor.dtype).removeprefix("torch.")
    if name not in DTYPES:
        raise InputError(f"a tensor of {tensor.dtype} is not packed.\n  Convert it to one of {', '.join(DTYPES)}, or store it as it is.")
    given = {k: v for k, v in (("n", n), ("m", m), ("size", size), ("axis", axis)) if v is not None}
    bits = raw(tensor)
    mask = bits != 0
    how = _parameters(layout, given, mask, tensor)
    header = {"layout": layout, "shape": list(tensor.shape), "dtype": name, **how}
    if layout == "dense":
        return Packed(header, {"values": tensor_of(bits.copy(), (len(bits),), tensor.dtype)})
    held, kept = places(layout, mask, tensor.shape, how)
    values = tensor_of(chosen(bits, kept), (-1,), tensor.dtype)
    if entropy and len(held):
        small = deflated(held)
        if len(small) < len(held) and tensor.nbytes <= most(values.nbytes + len(small)):
            header, held = {**header, "deflated": len(held)}, small
    return Packed(header, {"values": values, LAYOUTS[layout][0]: torch.from_numpy(held)})


def unpack(header: Mapping[str, Any], tensors: Mapping[str, Tensor], what: str = "the packed tensor") -> Tensor:
    """The dense tensor, bit for bit. Header and tensors may be anything: all is checked before it is used.

    Args:
        header, tensors: as in `Packed`. what: a name for messages.

    Raises:
        FormatError: they do not fit one another, or would unfold to more than 4096 times their size.
    """
    known = read_header(header, what)
    check_parts(known, tensors, what)
    if known.layout == "dense":
        return tensors["values"].reshape(known.shape)
    held = raw(tensors[LAYOUTS[known.layout][0]])
    values = raw(tensors["values"])
    try:
        if known.deflated is not None:
            held = inflated(held, known.deflated, what)
        kept = stored(known.layout, held, known.shape, known.how, what)
        known.fits(int(np.count_nonzero(kept)), len(values), what)
        return tensor_of(scattered(values, kept), known.shape, DTYPES[known.dtype])
    except MemoryError:
        known.too_large(what)


def smallest(tensor: Tensor, entropy: bool = False) -> Packed:
    """The tensor in the layout with the fewest bytes: bitmask, index, N:M of 2, 4, 8 or 16 along outputs or inputs, blocks of 2, 4, 8 or 16
    outputs or inputs or of a kernel; dense where none is smaller, or the dtype is none that `pack` takes.

    Args:
        tensor: any shape. entropy: as in `pack`; then the choice is by the bytes behind that stage.
    """
    name = str(tensor.dtype).removeprefix("torch.")
    if name not in DTYPES:
        header = {"layout": "dense", "shape": list(tensor.shape), "dtype": name}
        return Packed(header, {"values": tensor.detach().cpu().reshape(-1).clone()})
    mask = raw(tensor) != 0
    found = sorted(sizes(mask, tensor), key=lambda row: row[0])
    if not entropy:
        least, _, layout, how = found[0]
        return pack(tensor, layout, **how) if least < tensor.nbytes else pack(tensor, "dense")
    best = pack(tensor, "dense")
    for _, values, layout, how in found:
        if values < best.nbytes:  # else nothing that is done to its places makes it smaller
            best = min(best, pack(tensor, layout, **how, entropy=True), key=lambda p: p.nbytes)
    return best


def sizes(mask: np.ndarray, tensor: Tensor) -> Iterator[tuple[int, int, str, dict[str, Any]]]:
    """(bytes, those of values, layout, arguments for `pack`) of every layout that a tensor can have. mask: bool (n,), what is not zero."""
    each, kept, shape = tensor.element_size(), int(np.count_nonzero(mask)), tuple(tensor.shape)
    values = kept * each
    yield -(-len(mask) // 8) + values, values, "bitmask", {}
    escapes, _, behind = steps(mask)
    yield kept + int(escapes.sum()) + behind + values, values, "index", {}
    for axis in (0, 1):
        for m in [m for m in GROUPS if m <= view(shape, axis)[1]]:
            groups, tail = split(mask, shape, axis, m)
            held = counts(groups)
            if held.size and 0 < (n := int(held.max())) < m:
                bits = held.size * width(patterns(n, m, bool(held.min() == n))) + tail.size
                yield -(-bits // 8) + values, values, "nm", {"n": n, "m": m, "axis": axis}
    for axis, size in [*((axis, size) for axis in (0, 1) for size in BLOCKS), (2, view(shape, 2)[1])]:
        if 2 <= size <= min(MOST_BLOCK, view(shape, axis)[1]):
            groups, tail = split(mask, shape, axis, size)
            some = counts(groups)
            whole = (int(np.count_nonzero(some)) * size + int(np.count_nonzero(tail))) * each
            yield -(-(some.size + tail.size) // 8) + whole, whole, "blocks", {"size": size, "axis": axis}


def _parameters(layout: str, given: Mapping[str, int], mask: np.ndarray, tensor: Tensor) -> dict[str, Any]:
    if layout not in LAYOUTS:
        raise InputError(f"{layout!r} is no layout.\n  There are {', '.join(LAYOUTS)}.")
    takes = {"nm": {"n", "m", "axis"}, "blocks": {"size", "axis"}}.get(layout, set())
    if not given.keys() <= takes or takes - given.keys() - {"axis"}:
        raise InputError(f"the layout {layout!r} takes {', '.join(sorted(takes)) or 'no parameters'}, and got {', '.join(given) or 'none'}.\n"
                         "  Write pack(w, 'nm', n=2, m=4) or pack(w, 'blocks', size=4).")  # fmt: skip
    how: dict[str, Any] = {k: given[k] for k in LAYOUTS[layout][1] if k in given}
    if takes:
        how["axis"] = given.get("axis", 1 if layout == "nm" else 0)
    if takes and not (how["axis"] in (0, 1, 2) and (2 <= how["size"] <= MOST_BLOCK if layout == "blocks" else 0 < how["n"] < how["m"] <= MOST_OF)):
        raise InputError(f"{how} is out of range.\n  N:M has 0 < n < m <= {MOST_OF}, a block 2 to {MOST_BLOCK} weights, the axis is 0, 1 or 2.")
    if layout == "nm":
        groups, _ = split(mask, tensor.shape, how["axis"], how["m"])
        how["exact"] = bool((counts(groups) == how["n"]).all())
    return how
