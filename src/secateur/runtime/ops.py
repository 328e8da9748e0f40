"""The operators of `secateur::` as torch sees them: shapes for export and compile, derivatives, and what they count for.

The pattern is fixed; the values that there are have derivatives in `sparse_linear` and `sparse_conv2d`, so a sparse layer can be trained on. The
others (`sparse_chain`, `sparse_decode`, `max_pool2d`) are for inference. All derivatives are backward ones: where others are asked for, layers
compute densely (`transformed`).
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from functools import lru_cache
from math import prod
from threading import Lock
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.utils.flop_counter import flop_registry, register_flop_formula

from secateur.runtime.build import NoKernels, load
from secateur.runtime.layout import Layout, dense

Window = tuple[int, int, int, int, int, int, int, int]  # kernel, stride, padding and dilation, each (height, width)
HALF = (torch.bfloat16, torch.float16)


@torch.compiler.assume_constant_result  # what is compiled does not ask again
def available() -> bool:
    """Whether there are kernels; registers the operators the first time, and warns once where they cannot be had."""
    return _registered()


_FIRST = Lock()  # threads that call for the first time together


def _registered() -> bool:
    with _FIRST:
        return _register()


@lru_cache(maxsize=1)
def _register() -> bool:
    try:
        load()
    except NoKernels as error:
        warnings.warn(f"{error}\n  Until then sparse layers compute with dense weights.", stacklevel=5)
        return False
    torch.library.register_fake("secateur::sparse_linear")(_linear_shape)
    torch.library.register_fake("secateur::sparse_decode")(_linear_shape)
    torch.library.register_fake("secateur::sparse_conv2d")(_conv_shape)
    torch.library.register_fake("secateur::sparse_chain")(_chain_shapes)
    torch.library.register_fake("secateur::max_pool2d")(_pool_shape)
    torch.library.register_autograd("secateur::sparse_linear", _linear_backward, setup_context=_keep_linear)
    torch.library.register_autograd("secateur::sparse_conv2d", _conv_backward, setup_context=_keep_conv)
    for name, flops in FLOPS.items():
        if (op := getattr(torch.ops.secateur, name)) not in flop_registry:
            register_flop_formula(op)(flops)
    return True


def takes(x: Tensor, values: Tensor | None = None) -> bool:
    """Whether the kernels compute with these tensors: float32 on the CPU."""
    values = x if values is None else values
    return x.dtype == values.dtype == torch.float32 and x.device.type == values.device.type == "cpu" and not transformed() and available()


def lifted(x: Tensor) -> Tensor:
    """Under autocast the kernels compute with what other layers gave in half precision."""
    return x.float() if torch.is_autocast_enabled("cpu") and x.dtype in HALF and x.device.type == "cpu" else x


def lowered(y: Tensor) -> Tensor:
    """Under autocast a kernel's output has the dtype that a dense layer would give."""
    return y.to(torch.get_autocast_dtype("cpu")) if torch.is_autocast_enabled("cpu") and y.dtype != torch.float64 else y


def transformed() -> bool:
    """Whether forward-mode derivatives are asked for, which torch would silently take for 0, or a transform of torch.func is at work."""
    return forward_ad._current_level >= 0 or _in_functorch()


@torch.compiler.assume_constant_result  # what is compiled is compiled again where this changes
def _in_functorch() -> bool:
    return torch._C._are_functorch_transforms_active()


def out_size(size: int, kernel: int, stride: int, padding: int, dilation: int) -> int:
    return (size + 2 * padding - dilation * (kernel - 1) - 1) // stride + 1


def _linear_shape(x: Tensor, *others: Any) -> Tensor:
    rows, columns = others[4:6]  # after values, index, starts, bias
    torch._check(x.shape[-1] == columns, lambda: f"secateur: expected x to have {columns} columns, but it has {x.shape[-1]}")
    return x.new_empty((*x.shape[:-1], rows))


def _conv_shape(x: Tensor, *others: Any) -> Tensor:
    rows, columns, window = others[5], others[6], others[10]  # after values, index, starts, bias, plus
    channels = columns // (window[0] * window[1])
    torch._check(x.shape[1] == channels, lambda: f"secateur: expected x to have {channels} channels, but it has {x.shape[1]}")
    return x.new_empty((x.shape[0], rows, *_out_sizes(x.shape, window)))


def _out_sizes(images: Sequence[int], window: Sequence[int]) -> list[int]:
    return [out_size(images[2 + i], *window[i::2]) for i in range(2)]


def _pool_shape(x: Tensor, window: list[int], isa: int = 0) -> Tensor:
    return x.new_empty((*x.shape[:2], *_out_sizes(x.shape, window)))


STEP = 19  # numbers of a step of a chain: source, plus, values, index, starts, bias, rows, columns, r, set, relu, window


