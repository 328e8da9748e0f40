"""Damage packed files at random and load them. What is loaded is tensors, or a FormatError says what is wrong; nothing else may happen.

    python scripts/fuzz_pack.py --seconds 600 --seed 1

Bytes are flipped, files cut short, values of the JSON header put to others, parts of tensors swapped. A kind of damage is tried on archives of
every layout, on the layouts of compressed-tensors, and on whole folders with their hashes made right again.
"""

from __future__ import annotations

import argparse
import json
import random
import struct
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from secateur.errors import FormatError
from secateur.pack import Packed, pack, read_archive, read_compressed_tensors
from secateur.pack.archive import KEY, VERSION

ODD: list[Any] = [0, 1, -1, 2, 7, 255, 256, 2**16, 2**31, 2**40, 2**63, 2**64, 10**30, 1.5, True, False, None, "", "x", "uint8", "float64", "int64",
                  "bitmask", "index", "nm", "blocks", "dense", [], {}, [0], [2**40, 2**40], [0, 2**62], [-1], [[1]], float("nan")]  # fmt: skip


def example(kind: str, seed: int, entropy: bool) -> Packed:
    """A small tensor in one layout."""
    draw = torch.Generator().manual_seed(seed)
    dtype = [torch.float32, torch.bfloat16, torch.int8, torch.float64][seed % 4]
    dense = torch.randint(1, 100, (16, 12), generator=draw).to(dtype)
    zero = torch.zeros((), dtype=dtype)
    keep = torch.rand(16, 12, generator=draw) < (0.02 if kind == "index" else 0.4)
    if kind == "nm":
        places = torch.rand(16, 3, 4, generator=draw).argsort(-1) < 2
        return pack(torch.where(places.view(16, 12), dense, zero), "nm", n=2, m=4, entropy=entropy)
    if kind == "blocks":
        keep = (torch.rand(4, 12, generator=draw) < 0.4).repeat_interleave(4, 0)
        return pack(torch.where(keep, dense, zero), "blocks", size=4, entropy=entropy)
    return pack(torch.where(keep, dense, zero), kind, entropy=entropy)


def archive(seed: int) -> bytes:
    """A file with a tensor in each layout, and a dense one."""
    flat: dict[str, Tensor] = {"bias": torch.arange(5.0)}
    headers = {}
    for place, kind in enumerate(("bitmask", "index", "nm", "blocks", "dense")):
        packed = example(kind, seed + place, entropy=seed % 2 == 1)
        flat.update({f"{kind}.{part}": tensor for part, tensor in packed.tensors.items()})
        headers[kind] = packed.header
    return as_bytes(flat, {KEY: json.dumps({"version": VERSION, "tensors": headers})})


def orphans(seed: int) -> bytes:
    """A file in both layouts of compressed-tensors."""
    draw = torch.Generator().manual_seed(seed)
    mask = torch.rand(6, 10, generator=draw) < 0.3
    counts = mask.sum(1)
    free = {"shape": torch.tensor([6, 10]), "compressed": torch.randn(int(mask.sum()), generator=draw), "bitmask": row_bits(mask),
            "row_offsets": counts.cumsum(0) - counts}  # fmt: skip
    pairs = (torch.rand(4, 3, 4, generator=draw).argsort(-1) < 2).view(4, 12)
    two = {"shape": torch.tensor([[4], [12]]), "compressed": torch.randn(4, 6, generator=draw), "bitmask": row_bits(pairs)}
    return as_bytes({**{f"free.{k}": v for k, v in free.items()}, **{f"two.{k}": v for k, v in two.items()}}, {})


