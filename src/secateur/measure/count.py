"""Exact counts: multiply-accumulates, parameters, bytes.

MACs are counted by watching the operators that run, so a module called twice counts twice and a branch not taken counts
nothing. Matrix products, convolutions, attention and recurrent layers count; biases, norms, activations, distances and products
of elements (an outer product is one) do not. Causal attention counts as the full square, and weights with zeros count as if they had none,
in sparse layers and sparse tensors too. Works on any device, the meta device included, where nothing is computed.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping
from contextlib import nullcontext
from math import prod
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from secateur.measure.run import at_rest, forward, inputs_on
from secateur.plan import Cost

aten = torch.ops.aten
Shape = tuple[int, ...]


def count(model: nn.Module, args: tuple, kwargs: Mapping[str, Any] | None = None) -> Cost:
    """MACs of one forward, parameters and bytes of the model.

    ``args`` and ``kwargs`` are what ``forward`` takes; the MACs are those of the whole batch. The model runs in
    evaluation mode and is left as it was. Raises InputError if it cannot run on these inputs.
    """
    args, kwargs = inputs_on(model, args, kwargs)
    params, size = count_params(model), count_bytes(model)  # before the run: forward() may cache tensors of its own
    counter = FlopCounterMode(display=False, custom_mapping={**FORMULAS, **_foreign()})
    counter.mod_tracker = _NoModules()  # type: ignore[assignment]  # it only has to be entered and to name parents
    with at_rest(model), counter:
        forward(model, args, kwargs)
    return Cost(macs=int(counter.get_total_flops()) // 2, params=params, bytes=size)


def _foreign() -> dict[Any, Any]:
    """Formulas for matrix products that other libraries register as one op, if they did, and for linear layers in int8 where torch has them."""
    experts = getattr(torch.ops.transformers, "grouped_mm_fallback", None)
    int8 = (getattr(torch.ops.quantized, f"linear{kind}", None) for kind in ("", "_relu", "_dynamic", "_relu_dynamic", "_dynamic_fp16"))
    return {op: formula for op, formula in [(experts, _grouped_mm), *((op, _packed_linear) for op in int8)] if op is not None}


class _NoModules(nullcontext):
    """Stands in for torch's module tracker, which breaks where a leaf parameter is an argument of a module."""

    parents = frozenset({"Global"})


def count_params(model: nn.Module) -> int:
    """Numbers in all parameters; tied ones count once, whether they are one object or two views of one storage."""
    return sum(tensor.numel() for tensor in distinct(model.parameters()))


def count_bytes(model: nn.Module) -> int:
    """Bytes of parameters and buffers in their own dtypes; what is shared counts once.

    Tensors that overlap in one storage never count for more than the storage; a view counts only what it shows.
    """
    seen: dict[int, int] = defaultdict(int)
    limit: dict[int, int] = {}
    for tensor in distinct([*model.parameters(), *model.buffers()]):
        storage = tensor.untyped_storage()
        seen[storage._cdata] += tensor.numel() * tensor.element_size()
        limit[storage._cdata] = storage.nbytes()
    return sum(min(size, limit[key]) for key, size in seen.items())


def _parts(t: Tensor) -> list[Tensor]:
    """What a sparse tensor stores; a tensor itself."""
    if t.layout == torch.sparse_coo:
        return [t._indices(), t._values()]
    if t.layout in (torch.sparse_csr, torch.sparse_bsr):
        return [t.crow_indices(), t.col_indices(), t.values()]
    if t.layout in (torch.sparse_csc, torch.sparse_bsc):
        return [t.ccol_indices(), t.row_indices(), t.values()]
    return [t]


def distinct(tensors: Iterable[Tensor]) -> list[Tensor]:
    """The tensors without repetitions: same storage, same offset, same shape and strides is the same tensor."""
    dense = [part for t in tensors for part in _parts(t)]
    found = {(t.untyped_storage()._cdata, t.storage_offset(), t.shape, t.stride()): t for t in dense}
    return list(found.values())


