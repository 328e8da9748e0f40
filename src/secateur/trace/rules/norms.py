"""Normalisation. Whatever is normalised over may still be cut: the cut model normalises over the kept positions."""

from __future__ import annotations

from secateur.axes import factor, resolve, unify
from secateur.trace.call import Call, Value


def _per_channel(c: Call, dim, names: tuple[str, ...]) -> None:
    for name in names:
        other = c.dims(name)
        if other:
            unify(dim, other[0])


def batch_norm(t, c: Call) -> Value:
    x = c.dims("input")
    _per_channel(c, x[1 if len(x) > 1 else 0], ("weight", "bias", "running_mean", "running_var"))
    value = c.node.meta["val"]
    if isinstance(value, (tuple, list)):
        return [x, (resolve(x[1]),), (resolve(x[1]),), *([()] * (len(value) - 3))][: len(value)]
    return x


def instance_norm(t, c: Call) -> Value:
    x = c.dims("input")
    _per_channel(c, x[1], ("weight", "bias", "running_mean", "running_var"))
    t.freeze(x[2:], c.reason("positions in space"))
    return x


def layer_norm(t, c: Call) -> Value:
    x = c.dims("input")
    n = len(c["normalized_shape"])
    for name in ("weight", "bias"):
        other = c.dims(name)
        if other:
            for a, b in zip(x[-n:], other, strict=True):
                unify(a, b)
    value = c.node.meta["val"]
    if isinstance(value, (tuple, list)):
        return [x, *c.constants("statistics")[1:]]
    return x


def group_norm(t, c: Call) -> Value:
    """Whole groups may go, and the same channels of every group."""
    x = c.dims("input")
    factor(x[1], x[1].size // c["num_groups"])
    _per_channel(c, x[1], ("weight", "bias"))
    t.freeze(x[2:], c.reason("positions in space"))
    return x


def weight_norm(t, c: Call) -> Value:
    """`v · g / ||v||`, the norm taken over every dimension but `dim`; g has size 1 elsewhere."""
    v, g = c.dims("v"), c.dims("g")
    for a, b in zip(v, g, strict=True):
        if a.size == b.size:
            unify(a, b)
    return v


def local_response_norm(t, c: Call) -> Value:
    return t.opaque(c, "neighbouring channels are mixed")


RULES = {
    **dict.fromkeys(("batch_norm", "native_batch_norm", "_native_batch_norm_legit_no_training"), batch_norm),
    "instance_norm": instance_norm,
    "layer_norm": layer_norm,
    "rms_norm": layer_norm,
    "group_norm": group_norm,
    "_weight_norm": weight_norm,
    "local_response_norm": local_response_norm,
}
