"""Training back: it learns, zeros stay, and nothing else is changed."""

import copy
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils._pytree import tree_leaves

from secateur.errors import DataError, TrainingError
from secateur.recover import Training, recover
from secateur.recover.checkpoint import FILE
from secateur.recover.validate import parted
from tests.recover.nets import masked, net, rows

HOWS = {
    "lora": Training(epochs=3, train="lora", lr=0.02, rank=2),
    "sgd": Training(epochs=3, lr=0.05), "adamw": Training(epochs=3, optimizer="adamw", lr=0.01), "average": Training(epochs=3, ema=0.9),
    "bfloat16": Training(epochs=2, precision="bfloat16", lr=0.05), "moved": Training(epochs=2, augment="flip_crop", channels_last=True),
    "boxed": Training(epochs=2, cutmix=0.5, lr=0.05),
}  # fmt: skip


@pytest.mark.parametrize("name", HOWS)
def test_it_learns_and_its_zeros_stay(name):
    result = masked(net(), rows().inputs[:2])
    gone = {n: ~m for n, m in result.plan.weights.items()}
    before = copy.deepcopy(result.model.state_dict())
    done = recover(result.model, rows(), HOWS[name], plan=result.plan, valid=rows(40, seed=1))
    losses_seen = [row["loss"] for row in done.history]
    assert losses_seen[-1] < losses_seen[0] and len(losses_seen) == HOWS[name].epochs
    assert all(0 <= row["valid"] <= 1 for row in done.history)
    state = dict(done.model.named_parameters())
    assert any(bool(m.any()) for m in gone.values())
    for n, m in gone.items():
        assert not state[n][m].any() and not torch.equal(state[n], before[n])
    assert not done.model.training  # as it was given


def test_masked_weights_that_are_frozen_need_no_holding():
    result = masked(net(), rows().inputs[:2])
    for name in result.plan.weights:
        result.model.get_parameter(name).requires_grad_(False)
    before = copy.deepcopy(result.model.state_dict())
    recover(result.model, rows(), Training(epochs=1), plan=result.plan)
    moved = {n for n, p in result.model.named_parameters() if not torch.equal(p, before[n])}
    assert "layers.1.bias" in moved and not moved & result.plan.weights.keys()


def test_weights_that_were_there_under_the_mask_do_not_come_back():
    plan = masked(net(), rows().inputs[:2]).plan
    for how in (Training(epochs=1, ema=0.9), Training(epochs=1)):
        done = recover(net(), rows(), how, plan=plan)  # the dense model, none of its weights zero yet
        assert not any(done.model.get_parameter(n)[~m].any() for n, m in plan.weights.items())
    with pytest.raises(TrainingError):
        bad = net()
        recover(bad, rows(), Training(epochs=1), plan=plan, loss=lambda output, labels: output.sum() * float("nan"))
    assert not any(bad.get_parameter(n)[~m].any() for n, m in plan.weights.items())


def test_nothing_else_is_changed(tmp_path):
    model, teacher = net().eval(), net(1)
    state = torch.get_rng_state()
    wrong = [(rows(4).inputs, torch.tensor([9, 9, 9, 9]))]
    with pytest.raises(DataError):
        recover(model, rows(), Training(epochs=2, ema=0.5, channels_last=True), valid=wrong, teacher=teacher, folder=tmp_path)
    assert torch.equal(torch.get_rng_state(), state) and teacher.training and not model.training
    assert model.conv.weight.is_contiguous() and all(p.grad is None for p in model.parameters()) and (tmp_path / FILE).exists()
    kept = torch.load(tmp_path / FILE, weights_only=True)["model"]
    assert all(torch.equal(p, kept[n]) for n, p in model.named_parameters())  # the weights, not their average


