"""Inputs and outputs of every nesting, keywords, custom autograd functions, operators nobody knows."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .harness import Case, U
from .masks import on

LIBRARY = torch.library.Library("structures", "FRAGMENT")
LIBRARY.define("odd(Tensor x) -> Tensor")


def odd(x: Tensor) -> Tensor:
    """An operator with no rule: every place reads its left neighbour."""
    return x * torch.roll(x, 1, -1)


LIBRARY.impl("odd", odd, "CompositeExplicitAutograd")
LIBRARY.impl("odd", torch.empty_like, "Meta")
torch.library.register_autograd(
    "structures::odd",
    lambda ctx, g: g * torch.roll(ctx.saved_tensors[0], 1, -1) + torch.roll(g * ctx.saved_tensors[0], -1, -1),
    setup_context=lambda ctx, inputs, output: ctx.save_for_backward(inputs[0]),
    lib=LIBRARY,
)


class UnknownOperator(Case):
    """Its input and output axes are frozen with the operator's name; everything around it is still free."""

    units = {"a": U("f1.weight", 0, 8), "c": U("f3.weight", 0, 6)}
    fixed = (("f2.weight", 0), ("f3.weight", 1))
    unknown = "odd"

    def __init__(self):
        super().__init__()
        self.f1, self.f2, self.f3, self.head = nn.Linear(6, 8), nn.Linear(8, 7), nn.Linear(7, 6), nn.Linear(6, 3)

    def forward(self, x):
        x = torch.ops.structures.odd(self.f2(self.f1(x).relu()))
        return self.head(self.f3(x).relu())

    def reference(self, keep, x):
        x = self.f2(on(self.f1(x).relu(), keep["a"]))
        x = x * torch.cat([x[:, -1:], x[:, :-1]], 1)
        return self.head(on(self.f3(x).relu(), keep["c"]))


class Doubling(torch.autograd.Function):
    """Element-wise forward, honest gradient."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x * x.sigmoid()

    @staticmethod
    def backward(ctx, g):
        (x,) = ctx.saved_tensors
        s = x.sigmoid()
        return g * (s + x * s * (1 - s))


class AutogradFunction(Case):
    """A custom element-wise Function: exact, or frozen with a reason."""

    units = {"a": U("f1.weight", 0, 8, must=False)}

    def __init__(self):
        super().__init__()
        self.f1, self.f2 = nn.Linear(6, 8), nn.Linear(8, 3)

    def forward(self, x):
        return self.f2(Doubling.apply(self.f1(x)))

    def reference(self, keep, x):
        x = self.f1(x)
        return self.f2(on(x * x.sigmoid(), keep["a"]))


class Reversing(torch.autograd.Function):
    """Not element-wise at all: a mirror, which name-walking tracers take for an activation."""

    @staticmethod
    def forward(ctx, x):
        return x.flip(-1).clone()

    @staticmethod
    def backward(ctx, g):
        return g.flip(-1)


class AutogradMirror(Case):
    units = {"a": U("f1.weight", 0, 8, must=False)}

    def __init__(self):
        super().__init__()
        self.f1, self.f2 = nn.Linear(6, 8), nn.Linear(8, 3)

    def forward(self, x):
        return self.f2(Reversing.apply(self.f1(x).relu()))

    def reference(self, keep, x):
        return self.f2(on(self.f1(x).relu(), keep["a"]).flip(-1))


class NestedOutputs(Case):
    """Lists, tuples and dicts come out; the intermediate map among them may not lose a channel."""

    units = {"a": U("c1.weight", 0, 6), "c": U("c3.weight", 0, 5)}
    fixed = (("c2.weight", 0),)
    shapes = ((2, 3, 4, 4),)

    def __init__(self):
        super().__init__()
        self.c1, self.c2, self.c3 = nn.Conv2d(3, 6, 1), nn.Conv2d(6, 7, 1), nn.Conv2d(7, 5, 1)
        self.head = nn.Conv2d(5, 2, 1)

    def forward(self, x):
        x = self.c2(self.c1(x).relu())
        y = self.c3(x.relu()).relu()
        return {"feature": x, "list": [self.head(y), (y.mean((1, 2, 3)) * 0, None)]}

    def reference(self, keep, x):
        x = self.c2(on(self.c1(x).relu(), keep["a"], 1))
        y = on(self.c3(x.relu()).relu(), keep["c"], 1)
        return [x, self.head(y), torch.zeros(2)]


class Keywords(Case):
    """Keyword inputs, one of them nested, one of them no tensor."""

    units = {"a": U("f1.weight", 0, 8), "a2": U("f2.weight", 0, 8)}

    def __init__(self):
        super().__init__()
        self.f1, self.f2, self.head = nn.Linear(6, 8), nn.Linear(4, 8), nn.Linear(8, 3)

    def example(self):
        (x,), _ = super().example()
        return (x,), {"extra": {"y": torch.ones(2, 4, dtype=torch.float64) * 0.3}, "power": 2, "mask": None}

    def forward(self, x, *, extra, power=1, mask=None):
        x = self.f1(x) * self.f2(extra["y"])
        if mask is not None:
            x = x * mask
        return self.head(x**power)

    def reference(self, keep, x, *, extra, power, mask):
        assert torch.equal(keep["a"], keep["a2"]) and mask is None
        return self.head(on((self.f1(x) * self.f2(extra["y"])) ** power, keep["a"]))


class TwoHeads(Case):
    """A tuple of two outputs, one input that is not used, a hidden state returned as it is."""

    units = {"a": U("f1.weight", 0, 8)}
    fixed = (("f2.weight", 0),)
    shapes = ((2, 6), (2, 4))

    def __init__(self):
        super().__init__()
        self.f1, self.f2, self.f3 = nn.Linear(6, 8), nn.Linear(8, 5), nn.Linear(5, 3)

    def forward(self, x, _unused):
        hidden = self.f2(self.f1(x).relu())
        return self.f3(hidden.tanh()), hidden

    def reference(self, keep, x, _unused):
        hidden = self.f2(on(self.f1(x).relu(), keep["a"]))
        return self.f3(hidden.tanh()), hidden


CASES = (UnknownOperator, AutogradFunction, AutogradMirror, NestedOutputs, Keywords, TwoHeads)
