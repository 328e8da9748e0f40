"""Whole residual blocks: which are found, what they cost, what is left when they go."""

import pytest
import torch
from torch import nn

from secateur import MACs, Plan, cut, plan, prove, prune, score, trace
from secateur.errors import CutError
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


class Overwritten(nn.Module):
    """What is behind the addition is written into, and the stream is needed once more; through a dropout at rest too."""

    def __init__(self, drops=False):
        super().__init__()
        self.stem, self.a, self.b, self.head = nn.Linear(6, 8), nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(16, 3)
        self.drop = nn.Dropout(0.5) if drops else nn.Identity()

    def forward(self, x, without=False):
        first = x = self.stem(x)
        x = x.clone() if without else x + self.a(x)
        x = self.drop(x).add_(self.b(x))
        return self.head(torch.cat([first, x], -1))


@pytest.mark.parametrize("drops", [False, True])
def test_what_is_written_behind_a_block_that_went_does_not_reach_the_stream(drops):
    torch.manual_seed(0)
    model, x = Overwritten(drops).eval(), torch.randn(8, 6)
    result = prune(model, (x,), MACs("80%"), depth=True, only=["a"])
    assert result.plan.removed == {"a:block": 1} and torch.allclose(result.model(x), model(x, without=True), atol=1e-6)


def test_what_the_stream_is_a_view_of_may_be_written_into():
    class Viewed(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem, self.a, self.b, self.head = nn.Linear(6, 8), nn.Linear(4, 4), nn.Linear(8, 8), nn.Linear(4, 3)

        def forward(self, x, without=False):
            whole = self.stem(x)
            x = whole.view(-1, 2, 4)
            x = x.clone() if without else x + self.a(x)
            whole.add_(self.b(whole))
            return self.head(x), whole

    torch.manual_seed(0)
    model, x = Viewed().eval(), torch.randn(8, 6)
    result = prune(model, (x,), MACs("85%"), depth=True, only=["a"])
    assert result.plan.removed == {"a:block": 1}
    assert all(torch.allclose(mine, wanted, atol=1e-6) for mine, wanted in zip(result.model(x), model(x, without=True), strict=True))


def test_the_input_is_not_written_into():
    class In(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.head = nn.Linear(6, 6), nn.Linear(6, 3)

        def forward(self, x):
            return self.head(nn.functional.silu(x + self.a(x), inplace=True))

    torch.manual_seed(0)
    model, x = In().eval(), torch.randn(8, 6)
    result, before = prune(model, (x,), MACs("50%"), depth=True, only=["a"]), x.clone()
    assert torch.allclose(result.model(x), model.head(nn.functional.silu(x)), atol=1e-6) and torch.equal(x, before)


def test_a_block_and_one_around_it_both_go():
    class Around(nn.Module):
        def __init__(self):
            super().__init__()
            self.down, self.body, self.tail = nn.Conv2d(8, 8, 1), nn.Sequential(Branch(8), Branch(8)), nn.Conv2d(8, 8, 1)

        def forward(self, x):
            return x + self.tail(self.body(self.down(x).relu()))

    torch.manual_seed(1)
    model = nn.Sequential(nn.Conv2d(4, 8, 3), Around(), Around(), nn.Conv2d(8, 3, 3)).eval()

    def the_first_goes(graph, model, seed):
        scores = {n: torch.full((g.size,), float("inf")) for n, g in graph.groups.items()}
        return scores | {n: torch.tensor([0.0 if n.startswith("1") else float("inf")]) for n in graph.blocks}

    left = nn.Sequential(model[0], model[2], model[3])
    result = prune(model, (X,), MACs(at_most=count(left, (X,)).macs), score=the_first_goes, depth=True)
    assert set(result.plan.removed) == {"1.tail:block", "1.body.0.last:block", "1.body.1.last:block"} and result.proof.passed
    assert torch.allclose(result.model(X), left(X), atol=1e-5)


def test_an_addition_that_makes_another_type_is_no_block():
    class Promoting(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem, self.a = nn.Linear(6, 8).bfloat16(), nn.Linear(8, 8)

        def forward(self, x):
            x = self.stem(x.bfloat16())
            return x + self.a(x.float())

    assert not trace(Promoting().eval(), (torch.randn(4, 6),)).blocks


def test_a_branch_with_casts_is_a_block():
    class Casting(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem, self.a, self.head = nn.Linear(6, 8), nn.Linear(8, 8), nn.Linear(8, 3)

        def forward(self, x):
            x = self.stem(x)
            y = x.to(torch.float32)
            y = self.a((y * torch.rsqrt(y.pow(2).mean(-1, keepdim=True) + 1e-6)).to(x.dtype))
            return self.head(x + y)

    assert set(trace(Casting().eval(), (torch.randn(4, 6),)).blocks) == {"a:block"}


def test_scores_of_blocks_by_the_user_are_obeyed():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(4, 8, 1), Branch(8), Branch(8), Branch(8), nn.Conv2d(8, 3, 1)).eval()

    def first_and_third_stay(graph, model, seed):
        scores = {n: torch.full((g.size,), float("inf")) for n, g in graph.groups.items()}
        return scores | {n: torch.tensor([0.0 if n.startswith("2") else float("inf")]) for n in graph.blocks}

    result = prune(model, (X,), MACs("75%"), score=first_and_third_stay, depth=True)
    assert {n for n in result.plan.removed if n in result.graph.blocks} == {"2.last:block"}


class Fed(nn.Module):
    """Every branch is scaled by what is made of a parameter after the stream, and of a cast of its own weight."""

    def __init__(self, depth=2):
        super().__init__()
        self.stem, self.head = nn.Linear(6, 8), nn.Linear(8, 3)
        self.scale, self.layers = nn.Parameter(torch.rand(8) + 0.5), nn.ParameterList([nn.Parameter(torch.randn(8, 8) / 3) for _ in range(depth)])

    def forward(self, x):
        x = self.stem(x)
        mask = torch.exp(self.scale) * 2
        for weight in self.layers:
            x = x + (torch.tanh(x) @ (weight * 0.5)) * mask
        return self.head(x)


class Crossed(nn.Module):
    """The stream of `x` reads an encoder of `y`, whose outputs nothing else sees."""

    def __init__(self, depth=1):
        super().__init__()
        self.embed, self.encoder, self.head = nn.Linear(6, 8), nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 8)), nn.Linear(8, 3)
        self.cross = nn.ModuleList([nn.Linear(16, 8) for _ in range(depth)])

    def forward(self, x, y):
        x, y = self.embed(x), self.encoder(y)
        for layer in self.cross:
            x = x + layer(torch.cat([torch.relu(x), y], 1))
        return self.head(x)


class Repeated(nn.Module):
    """One layer in two places."""

    def __init__(self):
        super().__init__()
        self.stem, self.layer, self.own, self.head = nn.Linear(6, 8), nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 3)

    def forward(self, x):
        x = self.stem(x)
        for layer in (self.layer, self.layer, self.own):
            x = x + layer(torch.relu(x))
        return self.head(x)


