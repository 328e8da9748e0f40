"""The masked original: the dense graph run in full, every reduction taken over the kept positions only.

This is what a cut model must compute. Units that go still run here, as garbage that nothing may look at: every op
that sums over a dimension (matrix products, convolutions, means, norms, softmax, recurrences) leaves them out, and every
other op is run as it is. An op that quietly mixes positions therefore shows up as a difference.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from torch import fx
from torch.utils._pytree import tree_flatten, tree_leaves, tree_unflatten

from secateur.axes import Axis, Dim, mask
from secateur.trace import Graph
from secateur.trace.blocks import bypassed, copied
from secateur.trace.call import Call

Keep = Mapping[Axis, np.ndarray]


class MaskedOriginal(fx.Interpreter):
    """Interprets the dense graph of `graph` under `keep`. `state` holds its tensors (float64) by state name."""

    def __init__(self, graph: Graph, keep: Mapping[str, torch.Tensor], state: Mapping[str, torch.Tensor]):
        super().__init__(fx.GraphModule({}, graph.capture.graph))
        self.traced = graph
        self.keep: Keep = graph.keep_axes(keep)
        self.bypass = bypassed(graph.removed_blocks(keep))
        self.copied = copied(graph.capture.graph, self.bypass)
        self.state = state

    def inputs(self, flat: list[Any]) -> list[Any]:
        """Values for the placeholders, the user's inputs filled into their places."""
        feed = iter(flat)
        out = []
        for node in self.traced.capture.graph.nodes:
            if node.op == "placeholder":
                name = self.traced.capture.tensors.get(node.name)
                if name is None:
                    out.append(next(feed))
                else:
                    out.append(self.state[self.traced.capture.aliases.get(name, name)])
        return out

    def run_node(self, n: fx.Node) -> Any:
        if n.op != "call_function" or not hasattr(n.target, "_schema"):
            return super().run_node(n)
        if n in self.bypass:
            stream = self.env[self.bypass[n]]
            return stream.clone() if n in self.copied else stream
        if n.target._schema.name == "aten::_assert_tensor_metadata":
            return None  # it asserts the dtype of the dense run
        c = Call(n, self.traced.env)
        special = SPECIAL.get(c.op)
        if special is None:
            return super().run_node(n)
        args = {k: self.map_nodes_to_values(v, n) for k, v in c.args.items()}
        return special(self, c, args)

    # ------------------------------------------------------------ helpers of the special ops
    def kept(self, dim: Dim) -> torch.Tensor:
        return torch.from_numpy(mask(dim, self.keep))

    def zeroed(self, value: torch.Tensor, dims: tuple[Dim, ...], which: range | list[int]) -> torch.Tensor:
        """`value` with the removed positions of the named dimensions at 0."""
        return filled(value, {i: self.kept(dims[i]) for i in which}, 0.0)

    def call(self, c: Call, args: dict[str, Any]) -> Any:
        """The op itself, with (changed) arguments by name."""
        positional, keywords = [], {}
        for spec in c.node.target._schema.arguments:
            if spec.name in args:
                if spec.kwarg_only:
                    keywords[spec.name] = args[spec.name]
                else:
                    positional.append(args[spec.name])
        return c.node.target(*positional, **keywords)


def filled(value: torch.Tensor, kept: Mapping[int, torch.Tensor], by: float) -> torch.Tensor:
    """`value` with `by` where a dimension's position is not kept (not multiplied by 0: garbage may be infinite)."""
    for i, mask_of_dim in kept.items():
        if not bool(mask_of_dim.all()):
            shape = [1] * value.dim()
            shape[i] = -1
            value = torch.where(mask_of_dim.view(shape), value, torch.full((), by, dtype=value.dtype))
    return value


def moments(x: torch.Tensor, kept: Mapping[int, torch.Tensor], keepdim: bool) -> tuple[torch.Tensor, torch.Tensor, int]:
    """Mean and sum of squared deviations over the kept positions of the dimensions in `kept`, and their number."""
    over, n = list(kept), 1
    for k in kept.values():
        n *= int(k.sum())
    mean = filled(x, kept, 0.0).sum(over, keepdim=True) / n
    square = filled((x - mean) ** 2, kept, 0.0).sum(over, keepdim=True)
    if not keepdim:
        mean, square = mean.squeeze(over), square.squeeze(over)
    return mean, square, n


def _masking(*names: str) -> Callable:
    """All dimensions of the named arguments are zeroed where units went: for ops that multiply and sum."""

    def special(run: MaskedOriginal, c: Call, args: dict[str, Any]) -> Any:
        for name in names:
            dims = c.dims(name)
            if dims and isinstance(args.get(name), torch.Tensor):
                args[name] = run.zeroed(args[name], dims, range(len(dims)))
        return run.call(c, args)

    return special


