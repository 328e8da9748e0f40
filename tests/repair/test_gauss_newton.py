"""Gauss-Newton on branches: products against dense Jacobians, the linear algebra against direct solves, no harm on held-out rows."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from secateur.plan import Plan
from secateur.repair import changed, put_into, refit
from secateur.repair import gauss_newton as gn
from secateur.repair.branch import Narrow, find_branch
from secateur.repair.fit import LayerRepair
from secateur.repair.layers import find_layers
from secateur.repair.least_squares import Repair, Settings
from secateur.repair.refit import USED, branches, member
from secateur.surgery import cut
from secateur.trace import trace
from tests.repair.networks import Sequenced, linear, lively
from tests.repair.test_repair import NETWORKS, conv_norm, error, made, rows_of


def half(graph, seed=0):
    """A legal choice of about half of the units of every group."""
    random = torch.Generator().manual_seed(seed)
    keep = {n: torch.ones(g.size, dtype=torch.bool) for n, g in graph.groups.items()}
    for n, g in graph.groups.items():
        if n not in graph.blocks and g.size > 3:
            keep[n][torch.randperm(g.size, generator=random)[: g.size // 2]] = False
    return keep


def repair_of(name, chunks=6, keep=None, **settings):
    model, shape = made(name)
    feeds = [((x,), {}) for x in rows_of(shape, 32 * chunks, 1).split(32)]
    graph = trace(model, feeds[0][0])
    state = {n: t.detach() for n, t in model.state_dict(keep_vars=True).items()}
    return model, Repair(graph, half(graph) if keep is None else keep, state, feeds, Settings(branches=True, **settings))


def fit_of(repair, waiting):
    """The problem of one branch, at the weights as they were cut."""
    for flow, node in waiting.asked(repair):
        flow.hold(node)
    narrow = Narrow(repair.pruned, waiting.branch, repair.keep)
    members = [member(repair, narrow, x) for x in waiting.branch.layers]
    dims = repair.graph.env[waiting.branch.end]
    return gn.BranchFit(narrow, members, lambda c: narrow.cut(repair.dense.value(c, waiting.branch.end), dims), False, 1e-3)


# ---------------------------------------------------------------- the branch
@pytest.mark.parametrize("name", NETWORKS)
def test_nothing_outside_looks_into_a_branch(name):
    _, repair = repair_of(name)
    assert repair.branches
    for w in repair.branches:
        nodes, graph = set(w.branch.nodes), repair.graph.capture.graph
        for node in graph.nodes:
            reads = set(repair.pruned.reads[node].values())
            if node in nodes:
                outside = {r for r in reads - nodes if not repair.pruned.constant(r)}
                assert outside <= set(w.branch.boundary)
            elif node in repair.pruned.needed:
                assert not (reads & nodes) - {w.branch.end}
        assert {x.node for x in w.branch.layers} == {x.node for x in repair.layers} & nodes


def test_every_layer_inside_of_which_units_went_is_in_a_branch_and_in_two_at_most_but_for_the_last(monkeypatch):
    torch.manual_seed(0)

    def does(m, x):
        x = m.stem(x)
        for i in range(6):
            x = x + getattr(m, f"d{i}")(F.relu(getattr(m, f"u{i}")(x)))
        return x

    layers = {f"{k}{i}": linear(*((8, 12) if k == "u" else (12, 8))) for i in range(6) for k in "ud"}
    model = Sequenced(does, stem=linear(5, 8), **layers).eval()
    x = torch.randn(8, 5)
    graph = trace(model, (x,))
    state = {n: t.detach() for n, t in model.state_dict().items()}
    repair = Repair(graph, half(graph), state, [((x,), {})] * 3, Settings(branches=True))
    assert len(branches(repair)) == 6, "each end of a small network has its branch"
    monkeypatch.setattr(refit, "FEW", 0)
    times = {x.name: sum(x in w.branch.layers for w in branches(repair)) for x in repair.layers}
    assert all(1 <= times[f"{k}{i}"] <= 2 for i in range(4) for k in "ud") and times["d5"] >= 1


@pytest.mark.parametrize("name", NETWORKS)
def test_a_narrow_branch_gives_what_the_cut_network_gives(name):
    model, repair = repair_of(name)
    keep, graph = repair.keep, repair.graph
    small = cut(model, graph, Plan(keep, graph.cost(), graph.cost(keep)), refuse_class="compared by node").model
    recorded = {}

    class Record(torch.fx.Interpreter):
        def run_node(self, n):
            value = super().run_node(n)
            recorded[n.name] = value.clone() if isinstance(value, torch.Tensor) else value  # later ops may write into it
            return value

    for chunk in (0, 1):
        with torch.no_grad():
            Record(small).run(repair_feed(name, 6, chunk)[0][0])
        for w in repair.branches:
            for flow, node in w.asked(repair):
                flow.hold(node)
            narrow = Narrow(repair.pruned, w.branch, keep)
            got = narrow.run(chunk, {})[w.branch.end]
            torch.testing.assert_close(got, recorded[narrow.image[w.branch.end].name], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", NETWORKS)
def test_spread_puts_a_cut_tensor_back_where_it_came_from(name):
    _, repair = repair_of(name)
    narrow = Narrow(repair.pruned, repair.branches[0].branch, repair.keep)
    for tensor, dims in repair.graph.tensors.items():
        old = repair.state[tensor]
        if not old.is_floating_point():
            continue
        small = narrow.cut(old, dims)
        new = narrow.spread(tensor, small + 1)
        assert torch.equal(narrow.cut(new, dims), small + 1)
        assert int((new != old).sum()) == small.numel() and torch.equal(repair.state[tensor], old)


# ---------------------------------------------------------------- the algebra
def flat(weights):
    return torch.cat([w.flatten() for w in weights.values()])


@pytest.mark.parametrize("rectified", [False, True])
@pytest.mark.parametrize("name", NETWORKS)
def test_products_are_those_of_the_whole_jacobian(name, rectified):
    model, shape = made(name)
    model.double()
    feeds = [((x.double(),), {}) for x in rows_of(shape, 6, 1).split(2)]
    graph = trace(model, feeds[0][0])
    state = {n: t.detach() for n, t in model.state_dict(keep_vars=True).items()}
    repair = Repair(graph, half(graph), state, feeds, Settings(branches=True))
    fit = fit_of(repair, repair.branches[-1])
    fit.rectified = rectified
    weights = fit.start()
    names = list(weights)

    def outputs(*values):
        return torch.cat([fit.output(c, dict(zip(names, values, strict=True))).flatten() for c in (0, 1)])

    parts = torch.autograd.functional.jacobian(outputs, tuple(weights.values()))
    jacobian = torch.cat([p.flatten(1) for p in parts], 1)
    with torch.no_grad():
        missing = torch.cat([fit.wanted(c).flatten() for c in (0, 1)]) - outputs(*weights.values())
    torch.testing.assert_close(flat(fit.gradient([0, 1], weights)), jacobian.T @ missing, rtol=1e-8, atol=1e-9)
    direction = {n: torch.randn_like(w) for n, w in weights.items()}
    torch.testing.assert_close(flat(fit.product([0, 1], weights, direction)), jacobian.T @ (jacobian @ flat(direction)), rtol=1e-8, atol=1e-8)


def test_conjugate_gradients_solve_the_system():
    random = torch.Generator().manual_seed(0)
    m = torch.randn(12, 12, generator=random, dtype=torch.float64)
    a, b = m @ m.T + 0.1 * torch.eye(12, dtype=torch.float64), torch.randn(12, generator=random, dtype=torch.float64)

    def vector(weights):
        return torch.cat([weights["x"], weights["y"]])

    def named(v):
        return {"x": v[:5], "y": v[5:]}

    got = gn.conjugate_gradients(lambda d: named(a @ vector(d)), named(b), lambda r: named(vector(r) / a.diagonal()), 100)
    torch.testing.assert_close(vector(got), torch.linalg.solve(a, b), rtol=1e-2, atol=1e-3)
    nothing = gn.conjugate_gradients(lambda d: named(a @ vector(d)), named(0 * b), lambda r: r, 100)
    assert not vector(nothing).any()


def test_k_is_the_curvature_where_it_is_exact():
    """One linear layer behind another whose outputs are scaled: J^T J is E[x x^T] times the squared scales."""
    torch.manual_seed(0)
    model = nn.Sequential(linear(6, 5), nn.Linear(5, 5, bias=False)).double().eval()
    scales = torch.tensor([1.0, 2.0, 0.5, 3.0, 1.0], dtype=torch.float64)
    model[1].weight.data = torch.diag(scales)
    feeds = [((torch.randn(400, 6, dtype=torch.float64),), {}) for _ in range(4)]
    graph = trace(model, feeds[0][0])
    repair = Repair(graph, half(graph), {n: t.detach() for n, t in model.state_dict().items()}, feeds, Settings(branches=True))
    fit = fit_of(repair, repair.branches[0])
    weights = fit.start()
    k = gn.curvature(fit, [0, 1, 2, 3], weights, torch.Generator().manual_seed(0))[0]
    kept = repair.keep[next(iter(graph.groups))]
    x = torch.cat([f[0][0] for f in feeds])
    torch.testing.assert_close(k.output[0], (scales**2)[kept], rtol=1e-6, atol=1e-6)
    want = torch.linalg.inv(x.T @ x / len(x) + k.ridge * torch.eye(6, dtype=torch.float64))
    torch.testing.assert_close(k.inverse[0], want, rtol=1e-6, atol=1e-6)


# ---------------------------------------------------------------- the repair
@pytest.mark.parametrize("name", ["residual", "perceptron", "depthwise", "attention"])
def test_branches_as_a_whole_are_closer_than_layers_alone_on_fresh_data(name):
    def repaired(branches):
        dense, repair = repair_of(name, chunks=48)
        repair.settings = Settings(branches=branches)
        if not branches:
            repair.branches = []
        repair.run()
        small = cut(dense, repair.graph, Plan(repair.keep, repair.graph.cost(), repair.graph.cost(repair.keep))).model
        put_into(small, repair.graph, repair.keep, changed(dense, repair.graph, repair.state))
        return error(small, dense, NETWORKS[name][1]), repair.rows

    alone, rows = repaired(False)
    assert not any(r.used == USED for r in rows)
    whole, rows = repaired(True)
    assert any(r.used == USED for r in rows)
    assert whole < 0.9 * alone


@pytest.mark.parametrize("name", NETWORKS)
def test_what_was_not_kept_is_as_it_was(name):
    """The dense tensors change only where something stays: no column of what went comes back."""
    _, repair = repair_of(name, chunks=24)
    layers = {x.weight: x for x in repair.layers if x.groups == 1}
    repair.run()
    for tensor, layer in layers.items():
        w = layer.matrix(repair.state[tensor])
        assert not w[:, :, ~repair.kept_inputs(layer)].any()


@pytest.mark.parametrize("constant, value", [("FEWEST", 10**6), ("EFFORT", 1.0)])
def test_too_few_equations_or_too_many_weights_leave_the_layers_as_they_were_fitted(constant, value, monkeypatch):
    monkeypatch.setattr(gn, constant, value)
    _, repair = repair_of("perceptron", chunks=24)
    _, alone = repair_of("perceptron", chunks=24)
    alone.branches = []
    rows, plain = repair.run(), alone.run()
    assert [r for r in rows if "(branch" not in r.layer] == plain
    wholes = [r for r in rows if "(branch" in r.layer]
    assert wholes and all(r.used == "least squares" and r.plain == r.repaired and "too many" in r.why for r in wholes)
    assert all(torch.equal(repair.state[n], t) for n, t in alone.state.items())


def test_a_step_reads_as_many_chunks_as_its_weights_ask_for():
    _, repair = repair_of("perceptron", chunks=24)
    fit = fit_of(repair, repair.branches[-1])
    for equations in (10, 1000, 10**6):
        wanted = -(-gn.EQUATIONS * fit.unknowns // equations)
        assert fit.chunks_for(equations, 10**9) == max(1, wanted)
        assert fit.chunks_for(equations, 3) == (min(3, wanted) if 3 * equations >= gn.FEWEST * fit.unknowns else 0)


class _NoForwardMode(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.sin()

    @staticmethod
    def backward(ctx, grad):
        return grad


def test_an_op_without_a_derivative_keeps_what_the_layers_gave(monkeypatch):
    """Whatever a product with the Jacobian trips over, the repair goes on."""
    _, repair = repair_of("perceptron", chunks=24)

    def step(node, values, weights, whole=Narrow._step):
        value = whole(repair_narrow[0], node, values, weights)
        return _NoForwardMode.apply(value) if "gelu" in node.name else value

    repair_narrow = []
    first = Narrow.__init__

    def made_narrow(self, *args):
        first(self, *args)
        repair_narrow[:] = [self]
        self._step = step

    monkeypatch.setattr(Narrow, "__init__", made_narrow)
    rows = [r for r in repair.run() if "(branch" in r.layer and "cannot be fitted" in r.why]
    assert rows and all(r.used == "least squares" and r.plain == r.repaired for r in rows)


def test_a_step_that_is_worse_on_held_out_chunks_is_not_taken():
    _, repair = repair_of("perceptron", chunks=24)
    fit = fit_of(repair, repair.branches[-1])
    start = fit.start()
    true = fit.error

    def worse(chunks, weights):
        return true(chunks, weights) if all(torch.equal(weights[n], start[n]) for n in start) else 2 * true(chunks, start)

    fit.error = worse
    weights, before, after = gn.gauss_newton(fit, list(range(23)), [23], torch.Generator().manual_seed(0))
    assert before == after and all(torch.equal(weights[n], start[n]) for n in start)


@pytest.mark.parametrize("name", NETWORKS)
def test_the_flow_goes_on_with_the_new_weights(name):
    """After the last layer the masked network's values are those of the repaired tensors."""
    model, repair = repair_of(name, chunks=24)
    (output,) = [n for n in repair.graph.capture.graph.nodes if n.op == "output"]
    repair.pruned.hold(output)
    rows = repair.run()
    assert any(isinstance(r, LayerRepair) and r.used == USED for r in rows)
    fresh = Repair(repair.graph, repair.keep, repair.state, [repair_feed(name, 24, c) for c in range(24)], Settings())
    for chunk in range(24):
        got, want = (r.pruned.value(chunk, output)[0] for r in (repair, fresh))
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
    assert all(set(v) <= {output} for v in repair.pruned.values)


