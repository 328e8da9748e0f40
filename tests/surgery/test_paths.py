"""Models whose forward goes one way in a call and another under torch.export, as grouped-query attention of transformers does."""

import torch
import torch.nn.functional as F
from torch import nn

import secateur as sc


class GroupedQuery(nn.Module):
    """Two heads of keys for four of queries. In a call the kernel finds out how many queries share a key; under export `groups` says so."""

    def __init__(self):
        super().__init__()
        self.q, self.k, self.v, self.o = nn.Linear(16, 16), nn.Linear(16, 8), nn.Linear(16, 8), nn.Linear(16, 16)
        self.head_dim, self.groups = 4, 2

    def forward(self, x):
        q, k, v = (f(x).view(*x.shape[:2], -1, self.head_dim).transpose(1, 2) for f in (self.q, self.k, self.v))
        if torch.compiler.is_exporting():
            k, v = (t[:, :, None].expand(-1, -1, self.groups, -1, -1).flatten(1, 2) for t in (k, v))
            y = F.scaled_dot_product_attention(q, k, v)
        else:
            y = F.scaled_dot_product_attention(q, k, v, enable_gqa=True)
        return self.o(y.transpose(1, 2).flatten(2))


def test_a_number_that_only_export_reads_is_cut_too():
    torch.manual_seed(0)
    model, x = GroupedQuery().eval(), torch.randn(2, 5, 16)
    graph = sc.trace(model, (x,))
    shared = next(name for name in graph.groups if name.endswith("q:out.1"))
    scores = {name: torch.full((group.size,), torch.inf) for name, group in graph.groups.items()}
    scores[shared] = torch.arange(2.0)
    plan = sc.plan(graph, scores, sc.MACs(at_most="80%"))
    done = sc.cut(model, graph, plan)
    assert done.how == "attributes" and done.model.q.out_features == 8 and done.model.k.out_features == 8
    assert done.model.groups == 1
    again = torch.export.export(done.model, (x,)).module()
    assert torch.allclose(again(x), done.model(x), atol=1e-6)
