"""The header of a packed tensor, checked: what it says of shapes and sizes is believed only as far as the bytes bear it out."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NoReturn

from torch import Tensor

from secateur.pack.places import LAYOUTS, MOST_BLOCK, MOST_OF
from secateur.pack.raw import DTYPES, refuse

MOST = 4096  # times its stored bytes a tensor may unfold to; the encoder keeps to it, so that a small file cannot fill the memory
MOST_WEIGHTS = 1 << 58  # of a shape; strides and bytes can be counted below it


def most(held: int) -> int:
    """Bytes that a tensor stored in `held` bytes may have."""
    return MOST * (held + 1)


@dataclass(frozen=True)
class Header:
    """
    Attributes:
        layout: one of `LAYOUTS`. shape, dtype: of the dense tensor; the dtype by its name. how: parameters of the layout.
        deflated: bytes of the places before the entropy stage; None without it.
    """

    layout: str
    shape: tuple[int, ...]
    dtype: str
    how: dict[str, int]
    deflated: int | None

    @property
    def size(self) -> int:
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Of the dense tensor."""
        return self.size * DTYPES[self.dtype].itemsize

    def fits(self, said: int, held: int, what: str) -> None:
        """
        Raises:
            FormatError: there are more or fewer values than places.
        """
        if said != held:
            refuse(what, f"its places are {said} and its values {held}")

    def too_large(self, what: str) -> NoReturn:
        refuse(what, f"its shape {list(self.shape)} does not fit into the memory of this machine")


def read_header(header: object, what: str) -> Header:
    """
    Raises:
        FormatError: a key is missing or unknown, or a value cannot be.
    """
    if not isinstance(header, Mapping):
        refuse(what, f"its header is a {type(header).__name__}, not an object")
    layout, shape, dtype = header.get("layout"), header.get("shape"), header.get("dtype")
    if not isinstance(layout, str) or layout not in LAYOUTS:
        refuse(what, f"its layout is {str(layout)[:40]!r}, and this version knows {', '.join(LAYOUTS)}")
    if not isinstance(dtype, str) or (dtype not in DTYPES and layout != "dense"):
        refuse(what, f"its dtype is {str(dtype)[:40]!r}, and packed tensors are of {', '.join(DTYPES)}")
    wanted = {"layout", "shape", "dtype", *LAYOUTS[layout][1]}
    if odd := sorted(map(str, (header.keys() ^ wanted) - ({"deflated"} if layout != "dense" else set()))):
        refuse(what, f"its header and the layout {layout} differ in {odd[0][:40]!r}")
    if not isinstance(shape, list) or not all(_whole(d) for d in shape) or len(shape) > 64:
        refuse(what, f"its shape is {str(shape)[:60]}, and a shape is a list of at most 64 numbers of 0 or more")
    if math.prod(max(1, d) for d in shape) >= MOST_WEIGHTS:  # a stride would overflow, even where another dimension is 0
        refuse(what, f"its shape {str(shape)[:60]} has more weights than can be counted")
    how = {key: header[key] for key in LAYOUTS[layout][1]}
    _check_how(layout, how, what)
    unfolded = header.get("deflated")
    if unfolded is not None and not (_whole(unfolded) and 0 < unfolded <= math.prod(shape)):
        refuse(what, f"its places inflate to {str(unfolded)[:40]} bytes, and there are {math.prod(shape)} weights")
    return Header(layout, tuple(shape), dtype, how, unfolded)


def _check_how(layout: str, how: Mapping[str, Any], what: str) -> None:
    for key, value in how.items():
        if not (isinstance(value, bool) if key == "exact" else _whole(value)):
            refuse(what, f"its {key} is {str(value)[:40]!r}, which is no {'true or false' if key == 'exact' else 'number of 0 or more'}")
    if how.get("axis", 0) > 2:
        refuse(what, f"its axis is {how['axis']}, and axes are 0, 1 and 2")
    if layout == "nm" and not 0 < how["n"] < how["m"] <= MOST_OF:
        refuse(what, f"its pattern is {how['n']}:{how['m']}, and N:M has 0 < N < M <= {MOST_OF}")
    if layout == "blocks" and not 2 <= how["size"] <= MOST_BLOCK:
        refuse(what, f"its blocks have {how['size']} weights, and blocks have 2 to {MOST_BLOCK}")


def check_parts(header: Header, tensors: Mapping[str, Tensor], what: str) -> None:
    """
    Raises:
        FormatError: a part is missing, or has another dtype or form, or the parts are too small for the shape.
    """
    part = LAYOUTS[header.layout][0]
    wanted = {"values": header.dtype, **({part: "uint8"} if part else {})}
    if odd := sorted(tensors.keys() ^ wanted.keys()):
        refuse(what, f"its layout {header.layout} has {' and '.join(wanted)}, and {odd[0]!r} is {'missing' if odd[0] in wanted else 'there too'}")
    for name, dtype in wanted.items():
        if str(tensors[name].dtype) != f"torch.{dtype}" or tensors[name].dim() != 1:
            refuse(what, f"its {name} are {tensors[name].dtype} {list(tensors[name].shape)}, and should be {dtype} in one dimension")
    if header.layout == "dense":
        header.fits(header.size, tensors["values"].numel(), what)
    elif header.nbytes > most(held := sum(t.nbytes for t in tensors.values())):
        refuse(what, f"{held} bytes would unfold to {header.nbytes}, more than {MOST} times as many")


def _whole(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0
