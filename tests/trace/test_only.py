"""Which groups are neurons, and cuts that only named groups may take part in."""

import pytest
import torch
from torch import nn

import secateur as sc
from secateur.errors import InputError
from secateur.trace import trace
from secateur.trace.only import named, neurons


class Mixed(nn.Module):
    """A convolution, a residual stream of width 12 with two MLPs (one gated), attention of two heads, a table of vectors."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(1, 12, 2, stride=2)
        self.up, self.down = nn.Linear(12, 20), nn.Linear(20, 12)
        self.gate, self.wide, self.back = nn.Linear(12, 16), nn.Linear(12, 16), nn.Linear(16, 12)
        self.qkv, self.proj = nn.Linear(12, 36), nn.Linear(12, 12)
        self.norm, self.head = nn.LayerNorm(12), nn.Linear(12, 5)

    def forward(self, x):
        x = self.stem(x).flatten(2).transpose(1, 2)
        b, n, _ = x.shape
        q, k, v = self.qkv(x).view(b, n, 3, 2, 6).permute(2, 0, 3, 1, 4)
        x = x + self.proj(nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(b, n, 12))
        x = x + self.down(self.up(self.norm(x)).relu())
        x = x + self.back(self.gate(x).sigmoid() * self.wide(x))
        return self.head(x.mean(1))


X = (torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(0)),)
HIDDEN = {"up:out", "gate:out"}


@pytest.fixture(scope="module")
def net():
    torch.manual_seed(0)
    return Mixed().eval()


@pytest.fixture(scope="module")
def batches():
    return [torch.randn(64, 1, 8, 8, generator=torch.Generator().manual_seed(1)) for _ in range(2)]


def test_hidden_units_are_neurons_and_filters_heads_and_streams_are_none(net):
    assert set(neurons(trace(net, X))) == HIDDEN


def test_a_layer_read_twice_or_an_embedding_is_no_hidden_layer():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.table, self.a, self.b, self.c, self.d = nn.Embedding(7, 8), nn.Linear(8, 6), nn.Linear(6, 4), nn.Linear(6, 4), nn.Linear(8, 6)

        def forward(self, x):
            x = self.table(x)
            h = self.a(x) + self.d(x)  # made by two and read by two: a stream
            return self.b(h) + self.c(h)

    assert neurons(trace(Twice().eval(), (torch.zeros(2, 3, dtype=torch.long),))) == []


@pytest.mark.parametrize("chosen", [{"score": "l2"}, {"score": "obs", "allocation": "curves"}, {"score": "obs", "allocation": "search"},
                                    {"score": "obs", "allocation": "uniform"}])  # fmt: skip
def test_only_they_lose_units_and_as_if_all_others_were_ignored(net, batches, chosen):
    data = None if chosen["score"] == "l2" else batches
    only = sc.prune(net, X, sc.MACs("85%"), only=["neurons"], data=data, repair="none", **chosen)
    assert set(only.plan.removed) <= HIDDEN and only.plan.removed
    other = [n for n in only.plan.keep if n not in HIDDEN]
    ignored = sc.prune(net, X, sc.MACs("85%"), ignore=other, data=data, repair="none", **chosen)
    assert {n: only.plan.keep[n].tolist() for n in HIDDEN} == {n: ignored.plan.keep[n].tolist() for n in HIDDEN}
    assert only.after == ignored.after


def test_patterns_name_groups_and_modules(net):
    graph = trace(net, X)
    assert named(graph, ["up"]) == named(graph, ["u*:out"]) == {"up:out"}
    assert named(graph, ["neurons", "stem"]) == HIDDEN | {n for n in graph.groups if n.startswith("stem:")}
    with pytest.raises(InputError, match="none is a group named by nothing"):
        named(graph, ["nothing"])
    with pytest.raises(InputError, match="none is hidden units"):
        sc.prune(nn.Sequential(nn.Conv2d(1, 4, 1), nn.Conv2d(4, 2, 1)).eval(), X, sc.MACs("50%"), only=["neurons"])


def test_a_sweep_takes_it_too(net):
    for found in sc.sweep(net, X, [sc.MACs("90%"), sc.MACs("85%")], only=["neurons"]):
        assert set(found.plan.removed) <= HIDDEN
