"""Joining and choosing positions: cat, stack, split, slice, index, embedding, embedding_bag, gather, scatter."""

from __future__ import annotations

import numpy as np

from secateur.axes import ONE, Dim, Perm, add, constant, factor, resolve, split, unify
from secateur.trace.call import Call, Dims, Value


def _unify_all(shapes: list[Dims], skip: int | None) -> Dims:
    first = list(shapes[0])
    for dims in shapes[1:]:
        for i, (a, b) in enumerate(zip(first, dims, strict=True)):
            if i != skip:
                unify(a, b)
    return tuple(resolve(d) for d in first)


def cat(t, c: Call) -> Value:
    shapes = [d for d in c.dims_list("tensors") if len(d) == len(c.shape)]  # cat ignores empty 1-d tensors
    dim = (c["dim"] if c["dim"] is not None else c["axis"] or 0) % len(c.shape)
    out = list(_unify_all(shapes, dim))
    out[dim] = add([resolve(d[dim]) for d in shapes])
    return tuple(out)


def stack(t, c: Call) -> Value:
    shapes = c.dims_list("tensors")
    dim = c["dim"] % len(c.shape)
    out = list(_unify_all(shapes, None))
    out.insert(dim, constant(len(shapes), c.reason("stacked tensors")))
    return tuple(out)


def _pieces(c: Call, sizes: list[int], dim: int) -> Value:
    x = c.dims("self")
    rest: Dim = x[dim]
    pieces = []
    for n in sizes:
        piece, rest = split(rest, n)
        pieces.append(piece)
    return [tuple(resolve(p) if i == dim else d for i, d in enumerate(x)) for p in pieces]


def split_sizes(t, c: Call) -> Value:
    """`split`, `split_with_sizes`, `chunk`, `tensor_split`: the sizes are read off the outputs."""
    dim = c["dim"] % len(c.dims("self"))
    return _pieces(c, [v.shape[dim] for v in c.node.meta["val"]], dim)


