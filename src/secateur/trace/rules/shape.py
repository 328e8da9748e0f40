"""Ops that only rearrange positions: reshape and its family, permutations, repeats, padding, shuffles."""

from __future__ import annotations

import numpy as np

from secateur.axes import ONE, Axis, Dim, Perm, add, constant, factor, is_frozen, resolve, split, times, unify
from secateur.trace.call import Call, Dims, Value


def regroup(t, c: Call, dims: Dims, shape: list[int]) -> Dims:
    """Dimensions after a reshape to `shape`: the smallest runs of equal product on both sides are matched, each run
    multiplied out and its new sizes factored off from the inside."""
    out: list[Dim] = []
    i = j = 0
    while i < len(dims) or j < len(shape):
        run, sizes = list(dims[i : i + 1]), list(shape[j : j + 1])
        i, j = i + 1, j + 1
        if run and sizes and run[0].size == sizes[0]:
            out.append(resolve(run[0]))
            continue
        a = int(np.prod([d.size for d in run], dtype=np.int64))
        b = int(np.prod(sizes, dtype=np.int64))
        while a != b:
            if (a < b and i < len(dims)) or j >= len(shape):
                run.append(dims[i])
                a *= dims[i].size
                i += 1
            else:
                sizes.append(shape[j])
                b *= shape[j]
                j += 1
        out.extend(_refactor(t, c, run, sizes))
    return tuple(out)


def _refactor(t, c: Call, run: list[Dim], sizes: list[int]) -> list[Dim]:
    whole = times([resolve(d) for d in run])
    if whole.size == 0 or any(s == 0 for s in sizes):
        t.freeze(run, c.reason("an empty tensor is reshaped"))
        return [constant(s, c.reason("an empty tensor is reshaped")) for s in sizes]
    pieces: list[Dim] = []
    for n in reversed(sizes[1:]):
        whole, inner = factor(whole, n)
        pieces.insert(0, inner)
    pieces = [whole, *pieces] if sizes else []
    return [resolve(p) for p in pieces]


def reshape(t, c: Call) -> Value:
    if c["dtype"] is not None:  # `view(dtype)` reads the same bytes as other numbers
        return t.opaque(c, "bytes are read as another type")
    return regroup(t, c, c.dims("self"), c.shape)


def permute(t, c: Call) -> Value:
    x = c.dims("self")
    return tuple(x[d] for d in c["dims"])


def transpose(t, c: Call) -> Value:
    x = list(c.dims("self"))
    a, b = (c["dim0"], c["dim1"]) if "dim0" in c.args else (c["axis0"], c["axis1"])
    x[a], x[b] = x[b], x[a]
    return tuple(x)


def movedim(t, c: Call) -> Value:
    x = c.dims("self")
    src, dst = ([v] if isinstance(v, int) else list(v) for v in (c["source"], c["destination"]))
    src, dst = [s % len(x) for s in src], [d % len(x) for d in dst]
    order: list[int | None] = [None] * len(x)
    for s, d in zip(src, dst, strict=True):
        order[d] = s
    rest = iter(i for i in range(len(x)) if i not in src)
    return tuple(x[next(rest) if o is None else o] for o in order)


def reverse_all(t, c: Call) -> Value:
    return tuple(reversed(c.dims("self")))


def swap_last(t, c: Call) -> Value:
    *lead, a, b = c.dims("self")
    return (*lead, b, a)


def expand(t, c: Call) -> Value:
    """A dimension of size 1 that is stretched is a new axis: it follows whatever it is combined with."""
    x, shape = c.dims("self"), c.shape
    out: list[Dim] = []
    for i, size in enumerate(reversed(shape)):
        own = x[-1 - i] if i < len(x) else ONE
        out.insert(0, own if own.size == size else Axis(size))
    return tuple(out)


def repeat(t, c: Call) -> Value:
    """Copies laid one after the other: new axis x old axis."""
    x = c.dims("self")
    times_each = list(c["repeats"] if "repeats" in c.args else c["dims"])
    x = (ONE,) * (len(times_each) - len(x)) + tuple(x)
    times_each = [1] * (len(x) - len(times_each)) + times_each
    return tuple(times([Axis(r), resolve(d)]) if r > 1 else d for r, d in zip(times_each, x, strict=True))


def repeat_interleave(t, c: Call) -> Value:
    """Every unit several times in a row: old axis x new axis."""
    x = c.dims("self")
    if not isinstance(c["repeats"], int) or c["dim"] is None:
        return t.opaque(c, "repeats that depend on the data")
    dim = c["dim"] % len(x)
    return tuple(times([resolve(d), Axis(c["repeats"])]) if i == dim and c["repeats"] > 1 else d for i, d in enumerate(x))


def flip(t, c: Call) -> Value:
    x = list(c.dims("self"))
    for d in c["dims"]:
        if x[d].size > 1:
            x[d] = resolve(Perm(x[d], np.arange(x[d].size)[::-1].copy()))
    return tuple(x)


def roll(t, c: Call) -> Value:
    x = list(c.dims("self"))
    if not c["dims"]:
        t.freeze(x, c.reason("a flattened tensor is rolled"))
        return c.constants("a flattened tensor is rolled")
    if len({d % len(x) for d in c["dims"]}) != len(c["dims"]):
        return t.opaque(c, "one dimension is rolled twice")
    for shift, d in zip(c["shifts"], c["dims"], strict=True):
        shift %= max(1, x[d].size)
        if shift:
            first, last = split(x[d], x[d].size - shift)
            x[d] = add([resolve(last), resolve(first)])
    return tuple(x)