XS = torch.randn(2, 5, 6, generator=torch.Generator().manual_seed(0))


def test_a_branch_may_take_in_what_others_use_too():
    torch.manual_seed(0)
    model = Fed().eval()
    graph = trace(model, (XS[0],))
    first, second = graph.blocks.values()
    assert (first.tensors, first.shared) == (("layers.0",), ()) and (second.tensors, second.shared) == (("layers.1",), ())
    short = Fed(1).eval()
    for name, other in zip(graph.blocks, ("layers.1", "layers.0"), strict=True):
        short.load_state_dict({"layers.0": model.get_parameter(other)}, strict=False)
        for own in ("stem", "head"):
            short.get_submodule(own).load_state_dict(model.get_submodule(own).state_dict())
        short.scale.data.copy_(model.scale)
        made = without(graph, name)
        done = cut(model, graph, made)
        torch.testing.assert_close(done.model(XS[0]), short(XS[0]))
        assert prove(model, graph, made.keep, done.model).passed and count(done.model, (XS[0],)) == made.after


def test_what_is_computed_for_one_block_alone_goes_with_it():
    torch.manual_seed(0)
    model = Crossed().eval()
    graph = trace(model, (*XS,))
    (block,) = graph.blocks.values()
    assert {t.split(".")[0] for t in block.tensors} == {"encoder", "cross"}
    assert not trace(model, (*XS,), ignore=["encoder.2"]).blocks
    made = without(graph, *graph.blocks)
    done = cut(model, graph, made)
    torch.testing.assert_close(done.model(*XS), model.head(model.embed(XS[0])))
    assert not [n for n in done.model.state_dict() if "encoder" in n] and prove(model, graph, made.keep, done.model).passed


def test_what_only_blocks_together_read_is_named_and_may_be_ignored():
    torch.manual_seed(0)
    model = Crossed(2).eval()
    graph = trace(model, (*XS,))
    assert len(graph.blocks) == 2 and not any("encoder" in t for b in graph.blocks.values() for t in b.tensors)
    one, both = without(graph, *[*graph.blocks][:1]), without(graph, *graph.blocks)
    assert not [n for n in cut(model, graph, one).notes if "encoder" in n]
    (note,) = [n for n in cut(model, graph, both).notes if "encoder" in n]
    assert "blocks that go (2)" in note and "encoder.0.bias, encoder.0.weight, encoder.2.bias, encoder.2.weight" in note
    kept = trace(model, (*XS,), ignore=["encoder"])
    cut(model, kept, without(kept, *[*kept.blocks][:1]))
    with pytest.raises(CutError, match=r"'encoder.0.bias', which ignore= names.*\(2 in all\)(.|\n)*ignore="):
        cut(model, kept, without(kept, *kept.blocks))


def test_a_layer_in_two_places_is_ignored_and_scored_in_both():
    torch.manual_seed(0)
    model = Repeated().eval()
    graph = trace(model, (XS[0],))
    assert [len(b.tensors) for b in graph.blocks.values()] == [0, 0, 2]
    scores = score.blocks(graph, model)
    size = [float(w.detach().double().square().mean().sqrt()) for w in (model.layer.weight, model.layer.weight, model.own.weight)]
    torch.testing.assert_close(torch.cat([*scores.values()]), torch.tensor(size, dtype=torch.float64) / (sum(size) / 3))
    assert [*trace(model, (XS[0],), ignore=["layer"]).blocks] == ["own:block"]


def test_depth_says_where_there_are_no_blocks():
    model = nn.Sequential(nn.Conv2d(4, 8, 1), nn.ReLU(), nn.Conv2d(8, 4, 1)).eval()
    said = "no residual block was found"
    assert any(said in n for n in prune(model, (X,), MACs("90%"), depth=True).notes)
    assert not any(said in n for n in prune(model, (X,), MACs("90%")).notes)
