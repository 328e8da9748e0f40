"""The mean of the last weights, and the statistics of batch norms that go with it."""

import copy
import math
from dataclasses import replace

import pytest
import torch
from torch import nn

import secateur as sc
from secateur.errors import DataError, InputError
from secateur.models.data import Batches
from secateur.recover import Training, recover
from secateur.recover.average import Average
from secateur.recover.checkpoint import FILE
from secateur.recover.images import shown
from secateur.recover.order import Order
from tests.recover.nets import masked, net, rows
from tests.recover.test_resume import check_through

HOW = Training(epochs=4, average=0.5, lr=0.05)
STEPS, BEGIN, RISING = 12, 6, 0.05 * 12  # 90 rows in batches of 32


def followed(how, model, data=None, **more):
    """The weights after every step, and what comes back."""
    seen = []
    done = recover(model, data or rows(), how, progress=lambda *_: seen.append([p.detach().clone() for p in model.parameters()]), **more)
    return seen, done


@pytest.mark.parametrize("share", [0.5, 0.3, 0.01, 1.0])
def test_the_mean_of_the_last_weights_comes_back(share):
    model = net()
    seen, done = followed(Training(epochs=4, average=share, lr=0.05), model)
    last = seen[STEPS - round(share * STEPS) :] or seen[-1:]
    assert len(seen) == STEPS and (share < 0.1 or not torch.equal(seen[-1][0], seen[-2][0]))
    for p, *held in zip(done.model.parameters(), *last, strict=True):
        torch.testing.assert_close(p.detach(), torch.stack(held).double().mean(0).float())


def test_the_rate_falls_to_half_and_stays_there():
    how = Training(epochs=4, average=0.5, lr=0.05)
    rates = [how.at(step, STEPS) for step in range(STEPS)]
    wanted = [0.75 + 0.25 * math.cos(math.pi * (step - RISING) / (BEGIN - RISING)) for step in range(1, BEGIN)]
    assert rates[1:BEGIN] == pytest.approx(wanted) and rates[BEGIN:] == [0.5] * (STEPS - BEGIN)
    assert [row["lr"] for row in followed(how, net())[1].history] == pytest.approx([0.05 * rates[step] for step in (2, 5, 8, 11)])