def _masking_list(name: str) -> Callable:
    def special(run: MaskedOriginal, c: Call, args: dict[str, Any]) -> Any:
        args[name] = [
            run.zeroed(v, d, range(len(d))) if v.is_floating_point() else v
            for v, d in zip(args[name], c.dims_list(name), strict=True)
        ]
        return run.call(c, args)

    return special


def _reduced(c: Call, rank: int) -> list[int]:
    dim = c["dim"]
    if dim is None or dim == []:
        return list(range(rank))
    return [d % rank for d in (dim if isinstance(dim, (list, tuple)) else [dim])]


def _moments(run: MaskedOriginal, x: torch.Tensor, dims: tuple[Dim, ...], over: list[int], keepdim: bool):
    return moments(x, {i: run.kept(dims[i]) for i in over}, keepdim)


def _mean(run: MaskedOriginal, c: Call, args: dict[str, Any]) -> Any:
    x, dims = args["self"], c.dims("self")
    return _moments(run, x, dims, _reduced(c, x.dim()), bool(c["keepdim"]))[0]


def _variance(root: bool, both: bool) -> Callable:
    def special(run: MaskedOriginal, c: Call, args: dict[str, Any]) -> Any:
        x, dims = args["self"], c.dims("self")
        mean, square, n = _moments(run, x, dims, _reduced(c, x.dim()), bool(c["keepdim"]))
        correction = c["correction"] if c["correction"] is not None else 0 if c["unbiased"] is False else 1
        value = square / max(0, n - correction)
        value = value.sqrt() if root else value
        return (value, mean) if both else value

    return special


def _sum_like(run: MaskedOriginal, c: Call, args: dict[str, Any]) -> Any:
    x = args["self"]
    if x.dim():
        args["self"] = run.zeroed(x, c.dims("self"), _reduced(c, x.dim()))
    return run.call(c, args)


def _softmax(run: MaskedOriginal, c: Call, args: dict[str, Any]) -> Any:
    x, d = args["self"], c["dim"]
    if x.dim():
        args["self"] = filled(x, {d % x.dim(): run.kept(c.dims("self")[d])}, -torch.inf)
    return run.call(c, args)


def _layer_norm(run: MaskedOriginal, c: Call, args: dict[str, Any]) -> Any:
    x, dims = args["input"], c.dims("input")
    over = list(range(x.dim() - len(c["normalized_shape"]), x.dim()))
    mean, square, n = _moments(run, x, dims, over, True)
    out = (x - mean) / (square / n + c["eps"]).sqrt()
    out = out * args["weight"] if args.get("weight") is not None else out
    return out + args["bias"] if args.get("bias") is not None else out


def _batch_norm(run: MaskedOriginal, c: Call, args: dict[str, Any]) -> Any:
    """With statistics of the batch itself (weight standardisation is written so) it reduces; otherwise it is pointwise."""
    x, dims = args["input"], c.dims("input")
    if not c["training"] and args.get("running_mean") is not None:
        return run.call(c, args)
    mean, square, n = _moments(run, x, dims, [i for i in range(x.dim()) if i != 1], True)
    out = (x - mean) / (square / n + c["eps"]).sqrt()
    shape = [1, -1] + [1] * (x.dim() - 2)
    out = out * args["weight"].view(shape) if args.get("weight") is not None else out
    return out + args["bias"].view(shape) if args.get("bias") is not None else out


def _rms_norm(run: MaskedOriginal, c: Call, args: dict[str, Any]) -> Any:
    x, dims = args["input"], c.dims("input")
    over = list(range(x.dim() - len(c["normalized_shape"]), x.dim()))
    n = 1
    for i in over:
        n *= int(run.kept(dims[i]).sum())
    eps = c["eps"] if c["eps"] is not None else torch.finfo(x.dtype).eps
    out = x * torch.rsqrt(run.zeroed(x * x, dims, over).sum(over, keepdim=True) / n + eps)
    return out * args["weight"] if args.get("weight") is not None else out


def _group_norm(run: MaskedOriginal, c: Call, args: dict[str, Any]) -> Any:
    x, dims, groups = args["input"], c.dims("input"), c["num_groups"]
    pieces = []
    space = {i: run.kept(dims[i]) for i in range(2, x.dim())}
    for part, kept in zip(x.chunk(groups, 1), run.kept(dims[1]).chunk(groups), strict=True):
        if bool(kept.any()):  # a group that goes as a whole is garbage nobody reads
            mean, square, n = moments(part, {1: kept, **space}, True)
            part = (part - mean) / (square / n + c["eps"]).sqrt()
        pieces.append(part)
    out = torch.cat(pieces, 1)
    shape = [1, -1] + [1] * (x.dim() - 2)
    out = out * args["weight"].view(shape) if args.get("weight") is not None else out
    return out + args["bias"].view(shape) if args.get("bias") is not None else out


