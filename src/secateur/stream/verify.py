"""Whether a folder that was written block by block is what it says."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import safetensors
import torch
from safetensors import safe_open

from secateur.errors import FormatError
from secateur.masks.exact import illegal
from secateur.models.verify import Verified
from secateur.stream.run import FORMAT, MARK, _digest, _sha256


def is_stream(folder: str | Path) -> bool:
    return (Path(folder) / MARK).is_file()


def verify_stream(folder: str | Path) -> Verified:
    """Hashes of all shards; of every sparse weight the number of zeros, the pattern, and that no zero is -0.

    Raises:
        FormatError: what says so is missing or was altered.
    """
    folder = Path(folder)
    mark = _mark(folder)
    problems = list[str]()
    for name, wanted in mark["files"].items():
        path = folder / name
        if Path(name).name != name:
            problems.append(f"{name}: is no name of a file in the folder itself")
        elif not path.is_file():
            problems.append(f"{name}: is missing")
        elif (found := _sha256(path)) != wanted:
            problems.append(f"{name}: was altered, its sha256 is {found[:12]}... and should be {wanted[:12]}...")
    seen = zeros = size = 0
    for name in [n for n in mark["files"] if n.endswith(".safetensors") and Path(n).name == n]:
        try:
            with safe_open(folder / name, "pt") as held:
                for key in held.keys():  # noqa: SIM118  # it is no dict
                    if key in mark["weights"]:
                        w = held.get_tensor(key)
                        problems += _wrong(key, w, mark["weights"][key])
                        seen, zeros, size = seen + 1, zeros + int((w == 0).sum()), size + w.numel()
        except (safetensors.SafetensorError, OSError) as error:
            problems.append(f"{name}: cannot be read: {error}")
    if seen != len(mark["weights"]):
        problems.append(f"{len(mark['weights']) - seen} sparse weights are in no shard")
    return Verified(str(folder), len(mark["files"]), seen, size, zeros, tuple(problems))


def _wrong(name: str, w: torch.Tensor, said: dict[str, Any]) -> list[str]:
    found = []
    if (zeros := int((w == 0).sum())) != said["zeros"]:
        found.append(f"{name}: {zeros} zeros, and {said['zeros']} were written")
    if minus := int((torch.signbit(w) & (w == 0)).sum()):
        found.append(f"{name}: {minus} zeros are -0")
    return found + illegal({name: w != 0}, {name: said["pattern"]}, at_most=True)


def _mark(folder: Path) -> dict[str, Any]:
    try:
        mark = json.loads((folder / MARK).read_text())
        claimed = mark.pop("sha256")
    except (OSError, ValueError, KeyError, AttributeError) as error:
        raise FormatError(f"{folder / MARK} cannot be read: {error}.\n  Give the folder that `secateur mask --stream -o` wrote.") from error
    if mark.get("format") != FORMAT or claimed != _digest(mark):
        raise FormatError(f"{folder / MARK} was altered after it was written, or is of another version.\n  Make the folder again.")
    return mark
