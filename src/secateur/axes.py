"""The algebra of axes: every dimension of every tensor is a polynomial of axes.

An *axis* is an ordered set of units (filters, neurons, heads ...). A dimension is an axis, an ordered sum of
dimensions (`cat`), an ordered product (`flatten`, outer factor first), or an axis seen through a permutation
(`flip`, channel gather). Ops say which dimensions are equal; `unify` solves the equalities by binding axes to one
another and by *refining* an axis into a sum or a product, everywhere at once. What cannot be solved is frozen with
its reason: a frozen axis keeps all its units, which is always a sound answer.

    split(e, k)   -> the first k positions of e, the rest
    factor(e, n)  -> outer, inner of size n
    unify(a, b)   -> afterwards a and b are the same dimension
    freeze(e, r)  -> no unit of e may ever be removed, because of r

Nothing here knows about torch; masks are numpy booleans (True stays).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from math import gcd
from typing import Union

import numpy as np

BATCH = "batch"  # the kind of the first dimension of the inputs: frozen, but of no fixed size in a rewritten graph
MAX_COPIES = 64  # a frozen outer factor is written out as that many equal terms at most


class Axis:
    """An ordered set of `size` units. `link` is what it was found equal to; `reason` says why it is frozen."""

    __slots__ = ("size", "link", "reason", "kind")

    def __init__(self, size: int, reason: str | None = None, kind: str | None = None):
        self.size = size
        self.link: Dim | None = None
        self.reason = reason
        self.kind = kind

    def __repr__(self) -> str:
        return f"{'!' if self.reason else ''}{self.kind or 'a'}{self.size}@{id(self) % 9973}"


class Sum:
    """Dimensions one after the other."""

    __slots__ = ("terms", "size")

    def __init__(self, terms: tuple[Dim, ...]):
        self.terms = terms
        self.size = sum(t.size for t in terms)

    def __repr__(self) -> str:
        return "(" + " + ".join(map(repr, self.terms)) + ")"


class Prod:
    """Every combination of units, the first factor outermost (row-major)."""

    __slots__ = ("factors", "size")

    def __init__(self, factors: tuple[Dim, ...]):
        self.factors = factors
        size = 1
        for f in factors:
            size *= f.size
        self.size = size

    def __repr__(self) -> str:
        return "·".join(map(repr, self.factors)) or "1"


class Perm:
    """Position i holds unit `order[i]` of the dimension `base`."""

    __slots__ = ("base", "order", "size")

    def __init__(self, base: Dim, order: np.ndarray):
        self.base = base
        self.order = order
        self.size = len(order)

    def __repr__(self) -> str:
        return f"perm({self.base!r})"


Dim = Union[Axis, Sum, Prod, Perm]
ONE = Prod(())
ZERO = Sum(())


def constant(size: int, reason: str) -> Dim:
    """A dimension of `size` positions that can never be cut."""
    return ONE if size == 1 else ZERO if size == 0 else Axis(size, reason)


# ---------------------------------------------------------------- canonical form
def add(terms: list[Dim]) -> Dim:
    """The canonical sum of resolved dimensions."""
    flat: list[Dim] = []
    for t in terms:
        flat.extend(t.terms if isinstance(t, Sum) else (t,))
    return flat[0] if len(flat) == 1 else Sum(tuple(flat)) if flat else ZERO


def times(factors: list[Dim]) -> Dim:
    """The canonical product of resolved dimensions."""
    flat: list[Dim] = []
    for f in factors:
        if f.size == 0:
            return ZERO
        flat.extend(f.factors if isinstance(f, Prod) else (f,))
    return flat[0] if len(flat) == 1 else Prod(tuple(flat)) if flat else ONE


def resolve(e: Dim) -> Dim:
    """`e` with every solved axis replaced by what it was found equal to."""
    if isinstance(e, Axis):
        if e.size == 1:
            return ONE
        if e.link is None:
            return e
        e.link = resolve(e.link)
        return e.link
    if isinstance(e, Sum):
        terms = [resolve(t) for t in e.terms]
        return e if all(a is b for a, b in zip(terms, e.terms, strict=True)) else add(terms)
    if isinstance(e, Prod):
        factors = [resolve(f) for f in e.factors]
        return e if all(a is b for a, b in zip(factors, e.factors, strict=True)) else times(factors)
    return _permuted(resolve(e.base), e.order)


def _permuted(base: Dim, order: np.ndarray) -> Dim:
    """`base` seen through `order`, pushed down to the axes; freezes `base` where the order does not respect it."""
    if len(order) < 2 or np.array_equal(order, np.arange(len(order))):
        return base
    if isinstance(base, Axis):
        return base if base.reason else Perm(base, order)
    if isinstance(base, Perm):
        return _permuted(base.base, base.order[order])
    done = _permuted_sum(base, order) if isinstance(base, Sum) else _permuted_prod(base, order)
    if done is None:
        freeze(base, "positions are gathered in an order that does not follow its parts")
        return constant(len(order), "gathered from a frozen dimension")
    return done


def _permuted_sum(base: Sum, order: np.ndarray) -> Dim | None:
    starts = np.cumsum([0] + [t.size for t in base.terms])
    out: list[Dim] = []
    at = 0
    while at < len(order):
        k = int(np.searchsorted(starts, order[at], side="right")) - 1
        local = order[at : at + base.terms[k].size] - starts[k]
        if len(local) < base.terms[k].size or local.min() < 0 or local.max() >= base.terms[k].size:
            return None
        out.append(_permuted(base.terms[k], local))
        at += len(local)
    return add(out)


def _permuted_prod(base: Prod, order: np.ndarray) -> Dim | None:
    inner = base.factors[-1].size
    table = order.reshape(-1, inner)
    p, q = table[:, 0] // inner, table[0] % inner
    if not np.array_equal(table, p[:, None] * inner + q[None, :]):
        return None
    return times([_permuted(times(list(base.factors[:-1])), p), _permuted(base.factors[-1], q)])


def axes_of(e: Dim) -> Iterator[Axis]:
    """The unsolved axes that `e` is made of, in order, repeated as often as they occur."""
    e = resolve(e)
    if isinstance(e, Axis):
        yield e
    elif isinstance(e, Perm):
        yield from axes_of(e.base)
    else:
        for part in e.terms if isinstance(e, Sum) else e.factors:
            yield from axes_of(part)


def same(a: Dim, b: Dim) -> bool:
    """Whether two resolved dimensions are written alike."""
    if a is b:
        return True
    if type(a) is not type(b) or a.size != b.size or isinstance(a, Axis):
        return False
    if isinstance(a, Perm) and isinstance(b, Perm):
        return same(a.base, b.base) and np.array_equal(a.order, b.order)
    xs, ys = (e.terms if isinstance(e, Sum) else e.factors for e in (a, b))  # type: ignore[union-attr]
    return len(xs) == len(ys) and all(same(x, y) for x, y in zip(xs, ys, strict=True))


# ---------------------------------------------------------------- the four operations
def freeze(e: Dim, reason: str) -> None:
    """No unit of any axis in `e` may be removed from now on; the first reason given stays."""
    for axis in axes_of(e):
        if axis.reason is None:
            axis.reason = reason


def is_frozen(e: Dim) -> bool:
    """Whether no unit of `e` can be removed."""
    return all(axis.reason for axis in axes_of(e))


def _give_up(e: Dim, sizes: tuple[int, ...], reason: str) -> tuple[Dim, ...]:
    freeze(e, reason)
    return tuple(constant(n, reason) for n in sizes)


def split(e: Dim, k: int) -> tuple[Dim, Dim]:
    """The first `k` positions of `e` and the rest."""
    e = resolve(e)
    if k <= 0:
        return ZERO, e
    if k >= e.size:
        return e, ZERO
    if isinstance(e, Axis):
        kind = None if e.kind == BATCH else e.kind  # a part of the batch is not the batch
        first, rest = Axis(k, e.reason, kind), Axis(e.size - k, e.reason, kind)
        e.link = Sum((first, rest))
        return resolve(first), resolve(rest)
    if isinstance(e, Sum):
        at = 0
        for i, t in enumerate(e.terms):
            if at + t.size > k:
                a, b = split(t, k - at)
                e = resolve(e)  # the split may have refined earlier terms as well
                if not isinstance(e, Sum):
                    return split(e, k)
                left, right = [resolve(x) for x in (*Sum(e.terms).terms,)], []
                return _cut_terms(left, k, right)
            at += t.size
            if at == k:
                return add(list(e.terms[: i + 1])), add(list(e.terms[i + 1 :]))
    if isinstance(e, Prod):
        return _split_prod(e, k)
    assert isinstance(e, Perm)
    first, rest = _give_up(e, (k, e.size - k), "a gathered axis is split")
    return first, rest


def _cut_terms(terms: list[Dim], k: int, right: list[Dim]) -> tuple[Dim, Dim]:
    """Cut a list of terms after `k` positions; the boundary inside a term is split once more (it is refined already)."""
    left: list[Dim] = []
    at = 0
    for t in terms:
        if at >= k:
            right.append(t)
        elif at + t.size <= k:
            left.append(t)
        else:
            a, b = split(t, k - at)
            left.append(a)
            right.append(b)
        at += t.size
    return add([resolve(t) for t in left]), add([resolve(t) for t in right])


def _split_prod(e: Prod, k: int) -> tuple[Dim, Dim]:
    """Cut the outer factor; where `k` is not a multiple of the inner size the unit that straddles is split inside."""
    outer, inner = e.factors[0], times(list(e.factors[1:]))
    q, r = divmod(k, inner.size)
    if r == 0:
        a, b = split(outer, q)
        return times([a, resolve(inner)]), times([b, resolve(inner)])
    head, tail = split(outer, q)
    _, tail = split(tail, 1)  # the straddling unit can no longer be removed: only its inner part is cut
    a, b = split(inner, r)
    inner, head, tail = resolve(inner), resolve(head), resolve(tail)
    left = add([times([head, inner]), a] if head.size else [a])
    right = add([b, times([tail, inner])] if tail.size else [b])
    return left, right


def factor(e: Dim, n: int) -> tuple[Dim, Dim]:
    """`e` as outer times inner, the inner of size `n` (which divides the size of `e`)."""
    e = resolve(e)
    if n == 1:
        return e, ONE
    if n == e.size:
        return ONE, e
    if isinstance(e, Axis):
        kind = None if e.kind == BATCH else e.kind
        outer, inner = Axis(e.size // n, e.reason, kind), Axis(n, e.reason, kind)
        e.link = Prod((outer, inner))
        return resolve(outer), resolve(inner)
    if isinstance(e, Prod):
        found = _factor_prod(e, n)
        if found is not None:
            return found
    if isinstance(e, Sum) and all(t.size % n == 0 for t in e.terms):
        outers, first = [], None
        for t in e.terms:
            o, i = factor(t, n)
            outers.append(o)
            if first is None:
                first = i
            else:
                unify(first, i)
        assert first is not None
        return add([resolve(o) for o in outers]), resolve(first)
    return _factor_by_chunks(e, n)


def _factor_prod(e: Prod, n: int) -> tuple[Dim, Dim] | None:
    outer, inner, size = list(e.factors), [], 1
    while size < n:
        f = outer.pop()
        if n % (size * f.size) == 0:
            inner.insert(0, f)
            size *= f.size
            continue
        need = n // size
        if n % size or f.size % need:
            return None
        o, i = factor(f, need)
        outer.append(o)
        inner.insert(0, i)
        size = n
    return times([resolve(f) for f in outer]), times([resolve(f) for f in inner])


def _factor_by_chunks(e: Dim, n: int) -> tuple[Dim, Dim]:
    """The outer factor is frozen, and the pieces of size `n` are one and the same inner dimension."""
    count = e.size // n
    if count > MAX_COPIES or is_frozen(e) or isinstance(e, Perm):
        outer, inner = _give_up(e, (count, n), "reshaped across its parts")
        return outer, inner
    rest, first = e, None
    for _ in range(count):
        piece, rest = split(rest, n)
        if first is None:
            first = piece
        else:
            unify(first, piece)
    assert first is not None
    return constant(count, "counts equal parts"), resolve(first)


def unify(a: Dim, b: Dim) -> None:
    """Make two dimensions of one size the same one."""
    a, b = resolve(a), resolve(b)
    if same(a, b):
        return
    if a.size != b.size:
        raise ValueError(f"dimensions of {a.size} and {b.size} units cannot be equal")
    if isinstance(b, Axis) and not isinstance(a, Axis):
        a, b = b, a
    if isinstance(a, Axis) and isinstance(b, Perm) and b.base is a:
        _tie_orbits(a, b.order)
    elif isinstance(a, Axis):
        _bind(a, b)
    elif is_frozen(a) or is_frozen(b):
        reason = next((x.reason for x in (*axes_of(a), *axes_of(b)) if x.reason), "has no removable unit")
        _tie_frozen(a, b, reason or "")
    elif isinstance(a, Perm) or isinstance(b, Perm):
        _unify_perm(a, b)
    elif isinstance(a, Sum) or isinstance(b, Sum):
        _unify_sum(a, b)
    else:
        _unify_prod(a, b)


def _tie_frozen(a: Dim, b: Dim, reason: str) -> None:
    freeze(a, reason)
    freeze(b, reason)


def _tie_orbits(a: Axis, order: np.ndarray) -> None:
    """`a` equals a permutation of itself: for a reversal unit i is tied to its mirror image, anything else freezes."""
    if not np.array_equal(order, np.arange(a.size)[::-1]) or a.reason:
        freeze(a, "is equal to a permutation of itself")
        return
    half, _ = split(a, a.size // 2)
    _, second = split(a, a.size - a.size // 2)
    if half.size > 1:
        unify(second, Perm(half, np.arange(half.size)[::-1].copy()))


def _bind(a: Axis, b: Dim) -> None:
    if isinstance(b, Axis):
        b.kind = b.kind or a.kind
    if a.reason:
        freeze(b, a.reason)
    a.link = b


def _unify_perm(a: Dim, b: Dim) -> None:
    if not isinstance(a, Perm):
        a, b = b, a
    assert isinstance(a, Perm) and isinstance(a.base, Axis)
    inverse = np.argsort(a.order)
    if (isinstance(b, Perm) and b.base is a.base) or any(x is a.base for x in axes_of(b)):
        _tie_frozen(a, b, "is equal to a permutation of itself")
        return
    a.base.link = _permuted(b, inverse)
    if a.base.reason:
        freeze(a.base.link, a.base.reason)


def _unify_sum(a: Dim, b: Dim) -> None:
    """Align the boundaries from the left: each step takes the shorter first term off both sides."""
    while resolve(a).size:
        a, b = resolve(a), resolve(b)
        if same(a, b):
            return
        heads = [e.terms[0].size for e in (a, b) if isinstance(e, Sum)]
        if not heads:
            unify(a, b)
            return
        k = min(heads)
        first_a, a = split(a, k)
        first_b, b = split(b, k)
        unify(first_a, first_b)


def _unify_prod(a: Dim, b: Dim) -> None:
    """Align from the inside; sizes without a common divisor freeze both sides."""
    assert isinstance(a, Prod) and isinstance(b, Prod)
    m, n = a.factors[-1].size, b.factors[-1].size
    g = m if n % m == 0 else n if m % n == 0 else gcd(m, n)
    if g == 1:
        _tie_frozen(a, b, f"two products do not align ({a.size} units)")
        return
    outer_a, inner_a = factor(a, g)
    outer_b, inner_b = factor(b, g)
    unify(inner_a, inner_b)
    unify(outer_a, outer_b)


# ---------------------------------------------------------------- values under a choice of units
Keep = Mapping[Axis, np.ndarray]


def count(e: Dim, keep: Keep) -> int:
    """How many positions of `e` stay."""
    if isinstance(e, Axis):
        if e.link is not None:
            return count(e.link, keep)
        return int(np.count_nonzero(keep[e])) if e in keep else e.size
    if isinstance(e, Sum):
        return sum(count(t, keep) for t in e.terms)
    if isinstance(e, Perm):
        return count(e.base, keep)
    size = 1
    for f in e.factors:
        size *= count(f, keep)
    return size


def mask(e: Dim, keep: Keep) -> np.ndarray:
    """Which positions of `e` stay: one boolean each."""
    e = resolve(e)
    if isinstance(e, Axis):
        return keep[e] if e in keep else np.ones(e.size, bool)
    if isinstance(e, Perm):
        return mask(e.base, keep)[e.order]
    if isinstance(e, Sum):
        return np.concatenate([mask(t, keep) for t in e.terms]) if e.terms else np.ones(0, bool)
    out = np.ones(1, bool)
    for f in e.factors:
        out = np.logical_and.outer(out, mask(f, keep)).reshape(-1)
    return out


def occurrences(e: Dim) -> dict[Axis, tuple[np.ndarray, np.ndarray]]:
    """For every axis in `e` the pairs (unit, position): unit `units[k]` stands at position `positions[k]`."""
    e = resolve(e)
    if isinstance(e, Axis):
        every = np.arange(e.size)
        return {e: (every, every)}
    found: dict[Axis, list[tuple[np.ndarray, np.ndarray]]] = {}
    if isinstance(e, Perm):
        where = np.argsort(e.order)
        return {a: (u, where[p]) for a, (u, p) in occurrences(e.base).items()}
    if isinstance(e, Sum):
        start = 0
        for t in e.terms:
            for a, (u, p) in occurrences(t).items():
                found.setdefault(a, []).append((u, p + start))
            start += t.size
    else:
        inner = e.size
        for f in e.factors:
            inner //= f.size
            outside = np.arange(0, e.size, inner * f.size)[:, None, None]
            for a, (u, p) in occurrences(f).items():
                positions = outside + (p * inner)[None, :, None] + np.arange(inner)[None, None, :]
                found.setdefault(a, []).append((np.broadcast_to(u[None, :, None], positions.shape).reshape(-1), positions.reshape(-1)))
    return {a: (np.concatenate([u for u, _ in rows]), np.concatenate([p for _, p in rows])) for a, rows in found.items()}
