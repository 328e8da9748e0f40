"""What a layer should give: the dense network's value at the next addition, minus what the pruned network's other branch
already delivers there; or simply the dense network's own value where no addition follows.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from torch import Tensor, fx

from secateur.repair.layers import Layer
from secateur.trace.call import bind, op_name, shape_of

_SAME = frozenset("dropout feature_dropout alpha_dropout clone contiguous alias detach lift_fresh_copy native_dropout".split())
_SHAPE = frozenset("view reshape _unsafe_view flatten unflatten unsqueeze squeeze".split())


@dataclass
class Target:
    """`join` is the addition and `other` its other operand; both None where the layer's own end is the target."""

    join: fx.Node | None = None
    other: fx.Node | None = None
    back: list[Callable[[Tensor], Tensor]] = field(default_factory=list)

    def pull(self, value: Tensor) -> Tensor:
        """A value at the addition in the shape of the layer's end."""
        for step in self.back:
            value = step(value)
        return value


def find_target(layer: Layer) -> Target:
    """Follow the layer's end through ops that only move values, up to an addition."""
    node, back = layer.end, list[Callable[[Tensor], Tensor]]()
    while len(node.users) == 1:
        (user,) = node.users
        op = op_name(user) if user.op == "call_function" else ""
        if op == "add" and isinstance(other := _other(user, node), fx.Node):
            return Target(user, other, back[::-1]) if _alike(user, node, other) else Target()
        step = _back(user, node, op)
        if step is None:
            return Target()
        back.append(step)
        node = user
    return Target()


def _other(join: fx.Node, node: fx.Node) -> object:
    if join.kwargs.get("alpha", 1) != 1 or len(join.args) > 2:
        return None
    a, b = join.args[:2]
    return None if a is b else b if a is node else a


def _alike(*nodes: fx.Node) -> bool:
    shapes = [shape_of(n.meta["val"]) for n in nodes]
    return all(s == shapes[0] for s in shapes)


def _back(user: fx.Node, node: fx.Node, op: str) -> Callable[[Tensor], Tensor] | None:
    """How to undo one op on the way, None where it cannot be undone."""
    shape = shape_of(node.meta["val"])
    if op in _SAME:
        return (lambda t: t) if isinstance(user.meta["val"], type(node.meta["val"])) else None
    if op in _SHAPE:
        return lambda t: t.reshape(shape)
    if op == "permute":
        dims = [d % len(shape) for d in bind(user)["dims"]]
        inverse = [dims.index(i) for i in range(len(dims))]
        return lambda t: t.permute(inverse)
    if op == "transpose":
        args = bind(user)
        return lambda t: t.transpose(args["dim0"], args["dim1"])
    return None
