"""Low-rank updates: what is merged is what was trained, zeros are exact, what stands still stands still."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import secateur as sc
from secateur.errors import InputError, PlanError
from secateur.plan import Cost, Plan
from secateur.recover import Training, recover
from secateur.recover.checkpoint import state_of
from secateur.recover.lora import SCALE, LowRank, Update, places_of
from tests.recover.nets import masked, net, rows
from tests.recover.test_resume import interrupted


class Many(nn.Module):
    """A layer of every kind, and one weight under two names."""

    def __init__(self):
        super().__init__()
        self.conv, self.grouped = nn.Conv2d(1, 8, 3, padding=1), nn.Conv2d(8, 8, 3, groups=2, bias=False)
        self.norm, self.line = nn.BatchNorm2d(8), nn.Conv1d(8, 8, 3, padding=1)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.first, self.second, self.last = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 4)
        self.second.weight = self.first.weight

    def forward(self, x):
        x = torch.relu(self.norm(self.grouped(torch.relu(self.conv(x))))).flatten(2)
        x = self.line(x).transpose(1, 2)
        x = self.attention(x, x, x, need_weights=False)[0].mean(1)
        return self.last(torch.relu(self.second(torch.relu(self.first(x)))))


MANY = ["conv.weight", "grouped.weight", "line.weight", "attention.in_proj_weight", "attention.out_proj.weight", "last.weight"]
PARTS = [n for n in MANY if not n.startswith("attention")]  # the rest has no mask


def many():
    torch.manual_seed(0)
    return Many().eval()


def random_plan(model, names):
    """Half of each weight, and the zeros already there."""
    g = torch.Generator().manual_seed(1)
    masks = {n: torch.rand(model.get_parameter(n).shape, generator=g) < 0.5 for n in names}
    with torch.no_grad():
        for n, stays in masks.items():
            model.get_parameter(n).mul_(stays)
    return Plan({}, Cost(0, 0, 0), Cost(0, 0, 0), {}, masks, dict.fromkeys(masks, "free"))


def factors_of(model):
    return [m for m in model.modules() if isinstance(m, Update)]


def drawn(model):
    g = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for update in factors_of(model):
            update.b.copy_(torch.randn(update.b.shape, generator=g))


@pytest.mark.parametrize("how", ["eager", "graph", "one layer"])
def test_merged_is_trained_and_zeros_are_exact(how):
    x = rows().inputs[:5]
    model = many()
    if how == "graph":
        model = torch.export.export(model, (x,)).module()
    if how == "one layer":
        model, x = nn.Linear(8, 6), x[:, 0]
    plan = random_plan(model, {"eager": MANY, "graph": PARTS, "one layer": ["weight"]}[how])
    state, classes, flags = state_of(model), [type(m) for m in model.modules()], [p.requires_grad for p in model.parameters()]
    with torch.no_grad():
        before = model(x)
        beside = LowRank(model, plan, 3, 0)
        assert set(plan.weights) <= set(beside.names) and not {"first.weight", "second.weight"} & set(beside.names)
        assert torch.equal(model(x), before)  # b begins as zeros
        drawn(model)
        trained = model(x)
        merged, names = beside.merged(state_of(model)), list(beside.names)
        for n in beside.names:  # what stands still has not moved
            path, _, own = n.rpartition(".")
            assert torch.equal(model.get_submodule(path).parametrizations[own].original, state[n])
        beside.merge()
        assert not torch.equal(trained, before)
        torch.testing.assert_close(model(x), trained, rtol=1e-6, atol=1e-6)
    after = state_of(model)
    assert list(after) == list(state) and after.keys() == merged.keys() and all(torch.equal(after[n], merged[n]) for n in after)
    assert [type(m) for m in model.modules()] == classes and [p.requires_grad for p in model.parameters()] == flags
    for n in state:
        if n in plan.weights:
            assert not after[n][~plan.weights[n]].any() and after[n][plan.weights[n]].ne(state[n][plan.weights[n]]).any()
        else:
            assert torch.equal(after[n], state[n]) == (n not in names)


def test_gradients_are_those_of_the_masked_product():
    """dL/dA = s B' (M * G),  dL/dB = s (M * G) A',  with G of the weight itself."""
    x, y = rows().inputs[:8, 0].mean(1), rows().labels[:8]
    torch.manual_seed(0)
    layer = nn.Linear(8, 4)
    plan = random_plan(layer, ["weight"])
    twin = copy.deepcopy(layer)
    LowRank(layer, plan, 2, 0)
    drawn(layer)
    update = factors_of(layer)[0]
    with torch.no_grad():
        twin.weight.copy_(layer.weight)
    for model in (layer, twin):
        F.cross_entropy(model(x), y).backward()
    g = twin.weight.grad * plan.weights["weight"]
    torch.testing.assert_close(update.a.grad, SCALE * update.b.T @ g)
    torch.testing.assert_close(update.b.grad, SCALE * g @ update.a.T)
    assert layer.parametrizations.weight.original.grad is None and torch.equal(layer.bias.grad, twin.bias.grad)


def test_what_recover_hands_back_is_what_it_measured_last():
    result = masked(net(dropout=0.0), rows().inputs[:2])
    valid, before = rows(40, seed=1), copy.deepcopy(result.model.state_dict())
    done = recover(result.model, rows(), Training(epochs=4, train="lora", rank=2, lr=0.05), plan=result.plan, valid=valid)
    with torch.no_grad():
        loss = F.cross_entropy(done.model(valid.inputs), valid.labels)
    assert done.history[-1]["valid_loss"] == pytest.approx(float(loss), rel=1e-5)
    moved = {n for n, p in done.model.named_parameters() if not torch.equal(p, before[n])}
    assert moved >= {"conv.weight", "norm.weight", "layers.0.weight", "layers.1.bias"} and not factors_of(done.model)
    for n, stays in result.plan.weights.items():
        change = (done.model.get_parameter(n) - before[n]).flatten(1)
        assert not done.model.get_parameter(n)[~stays].any() and change.any()


@pytest.mark.parametrize("rank", [1, 3])
def test_without_a_mask_the_change_has_the_rank(rank):
    model = net()
    before = copy.deepcopy(model.state_dict())
    recover(model, rows(), Training(epochs=3, train="lora", rank=rank, lr=0.05))
    change = model.layers[0].weight.detach() - before["layers.0.weight"]
    assert int(torch.linalg.matrix_rank(change, rtol=1e-4)) == rank


def test_stopped_again_and_again_it_is_the_same_to_the_bit(tmp_path):
    how = Training(epochs=2, train="lora", ema=0.9)
    whole = recover(net(), list(rows()), how)
    parts = interrupted(net(), how, tmp_path / "run", at=4)
    for (name, a), b in zip(whole.model.state_dict().items(), parts.model.state_dict().values(), strict=True):
        assert torch.equal(a, b), name


def test_a_run_that_is_through_is_taken_as_such_with_what_came_of_it(tmp_path):
    how, steps = Training(epochs=1, train="lora", lr=0.05), []
    first = recover(net(), rows(), how, folder=tmp_path)
    again = recover(first.model, rows(), how, folder=tmp_path, progress=lambda *a: steps.append(a))
    assert not steps and all(torch.equal(a, b) for a, b in zip(first.model.parameters(), again.model.parameters(), strict=True))
    with pytest.raises(InputError, match="rank was 8"):
        recover(net(), rows(), Training(epochs=1, train="lora", lr=0.05, rank=4), folder=tmp_path)


@pytest.mark.parametrize("train", ["lora", "norms"])
def test_weights_that_stand_still_are_zero_where_the_plan_says_so(train):
    plan = masked(net(), rows().inputs[:2]).plan
    done = recover(net(), rows(), Training(epochs=1, train=train), plan=plan, teacher=net(1))  # the dense model: none of its weights is zero yet
    assert not any(done.model.get_parameter(n)[~m].any() for n, m in plan.weights.items())


def test_an_error_leaves_an_ordinary_model():
    model = net()
    with pytest.raises(ZeroDivisionError):
        recover(model, rows(), Training(epochs=1, train="lora"), progress=lambda step, steps, loss: 1 // (2 - step))
    assert not factors_of(model) and all(p.requires_grad for p in model.parameters())
    assert list(model.state_dict()) == list(net().state_dict())


def test_what_cannot_be_meant_is_refused():
    for bad in (0, 2.5, True):
        with pytest.raises(InputError, match="rank"):
            Training(rank=bad)
    with pytest.raises(InputError, match="shard"):
        Training(train="lora", shard=True)
    with pytest.raises(InputError, match="no linear layer"):
        recover(nn.Sequential(nn.Flatten(), nn.LayerNorm(64)), rows(), Training(epochs=1, train="lora"))
    other = sc.sparsify(nn.Linear(4, 4), (torch.randn(2, 4),), sc.Sparse(keep="50%", by="magnitude", refit=False)).plan
    with pytest.raises(PlanError):
        recover(net(), rows(), Training(epochs=1, train="lora"), plan=other)
    assert places_of(many()) == MANY
