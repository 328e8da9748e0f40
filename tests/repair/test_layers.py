"""A layer as rows times a matrix gives what the module gives, and a unit's columns are those that a cut takes out."""

import pytest
import torch
from torch import nn

from secateur.budget import MACs
from secateur.plan import Plan
from secateur.prune import prune
from secateur.repair.layers import features_of, find_layers, norm_names
from secateur.surgery import cut
from secateur.trace import analyse, trace
from tests.repair.networks import Sequenced, linear, lively, seen


class Conv1D(nn.Module):
    """A linear layer stored inputs first, as GPT-2's: `addmm` on tokens in one row."""

    def __init__(self, outputs, inputs):
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.randn(inputs, outputs)), nn.Parameter(torch.randn(outputs))

    def forward(self, x):
        return torch.addmm(self.bias, x.flatten(0, -2), self.weight).unflatten(0, x.shape[:-1])


LAYERS = {
    "linear": (lambda: nn.Linear(6, 5), (6,)),
    "linear without bias": (lambda: nn.Linear(6, 5, bias=False), (6,)),
    "linear on tokens": (lambda: nn.Linear(6, 5), (4, 6)),
    "linear on a grid": (lambda: nn.Linear(6, 5), (2, 3, 6)),
    "Conv1D of GPT-2": (lambda: Conv1D(5, 6), (4, 6)),
    "conv1d": (lambda: nn.Conv1d(4, 6, 3, stride=2, padding=1), (4, 9)),
    "conv2d": (lambda: nn.Conv2d(4, 6, (3, 2), stride=(1, 2), padding=(2, 1), dilation=(2, 1), bias=False), (4, 7, 6)),
    "conv2d same": (lambda: nn.Conv2d(4, 6, 3, padding="same", dilation=2), (4, 7, 6)),
    "conv2d valid": (lambda: nn.Conv2d(4, 6, 3, padding="valid"), (4, 7, 6)),
    "conv3d": (lambda: nn.Conv3d(2, 3, (1, 3, 2), padding=(0, 1, 1), stride=(2, 1, 1)), (2, 4, 5, 3)),
    "grouped": (lambda: nn.Conv2d(6, 9, 3, padding=1, groups=3), (6, 5, 4)),
    "depthwise": (lambda: nn.Conv2d(6, 6, 3, padding=1, groups=6), (6, 5, 4)),
    "depthwise, two each": (lambda: nn.Conv1d(4, 8, 3, groups=4, bias=False), (4, 7)),
}


