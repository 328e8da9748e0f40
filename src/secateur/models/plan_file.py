"""The masks of a plan in a folder whose tensors hold them already: plan.json keeps a hash in the place of the bits."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Collection, Mapping
from typing import Any

import numpy as np
from torch import Tensor

from secateur.plan import Plan


def without_bits(plan: Plan, tensors: Mapping[str, Tensor], packed: Collection[str]) -> dict[str, Any]:
    """`plan.to_json()`; a mask whose bits are just those of its weight has `kept` and `sha256` of its bits instead of them.

    Args:
        tensors: every name, other names of tied tensors too, with its tensor. packed: names of those whose masks the file of tensors holds.
    """
    found = plan.to_json()
    for name, entry in found.get("weights", {}).items():
        if name in packed and base64.b64decode(entry["bits"]) == bits_of(tensors[name]):
            held = base64.b64decode(entry.pop("bits"))
            entry.update(kept=int(plan.weights[name].sum()), sha256=hashlib.sha256(held).hexdigest())
    return found


def with_bits(plan: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> tuple[dict[str, Any], list[str]]:
    """The inverse: (the plan as `Plan.from_json` takes it, one sentence for every weight that is not zero where its mask was). Such a weight is
    left out of the plan, for nothing says what its mask was."""
    weights, wrong = dict[str, Any](), list[str]()
    for name, entry in plan.get("weights", {}).items():
        if "bits" in entry:
            weights[name] = entry
        elif name not in tensors:
            wrong.append(f"{name}: the plan masks it, and the folder has no such tensor")
        elif hashlib.sha256(held := bits_of(tensors[name])).hexdigest() == entry["sha256"]:
            weights[name] = {"shape": entry["shape"], "bits": base64.b64encode(held).decode(), "pattern": entry["pattern"]}
        else:
            count = int((tensors[name] != 0).sum())
            said = f"{entry['kept']}" if count != entry["kept"] else "as many, but not the same ones"
            wrong.append(f"{name}: {count} weights are not zero, and the plan keeps {said}")
    return {**plan, **({"weights": weights} if "weights" in plan else {})}, wrong


def bits_of(tensor: Tensor) -> bytes:
    """Where a weight is not zero, packed as the masks of `Plan.to_json`; -0 is zero."""
    return np.packbits((tensor.detach() != 0).cpu().numpy().reshape(-1)).tobytes()
