"""Every structure: groups as declared by hand, and the cut network equal to the hand-written masked reference."""

from __future__ import annotations

import pytest
import torch

from .cases import CASES
from .harness import build, everything, leaves, relative


@pytest.mark.parametrize("case", CASES, ids=lambda c: c.__name__)
def test_reference_without_masks_is_the_module(case):
    model = build(case)
    args, kwargs = model.example()
    with torch.no_grad():
        ours, theirs = leaves(model.reference(everything(model), *args, **kwargs)), leaves(model(*args, **kwargs))
    assert len(ours) == len(theirs)
    assert max(relative(a, b) for a, b in zip(ours, theirs, strict=True)) < 1e-12


def test_there_are_enough_structures():
    assert len(CASES) >= 45 and len({c.__name__ for c in CASES}) == len(CASES)
