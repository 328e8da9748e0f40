"""What a training run needs to go on after a kill as if there had been none: one file, replaced whole."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from secateur.errors import FormatError, InputError

FILE, FORMAT = "checkpoint.pt", "secateur-training/1"


def whole(tensor: Tensor) -> Tensor:
    """All of a tensor, of one that is spread over processes too (a DTensor); every process has to ask."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def full(tensor: Tensor) -> Tensor:
    """All of a tensor on the CPU, a copy; every process has to ask."""
    return whole(tensor).detach().to("cpu", copy=True)


def state_of(model: nn.Module) -> dict[str, Tensor]:
    """Every parameter and buffer, tied ones once."""
    return {n: full(t) for n, t in [*model.named_parameters(), *model.named_buffers()]}


def put(model: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Values into a model's own tensors. A buffer that has changed its shape, or was made, since then (a cache, a grid) is replaced, or left.

    Raises:
        FormatError: other names or shapes. Nothing was changed.
    """
    buffers = dict(model.named_buffers())
    own = {**dict(model.named_parameters()), **buffers}
    odd = [n for n in {*own, *state} if n not in own or (n not in buffers and (n not in state or own[n].shape != state[n].shape))]
    if odd:
        raise FormatError(f"The checkpoint is of another model: {len(odd)} tensors differ, {min(odd)!r} first.\n  Start in another folder.")
    with torch.no_grad():
        for name, tensor in own.items():
            if name in state and tensor.shape == state[name].shape:
                tensor.copy_(spread(state[name], tensor))
            elif name in state:
                owner, _, leaf = name.rpartition(".")
                model.get_submodule(owner)._buffers[leaf] = state[name].to(tensor.device, copy=True)


def spread(value: Tensor, like: Tensor) -> Tensor:
    """The value as `like` is spread over processes."""
    if not hasattr(like, "full_tensor") or not value.dim():
        return value.to(like.device)
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(value.to(like.device), like.device_mesh, like.placements)  # type: ignore[attr-defined]


def optimizer_state(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, dict[str, Any]]:
    """{name of the parameter: what the optimizer keeps of it}."""
    names: dict[Tensor, str] = {p: n for n, p in model.named_parameters()}
    return {names[p]: {k: full(v) if isinstance(v, Tensor) else v for k, v in held.items()} for p, held in optimizer.state.items()}


def put_optimizer(model: nn.Module, optimizer: torch.optim.Optimizer, state: Mapping[str, Mapping[str, Any]]) -> None:
    own = dict(model.named_parameters())
    for name, held in state.items():
        p = own[name]
        optimizer.state[p] = {k: (spread(v, p if v.shape == p.shape else v) if isinstance(v, Tensor) else v) for k, v in held.items()}


def write(folder: Path, held: Mapping[str, Any]) -> None:
    """
    Raises:
        FormatError: the disk is full or not writable. The checkpoint before is unchanged.
    """
    fresh = folder / f".{FILE}.{os.getpid()}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for old in folder.glob(f".{FILE}.*"):  # of processes that were killed while writing
            old.unlink(missing_ok=True)
        with fresh.open("wb") as file:
            torch.save({"format": FORMAT, **held}, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(fresh, folder / FILE)
    except (OSError, RuntimeError) as error:
        fresh.unlink(missing_ok=True)
        raise FormatError(f"{folder / FILE} could not be written: {error}.\n"
                          "  Make room, or choose another folder; the one before is whole.") from error  # fmt: skip


def read(folder: Path, settings: Mapping[str, Any], begun: str) -> dict[str, Any] | None:
    """The checkpoint of a run with these settings; None where there is none. Read without executing anything. `begun`: the hash of the model now,
    which is what the run began with, or what it was when it was saved.

    Raises:
        FormatError: damaged, or not ours. InputError: of a run with other settings.
    """
    path = folder / FILE
    if not path.exists():
        return None
    try:
        held = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # what torch raises for a damaged file is of many types
        raise FormatError(f"{path} cannot be read: {str(error).splitlines()[0][:200]}.\n  Remove it; training begins anew then.") from error
    if not isinstance(held, dict) or held.get("format") != FORMAT:
        raise FormatError(f"{path} is no checkpoint of this version.\n  Remove it; training begins anew then.")
    before, now = json.loads(held["settings"]), json.loads(json.dumps(settings))
    if before != {k: v for k, v in now.items() if k in before or k != "data"}:  # checkpoints of before say nothing of the data
        odd = sorted(k for k in {*before, *now} if before.get(k) != now.get(k))
        raise InputError(f"{path} is of a run with other settings: {', '.join(f'{k} was {before.get(k)!r}' for k in odd[:3])}.\n"
                         "  Use them again, or another folder.")  # fmt: skip
    if begun not in (held["begun"], held.get("ends") or digest(held["model"])):
        raise InputError(f"{path} is of a run that began with other weights than these.\n  Pass the model that it began with, or use another folder.")
    return held


def digest(state: Mapping[str, Tensor]) -> str:
    """A hash of names, shapes and bits."""
    found = hashlib.sha256()
    for name in sorted(state):
        tensor = full(state[name]).contiguous()
        found.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        found.update(tensor.flatten().view(torch.uint8).numpy().tobytes() if tensor.numel() else b"")
    return found.hexdigest()