def glu(t, c: Call) -> Value:
    x, dim = c.dims("self"), c["dim"]
    dim %= len(x)
    a, b = (p[dim] for p in _pieces(c, [x[dim].size // 2] * 2, dim))
    unify(a, b)
    return tuple(resolve(a) if i == dim else d for i, d in enumerate(x))


def slice_(t, c: Call) -> Value:
    x = list(c.dims("self"))
    d, step = c["dim"] % len(x), c["step"] or 1
    n = x[d].size
    start = c["start"] if isinstance(c["start"], int) else 0
    end = c["end"] if isinstance(c["end"], int) else n
    start, end = (max(0, min(n, v + n if v < 0 else v)) for v in (start, end))
    if step == 1:
        _, tail = split(x[d], start)
        x[d] = resolve(split(tail, max(0, end - start))[0])
    elif n % step == 0 and start < step and end > n - step + start:
        outer, inner = factor(x[d], step)
        t.freeze((inner,), c.reason("every n-th position is taken"))
        x[d] = resolve(outer)
    else:
        t.freeze((x[d],), c.reason("every n-th position is taken"))
        x[d] = constant(c.shape[d], c.reason("every n-th position is taken"))
    return tuple(x)


def narrow(t, c: Call) -> Value:
    x, d = list(c.dims("self")), c["dim"] % len(c.dims("self"))
    if not isinstance(c["start"], int):
        return t.opaque(c, "a slice that depends on the data")
    _, tail = split(x[d], c["start"] % x[d].size)
    x[d] = resolve(split(tail, c["length"])[0])
    return tuple(x)


def select(t, c: Call) -> Value:
    x, d = c.dims("self"), c["dim"] % len(c.dims("self"))
    t.freeze((x[d],), c.reason("one position is taken"))
    return (*x[:d], *x[d + 1 :])


def unbind(t, c: Call) -> Value:
    x, d = c.dims("self"), c["dim"] % len(c.dims("self"))
    t.freeze((x[d],), c.reason("every position is taken on its own"))
    return [(*x[:d], *x[d + 1 :])] * x[d].size


def _gathered(t, c: Call, dim: Dim, source) -> Dim:
    """A whole dimension seen through constant positions; anything but a permutation freezes it."""
    order = t.known(source)
    if order is not None and order.ndim == 1 and len(order) == dim.size and dim.size > 1:
        order = np.where(order < 0, order + dim.size, order)
        if np.array_equal(np.sort(order), np.arange(dim.size)):
            out = resolve(Perm(dim, order))
            if source.op == "placeholder":  # the index loses the entries of the positions that go
                unify(c.env[source][0], out)
            return resolve(out)
    t.freeze((dim,), c.reason("positions are chosen by index"))
    return constant(0, "")


def index(t, c: Call) -> Value:
    x = c.dims("self")
    used = [(d, n) for d, n in enumerate(c["indices"]) if n is not None]
    if len(used) == 1 and len(c.env[used[0][1]]) == 1:
        d, node = used[0]
        found = _gathered(t, c, x[d], node)
        size = c.shape[d]
        return (*x[:d], found if found.size == size else constant(size, c.reason("positions are chosen by index")), *x[d + 1 :])
    rank = max((len(c.env[n]) for _, n in used), default=0)
    dims = [d for d, _ in used]
    t.freeze([x[d] for d in dims], c.reason("positions are chosen by index"))
    if any(n.meta["val"].dtype.__str__() in ("torch.bool", "torch.uint8") for _, n in used):
        return t.opaque(c, "positions are chosen by the data")
    front = dims[0] if dims == list(range(dims[0], dims[0] + len(dims))) else 0
    rest = [d for i, d in enumerate(x) if i not in dims]
    chosen = [constant(s, c.reason("positions are chosen by index")) for s in c.shape[front : front + rank]]
    return (*rest[:front], *chosen, *rest[front:])


def index_select(t, c: Call) -> Value:
    x, d = c.dims("self"), c["dim"] % len(c.dims("self"))
    found = _gathered(t, c, x[d], c["index"])
    size = c.shape[d]
    return (*x[:d], found if found.size == size else constant(size, c.reason("positions are chosen by index")), *x[d + 1 :])


def embedding(t, c: Call) -> Value:
    w = c.dims("weight")
    t.freeze(w[:1], c.reason("the vocabulary"))
    return (*c.dims("indices"), w[1])


def embedding_bag(t, c: Call) -> Value:
    """Sums, means or maxima of rows of the table; what else it gives (positions, counts) has no dimension of the table, but with `max`."""
    w, (bags, *others) = c.dims("weight"), c.constants("bags are formed by the data")
    t.freeze(w[:1], c.reason("the vocabulary"))
    return [(bags[0], w[1]), *((o[0], w[1]) if len(o) == 2 else o for o in others)]


def gather(t, c: Call) -> Value:
    """Positions along `dim` are chosen by data; elsewhere input and index walk together."""
    x, index_dims, d = c.dims("self"), c.dims("index"), c["dim"]
    if not x:
        return x
    d %= len(x)
    t.freeze((x[d],), c.reason("positions are chosen by index"))
    out: list[Dim] = []
    for i, (a, b) in enumerate(zip(x, index_dims, strict=True)):
        if i != d and a.size == b.size:
            unify(a, b)
        elif i != d:
            t.freeze((a, b), c.reason("a part of the positions is gathered"))
        out.append(resolve(b))
    return tuple(out)


def index_add(t, c: Call) -> Value:
    """`index_add`, `index_copy`: rows of `source` go where the index says; the other dimensions are shared."""
    x, s, d = c.dims("self"), c.dims("source"), c["dim"] % len(c.dims("self"))
    t.freeze((x[d], s[d]), c.reason("rows are dealt by index"))
    for i, (a, b) in enumerate(zip(x, s, strict=True)):
        if i != d:
            unify(a, b)
    return x


def index_put(t, c: Call) -> Value:
    """Indexed dimensions stay whole; trailing ones are shared with the values where they line up."""
    x, v = c.dims("self"), c.dims("values")
    used = [d for d, n in enumerate(c["indices"]) if n is not None]
    lead = max(used) + 1
    if used != list(range(lead)) or any(len(c.env[c["indices"][d]]) > 1 for d in used):
        return t.opaque(c, "values are put at positions chosen by index")
    t.freeze(x[:lead], c.reason("rows are put by index"))
    tail = x[lead:]
    for i in range(1, len(tail) + 1):
        if i <= len(v) and v[-i].size == tail[-i].size:
            unify(tail[-i], v[-i])
    t.freeze(v[: max(0, len(v) - len(tail))], c.reason("rows are put by index"))
    return x


def copy_into(t, c: Call) -> Value:
    """`copy_`: the source broadcasts into the destination, which is a view of what was allocated."""
    x, s = c.dims("self"), c.dims("src")
    for i in range(1, len(s) + 1):
        if s[-i].size == x[-i].size:
            unify(x[-i], s[-i])
    return x


def scalar_like(t, c: Call) -> Value:
    return tuple(ONE for _ in c.shape)


RULES = {
    **dict.fromkeys(("cat", "concat", "concatenate"), cat),
    "stack": stack,
    **dict.fromkeys(
        ("split", "split_with_sizes", "chunk", "tensor_split", "unsafe_split", "unsafe_chunk", "unsafe_split_with_sizes"),
        split_sizes,
    ),
    "glu": glu,
    "slice": slice_,
    "narrow": narrow,
    "select": select,
    "unbind": unbind,
    "index": index,
    "index_select": index_select,
    "embedding": embedding,
    "embedding_bag": embedding_bag,
    "gather": gather,
    "index_add": index_add,
    "index_copy": index_add,
    "index_put": index_put,
    "copy": copy_into,
}
