"""The layers of a model that training can make sparse, found among its modules: there are no example inputs to trace it with.

Linear layers (those of attention too) and convolutions whose weight is a parameter of their own. Embeddings, norms, recurrences, transposed
convolutions and weights that are used under two names stay dense, as in `sparsify`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from fractions import Fraction

import torch
from torch import Tensor, nn

from secateur.errors import InputError
from secateur.masks.network import columns
from secateur.masks.select import Selection
from secateur.pattern import NM, Kernels, Pattern, choose, limited, of_kernel, whole
from secateur.repair.layers import Layer
from secateur.trace.tracer import named_by

_CONVS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_ATTENTION = ("in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight")


def plain(model: nn.Module) -> nn.Module:
    """The module itself, where `torch.compile` was put around it: its names are those of plans and files.

    Raises:
        InputError: it is no module.
    """
    found = getattr(model, "_orig_mod", model)
    if not isinstance(found, nn.Module):
        raise InputError(f"model is a {type(model).__name__}, not a torch.nn.Module.\n  Pass the module itself.")
    return found


def layers_of(model: nn.Module, pattern: Pattern, ignore: Sequence[str] = ()) -> Selection:
    """What can be made sparse in this pattern, by the name of the weight, and why the rest stays dense.

    Raises:
        InputError: there is none, or `ignore` names nothing.
    """
    names: dict[int, list[str]] = {}
    for name, p in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(p), []).append(name)
    for one in ignore:
        if not any(named_by(n, (one,)) for known in names.values() for n in known):
            raise InputError(f"ignore names {one!r}, and no module or weight of {type(model).__name__} is called that.\n"
                             f"  Weights are called like {next(iter(names.values()), ['none'])[0]!r}; * and ? stand for letters.")  # fmt: skip
    chosen = Selection({})
    for layer, weight in _candidates(model):
        if any(named_by(n, ignore) for n in names[id(weight)]):
            continue
        why = "its weight is used in more than one place" if len(names[id(weight)]) > 1 else _misfit(layer, weight, pattern)
        why = why or ("" if weight.requires_grad else "its weight is not trained")
        if why:
            chosen.left[layer.name] = why
        else:
            chosen.layers[layer.weight] = layer
    if not chosen.layers:
        said = "; ".join(chosen.notes()) or "it has no linear layer and no convolution with a weight of its own"
        raise InputError(f"no layer of {type(model).__name__} can be made sparse with the pattern {pattern}: {said}.\n"
                         "  Choose another pattern, or ignore fewer layers.")  # fmt: skip
    return chosen


def weights_of(model: nn.Module) -> list[str]:
    """The weights of the linear layers (those of attention too) and convolutions among the modules, by name."""
    return [layer.weight for layer, _ in _candidates(model)]


def _candidates(model: nn.Module) -> Iterator[tuple[Layer, nn.Parameter]]:
    for path, module in model.named_modules():
        more: dict = {}
        held: tuple[str, ...] = ("weight",)
        if isinstance(module, _CONVS):
            more = {"groups": module.groups, "window": {"kernel": module.kernel_size}}
        elif isinstance(module, nn.MultiheadAttention):
            held = _ATTENTION
        elif type(module).__name__ == "Conv1D":  # of transformers: a linear layer that stores inputs first
            more = {"transposed": True}
        elif not isinstance(module, nn.Linear):
            continue
        for name in held:
            weight = module._parameters.get(name)  # a computed one (weight norm) is no parameter
            if weight is not None and weight.dim() > 1:
                nothing: object = None  # in no trace, so at no node of one
                yield Layer(nothing, nothing, f"{path}.{name}" if path else name, None, **more), weight  # type: ignore[arg-type]


def _misfit(layer: Layer, weight: Tensor, pattern: Pattern) -> str:
    """Why the pattern cannot be put into this layer, '' where it can."""
    rows, cols = (int(s) for s in layer.matrix(torch.empty(weight.shape, device="meta")).shape[1:])  # it may be spread over processes
    r, c = pattern.unit
    if isinstance(pattern, Kernels):
        return ""  # whole in every convolution
    if not all(whole(pattern, (rows, cols))) or c > cols // layer.kernel:
        return f"the pattern {pattern} needs {r} outputs and {c} inputs in a row at least"
    if layer.window and c > 1 and cols // layer.kernel % c:
        return f"its inputs cannot be divided by {c}"
    return ""


def at(pattern: Pattern, keep: Fraction, layer: Layer) -> Pattern | None:
    """The pattern of a layer of which the share `keep` stays; None where nothing goes. On the way to N:M more than N of M stay."""
    if keep >= 1:
        return None
    if not isinstance(pattern, NM):
        return of_kernel(pattern, layer.kernel)
    n = -(-pattern.of * keep.numerator // keep.denominator)
    return NM(n, pattern.of) if n < pattern.of else None


def precise(t: Tensor) -> Tensor:
    """In the widest floating dtype that the device has."""
    return t.detach().float() if t.device.type == "mps" else t.detach().double()


def best(layer: Layer, score: Tensor, pattern: Pattern, keep: Fraction, allowed: Tensor | None = None) -> Tensor:
    """The mask that keeps the highest scores: bool, of the shape of the weight, on its device.

    Args:
        score: one number from 0 on for each weight, in its shape.
        allowed: bool, in its shape: what may stay; None allows all.

    Raises:
        PlanError: scores are NaN.
    """
    now = at(pattern, keep, layer)
    if now is None:
        return torch.ones_like(score, dtype=torch.bool) if allowed is None else allowed.clone()
    given, may = layer.matrix(score), layer.matrix(allowed) if allowed is not None else None
    order = columns(layer, now, given.shape[2]).to(score.device)
    stays = torch.zeros(given.shape, dtype=torch.bool, device=score.device)
    for g in range(len(given)):
        some = given[g][:, order]
        stays[g][:, order] = choose(now, some if may is None else limited(now, some, may[g][:, order]), keep)
    found = layer.stored(stays, torch.empty(score.shape, dtype=torch.bool, device=score.device))
    return found if allowed is None else found & allowed


def largest(layers: Mapping[str, Layer], weights: Mapping[str, Tensor], pattern: Pattern, shares: Mapping[str, Fraction],
            allowed: Mapping[str, Tensor] | None = None) -> dict[str, Tensor]:  # fmt: skip
    """The masks that keep the largest weights, by name: squares, so that those of a block add up. See `best`."""
    return {n: best(x, precise(weights[n]).square(), pattern, shares[n], allowed[n] if allowed is not None else None) for n, x in layers.items()}


def drawn(layers: Mapping[str, Layer], weights: Mapping[str, Tensor], pattern: Pattern, shares: Mapping[str, Fraction],
          random: torch.Generator) -> dict[str, Tensor]:  # fmt: skip
    """Random masks, by name; of one seed the same on every device."""
    return {n: best(x, torch.rand(weights[n].shape, generator=random).to(weights[n].device), pattern, shares[n]) for n, x in layers.items()}
