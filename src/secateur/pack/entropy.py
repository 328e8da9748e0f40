"""The entropy stage: DEFLATE (RFC 1951, in zlib's frame) over the bytes that say where weights are. Values are left alone."""

from __future__ import annotations

import zlib

import numpy as np

from secateur.pack.raw import refuse


def deflated(held: np.ndarray) -> np.ndarray:
    """The bytes, smaller where they can be. Places drawn at random repeat by chance alone: there Huffman codes without repetitions are
    shorter, and quicker, than with; where they follow a rule it is the other way round. Both are tried."""
    best = min((_deflate(held, s) for s in (zlib.Z_HUFFMAN_ONLY, zlib.Z_DEFAULT_STRATEGY)), key=len)
    return np.frombuffer(bytearray(best), np.uint8)


def _deflate(held: np.ndarray, strategy: int) -> bytes:
    stage = zlib.compressobj(level=6, strategy=strategy)
    return stage.compress(held.tobytes()) + stage.flush()


def inflated(held: np.ndarray, size: int, what: str) -> np.ndarray:
    """The inverse: uint8 (size,). No more is unfolded than `size` bytes and one.

    Raises:
        FormatError: the bytes are no zlib stream, or one of another length.
    """
    stage = zlib.decompressobj()
    try:
        out = stage.decompress(held.tobytes(), size + 1)
    except zlib.error as error:
        refuse(what, f"its places cannot be inflated ({error})")
    if len(out) != size or not stage.eof or stage.unused_data or stage.unconsumed_tail:
        refuse(what, f"its places inflate to {'more' if len(out) > size else 'other'} than the {size} bytes they say")
    return np.frombuffer(out, np.uint8)