def repair_feed(name, chunks, chunk):
    return (rows_of(NETWORKS[name][1], 32 * chunks, 1).split(32)[chunk],), {}


def test_a_limit_of_layers_ends_a_branch():
    torch.manual_seed(0)
    model = nn.Sequential(*[m for _ in range(8) for m in (linear(6, 6), nn.ReLU())]).eval()
    x = torch.randn(8, 6)
    graph = trace(model, (x,))
    repair = Repair(graph, half(graph), {n: t.detach() for n, t in model.state_dict().items()}, [((x,), {})] * 3)
    layers = {x.node: x for x in find_layers(graph)}
    ends = [x.end for x in repair.layers]
    for limit in (2, 3, 5):
        branch = find_branch(repair.pruned, ends[-1], layers, limit)
        assert [x.name for x in branch.layers] == [f"{2 * i}" for i in range(8 - limit, 8)]
    assert find_branch(repair.pruned, ends[0], layers) is None


def test_convolutions_with_a_projection_are_fitted_with_it():
    def does(m, x):
        x = F.relu(m.stem(x))
        return F.relu(m.two(F.relu(m.one(x))) + m.short(x))

    torch.manual_seed(0)
    model = lively(Sequenced(does, stem=conv_norm(3, 8), one=conv_norm(8, 12), two=conv_norm(12, 8), short=conv_norm(8, 8, 1)))
    x = rows_of((3, 8, 8), 128, 1).split(32)
    graph = trace(model, (x[0],))
    repair = Repair(graph, half(graph), {n: t.detach() for n, t in model.state_dict().items()}, [((b,), {}) for b in x], Settings(branches=True))
    (found,) = [w for w in repair.branches if len(w.branch.layers) > 2]
    assert {"one.0", "two.0", "short.0"} <= {x.name for x in found.branch.layers}


