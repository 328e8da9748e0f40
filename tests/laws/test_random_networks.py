"""The laws of the architecture on random networks.

SECATEUR_LAWS says how many networks (60 by default; `SECATEUR_LAWS=500 pytest tests/laws` is the long run).
"""

from __future__ import annotations

import json
import os

import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings

from secateur.budget import MACs, plan
from secateur.errors import TargetError
from secateur.measure import count
from secateur.measure.proof import masked_outputs, prove
from secateur.plan import Plan
from secateur.score import l2
from secateur.surgery import cut as cut_model
from secateur.trace import trace

from .networks import build, example, recipes

NETWORKS = int(os.environ.get("SECATEUR_LAWS", "60"))
laws = settings(
    max_examples=NETWORKS,
    deadline=None,
    derandomize="SECATEUR_LAWS" not in os.environ,
    suppress_health_check=list(HealthCheck),
    print_blob=True,
    phases=(Phase.explicit, Phase.reuse, Phase.generate),  # shrinking re-exports hundreds of networks: many minutes
)


def random_keep(graph, seed: int, least: int = 1) -> dict[str, torch.Tensor]:
    """A mask per group, at least `least` units kept."""
    generator = torch.Generator().manual_seed(seed)
    keep = {}
    for name, group in sorted(graph.groups.items()):
        some = int(torch.randint(min(least, group.size), group.size + 1, (1,), generator=generator))
        keep[name] = torch.zeros(group.size, dtype=torch.bool)
        keep[name][torch.randperm(group.size, generator=generator)[:some]] = True
    return keep


def planned(graph, keep) -> Plan:
    return Plan(keep=keep, before=graph.cost(), after=graph.cost(keep), why={"seed": 3})


@given(recipes())
@laws
def test_cut_is_the_masked_original_and_costs_what_the_plan_says(recipe):
    model, x = build(recipe), example(recipe)
    dense = {name: value.clone() for name, value in model.state_dict().items()}
    graph = trace(model, (x,))
    assert count(model, (x,)) == graph.cost()
    made = planned(graph, random_keep(graph, recipe.seed))
    cut = cut_model(model, graph, made)
    assert all(torch.equal(value, dense[name]) for name, value in model.state_dict().items())
    proof = prove(model, graph, made.keep, cut.model)
    assert proof.passed, (proof, cut.how)
    assert prove(model, graph, made.keep, cut.predicted).passed
    assert count(cut.model, (x,)) == made.after
    assert Plan.from_json(json.loads(json.dumps(made.to_json()))) == made

    # gradients of the inputs and of the surviving weights
    state = {name: dense[name].requires_grad_() for name, _ in model.named_parameters()}
    ours, theirs = x.clone().requires_grad_(), x.clone().requires_grad_()
    weights = torch.randn(2, 1, 3, generator=torch.Generator().manual_seed(5), dtype=x.dtype)
    (cut.model(ours) * weights).sum().backward()
    (masked_outputs(graph, made.keep, {**dense, **state}, (theirs,), {})[0] * weights).sum().backward()
    torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-8, atol=1e-9 * max(1.0, float(theirs.grad.abs().max())))
    for name, parameter in cut.model.named_parameters():
        wanted = state[name].grad if state[name].grad is not None else torch.zeros_like(state[name])
        for dim, kept in enumerate(cut.kept.get(name) or ()):
            wanted = wanted if kept is None else wanted.index_select(dim, torch.from_numpy(kept))
        got = parameter.grad if parameter.grad is not None else torch.zeros_like(parameter)
        torch.testing.assert_close(got, wanted, rtol=1e-8, atol=1e-9 * max(1.0, float(wanted.abs().max())))


@given(recipes())
@settings(laws, max_examples=max(1, NETWORKS // 3))
def test_cutting_twice_is_cutting_by_the_composed_plan(recipe):
    model, x = build(recipe), example(recipe)
    graph = trace(model, (x,))
    first = planned(graph, random_keep(graph, recipe.seed, least=2))
    once = cut_model(model, graph, first).model
    again = trace(once, (x,))
    assert {name: group.size for name, group in again.groups.items()} == {
        name: int(mask.sum()) for name, mask in first.keep.items()
    }
    assert again.cost() == first.after
    second = planned(again, random_keep(again, recipe.seed + 1))
    twice = cut_model(once, again, second).model
    straight = cut_model(model, graph, first.then(second)).model
    a, b = twice.state_dict(), straight.state_dict()
    assert a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)
    assert graph.cost(first.then(second).keep) == second.after
    with torch.no_grad():
        torch.testing.assert_close(twice(x), straight(x), rtol=1e-10, atol=1e-12)


@given(recipes())
@settings(laws, max_examples=max(1, NETWORKS // 3))
@pytest.mark.parametrize("allocation", ["global", "uniform"])
def test_a_tighter_target_never_revives_a_unit(allocation, recipe):
    model, x = build(recipe), example(recipe)
    graph = trace(model, (x,))
    scores, last = l2(graph, model), None
    for percent in (85, 70, 55, 40):
        try:
            made = plan(graph, scores, MACs(at_most=f"{percent}%"), allocation=allocation, fill=False)
        except TargetError:
            break
        assert made.after == graph.cost(made.keep) and made.after.macs <= made.before.macs * percent / 100
        assert all(bool(mask.any()) for mask in made.keep.values())
        if last is not None:
            revived = {n for n, mask in made.keep.items() if bool((mask & ~last.keep[n]).any())}
            assert not revived, f"{percent}%: {revived}"
        last = made
