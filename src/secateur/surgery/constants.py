"""Numbers written into the graph (`view` sizes, split sizes, groups, pads ...) after a cut.

Every such number is a count of positions of some dimension, so its new value is known. One small function per op
gives the changed arguments by schema name; an op that is not here has no such number.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch

from secateur.axes import Axis, Dim, count, factor, mask
from secateur.trace.call import Call, Dims

Keep = Mapping[Axis, np.ndarray]
Changes = dict[str, Any]


def new_shape(dims: Dims, keep: Keep) -> list[int]:
    return [count(d, keep) for d in dims]


def _before(dim: Dim, keep: Keep, position: int) -> int:
    """How many of the first `position` positions stay."""
    return int(np.count_nonzero(mask(dim, keep)[:position]))


def _sizes(name: str):
    def rule(c: Call, out: Any, keep: Keep) -> Changes:
        old, new = c[name], new_shape(out, keep)
        if old is None:  # `view(dtype)`
            return {}
        return {name: [v if v == -1 else n for v, n in zip(old, new, strict=True)]}

    return rule


def _unflatten(c: Call, out: Any, keep: Keep) -> Changes:
    dim, old = c["dim"] % len(c.dims("self")), c["sizes"]
    new = new_shape(out, keep)[dim : dim + len(old)]
    return {"sizes": [v if v == -1 else n for v, n in zip(old, new, strict=True)]}


def _split(c: Call, out: Any, keep: Keep) -> Changes:
    """Even pieces stay even where they are; otherwise the sizes are spelled out."""
    dim = c["dim"] % len(c.dims("self"))
    sizes = [count(piece[dim], keep) for piece in out]
    if c.op in ("split_with_sizes", "unsafe_split_with_sizes"):
        return {"split_sizes": sizes}
    total = sum(sizes)
    chunks = c["chunks"] if "chunks" in c.args else None
    if total and (chunks or isinstance(c["split_size"], int)):
        step = -(-total // chunks) if chunks else sizes[0]
        if step and [min(step, total - i) for i in range(0, total, step)] == sizes:
            return {} if chunks else {"split_size": step}
    return {"#op": torch.ops.aten.split_with_sizes.default, "#args": (sizes, dim)}


def _slice(c: Call, out: Any, keep: Keep) -> Changes:
    d = c["dim"] % len(c.dims("self"))
    x = c.dims("self")[d]
    changes: Changes = {}
    if (c["step"] or 1) > 1:
        if isinstance(c["end"], int) and 0 < c["end"] <= x.size:
            changes["end"] = count(x, keep)
        return changes
    for name in ("start", "end"):
        v = c[name]
        if isinstance(v, int) and -x.size < v < x.size:
            new = _before(x, keep, v % x.size) if v >= 0 else _before(x, keep, v + x.size) - count(x, keep)
            changes[name] = new if v >= 0 or new else count(x, keep)  # -0 would mean the start
        elif isinstance(v, int) and v == x.size:
            changes[name] = count(x, keep)
    return changes


def _narrow(c: Call, out: Any, keep: Keep) -> Changes:
    d = c["dim"] % len(c.dims("self"))
    return {"start": _before(c.dims("self")[d], keep, c["start"]), "length": count(out[d], keep)}


def _normalized(c: Call, out: Any, keep: Keep) -> Changes:
    return {"normalized_shape": new_shape(c.dims("input"), keep)[-len(c["normalized_shape"]) :]}


def _num_groups(name: str):
    def rule(c: Call, out: Any, keep: Keep) -> Changes:
        if c[name] == 1:
            return {}
        channels = c.dims("weight")[0] if name == "groups" and c.dims("weight") else (c.dims("input") or c.dims("self"))[1]
        groups, _ = factor(channels, channels.size // c[name])
        return {name: count(groups, keep)}

    return rule


def _pad(c: Call, out: Any, keep: Keep) -> Changes:
    x, amounts = c.dims("self"), list(c["pad"])
    for i in range(len(amounts) // 2):
        d, (low, high) = len(x) - 1 - i, amounts[2 * i : 2 * i + 2]
        inner, outer = x[d], out[d]
        if low:
            amounts[2 * i] = _before(outer, keep, low) if low > 0 else -_before(inner, keep, -low)
        if high:
            end = outer.size - high if high > 0 else inner.size + high
            dim = outer if high > 0 else inner
            amounts[2 * i + 1] = (count(dim, keep) - _before(dim, keep, end)) * (1 if high > 0 else -1)
    return {"pad": amounts}


def _roll(c: Call, out: Any, keep: Keep) -> Changes:
    x = c.dims("self")
    shifts = []
    for shift, d in zip(c["shifts"], c["dims"], strict=True):
        k = shift % max(1, x[d].size)
        moved = count(x[d], keep) - _before(x[d], keep, x[d].size - k)
        shifts.append(moved if k == shift or not k else moved - count(x[d], keep))
    return {"shifts": shifts}


def _repeat(name: str):
    def rule(c: Call, out: Any, keep: Keep) -> Changes:
        x, old = c.dims("self"), list(c[name])
        lead = len(out) - len(x)
        own = [1] * lead + new_shape(x, keep)
        new = [n // max(1, o) for n, o in zip(new_shape(out, keep), own, strict=True)]
        return {name: new[len(new) - len(old) :]}

    return rule


def _repeat_interleave(c: Call, out: Any, keep: Keep) -> Changes:
    d = c["dim"] % len(out)
    sized = {"output_size": count(out[d], keep)} if c["output_size"] is not None else {}
    return {"repeats": count(out[d], keep) // count(c.dims("self")[d], keep), **sized}


def _squeeze(c: Call, out: Any, keep: Keep) -> Changes:
    """A dimension that falls to one unit must not be squeezed away with those that were 1 before."""
    x = c.dims("self")
    if all(d.size == 1 or count(d, keep) > 1 for d in x):
        return {}
    named = [d % len(x) for d in ([c["dim"]] if isinstance(c["dim"], int) else c["dim"] or range(len(x)))]
    return {"#op": torch.ops.aten.squeeze.dims, "#args": ([d for d in named if x[d].size == 1],)}


def _gather(c: Call, out: Any, keep: Keep) -> Changes:
    """A constant permutation: the positions that stay, renumbered."""
    if c.op == "index":
        used = [(d, n) for d, n in enumerate(c["indices"]) if n is not None]
        if len(used) != 1 or len(c.env[used[0][1]]) != 1:
            return {}
        d = used[0][0]
    else:
        d = c["dim"] % len(c.dims("self"))
    x, y = c.dims("self")[d], out[d]
    if x.size != y.size or count(x, keep) == x.size:
        return {}
    return {"#index": (d, mask(x, keep), mask(y, keep))}


TABLE: dict[str, Callable[[Call, Any, Keep], Changes]] = {
    **dict.fromkeys(("view", "expand", "_unsafe_view", "broadcast_to"), _sizes("size")),
    **dict.fromkeys(("zeros", "ones", "full", "empty", "rand", "randn"), _sizes("size")),
    **dict.fromkeys(("new_zeros", "new_ones", "new_full", "new_empty"), _sizes("size")),
    "reshape": _sizes("shape"),
    "unflatten": _unflatten,
    **dict.fromkeys(("split", "split_with_sizes", "chunk", "tensor_split", "unsafe_split", "unsafe_chunk"), _split),
    "slice": _slice,
    "narrow": _narrow,
    **dict.fromkeys(("layer_norm", "rms_norm"), _normalized),
    **dict.fromkeys(("conv1d", "conv2d", "conv3d", "convolution"), _num_groups("groups")),
    **dict.fromkeys(("conv_transpose1d", "conv_transpose2d", "conv_transpose3d"), _num_groups("groups")),
    "group_norm": _num_groups("num_groups"),
    "channel_shuffle": _num_groups("groups"),
    "native_channel_shuffle": _num_groups("groups"),
    "pad": _pad,
    "constant_pad_nd": _pad,
    "roll": _roll,
    "repeat": _repeat("repeats"),
    "tile": _repeat("dims"),
    "repeat_interleave": _repeat_interleave,
    "squeeze": _squeeze,
    "index": _gather,
    "index_select": _gather,
}


def changes(c: Call, out: Any, keep: Keep) -> Changes:
    """Arguments of one op that take a new value; only those that differ."""
    rule = TABLE.get(c.op)
    if rule is None or out is None:
        return {}
    return {k: v for k, v in rule(c, out, keep).items() if k.startswith("#") or _plain(v) != _plain(c[k])}


def _plain(v: Any) -> Any:
    return list(v) if isinstance(v, (list, tuple)) else v