def pad(t, c: Call) -> Value:
    """Constant padding adds new axes at both ends, which follow what the result is combined with."""
    x = list(c.dims("self"))
    amounts = c["pad"]
    constant_fill = c["mode"] in (None, "constant")
    for i in range(len(amounts) // 2):
        d, (low, high) = len(x) - 1 - i, amounts[2 * i : 2 * i + 2]
        if low == high == 0:
            continue
        if not constant_fill:
            t.freeze([x[d]], c.reason("padding copies positions"))
            x[d] = constant(c.shape[d], c.reason("padding copies positions"))
            continue
        middle = x[d]
        if low < 0:
            middle = split(middle, -low)[1]
        if high < 0:
            middle = split(middle, middle.size + high)[0]
        ends = [Axis(n) if n > 1 else constant(max(n, 0), "padding") for n in (low, high)]
        if is_frozen(middle):
            ends = [constant(max(n, 0), c.reason("padding of whole positions")) for n in (low, high)]
        x[d] = add([e for e in (ends[0], resolve(middle), ends[1]) if e.size])
    return tuple(x)


def pixel_shuffle(t, c: Call) -> Value:
    """(.., C·r·r, H, W) -> (.., C, H·r, W·r)."""
    x, r = c.dims("self"), c["upscale_factor"]
    channels, inner = factor(x[-3], r * r)
    t.freeze((inner, x[-2], x[-1]), c.reason("positions in space"))
    space = tuple(constant(s, c.reason("positions in space")) for s in c.shape[-2:])
    return (*x[:-3], resolve(channels), *space)


def pixel_unshuffle(t, c: Call) -> Value:
    x, r = c.dims("self"), c["downscale_factor"]
    t.freeze(x[-2:], c.reason("positions in space"))
    space = tuple(constant(s, c.reason("positions in space")) for s in c.shape[-2:])
    return (*x[:-3], times([resolve(x[-3]), constant(r * r, c.reason("positions in space"))]), *space)


def channel_shuffle(t, c: Call) -> Value:
    x = c.dims("self")
    groups, each = factor(x[1], x[1].size // c["groups"])
    return (x[0], times([resolve(each), resolve(groups)]), *x[2:])


def unfold(t, c: Call) -> Value:
    """`Tensor.unfold`: windows of one dimension become a new last one."""
    x, d = c.dims("self"), c["dimension"]
    d %= len(x)
    t.freeze((x[d],), c.reason("windows of positions"))
    windows = constant(c.shape[d], c.reason("windows of positions"))
    return (*x[:d], windows, *x[d + 1 :], constant(c["size"], c.reason("windows of positions")))


def diff(t, c: Call) -> Value:
    x, dim = c.dims("self"), c["dim"]
    if c.dims("prepend") is not None or c.dims("append") is not None:
        return t.opaque(c, "differences with something put in front or behind")
    t.freeze((x[dim],), c.reason("neighbours are subtracted"))
    return tuple(constant(c.shape[i], c.reason("neighbours are subtracted")) if i == dim % len(x) else d for i, d in enumerate(x))


def pair(t, c: Call) -> Value:
    """`view_as_real`, `view_as_complex`: a last dimension of size 2 comes or goes."""
    x = c.dims("self")
    if len(c.shape) > len(x):
        return (*x, constant(2, c.reason("real and imaginary part")))
    t.freeze(x[-1:], c.reason("real and imaginary part"))
    return x[:-1]


def reshape_like(t, c: Call) -> Value:
    """`reshape_as`, `view_as`: the result has the axes of the reshaped tensor and the sizes of the other one."""
    out = regroup(t, c, c.dims("self"), c.shape)
    for a, b in zip(out, c.dims("other"), strict=True):
        unify(a, b)
    return tuple(resolve(d) for d in out)


def expand_as(t, c: Call) -> Value:
    out = expand(t, c)
    for a, b in zip(out, c.dims("other"), strict=True):
        unify(a, b)
    return out


RULES = {
    **dict.fromkeys(
        ("view", "reshape", "_unsafe_view", "flatten", "unflatten", "unsqueeze", "squeeze", "ravel", "_reshape_alias"), reshape
    ),
    "reshape_as": reshape_like,
    "view_as": reshape_like,
    "permute": permute,
    **dict.fromkeys(("transpose", "swapaxes", "swapdims"), transpose),
    "movedim": movedim,
    "moveaxis": movedim,
    **dict.fromkeys(("t", "numpy_T"), reverse_all),
    **dict.fromkeys(("mT", "mH", "adjoint"), swap_last),
    "expand": expand,
    "broadcast_to": expand,
    "expand_as": expand_as,
    "repeat": repeat,
    "tile": repeat,
    "repeat_interleave": repeat_interleave,
    "flip": flip,
    "roll": roll,
    "pad": pad,
    "constant_pad_nd": pad,
    "pixel_shuffle": pixel_shuffle,
    "pixel_unshuffle": pixel_unshuffle,
    "channel_shuffle": channel_shuffle,
    "native_channel_shuffle": channel_shuffle,
    "unfold": unfold,
    "diff": diff,
    "view_as_real": pair,
    "view_as_complex": pair,
}
