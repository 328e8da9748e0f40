"""Convolutions, pooling and resampling: channels are axes, space stays whole."""

from __future__ import annotations

from secateur.axes import constant, factor, resolve, times, unify
from secateur.trace.call import Call, Dims, Value


def _space(t, c: Call, dims: Dims, n: int) -> Dims:
    """Freeze the last `n` dimensions of the input and give those of the output."""
    t.freeze(dims[-n:], c.reason("positions in space"))
    return tuple(constant(s, c.reason("positions in space")) for s in c.shape[-n:])


def convolution(t, c: Call) -> Value:
    """weight (out, in / groups, *kernel)."""
    x, w, b = c.dims("input"), c.dims("weight"), c.dims("bias")
    space = len(w) - 2
    t.freeze(w[2:], c.reason("kernel size"))
    channel = -1 - space
    if c["groups"] == 1:
        unify(x[channel], w[1])
    else:
        groups, _ = factor(w[0], w[0].size // c["groups"])
        groups_in, each = factor(x[channel], w[1].size)
        unify(each, w[1])
        unify(groups, groups_in)
    if b:
        unify(b[0], w[0])
    out = (*x[:channel], resolve(w[0]), *_space(t, c, x, space))
    t.macs(c, (*out, *w[1:]))
    return out


def transposed(t, c: Call) -> Value:
    """weight (in, out / groups, *kernel)."""
    x, w, b = c.dims("input"), c.dims("weight"), c.dims("bias")
    space = len(w) - 2
    t.freeze(w[2:], c.reason("kernel size"))
    channel = -1 - space
    unify(x[channel], w[0])
    out_channels = w[1]
    if c["groups"] > 1:
        groups, _ = factor(w[0], w[0].size // c["groups"])
        out_channels = times([resolve(groups), resolve(w[1])])
    if b:
        unify(b[0], out_channels)
    t.macs(c, (*x, *w[1:]))
    return (*x[:channel], resolve(out_channels), *_space(t, c, x, space))


def conv_general(t, c: Call) -> Value:
    """`aten.convolution` and `aten._convolution`, which say by a flag which of the two they are."""
    return transposed(t, c) if c["transposed"] else convolution(t, c)


def spatial(n: int):
    """A rule for ops that work on the last `n` dimensions and leave channels alone."""

    def rule(t, c: Call) -> Value:
        x = c.dims("self") or c.dims("input")
        out = (*x[:-n], *_space(t, c, x, n))
        value = c.node.meta["val"]
        return [out for _ in value] if isinstance(value, (tuple, list)) else out

    return rule


def grid_sample(t, c: Call) -> Value:
    x, n = c.dims("input"), len(c.dims("input")) - 2
    t.freeze(c.dims("grid"), c.reason("sampling positions"))
    return (*x[:2], *_space(t, c, x, n))


def unpool(n: int):
    """Values go back to the places in space that a pooling of the same channels noted."""

    def rule(t, c: Call) -> Value:
        x, places = c.dims("self"), c.dims("indices")
        t.freeze(places[-n:], c.reason("positions in space"))
        for a, b in zip(x[:-n], places[:-n], strict=True):
            unify(a, b)
        return (*(resolve(d) for d in x[:-n]), *_space(t, c, x, n))

    return rule


def im2col(t, c: Call) -> Value:
    """(N, C, H, W) -> (N, C·k·k, L)."""
    x = c.dims("self")
    patch = c["kernel_size"][0] * c["kernel_size"][1]
    t.freeze(x[-2:], c.reason("positions in space"))
    length = constant(c.shape[-1], c.reason("positions in space"))
    return (*x[:-3], times([resolve(x[-3]), constant(patch, c.reason("kernel size"))]), length)


def col2im(t, c: Call) -> Value:
    """(N, C·k·k, L) -> (N, C, H, W)."""
    x = c.dims("self")
    channels, inner = factor(x[-2], c["kernel_size"][0] * c["kernel_size"][1])
    t.freeze((inner, x[-1]), c.reason("positions in space"))
    return (*x[:-2], resolve(channels), *(constant(s, c.reason("positions in space")) for s in c.shape[-2:]))


RULES = {
    **dict.fromkeys(("conv1d", "conv2d", "conv3d"), convolution),
    **dict.fromkeys(("conv_transpose1d", "conv_transpose2d", "conv_transpose3d"), transposed),
    **dict.fromkeys(("convolution", "_convolution"), conv_general),
    **{
        f"{kind}{n}d": spatial(n)
        for n in (1, 2, 3)
        for kind in ("avg_pool", "max_pool", "adaptive_avg_pool", "adaptive_max_pool", "lp_pool", "_adaptive_avg_pool")
    },
    **{f"max_pool{n}d_with_indices": spatial(n) for n in (1, 2, 3)},
    **{
        name: spatial(n)
        for n, names in {
            1: "upsample_nearest1d upsample_linear1d reflection_pad1d replication_pad1d",
            2: "upsample_nearest2d upsample_bilinear2d upsample_bicubic2d reflection_pad2d replication_pad2d "
            "_upsample_bilinear2d_aa _upsample_bicubic2d_aa",
            3: "upsample_nearest3d upsample_trilinear3d reflection_pad3d replication_pad3d",
        }.items()
        for name in names.split()
    },
    "max_unpool2d": unpool(2),
    "max_unpool3d": unpool(3),
    "grid_sampler": grid_sample,
    "grid_sampler_2d": grid_sample,
    "im2col": im2col,
    "unfold_im2col": im2col,
    "col2im": col2im,
}
