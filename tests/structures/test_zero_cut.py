"""Cutting nothing changes nothing, bit for bit."""

from __future__ import annotations

import pytest
import torch

from secateur.plan import Plan
from secateur.surgery import cut as cut_model
from secateur.trace import trace

from .cases import CASES
from .harness import build, leaves


@pytest.mark.parametrize("case", CASES, ids=lambda c: c.__name__)
def test_cutting_nothing_changes_nothing(case):
    model = build(case)
    args, kwargs = model.example()
    graph = trace(model, args, kwargs)
    keep = {name: torch.ones(group.size, dtype=torch.bool) for name, group in graph.groups.items()}
    cost = graph.cost()
    assert graph.cost(keep) == cost
    cut = cut_model(model, graph, Plan(keep=keep, before=cost, after=cost, why={}))
    assert not cut.edits
    dense, small = model.state_dict(), cut.model.state_dict()
    assert dense.keys() == small.keys()
    assert all(torch.equal(small[name], value) for name, value in dense.items())
    assert all(a.data_ptr() != b.data_ptr() for a, b in zip(model.parameters(), cut.model.parameters(), strict=True))
    with torch.no_grad():
        ours, theirs = leaves(cut.model(*args, **kwargs)), leaves(model(*args, **kwargs))
    assert len(ours) == len(theirs) and all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))