class Odd(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.own, self.slow = nn.Conv2d(1, 8, 3), nn.BatchNorm2d(8, track_running_stats=False), nn.BatchNorm2d(8, momentum=None)
        self.drop, self.b = nn.Dropout(0.5, inplace=True), nn.Linear(8, 4)

    def forward(self, x):
        return self.b(self.drop(self.slow(self.own(self.a(x))).mean((2, 3))))


def test_graphs_train_and_rest():
    from secateur.recover import modes

    torch.manual_seed(0)
    x = rows(32).inputs
    graph = torch.export.export(Odd().eval(), (x,)).module()
    before, was = graph.get_buffer("slow.running_mean").clone(), str(graph.graph)
    with torch.no_grad():
        rest = graph(x)
        with modes.training(graph) as mode:
            first, second = graph(x), graph(x)
            assert not torch.equal(graph.get_buffer("slow.running_mean"), before)
            with mode.rest():
                assert torch.equal(graph(x), graph(x))
            assert torch.isfinite(first).all() and str(graph.graph) != was
    assert str(graph.graph) == was and rest.shape == second.shape
    done = recover(graph, rows(64), Training(epochs=1, lr=0.01), valid=rows(64, seed=1))
    assert len(done.history) == 1 and str(graph.graph) == was


def test_norms_and_biases_alone():
    model = net()
    before = copy.deepcopy(model.state_dict())
    recover(model, rows(), Training(epochs=1, train="norms", lr=0.1))
    moved = {n for n, p in model.named_parameters() if not torch.equal(p, before[n])}
    moved.discard("conv.bias")  # the norm behind it takes its effect away
    assert moved == {"norm.weight", "norm.bias", "layers.0.bias", "layers.1.bias"}


def test_it_trains_where_gradients_are_off():
    with torch.no_grad():
        found = recover(net(), rows(), Training(epochs=1))
        assert not torch.is_grad_enabled()
    whole = recover(net(), rows(), Training(epochs=1))
    assert all(torch.equal(a, b) for a, b in zip(found.model.parameters(), whole.model.parameters(), strict=True))


def test_the_rate_rises_and_falls():
    how = Training(warmup=0.1)
    rates = [how.at(i, 100) for i in range(100)]
    assert rates[0] < rates[5] < rates[10] == pytest.approx(1.0) and rates[-1] < 1e-3
    assert rates[10:] == sorted(rates[10:], reverse=True)
    assert Training().rate(net(), 256) == pytest.approx(0.04) and Training(lr=0.3).rate(net(), 256) == 0.3
    convolutional = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)).eval()
    graph = torch.export.export(convolutional, (torch.randn(2, 3, 8, 8),)).module()
    assert Training().kind(convolutional) == Training().kind(graph) == "sgd"
    assert Training().kind(nn.Linear(2, 2)) == "adamw"


def test_every_epoch_is_told_and_measured():
    told, valid = [], rows(40, seed=1)
    done = recover(net(dropout=0.0), rows(), Training(epochs=2.5), valid=valid, watch=lambda history, steps: told.append((history, steps)))
    assert [len(history) for history, _ in told] == [0, 1, 2, 3] and {steps for _, steps in told} == {8}
    assert told[-1][0] == done.history and told[1][0] == done.history[:1]
    model = done.model.eval()
    with torch.no_grad():
        scores = model(valid.inputs)
    assert done.history[-1]["valid_loss"] == pytest.approx(float(F.cross_entropy(scores, valid.labels)), rel=1e-5)
    assert done.history[-1]["valid"] == pytest.approx(float((scores.argmax(1) == valid.labels).float().mean()))


def test_norms_that_the_user_put_at_rest_stay_at_rest():
    model = net().train()
    model.norm.eval()
    before = model.norm.running_mean.clone()
    recover(model, rows(), Training(epochs=1), valid=rows(40, seed=1))
    assert torch.equal(model.norm.running_mean, before) and not model.norm.training and model.training
    recover(model.eval(), rows(), Training(epochs=1))  # a whole model at rest was measured, and is trained
    assert not torch.equal(model.norm.running_mean, before)


def test_gradients_of_what_is_not_trained_do_not_add_up():
    model, seen = net(dropout=0.0), []
    recover(model, rows(), Training(epochs=4, train="norms", lr=0.0), progress=lambda *_: seen.append(float(model.conv.weight.grad.norm())))
    assert max(seen) < 3 * min(seen)


def test_a_compiled_model_is_trained_with_its_plan():
    result = masked(net(dropout=0.0), rows().inputs[:2])
    plain = recover(copy.deepcopy(result.model), rows(), Training(epochs=1), plan=result.plan)
    done = recover(compiled := torch.compile(result.model, backend="eager"), rows(), Training(epochs=1), plan=result.plan)
    assert done.model is compiled
    assert all(torch.equal(a, b) for a, b in zip(plain.model.parameters(), result.model.parameters(), strict=True))


def test_inputs_within_one_another_come_to_the_device_of_the_model():
    model, x = nn.Linear(2, 2, device="meta"), torch.zeros(3, 2)
    found = parted(((x, {"more": [x]}), [{"boxes": x}]), model), parted({"x": {"y": x}, "n": 3}, model)
    assert all(t.device.type == "meta" for t in tree_leaves(found) if isinstance(t, torch.Tensor)) and found[1][1]["n"] == 3


def test_a_moving_average_of_few_steps_is_not_that_of_the_weights_as_they_were():
    model, last = net(dropout=0.0), net(dropout=0.0)
    first = model.conv.weight.detach().clone()
    how = Training(epochs=5, lr=0.05)
    recover(last, rows(), how)
    recover(model, rows(), replace(how, ema=0.999))
    way = float((last.conv.weight - first).norm())
    assert float((model.conv.weight - first).norm()) > 0.5 * way  # 15 steps of 0.999 alone would go 0.015 of it
