"""Where a model is trained: a GPU where there is one. In captured graphs the calls that make tensors name their device, and move along."""

from __future__ import annotations

import os

import torch
from torch import fx, nn

from secateur.errors import InputError

AUTO = "auto"


def place(said: str) -> torch.device:
    """The device for the words of the command line; "auto": CUDA where there is a GPU, else the CPU. Several processes are put where they belong by
    Accelerate, later.

    Raises:
        InputError: no such device, one that is not here, or one for several processes.
    """
    alone = int(os.environ.get("WORLD_SIZE", "1")) == 1
    if said == AUTO:
        return torch.device("cuda" if alone and torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(said)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError, ImportError) as error:
        raise InputError(f"--device {said} cannot be used: {str(error).splitlines()[0][:120]}.\n  Choose cpu, or leave it out.") from None
    if device.type == "meta":
        raise InputError("--device meta holds no numbers to train.\n  Choose cpu, or leave it out.")
    if not alone:
        raise InputError(f"--device {said} for {os.environ['WORLD_SIZE']} processes, which are spread over the GPUs as they are.\n  Leave it out.")
    return device


def moved(model: nn.Module, device: torch.device) -> nn.Module:
    """The model on a device, in place."""
    model.to(device)
    for graph in (m for m in model.modules() if isinstance(m, fx.GraphModule)):
        nodes = [n for n in graph.graph.nodes if isinstance(n.kwargs.get("device"), torch.device)]
        for node in nodes:
            node.kwargs = {**node.kwargs, "device": device}
        if nodes:
            graph.recompile()
    return model
