"""2:4 on GPUs: torch's semi-structured tensors (Mishra et al. 2021, "Accelerating Sparse Deep Neural Networks"), where they can be had and pay."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

from secateur.errors import InputError

ROWS, COLUMNS = 32, 64  # of which a weight in half precision has whole numbers, as the library behind it asks
TOKENS = 64  # below this a dense product is as quick
DTYPES = (torch.float16, torch.bfloat16)


def is_two_of_four(weight: Tensor) -> bool:
    """Whether no four neighbouring inputs of an output keep more than two weights."""
    return weight.dim() == 2 and weight.shape[1] % 4 == 0 and bool(((weight != 0).view(len(weight), -1, 4).sum(-1) <= 2).all())


def why_not_semi(layer: nn.Module, x: Tensor) -> str:
    """Why a layer is not computed as 2:4 on such an input, '' where it is."""
    if type(layer) is not nn.Linear:
        return f"{type(layer).__name__} is no plain linear layer"
    weight = layer.weight
    if not is_two_of_four(weight):
        return "its weight is not 2:4 along its inputs"
    if weight.device.type != "cuda":
        return "2:4 is computed on GPUs, and " + ("its weight lies elsewhere" if torch.cuda.is_available() else "there is none here")
    if torch.cuda.get_device_capability(weight.device) < (8, 0):
        return "its GPU is older than Ampere"
    if weight.dtype not in DTYPES or x.dtype != weight.dtype:
        return f"it is {weight.dtype} on inputs in {x.dtype}; both have to be float16 or bfloat16"
    if len(weight) % ROWS or weight.shape[1] % COLUMNS:
        return f"it is {tuple(weight.shape)}; outputs have to be a multiple of {ROWS}, inputs of {COLUMNS}"
    tokens = x.numel() // weight.shape[1]
    return f"{tokens} tokens are too few to be quicker" if tokens < TOKENS else ""


def semi_structured(layer: nn.Module, x: Tensor) -> nn.Linear:
    """A copy of the layer with its weight as a semi-structured tensor.

    Raises:
        InputError: it cannot be, on such an input.
    """
    if why := why_not_semi(layer, x):
        raise InputError(f"{layer} is not computed as 2:4: {why}.\n  Leave it dense, or prune it with pattern 2:4 and move it to a GPU.")
    made = copy.deepcopy(layer)
    assert isinstance(made, nn.Linear)
    made.weight = nn.Parameter(torch.sparse.to_sparse_semi_structured(made.weight.detach()), requires_grad=False)
    return made
