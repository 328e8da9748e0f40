"""Values on demand are those of a plain run, in whatever order they are asked for, and nothing is kept that nobody needs."""

import random

import pytest
import torch
from torch import fx, nn
from torch.utils._pytree import tree_leaves

from secateur.errors import InputError
from secateur.repair.flow import Flow, Runner, sources
from secateur.repair.layers import find_layers
from secateur.trace import trace
from tests.repair.networks import ZOO, Sequenced, linear, made


class Recorder(fx.Interpreter):
    """The graph from its first node to its last; of every value a copy as it was when it was computed."""

    def run_node(self, n):
        value = super().run_node(n)
        self.copies[n] = fx.node.map_aggregate(value, lambda v: v.clone() if isinstance(v, torch.Tensor) else v)
        return value


def in_order(graph, model, x):
    named = {**dict(model.named_parameters(remove_duplicate=False)), **dict(model.named_buffers(remove_duplicate=False))}
    capture = graph.capture
    inputs = [named[capture.tensors[n.name]] if n.name in capture.tensors else x.clone() for n in capture.graph.nodes if n.op == "placeholder"]
    run = Recorder(fx.GraphModule({}, capture.graph))
    run.copies = {}
    with torch.no_grad():
        run.run(*inputs, enable_io_processing=False)
    return run.copies


def flow_of(graph, model, feeds, keep=None):
    state = {**graph.capture.values, **{n: t.detach() for n, t in model.state_dict(keep_vars=True).items()}}
    flow = Flow(Runner(graph, keep or {}, state), feeds, sources(graph.capture.graph))
    flow.runner.zeroed_weights = {x.node for x in find_layers(graph)}
    return flow


def check_equal(got, want, node):
    for a, b in zip(tree_leaves(got), tree_leaves(want), strict=True):
        if isinstance(a, torch.Tensor):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6, msg=lambda m, n=node: f"{n}: {m}")


@pytest.mark.parametrize("name", ZOO)
@pytest.mark.parametrize("order", ["forwards", "backwards", "shuffled", "shuffled again"])
def test_every_value_is_that_of_a_plain_run(name, order):
    model, shape = made(name)
    chunks = [torch.randn(3, *shape, generator=torch.Generator().manual_seed(s)) for s in (1, 2)]
    graph = trace(model, (chunks[0].clone(),))
    flow = flow_of(graph, model, [((x.clone(),), {}) for x in chunks])
    nodes = list(flow.needed)
    for node in nodes:
        flow.hold(node)
    asked = [(chunk, node) for node in nodes for chunk in range(2)]
    if order == "backwards":
        asked.reverse()
    elif order != "forwards":
        random.Random(order).shuffle(asked)
    want = [in_order(graph, model, x) for x in chunks]
    for chunk, node in asked:
        check_equal(flow.value(chunk, node), want[chunk][node], node)
    for chunk, node in asked:  # and nothing that was computed later has written into them
        check_equal(flow.value(chunk, node), want[chunk][node], node)


@pytest.mark.parametrize("name", ZOO)
def test_the_last_value_is_the_models_output_and_the_data_is_left_alone(name):
    model, shape = made(name)
    x = torch.randn(3, *shape)
    graph = trace(model, (x.clone(),))
    given = x.clone()
    before = {n: t.clone() for n, t in model.state_dict().items()}
    flow = flow_of(graph, model, [((given,), {})])
    (output,) = [n for n in graph.capture.graph.nodes if n.op == "output"]
    got = tree_leaves(flow.value(0, output))[0]
    with torch.no_grad():
        torch.testing.assert_close(got, model(x.clone()), rtol=1e-5, atol=1e-6)
    assert torch.equal(given, x)
    assert all(torch.equal(before[n], t) for n, t in model.state_dict().items())


@pytest.mark.parametrize("name", ZOO)
def test_nothing_is_left_when_all_was_released(name):
    model, shape = made(name)
    x = torch.randn(3, *shape)
    graph = trace(model, (x,))
    flow = flow_of(graph, model, [((x.clone(),), {})] * 2)
    held = [layer.source for layer in find_layers(graph)] + [layer.end for layer in find_layers(graph)]
    for node in held:
        flow.hold(node)
    for node in held:
        for chunk in range(2):
            flow.value(chunk, node)
        flow.release(node)
    (output,) = [n for n in graph.capture.graph.nodes if n.op == "output"]
    for chunk in range(2):
        flow.value(chunk, output)
        assert set(flow.values[chunk]) <= {output}


def test_only_the_frontier_is_held():
    """A long chain: while the layers are visited one after the other, a value or two are alive, not the whole network's."""
    torch.manual_seed(0)
    model = nn.Sequential(*[nn.Sequential(nn.Linear(4, 4), nn.ReLU()) for _ in range(20)]).eval()
    x = torch.randn(3, 4)
    graph = trace(model, (x,))
    flow = flow_of(graph, model, [((x,), {})])
    layers = find_layers(graph)
    for layer in layers:
        flow.hold(layer.source)
        flow.hold(layer.end)
    for layer in layers:
        flow.value(0, layer.source), flow.value(0, layer.end)
        flow.release(layer.source)
        flow.release(layer.end)
        assert len(flow.values[0]) <= 2


@pytest.mark.parametrize("count", [1, 3])
def test_a_masked_flow_leaves_out_what_went(count):
    """Against the layer's own arithmetic with columns taken out, the garbage of removed units left in place."""
    model, _ = made("gated")
    x = torch.randn(5, 6)
    graph = trace(model, (x,))
    (name,) = graph.groups
    keep = {name: torch.arange(9) >= count}
    flow = flow_of(graph, model, [((x,), {})], keep)
    flow.runner.zeroed_weights = set()
    layer = find_layers(graph)[-1]
    got = flow.value(0, layer.end)
    with torch.no_grad():
        inside = torch.nn.functional.silu(model.a(x)) * model.b(x)
        want = inside[:, count:] @ model.c.weight[:, count:].T + model.c.bias
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)


def _through_a_view(m, x):
    y = m.a(x)
    y[:, :3].relu_()
    return m.b(y)


def _behind_a_view(m, x):
    y = m.a(x)
    z = y.view(-1, 2, 4)
    y.relu_()
    return m.b(y) + m.b(z.flatten(1))


@pytest.mark.parametrize("does", [_through_a_view, _behind_a_view])
def test_writing_through_a_view_is_refused(does):
    torch.manual_seed(0)
    model = Sequenced(does, a=linear(6, 8), b=linear(8, 3)).eval()
    graph = trace(model, (torch.randn(3, 6),))
    with pytest.raises(InputError, match="writes in place into a view"):
        sources(graph.capture.graph)


@pytest.mark.parametrize("norm", [nn.LayerNorm(768), nn.RMSNorm(768), nn.GroupNorm(1, 768)])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_norms_of_half_precision_are_those_of_torch(norm, dtype):
    """A sum of squares of float16 ends at 65,504; torch takes it in float32."""
    torch.manual_seed(0)
    model = nn.Sequential(linear(16, 768), norm, linear(768, 4)).to(dtype).eval()
    x = 30 * torch.randn(8, 16).to(dtype)
    graph = trace(model, (x,))
    for node, want in in_order(graph, model, x).items():
        if node.op == "call_function":
            check_close(flow_of(graph, model, [((x.clone(),), {})]).value(0, node), want, dtype)


def check_close(got, want, dtype):
    assert got.dtype == want.dtype == dtype and bool(torch.isfinite(got).all())
    torch.testing.assert_close(got, want, rtol=0.02, atol=0.02 * float(want.float().std()))
