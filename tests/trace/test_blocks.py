"""Whole residual blocks: which are found, what they cost, what is left when they go."""

import pytest
import torch
from torch import nn

from secateur import MACs, Plan, cut, plan, prove, prune, score, trace
from secateur.measure import count

X = torch.randn(3, 4, 6, 6, generator=torch.Generator().manual_seed(0))


class Branch(nn.Module):
    def __init__(self, width, inplace=False):
        super().__init__()
        self.first, self.last = nn.Conv2d(width, width, 3, padding=1), nn.Conv2d(width, width, 1)
        self.norm, self.act = nn.BatchNorm2d(width), nn.ReLU(inplace)

    def forward(self, x):
        return x + self.last(self.act(self.norm(self.first(x))))


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(4, 8, 1)
        self.a, self.b = Branch(8), Branch(8)
        self.widen = nn.Conv2d(8, 16, 1)
        self.head = nn.Linear(16, 3)

    def forward(self, x):
        x = self.b(self.a(self.stem(x)))
        return self.head(self.widen(x).mean((2, 3)))


class Leaky(nn.Module):
    """The branch is used a second time: no block."""

    def __init__(self):
        super().__init__()
        self.stem, self.conv = nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 1)

    def forward(self, x):
        x = self.stem(x)
        y = self.conv(x)
        return x + y, y


class Writing(Leaky):
    """The branch writes into the stream, which is then what passes."""

    def forward(self, x):
        x = self.stem(x)
        return x + self.conv(torch.relu_(x))


@pytest.fixture
def net():
    torch.manual_seed(0)
    return Net().eval()


def without(graph, *names):
    keep = {n: torch.tensor([False]) for n in names}
    return Plan(keep, graph.cost(), graph.cost(keep))


def test_found_by_the_last_layer_of_the_branch(net):
    graph = trace(net, (X,))
    assert list(graph.blocks) == ["a.last:block", "b.last:block"]
    assert set(graph.blocks["a.last:block"].tensors) >= {"a.first.weight", "a.norm.running_mean", "a.last.bias"}


def test_a_branch_that_is_used_elsewhere_is_no_block():
    assert not trace(Leaky().eval(), (X,)).blocks


def test_what_a_branch_wrote_into_the_stream_stays_written():
    model = Writing().eval()
    graph = trace(model, (X,))
    done = cut(model, graph, without(graph, "conv:block"))
    with torch.no_grad():
        torch.testing.assert_close(done.model(X), model.stem(X).relu())


def test_without_a_block_the_stream_passes(net):
    graph = trace(net, (X,))
    made = without(graph, "a.last:block")
    done = cut(net, graph, made)
    with torch.no_grad():
        wanted = net.head(net.widen(net.b(net.stem(X))).mean((2, 3)))
        torch.testing.assert_close(done.model(X), wanted)
        assert not torch.allclose(wanted, net(X))
    assert done.how == "graph" and "1 of 2" in done.why
    assert not [n for n in done.model.state_dict() if n.startswith("a.")]
    assert count(done.model, (X,)) == made.after != made.before
    assert prove(net, graph, made.keep, done.model).passed


def test_both_blocks_and_width_at_once(net):
    graph = trace(net, (X,))
    keep = {**without(graph, *graph.blocks).keep, "stem:out": torch.arange(8) % 2 == 0}
    done = cut(net, graph, Plan(keep, graph.cost(), graph.cost(keep)))
    with torch.no_grad():
        stream = net.stem(X) * keep["stem:out"].view(1, -1, 1, 1)
        torch.testing.assert_close(done.model(X), net.head(net.widen(stream).mean((2, 3))))
    assert count(done.model, (X,)) == graph.cost(keep)


def test_depth_competes_with_width_only_when_asked(net):
    with torch.no_grad():
        for p in net.b.parameters():
            p.mul_(1e-3)
    for depth in (False, True):
        result = prune(net, (X,), MACs(at_most="60%"), depth=depth)
        assert ("b.last:block" in result.plan.removed) == depth
        assert result.after == result.plan.after and result.proof.passed


def test_an_ignored_block_stays(net):
    scores = {**score.l2(trace(net, (X,)), net)}
    graph = trace(net, (X,), ignore=["a.first"])
    assert list(graph.blocks) == ["b.last:block"]
    scores = {n: s for n, s in scores.items() if n in graph.groups}
    low = {n: torch.zeros(1, dtype=torch.float64) for n in graph.blocks}
    made = plan(graph, {**scores, **low}, MACs(at_most="90%"))
    assert not bool(made.keep["b.last:block"].all())


class WritingIntoAView(Leaky):
    """The branch zeroes two channels of the stream before it reads them: without it the stream would be another."""

    def forward(self, x):
        x = self.stem(x)
        x[:, :2].mul_(0.0)
        y = self.conv(x)
        return x + y


def test_a_branch_that_writes_into_a_view_of_the_stream():
    model = WritingIntoAView().eval()
    graph = trace(model, (X,))
    for name in graph.blocks:
        with torch.no_grad():
            done, stream = cut(model, graph, without(graph, name)).model(X), model.stem(X)
            stream[:, :2] = 0.0
            torch.testing.assert_close(done, stream)
