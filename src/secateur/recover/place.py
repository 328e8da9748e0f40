"""Where a model is trained: a GPU where there is one. In captured graphs some calls name their device, and move along."""

from __future__ import annotations

import os
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.fx.node import map_aggregate

from secateur.errors import InputError, first_line

AUTO = "auto"


def place(said: str) -> torch.device:
    """The device for the words of the command line, tried; "auto": CUDA where there is a GPU, else the CPU. Of several processes each is put where it
    belongs by Accelerate, later.

    Raises:
        InputError: no such device, one that does not work, or one for several processes.
    """
    alone, gpu = int(os.environ.get("WORLD_SIZE", "1")) == 1, torch.cuda.is_available()
    if not alone and said not in (AUTO, *(["cpu"] if not gpu else [])):
        raise InputError(f"--device {said} for {os.environ['WORLD_SIZE']} processes: each one's is chosen by Accelerate.\n  Leave it out.")
    if said == AUTO:
        said = "cuda" if alone and gpu else "cpu"
    try:
        device = torch.device(said)
        if device.type == "meta":
            raise InputError("--device meta holds no numbers to train.\n  Choose cpu, or leave it out.")
        torch.ones(2, device=device).sum().item()
    except (RuntimeError, AssertionError, ImportError) as error:
        raise InputError(f"The device {said} cannot be used: {first_line(error)[:160]}.\n  Add --device cpu, or name another one.") from None
    return device


def moved(model: nn.Module, device: torch.device) -> nn.Module:
    """The model on a device, in place: calls of captured graphs that name one, and tensors that they keep as plain attributes, too."""
    model.to(device)

    def there(value: Any) -> Any:
        return device if isinstance(value, torch.device) else value

    for graph in (m for m in model.modules() if isinstance(m, fx.GraphModule)):
        before = [(node.args, node.kwargs) for node in graph.graph.nodes]
        for node in graph.graph.nodes:
            node.args, node.kwargs = map_aggregate(node.args, there), map_aggregate(node.kwargs, there)
            if "autocast" in str(node.target) and node.args and isinstance(node.args[0], str):  # a region in another precision, by the kind of device
                node.args = (device.type, *node.args[1:])
        if before != [(node.args, node.kwargs) for node in graph.graph.nodes]:
            graph.recompile()
        for name, value in list(vars(graph).items()):
            if isinstance(value, Tensor):
                setattr(graph, name, value.to(device))
    return model


def gpus(model: nn.Module) -> list[torch.device]:
    """The GPUs that a model lies on, whose random numbers are not its own."""
    return list({p.device: None for p in model.parameters() if p.device.type == "cuda"})
