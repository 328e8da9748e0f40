"""Reductions and softmax. Sums, means, variances and 2-norms over a cut axis run over the kept positions; ops whose
result would change its meaning (max, sort, cumulative sums ...) freeze the axis they run over."""

from __future__ import annotations

from secateur.axes import ONE, Dim, constant
from secateur.trace.call import Call, Dims, Value


def reduced_dims(c: Call, rank: int) -> list[int]:
    """The dimensions a reduction runs over; all of them where none is named."""
    dim = c["dim"]
    if dim is None or dim == []:
        return list(range(rank))
    return [d % rank for d in (dim if isinstance(dim, (list, tuple)) else [dim])] if rank else []


def _without(dims: Dims, gone: list[int], keepdim: bool) -> Dims:
    if keepdim:
        return tuple(ONE if i in gone else d for i, d in enumerate(dims))
    return tuple(d for i, d in enumerate(dims) if i not in gone)


def over_kept(t, c: Call) -> Value:
    x = c.dims("self")
    out = _without(x, reduced_dims(c, len(x)), bool(c["keepdim"]))
    value = c.node.meta["val"]
    return [out for _ in value] if isinstance(value, (tuple, list)) else out


def vector_norm(t, c: Call) -> Value:
    """A unit of zeros changes no norm of order 0 or more; of negative order it would be the smallest."""
    order = c["ord"] if "ord" in c.args else c["p"]
    return over_kept(t, c) if order is None or order >= 0 else whole(t, c)


def whole(t, c: Call) -> Value:
    """The axis reduced over must stay whole."""
    x = c.dims("self")
    gone = reduced_dims(c, len(x))
    t.freeze([x[i] for i in gone], c.reason("its result depends on every unit"))
    out = _without(x, gone, bool(c["keepdim"]))
    value = c.node.meta["val"]
    return [out for _ in value] if isinstance(value, (tuple, list)) else out


def along(t, c: Call) -> Value:
    """Cumulative ops and sorts: same shape, the axis stays whole."""
    x = c.dims("self")
    dim = c["dim"] if c["dim"] is not None else -1
    t.freeze([x[dim]] if x else [], c.reason("its result depends on the order of all units"))
    value = c.node.meta["val"]
    return [x for _ in value] if isinstance(value, (tuple, list)) else x


def topk(t, c: Call) -> Value:
    x = c.dims("self")
    dim = (c["dim"] if c["dim"] is not None else -1) % len(x)
    t.freeze([x[dim]], c.reason("the largest are chosen among all units"))
    kept: Dim = constant(c["k"], c.reason("the largest are chosen by the data"))
    out = tuple(kept if i == dim else d for i, d in enumerate(x))
    return [out, out]


def softmax(t, c: Call) -> Value:
    return c.dims("self")


def either(t, c: Call) -> Value:
    """`max(x)` and `max(x, dim)` reduce, `max(x, y)` is pointwise."""
    from secateur.trace.rules.pointwise import pointwise

    return pointwise(t, c) if c.dims("other") is not None else whole(t, c)


RULES = {
    **dict.fromkeys(("mean", "sum", "var", "std", "var_mean", "std_mean"), over_kept),
    **dict.fromkeys(("linalg_vector_norm", "norm"), vector_norm),
    **dict.fromkeys(
        ("amax", "amin", "argmax", "argmin", "any", "all", "prod", "logsumexp", "median", "mode", "nanmean", "nansum"), whole
    ),
    **dict.fromkeys(("max", "min"), either),
    **dict.fromkeys(("cumsum", "cumprod", "sort", "argsort", "cummax", "cummin", "logcumsumexp"), along),
    "topk": topk,
    "softmax": softmax,
    "_softmax": softmax,
    "log_softmax": along,
    "_log_softmax": along,
}
