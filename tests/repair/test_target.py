"""What a layer is fitted to, compared with what hooks see in the dense network and in one whose units really give nothing."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from secateur.repair.least_squares import Repair, Settings
from secateur.repair.target import find_target
from secateur.trace import trace
from tests.repair.networks import Sequenced, linear, lively, seen


def half(graph, name):
    keep = {n: torch.ones(g.size, dtype=torch.bool) for n, g in graph.groups.items()}
    keep[name] = torch.arange(graph.groups[name].size) % 2 == 0
    return keep


def repaired(model, keep_of, chunks, **settings):
    graph = trace(model, (chunks[0],))
    state = {n: t.detach() for n, t in model.state_dict().items()}
    return Repair(graph, keep_of(graph), state, [((x,), {}) for x in chunks], Settings(**settings))


def masked(model, state):
    """The model with the repair's tensors: whoever read a unit that went has a 0 there, so nothing of it arrives."""
    other = copy.deepcopy(model)
    other.load_state_dict(state)
    return other


def conv_block(m, x):
    x = m.stem(x).relu()
    y = m.bn2(m.two(m.bn1(m.one(x)).relu()))
    return m.head(m.join(m.other(x) + y).mean((2, 3)))


def conv_net():
    return Sequenced(
        conv_block,
        stem=nn.Conv2d(3, 6, 3, padding=1), one=nn.Conv2d(6, 8, 3, padding=1, bias=False), bn1=nn.BatchNorm2d(8),
        two=nn.Conv2d(8, 6, 3, padding=1, bias=False), bn2=nn.BatchNorm2d(6), other=nn.Identity(), join=nn.Identity(), head=linear(6, 3),
    )  # fmt: skip


def tokens(way):
    """A mixer over tokens: the layer's output goes through `way` before it is added."""

    def does(m, x):
        x = m.stem(x)
        y = way(m, m.two(m.one(x.transpose(1, 2)).relu()))
        return m.head(m.join(y + m.other(x)))

    return lambda: Sequenced(
        does, stem=linear(6, 6), one=linear(5, 9), two=linear(9, 5), other=linear(6, 6), join=nn.Identity(), head=linear(6, 3), drop=nn.Dropout(0.4)
    )


WAYS = {
    "transpose": lambda m, y: y.transpose(1, 2),
    "permute and dropout": lambda m, y: m.drop(y.permute(0, 2, 1)),
    "through a flat view": lambda m, y: y.permute(0, -1, 1).contiguous().view(len(y), -1).reshape(len(y), 5, 6),
    "squeezed": lambda m, y: m.drop(y.unsqueeze(1).transpose(2, 3)).clone().squeeze(1),
    "three ways": lambda m, y: y.unsqueeze(0).permute(1, 3, 0, 2).flatten(1, 2),
}


def chunks_of(shape, count=2, rows=6):
    return [torch.randn(rows, *shape, generator=torch.Generator().manual_seed(s)) for s in range(count)]


