"""Attention scores after a cut: the substitute in closed form, against pseudo-inverses over all pairs of rows."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import secateur as sc
from secateur.repair.attention import ScoreMoments, ScoreProblem, find_attentions, kept_of
from secateur.repair.layers import find_layers
from secateur.repair.least_squares import Repair, Settings
from secateur.repair.solve import eliminate
from secateur.surgery.cut import state_of


class Fused(nn.Module):
    def __init__(self, dim=24, heads=2, rank=None):
        super().__init__()
        self.heads, self.head_dim = heads, dim // heads
        self.qkv, self.proj, self.out = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim), nn.Linear(dim, 5)
        if rank is not None:  # queries and keys of every head span only so many dimensions
            with torch.no_grad():
                w = self.qkv.weight[: 2 * dim].view(2 * heads, self.head_dim, dim)
                mix = torch.randn(2 * heads, self.head_dim, rank) @ torch.randn(2 * heads, rank, self.head_dim) / rank
                w.copy_(mix @ w)
                self.qkv.bias[: 2 * dim] = 0

    def forward(self, x):
        b, t, _ = x.shape
        q, k, v = self.qkv(x).view(b, t, 3, self.heads, self.head_dim).permute(2, 0, 3, 1, 4)
        return self.out(x + self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(b, t, -1)))


class Apart(nn.Module):
    """Queries and keys from layers of their own, with a width of their own."""

    def __init__(self, scale=None):
        super().__init__()
        self.q, self.k, self.v, self.o = nn.Linear(16, 16), nn.Linear(16, 16), nn.Linear(16, 16), nn.Linear(16, 16)
        self.scale = scale

    def forward(self, x):
        b, t, _ = x.shape
        q, k, v = (layer(x).view(b, t, 2, 8).transpose(1, 2) for layer in (self.q, self.k, self.v))
        a = F.scaled_dot_product_attention(q, k, v, scale=self.scale)
        return x + self.o(a.transpose(1, 2).reshape(b, t, 16))


def the_attention(model, x):
    graph = sc.trace(model, (x,))
    (attention,) = find_attentions(graph, find_layers(graph))
    return graph, attention


def test_the_rows_of_queries_and_keys_are_found_in_a_fused_layer():
    torch.manual_seed(0)
    model, x = Fused(), torch.randn(2, 7, 24)
    _, attention = the_attention(model, x)
    y = model.qkv(x)
    q, k, _ = y.view(2, 7, 3, 2, 12).permute(2, 0, 3, 1, 4)
    torch.testing.assert_close(y[..., attention.q_rows].transpose(1, 2), q)
    torch.testing.assert_close(y[..., attention.k_rows].transpose(1, 2), k)


@pytest.mark.parametrize("scale", [None, 0.3])
def test_the_substitute_is_the_least_squares_one_over_all_pairs(scale):
    torch.manual_seed(1)
    model, x = Apart(scale).double(), torch.randn(1, 40, 16).double()
    graph, attention = the_attention(model, x)
    heads, kept = torch.tensor([True, True]), torch.tensor([True, False, True, True, False, True, False, True])
    moments = ScoreMoments(attention, heads, kept)
    q, k = model.q(x)[0].detach(), model.k(x)[0].detach()
    moments.add(q, q, k, k)
    m, plain, repaired = moments.fitted(ridge=1e-12)
    ratio = (scale or 8**-0.5) / (scale or 5**-0.5)
    whole = apart = before = 0.0
    for h in range(2):
        qh, kh = q[:, 8 * h : 8 * h + 8], k[:, 8 * h : 8 * h + 8]
        kh = kh - kh.mean(0)
        wanted = ratio * torch.linalg.pinv(qh[:, kept]) @ (qh @ kh.T) @ torch.linalg.pinv(kh[:, kept].T)
        torch.testing.assert_close(m[h], wanted, rtol=1e-6, atol=1e-8)
        scores = qh @ kh.T
        whole += float((scores**2).sum())
        apart += float(((scores - qh[:, kept] @ (m[h] / ratio) @ kh[:, kept].T) ** 2).sum())
        before += float(((scores - qh[:, kept] @ kh[:, kept].T / ratio) ** 2).sum())
    assert repaired == pytest.approx(apart / whole, rel=1e-6)
    assert plain == pytest.approx(before / whole, rel=1e-6)
    assert repaired < plain


def test_scores_of_few_dimensions_survive_a_cut_of_the_others():
    """Queries and keys of every head span four of twelve dimensions: the scores can be had from six, once repaired."""
    torch.manual_seed(2)
    model = Fused(rank=4).eval()
    data = [torch.randn(32, 9, 24) for _ in range(8)]
    graph = sc.trace(model, (data[0],))
    name = next(n for n, g in graph.groups.items() if g.size == 12 and "qkv" in n)
    keep = {name: torch.arange(12) < 6}
    repair = Repair(graph, keep, state_of(model), [((x,), {}) for x in data], Settings())
    rows = {row.layer: row for row in repair.run()}
    scores = rows["qkv (attention scores)"]
    assert scores.plain > 0.2 and scores.repaired < 0.01
    seen = []
    for state, dims, root in ((state_of(model), 12, 12**0.5), (repair.state, 6, 6**0.5)):  # what the written weights really give
        y = F.linear(torch.cat(data), state["qkv.weight"], state["qkv.bias"]).detach().view(-1, 9, 3, 2, 12)[..., :dims]
        q, k, _ = y.permute(2, 0, 3, 1, 4)
        seen.append(q @ (k - k.mean((0, 2), keepdim=True)).mT / root)
    assert ((seen[1] - seen[0]) ** 2).mean() < 0.02 * (seen[0] ** 2).mean()
    heads, kept = kept_of(graph, find_attentions(graph, find_layers(graph))[0], graph.keep_axes(keep))
    assert heads.all() and kept.tolist() == [True] * 6 + [False] * 6


def test_a_cut_of_query_dimensions_is_proven_and_better_repaired():
    torch.manual_seed(3)
    model = Apart().eval()
    data = [torch.randn(32, 9, 16) for _ in range(8)]
    before = copy.deepcopy(model.state_dict())
    errors = {}
    fresh = torch.randn(64, 9, 16)
    for how in ("none", "least_squares"):
        result = sc.prune(model, (data[0][:2],), sc.Params(at_most="75%"), data=data, repair=how, allocation="curves")
        assert result.proof.passed
        with torch.no_grad():
            errors[how] = float(((result.model(fresh) - model(fresh)) ** 2).mean())
    assert errors["least_squares"] < 0.9 * errors["none"]
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_dimensions_that_carry_no_score_go_first():
    torch.manual_seed(4)
    q, k = torch.randn(2, 200, 6).double(), torch.randn(2, 200, 6).double()
    q[:, :, 2] *= 1e-3
    k[:, :, 4] *= 1e-3
    moments = [x.mT @ x / 200 for x in (q, k)]
    order, error = eliminate([], others=[ScoreProblem(*moments, torch.ones(2).double(), torch.arange(6)[:, None])], ridge=1e-9)
    assert set(order[:2].tolist()) == {2, 4}
    assert error[1] < 1e-3 * error[-1]


def test_queries_that_something_else_reads_are_not_rewritten():
    class Read(Apart):
        def forward(self, x):
            b, t, _ = x.shape
            q, k, v = (layer(x).view(b, t, 2, 8).transpose(1, 2) for layer in (self.q, self.k, self.v))
            return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(b, t, 16), q.mean(2)

    graph = sc.trace(Read().eval(), (torch.randn(2, 5, 16),))
    assert find_attentions(graph, find_layers(graph)) == []
