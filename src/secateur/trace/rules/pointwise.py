"""Ops that act position by position: all tensor arguments broadcast against each other."""

from __future__ import annotations

from secateur.axes import ONE, Dim, resolve, unify
from secateur.trace.call import Call, Dims, Value, tensors_in

NAMES = """
abs add addcdiv addcmul alias angle asin atan atan2 bitwise_and bitwise_not bitwise_or bitwise_xor celu ceil clamp
clamp_max clamp_min clip clone contiguous copy cos cosh deg2rad detach div divide dropout elu eq erf erfc exp exp2
expm1 feature_dropout alpha_dropout fill fill_tensor floor floor_divide fmod frac ge gelu greater greater_equal gt
hardshrink hardsigmoid hardswish hardtanh heaviside isfinite isinf isnan isneginf isposinf le leaky_relu lerp less
less_equal lgamma lift_fresh lift_fresh_copy log log10 log1p log2 log_sigmoid logaddexp logical_and logical_not
logical_or logical_xor logit lt masked_fill maximum minimum mish mul multiply nan_to_num ne neg negative not_equal
positive pow reciprocal relu relu6 remainder round rrelu rsqrt rsub selu sgn sigmoid sign silu sin sinh softplus
softshrink special_expit special_erf sqrt square sub subtract tan tanh tanhshrink threshold to _to_copy true_divide
trunc type_as where xlogy zero bernoulli empty_like full_like ones_like rand_like randn_like zeros_like
requires_grad _assert_tensor_metadata resolve_conj resolve_neg __and__ __or__ __xor__ __lshift__
__rshift__ sigmoid_ cpu float double half bfloat16 int long bool
""".split()


def broadcast(shapes: list[Dims], shape: list[int]) -> Dims:
    """Unify right-aligned dimensions; size 1 stretches. Returns the dimensions of an output of `shape`."""
    out: list[Dim] = []
    for i, size in enumerate(reversed(shape)):
        found: Dim | None = None
        for dims in shapes:
            if i < len(dims) and dims[-1 - i].size == size:
                if found is None:
                    found = dims[-1 - i]
                else:
                    unify(found, dims[-1 - i])
        out.append(resolve(found) if found is not None and size != 1 else ONE)
    return tuple(reversed(out))


def pointwise(t, c: Call) -> Value:
    value = c.node.meta.get("val")
    if isinstance(value, (list, tuple)):  # `where(condition)`
        return t.opaque(c, "positions are chosen by the data")
    shapes = list(c.tensors())
    if value is None or not hasattr(value, "shape"):
        return None
    return broadcast(shapes, c.shape)


def prelu(t, c: Call) -> Value:
    x, w = c.dims("self"), c.dims("weight")
    if w and w[0].size > 1:
        unify(w[0], x[1 if len(x) > 1 else 0])
    return x


def meshgrid(t, c: Call) -> Value:
    """`meshgrid(a, b)`: every output has the axes of all the arguments."""
    tensors = c.dims_list("tensors")
    dims = [d[0] if d else ONE for d in tensors]
    if c["indexing"] == "xy" and len(dims) > 1:
        dims[0], dims[1] = dims[1], dims[0]
    return [tuple(dims) for _ in tensors]


def same_as_input(t, c: Call) -> Value:
    return next(tensors_in(c.env[c.node.all_input_nodes[0]]))


def diagonal_mask(t, c: Call) -> Value:
    """`tril`, `triu`: what is zeroed depends on the position, so the last two axes stay whole."""
    x = c.dims("self")
    t.freeze(x[-2:], c.reason("values depend on the position"))
    return x


RULES = {
    **{name: pointwise for name in NAMES},
    "prelu": prelu,
    "_prelu_kernel": pointwise,
    "meshgrid": meshgrid,
    "tril": diagonal_mask,
    "triu": diagonal_mask,
}
