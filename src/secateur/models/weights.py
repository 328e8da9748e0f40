"""Weights from a file into a model: safetensors, or a state dict that holds tensors and nothing else."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import UninitializedBuffer, UninitializedParameter

from secateur.errors import ModelError

_WRAPPERS = ("state_dict", "model", "model_state_dict", "net", "ema_state_dict")


def fingerprint(facts: Any, tensors: Mapping[str, Tensor]) -> str:
    """16 hex digits that change with any fact and any number: what was computed from others is not taken for this."""
    digest = hashlib.sha256(json.dumps(facts, sort_keys=True, default=str).encode())
    for name, tensor in tensors.items():
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]


def load_into(model: nn.Module, path: Path) -> None:
    """Load the file at `path` into `model`, every name accounted for. The model is unchanged if it does not fit.

    Raises ModelError: no such file, damaged, pickled code in it, or names and shapes that differ.
    """
    state = read(path)
    own = model.state_dict()
    state = {k.removeprefix("module."): v for k, v in state.items()} if not set(state) & set(own) else state
    optional = {name for name in own if name.endswith("num_batches_tracked")}  # absent from files of torch < 0.4.1
    differences = [f"the file has no {name}" for name in own if name not in state and name not in optional]
    differences += [f"the model has no {name}" for name in state if name not in own]
    differences += [
        f"{name} is {list(state[name].shape)} in the file and {list(own[name].shape)} in the model"
        for name in own if name in state and state[name].shape != own[name].shape
    ]  # fmt: skip
    if differences:
        raise ModelError(
            f"{path} does not fit {type(model).__name__}: {'; '.join(differences[:3])}"
            f"{f' and {len(differences) - 3} more differences' if len(differences) > 3 else ''}.\n"
            "  Give the weights of this model, or the factory these weights were trained with."
        )
    model.load_state_dict({**{name: own[name] for name in optional}, **state})


def read(path: Path) -> dict[str, Tensor]:
    """The tensors of a file by name. A checkpoint that keeps them under `state_dict` or `model` is looked into."""
    if not path.is_file():
        raise ModelError(f"--weights {path} does not exist (looked from {Path.cwd()}).\n  Check the path.")
    held = _safetensors(path) if path.suffix == ".safetensors" else _state_dict(path)
    for name in _WRAPPERS:
        if isinstance(held, Mapping) and isinstance(held.get(name), Mapping):
            held = held[name]
    if not isinstance(held, Mapping) or not held or not all(isinstance(v, Tensor) for v in held.values()):
        what = f"a {type(held).__name__}" if not isinstance(held, Mapping) else f"{', '.join(map(str, list(held)[:5]))}"
        raise ModelError(f"{path} holds {what or 'nothing'}, not a state dict.\n"
                         "  Save model.state_dict() on its own, as safetensors.")  # fmt: skip
    return {str(k): v for k, v in held.items()}


def _safetensors(path: Path) -> dict[str, Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        raise ModelError(f"{path} cannot be read as safetensors: {error}.\n"
                         "  The file is damaged or cut short: copy it again.") from error  # fmt: skip


def _state_dict(path: Path) -> Any:
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except UnpicklingError as error:
        lines = [line.strip() for line in str(error).splitlines() if "GLOBAL" in line or "Unsupported" in line]
        found = lines[0][:160] if lines else "it is no file of tensors"
        raise ModelError(
            f"{path} holds more than tensors, and loading it could run code: {found}.\n"
            "  It was refused. Where you trust it, load it yourself and write its tensors alone: "
            "safetensors.torch.save_file(model.state_dict(), 'weights.safetensors')."
        ) from error
    except (RuntimeError, EOFError, OSError, ValueError, KeyError) as error:
        first = (str(error).splitlines() or [type(error).__name__])[0][:160]
        raise ModelError(f"{path} cannot be read as a state dict: {first}.\n"
                         "  The file is damaged or cut short: copy it again.") from error  # fmt: skip


def check_finite(model: nn.Module, name: str) -> None:
    """Raises ModelError if a parameter or buffer holds NaN or infinity where numbers belong, or nothing yet."""
    for kind, tensors in (("parameter", model.named_parameters()), ("buffer", model.named_buffers())):
        for key, tensor in tensors:
            if isinstance(tensor, (UninitializedParameter, UninitializedBuffer)):
                raise ModelError(f"{name}: the {kind} {key} has no shape yet, because a lazy module waits for its first input.\n"
                                 "  Run the model once on an example in the factory, and return it then.")  # fmt: skip
            wrong = tensor.isnan() if kind == "buffer" else ~tensor.isfinite()  # masks are built of infinities
            if tensor.is_floating_point() and tensor.device.type != "meta" and wrong.any():
                raise ModelError(
                    f"{name}: {int(wrong.sum())} of {tensor.numel()} values of the {kind} {key} are not finite.\n"
                    "  Scores and proofs would mean nothing: train again, or load weights from before they diverged."
                )
