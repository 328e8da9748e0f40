"""Tensors with zeros, stored in less space and given back bit for bit. The layout is described in docs/format.md.

    packed = smallest(weight)                        # or pack(weight, "bitmask")
    weight = unpack(packed.header, packed.tensors)
"""

from __future__ import annotations

from secateur.pack.archive import read_archive, write_archive
from secateur.pack.codec import Packed, pack, smallest, unpack
from secateur.pack.orphans import read_compressed_tensors
from secateur.pack.theory import Theory, theory

__all__ = ["Packed", "Theory", "pack", "read_archive", "read_compressed_tensors", "smallest", "theory", "unpack", "write_archive"]
