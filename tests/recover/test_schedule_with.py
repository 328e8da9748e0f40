"""A schedule beside what else is there: tied weights, transformers, torch.compile, gradient scalers, other dtypes."""

import pytest
import torch
from torch import nn

import secateur as sc
from secateur.errors import InputError, PlanError
from secateur.pattern import NM
from secateur.recover.gradual import Gradual
from secateur.recover.schedule import Schedule
from tests.recover.scheduled import OPTIMIZERS, X, backward, made, net, train


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(11, 8)
        self.mid = nn.Linear(8, 8)
        self.one = nn.Linear(8, 8)
        self.two = nn.Linear(8, 8)
        self.two.weight = self.one.weight
        self.out = nn.Linear(8, 11, bias=False)
        self.out.weight = self.embed.weight

    def forward(self, x):
        return self.out(self.two(torch.relu(self.one(torch.relu(self.mid(self.embed(x)))))))


def test_tied_weights_stay_dense_as_in_sparsify():
    torch.manual_seed(0)
    model = Tied()
    opt = OPTIMIZERS["adamw"](model.parameters())
    schedule = Schedule(model, opt, Gradual(keep=0.2, kind="one_shot"), 5)
    assert set(schedule.masks) == {"mid.weight"} and {"one", "out"} <= set(schedule.left)
    x = torch.arange(11)
    for _ in range(3):
        nn.functional.cross_entropy(model(x), x).backward()
        opt.step()
        opt.zero_grad()
    assert torch.equal(model.mid.weight != 0, schedule.masks["mid.weight"])
    assert (model.embed.weight != 0).all() and (model.one.weight != 0).all()
    assert set(sc.sparsify(model.eval(), (x,), sc.Sparse(keep=0.2)).plan.weights) == set(schedule.masks)


def test_attention_and_conv1d_of_transformers():
    class Conv1D(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight, self.bias = nn.Parameter(torch.randn(8, 12)), nn.Parameter(torch.zeros(12))

        def forward(self, x):
            return torch.addmm(self.bias, x.flatten(0, 1), self.weight)

    class Both(nn.Module):
        def __init__(self):
            super().__init__()
            self.attn, self.c_fc = nn.MultiheadAttention(8, 2, batch_first=True), Conv1D()

        def forward(self, x):
            return self.c_fc(self.attn(x, x, x, need_weights=False)[0])

    torch.manual_seed(0)
    model, x = Both(), torch.randn(2, 3, 8)
    schedule = Schedule(model, OPTIMIZERS["sgd"](model.parameters()), Gradual(pattern=NM(2, of=4), kind="one_shot"), 5)
    assert set(schedule.masks) == {"attn.in_proj_weight", "attn.out_proj.weight", "c_fc.weight"}
    assert (schedule.masks["c_fc.weight"].t().reshape(-1, 4).sum(1) == 2).all()  # inputs are its rows
    plan = schedule.plan()
    assert plan.patterns["c_fc.weight"] == "2:4 transposed"
    sparse = sc.sparsify(model.eval(), (x,), sc.Sparse(pattern=NM(2, of=4), by="magnitude"))
    assert set(sparse.plan.weights) == set(plan.weights)
    sc.mask(model, (x,), plan)


@pytest.mark.parametrize("kind", ["cubic", "rigl"])
def test_a_compiled_model_is_trained_alike(kind):
    how = Gradual(keep=0.2, kind=kind, every=2)
    model, opt, schedule = made(how, 8)
    train(model, opt, range(8))
    twin = net()
    compiled = torch.compile(twin, backend="aot_eager")
    other = OPTIMIZERS["sgd"](compiled.parameters())
    alike = Schedule(compiled, other, how, 8)
    train(compiled, other, range(8))
    assert alike.masks.keys() == schedule.masks.keys()
    for name, mask in alike.masks.items():
        assert torch.equal(twin.get_parameter(name) != 0, mask)
        assert torch.allclose(twin.get_parameter(name), model.get_parameter(name), atol=1e-5)
    assert alike.plan() == schedule.plan()


def test_the_plan_is_held_masked_and_nothing_is_left_in_the_model():
    model, opt, schedule = made(Gradual(keep=0.2, kind="cubic", every=2), 10)
    keys = list(net().state_dict())
    train(model, opt, range(10))
    assert list(model.state_dict()) == keys
    plan = schedule.plan()
    assert plan.why["step"] == 10 and sc.Plan.from_json(plan.to_json()) == plan
    assert all(torch.equal(model.get_parameter(n) != 0, m) for n, m in plan.weights.items())
    result = sc.mask(model.eval(), (X[:2],), plan)
    assert torch.equal(result.model(X), model(X))
    schedule.remove()
    sc.hold(model.train(), plan, opt)
    train(model, opt, range(10, 14))
    assert all(torch.equal(model.get_parameter(n) != 0, m) for n, m in plan.weights.items())


def test_a_step_that_never_came_counts_nothing_and_unused_layers_stay():
    model, opt, schedule = made(Gradual(keep=0.2, kind="rigl", every=1, end=4), 4)
    backward(model, 0)
    opt.zero_grad()  # as a gradient scaler does that found infinity
    assert schedule.step == 0
    first = schedule.masks["conv.weight"].clone()
    model.head(torch.relu(model.fc(X.mean((2, 3)).repeat(1, 2)))).sum().backward()
    opt.step()
    assert schedule.step == 1 and torch.equal(schedule.masks["conv.weight"], first)  # without a gradient nothing moves


@pytest.mark.parametrize("kind", ["cubic", "rigl"])
@pytest.mark.parametrize("fused", [False, True])
def test_a_step_that_a_gradient_scaler_skips_counts_nothing(kind, fused):
    """It calls a fused optimizer all the same, which then does nothing."""
    model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 2))
    opt, scaler = torch.optim.AdamW(model.parameters(), 0.01, fused=fused), torch.amp.GradScaler("cpu", init_scale=2.0)
    schedule = Schedule(model, opt, Gradual(keep=0.25, kind=kind, every=1, end=4), 6)
    x = torch.randn(32, 8, generator=torch.Generator().manual_seed(0))
    for number, factor in enumerate((1.0, float("inf"), 1.0, float("inf"), 1.0)):
        before, masks = [p.detach().clone() for p in model.parameters()], {n: m.clone() for n, m in schedule.masks.items()}
        scaler.scale(model(x).square().mean() * factor).backward()
        scaler.step(opt)
        scaler.update()
        opt.zero_grad()
        assert schedule.step == (1, 1, 2, 2, 3)[number]
        if factor != 1.0:
            assert all(torch.equal(a, p) for a, p in zip(before, model.parameters(), strict=True))
            assert all(torch.equal(m, schedule.masks[n]) for n, m in masks.items())


