"""The Plan: who stays. The one value that crosses every border; pure data, no model, no files.

Units stay or go with all their connections (`keep`); single weights stay or become zero where they are (`weights`).
"""

from __future__ import annotations

import base64
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import torch

from secateur.errors import PlanError


@dataclass(frozen=True)
class Cost:
    """Multiply-accumulates of one forward pass, number of parameters, bytes of parameters and buffers."""

    macs: int
    params: int
    bytes: int

    def of(self, dense: Cost) -> dict[str, float]:
        """Each figure as a percentage of the dense model's."""
        return {k: 100.0 * v / max(1, getattr(dense, k)) for k, v in asdict(self).items()}


@dataclass(frozen=True)
class Plan:
    """For every group one boolean per unit: True stays.

    Attributes:
        keep: group name -> bool tensor (units,).
        before: cost of the dense model.
        after: cost predicted for the cut model; `measure` counts the same on it.
        why: how it came about (score, targets, allocation, seed, versions): plain JSON values.
        weights: name of a weight -> bool tensor of its shape: True stays, the others are zero.
        patterns: name of a weight -> its pattern, as `secateur.pattern.written` gives it.
    """

    keep: Mapping[str, torch.Tensor]
    before: Cost
    after: Cost
    why: Mapping[str, Any] = field(default_factory=dict)
    weights: Mapping[str, torch.Tensor] = field(default_factory=dict)
    patterns: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.weights.keys() != self.patterns.keys():
            odd = min(self.weights.keys() ^ self.patterns.keys())
            raise PlanError(f"weight {odd!r} has a mask and no pattern, or a pattern and no mask.\n  Give patterns={{name: 'free'}} beside weights=.")
        for name, mask in self.weights.items():
            if not isinstance(mask, torch.Tensor) or mask.dtype != torch.bool:
                raise PlanError(f"weight {name!r}: its mask is no bool tensor.\n  Pass a torch.bool tensor of the weight's shape (True stays).")
        for name, mask in self.keep.items():
            if not isinstance(mask, torch.Tensor):
                raise PlanError(f"group {name!r}: keep is a {type(mask).__name__}.\n  Pass a 1-d torch.bool tensor (True stays).")
            if mask.dtype != torch.bool or mask.dim() != 1:
                raise PlanError(
                    f"group {name!r}: keep is {mask.dtype} of shape {tuple(mask.shape)}, but a plan holds one bool per unit.\n"
                    "  Pass a 1-d torch.bool tensor (True stays)."
                )

    def __eq__(self, other: object) -> bool:
        return (
            isinstance(other, Plan)
            and self.keep.keys() == other.keep.keys()
            and all(torch.equal(m, other.keep[n]) for n, m in self.keep.items())
            and (self.before, self.after, dict(self.why)) == (other.before, other.after, dict(other.why))
            and self.weights.keys() == other.weights.keys()
            and all(torch.equal(m, other.weights[n]) for n, m in self.weights.items())
            and dict(self.patterns) == dict(other.patterns)
        )

    __hash__ = None  # type: ignore[assignment]  # holds tensors

    @property
    def removed(self) -> dict[str, int]:
        """Units removed, for the groups that lose any."""
        return {n: int((~m).sum()) for n, m in self.keep.items() if not bool(m.all())}

    def then(self, other: Plan) -> Plan:
        """The plan that cuts at once what `self` and then, on the smaller model, `other` cut.

        Raises:
            PlanError: `other` was not made for the model that `self` leaves.
        """
        if self.weights or other.weights:
            raise PlanError("a plan of single weights is for the shapes of one model.\n  Cut first, then mask the cut model with a plan of its own.")
        keep = dict(self.keep)
        left = {n for n, m in keep.items() if int(m.sum()) > 1}
        if not left <= other.keep.keys():
            missing = sorted(left - other.keep.keys())
            raise PlanError(
                f"the first plan leaves {len(left)} groups of more than one unit, and the second does not decide on {missing[0]!r}.\n"
                "  A group named by its place beside others takes a new name when one of those falls to one unit: "
                "keep two units there, or make one plan."
            )
        for name, later in other.keep.items():
            if name not in keep:
                raise PlanError(f"group {name!r} of the second plan is not in the first.\n  Trace the cut model with the same ignore=.")
            first = keep[name]
            if int(first.sum()) != len(later):
                raise PlanError(
                    f"group {name!r}: the first plan leaves {int(first.sum())} units, the second decides on {len(later)}.\n"
                    "  Trace the model that the first plan cut, and plan on that."
                )
            both = first.clone()
            both[first] = later
            keep[name] = both
        return Plan(keep, self.before, other.after, {"first": dict(self.why), "then": dict(other.why)})

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values; masks as base64 of packed bits, most significant bit first."""
        keep = {n: {"units": len(m), "bits": _bits(m)} for n, m in self.keep.items()}
        found = {"keep": keep, "before": asdict(self.before), "after": asdict(self.after), "why": dict(self.why)}
        if self.weights:
            found["weights"] = {n: {"shape": list(m.shape), "bits": _bits(m), "pattern": self.patterns[n]} for n, m in self.weights.items()}
        return found

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Plan:
        """The inverse of `to_json`.

        Raises:
            PlanError: a field is missing or a mask is shorter than its units.
        """
        try:
            keep = {name: _unpacked(f"group {name!r}", m["bits"], [m["units"]]) for name, m in data["keep"].items()}
            held = data.get("weights", {})
            if apart := [name for name, m in held.items() if "bits" not in m and "sha256" in m]:
                raise PlanError(f"the mask of {apart[0]!r} is not in the plan but in the tensors of its folder.\n"
                                "  Read the folder with secateur.models.folder.read.")  # fmt: skip
            weights = {name: _unpacked(f"weight {name!r}", m["bits"], m["shape"]) for name, m in held.items()}
            patterns = {name: str(m["pattern"]) for name, m in held.items()}
            return cls(keep, Cost(**data["before"]), Cost(**data["after"]), data["why"], weights, patterns)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise PlanError(f"this is not a plan: {error}.\n  Write it again with Plan.to_json().") from error


def _bits(mask: torch.Tensor) -> str:
    return base64.b64encode(np.packbits(mask.cpu().numpy().reshape(-1)).tobytes()).decode()


def _unpacked(what: str, text: str, shape: Sequence[int]) -> torch.Tensor:
    bits, size = np.unpackbits(np.frombuffer(base64.b64decode(text), np.uint8)), math.prod(shape)
    if not size <= len(bits) < size + 8 or any(n < 0 for n in shape):
        raise ValueError(f"{what} says {list(shape)}, {size} units, and carries {len(bits)} bits")
    return torch.from_numpy(bits[:size].astype(bool)).reshape(tuple(shape))
