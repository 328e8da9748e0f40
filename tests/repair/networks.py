"""Small odd networks, and ways to look into them that know nothing of graphs."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn
from torch.nn import functional as F


def seen(model: nn.Module, name: str, *inputs: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """What the module `name` takes in and gives when `model` runs, by a hook. Copies: later ops may write into them."""
    found = []

    def look(module, args, output):
        found.append((args[0].detach().clone(), output.detach().clone()))

    hook = model.get_submodule(name).register_forward_hook(look)
    with torch.no_grad():
        model(*(x.clone() for x in inputs))
    hook.remove()
    return found[0]


def lively(model: nn.Module, seed: int = 0) -> nn.Module:
    """In eval mode, with norms and biases that are not those of a fresh module."""
    random = torch.Generator().manual_seed(seed)
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            n = module.num_features
            with torch.no_grad():
                module.running_mean.copy_(torch.randn(n, generator=random) * 0.3)
                module.running_var.copy_(torch.rand(n, generator=random) + 0.5)
                module.weight.copy_(torch.rand(n, generator=random) + 0.5)
                module.bias.copy_(torch.randn(n, generator=random) * 0.3)
    return model.eval()


class Sequenced(nn.Module):
    """Layers by name, and what forward does with them."""

    def __init__(self, does: Callable, **layers: nn.Module):
        super().__init__()
        self.does = does
        for name, layer in layers.items():
            setattr(self, name, layer)

    def forward(self, x):
        return self.does(self, x)


def linear(n: int, m: int) -> nn.Linear:
    return nn.Linear(n, m)


def _relu_in_place(m, x):
    y = m.a(x)
    z = m.b(F.relu_(y))
    return m.c(z + y)  # y is what relu_ left there


def _add_in_place(m, x):
    y = m.a(x)
    keep = y * 2
    z = m.b(y)
    y += z
    y.mul_(0.5)
    return m.c(keep - y)


def _older_value(m, x):
    """The sum reads y before it is written into, though nothing forces it to be computed before."""
    y = m.a(x)
    before = m.b(y)
    y.add_(1.0)
    return m.c(y) + m.c(before)


def _chunks(m, x):
    a, b = m.a(x).chunk(2, 1)
    return m.c(torch.cat([b * 2, m.d(a).relu()], 1))


def _views(m, x):
    y = m.a(x).view(len(x), 2, 4).transpose(1, 2)
    y = y.reshape(len(x), 8).unsqueeze(1).squeeze(1)
    return m.c(F.dropout(y, 0.5, m.training))


def _attention(m, x):
    q, k, v = (layer(x).unflatten(-1, (2, 4)).transpose(1, 2) for layer in (m.q, m.k, m.v))
    y = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
    x = x + m.o(y)
    return x + m.d(F.gelu(m.u(m.n(x))))


def _recurrent(m, x):
    y, (h, _) = m.r(x)
    return m.c(y[:, -1] + h[0])


def _shortcut(m, x):
    x = m.a(x).relu()
    y = m.b2(m.b(x))
    return F.relu(y + F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, 2, 2))).mean((2, 3))


def _gated(m, x):
    return m.c(F.silu(m.a(x)) * m.b(x))


ZOO: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "relu in place": (lambda: Sequenced(_relu_in_place, a=linear(6, 8), b=linear(8, 8), c=linear(8, 3)), (6,)),
    "add in place": (lambda: Sequenced(_add_in_place, a=linear(6, 8), b=linear(8, 8), c=linear(8, 3)), (6,)),
    "older value": (lambda: Sequenced(_older_value, a=linear(6, 8), b=linear(8, 8), c=linear(8, 3)), (6,)),
    "input in place": (lambda: Sequenced(lambda m, x: m.a(x.add_(1.0)) + m.a(x), a=linear(6, 8)), (6,)),
    "chunk and cat": (lambda: Sequenced(_chunks, a=linear(6, 8), d=linear(4, 5), c=linear(9, 3)), (6,)),
    "views": (lambda: Sequenced(_views, a=linear(6, 8), c=linear(8, 3)), (6,)),
    "reused": (lambda: Sequenced(lambda m, x: m.a(m.a(x).relu()).relu() + m.a(x), a=linear(6, 6)), (6,)),
    "attention": (
        lambda: Sequenced(
            _attention, q=linear(6, 8), k=linear(6, 8), v=linear(6, 8), o=linear(8, 6), n=nn.LayerNorm(6), u=linear(6, 10), d=linear(10, 6)
        ),
        (5, 6),
    ),
    "lstm": (lambda: Sequenced(_recurrent, r=nn.LSTM(6, 7, batch_first=True), c=linear(7, 3)), (4, 6)),
    "shortcut": (
        lambda: Sequenced(_shortcut, a=nn.Conv2d(3, 4, 3, padding=1), b=nn.Conv2d(4, 8, 3, 2, 1, bias=False), b2=nn.BatchNorm2d(8)),
        (3, 6, 6),
    ),
    "group norm": (
        lambda: nn.Sequential(nn.Conv2d(3, 8, 3), nn.GroupNorm(2, 8), nn.ReLU(inplace=True), nn.Conv2d(8, 4, 1), nn.Flatten(), nn.Linear(64, 3)),
        (3, 6, 6),
    ),
    "gated": (lambda: Sequenced(_gated, a=linear(6, 9), b=linear(6, 9), c=linear(9, 3)), (6,)),
}


def made(name: str, seed: int = 0) -> tuple[nn.Module, tuple[int, ...]]:
    """A network of the zoo in eval mode, and the shape of one of its samples."""
    build, shape = ZOO[name]
    torch.manual_seed(seed)
    return lively(build(), seed), shape
