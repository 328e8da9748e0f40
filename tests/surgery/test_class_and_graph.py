"""When the user's class is kept, when the graph is handed back, and that a graph takes any batch size."""

import pytest
import torch
from torch import nn

from secateur import MACs, Plan, cut, prune, trace
from secateur.trace import analyse


class Attention(nn.Module):
    """One `hd` serves queries, keys and values; the stream is wider than heads x hd."""

    def __init__(self, width=12, heads=3, hd=8):
        super().__init__()
        self.heads, self.hd = heads, hd
        self.q, self.k, self.v = (nn.Linear(width, heads * hd) for _ in range(3))
        self.o = nn.Linear(heads * hd, width)

    def forward(self, x):
        b, t, _ = x.shape
        q, k, v = (f(x).view(b, t, self.heads, self.hd).transpose(1, 2) for f in (self.q, self.k, self.v))
        y = nn.functional.scaled_dot_product_attention(q, k, v, scale=0.3)
        return x + self.o(y.transpose(1, 2).reshape(b, t, -1))


class Halves(nn.Module):
    """`chunk(2)` halves whatever it gets."""

    def __init__(self):
        super().__init__()
        self.up, self.a, self.b = nn.Linear(6, 16), nn.Linear(8, 5), nn.Linear(8, 5)

    def forward(self, x):
        a, b = self.up(x).chunk(2, -1)
        return self.a(a) + self.b(b)


X = torch.randn(2, 5, 12, generator=torch.Generator().manual_seed(1))


def test_one_attribute_for_three_axes_ties_them():
    model = Attention().eval()
    free = trace(model, (X,))
    tied = analyse(free.capture, model, for_class=True)
    assert len(free.groups) == 3 and len(tied.groups) == 2
    result = prune(model, (X,), MACs(at_most="50%"))
    assert type(result.model) is Attention and result.cut.how == "attributes"
    assert result.model.hd * result.model.heads == result.model.v.out_features < 24


def test_halves_lose_the_same_units():
    model = Halves().eval()
    result = prune(model, (X[..., :6],), MACs(at_most="50%"))
    assert type(result.model) is Halves
    assert result.model.a.in_features == result.model.b.in_features == result.model.up.out_features // 2


def uneven(model):
    """A plan that the class cannot follow: the halves keep 3 and 5 units."""
    graph = trace(model, (X[..., :6],))
    first, second = list(graph.groups)
    keep = {first: torch.arange(8) < 3, second: torch.arange(8) < 5}
    return graph, Plan(keep, graph.cost(), graph.cost(keep))


def test_what_the_class_cannot_follow_comes_back_as_a_graph():
    model = Halves().eval()
    graph, made = uneven(model)
    done = cut(model, graph, made)
    assert done.how == "graph" and "does not fit" in done.why
    x = X[..., :6]
    with torch.no_grad():
        a, b = model.up(x).chunk(2, -1)
        wanted = model.a(a * (torch.arange(8) < 3)) + model.b(b * (torch.arange(8) < 5))
        torch.testing.assert_close(done.model(x), wanted)


def test_a_graph_takes_any_batch_and_trains():
    model = Attention().eval()
    graph = trace(model, (X,))
    keep = {n: torch.arange(g.size) < g.size - 1 - (g.kind == "value_dim") for n, g in graph.groups.items()}
    done = cut(model, graph, Plan(keep, graph.cost(), graph.cost(keep)))
    assert done.how == "graph" and "batch" not in done.notes[0] and [n for n in done.notes[1:] if "5 in dimension 1 of x" not in n] == []
    more = torch.cat([X, X, X[:1]])
    with torch.no_grad():
        torch.testing.assert_close(done.model(more)[:2], done.model(X))
    done.model(more).square().mean().backward()
    assert all(p.grad is not None and bool(torch.isfinite(p.grad).all()) for p in done.model.parameters())
    torch.export.export(done.model, (more,))


class Counted(Halves):
    """The number of rows is a number among others."""

    def forward(self, x):
        return super().forward(x) * x.shape[0]