def test_one_chunk_alone_is_not_fitted_as_a_whole():
    """There would be nothing to judge the fit by."""
    assert repair_of("residual", chunks=1)[1].branches == [] and repair_of("residual", chunks=2)[1].branches


def test_a_branch_around_a_removed_block_goes_on_with_its_stream():
    def does(m, x):
        x = m.a(x)
        for up, down in ((m.b, m.c), (m.d, m.e), (m.f, m.g)):
            x = x + down(F.relu(up(x)))
        return x

    torch.manual_seed(0)
    model = Sequenced(does, a=linear(10, 8), **{k: linear(8, 12) for k in "bdf"}, **{k: linear(12, 8) for k in "ceg"}).eval()
    feeds = [((x,), {}) for x in rows_of((10,), 640, 1).split(32)]
    graph = trace(model, feeds[0][0])
    keep = half(graph) | {"e:block": torch.tensor([False])}
    repair = Repair(graph, keep, {n: t.detach() for n, t in model.state_dict().items()}, feeds, Settings(branches=True))
    ends = [w.branch.end for w in repair.branches]
    assert any(set(w.branch.nodes) & set(repair.pruned.runner.bypass) for w in repair.branches) and ends
    (output,) = [n for n in graph.capture.graph.nodes if n.op == "output"]
    repair.pruned.hold(output)
    assert any(r.used == USED for r in repair.run())
    fresh = Repair(graph, keep, repair.state, feeds, Settings())
    for chunk in range(20):
        torch.testing.assert_close(repair.pruned.value(chunk, output)[0], fresh.pruned.value(chunk, output)[0], rtol=1e-4, atol=1e-5)