def test_the_statistics_are_those_of_the_mean_weights():
    """Against one call of the returned weights, in train mode, with all rows."""
    data = Batches(rows(96).inputs * 3 + 1, rows(96).labels, 32)  # whole batches: the mean of their variances is near that of all rows
    done = recover(net(), data, HOW)
    with torch.no_grad():
        found = done.model.conv(data.inputs)
        parts = [done.model.conv(x) for x in data.inputs[torch.randperm(96, generator=torch.Generator().manual_seed(0))].split(32)]
    torch.testing.assert_close(done.model.norm.running_mean, found.mean((0, 2, 3)), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(done.model.norm.running_var, torch.stack([p.var((0, 2, 3)) for p in parts]).mean(0), rtol=0.02, atol=1e-5)
    assert int(done.model.norm.num_batches_tracked) == STEPS  # estimated at rest: nothing else was moved


def test_the_statistics_are_those_of_images_as_they_are_shown():
    how = replace(HOW, augment="flip_crop", cutmix=1.0, seed=3)
    done = recover(net(), rows(96), how)
    seen = []
    for step, batch in enumerate(Order(rows(96), None, 3).epoch(0)):
        (x,), _ = shown((batch[0],), batch[1], how, (step, 0))
        assert not torch.equal(x, batch[0])
        with torch.no_grad():
            seen.append(done.model.conv(x))
    torch.testing.assert_close(done.model.norm.running_mean, torch.cat(seen).mean((0, 2, 3)), rtol=1e-4, atol=1e-5)


def test_statistics_of_data_in_an_order_of_its_own_are_from_all_over_it():
    """200 batches, sorted: the first 64 are not like the rest."""
    data = [(torch.full((4, 1, 8, 8), n / 20) + 0.1 * torch.randn(4, 1, 8, 8), torch.zeros(4, dtype=torch.long)) for n in range(200)]
    done = recover(net(), data, Training(epochs=0.05, average=0.2, lr=1e-4))
    with torch.no_grad():
        wanted = done.model.conv(torch.cat([x for x, _ in data])).mean((0, 2, 3))
    assert float((done.model.norm.running_mean - wanted).abs().max()) < 0.15 * float(wanted.abs().max())


def test_frozen_weights_are_left_alone_and_half_precision_does_not_lose_the_mean():
    model = net()
    model.conv.weight.requires_grad_(False)
    model.conv.weight.data[0, 0, 0, 0] = -float("inf")
    model.extra = nn.Parameter(torch.ones(3, dtype=torch.int8), requires_grad=False)
    Average(model, HOW, 4).add(3)
    half, exact = nn.Linear(4, 4).bfloat16(), 0.0
    mean = Average(half, Training(average=1.0), 1000)
    torch.manual_seed(0)
    for step in range(1000):
        half.weight.data.copy_(1 + 0.5 * torch.randn(4, 4))
        mean.add(step)
        exact = exact + half.weight.detach().double() / 1000
    torch.testing.assert_close(mean.weights["weight"].double(), exact, rtol=1e-4, atol=1e-4)
    assert set(Average(model, HOW, 4).weights) == {n for n, p in model.named_parameters() if p.requires_grad}


def test_a_captured_graph_has_such_statistics_too():
    model = net(dropout=0.0)
    graph = torch.export.export(model.eval(), (rows().inputs[:8],), dynamic_shapes=({0: torch.export.Dim("rows")},)).module()
    ours, theirs = recover(model, rows(), HOW).model, recover(graph, rows(), HOW).model
    state = theirs.state_dict()
    for name, value in ours.state_dict().items():
        if "num_batches" not in name:
            torch.testing.assert_close(state[name], value, rtol=1e-4, atol=1e-5)


def test_it_is_what_is_measured_and_the_training_goes_on_as_it_was():
    valid, means = rows(40, seed=1), ([], [])
    for seen, looked in zip(means, (valid, None), strict=True):
        model = net()
        recover(model, rows(), HOW, valid=looked, progress=lambda *_, m=model, s=seen: s.append(m.norm.running_mean.clone()))
    assert all(torch.equal(a, b) for a, b in zip(*means, strict=True)) and not torch.equal(means[0][-1], means[0][-2])
    seen, done = followed(HOW, net(), valid=valid)
    alone, _ = followed(HOW, net())
    assert all(torch.equal(a, b) for ours, theirs in zip(seen, alone, strict=True) for a, b in zip(ours, theirs, strict=True))
    with torch.no_grad():
        losses = [nn.functional.cross_entropy(done.model.eval()(x), y) * len(x) for x, y in valid]
    assert done.history[-1]["valid_loss"] == pytest.approx(float(sum(losses)) / 40, rel=1e-5)


def test_zeros_stay_zero():
    result = masked(net(), rows().inputs[:2])
    done = recover(result.model, rows(), HOW, plan=result.plan)
    assert not any(done.model.get_parameter(n)[~m].any() for n, m in result.plan.weights.items())


def test_a_run_that_is_stopped_again_and_again_is_the_same_to_the_bit(tmp_path):
    class Stop(BaseException):
        pass

    def progress(step, steps, loss):
        if step in stops:
            stops.remove(step)
            raise Stop

    stops, how = [2, 7, 9, 12], replace(HOW, every=0.0)
    whole = recover(net(), rows(), how)
    for _ in range(4):
        with pytest.raises(Stop):
            recover(net(), rows(), how, folder=tmp_path, progress=progress)
    parts = recover(net(), rows(), how, folder=tmp_path, progress=progress)
    for (name, a), b in zip(whole.model.state_dict().items(), parts.model.state_dict().values(), strict=True):
        assert torch.equal(a, b), name


@pytest.mark.parametrize("train", ["all", "lora"])
def test_a_run_that_is_through_is_not_begun_again(train, tmp_path):
    check_through(Training(epochs=2, average=0.5, train=train), tmp_path)


def test_steps_are_not_lost_where_the_data_fails_at_the_end(tmp_path):
    class Failing:
        asked = 0

        def __len__(self):
            return 3

        def __iter__(self):
            self.asked += 1
            if self.asked == 6:  # a look at it, four epochs, and then the statistics
                raise OSError("the disk is gone")
            return iter(rows())

    for folder in (tmp_path, None):
        model = net()
        with pytest.raises(DataError, match="the disk is gone"):
            recover(model, Failing(), HOW, folder=folder)
        held = torch.load(tmp_path / FILE, weights_only=True)
        assert held["step"] == STEPS
        assert all(torch.equal(p, held["model"][n]) for n, p in model.state_dict().items())  # the last weights, not the mean
    steps = []
    after = recover(net(), list(rows()), HOW, folder=tmp_path, progress=lambda *a: steps.append(a))
    whole = recover(net(), list(rows()), HOW)
    assert not steps and all(torch.equal(a, b) for a, b in zip(whole.model.state_dict().values(), after.model.state_dict().values(), strict=True))


def test_a_model_without_batch_norms_and_one_that_is_not_trained():
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 4))
    seen, done = followed(HOW, model)
    torch.testing.assert_close(done.model[1].weight.detach(), torch.stack([s[0] for s in seen[BEGIN:]]).mean(0))
    still = net()
    before = copy.deepcopy(still.state_dict())
    recover(still, rows(), Training(epochs=0, average=0.5))
    assert all(torch.equal(a, b) for a, b in zip(before.values(), still.state_dict().values(), strict=True))


def test_one_average_at_a_time():
    with pytest.raises(InputError, match=r"ema=0.9 and average=0.5"):
        Training(ema=0.9, average=0.5)
    with pytest.raises(InputError, match=r"average=1.5"):
        Training(average=1.5)
    assert "average" not in Training().to_json() and Training(average=0.5).to_json()["average"] == 0.5
    assert sc.Training is Training


def test_whatever_ends_the_statistics_leaves_the_last_weights():
    class Killed(BaseException):
        pass

    class Ending:
        asked = 0

        def __len__(self):
            return 3

        def __iter__(self):
            self.asked += 1
            if self.asked == 6:
                raise Killed
            return iter(rows())

    model, seen = net(), []
    with pytest.raises(Killed):
        recover(model, Ending(), HOW, progress=lambda *_: seen.append({n: t.clone() for n, t in model.state_dict().items()}))
    assert len(seen) == STEPS and all(torch.equal(t, seen[-1][n]) for n, t in model.state_dict().items())
