"""Contractions: linear layers, matrix products, einsum, attention. The contracted dimensions are equal on both sides."""

from __future__ import annotations

from secateur.axes import ONE, Dim, constant, factor, is_frozen, resolve, unify
from secateur.trace.call import Call, Dims, Value
from secateur.trace.rules.pointwise import broadcast


def tag(dim: Dim, kind: str) -> None:
    """Name the kind of a removable axis for the user; what is frozen or composite keeps its own."""
    dim = resolve(dim)
    for axis in getattr(dim, "factors", (dim,)):
        axis = resolve(axis)
        if hasattr(axis, "kind") and axis.kind is None:
            axis.kind = kind


def linear(t, c: Call) -> Value:
    x, w, b = c.dims("input"), c.dims("weight"), c.dims("bias")
    unify(x[-1], w[-1])
    if len(w) == 1:
        out: Dims = x[:-1]
    else:
        if b:
            unify(b[0], w[0])
        out = (*x[:-1], resolve(w[0]))
    t.macs(c, (*out, w[-1]))
    return out


def contract(t, c: Call, a: Dims, b: Dims) -> Dims:
    """`torch.matmul`: (.., i, k) x (.., k, j); vectors allowed on either side."""
    unify(a[-1], b[-2] if len(b) > 1 else b[0])
    rows = a[-2:-1] if len(a) > 1 else ()
    columns = b[-1:] if len(b) > 1 else ()
    depth = max(len(a), len(b)) - 2
    batch: Dims = ()
    if depth > 0:
        sizes = c.shape[:depth]
        batch = broadcast([a[:-2], b[:-2]], sizes)
        if len(a) > 3 and len(b) > 3:
            tag(batch[-1], "head")
            if not is_frozen(a[-1]):
                tag(a[-1], "head_dim")
    out = (*batch, *rows, *columns)
    t.macs(c, (*out, a[-1]))
    return out


def matmul(t, c: Call) -> Value:
    names = ("self", "other" if "other" in c.args else "mat2" if "mat2" in c.args else "vec")
    if "tensor" in c.args:
        names = ("self", "tensor")
    return contract(t, c, c.dims(names[0]), c.dims(names[1]))


def addmm(t, c: Call) -> Value:
    names = ("mat1", "mat2") if "mat1" in c.args else ("batch1", "batch2") if "batch1" in c.args else ("mat", "vec")
    out = contract(t, c, c.dims(names[0]), c.dims(names[1]))
    return broadcast([out, c.dims("self")], c.shape)


def inner(t, c: Call) -> Value:
    """The last dimensions of both are contracted; a scalar multiplies."""
    a, b = c.dims("self"), c.dims("other")
    if not a or not b:
        return a or b
    unify(a[-1], b[-1])
    out = (*a[:-1], *b[:-1])
    t.macs(c, (*out, a[-1]))
    return out


def outer(t, c: Call) -> Value:
    return (c.dims("self")[0], c.dims("vec2")[0])


def _letters(c: Call) -> tuple[list[str], str]:
    """The operands' letters and the result's, with '...' written out in capitals."""
    operands = c.dims_list("tensors")
    left, arrow, right = c["equation"].replace(" ", "").partition("->")
    terms = left.split(",")
    extra = [len(d) - len(s.replace("...", "")) for s, d in zip(terms, operands, strict=True)]
    spare = [ch for ch in "ABCDEFGHIJKLMNOPQRSTUVWXYZ" if ch not in left][: max(extra) if "." in left else 0]
    terms = [s.replace("...", "".join(spare[len(spare) - n :])) for s, n in zip(terms, extra, strict=True)]
    if arrow:
        return terms, right.replace("...", "".join(spare))
    every = "".join(terms)
    return terms, "".join(spare) + "".join(sorted(ch for ch in set(every) - set(spare) if every.count(ch) == 1))


