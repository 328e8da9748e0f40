"""Data that can be read once, models and results that were not made for a repair: the same result, or a clear refusal."""

import pytest
import torch
from torch import nn

import secateur as sc
from secateur.calibrate import many_times
from secateur.errors import InputError
from secateur.mend import study_of
from tests.repair.networks import linear

LABELS = torch.zeros(64, dtype=torch.long)
X = torch.randn(64, 4, generator=torch.Generator().manual_seed(1))


def with_norm():
    torch.manual_seed(0)
    return nn.Sequential(linear(4, 8), nn.BatchNorm1d(8), nn.ReLU(), linear(8, 2)).eval()


class Heads(nn.Module):
    """Its class can follow only where queries, keys and values lose alike, so a second trace is planned for."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.h, self.d = 2, 8
        self.q, self.k, self.v, self.o = linear(12, 16), linear(12, 16), linear(12, 16), linear(16, 5)

    def forward(self, x):
        q, k, v = (a(x).view(x.shape[0], x.shape[1], self.h, self.d).transpose(1, 2) for a in (self.q, self.k, self.v))
        y = nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2)
        return self.o(y.reshape(x.shape[0], x.shape[1], self.h * self.d))


def test_an_iterator_can_be_gone_through_many_times_and_is_read_as_far_as_it_must():
    read = []
    kept = many_times(read.append(i) or i for i in range(5))
    first = iter(kept)
    assert [next(first), next(first)] == [0, 1] == read
    assert list(kept) == [0, 1, 2, 3, 4] == [0, 1, *first] == read
    data = [1, 2]
    assert many_times(data) is data


def test_a_generator_gives_what_a_list_gives():
    data = [torch.randn(64, 5, 12, generator=torch.Generator().manual_seed(s)) for s in (1, 2)]
    options = {"allocation": "curves", "repair": "least_squares"}
    want = sc.prune(Heads(), (data[0][:2],), sc.MACs("70%"), data=data, **options)
    got = sc.prune(Heads(), (data[0][:2],), sc.MACs("70%"), data=iter(data), **options)
    assert got.cut.how == want.cut.how == "attributes"
    assert all(torch.equal(t, got.model.state_dict()[n]) for n, t in want.model.state_dict().items())


@pytest.mark.parametrize("repair", ["batch_norm", "least_squares"])
def test_labels_by_name_are_no_input_of_a_repair(repair):
    data = [{"input": X, "labels": LABELS}]
    result = sc.prune(with_norm(), (X[:2],), sc.MACs("50%"), data=data, score="l2", repair=repair)
    assert result.plan.why["repair"] == repair


@pytest.mark.parametrize("first", ["batch_norm", "least_squares"])
@pytest.mark.parametrize("second", ["bias", "least_squares"])
def test_a_second_repair_begins_from_the_dense_network(first, second):
    once = sc.prune(with_norm(), (X[:2],), sc.MACs("50%"), data=[X] * 4, score="l2", repair=second)
    twice = sc.mend(sc.prune(with_norm(), (X[:2],), sc.MACs("50%"), data=[X] * 4, score="l2", repair=first), [X] * 4, second)
    assert twice.plan.why["repair"] == second
    for name, tensor in once.model.state_dict().items():
        torch.testing.assert_close(twice.model.state_dict()[name], tensor, rtol=1e-6, atol=1e-7)


def test_a_model_elsewhere_is_sent_to_the_cpu():
    model = with_norm()
    graph = sc.trace(model, (X,))
    with pytest.raises(InputError, match=r"on meta, and statistics .* on the CPU.\n  Move it there"):
        study_of(model.to("meta"), graph, [X])