def _chain_shapes(given: list[Tensor], weights: list[Tensor], steps: list[int], results: list[int]) -> list[Tensor]:
    values = list(given)
    for at in range(0, len(steps), STEP):
        source, (rows, columns), window = steps[at], steps[at + 6 : at + 8], steps[at + 11 : at + STEP]
        values.append(_conv_shape(values[source], *[None] * 5, rows, columns, None, None, None, window))
    return [values[i] for i in results]


def _keep_linear(ctx: Any, inputs: tuple, output: Tensor) -> None:
    x, values, index, starts, bias, rows, columns, r, size, relu = inputs[:10]
    ctx.save_for_backward(x, values, index, starts, output if relu else None)
    ctx.shape, ctx.has_bias, ctx.others = (rows, columns, r, size), bias is not None, len(inputs) - 5


def _linear_backward(ctx: Any, grad: Tensor) -> tuple:
    x, values, index, starts, output = ctx.saved_tensors
    grad = (grad if output is None else grad * (output > 0)).reshape(-1, ctx.shape[0])
    of_x = of_values = of_bias = None
    if ctx.needs_input_grad[0]:
        of_x = (grad @ dense(values, index, starts, ctx.shape)).view(x.shape)
    if ctx.needs_input_grad[1]:
        of_values = _of_values(grad.mT @ x.reshape(-1, ctx.shape[1]), values, index, starts, ctx.shape)
    if ctx.has_bias:
        of_bias = grad.sum(0)
    return of_x, of_values, None, None, of_bias, *[None] * ctx.others


def _keep_conv(ctx: Any, inputs: tuple, output: Tensor) -> None:
    x, values, index, starts, bias, plus, rows, columns, r, size, relu, window = inputs[:12]
    ctx.save_for_backward(x, values, index, starts, output if relu else None)
    ctx.shape, ctx.window = (rows, columns, r, size), list(window)
    ctx.has_bias, ctx.has_plus, ctx.others = bias is not None, plus is not None, len(inputs) - 6


def _conv_backward(ctx: Any, grad: Tensor) -> tuple:
    x, values, index, starts, output = ctx.saved_tensors
    grad = grad if output is None else grad * (output > 0)
    w = ctx.window
    weight = dense(values, index, starts, ctx.shape).view(ctx.shape[0], x.shape[1], *w[:2])
    of_x, of_weight, of_bias = torch.ops.aten.convolution_backward(
        grad, x, weight, [ctx.shape[0]] if ctx.has_bias else None, w[2:4], w[4:6], w[6:8], False, [0, 0], 1,
        [ctx.needs_input_grad[0], ctx.needs_input_grad[1], ctx.has_bias],
    )  # fmt: skip
    of_values = None if of_weight is None else _of_values(of_weight.flatten(1), values, index, starts, ctx.shape)
    return of_x, of_values, None, None, of_bias if ctx.has_bias else None, grad if ctx.has_plus else None, *[None] * ctx.others


def kept(values: Tensor) -> Tensor:
    """The values, zeros among them as constants: a block of several rows brings zeros with it, and the pattern is fixed."""
    return values if values.shape[1] == 1 else torch.where(values != 0, values, 0.0)


def _of_values(of_weight: Tensor, values: Tensor, index: Tensor, starts: Tensor, shape: tuple[int, int, int, int]) -> Tensor:
    """The derivative by every value, from that by the matrix (rows, columns), as it would come through `kept`."""
    rows, columns, r, size = shape
    b, k = Layout(of_weight, index, starts, rows, columns, r, size).places()
    blocks = -(-rows // r)
    padded = torch.cat([of_weight, of_weight.new_zeros(blocks * r - rows, columns)]).view(blocks, r, columns)
    found = padded[b, :, k]
    return found if r == 1 else torch.where(values != 0, found, 0.0)


# What torch's counter of operations gets: two for each multiply-accumulate of the dense layer, so that a sparse model is counted like the one it was
# made of. They take shapes.


def _linear_flops(x: Sequence[int], *others: Any, **_kwargs: Any) -> int:
    return 2 * prod(x) * others[4]  # rows


def _conv_flops(x: Sequence[int], *others: Any, out_shape: Sequence[int], **_kwargs: Any) -> int:
    return 2 * prod(out_shape) * others[6]  # columns


def _chain_flops(given: list[Sequence[int]], weights: Any, steps: list[int], results: Any, **_kwargs: Any) -> int:
    shapes, total = list(given), 0
    for at in range(0, len(steps), STEP):
        images, (rows, columns) = shapes[steps[at]], steps[at + 6 : at + 8]
        shapes.append((images[0], rows, *_out_sizes(images, steps[at + 11 : at + STEP])))
        total += 2 * prod(shapes[-1]) * columns
    return total


FLOPS: dict[str, Any] = {"sparse_linear": _linear_flops, "sparse_decode": _linear_flops, "sparse_conv2d": _conv_flops, "sparse_chain": _chain_flops}
