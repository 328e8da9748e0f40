"""The parts of a model that can be captured, where the whole cannot: a detector's backbone, neck and heads.

    for part in sc.parts(detector, (images,)):
        result = sc.prune(part.module, part.args, sc.MACs(at_most="50%"), kwargs=part.kwargs)
        detector = part.put(detector, result.model)

Inputs and outputs of a part keep their shape, so what stands around it is not touched.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_map

from secateur.errors import CaptureError, InputError
from secateur.trace.capture import evaluating, export


@dataclass(frozen=True)
class Part:
    """A sub-module that can be captured, with the inputs it was called with."""

    name: str
    module: nn.Module
    args: tuple
    kwargs: dict[str, Any]

    def put(self, model: nn.Module, module: nn.Module) -> nn.Module:
        """A copy of `model` with `module` in the place of this part.

        Raises:
            InputError: `model` has no module of this name.
        """
        parent, _, leaf = self.name.rpartition(".")
        out = copy.deepcopy(model)
        try:
            owner = out.get_submodule(parent)
            owner.get_submodule(leaf)
        except AttributeError as error:
            raise InputError(f"{type(model).__name__} has no module {self.name!r}.\n  Pass the model that the parts were taken from.") from error
        owner._modules[leaf] = module
        return out


def parts(model: nn.Module, args: tuple, kwargs: Mapping[str, Any] | None = None) -> list[Part]:
    """The largest sub-modules with parameters that `torch.export` can capture, in the order in which they first run.

    The model runs once, in eval mode, to see what each sub-module is called with; of several calls the first counts, and
    where it stops with an error the sub-modules that ran before.

    Raises:
        InputError: the model stops before any sub-module runs.
    """
    calls: dict[str, tuple[tuple, dict]] = {}
    hooks = []
    for name, module in model.named_modules():
        if name and not isinstance(module, torch.jit.ScriptModule) and any(True for _ in module.parameters()):
            hooks.append(module.register_forward_pre_hook(_recorder(name, calls), with_kwargs=True))
    try:
        with evaluating(model), torch.no_grad():
            model(*args, **dict(kwargs or {}))
    except Exception as error:  # what ran before it stopped can still be captured
        if not calls:
            raise InputError(
                f"{type(model).__name__} does not run on these inputs: {str(error).strip()[:200]}.\n  Pass inputs as forward() takes them."
            ) from error
    finally:
        for hook in hooks:
            hook.remove()
    found: list[Part] = []
    for name, (inputs, named) in calls.items():
        if not any(name.startswith(f"{p.name}.") for p in found) and _captures(model.get_submodule(name), inputs, named):
            found.append(Part(name, model.get_submodule(name), inputs, named))
    return found


def _recorder(name: str, calls: dict[str, tuple[tuple, dict]]):
    def record(module: nn.Module, args: tuple, kwargs: dict) -> None:
        calls.setdefault(name, tree_map(lambda v: v.detach().clone() if isinstance(v, torch.Tensor) else v, (args, kwargs)))

    return record


def _captures(module: nn.Module, args: tuple, kwargs: dict) -> bool:
    try:
        export(module, args, kwargs)
    except CaptureError:
        return False
    return True