def _sdpa(run: MaskedOriginal, c: Call, args: dict[str, Any]) -> Any:
    for name in ("query", "key"):
        args[name] = run.zeroed(args[name], c.dims(name), [-1])
    if c["scale"] is None:
        args["scale"] = 1.0 / float(run.kept(c.dims("query")[-1]).sum()) ** 0.5
    return run.call(c, args)


def _recurrent(run: MaskedOriginal, c: Call, args: dict[str, Any]) -> Any:
    args["input"] = run.zeroed(args["input"], c.dims("input"), [-1])
    args["params"] = [run.zeroed(p, d, range(len(d))) for p, d in zip(args["params"], c.dims_list("params"), strict=True)]
    if isinstance(args["hx"], (list, tuple)):
        args["hx"] = [run.zeroed(h, d, [-1]) for h, d in zip(args["hx"], c.dims_list("hx"), strict=True)]
    else:
        args["hx"] = run.zeroed(args["hx"], c.dims("hx"), [-1])
    return run.call(c, args)


def _cell(run: MaskedOriginal, c: Call, args: dict[str, Any]) -> Any:
    args["input"] = run.zeroed(args["input"], c.dims("input"), [-1])
    if isinstance(args["hx"], (list, tuple)):
        args["hx"] = [run.zeroed(h, d, [-1]) for h, d in zip(args["hx"], c.dims_list("hx"), strict=True)]
    else:
        args["hx"] = run.zeroed(args["hx"], c.dims("hx"), [-1])
    return run.call(c, args)


def _weight_norm(run: MaskedOriginal, c: Call, args: dict[str, Any]) -> Any:
    v, g = c.dims("v"), c.dims("g")
    args["v"] = run.zeroed(args["v"], v, [i for i, (a, b) in enumerate(zip(v, g, strict=True)) if a.size != b.size])
    return run.call(c, args)


def _wide(special: Callable) -> Callable:
    """Norms and sums of half precision are taken in float32, as torch does it: squares of float16 end at 65,504."""

    def widened(run: MaskedOriginal, c: Call, args: dict[str, Any]) -> Any:
        halves = {v.dtype for v in args.values() if isinstance(v, torch.Tensor)} & {torch.float16, torch.bfloat16}
        if not halves:
            return special(run, c, args)
        args = {k: v.float() if isinstance(v, torch.Tensor) and v.dtype in halves else v for k, v in args.items()}
        given = [v.dtype for v in tree_leaves(c.node.meta["val"])]
        out, spec = tree_flatten(special(run, c, args))
        return tree_unflatten([t.to(dtype) for t, dtype in zip(out, given, strict=True)], spec)

    return widened


SPECIAL: dict[str, Callable] = {
    "linear": _masking("input"),
    **dict.fromkeys(("conv1d", "conv2d", "conv3d", "conv_transpose1d", "conv_transpose2d", "conv_transpose3d"), _masking("input")),
    "convolution": _masking("input"),
    **dict.fromkeys(("matmul", "mm", "bmm", "mv", "dot", "vdot", "inner"), _masking("self", "other", "mat2", "vec", "tensor")),
    **dict.fromkeys(("addmm", "baddbmm", "addmv"), _masking("mat1", "mat2", "batch1", "batch2", "mat", "vec")),
    "einsum": _masking_list("tensors"),
    **dict.fromkeys(("_grouped_mm", "grouped_mm"), _masking("self", "mat2")),
    "transformers::grouped_mm_fallback": _masking("input", "weight"),
    "scaled_dot_product_attention": _sdpa,
    "mean": _wide(_mean),
    "var": _wide(_variance(root=False, both=False)),
    "std": _wide(_variance(root=True, both=False)),
    "var_mean": _wide(_variance(root=False, both=True)),
    "std_mean": _wide(_variance(root=True, both=True)),
    **dict.fromkeys(("sum", "linalg_vector_norm", "norm"), _wide(_sum_like)),
    "softmax": _softmax,
    "_softmax": _softmax,
    "layer_norm": _wide(_layer_norm),
    "rms_norm": _wide(_rms_norm),
    "group_norm": _wide(_group_norm),
    "batch_norm": _wide(_batch_norm),
    **dict.fromkeys(("lstm", "gru", "rnn_tanh", "rnn_relu"), _recurrent),
    **dict.fromkeys(("lstm_cell", "gru_cell", "rnn_tanh_cell", "rnn_relu_cell"), _cell),
    "bilinear": _masking("input1", "input2"),
    "_weight_norm": _weight_norm,
}
