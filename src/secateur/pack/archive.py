"""A safetensors file in which some tensors are packed. The header's metadata says which, and how; docs/format.md has the layout."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import safetensors
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from secateur.errors import FormatError
from secateur.pack.codec import Packed, smallest, unpack
from secateur.pack.places import LAYOUTS
from secateur.pack.raw import refuse

KEY, VERSION = "secateur.packed", 1  # of the metadata; of what stands there
FRAME = 72  # bytes around it, and of the padding behind a header; counted for each tensor, so that no file grows


def write_archive(tensors: Mapping[str, Tensor], path: Path, pack: Collection[str] = (), entropy: bool = False) -> list[str]:
    """Write tensors into a safetensors file, those named in `pack` in the smallest layout. Returns which are packed.

    A tensor stays as it is where packing saves nothing, the longer header counted, or where the name of a part is that of another tensor.

    Args:
        tensors: by name, contiguous, on the CPU, none sharing memory.
        pack: names. entropy: deflate the places where that is smaller.

    Raises:
        safetensors.SafetensorError, OSError: the file cannot be written.
    """
    flat, headers = dict(tensors), dict[str, dict[str, Any]]()
    for name in [n for n in tensors if n in pack]:
        packed = smallest(tensors[name], entropy)
        parts = {f"{name}.{part}": tensor for part, tensor in packed.tensors.items()}
        if packed.layout != "dense" and not parts.keys() & tensors.keys() and _saves(name, tensors[name], packed):
            del flat[name]
            flat.update(parts)
            headers[name] = packed.header
    said = {KEY: json.dumps({"version": VERSION, "tensors": headers}, separators=(",", ":"))} if headers else {}
    save_file(flat, path, metadata={"format": "pt", **said})
    return list(headers)


def _saves(name: str, tensor: Tensor, packed: Packed) -> bool:
    """Whether the file is smaller, with the entries of the header that a packed tensor needs."""
    entry = len(json.dumps({"dtype": "BF16", "shape": list(tensor.shape), "data_offsets": [10**9, 10**9]}))
    header = len(json.dumps(json.dumps({name: packed.header})))  # in a string: quotes are escaped
    names = sum(len(name) + len(part) + 1 for part in packed.tensors) - len(name)
    return packed.nbytes + FRAME + header + names + entry * (len(packed.tensors) - 1) < tensor.nbytes


def read_archive(path: Path) -> dict[str, Tensor]:
    """Every tensor of a safetensors file by name, packed ones as they were before. The bytes may be anything.

    Raises:
        FormatError: the file is damaged or no safetensors file, was packed by a later version, or a packed tensor is not what its header says.
    """
    try:
        tensors = load_file(path)
        with safe_open(path, "pt") as held:
            said = (held.metadata() or {}).get(KEY)
    except (safetensors.SafetensorError, OSError, ValueError, KeyError, RuntimeError, TypeError, MemoryError) as error:
        raise FormatError(f"{path} cannot be read: {error}.\n  The file is damaged: save the model again.") from error
    return tensors if said is None else _unpacked(tensors, said, str(path))


def is_deflated(path: Path) -> bool:
    """Whether places are deflated in a file that `write_archive` wrote; it is not read but for its header."""
    try:
        with safe_open(path, "pt") as held:
            said = (held.metadata() or {}).get(KEY)
    except (safetensors.SafetensorError, OSError) as error:
        raise FormatError(f"{path} cannot be read: {error}.\n  The file is damaged: save the model again.") from error
    return said is not None and any("deflated" in header for header in _headers(said, str(path)).values())


def _unpacked(tensors: dict[str, Tensor], said: str, path: str) -> dict[str, Tensor]:
    headers = _headers(said, path)
    out, used = dict[str, Tensor](), set[str]()
    for name, header in headers.items():
        layout = header.get("layout") if isinstance(header, Mapping) else None
        part = LAYOUTS[layout][0] if isinstance(layout, str) and layout in LAYOUTS else ""
        parts = {key: f"{name}.{key}" for key in ("values", *([part] if part else []))}
        if name in tensors or used & set(parts.values()):
            refuse(f"{path}, {name}", "a tensor of this name, or one of its parts, is there twice")
        used.update(parts.values())
        out[name] = unpack(header, {key: tensors[full] for key, full in parts.items() if full in tensors}, f"{path}, {name}")
    rest = {name: tensor for name, tensor in tensors.items() if name not in used}
    if twice := sorted(rest.keys() & out.keys()):
        refuse(f"{path}, {twice[0]}", "a tensor of this name is there twice")
    return {**rest, **out}


def _headers(said: str, path: str) -> Mapping[str, Any]:
    try:
        document = json.loads(said)
    except (ValueError, RecursionError) as error:
        refuse(path, f"what the header says of packed tensors is no JSON ({str(error)[:80]})")
    if not isinstance(document, dict):
        refuse(path, f"what the header says of packed tensors is a {type(document).__name__}, not an object")
    if document.get("version") != VERSION:
        raise FormatError(f"{path} is packed in version {str(document.get('version'))[:20]} of the layout, and this secateur reads {VERSION}.\n"
                          "  Install the secateur that wrote it, or a later one.")  # fmt: skip
    headers = document.get("tensors")
    if not isinstance(headers, dict):
        refuse(path, f"its packed tensors are a {type(headers).__name__}, not an object")
    return headers
