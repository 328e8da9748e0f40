"""Low-rank updates beside the weights of linear layers and convolutions: they are trained in the place of the weights, and merged at the end.

    W + M * (2 B A)        B (outputs, rank), A (rank, inputs * kernel),  M the mask of a plan, or ones

Hu et al. 2021, "LoRA: Low-Rank Adaptation of Large Language Models"; with the mask in the product, so that what is merged is what was trained,
Zimmer et al. 2023, "PERP: Rethinking the Prune-Retrain Paradigm in the Era of LLMs" (MaskLoRA).
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor, fx, nn
from torch.nn.utils import parametrize

from secateur.errors import InputError
from secateur.plan import Plan
from secateur.recover.order import mixed
from secateur.recover.sparse_layers import weights_of

SCALE = 2.0  # of the product, whatever the rank: what alpha = 2 rank is elsewhere
INSIDE = ".parametrizations."  # of the name of what torch keeps beside a weight
LAYERS = ("aten::linear", "aten::conv1d", "aten::conv2d", "aten::conv3d")


class Update(nn.Module):
    """What is added to one weight. `b` begins as zeros, so that the model does what it did before.

    Args:
        weight: (outputs, ...), of any number of dimensions from 2 on. rank: of the product, at most what the weight has.
        stays: bool of its shape; None: everything stays. seed: of `a`.
    """

    def __init__(self, weight: Tensor, rank: int, stays: Tensor | None, seed: int):
        super().__init__()
        rows, columns = weight.shape[0], weight[0].numel()
        rank = min(rank, rows, columns)
        drawn = torch.randn(rank, columns, generator=torch.Generator().manual_seed(seed)) / math.sqrt(columns)
        self.a = nn.Parameter(drawn.to(weight.device, weight.dtype))
        self.b = nn.Parameter(weight.new_zeros(rows, rank))
        self.gone = None if stays is None else ~stays.to(weight.device)  # no buffer: it is the plan's, and does not change

    def forward(self, weight: Tensor) -> Tensor:
        with torch.autocast(weight.device.type, enabled=False):  # what is merged is not rounded either
            update = (SCALE * (self.b @ self.a)).reshape(weight.shape)
            if self.gone is not None:
                if self.gone.device != weight.device:
                    self.gone = self.gone.to(weight.device)
                update = update.masked_fill(self.gone, 0)
            return weight + update


class LowRank:
    """A model whose matrices stand still and have an `Update` each; norms and biases are trained as they are. `merge()` ends it.

    Args:
        model: changed in place; its modules, hooks and outputs are what they were.
        plan: its zeros are in the updates too; None or without weights: all are trained. rank: from 1 on. seed: of the first factors.

    Raises:
        InputError: there is no linear layer and no convolution with a weight of its own.
    """

    def __init__(self, model: nn.Module, plan: Plan | None, rank: int, seed: int):
        self.flags = {p: p.requires_grad for p in model.parameters()}
        masks = plan.weights if plan is not None else {}
        self.places = list[tuple[nn.Module, str]]()
        self.orders = {m: list(m._parameters) for m in model.modules()}  # what torch puts back it puts last
        self.names = [n for n in places_of(model) if model.get_parameter(n).requires_grad]
        if not self.names:
            raise InputError(f"train='lora': {type(model).__name__} has no linear layer and no convolution with a weight of its own to train.\n"
                             "  Train all, or norms.")  # fmt: skip
        updates = {n: Update(model.get_parameter(n), rank, masks.get(n), mixed(seed, k, 3001)) for k, n in enumerate(self.names)}
        for p in model.parameters():
            p.requires_grad_(self.flags[p] and p.dim() < 2)
        for name, update in updates.items():
            path, _, own = name.rpartition(".")
            module = model.get_submodule(path)
            parametrize.register_parametrization(module, own, update)
            self.places.append((module, own))

    def merged(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """The state of the model as it would be after `merge`, of the state that it has now. Both by name, on the CPU."""
        found = {n: t for n, t in state.items() if INSIDE not in f".{n}"}
        with torch.no_grad():
            for name, (module, own) in zip(self.names, self.places, strict=True):
                found[name] = getattr(module, own).detach().cpu()
        return found

    def merge(self) -> None:
        """The updates into the weights; modules, names and flags are what they were."""
        for module, own in self.places:
            with torch.no_grad():
                whole = getattr(module, own).detach()
                parametrize.remove_parametrizations(module, own, leave_parametrized=False)
                getattr(module, own).copy_(whole)
            for name in self.orders[module]:
                module._parameters[name] = module._parameters.pop(name)
        for p, flag in self.flags.items():
            p.requires_grad_(flag)
        self.places, self.names = [], []


def places_of(model: nn.Module) -> list[str]:
    """The weights of linear layers and convolutions, by name: of modules, and of the calls in captured graphs. Weights with two names are left out:
    one of the modules would not see the update."""
    names: dict[int, list[str]] = {}
    for name, p in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(p), []).append(name)
    known = {held[0]: None for held in names.values() if len(held) == 1}
    return [n for n in dict.fromkeys([*weights_of(model), *_in_graphs(model)]) if n in known]


def _in_graphs(model: nn.Module) -> Iterator[str]:
    for path, graph in model.named_modules():
        for node in graph.graph.nodes if isinstance(graph, fx.GraphModule) else ():
            called = isinstance(node.target, torch._ops.OpOverload) and node.target._schema.name in LAYERS
            if called and isinstance(node.args[1], fx.Node) and node.args[1].op == "get_attr":
                yield f"{path}.{node.args[1].target}" if path else str(node.args[1].target)
