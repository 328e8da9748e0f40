"""Whether a saved folder is what it says: its hashes, and for single weights exactly the zeros of its plan."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from secateur.errors import FormatError, PlanError
from secateur.masks.exact import illegal, wrong_zeros
from secateur.models.atomic import MARK, TENSORS
from secateur.models.folder import read
from secateur.plan import Plan


@dataclass(frozen=True)
class Verified:
    """
    Attributes:
        folder: what was looked at. files: how many were hashed.
        weights: layers with a mask; size: their weights; zeros: how many of them are zero.
        stored, dense: bytes of the file of tensors, and of the tensors in it where none is packed.
        problems: one sentence for each thing that is wrong.
    """

    folder: str
    files: int
    weights: int = 0
    size: int = 0
    zeros: int = 0
    problems: tuple[str, ...] = ()
    stored: int = 0
    dense: int = 0

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def verify(folder: str | Path) -> Verified:
    """Read a folder that `save` wrote and check it.

    Returns what was found. Raises FormatError where the folder cannot be read at all: a file is missing, cut short or
    altered, or it is not ours.
    """
    saved = read(folder)
    files = len(saved.document["files"]) + 1
    try:
        plan = Plan.from_json(saved.document["plan"])
    except PlanError as error:
        raise FormatError(f"{saved.folder / MARK} holds no plan: {error}") from error
    aliases = saved.document["aliases"]
    state: dict[str, Tensor] = {n: saved.tensors[aliases.get(n, n)] for n in plan.weights if aliases.get(n, n) in saved.tensors}
    problems = [*saved.unlike, *(f"{n}: the plan masks it, and the folder has no such tensor" for n in plan.weights if n not in state)]
    fitting = {n: m for n, m in plan.weights.items() if n in state and state[n].shape == m.shape}
    for n in state.keys() - fitting.keys():
        problems.append(f"{n}: is {tuple(state[n].shape)}, and its mask is {tuple(plan.weights[n].shape)}")
    problems += wrong_zeros(state, fitting) + illegal(fitting, plan.patterns)
    size = sum(state[n].numel() for n in fitting)
    zeros = sum(int((state[n] == 0).sum()) for n in fitting)
    stored, dense = (saved.folder / TENSORS).stat().st_size, sum(t.nbytes for t in saved.tensors.values())
    return Verified(str(saved.folder), files, len(fitting), size, zeros, tuple(problems), stored, dense)