class Alone(nn.Module):
    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, x):
        return self.layer(x) * 1.0


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("some", [False, True])
def test_rows_times_the_matrix_are_the_outputs(name, some):
    torch.manual_seed(0)
    build, shape = LAYERS[name]
    model = Alone(build()).eval()
    x = torch.randn(3, *shape)
    (layer,) = find_layers(trace(model, (x,)))
    assert (layer.name, layer.why_not) == ("layer", "")
    w = dict(model.named_parameters())[layer.weight].detach()
    matrix = layer.matrix(w)
    stored = layer.stored(matrix.double(), w)
    assert torch.equal(stored, w) and stored.dtype == w.dtype
    given, gives = seen(model, "layer", x)
    if name == "Conv1D of GPT-2":  # its addmm works on tokens in one row
        given, gives = given.flatten(0, 1), gives.flatten(0, 1)
    at = torch.randperm(layer.places)[: max(1, layer.places // 2)] if some else None
    rows, want = layer.rows(given, at), layer.outputs(gives, at)
    assert rows.shape == (layer.groups, len(given) * (layer.places if at is None else len(at)), layer.features(w))
    bias = model.layer.bias.detach().reshape(layer.groups, 1, -1) if layer.bias else 0.0
    torch.testing.assert_close(rows @ matrix.mT + bias, want, rtol=1e-5, atol=1e-5)
    if at is None:  # every entry of the output is there, once
        assert torch.equal(want.flatten().sort()[0], gives.flatten().sort()[0])


def test_a_lone_vector_is_one_row():
    class Embedded(nn.Module):
        def __init__(self):
            super().__init__()
            self.vector, self.layer = nn.Parameter(torch.randn(4)), nn.Linear(4, 3)

        def forward(self, x):
            return x + self.layer(self.vector)

    model = Embedded().eval()
    (layer,) = find_layers(trace(model, (torch.randn(2, 3),)))
    rows, out = layer.rows(model.vector.detach(), None), layer.outputs(model.layer(model.vector).detach(), None)
    assert rows.shape == (1, 1, 4) and out.shape == (1, 1, 3)
    torch.testing.assert_close(rows[0] @ model.layer.weight.T + model.layer.bias, out[0])


class Pair(nn.Module):
    """Two layers; how many columns of the second belong to a unit depends on what is in between."""

    def __init__(self, first, second, between):
        super().__init__()
        self.first, self.second, self.between = first, second, between

    def forward(self, x):
        return self.second(self.between(self.first(x)))


PAIRS = {
    "linear": (lambda: Pair(nn.Linear(5, 7), nn.Linear(7, 3), torch.relu), (5,)),
    "conv": (lambda: Pair(nn.Conv2d(3, 5, 3), nn.Conv2d(5, 4, (3, 2)), torch.relu), (3, 7, 6)),
    "conv1d": (lambda: Pair(nn.Conv1d(3, 5, 3), nn.Conv1d(5, 4, 3), torch.relu), (3, 9)),
    "Conv1D of GPT-2": (lambda: Pair(Conv1D(6, 5), Conv1D(3, 6), torch.relu), (4, 5)),
    "flattened": (lambda: Pair(nn.Conv2d(3, 5, 3), nn.Linear(20, 4), lambda x: x.relu().flatten(1)), (3, 4, 4)),
    "heads": (lambda: Pair(nn.Linear(5, 12), nn.Linear(12, 3), lambda x: x.unflatten(-1, (4, 3)).transpose(-1, -2).softmax(-1).flatten(-2)), (5,)),
    "doubled": (lambda: Pair(nn.Linear(5, 4), nn.Linear(8, 3), lambda x: torch.cat([x, x.relu()], 1)), (5,)),
    "shuffled": (lambda: Pair(nn.Linear(5, 8), nn.Linear(8, 3), lambda x: x.unflatten(1, (2, 4)).transpose(1, 2).flatten(1)), (5,)),
}


@pytest.mark.parametrize("name", PAIRS)
def test_a_units_columns_are_those_that_a_cut_takes_out(name):
    torch.manual_seed(0)
    build, shape = PAIRS[name]
    model = build().eval()
    graph = trace(model, (torch.randn(2, *shape),))
    assert graph.groups
    layer = next(x for x in find_layers(graph) if x.name == "second")
    weight = dict(model.named_parameters())[layer.weight].detach()
    checked = 0
    for group_name, group in graph.groups.items():
        columns = features_of(graph, layer, group)
        if columns is None:
            continue
        for unit in range(group.size):
            keep = {group_name: torch.arange(group.size) != unit}
            small = cut(model, graph, Plan(keep, graph.cost(), graph.cost(keep))).model
            left = torch.ones(layer.features(weight), dtype=torch.bool)
            left[columns[unit]] = False
            of_cut = dict(small.named_parameters())[layer.weight].detach()
            assert torch.equal(layer.matrix(weight)[:, :, left], layer.matrix(of_cut))
            checked += 1
    assert checked > 1


def test_a_group_that_is_there_twice_has_every_column_once():
    """As many heads as dimensions each, tied so that the class can follow: unit i is head i and dimension i of all heads."""
    torch.manual_seed(0)
    model = nn.TransformerEncoderLayer(16, 4, 32, batch_first=True).eval()
    graph = trace(model, (torch.randn(2, 5, 16),))
    tied = analyse(graph.capture, model, (), for_class=True)
    layer = next(x for x in find_layers(tied) if x.name == "self_attn.out_proj")
    found = [columns for g in tied.groups.values() if g.size == 4 and (columns := features_of(tied, layer, g)) is not None]
    assert [c.tolist() for c in found] == [[sorted({4 * i + j for j in range(4)} | {4 * j + i for j in range(4)}) for i in range(4)]]
    data = torch.randn(128, 5, 16)
    result = prune(model, (data[:2],), MACs(at_most="70%"), data=[data])
    assert result.proof.passed and result.repairs


def test_layers_that_keep_their_weights_say_why():
    def does(m, x):
        x = m.a(m.a(x))
        return m.c(m.b(x)) + nn.functional.linear(x, m.weight * 2)

    model = Sequenced(does, a=linear(5, 5), b=linear(5, 5), c=linear(5, 3))
    model.weight = nn.Parameter(torch.randn(3, 5))
    model.b.weight = nn.Parameter(torch.randn(5, 5), requires_grad=False)
    found = {x.name: x.why_not for x in find_layers(trace(model.eval(), (torch.randn(2, 5),)))}
    assert "more than one place" in found["a"]
    assert found["c"] == ""
    assert set(found) == {"a", "b", "c"}  # a computed weight is none of the kind


def test_a_norm_belongs_to_the_layer_only_where_nobody_else_looks():
    class Normed(nn.Module):
        def __init__(self, peek):
            super().__init__()
            self.conv, self.norm, self.peek = nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), peek

        def forward(self, x):
            y = self.conv(x)
            return self.norm(y) + (y if self.peek else 0.0)

    for peek in (False, True):
        graph = trace(lively(Normed(peek)), (torch.randn(2, 3, 4, 4),))
        (layer,) = find_layers(graph)
        assert (layer.norm is None) == peek
        if not peek:
            want = {k: f"norm.{k}" for k in ("weight", "bias", "running_mean", "running_var")}
            assert norm_names(graph, layer.norm) == want
    train = lively(Normed(False)).train()
    (layer,) = find_layers(trace(train, (torch.randn(2, 3, 4, 4),)))
    assert layer.norm is not None and train.training
