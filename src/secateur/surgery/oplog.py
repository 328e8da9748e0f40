"""What a module really runs: its arithmetic with the shapes it sees, as a list that two modules can be compared by."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten

from secateur.measure.float64 import InFloat64, double, doubled
from secateur.measure.run import at_rest, untouched

# Ops that carry the arithmetic of a network. Views, casts, masks and factories are left out: Python may reach the
# same numbers through other views than the captured graph does.
_ARITHMETIC = frozenset(
    "convolution _convolution mm addmm bmm baddbmm mv addmv dot native_batch_norm native_layer_norm native_group_norm "
    "_fused_rms_norm _softmax embedding lstm gru mkldnn_rnn_layer _grouped_mm mean sum linalg_vector_norm _weight_norm "
    "_scaled_dot_product_flash_attention_for_cpu _scaled_dot_product_attention_math max_pool2d_with_indices "
    "_adaptive_avg_pool2d avg_pool2d upsample_bilinear2d upsample_nearest2d".split()
)
Row = tuple[str, tuple]


class OpLog(TorchDispatchMode):
    """Records (op, shapes of its tensor arguments)."""

    def __init__(self) -> None:
        super().__init__()
        self.rows: list[Row] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._schema.name.split("::")[1]
        if name in _ARITHMETIC:
            flat, _ = tree_flatten((args, kwargs or {}))
            self.rows.append((name, tuple(tuple(a.shape) for a in flat if isinstance(a, torch.Tensor))))
        return func(*args, **(kwargs or {}))


def op_log(model: torch.nn.Module, args: tuple, kwargs: dict) -> list[Row]:
    """The op log of one forward in evaluation mode. It really runs: that is quicker than pushing shapes through."""
    with at_rest(model), untouched(args, kwargs), OpLog() as log:
        model(*args, **kwargs)
    return log.rows


def outputs_in_float64(model: torch.nn.Module, args: tuple, kwargs: dict) -> Any:
    """Outputs of a copy on the CPU in float64, in which two ways to compute one thing agree to 1e-9; a meta model as
    it is."""
    if not any(p.device.type == "meta" for p in model.parameters()):
        model, args, kwargs = doubled(model), double(args), double(kwargs)
    with at_rest(model), InFloat64():
        return model(*args, **kwargs)


def first_difference(a: list[Row], b: list[Row]) -> str | None:
    """Where two logs part, in words; None where they agree."""
    for i, (x, y) in enumerate(zip(a, b, strict=False)):
        if x != y:
            return f"op {i}: the module runs {x[0]}{list(x[1])}, the graph predicts {y[0]}{list(y[1])}"
    if len(a) != len(b):
        return f"the module runs {len(a)} arithmetic ops, the graph predicts {len(b)}"
    return None


class _Reading(TorchDispatchMode):
    """Whether any op takes memory of these addresses."""

    def __init__(self, places: set[int]) -> None:
        super().__init__()
        self.places, self.found = places, False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        flat, _ = tree_flatten((args, kwargs or {}))
        self.found |= any(isinstance(a, torch.Tensor) and a.layout == torch.strided and _place(a) in self.places for a in flat)
        return func(*args, **(kwargs or {}))


def reads(model: torch.nn.Module, tensors: Iterable[torch.Tensor], args: tuple, kwargs: Mapping[str, Any]) -> bool:
    """Whether a forward of `model` computes with the memory of any of these tensors: a function among the attributes of a copy still means the
    model that it was made in."""
    places = {_place(t) for t in tensors if t.layout == torch.strided} - {0}  # 0: on the meta device
    with at_rest(model), untouched(args, kwargs), _Reading(places) as seen:
        model(*args, **kwargs)
    return seen.found


def _place(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage().data_ptr()
