"""Where the stored weights of a tensor are, as bytes. One codec a layout: a mask of n weights becomes bytes, and bytes a mask.

Bits are counted from the least significant. Groups of a weight (d0, d1, d2, ...) run along an axis of (d0, d1, d2 * ...), which is outputs,
inputs and places of the kernel; what is left over when an axis cannot be divided has one bit a weight behind the groups.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import lru_cache

import numpy as np

from secateur.errors import InputError
from secateur.pack.raw import refuse

ESCAPE = 255  # in `index`: so many zeros, and no value behind them
MOST_OF, MOST_BLOCK = 16, 64  # of an N:M group, of a block

# layout -> (the tensor that holds the places, its parameters)
LAYOUTS: dict[str, tuple[str, tuple[str, ...]]] = {
    "dense": ("", ()),
    "bitmask": ("mask", ()),
    "index": ("index", ()),
    "nm": ("codes", ("n", "m", "axis", "exact")),
    "blocks": ("mask", ("size", "axis")),
}


def places(layout: str, mask: np.ndarray, shape: Sequence[int], how: Mapping[str, int]) -> tuple[np.ndarray, np.ndarray]:
    """(bytes, which weights are stored): uint8 (b,) and bool (n,). Blocks store more weights than the mask has.

    Args:
        layout: "bitmask", "index", "nm" or "blocks".
        mask: bool (n,), what has to be stored.
        shape: of the weight. how: parameters of the layout.

    Raises:
        InputError: a group has more weights than an N:M pattern keeps.
    """
    if layout == "bitmask":
        return np.packbits(mask, bitorder="little"), mask
    if layout == "index":
        return _index(mask), mask
    groups, tail = split(mask, shape, how["axis"], how["size" if layout == "blocks" else "m"])
    if layout == "blocks":
        some = counts(groups) > 0
        whole = np.broadcast_to(some[:, :, None], groups.shape)
        return np.packbits(np.concatenate([some.reshape(-1), tail.reshape(-1)]), bitorder="little"), _joined(whole, tail)
    known = patterns(how["n"], how["m"], bool(how["exact"]))
    rank = np.full(1 << how["m"], len(known), np.uint16)  # fits: no pattern keeps all of 16
    rank[known] = np.arange(len(known))
    codes = rank[_numbers(groups)].reshape(1, -1, 1)
    if bool((codes == len(known)).any()):
        raise InputError(f"a group of {how['m']} weights does not keep {how['n']}, so the tensor has no {how['n']}:{how['m']} layout along axis "
                         f"{how['axis']}.\n  Use smallest(), or the layout 'bitmask'.")  # fmt: skip
    return np.packbits(np.concatenate([_flags(codes, width(known)).reshape(-1), tail.reshape(-1)]), bitorder="little"), mask


def stored(layout: str, held: np.ndarray, shape: Sequence[int], how: Mapping[str, int], what: str) -> np.ndarray:
    """The inverse of `places`: bool (n,), which weights are stored. Nothing is allocated that the bytes do not bear out.

    Raises:
        FormatError: the bytes are too few or too many, or say what cannot be.
    """
    size = math.prod(shape)
    if layout == "bitmask":
        return _bits(held, size, what)
    if layout == "index":
        return _from_index(held, size, what)
    if not size:  # its other dimensions may be anything, and are not walked along
        return _bits(held, 0, what)
    step = how["size" if layout == "blocks" else "m"]
    before, length, after = view(shape, how["axis"])
    count, left = before * (length // step) * after, before * (length % step) * after
    known = patterns(how["n"], how["m"], bool(how["exact"])) if layout == "nm" else np.arange(2)
    each = width(known)
    flags = _bits(held, count * each + left, what)
    tail = flags[count * each :].reshape(before, length % step, after)
    codes = _numbers(flags[: count * each].reshape(1, count, each, 1)).reshape(before, length // step, after)
    if layout == "blocks":
        return _joined(np.repeat(codes.astype(bool), step, axis=1).reshape(before, length // step, step, after), tail)
    if count and (worst := int(codes.max())) >= len(known):
        refuse(what, f"a group has the code {worst}, and {how['n']} of {how['m']} weights can lie in {len(known)} ways")
    rows = _flags(known.reshape(1, -1, 1), step)[0, :, :, 0]  # the bits of each pattern in a row, to be looked up whole
    return _joined(np.moveaxis(np.take(rows, codes, axis=0), 3, 2), tail)


# ---------------------------------------------------------------- index
def steps(mask: np.ndarray) -> tuple[np.ndarray, np.ndarray, int]:
    """(escapes before each value, zeros left before it (both (k,)), escapes behind the last one)."""
    where = np.flatnonzero(mask)
    zeros = np.diff(where, prepend=-1) - 1
    behind = len(mask) - (int(where[-1]) + 1 if len(where) else 0)
    return zeros // ESCAPE, zeros % ESCAPE, behind // ESCAPE


def _index(mask: np.ndarray) -> np.ndarray:
    escapes, zeros, behind = steps(mask)
    out = np.full(len(zeros) + int(escapes.sum()) + behind, ESCAPE, np.uint8)
    out[np.arange(len(zeros)) + np.cumsum(escapes)] = zeros
    return out


def _from_index(held: np.ndarray, size: int, what: str) -> np.ndarray:
    value = held != ESCAPE
    ends = np.cumsum(held + value.astype(np.int64))  # of the weights each byte stands for: its zeros, and its value if it has one
    reached = int(ends[-1]) if len(ends) else 0
    if not reached <= size < reached + ESCAPE:
        refuse(what, f"its index ends at weight {reached}, and the shape has {size}")
    out = np.zeros(size, bool)
    out[ends[value] - 1] = True
    return out


# ---------------------------------------------------------------- groups
def view(shape: Sequence[int], axis: int) -> tuple[int, int, int]:
    """(weights before the axis, length of the axis, weights behind it) of a shape seen as outputs, inputs, places."""
    three = [*shape[:2], math.prod(shape[2:])] if len(shape) > 2 else [*shape, 1, 1, 1][:3]
    return math.prod(three[:axis]), three[axis], math.prod(three[axis + 1 :])


def split(mask: np.ndarray, shape: Sequence[int], axis: int, size: int) -> tuple[np.ndarray, np.ndarray]:
    """(whole groups (before, groups, size, behind), what is left over (before, rest, behind))."""
    before, length, after = view(shape, axis)
    whole = length // size * size
    three = mask.reshape(before, length, after)
    return three[:, :whole].reshape(before, length // size, size, after), three[:, whole:]


def _joined(groups: np.ndarray, tail: np.ndarray) -> np.ndarray:
    before, count, size, after = groups.shape
    whole = groups.reshape(before, count * size, after)
    return (np.concatenate([whole, tail], axis=1) if tail.size else whole).reshape(-1)


def counts(groups: np.ndarray) -> np.ndarray:
    """How many weights of each group (before, groups, size, behind) are there: uint8 (before, groups, behind)."""
    out = np.zeros((groups.shape[0], groups.shape[1], groups.shape[3]), np.uint8)
    for place in range(groups.shape[2]):
        out += groups[:, :, place]
    return out


@lru_cache(maxsize=64)
def patterns(n: int, m: int, exact: bool) -> np.ndarray:
    """The patterns of m bits with n of them set (`exact`), or at most n: numbers (p,), ascending. A code is a place in this list."""
    bits = np.unpackbits(np.arange(1 << m, dtype="<u4").view(np.uint8).reshape(-1, 4), axis=1).sum(axis=1)
    return np.flatnonzero(bits == n if exact else bits <= n).astype(np.uint16)


def width(known: np.ndarray) -> int:
    """Bits of a code: the logarithm of how many there are, rounded up."""
    return (len(known) - 1).bit_length()


def _numbers(flags: np.ndarray) -> np.ndarray:
    """Bits (a, g, size <= 16, b), the first least significant, as numbers (a, g, b)."""
    out = np.zeros((flags.shape[0], flags.shape[1], flags.shape[3]), np.uint16)
    for bit in range(flags.shape[2]):
        out |= flags[:, :, bit].astype(np.uint16) << bit
    return out


def _flags(numbers: np.ndarray, size: int) -> np.ndarray:
    """The inverse of `_numbers`: bool (a, g, size, b)."""
    out = np.empty((*numbers.shape[:2], size, numbers.shape[2]), bool)
    for bit in range(size):
        out[:, :, bit] = (numbers >> bit) & 1
    return out


# ---------------------------------------------------------------- bits
def _bits(held: np.ndarray, count: int, what: str) -> np.ndarray:
    if len(held) != -(-count // 8):
        refuse(what, f"it has {len(held)} bytes of places, and its shape needs {-(-count // 8)}")
    if count % 8 and held[-1] >> count % 8:
        refuse(what, f"a bit is set behind its last weight (the last byte is {int(held[-1])}, of which {count % 8} bits count)")
    return np.unpackbits(held, count=count, bitorder="little").view(bool)
