"""The criteria against numbers worked out by hand on one small network."""

import pytest
import torch
from torch import nn

from secateur import score
from secateur.budget import MACs, plan
from secateur.errors import InputError, ModelError
from secateur.trace import trace


@pytest.fixture
def net():
    """Two convolutions and a batch norm; filter i of the first has weights of size i + 1 everywhere it lives."""
    model = nn.Sequential(nn.Conv2d(2, 4, 1, bias=False), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 3, 1, bias=False))
    size = torch.arange(1.0, 5.0)
    with torch.no_grad():
        model[0].weight.copy_(size.view(4, 1, 1, 1).expand(4, 2, 1, 1))
        model[3].weight.copy_(-size.view(1, 4, 1, 1).expand(3, 4, 1, 1))
        model[1].weight.copy_(torch.tensor([0.4, -0.3, 0.2, 0.1]))
    graph = trace(model, (torch.zeros(1, 2, 4, 4),))
    (name,) = graph.groups
    return model, graph, name


def test_l1_is_the_sum_of_absolute_weights(net):
    model, graph, name = net
    by_hand = torch.tensor([5.0, 10.0, 15.0, 20.0], dtype=torch.float64)  # 2 weights in, 3 out, each of size i + 1
    torch.testing.assert_close(score.l1(graph, model)[name], by_hand / by_hand.mean())


def test_l2_is_the_root_of_the_sum_of_squares(net):
    model, graph, name = net
    by_hand = torch.tensor([1.0, 2.0, 3.0, 4.0], dtype=torch.float64) * 5**0.5
    torch.testing.assert_close(score.l2(graph, model)[name], by_hand / by_hand.mean())


def test_bn_scale_is_the_absolute_scale(net):
    model, graph, name = net
    by_hand = torch.tensor([0.4, 0.3, 0.2, 0.1], dtype=torch.float64)
    torch.testing.assert_close(score.bn_scale(graph, model)[name], by_hand, rtol=1e-6, atol=0)


@pytest.mark.parametrize(("criterion", "first_to_go"), [("l1", 0), ("l2", 0), ("bn_scale", 3)])
@pytest.mark.parametrize("allocation", ["global", "uniform"])
def test_the_least_unit_goes_first(net, criterion, first_to_go, allocation):
    model, graph, name = net
    made = plan(graph, score.score(graph, model, criterion), MACs(at_most="75%"), allocation=allocation)
    assert made.keep[name].tolist() == [unit != first_to_go for unit in range(4)]


def test_random_obeys_its_seed(net):
    model, graph, name = net
    one, again, other = (score.random(graph, model, seed=seed)[name] for seed in (1, 1, 2))
    assert torch.equal(one, again)
    assert not torch.equal(one, other)


def test_unknown_criterion_is_refused_with_the_list(net):
    model, graph, _ = net
    with pytest.raises(InputError, match="l1, l2, bn_scale, random"):
        score.score(graph, model, "l3")


def test_bn_scale_without_batch_norm_is_refused():
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    graph = trace(model, (torch.zeros(1, 3),))
    with pytest.raises(InputError, match="batch norm"):
        score.bn_scale(graph, model)


def test_weights_without_values_cannot_be_scored_but_chance_can():
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2)).to("meta")
    graph = trace(model, (torch.zeros(1, 3, device="meta"),))
    with pytest.raises(ModelError, match="meta"):
        score.l2(graph, model)
    assert all(len(values) == 4 for values in score.random(graph, model).values())


def test_scores_of_the_wrong_length_are_refused(net):
    model, graph, name = net
    with pytest.raises(InputError, match="4 units"):
        score.score(graph, model, {name: torch.zeros(3)})
