"""A model from a name or a path, with inputs to run it on. Nothing is ever fetched from a network."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from secateur.errors import ModelError
from secateur.models import hf, program, vision, weights
from secateur.models.atomic import MARK
from secateur.models.folder import load, read
from secateur.models.names import import_function

FORMS = (
    "pkg.mod:factory, file.py:factory, torchvision/NAME, timm/NAME, hf/TYPE or hf/FOLDER, FILE.pt2, or a saved folder"
)


@dataclass(frozen=True)
class LoadedModel:
    """A model in evaluation mode. `example_inputs` are its positional inputs, None where they cannot be told."""

    model: nn.Module
    example_inputs: tuple | None
    name: str
    kwargs: dict[str, Any] = field(default_factory=dict)


def load_model(
    spec: str, weights_file: str | Path | None = None, *, factory: str | None = None, seed: int = 0
) -> LoadedModel:
    """Build the model `spec` names; `weights_file` (safetensors or a state dict) is loaded strictly where given.

    `spec` is one of: `pkg.mod:factory` or `file.py:factory` (a function that returns a model, or a model and its
    example inputs), `torchvision/NAME`, `timm/NAME`, `hf/TYPE` (a small random one of that type), `hf/FOLDER` (a local
    folder with config.json and perhaps safetensors), `FILE.pt2` (an exported program), or a folder `save` wrote
    (`factory` then names the function that builds its dense model, for one that carries no graph).
    Random weights are drawn from `seed`; the process's own random numbers go on as if nothing had been drawn.

    Raises:
        ModelError: there is no such model, its library is not installed, or the weights do not fit.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        loaded = _saved(spec, factory) if (Path(spec) / MARK).is_file() else _build(spec)
    if weights_file is not None:
        weights.load_into(loaded.model, Path(weights_file))
    if not _exported(loaded.model):
        loaded.model.eval()
    weights.check_finite(loaded.model, spec)
    return loaded


def _build(spec: str) -> LoadedModel:
    library, _, name = spec.partition("/")
    if spec.endswith(".pt2"):
        module, args, kwargs = program.load_program(Path(spec))
        return LoadedModel(module, args, spec, kwargs)
    if library == "torchvision" and name:
        return LoadedModel(*vision.torchvision_model(name, spec), spec)
    if library == "timm" and name:
        return LoadedModel(*vision.timm_model(name, spec), spec)
    if library == "hf" and name:
        model, kwargs = hf.build(name)
        return LoadedModel(model, (), spec, kwargs)
    if ":" in spec:
        return _from_factory(spec)
    if spec.endswith(".py"):
        raise ModelError(f"{spec!r} names a file and no function in it.\n  Write {spec}:FUNCTION, of a function that builds the model.")
    raise ModelError(f"{spec!r} is no model that secateur knows, and no folder it saved.\n  Write {FORMS}.")


def _saved(folder: str, factory: str | None) -> LoadedModel:
    args, kwargs = read(folder).example_inputs()
    build = import_function(factory, ModelError, "--factory") if factory else None
    return LoadedModel(load(folder, build), args, folder, kwargs)


def _from_factory(spec: str) -> LoadedModel:
    factory = import_function(spec, ModelError, "MODEL")
    if isinstance(factory, nn.Module):
        raise ModelError(f"{spec} is a {type(factory).__name__}, not a function that builds one.\n"
                         "  Write one, def net(): return ..., and name it: what is built anew is not changed by who had it before.")  # fmt: skip
    try:
        made = factory()
    except (Exception, SystemExit) as error:
        raise ModelError(f"{spec}() failed: {type(error).__name__}: {error}.\n"
                         "  The function is called without arguments; give it defaults.") from error  # fmt: skip
    model, inputs = made if isinstance(made, tuple) and len(made) == 2 else (made, None)
    if not isinstance(model, nn.Module):
        raise ModelError(f"{spec}() returned a {type(model).__name__}.\n"
                         "  Return an nn.Module, or (module, example inputs).")  # fmt: skip
    if isinstance(inputs, Mapping):
        return LoadedModel(model, (), spec, dict(inputs))
    if isinstance(inputs, Tensor):
        inputs = (inputs,)
    if not isinstance(inputs, (tuple, list, type(None))):
        raise ModelError(f"{spec}() returned inputs of type {type(inputs).__name__}.\n"
                         "  Return (module, inputs): a tensor, a tuple of positional inputs, or a dict of keyword inputs.")  # fmt: skip
    return LoadedModel(model, tuple(inputs) if inputs is not None else None, spec)


def _exported(model: nn.Module) -> bool:
    return isinstance(model, torch.fx.GraphModule)