def test_half_precision_and_moves_to_another_dtype():
    model, opt, schedule = made(Gradual(keep=0.2, kind="cubic", every=1, end=6), 8)
    train(model, opt, range(3))
    model.double().float()
    train(model, opt, range(3, 8))
    assert all(torch.equal(model.get_parameter(n) != 0, m) for n, m in schedule.masks.items())
    half = nn.Linear(16, 16).bfloat16()
    tiny = Schedule(half, torch.optim.SGD(half.parameters(), 0.1), Gradual(keep=0.25, kind="one_shot"), 4)
    assert int((half.weight != 0).sum()) == 64 and tiny.sparsity == 0.75


def test_diverged_weights_are_named():
    model, opt, schedule = made(Gradual(keep=0.2, kind="rigl", every=1), 8)
    backward(model, 0)
    model.fc.weight.grad.fill_(torch.nan)
    with pytest.raises(PlanError, match="NaN"):
        opt.step()


class Prepared(torch.optim.Optimizer):
    """What Accelerate puts around an optimizer: one by its type, without hooks of its own."""

    def __init__(self, optimizer):
        self.optimizer = optimizer

    param_groups = property(lambda self: self.optimizer.param_groups)

    def step(self):
        self.optimizer.step()


@pytest.mark.parametrize("way", ["hold", "schedule"])
def test_the_hooks_are_those_of_the_optimizer_within(way):
    model = net()
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    with pytest.raises(InputError, match="optimizer is a Prepared"):
        Schedule(model, Prepared(None), Gradual(keep=0.25, kind="one_shot"), 5)
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())
    opt = Prepared(torch.optim.SGD(model.parameters(), 0.1, momentum=0.9))
    made = Schedule(model, opt, Gradual(keep=0.25, kind="one_shot"), 5)
    if way == "hold":
        plan = made.plan()
        made.remove()
        sc.hold(model, plan, opt)
    masks = made.masks
    for step in range(5):
        backward(model, step)
        opt.step()
        assert not any(model.get_parameter(n)[~m].any() for n, m in masks.items())