# The formulas below return FLOPs, two for each multiply-accumulate, because torch's counter adds its own to them.
# They take shapes: the counter replaces every tensor argument by its shape.


def _attention(query: Shape, key: Shape, value: Shape, *_args: Any, **_kwargs: Any) -> int:
    """softmax(QK^T)V. Query (..., H, L, D), key (..., K, S, D), value (..., K, S, E); K of H heads may share."""
    *outer, length, depth = query
    return 2 * prod(outer) * length * key[-2] * (depth + value[-1])


def _mv(matrix: Shape, vector: Shape, **_kwargs: Any) -> int:
    return 2 * prod(matrix)


def _addmv(bias: Shape, matrix: Shape, vector: Shape, **_kwargs: Any) -> int:
    return 2 * prod(matrix)


def _dot(a: Shape, b: Shape, **_kwargs: Any) -> int:
    return 2 * prod(a)


def _addbmm(bias: Shape, a: Shape, b: Shape, **_kwargs: Any) -> int:
    return 2 * prod(a) * b[-1]


def _mm(a: Shape, b: Shape, **_kwargs: Any) -> int:
    return 2 * prod(a) * b[-1]


def _packed_linear(x: Shape, packed: Any, *_args: Any, out_shape: Shape, **_kwargs: Any) -> int:
    return 2 * prod(x) * out_shape[-1]


def _grouped_mm(a: Shape, b: Shape, *_args: Any, **_kwargs: Any) -> int:
    """Rows of ``a`` (M, K) shared out over matrices ``b`` (G, K, N): each row meets one of them. Also 3-d with 3-d."""
    if len(a) == 2 and len(b) == 2:  # (M, sum K) with (sum K, N): the groups lie along K
        return 2 * a[0] * a[1] * b[1]
    return 2 * prod(a) * b[-1] if len(b) == 3 else 2 * prod(a) * b[-1] // a[0]


def _trilinear(first: Shape, weight: Shape, second: Shape, *_args: Any, **_kwargs: Any) -> int:
    """nn.Bilinear: first (N, I), weight (O, I, J), second (N, J). One accumulate for every weight and row."""
    return 2 * prod(weight) * prod(first[:-1])


def _rnn_layer(x: Shape, w_input: Shape, w_hidden: Shape, *_args: Any, **_kwargs: Any) -> int:
    """One layer and direction of an LSTM on the CPU. x (T, N, I): every weight meets every step of every row."""
    return 2 * prod(x[:-1]) * (prod(w_input) + prod(w_hidden))


def _fused_rnn(x: Shape, weights: list[Shape], *_args: Any, **_kwargs: Any) -> int:
    """All layers at once on a GPU. x (T, N, I) or, packed, (sum of lengths, I); biases have one dimension."""
    return 2 * prod(x[:-1]) * sum(prod(weight) for weight in weights if len(weight) == 2)


FORMULAS: dict[Any, Any] = {
    aten._scaled_dot_product_flash_attention_for_cpu: _attention,
    aten._scaled_dot_product_flash_attention: _attention,
    aten._scaled_dot_product_efficient_attention: _attention,
    aten._scaled_dot_product_cudnn_attention: _attention,
    aten._scaled_dot_product_fused_attention_overrideable: _attention,
    aten.mv: _mv,
    aten.addmv: _addmv,
    aten.dot: _dot,
    aten.vdot: _dot,
    aten.addbmm: _addbmm,
    aten._int_mm: _mm,
    aten._sparse_addmm: _addbmm,
    aten._sparse_sparse_matmul: _mm,
    aten._grouped_mm: _grouped_mm,
    aten._trilinear: _trilinear,
    aten.mkldnn_rnn_layer: _rnn_layer,
    aten._cudnn_rnn: _fused_rnn,
    aten.miopen_rnn: _fused_rnn,
}
