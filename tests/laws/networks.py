"""Random networks: a stem, a few image pieces, a bridge to tokens or a vector, a few token pieces, a head."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from hypothesis import strategies as st
from torch import nn

from .pieces import IMAGE, TOKEN

Choice = tuple[int, int, int]  # which piece, and its two free choices


@dataclass(frozen=True)
class Recipe:
    """Everything a network is made from; short enough to read when hypothesis prints the smallest failing one."""

    stem: int
    image: tuple[Choice, ...]
    bridge: str
    token: tuple[Choice, ...]
    seed: int

    def __repr__(self) -> str:
        image = [f"{IMAGE[i % len(IMAGE)].__name__}({a}, {b})" for i, a, b in self.image]
        token = [f"{TOKEN[i % len(TOKEN)].__name__}({a}, {b})" for i, a, b in self.token]
        code = f"Recipe({self.stem}, {tuple(self.image)}, {self.bridge!r}, {tuple(self.token)}, {self.seed})"
        return f"{code}  # {image} {token}"


class Network(nn.Module):
    """The network of a recipe, for inputs (2, 3, 4, 4)."""

    def __init__(self, recipe: Recipe):
        super().__init__()
        c = recipe.stem
        self.bridge, self.stem = recipe.bridge, nn.Conv2d(3, c, 1)
        self.image, self.token = nn.ModuleList(), nn.ModuleList()
        for i, a, b in recipe.image:
            self.image.append(IMAGE[i % len(IMAGE)](c, a, b))
            c = self.image[-1].out
        self.narrow = nn.Linear(16 * c if self.bridge == "flatten" else c, 6)
        c = 6
        for i, a, b in recipe.token:
            self.token.append(TOKEN[i % len(TOKEN)](c, a, b))
            c = self.token[-1].out
        self.head = nn.Linear(c, 3)

    def forward(self, x):
        x = self.stem(x)
        for piece in self.image:
            x = piece(x)
        if self.bridge == "flatten":
            x = x.flatten(1).unsqueeze(1)
        elif self.bridge == "pool":
            x = x.mean((2, 3)).unsqueeze(1)
        else:
            x = x.flatten(2).transpose(1, 2)
        x = self.narrow(x)
        for piece in self.token:
            x = piece(x)
        return self.head(x)


def build(recipe: Recipe) -> Network:
    """The network in float64 and evaluation mode, norms and running statistics random too."""
    torch.manual_seed(recipe.seed)
    model = Network(recipe).double().eval()
    with torch.no_grad():
        for name, value in [*model.named_parameters(), *model.named_buffers()]:
            if name.endswith("running_var"):
                value.uniform_(0.5, 1.5)
            elif name.endswith("running_mean") or (isinstance(value, nn.Parameter) and value.ndim == 1):
                value.add_(0.3 * torch.randn_like(value))
    return model


def example(recipe: Recipe) -> torch.Tensor:
    """Inputs (2, 3, 4, 4) of the recipe's seed."""
    return torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(recipe.seed + 1), dtype=torch.float64)


def recipes() -> st.SearchStrategy[Recipe]:
    """All recipes of up to four image and three token pieces."""
    choice = st.tuples(st.integers(0, 13), st.integers(0, 11), st.integers(0, 11))
    return st.builds(
        Recipe,
        stem=st.sampled_from((4, 6, 8, 12)),
        image=st.lists(choice, max_size=4).map(tuple),
        bridge=st.sampled_from(("flatten", "pool", "tokens")),
        token=st.lists(choice, max_size=3).map(tuple),
        seed=st.integers(0, 999),
    )
