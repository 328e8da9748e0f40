"""Attention scores: what is lost when dimensions of queries and keys go, and the closed-form repair of the rest.

Scores are q k^T s. With the dimensions S left, the best substitute q_S M k_S^T has

    M = (s / s') (Q_S^T Q_S)^-1 (Q_S^T Q) (K^T K_S) (K_S^T K_S)^-1

where s' is the scale after the cut (1/sqrt(d) becomes larger); M goes into the weights that make the queries. Keys are taken
around their mean, because softmax does not see what all keys share. Queries and keys must come from linear layers through
ops that only move values; rotary positions in between are left as they are.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from secateur.axes import Axis, mask, occurrences
from secateur.repair.layers import Layer
from secateur.repair.solve import RIDGE, factor
from secateur.trace import Graph
from secateur.trace.call import bind, op_name

_MOVES = frozenset(
    "view reshape _unsafe_view permute transpose select slice unbind chunk split split_with_sizes getitem unsqueeze squeeze flatten unflatten "
    "contiguous clone alias detach dropout".split()
)
_PARTS = frozenset("select slice unbind chunk split split_with_sizes getitem".split())
SDPA = "scaled_dot_product_attention"


@dataclass
class Attention:
    """One call of attention. `q_rows`, `k_rows` (heads, dims): the outputs of the two layers that each dimension is."""

    node: fx.Node
    query: Layer
    key: Layer
    q_rows: Tensor
    k_rows: Tensor
    scale: float | None

    @property
    def name(self) -> str:
        return f"{self.query.name} (attention scores)"

    def factor(self, dims: int) -> float:
        return self.scale if self.scale is not None else dims**-0.5

    def dims(self, graph: Graph) -> tuple:
        """Heads and dimensions of the query, as axes."""
        _, heads, _, last = graph.env[bind(self.node)["query"]]
        return heads, last


def find_attentions(graph: Graph, layers: list[Layer]) -> list[Attention]:
    """Every attention whose queries and keys are linear in their inputs, head by head."""
    by_end = {x.end: x for x in layers if not x.why_not and not x.window and x.groups == 1}
    found = []
    for node in graph.capture.graph.nodes:
        if node.op != "call_function" or op_name(node) != SDPA:
            continue
        args = bind(node)
        q, k = (_origin(args[name], by_end) for name in ("query", "key"))
        if q and k and q[1].shape == k[1].shape and _read_by_this_alone(args["query"], node, by_end):
            found.append(Attention(node, q[0], k[0], q[1], k[1], args["scale"]))
    return found


def _read_by_this_alone(query: fx.Node, reader: fx.Node, by_end: Mapping[fx.Node, Layer]) -> bool:
    """Whether nothing else sees the queries, whose weights a repair changes; parts that are split off beside them may be read."""
    while True:
        others = [u for u in query.users if u is not reader]
        if any(op_name(u) not in _PARTS for u in others) or (others and op_name(reader) not in _PARTS):
            return False
        if query in by_end:
            return True
        reader, (query,) = query, query.all_input_nodes


def _origin(node: fx.Node, by_end: Mapping[fx.Node, Layer]) -> tuple[Layer, Tensor] | None:
    """The layer that a (batch, heads, tokens, dims) value comes from, and the outputs of it that it holds."""
    path: list[fx.Node] = []
    while node not in by_end:
        inputs = node.all_input_nodes
        if node.op != "call_function" or op_name(node) not in _MOVES or len(inputs) != 1:
            return None
        path.append(node)
        node = inputs[0]
    layer = by_end[node]
    value = node.meta["val"]
    index: Any = torch.arange(value.shape[-1]).expand(tuple(value.shape)).contiguous()
    for step in reversed(path):
        (before,) = step.all_input_nodes
        args, kwargs = fx.map_arg((step.args, step.kwargs), {before: index}.__getitem__)
        index = step.target(*args, **kwargs)  # type: ignore[operator]
    if not isinstance(index, Tensor) or index.dim() != 4:
        return None
    rows = index[0, :, 0]
    return (layer, rows) if bool((index == rows[None, :, None]).all()) else None


# ---------------------------------------------------------------- what a dimension is worth
@dataclass
class ScoreProblem:
    """An elimination of dimensions of queries and keys (see `secateur.repair.solve.Problem`).

    Attributes:
        q, k: (heads, dims, dims) moments. weight: (heads,), what one unit of squared error of the scores counts.
        columns: (units, dims per unit).
    """

    q: Tensor
    k: Tensor
    weight: Tensor
    columns: Tensor

    def begin(self, ridge: float) -> None:
        self._zq, self._zk = (torch.cholesky_inverse(factor(m, ridge)[0]) for m in (self.q, self.k))

    def costs(self, alive: Tensor) -> Tensor:
        """First order: what dimension i of the queries cannot be told from the others, times the keys' i, and reversed."""
        one = self.k.diagonal(dim1=1, dim2=2) / self._zq.diagonal(dim1=1, dim2=2)
        other = self.q.diagonal(dim1=1, dim2=2) / self._zk.diagonal(dim1=1, dim2=2)
        each = (self.weight[:, None] * (one + other)).sum(0)
        return each[self.columns[alive]].sum(1)

    def remove(self, gone: Tensor) -> None:
        for i in self.columns[gone].reshape(-1).tolist():
            for z in (self._zq, self._zk):
                z -= z[:, :, i, None] * z[:, None, i] / z[:, i, i, None, None]
                z[:, i, i] = 1.0