def test_an_addition_is_what_the_dense_network_has_there_minus_what_the_pruned_one_has_already():
    torch.manual_seed(0)
    model, data = lively(conv_net()), chunks_of((3, 5, 5))
    run = repaired(model, lambda g: half(g, "stem:out"), data)
    small = masked(model, run.state)
    (layer,) = [x for x in run.layers if x.name == "two"]
    for chunk, x in enumerate(data):
        target, other = run._target(chunk, layer, run.targets[layer.node])
        _, dense_join = seen(model, "join", x)
        _, pruned_other = seen(small, "other", x)
        _, dense_other = seen(model, "other", x)
        kept = torch.arange(6) % 2 == 0  # what goes is garbage in the pruned flow
        torch.testing.assert_close(target[:, kept], (dense_join - pruned_other)[:, kept], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(other[:, kept], pruned_other[:, kept], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(pruned_other[:, kept], dense_other[:, kept], rtol=1e-4, atol=1e-5)  # the stem is as it was


@pytest.mark.parametrize("way", WAYS)
def test_what_lies_between_a_layer_and_its_addition_is_undone(way):
    torch.manual_seed(0)
    model, data = tokens(WAYS[way])().eval(), chunks_of((5, 6))
    run = repaired(model, lambda g: half(g, "one:out"), data)
    small = masked(model, run.state)
    (layer,) = [x for x in run.layers if x.name == "two"]
    assert run.targets[layer.node].join is not None
    for chunk, x in enumerate(data):
        target, other = run._target(chunk, layer, run.targets[layer.node])
        _, gives = seen(model, "two", x)
        _, dense_join = seen(model, "join", x)
        _, pruned_other = seen(small, "other", x)
        assert target.shape == other.shape == gives.shape
        with torch.no_grad():  # sent the way that the layer's output goes, it is the missing part of the sum
            torch.testing.assert_close(WAYS[way](model, target), dense_join - pruned_other, rtol=1e-4, atol=1e-5)
            torch.testing.assert_close(WAYS[way](model, other), pruned_other, rtol=1e-4, atol=1e-5)


NONE = {
    "twice itself": lambda m, x: (lambda y: y + y)(m.b(m.a(x))),
    "scaled sum": lambda m, x: torch.add(m.b(m.a(x)), m.c(x), alpha=2),
    "a number": lambda m, x: m.b(m.a(x)) + 1.0,
    "looked at twice": lambda m, x: (lambda y: (m.c(x) + y) * y)(m.b(m.a(x))),
    "broadcast": lambda m, x: m.b(m.a(x)) + m.c(x).mean(1, keepdim=True),
    "not linear": lambda m, x: F.gelu(m.b(m.a(x))) + m.c(x),
}


@pytest.mark.parametrize("name", NONE)
def test_where_no_plain_addition_follows_the_layers_own_output_is_the_target(name):
    torch.manual_seed(0)
    model, data = Sequenced(NONE[name], a=linear(4, 6), b=linear(6, 5), c=linear(4, 5)).eval(), chunks_of((4,))
    run = repaired(model, lambda g: half(g, "a:out"), data)
    (layer,) = [x for x in run.layers if x.name == "b"]
    assert find_target(layer).join is None
    target, other = run._target(0, layer, run.targets[layer.node])
    assert other is None
    torch.testing.assert_close(target, seen(model, "b", data[0])[1])


def two_blocks(m, x):
    x = m.stem(x)
    x = m.join1(x + m.b1(m.a1(x).relu()))
    x = m.join2(m.b2(m.a2(x).relu()) + m.short(x))
    return m.head(x)


def two_block_net():
    width = dict(stem=linear(6, 8), a1=linear(8, 12), b1=linear(12, 8), a2=linear(8, 12), b2=linear(12, 7), short=linear(8, 7), head=linear(7, 4))
    return Sequenced(two_blocks, **width, join1=nn.Identity(), join2=nn.Identity())


@pytest.mark.parametrize("cut", ["a1:out", "a2:out", "stem:out"])
def test_what_is_left_of_the_error_has_nothing_to_do_with_the_layers_inputs(cut):
    """The law of least squares, in the repaired network as a whole: where a branch was fitted to an addition, the error there
    does not correlate with the inputs of the layer that was fitted last."""
    torch.manual_seed(0)
    model, data = two_block_net().eval(), chunks_of((6,), count=16, rows=64)
    data = [x @ torch.diag(torch.tensor([3.0, 2.0, 1.0, 0.3, 0.2, 0.1])) for x in data]
    run = repaired(model, lambda g: half(g, cut), data, ridge=1e-9)
    rows = {r.layer: r for r in run.run()}
    small = masked(model, run.state)
    x = torch.cat([d for i, d in enumerate(data) if i % 8 != 7])  # every eighth chunk judges
    fitted_last = {"a1:out": ("b1", "join1"), "a2:out": ("b2", "join2"), "stem:out": ("b2", "join2")}
    for layer, place in (fitted_last[cut], ("head", "head")):
        assert rows[layer].used == "least squares" and rows[layer].repaired < rows[layer].plain
        inputs, _ = seen(small, layer, x)
        inputs = inputs[:, small.get_submodule(layer).weight.abs().sum(0) > 0]
        error = seen(model, place, x)[1] - seen(small, place, x)[1]
        both = torch.cat([inputs, error], 1).double()
        across = torch.cov(both.T)[: inputs.shape[1], inputs.shape[1] :].abs().max()
        assert across < 1e-3 * inputs.std() * seen(model, place, x)[1].std()
        assert error.mean(0).abs().max() < 1e-3


def test_of_two_branches_that_meet_the_second_is_fitted_first():
    """`b2` and `short` end in one addition: `short` is fitted to its own output, `b2` to what is missing then."""
    torch.manual_seed(0)
    model, data = two_block_net().eval(), chunks_of((6,), count=8, rows=64)
    run = repaired(model, lambda g: half(g, "stem:out"), data)
    order = [r.layer for r in run.run()]
    assert order.index("short") < order.index("b2")
    assert sorted(order) == sorted(["a1", "b1", "a2", "b2", "short", "head"])