@pytest.mark.parametrize("build", [Halves, Counted])
def test_a_batch_of_one_is_free_where_nothing_counts_it_and_else_says_so(build):
    model = build().eval()
    one = X[:1, 0, :6]
    graph = trace(model, (one,))
    first, second = list(graph.groups)
    keep = {first: torch.arange(8) < 3, second: torch.arange(8) < 5}
    done = cut(model, graph, Plan(keep, graph.cost(), graph.cost(keep)))
    assert done.how == "graph" and ("batch of two" in done.notes[-1]) == (build is Counted)
    if build is Halves:
        torch.testing.assert_close(done.model(X[:, 0, :6])[:1], done.model(one))
    else:
        with pytest.raises(AssertionError, match="batch size was 1"):
            done.model(X[:, 0, :6])


class Depends(nn.Module):
    """The batch is mixed, so no other batch size can give the same rows."""

    def __init__(self):
        super().__init__()
        self.halves = Halves()

    def forward(self, x):
        return self.halves(x) - x.mean((0, 1)).sum()


def test_a_batch_that_is_mixed_is_not_freed():
    model = Depends().eval()
    x = X[..., :6]
    graph = trace(model, (x,))
    names = list(graph.groups)
    keep = {names[0]: torch.arange(8) < 3, names[1]: torch.arange(8) < 5}
    done = cut(model, graph, Plan(keep, graph.cost(), graph.cost(keep)))
    assert done.how == "graph" and "depends on the size of the batch" in done.notes[-1]
    with torch.no_grad():
        assert done.model(x).shape == model(x).shape


class Shared(nn.Module):
    """Four query heads share one key head. With one query head left it takes another way, as Llama does: without a mask."""

    def __init__(self, then):
        super().__init__()
        self.then, self.repeats = then, 4
        self.q, self.k, self.v, self.o = nn.Linear(12, 32), nn.Linear(12, 8), nn.Linear(12, 8), nn.Linear(32, 12)

    def forward(self, x):
        b, t, _ = x.shape
        q = self.q(x).view(b, t, self.repeats, 8).transpose(1, 2)
        k, v = (f(x).view(b, t, 1, 8).transpose(1, 2).expand(b, self.repeats, t, 8) for f in (self.k, self.v))
        if self.repeats > 1:
            mask = torch.ones(t, t, dtype=torch.bool).tril()
            y = nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask[None, None])
        else:
            y = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=self.then != "other values")
            y = y + 0 * (k @ k.transpose(2, 3) @ v) if self.then == "more work" else y
        return x + self.o(y.transpose(1, 2).reshape(b, t, -1))


@pytest.mark.parametrize("then", ["the same", "other values", "more work"])
def test_a_class_that_does_the_same_by_other_ops_is_kept(then):
    model = Shared(then).eval()
    graph = trace(model, (X,))
    (heads,) = [g for g in graph.groups.values() if g.size == 4]
    keep = {heads.name: torch.tensor([False, True, False, False])}
    done = cut(model, graph, Plan(keep=keep, before=graph.cost(), after=graph.cost(keep), why={}))
    assert done.how == ("attributes" if then == "the same" else "graph"), done.why
    if done.how == "attributes":
        assert type(done.model) is Shared and done.model.repeats == 1
        torch.testing.assert_close(done.model(X), done.predicted(X))


@pytest.mark.parametrize("kind", [nn.RNNCell, nn.GRUCell, nn.LSTMCell])
def test_a_recurrent_cell_knows_its_cut_sizes(kind):
    """It makes a state of `hidden_size` where none is given."""

    class Steps(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.cell, self.last = nn.Linear(6, 16), kind(16, 32), nn.Linear(32, 3)

        def forward(self, x, state=None):
            state = None if state is None else tuple(state) if kind is nn.LSTMCell else state[0]
            for step in self.first(x).tanh().unbind(1):
                state = self.cell(step, state)
            return self.last(state[0] if kind is nn.LSTMCell else state)

    torch.manual_seed(0)
    result = prune(Steps().eval(), (torch.randn(2, 4, 6),), MACs(at_most="50%"))
    cell = result.model.cell
    assert result.cut.how == "attributes" and cell.hidden_size == cell.weight_hh.shape[1] < 32 and cell.input_size == cell.weight_ih.shape[1] < 16
    given = cell(torch.randn(2, cell.input_size))
    assert (given[0] if kind is nn.LSTMCell else given).shape == (2, cell.hidden_size)