def score_problem(graph: Graph, attention: Attention, axis: Axis, moments: tuple[Tensor, Tensor], weight: Tensor) -> ScoreProblem:
    _, last = attention.dims(graph)
    units, positions = occurrences(last)[axis]
    order = torch.from_numpy(units.copy()).argsort(stable=True)
    columns = torch.from_numpy(positions.copy())[order].reshape(axis.size, -1)
    return ScoreProblem(*moments, weight, columns)


def per_score(q: Tensor, k: Tensor, v: Tensor, attention: Attention) -> tuple[Tensor, float]:
    """How much unit variance on every score changes each head's output, (heads,), and the variance of all outputs.

    d o = sum_j p_j (v_j - o) d s_j, so E|d o|^2 = sum_j p_j^2 |v_j - o|^2 for independent errors.
    """
    args = bind(attention.node)
    scores = (q.float() @ k.float().mT) * attention.factor(q.shape[-1])
    if args["is_causal"]:
        scores = scores.masked_fill(~torch.ones(scores.shape[-2:], dtype=torch.bool).tril(), -torch.inf)
    p = scores.softmax(-1)
    o = p @ v.float()
    apart = (p**2) @ (v.float() ** 2).sum(-1, keepdim=True) - 2 * (((p**2) @ v.float()) * o).sum(-1, keepdim=True)
    apart = apart + (p**2).sum(-1, keepdim=True) * (o**2).sum(-1, keepdim=True)
    return apart.mean((0, 2, 3)).double(), float(o.var((0, 2), correction=0).sum())


# ---------------------------------------------------------------- repair
@dataclass
class ScoreMoments:
    """Per head: moments of the pruned queries and keys with themselves and with the dense ones, summed over rows."""

    attention: Attention
    heads: Tensor
    kept: Tensor

    def __post_init__(self) -> None:
        self.sums: dict[str, Tensor] = {}

    @property
    def rows(self) -> int:
        return int(self.sums["n"])

    def add(self, q: Tensor, q_dense: Tensor, k: Tensor, k_dense: Tensor) -> None:
        """Outputs of the two layers, (rows, outputs), pruned and dense."""
        a = self.attention
        qs, ks = (x.double()[:, rows[self.heads][:, self.kept]].transpose(0, 1) for x, rows in ((q, a.q_rows), (k, a.k_rows)))
        qd, kd = (x.double()[:, rows[self.heads]].transpose(0, 1) for x, rows in ((q_dense, a.q_rows), (k_dense, a.k_rows)))
        ks, kd = ks - ks.mean(1, keepdim=True), kd - kd.mean(1, keepdim=True)
        self.sums["n"] = self.sums.get("n", torch.zeros((), dtype=torch.float64)) + len(q)
        for name, x, y in (("qq", qs, qs), ("qd", qs, qd), ("kk", ks, ks), ("kd", ks, kd), ("QQ", qd, qd), ("KK", kd, kd)):
            self.sums[name] = self.sums.get(name, torch.zeros((), dtype=torch.float64)) + x.mT @ y

    def fitted(self, ridge: float = RIDGE) -> tuple[Tensor, float, float]:
        """(heads, kept, kept): M, and the relative error of the scores without and with it."""
        m = {n: s / self.sums["n"] for n, s in self.sums.items()}
        dims = len(self.kept)
        ratio = self.attention.factor(dims) / self.attention.factor(int(self.kept.sum()))
        lower_q, lower_k = factor(m["qq"], ridge)[0], factor(m["kk"], ridge)[0]
        cross = m["qd"] @ m["kd"].mT
        best = ratio * torch.cholesky_solve(torch.cholesky_solve(cross.mT, lower_k).mT, lower_q)
        plain = torch.eye(best.shape[-1], dtype=torch.float64).expand_as(best)
        return best, self._error(m, plain / ratio), self._error(m, best / ratio)

    def _error(self, m: Mapping[str, Tensor], x: Tensor) -> float:
        whole = (m["QQ"] * m["KK"]).sum()
        cross = (x * (m["qd"] @ m["kd"].mT)).sum()
        return float((whole - 2 * cross + ((x.mT @ m["qq"] @ x) * m["kk"]).sum()) / whole)


def kept_of(graph: Graph, attention: Attention, keep: Mapping[Axis, object]) -> tuple[Tensor, Tensor]:
    """Which heads and which dimensions stay."""
    return tuple(torch.from_numpy(mask(d, keep).copy()) for d in attention.dims(graph))  # type: ignore[return-value,arg-type]


def write_scores(attention: Attention, state: dict[str, Tensor], m: Tensor, heads: Tensor, kept: Tensor) -> None:
    """Put M into the rows of the queries: W_q' = M^T W_q, head by head."""
    layer = attention.query
    w = layer.matrix(state[layer.weight].detach().double())[0].clone()
    rows = attention.q_rows[heads][:, kept]
    w[rows] = m.mT @ w[rows]
    state[layer.weight] = layer.stored(w[None], state[layer.weight])
    if layer.bias:
        b = state[layer.bias].detach().double().clone()
        b[rows] = (m.mT @ b[rows][..., None])[..., 0]
        state[layer.bias] = b.to(state[layer.bias].dtype)
