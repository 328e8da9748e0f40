"""Torch-Pruning on the same models: half of the channels of every layer, its magnitude importance (L2), its settings.

Run as `python -m benchmarks.zoo.torch_pruning NAME OUT.json` for one model; `benchmarks.zoo.run` calls it for the list.
Settings follow the library's own examples: head counts declared for every attention projection, whole heads removed
where positions are rotary, fused gate-and-up projections declared as two groups, attributes repaired after the cut.
Layers that produce the outputs are found for it and ignored. It succeeds when it finishes, the forward runs, the
output shapes are unchanged and fewer multiply-accumulates are left; whether the result is right is not asked.
"""

from __future__ import annotations

import sys
import time
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from benchmarks.zoo import catalogue, guard, torchvision_models

QKV = (("qkv",), ("qkv_proj",), ("q_proj", "k_proj", "v_proj"), ("query", "key", "value"), ("q_lin", "k_lin", "v_lin"))
QKV += (("q", "k", "v"), ("query_key_value",), ("Wqkv",), ("q", "kv"))
HEADS = ("num_heads", "num_attention_heads", "n_heads", "n_head")
MULTIPLY = ("AddmmBackward0", "MmBackward0", "ConvolutionBackward0")


def tensors(output: Any) -> list[Tensor]:
    """The tensors of any nested output, in order."""
    return [leaf for leaf in tree_leaves(output) if isinstance(leaf, Tensor)]


def output_layers(model: nn.Module, output: Any) -> list[nn.Module]:
    """Layers whose weight is the last one before an output: cutting their channels would change the output's shape."""
    owner = {id(p): m for m in model.modules() for p in m.parameters(recurse=False)}
    stack = [t.grad_fn for t in tensors(output) if t.grad_fn is not None]
    seen: set[Any] = set()
    found: list[nn.Module] = []
    while stack:
        node = stack.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if hasattr(node, "variable"):
            if node.variable.dim() > 1 and id(node.variable) in owner:
                found.append(owner[id(node.variable)])
            continue
        children = [child for child, _ in node.next_functions if child is not None]
        if node.name() in MULTIPLY:  # only its weight is followed, through at most a transpose
            children = [c for c in children if hasattr(c, "variable") or c.name() == "TBackward0"]
        stack.extend(children)
    return found


def attention(model: nn.Module) -> tuple[dict[nn.Module, int], list[tuple[nn.Module, tuple[str, ...], str]]]:
    """Head counts for every attention projection, and (module, projection names, name of its head count)."""
    heads: dict[nn.Module, int] = {}
    places = []
    config = getattr(model, "config", None)
    for module in model.modules():
        field = next((f for f in HEADS if isinstance(getattr(module, f, None), int)), "")
        count = getattr(module, field) if field else getattr(config, "num_attention_heads", None)
        names = next((n for n in QKV if all(isinstance(getattr(module, p, None), nn.Linear) for p in n)), None)
        if names is None or not isinstance(count, int):
            continue
        few = getattr(module, "num_key_value_heads", None) or getattr(config, "num_key_value_heads", None) or count
        for name in names:
            heads[getattr(module, name)] = few if name in ("k_proj", "v_proj") else count
        places.append((module, names, field))
    return heads, places


def repair(places: list[tuple[nn.Module, tuple[str, ...], str]], heads: dict[nn.Module, int]) -> None:
    """Set the attributes that the forward of an attention module reads, as the library's examples do."""
    for module, names, field in places:
        first = getattr(module, names[0])
        count = heads[first]
        width = first.out_features // (3 if len(names) == 1 else 1)
        if field:
            setattr(module, field, count)
        for name in ("head_dim", "attention_head_size"):
            if isinstance(getattr(module, name, None), int):
                setattr(module, name, width // count)
        for name in ("all_head_size", "hidden_size", "embed_dim", "attn_dim", "dim", "split_size"):
            if isinstance(getattr(module, name, None), int):
                setattr(module, name, width)
        if isinstance(getattr(module, "num_key_value_groups", None), int) and len(names) == 3:
            module.num_key_value_groups = count // max(1, heads[getattr(module, names[1])])


def ignored(name: str, model: nn.Module, output: Any) -> list[nn.Module]:
    """Output layers, the attention output layer of torch's own module, and parts its examples leave alone."""
    layers = output_layers(model, output)
    layers += [m for m in model.modules() if isinstance(m, nn.modules.linear.NonDynamicallyQuantizableLinear)]
    if "rcnn" in name:
        parts = ("backbone.fpn", "box_head", "box_predictor", "mask_head", "mask_predictor", "keypoint_head")
        layers += [m for part, m in model.named_modules() if part in (*parts, "keypoint_predictor")]
    if "/ssd" in name:
        layers.append(model.get_submodule("head"))
    return layers


def prune(name: str, example: catalogue.Example) -> nn.Module:
    """Half the channels of every layer, in place. Whatever the library raises goes through."""
    import torch_pruning as tp

    model = example.model
    for parameter in model.parameters():
        parameter.requires_grad_(True)
    output = model(*example.args, **example.kwargs)
    heads, places = attention(model)
    rotary = any("rotary" in part.lower() for part, _ in model.named_modules())
    pruner = tp.pruner.BasePruner(
        model,
        example.kwargs or example.args,
        importance=tp.importance.MagnitudeImportance(p=2),
        pruning_ratio=0.5,
        ignored_layers=ignored(name, model, output),
        num_heads=heads,
        prune_num_heads=rotary,
        prune_head_dims=not rotary,
        head_pruning_ratio=0.5 if rotary else 0.0,
        out_channel_groups={m.gate_up_proj: 2 for m in model.modules() if hasattr(m, "gate_up_proj")},
        forward_fn=(lambda m, _: m(*example.args, **example.kwargs)),
        output_transform=lambda out: [t for t in tensors(out) if t.requires_grad],
    )
    pruner.step()
    repair(places, pruner.num_heads)
    if hasattr(model, "hidden_dim") and hasattr(model, "conv_proj"):  # torchvision's vision transformer reads it
        model.hidden_dim = model.conv_proj.out_channels
    return model


def work(name: str, out: Path) -> None:
    """Build, prune and check one model; the row goes to `out`."""
    torchvision_models.library()
    import timm.layers

    from secateur.measure import count

    timm.layers.set_fused_attn(False)  # as its own example does
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    row: dict[str, Any] = {"model": name, "ok": False, "stage": "build"}
    guard.write(out, row)
    example = catalogue.find(name).build()
    shapes = [tuple(t.shape) for t in tensors(example.model(*example.args, **example.kwargs))]
    row["macs_before"] = count(example.model, example.args, example.kwargs).macs
    row["stage"] = "prune"
    guard.write(out, row)
    start = time.perf_counter()
    try:
        model = prune(name, example)
        row |= {"prune_s": round(time.perf_counter() - start, 3), "stage": "forward"}
        after = [tuple(t.shape) for t in tensors(model(*example.args, **example.kwargs))]
        row["macs_after"] = count(model, example.args, example.kwargs).macs
        row["same_shape"] = after == shapes
        row["ok"] = row["same_shape"] and row["macs_after"] < row["macs_before"]
        if not row["ok"]:
            row["error"] = "nothing was pruned" if row["same_shape"] else "the output changed its shape"
    except Exception as error:  # the failure is the result
        row["error"] = f"{type(error).__name__}: {error}".strip()[:300]
    guard.write(out, row)


if __name__ == "__main__":
    work(sys.argv[1], Path(sys.argv[2]))