def einsum(t, c: Call) -> Value:
    """Every letter is one dimension. Multiply-accumulates are those of contracting pair by pair, left to right."""
    terms, right = _letters(c)
    axes: dict[str, Dim] = {}
    for s, dims in zip(terms, c.dims_list("tensors"), strict=True):
        for letter, dim in zip(s, dims, strict=True):
            if letter not in axes or axes[letter].size == 1:
                axes[letter] = dim
            elif dim.size > 1:
                unify(axes[letter], dim)
    if any(len(set(s)) < len(s) for s in terms):  # a diagonal
        t.freeze(axes.values(), c.reason("an einsum takes a diagonal"))
    have = set(terms[0])
    for i, s in enumerate(terms[1:], 1):
        later = set(right).union(*terms[i + 1 :])
        contracted = (have & set(s)) - later
        used = (have | set(s)) & (later | contracted)  # what only one of the two has and nobody needs is summed before
        if contracted:
            t.macs(c, tuple(axes[ch] for ch in sorted(used)), tuple(axes[ch] for ch in sorted(contracted)))
        have = (have | set(s)) & later
    return tuple(resolve(axes[letter]) for letter in right)


def bilinear(t, c: Call) -> Value:
    """weight (out, in1, in2)."""
    a, b, w, bias = c.dims("input1"), c.dims("input2"), c.dims("weight"), c.dims("bias")
    unify(a[-1], w[1])
    unify(b[-1], w[2])
    if bias:
        unify(bias[0], w[0])
    rows = broadcast([a[:-1], b[:-1]], c.shape[:-1])
    t.macs(c, (*rows, *w))
    return (*rows, resolve(w[0]))


def sdpa(t, c: Call) -> Value:
    """query (.., H, L, E), key (.., Hk, S, E), value (.., Hk, S, Ev). Positions L and S stay whole."""
    q, k, v = c.dims("query"), c.dims("key"), c.dims("value")
    unify(q[-1], k[-1])
    unify(k[-2], v[-2])
    t.freeze((q[-2], k[-2]), c.reason("positions of attention"))
    if len(q) > 2:
        tag(q[-3], "head")
        for a, b in zip(k[:-2], v[:-2], strict=True):
            unify(a, b)
        if c["enable_gqa"] and q[-3].size != k[-3].size:
            kv_heads, _ = factor(q[-3], q[-3].size // k[-3].size)
            unify(kv_heads, k[-3])
            tag(k[-3], "kv_group")
            batch = (*broadcast([q[:-3], k[:-3]], c.shape[:-3]), resolve(q[-3]))
        else:
            batch = broadcast([q[:-2], k[:-2]], c.shape[:-2])
    else:
        batch = ()
    tag(q[-1], "head_dim")
    tag(v[-1], "value_dim")
    m = c.dims("attn_mask")
    if m:
        broadcast([m, (*batch, q[-2], k[-2])], [*c.shape[:-1], k[-2].size])
    out = (*batch, q[-2], resolve(v[-1]))
    t.macs(c, (*batch, q[-2], k[-2], q[-1]))
    t.macs(c, (*out, k[-2]))
    return out


def grouped_mm(t, c: Call) -> Value:
    """Rows of the first are dealt to the experts of the second (E, k, j); which expert is decided by data."""
    a, b = c.dims("self") or c.dims("input"), c.dims("mat2") or c.dims("weight")
    unify(a[-1], b[-2])
    if len(b) == 3:
        t.freeze(b[:1], c.reason("experts are chosen by the data"))
    t.freeze(a[:-1], c.reason("rows are dealt to experts by the data"))
    if len(a) == 2 and len(b) == 3:
        out: Dims = (a[0], resolve(b[-1]))
        t.macs(c, (*out, a[-1]))
        return out
    return t.opaque(c, "a grouped product of this form has no rule")


def one_hot(t, c: Call) -> Value:
    x = c.dims("self")
    return (*x, constant(c.shape[-1], c.reason("classes"))) if x else (ONE,)


RULES = {
    "linear": linear,
    **dict.fromkeys(("matmul", "mm", "bmm", "mv", "dot", "vdot"), matmul),
    **dict.fromkeys(("addmm", "baddbmm", "addmv"), addmm),
    "inner": inner,
    "outer": outer,
    "ger": outer,
    "einsum": einsum,
    "scaled_dot_product_attention": sdpa,
    "_grouped_mm": grouped_mm,
    "grouped_mm": grouped_mm,
    "transformers::grouped_mm_fallback": grouped_mm,
    "bilinear": bilinear,
    "one_hot": one_hot,
}
