"""Every structure: groups as declared by hand, and the cut network equal to the hand-written masked reference.

The reference knows nothing of secateur: it multiplies with a mask where a unit is produced, and reduces over the kept
positions where something normalises. Compared in float64: outputs, gradients of the inputs, gradients of the surviving
parameters (found by value in the dense parameter, so a wrong index list cannot hide), shapes, predicted costs.
"""

from __future__ import annotations

import copy

import pytest
import torch

from secateur.measure import count
from secateur.measure.proof import prove
from secateur.plan import Plan
from secateur.surgery import cut as cut_model
from secateur.trace import trace

from .cases import CASES
from .harness import (
    build,
    check_groups,
    everything,
    expected_size,
    gradients,
    leaves,
    logical_keep,
    positions_by_value,
    random_keep,
    relative,
)

SEEDS = (0, 1, 2)
TOLERANCE = 1e-9
every_case = pytest.mark.parametrize("case", CASES, ids=lambda c: c.__name__)


def test_there_are_enough_structures():
    assert len(CASES) >= 45 and len({c.__name__ for c in CASES}) == len(CASES)


@every_case
def test_reference_without_masks_is_the_module(case):
    model = build(case)
    args, kwargs = model.example()
    with torch.no_grad():
        ours, theirs = leaves(model.reference(everything(model), *args, **kwargs)), leaves(model(*args, **kwargs))
    assert len(ours) == len(theirs)
    assert max(relative(a, b) for a, b in zip(ours, theirs, strict=True)) < 1e-12


@pytest.fixture(scope="module")
def traced():
    """Each structure with its graph, made once for all tests of this file."""
    made = {}

    def get(case):
        if case not in made:
            model = build(case)
            args, kwargs = model.example()
            made[case] = model, trace(model, args, kwargs), args, kwargs
        return made[case]

    return get


@every_case
def test_groups_are_the_declared_ones(case, traced):
    model, graph, _, _ = traced(case)
    check_groups(model, graph)
    assert all(frozen.reason for frozen in graph.frozen)
    if hasattr(model, "unknown"):
        assert any(model.unknown in frozen.op + frozen.reason for frozen in graph.frozen)


@every_case
@pytest.mark.parametrize("seed", SEEDS)
def test_cut_is_the_masked_original(case, seed, traced):
    model, graph, args, kwargs = traced(case)
    before, shape = copy.deepcopy(model.state_dict()), repr(model)
    keep = random_keep(graph, seed, model.least)
    plan = Plan(keep=keep, before=graph.cost(), after=graph.cost(keep), why={})
    cut = cut_model(model, graph, plan)
    assert repr(model) == shape
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())

    logical = logical_keep(model, graph, keep)
    small, dense = dict(cut.model.state_dict()), model.state_dict()
    for unit in model.units.values():
        expected = expected_size(graph, keep, unit.tensor, unit.dim, dense[unit.tensor].shape[unit.dim])
        assert small[unit.tensor].shape[unit.dim] == expected, (unit.tensor, unit.dim)

    def reference(*args, **kwargs):
        return model.reference(logical, *args, **kwargs)

    outs, ins, named = gradients(cut.model, cut.model, args, kwargs)
    true_outs, true_ins, true_named = gradients(model, reference, args, kwargs)
    assert len(outs) == len(true_outs)
    for ours, theirs in zip(outs + ins, true_outs + true_ins, strict=True):
        assert relative(ours, theirs) < TOLERANCE
    with torch.no_grad():  # the rewritten graph, handed out where the class cannot follow, is right in every case
        predicted = leaves(cut.predicted(*args, **kwargs))
    assert max(relative(a, b) for a, b in zip(predicted, true_outs, strict=True)) < TOLERANCE
    parameters = dict(model.named_parameters())
    for name, gradient in named.items():
        at = positions_by_value(small[name], parameters[name])
        assert relative(gradient, true_named[name].flatten()[at]) < TOLERANCE, name
    assert count(cut.model, args, kwargs) == plan.after
    assert plan.before == count(model, args, kwargs)
    proof = prove(model, graph, keep, cut.model)
    assert proof.passed, proof