def row_bits(mask: Tensor) -> Tensor:
    columns = -(-mask.shape[1] // 8)
    padded = torch.zeros(mask.shape[0], columns * 8, dtype=torch.uint8)
    padded[:, : mask.shape[1]] = mask
    return (padded.view(-1, columns, 8) << torch.arange(8, dtype=torch.uint8)).sum(-1).to(torch.uint8)


def as_bytes(tensors: dict[str, Tensor], metadata: dict[str, str]) -> bytes:
    with tempfile.TemporaryDirectory() as folder:
        save_file({k: v.contiguous() for k, v in tensors.items()}, Path(folder) / "x", metadata={"format": "pt", **metadata})
        return (Path(folder) / "x").read_bytes()


# ---------------------------------------------------------------- damage
def split(content: bytes) -> tuple[dict[str, Any], bytes]:
    size = struct.unpack("<Q", content[:8])[0]
    return json.loads(content[8 : 8 + size]), content[8 + size :]


def join(header: dict[str, Any], data: bytes) -> bytes:
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


def flip(content: bytes, draw: random.Random) -> bytes:
    out = bytearray(content)
    for _ in range(draw.choice((1, 1, 2, 8))):
        out[draw.randrange(len(out))] ^= 1 << draw.randrange(8)
    return bytes(out)


def flip_data(content: bytes, draw: random.Random) -> bytes:
    """Behind the header, so that the file itself is still whole."""
    size = 8 + struct.unpack("<Q", content[:8])[0]
    return content[:size] + flip(content[size:], draw)


def cut(content: bytes, draw: random.Random) -> bytes:
    return content[: draw.randrange(len(content))]


def edit(content: bytes, draw: random.Random) -> bytes:
    """A value somewhere in what the metadata says."""
    header, data = split(content)
    said = header.get("__metadata__", {})
    if KEY in said:
        document = json.loads(said[KEY])
        scramble(document, draw)
        said[KEY] = json.dumps(document)
    else:
        scramble(header, draw)
    return join(header, data)


def scramble(value: Any, draw: random.Random) -> None:
    keys = list(value) if isinstance(value, dict) else list(range(len(value)))
    if not keys:
        return
    key = draw.choice(keys)
    if isinstance(value[key], (dict, list)) and value[key] and draw.random() < 0.85:
        scramble(value[key], draw)
    elif isinstance(value, dict) and draw.random() < 0.2:
        del value[key]
    elif isinstance(value[key], int) and draw.random() < 0.5:
        value[key] += draw.choice((-1, 1, 8))
    else:
        value[key] = draw.choice(ODD)


def edit_text(content: bytes, draw: random.Random) -> bytes:
    header, data = split(content)
    said = header.get("__metadata__", {})
    if KEY in said:
        text = said[KEY]
        at = draw.randrange(len(text))
        said[KEY] = draw.choice((text[:at], text[:at] + draw.choice('{}[]",:0-9x') + text[at + 1 :], "[" * 100000, "", "[]", "null"))
    return join(header, data)


def swap(content: bytes, draw: random.Random) -> bytes:
    """Two tensors of the file under each other's name, or one of them under a new one."""
    header, data = split(content)
    one, two = draw.sample([k for k in header if k != "__metadata__"], 2)
    header[one], header[two] = header[two], header[one]
    if draw.random() < 0.3:
        header[draw.choice([one + "x", two.rpartition(".")[0] or "y"])] = header.pop(one)
    return join(header, data)


def whole_file(content: bytes, draw: random.Random) -> bytes:
    header, data = split(content)
    scramble(header, draw)
    return join(header, data)


DAMAGES = (flip, flip_data, flip_data, cut, edit, edit, edit, edit_text, swap, whole_file)


# ---------------------------------------------------------------- the loop
def fuzz(seconds: float, seed: int, folders: bool = True) -> tuple[Counter[str], list[str]]:
    """(how often what came of it, one sentence for each finding). A finding is anything but tensors and a FormatError of two lines."""
    draw, found, seen = random.Random(seed), list[str](), Counter[str]()
    subjects = [*((archive(s), read_archive) for s in range(4)), *((orphans(s), read_compressed_tensors) for s in range(2))]
    with tempfile.TemporaryDirectory() as place:
        whole = Folder(Path(place) / "folder") if folders else None
        end = time.monotonic() + seconds
        while time.monotonic() < end and len(found) < 10:
            content, read = draw.choice(subjects)
            path = Path(place) / "x.safetensors"
            damage = draw.choice(DAMAGES)
            if whole and draw.random() < 0.3:
                whole.damage(damage, draw)
                read, path = whole.read, whole.path
            else:
                for _ in range(draw.choice((1, 1, 1, 2))):
                    content = safely(damage, content, draw)
                path.write_bytes(content)
            result = outcome(read, path)
            seen[result if result in ("tensors", "refused") else "findings"] += 1
            if result not in ("tensors", "refused"):
                found.append(f"{damage.__name__}: {result}")
    return seen, found


def safely(damage: Callable[[bytes, random.Random], bytes], content: bytes, draw: random.Random) -> bytes:
    try:
        return damage(content, draw)
    except (ValueError, struct.error, TypeError, AttributeError, IndexError):  # damaged before, and now no header to work on
        return flip(content, draw) if content else content


def outcome(read: Callable[[Path], Any], path: Path) -> str:
    try:
        loaded = read(path)
        ok = isinstance(loaded, dict) and all(isinstance(t, Tensor) for t in loaded.values())
        for tensor in loaded.values():
            tensor.reshape(-1).view(torch.uint8).sum()  # every byte can be read
        return "tensors" if ok else f"a {type(loaded).__name__} came back"
    except FormatError as error:
        return "refused" if "\n" in str(error) else f"no way out is named: {error}"
    except BaseException as error:  # whatever it is, it is a finding
        if isinstance(error, KeyboardInterrupt):
            raise
        return f"{type(error).__name__}: {error}"


class Folder:
    """A saved folder whose tensors, or what its plan says of them, are damaged, with its hashes made right again."""

    def __init__(self, path: Path):
        import secateur as sc
        from secateur.models import folder

        self.path, self.parts = path, folder
        net = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.ReLU(), torch.nn.Linear(64, 64)).eval()
        sc.save(sc.sparsify(net, (torch.randn(2, 64),), sc.Sparse("20%")), path)
        self.content = (path / folder.TENSORS).read_bytes()
        self.document = folder._unsealed(path / folder.MARK)

    def damage(self, damage: Callable[[bytes, random.Random], bytes], draw: random.Random) -> None:
        file = self.path / self.parts.TENSORS
        file.write_bytes(safely(damage, self.content, draw) if draw.random() < 0.7 else self.content)
        facts = {"bytes": file.stat().st_size, "sha256": self.parts.sha256(file)}
        document = {**self.document, "files": {**self.document["files"], self.parts.TENSORS: facts}}
        if draw.random() < 0.3:
            document = json.loads(json.dumps(document))
            scramble({k: document[k] for k in ("tensors", "aliases", "plan")}, draw)
            document = json.loads(json.dumps(document), parse_constant=lambda _: 0.5)  # plan.json has no NaN
        (self.path / self.parts.MARK).write_text(self.parts._sealed(document))

    def read(self, path: Path) -> dict[str, Tensor]:
        return self.parts.read(path).tensors


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    seen, found = fuzz(given.seconds, given.seed)
    print(f"{sum(seen.values())} damaged files: {dict(seen)}")
    print(*found, sep="\n")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
