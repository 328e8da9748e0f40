"""Choices and batches that do not fit, and what is not finite: refused or caught with the step, and nothing is moved."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from secateur.errors import DataError, InputError, TrainingError
from secateur.models.data import Batches
from secateur.recover import Training, recover
from secateur.recover import loss as losses
from secateur.recover.validate import validated
from tests.recover.nets import net, rows


class Bomb(nn.Module):
    """Infinite from the third call in training on."""

    def __init__(self):
        super().__init__()
        self.calls = 0

    def forward(self, x):
        self.calls += self.training
        return x * float("inf") if self.calls > 4 else x


def test_what_is_not_finite_is_named_and_the_last_good_state_comes_back():
    model = net(dropout=0.0)
    model.drop = Bomb()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(TrainingError, match=r"(?s)step 4 of .*layer 'drop'"):
        recover(model, rows(), Training(epochs=5))
    state = model.state_dict()
    assert all(bool(torch.isfinite(t).all()) for t in state.values())
    assert not torch.equal(state["conv.weight"], before["conv.weight"])  # of the first epoch's end: three steps in
    assert model.drop.calls > 4


def test_a_gradient_that_is_not_finite_does_not_reach_the_weights():
    def loss(output, labels):
        return F.cross_entropy(output, labels) + (output - output.detach()).sqrt().sum()  # its derivative is infinite at 0

    model = net()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(TrainingError, match="gradient"):
        recover(model, rows(), Training(epochs=1), loss=loss)
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())


BAD = [{"epochs": -1}, {"optimizer": "adagrad"}, {"ema": 1.0}, {"lr": float("nan")}, {"batch": 0}, {"batch": 2.5}, {"distil": 2}, {"clip": 0}]


@pytest.mark.parametrize("bad", BAD)
def test_choices_that_cannot_be_meant_are_refused(bad):
    with pytest.raises(InputError, match=next(iter(bad))):
        Training(**bad)


def test_data_that_fails_at_once_is_named():
    def reading():
        raise OSError("the disk is gone")

    class Loader:
        def __len__(self):
            return 2

        def __iter__(self):
            yield reading()

    with pytest.raises(DataError, match="first batch: OSError: the disk is gone"):
        recover(net(), Loader(), Training(epochs=1))


def test_data_that_does_not_fit_is_refused():
    wrong = {
        "empty": [], "an iterator": iter(rows()), "three parts": [(torch.randn(2, 1, 8, 8), torch.zeros(2).long(), 1)],
        "too many labels": [(torch.randn(2, 1, 8, 8), torch.zeros(3).long())], "no tensors": [("a", "b")],
    }  # fmt: skip
    for data in wrong.values():
        with pytest.raises(DataError):
            recover(net(), data, Training(epochs=1))
    with pytest.raises(DataError, match="batch"):
        recover(net(), list(rows()), Training(epochs=1, batch=8))


class Flat(nn.Module):
    """A batch norm of rows alone."""

    def __init__(self):
        super().__init__()
        self.a, self.norm, self.b = nn.Linear(64, 8), nn.BatchNorm1d(8), nn.Linear(8, 4)

    def forward(self, x):
        return self.b(self.norm(self.a(x.flatten(1))))


@pytest.mark.parametrize("captured", [False, True])
def test_a_batch_of_one_row_does_not_spoil_the_statistics(captured):
    torch.manual_seed(0)
    model = Flat()
    if captured:  # its operators make NaN of one row, and say nothing
        shapes = ({0: torch.export.Dim.AUTO},)
        model = torch.export.export(model.eval(), (rows().inputs[:4],), dynamic_shapes=shapes).module()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(DataError, match=r"(?s)step 2 .*another batch size"):
        recover(model, rows(65, 32), Training(epochs=2))
    assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items())
    recover(model, rows(65, 33), Training(epochs=2))
    assert all(bool(torch.isfinite(t).all()) for t in model.state_dict().values())


def test_a_batch_that_does_not_fit_is_named_and_moves_nothing():
    model, given = net(), rows()
    before = copy.deepcopy(model.state_dict())
    last = Batches(given.inputs, torch.where(torch.arange(90) < 89, given.labels, 4), 32)
    with pytest.raises(DataError, match=r"(?s)step [012] does not fit: .*out of bounds\.\n"):
        recover(model, last, Training(epochs=1))
    assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items())  # the statistics too, which were measured before the loss
    with pytest.raises(DataError, match="gives a dict"):
        losses.task_loss({"words": given.inputs}, given.labels)


@pytest.mark.parametrize("error", [InputError("no such class.\n  Give another."), RuntimeError("DefaultCPUAllocator: can't allocate memory")])
def test_what_says_enough_is_raised_as_it_is_and_moves_nothing(error):
    def loss(output, labels):
        raise error

    model = net()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(type(error)) as said:
        recover(model, rows(), Training(epochs=1), loss=loss)
    assert said.value is error and all(torch.equal(t, before[n]) for n, t in model.state_dict().items())
    taught = net()
    with pytest.raises(type(error)) as said:
        validated([(rows().inputs, rows().labels)], lambda parts: loss(*parts[:2]), taught)
    assert said.value is error
    with pytest.raises(DataError, match=r"validation data does not fit: \.\n"):  # an error without a word
        validated([(rows().inputs, rows().labels)], lambda parts: silent(), taught)


def silent():
    raise ValueError


def test_a_mask_of_infinities_is_no_norm_without_variance():
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 4))
    model.register_buffer("causal", torch.full((4, 4), float("-inf")).triu(1))
    before = model[1].weight.detach().clone()
    recover(model, rows(5, 1), Training(epochs=1))
    assert not torch.equal(model[1].weight, before)


def test_validation_data_that_can_be_gone_through_once_is_refused_at_once():
    model = net()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(DataError, match="only once"):
        recover(model, rows(), Training(epochs=2), valid=iter(rows(40, seed=1)))
    assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items())
