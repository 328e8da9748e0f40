"""What is no tensor in the traced call is given to the model with the data too: a repair fits the function that was traced."""

import copy

import pytest
import torch
from torch import nn

import secateur as sc
from secateur.calibrate import batches
from secateur.calibrate.batches import read
from secateur.errors import DataError


class Turned(nn.Module):
    def __init__(self, turned=None):
        super().__init__()
        torch.manual_seed(0)
        self.a, self.norm, self.b, self.c, self.turned = nn.Linear(8, 24), nn.BatchNorm1d(24), nn.Linear(24, 24), nn.Linear(24, 4), turned

    def forward(self, x, turned=False, scale=None):
        x = -x.exp() if (turned if self.turned is None else self.turned) else x
        return self.c(torch.relu(self.b(torch.relu(self.norm(self.a(x)))))) * (1 if scale is None else scale)


def rows(n=5):
    g = torch.Generator().manual_seed(1)
    return [(torch.randn(32, 8, generator=g), torch.randint(0, 4, (32,), generator=g)) for _ in range(n)]


X = rows(1)[0][0]
CALLS = {
    "named": ((X,), {"turned": True}, rows()),
    "by place": ((X, True), {}, rows()),
    "by place, and one that is None": ((X, True, None), {}, rows()),
    "all named": ((), {"x": X, "turned": True}, [{"x": x, "labels": y} for x, y in rows()]),
    "in dicts, named": ((X,), {"turned": True}, [{"x": x, "labels": y} for x, y in rows()]),
    "given again": ((X, True), {}, [(x, True, y) for x, y in rows()]),
    "another one in the example": ((), {"x": X, "turned": False}, [{"x": x, "labels": y, "turned": True} for x, y in rows()]),
}


@pytest.mark.parametrize("repair", ["gauss_newton", "least_squares", "batch_norm"])
@pytest.mark.parametrize("name", list(CALLS)[:-1])
def test_a_repair_is_that_of_a_model_which_knows_the_flag(name, repair):
    args, kwargs, data = CALLS[name]
    ours = sc.prune(Turned(), args, sc.Params("50%"), kwargs=kwargs, data=data, repair=repair)
    theirs = sc.prune(Turned(turned=True), (X,), sc.Params("50%"), data=rows(), repair=repair)
    assert ours.plan.why["repair"] == theirs.plan.why["repair"] == repair
    for (key, a), b in zip(ours.model.state_dict().items(), theirs.model.state_dict().values(), strict=True):
        torch.testing.assert_close(a, b, msg=key)


@pytest.mark.parametrize("name", list(CALLS)[:-1])
def test_weights_are_chosen_for_it_too(name):
    args, kwargs, data = CALLS[name]
    ours = sc.sparsify(Turned(), args, sc.Sparse(keep="40%", by="sparsegpt"), kwargs=kwargs, data=data)
    theirs = sc.sparsify(Turned(turned=True), (X,), sc.Sparse(keep="40%", by="sparsegpt"), data=rows())
    assert all(torch.equal(m, theirs.plan.weights[n]) for n, m in ours.plan.weights.items())


@pytest.mark.parametrize("name", CALLS)
def test_labels_are_what_comes_after_the_inputs(name):
    args, kwargs, data = CALLS[name]
    model = Turned().eval()
    for batch, (x, y) in zip(read(copy.deepcopy(data), args, kwargs), rows(), strict=True):
        named = {k: v for k, v in batch.kwargs.items() if k != "labels"}
        assert torch.equal(batch.labels, y) and batch.rows == 32
        assert torch.equal(model(*batch.args, **named), model(x, turned=True))


def test_rows_with_other_flags_than_the_first_are_left_out():
    data = [{"x": x, "turned": n < 3} for n, (x, _) in enumerate(rows())]
    result = sc.prune(Turned(), (), sc.Params("50%"), kwargs={"x": X, "turned": True}, data=data, repair="least_squares")
    alone = sc.prune(Turned(), (), sc.Params("50%"), kwargs={"x": X, "turned": True}, data=data[:3], repair="least_squares")
    assert any("64 rows" in note for note in result.notes), result.notes
    for a, b in zip(result.model.state_dict().values(), alone.model.state_dict().values(), strict=True):
        torch.testing.assert_close(a, b)


def test_only_what_is_like_the_flag_is_taken_for_it():
    (x, y), words = rows(1)[0], ["a"] * 32
    for item in ((x, words, y), (x, [1, 0]), (x, 1, y)):
        ((args, _),) = batches([item], (x, True))
        assert args == (x, True)
    ((args, _),) = batches([(x, False, y)], (x, True))
    assert args == (x, False)
    mask = torch.ones(32)
    ((args, _),) = batches([(x, mask, y)], (x, None))
    assert args == (x, mask)
    (found,) = read([(x, mask, y)], (x, None))
    assert torch.equal(found.labels, y)


def test_a_flag_by_place_cannot_be_said_by_a_dict():
    with pytest.raises(DataError, match=r"True as input 2 by place(.|\n)*kwargs="):
        [*batches([{"x": X}], (X, True))]
    assert [*batches([{"x": X}], (X, None))] == [((), {"x": X})]


def test_calls_without_flags_are_as_they_were():
    x, y = rows(1)[0]
    assert [*batches([(x, y)], (x,))] == [((x,), {})] and [*batches([x], (x,))] == [((x,), {})]
    assert [*batches([(x, None)], (x,))] == [((x,), {})]
    ((args, _),) = batches([[x]], (x, x))
    assert args == (x,)
