"""The tensors of a folder of safetensors shards, read one by one; and the same written shard by shard."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import safetensors
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from secateur.errors import FormatError, ModelError

INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"


@dataclass(frozen=True)
class Shards:
    """Which file of `folder` holds each tensor, by name."""

    folder: Path
    files: Mapping[str, str]

    @classmethod
    def of(cls, folder: Path) -> Shards:
        """
        Raises:
            ModelError: there are no safetensors, or a shard is missing, cut short, or lacks a tensor that the index names.
        """
        if (folder / INDEX).is_file():
            try:
                files = dict(json.loads((folder / INDEX).read_text())["weight_map"])
            except (ValueError, KeyError, TypeError) as error:
                raise ModelError(f"{folder / INDEX} is no index of shards: {error}.\n  Copy the folder again.") from error
        elif (folder / SINGLE).is_file():
            files = dict.fromkeys(_names(folder / SINGLE), SINGLE)
        else:
            raise ModelError(f"{folder} holds no {SINGLE} and no {INDEX}.\n  Give a folder with safetensors; nothing is downloaded.")
        found = cls(folder, files)
        for name in sorted(set(files.values())):
            if Path(name).name != name:
                raise ModelError(f"{folder / INDEX} names the file {name!r}, which is not in the folder itself.\n  Copy the folder again.")
            missing = {n for n, f in files.items() if f == name} - set(_names(folder / name))
            if missing:
                raise ModelError(f"{folder / name} lacks {len(missing)} tensors that the index names, such as {min(missing)!r}.\n  Copy it again.")
        return found

    def names(self, prefix: str = "") -> list[str]:
        return sorted(n for n in self.files if n.startswith(prefix))

    def read(self, names: Sequence[str]) -> dict[str, Tensor]:
        """Tensors by name, in the order given.

        Raises:
            ModelError: one is not there.
        """
        found: dict[str, Tensor] = {}
        by_file: dict[str, list[str]] = {}
        for n in names:
            if n not in self.files:
                raise ModelError(
                    f"{self.folder} has no tensor {n!r}: its weights do not belong to its config.json, or its class joins tensors (experts) "
                    "as it loads them.\n  Where the model loads otherwise, leave --stream out."
                )
            by_file.setdefault(self.files[n], []).append(n)
        for file, some in by_file.items():
            with safe_open(self.folder / file, "pt") as held:
                for n in some:
                    found[n] = held.get_tensor(n)
        return {n: found[n] for n in names}

    def shape(self, name: str) -> tuple[int, ...]:
        with safe_open(self.folder / self.files[name], "pt") as held:
            return tuple(held.get_slice(name).get_shape())

    def facts(self) -> dict[str, list[int]]:
        """Size and time of every file, by name: what a run that is taken up again compares."""
        stats = {f: (self.folder / f).stat() for f in sorted(set(self.files.values()))}
        return {f: [s.st_size, s.st_mtime_ns] for f, s in stats.items()}


def _names(path: Path) -> list[str]:
    try:
        with safe_open(path, "pt") as held:
            return list(held.keys())
    except FileNotFoundError:
        raise ModelError(f"the shard {path} is missing.\n  Copy the folder again.") from None
    except (safetensors.SafetensorError, OSError) as error:
        raise ModelError(f"the shard {path} cannot be read: {error}.\n  It was cut short: copy it again.") from error


def write(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """One shard, under a temporary name first, so that it is there whole or not at all.

    Raises:
        FormatError: the disk is full or not writable; nothing is left under `path`.
    """
    fresh = path.with_name(f".{path.name}.new")
    try:
        save_file({n: t.contiguous() for n, t in tensors.items()}, fresh, metadata={"format": "pt"})
        handle = os.open(fresh, os.O_RDONLY)
        os.fsync(handle)
        os.close(handle)
        fresh.chmod(0o644)
        os.replace(fresh, path)
    except (OSError, safetensors.SafetensorError) as error:
        fresh.unlink(missing_ok=True)
        free = os.statvfs(path.parent)
        raise FormatError(
            f"{path} could not be written: {error} ({free.f_bavail * free.f_frsize / 2**20:,.0f} MiB free on that disk).\n"
            "  What was done so far is kept: make room and run the same command again to go on."
        ) from error


def write_text(path: Path, text: str) -> None:
    """A small file, whole or not at all. Raises FormatError as `write`."""
    fresh = path.with_name(f".{path.name}.new")
    try:
        with fresh.open("w") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(fresh, path)
    except OSError as error:
        fresh.unlink(missing_ok=True)
        raise FormatError(f"{path} could not be written: {error.strerror}.\n  What was done is kept: run the same command again to go on.") from error


def pieces(names: Sequence[str], shards: Shards, most: int) -> Iterator[list[str]]:
    """Names in lots of at most `most` numbers each (one at least), so that none of them fills the memory."""
    lot: list[str] = []
    size = 0
    for n in names:
        own = int(torch.tensor(shards.shape(n)).prod()) if shards.shape(n) else 1
        if lot and size + own > most:
            yield lot
            lot, size = [], 0
        lot.append(n)
        size += own
    if lot:
        yield lot
