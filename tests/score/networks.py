"""Small networks with everything about their units written down by hand: where their weights are, which layers make
them, which take them in, behind which module they are looked at. Nothing here comes from a trace."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import nn
from torch.nn import functional as F

Places = Callable[[int], list[int]]


def itself(unit: int) -> list[int]:
    return [unit]


def outer(inner: int) -> Places:
    """Unit i of the outer factor of a product whose inner factor has `inner` units."""
    return lambda unit: [unit * inner + j for j in range(inner)]


def inner(outer_size: int, inner_size: int) -> Places:
    return lambda unit: [o * inner_size + unit for o in range(outer_size)]


@dataclass
class Known:
    """What is known about one group. `weights` and `makes`: (parameter, dimension, places of a unit); `eats`: (module,
    places among its input channels); `gives`: (module, dimension of its output, places)."""

    size: int
    weights: list[tuple[str, int, Places]]
    makes: list[tuple[str, int, Places]]
    eats: list[tuple[str, Places]]
    gives: list[tuple[str, int, Places]]
    norms: list[str] = field(default_factory=list)


class Residual(nn.Module):
    """A convolution, a residual block with batch norms, a classifier."""

    def __init__(self):
        super().__init__()
        self.conv0, self.bn0, self.relu0 = nn.Conv2d(3, 6, 3, padding=1, bias=False), nn.BatchNorm2d(6), nn.ReLU()
        self.conv1, self.bn1, self.relu1 = nn.Conv2d(6, 5, 3, padding=1), nn.BatchNorm2d(5), nn.ReLU(inplace=True)
        self.conv2, self.bn2, self.relu2 = nn.Conv2d(5, 6, 1, bias=False), nn.BatchNorm2d(6), nn.ReLU()
        self.fc = nn.Linear(6, 4)

    def forward(self, x):
        x = self.relu0(self.bn0(self.conv0(x)))
        x = self.relu2(x + self.bn2(self.conv2(self.relu1(self.bn1(self.conv1(x))))))
        return self.fc(x.mean((2, 3)))

    example = (2, 3, 5, 5)
    known = {
        "conv0:out": Known(
            6,
            [("conv0.weight", 0, itself), ("bn0.weight", 0, itself), ("bn0.bias", 0, itself), ("conv1.weight", 1, itself),
             ("conv2.weight", 0, itself), ("bn2.weight", 0, itself), ("bn2.bias", 0, itself), ("fc.weight", 1, itself)],
            [("conv0.weight", 0, itself), ("conv2.weight", 0, itself)],
            [("conv1", itself), ("fc", itself)],
            [("relu0", 1, itself), ("relu2", 1, itself)],
            ["bn0.weight", "bn2.weight"],
        ),
        "conv1:out": Known(
            5,
            [("conv1.weight", 0, itself), ("conv1.bias", 0, itself), ("bn1.weight", 0, itself), ("bn1.bias", 0, itself),
             ("conv2.weight", 1, itself)],
            [("conv1.weight", 0, itself)],
            [("conv2", itself)],
            [("relu1", 1, itself)],
            ["bn1.weight"],
        ),
    }  # fmt: skip


class Perceptron(nn.Module):
    """Two hidden layers; behind the second no value is ever 0."""

    def __init__(self):
        super().__init__()
        self.a, self.relu, self.b, self.soft, self.c = nn.Linear(5, 6), nn.ReLU(), nn.Linear(6, 7), nn.Softplus(), nn.Linear(7, 3)

    def forward(self, x):
        return self.c(self.soft(self.b(self.relu(self.a(x)))))

    example = (2, 5)
    known = {
        "a:out": Known(6, [("a.weight", 0, itself), ("a.bias", 0, itself), ("b.weight", 1, itself)], [("a.weight", 0, itself)],
                       [("b", itself)], [("relu", 1, itself)]),
        "b:out": Known(7, [("b.weight", 0, itself), ("b.bias", 0, itself), ("c.weight", 1, itself)], [("b.weight", 0, itself)],
                       [("c", itself)], [("soft", 1, itself)]),
    }  # fmt: skip


class Grouped(nn.Module):
    """A depthwise convolution, then one in two groups."""

    def __init__(self):
        super().__init__()
        self.stem, self.act0 = nn.Conv2d(3, 8, 3, padding=1), nn.ReLU6()
        self.depth, self.norm, self.act1 = nn.Conv2d(8, 8, 3, padding=1, groups=8, bias=False), nn.BatchNorm2d(8), nn.ReLU()
        self.pair, self.act2 = nn.Conv2d(8, 6, 3, groups=2), nn.ReLU()
        self.fc = nn.Linear(6, 3)

    def forward(self, x):
        x = self.act1(self.norm(self.depth(self.act0(self.stem(x)))))
        return self.fc(self.act2(self.pair(x)).mean((2, 3)))

    example = (2, 3, 6, 6)
    known = {
        "stem:out.0": Known(  # the two groups of `pair` with all that leads there and away
            2,
            [("stem.weight", 0, outer(4)), ("stem.bias", 0, outer(4)), ("depth.weight", 0, outer(4)), ("norm.weight", 0, outer(4)),
             ("norm.bias", 0, outer(4)), ("pair.weight", 0, outer(3)), ("pair.bias", 0, outer(3)), ("fc.weight", 1, outer(3))],
            [("stem.weight", 0, outer(4)), ("depth.weight", 0, outer(4)), ("pair.weight", 0, outer(3))],
            [("fc", outer(3))],
            [("act0", 1, outer(4)), ("act1", 1, outer(4)), ("act2", 1, outer(3))],
            ["norm.weight"],
        ),
        "stem:out.1": Known(
            4,
            [("stem.weight", 0, inner(2, 4)), ("stem.bias", 0, inner(2, 4)), ("depth.weight", 0, inner(2, 4)),
             ("norm.weight", 0, inner(2, 4)), ("norm.bias", 0, inner(2, 4)), ("pair.weight", 1, itself)],
            [("stem.weight", 0, inner(2, 4)), ("depth.weight", 0, inner(2, 4))],
            [("pair", inner(2, 4))],
            [("act0", 1, inner(2, 4)), ("act1", 1, inner(2, 4))],
            ["norm.weight"],
        ),
        "pair:out.1": Known(
            3,
            [("pair.weight", 0, inner(2, 3)), ("pair.bias", 0, inner(2, 3)), ("fc.weight", 1, inner(2, 3))],
            [("pair.weight", 0, inner(2, 3))],
            [("fc", inner(2, 3))],
            [("act2", 1, inner(2, 3))],
        ),
    }  # fmt: skip


class Attention(nn.Module):
    """A stream of 6, two heads of 3, and a classifier."""

    def __init__(self):
        super().__init__()
        self.embed, self.norm = nn.Linear(4, 6), nn.LayerNorm(6)
        self.q, self.k, self.v = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 6)
        self.proj, self.head = nn.Linear(6, 6), nn.Linear(6, 3)

    def forward(self, x):
        x = self.embed(x)
        y = self.norm(x)
        q, k, v = (f(y).unflatten(-1, (2, 3)).transpose(1, 2) for f in (self.q, self.k, self.v))
        x = x + self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        return self.head(x).mean(1)

    example = (2, 5, 4)
    known = {
        "embed:out": Known(
            6,
            [("embed.weight", 0, itself), ("embed.bias", 0, itself), ("norm.weight", 0, itself), ("norm.bias", 0, itself),
             ("q.weight", 1, itself), ("k.weight", 1, itself), ("v.weight", 1, itself), ("proj.weight", 0, itself),
             ("proj.bias", 0, itself), ("head.weight", 1, itself)],
            [("embed.weight", 0, itself), ("proj.weight", 0, itself)],
            [("q", itself), ("k", itself), ("v", itself), ("head", itself)],
            [("embed", 2, itself), ("proj", 2, itself)],
        ),
        "q:out.head": Known(
            2,
            [*((f"{n}.{w}", 0, outer(3)) for n in "qkv" for w in ("weight", "bias")), ("proj.weight", 1, outer(3))],
            [(f"{n}.weight", 0, outer(3)) for n in "qkv"],
            [("proj", outer(3))],
            [(n, 2, outer(3)) for n in "qkv"],
        ),
        "q:out.head_dim": Known(
            3,
            [(f"{n}.{w}", 0, inner(2, 3)) for n in "qk" for w in ("weight", "bias")],
            [(f"{n}.weight", 0, inner(2, 3)) for n in "qk"],
            [],
            [(n, 2, inner(2, 3)) for n in "qk"],
        ),
        "v:out.value_dim": Known(
            3,
            [("v.weight", 0, inner(2, 3)), ("v.bias", 0, inner(2, 3)), ("proj.weight", 1, inner(2, 3))],
            [("v.weight", 0, inner(2, 3))],
            [("proj", inner(2, 3))],
            [("v", 2, inner(2, 3))],
        ),
    }  # fmt: skip


def made(kind: type[nn.Module]) -> nn.Module:
    """One of them in float64 with weights, scales and statistics that are nothing special."""
    torch.manual_seed(1)
    model = kind().double()
    with torch.no_grad():
        for name, value in model.state_dict().items():
            if value.is_floating_point() and value.dim() == 1:
                value.copy_(torch.rand_like(value) + 0.5 if name.endswith("var") else 0.7 * torch.randn_like(value))
    return model.train()


def data(kind: type[nn.Module], sizes: tuple[int, ...] = (4, 3, 4)) -> list[tuple[torch.Tensor, torch.Tensor]]:
    generator = torch.Generator().manual_seed(2)
    total = sum(sizes)
    x = torch.randn(total, *kind.example[1:], generator=generator, dtype=torch.float64) + 0.2
    y = torch.randint(0, 3, (total,), generator=generator)
    return list(zip(x.split(sizes), y.split(sizes), strict=True))


NETWORKS = [Residual, Perceptron, Grouped, Attention]
