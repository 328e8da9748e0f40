"""Weights put back to early ones under a mask, and thresholds that are learnt."""

import copy

import pytest
import torch
from torch import nn

import secateur as sc
from secateur.errors import InputError, PlanError
from secateur.recover.gradual import Gradual
from secateur.recover.rewind import Snapshot, rewind
from secateur.recover.schedule import Schedule
from secateur.recover.soft_threshold import soft_threshold

X = torch.randn(32, 8, generator=torch.Generator().manual_seed(0))


def net():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 4, bias=False)).train()
    with torch.no_grad():
        model[3].weight[0, 0] = 0.0
    return model


def train(model, optimizer, steps):
    for _ in range(steps):
        nn.functional.mse_loss(model(X), X[:, :4].sin()).backward()
        optimizer.step()
        optimizer.zero_grad()


def adam(model, **more):
    return torch.optim.AdamW(model.parameters(), 0.02, **more)


# ------------------------------------------------------------------ rewinding
def test_a_rewound_run_is_one_of_the_early_weights_under_the_mask():
    model = net()
    opt = adam(model)
    train(model, opt, 2)
    early = Snapshot.of(model)
    then = copy.deepcopy(model)
    schedule = Schedule(model, opt, Gradual(keep=0.3, kind="iterative", every=2), 12)
    train(model, opt, 12)
    plan = schedule.plan()
    assert not torch.equal(model[0].weight * plan.weights["0.weight"], then[0].weight * plan.weights["0.weight"])
    model(X).sum().backward()
    rewind(model, opt, early, plan)
    assert not opt.state and all(p.grad is None for p in model.parameters())
    for name, value in model.state_dict().items():
        stays = plan.weights.get(name, torch.ones_like(value, dtype=torch.bool))
        assert torch.equal(value, torch.where(stays, then.state_dict()[name], torch.zeros_like(value))) and not torch.signbit(value[~stays]).any()
    schedule.remove()
    sc.hold(model, plan, opt)
    twin = copy.deepcopy(then)
    other = adam(twin)
    sc.hold(twin, plan, other)
    train(model, opt, 5)
    train(twin, other, 5)
    assert all(torch.equal(v, twin.state_dict()[n]) for n, v in model.state_dict().items())
    assert torch.equal(early.state["0.weight"], then[0].weight)  # the snapshot is nobody's memory


def test_what_cannot_be_rewound_is_refused_and_nothing_changes():
    model = net()
    opt = adam(model)
    train(model, opt, 1)
    early, plan = Snapshot.of(model), sc.magnitude(net().eval(), (X,), "30%").plan
    train(model, opt, 1)
    before = copy.deepcopy(model.state_dict())
    other = nn.Sequential(nn.Linear(8, 12), nn.BatchNorm1d(12), nn.ReLU(), nn.Linear(12, 4, bias=False))
    empty = sc.plan(sc.trace(net().eval(), (X,)), sc.score.l2(sc.trace(net().eval(), (X,)), net().eval()), sc.MACs(at_most="50%"))
    wrong = sc.magnitude(other.eval(), (X,), "30%").plan
    for arguments, error, says in (
        ((model, "adam", early, plan), InputError, "optimizer is a str"),
        ((model, opt, model.state_dict(), plan), InputError, "to is a OrderedDict"),
        ((model, opt, Snapshot.of(other), plan), InputError, r"\(12,\) in the snapshot and \(16,\)"),
        ((model, opt, Snapshot.of(nn.Linear(8, 16)), plan), InputError, "missing in the snapshot"),
        ((model, opt, early, empty), PlanError, "no single weights"),
        ((model, opt, early, wrong), PlanError, r"\(16, 8\) in this model and \(12, 8\) in the plan"),
    ):
        with pytest.raises(error, match=says):
            rewind(*arguments)
    assert all(torch.equal(v, before[n]) for n, v in model.state_dict().items()) and opt.state


# ------------------------------------------------------------------ learnt thresholds
def test_a_threshold_changes_nothing_when_it_is_put_on_and_is_the_formula_then():
    model = net().eval()
    dense = copy.deepcopy(model)
    thresholds = soft_threshold(model, init=-3.0, ignore=["3"])
    assert torch.allclose(model(X), dense(X), atol=1e-5) and thresholds.sparsity == 0
    held = model[0].parametrizations.weight
    with torch.no_grad():
        held[0].s.fill_(-1.5)
    v, threshold = held.original, 1 / (1 + torch.e**1.5)
    slow = [[(abs(x) - threshold if abs(x) > threshold else 0.0) * (1 if x > 0 else -1) for x in row] for row in v.tolist()]
    assert torch.allclose(model[0].weight, torch.tensor(slow), atol=1e-6)
    zero = model[0].weight == 0
    assert 0.05 < zero.float().mean() < 0.95 and thresholds.sparsity == pytest.approx(float(zero.float().mean()))
    model[0].weight.sum().backward()
    assert torch.equal(v.grad, (~zero).float())
    slope = threshold * (1 - threshold)
    assert float(held[0].s.grad) == pytest.approx(-slope * float(v.detach().sign()[~zero].sum()), rel=1e-4)
    assert type(model[3]) is nn.Linear and torch.equal(model[3].weight, dense[3].weight)


def test_thresholds_are_learnt_and_baked_in():
    sparsity = {}
    for decay in (0.0, 1.0):
        model = net()
        thresholds = soft_threshold(model, init=-4.0)
        opt = adam(model, weight_decay=decay)
        train(model, opt, 150)
        sparsity[decay] = thresholds.sparsity
    assert sparsity[1.0] > sparsity[0.0] + 0.1  # more decay, more zeros
    plan, out = thresholds.plan(), model.eval()(X)
    thresholds.remove()
    thresholds.remove()
    assert type(model[0]) is nn.Linear and set(model.state_dict()) == set(net().state_dict())
    assert torch.equal(model(X), out)
    for name, stays in plan.weights.items():
        w = model.get_parameter(name)
        assert torch.equal(w != 0, stays) and not torch.signbit(w[~stays]).any()
    assert plan.before.params == sum(p.numel() for p in model.parameters())
    assert torch.equal(sc.mask(model, (X,), plan).model(X), out)
    assert thresholds.plan() == plan and thresholds.sparsity == sparsity[1.0]
    held = sc.hold(model.train(), plan, adam(model))
    assert held.handles


def test_what_can_have_no_threshold_is_refused():
    model = net()
    for arguments, says in (
        (("model",), "model is a str"),
        ((model, float("nan")), "init=nan"),
        ((nn.Sequential(nn.BatchNorm1d(4)),), "no layer of Sequential"),
        ((model, -5.0, ["decoder"]), "'decoder'"),
    ):
        with pytest.raises(InputError, match=says):
            soft_threshold(*arguments)
    with pytest.raises(PlanError, match="no weight is under its threshold"):
        soft_threshold(nn.Sequential(nn.Linear(4, 4))).plan()
    assert set(model.state_dict()) == set(net().state_dict())


def test_parameters_keep_their_order_when_thresholds_come_off():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2))
    before = [n for n, _ in model.named_parameters()]
    soft_threshold(model).remove()
    assert [n for n, _ in model.named_parameters()] == before
