"""Sparse layers: the same function, in every way a layer is used; a converted model that says what it chose."""

import copy
import importlib
import io
import sys

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from secateur.errors import InputError, ProofError
from secateur.runtime import DecodeLinear, SparseConv1d, SparseConv2d, SparseLinear, convert, fold, sparse
from secateur.runtime import ops as ops_module
from secateur.runtime.layers import SparseLayer

build_module = importlib.import_module("secateur.runtime.build")  # the package has a function of that name


def zeroed(layer, share=0.8, r=4, seed=0):
    random = torch.Generator().manual_seed(seed)
    w = layer.weight.detach()
    stays = (torch.rand(-(-len(w) // r), *w.shape[1:], generator=random) >= share).repeat_interleave(r, 0)[: len(w)]
    with torch.no_grad():
        layer.weight.mul_(stays)
    return layer


LAYERS = {
    "linear": (lambda: nn.Linear(70, 37), (3, 5, 70)), "no bias": (lambda: nn.Linear(40, 64, bias=False), (9, 40)),
    "conv2d": (lambda: nn.Conv2d(6, 10, 3, padding=1), (2, 6, 9, 8)),
    "stride": (lambda: nn.Conv2d(6, 9, (3, 1), (2, 1), (1, 0), bias=False), (1, 6, 9, 8)),
    "conv1d": (lambda: nn.Conv1d(5, 12, 3, stride=2, padding=2, dilation=2), (2, 5, 31)),
}  # fmt: skip


@pytest.fixture(params=LAYERS)
def pair(request, kernels):
    torch.manual_seed(0)
    make, shape = LAYERS[request.param]
    dense = zeroed(make())
    return dense, sparse(dense), torch.randn(shape)


def test_the_same_outputs_and_derivatives(pair):
    dense, layer, x = pair
    a, b = x.clone().requires_grad_(), x.clone().requires_grad_()
    wanted, found = dense(a), layer(b)
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)
    towards = torch.randn_like(wanted)
    wanted.backward(towards)
    found.backward(towards)
    torch.testing.assert_close(b.grad, a.grad, rtol=1e-4, atol=1e-4)
    if dense.bias is not None:
        torch.testing.assert_close(layer.bias.grad, dense.bias.grad, rtol=1e-4, atol=1e-4)
    one = copy.deepcopy(layer)
    one.values = nn.Parameter(layer.values.grad)
    there = layer.matrix() != 0
    torch.testing.assert_close(one.matrix()[there], dense.weight.grad.flatten(1)[there], rtol=1e-4, atol=1e-4)


def test_training_keeps_the_zeros(pair):
    dense, layer, x = pair
    zeros = layer.matrix() == 0
    optimizer = torch.optim.SGD(layer.parameters(), 0.05)
    losses = []
    for _ in range(5):
        loss = (layer(x) - 1).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    assert ((layer.matrix() == 0) | ~zeros).all() and not torch.equal(layer.matrix(), dense.weight.flatten(1))


def test_a_copy_a_file_and_an_export_compute_the_same(pair):
    _, layer, x = pair
    with torch.no_grad():
        wanted = layer(x)
        file = io.BytesIO()
        torch.save(layer.state_dict(), file)
        file.seek(0)
        again = copy.deepcopy(layer)
        for p in again.parameters():
            p.zero_()
        again.load_state_dict(torch.load(file, weights_only=True))
        assert torch.equal(again(x), wanted)
        exported = torch.export.export(layer, (x,))
        assert any("sparse" in str(n.target) for n in exported.graph.nodes)
        assert torch.equal(exported.module()(x), wanted)


def test_compiled_it_is_one_graph(kernels):
    net = nn.Sequential(SparseLinear.of(zeroed(nn.Linear(32, 48))), nn.ReLU(), SparseLinear.of(zeroed(nn.Linear(48, 16)))).eval()
    x = torch.randn(7, 32)
    with torch.no_grad():
        compiled = torch.compile(net, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(x), net(x))


def test_a_fused_rectifier_and_its_derivative(kernels):
    dense = zeroed(nn.Linear(20, 12))
    layer, x = SparseLinear.of(dense, relu=True), torch.randn(6, 20)
    torch.testing.assert_close(layer(x), dense(x).relu(), rtol=1e-4, atol=1e-5)
    layer(x).sum().backward()
    dense(x).relu().sum().backward()
    torch.testing.assert_close(layer.bias.grad, dense.bias.grad)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_other_dtypes_are_computed_densely(pair, dtype):
    dense, layer, x = pair
    wanted = copy.deepcopy(dense).to(dtype)(x.to(dtype))
    torch.testing.assert_close(layer(x.to(dtype)), wanted, rtol=0.02, atol=0.02)


def test_without_a_compiler_one_warning_says_the_cure(pair, monkeypatch):
    dense, layer, x = pair
    monkeypatch.setattr(build_module.shutil, "which", lambda name: None)
    monkeypatch.setenv("SECATEUR_KERNELS", "/nonexistent/kernels")
    ops_module._register.cache_clear()
    build_module.load.cache_clear()
    try:
        with pytest.warns(UserWarning, match="Install g\\+\\+"):
            found = layer(x)
        torch.testing.assert_close(found, dense(x), rtol=1e-4, atol=1e-5)
        layer(x)  # says nothing more
        assert "no kernels here" in convert(nn.Sequential(dense), (x,)).notes[0]
    finally:
        ops_module._register.cache_clear()
        build_module.load.cache_clear()


@pytest.mark.parametrize(
    ("layer", "said"),
    [
        (nn.Conv2d(4, 4, 3, groups=2), "it has 2 groups"),
        (nn.Conv2d(4, 4, 3, padding=1, padding_mode="reflect"), "reflect"),
        (nn.Conv2d(4, 4, 3, padding="same"), "same"),
        (nn.ConvTranspose2d(4, 4, 3), "no plain"),
    ],
)
def test_what_has_no_sparse_form_is_refused(layer, said):
    with pytest.raises(InputError, match=said):
        sparse(layer)
    with pytest.raises(InputError, match="r=3"):
        SparseLinear.of(nn.Linear(3, 3), 3)


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = zeroed(nn.Conv2d(16, 64, 3, padding=1), 0.95), zeroed(nn.Conv2d(64, 16, 3, padding=1), 0.1)
        self.fc = zeroed(nn.Linear(256, 512), 0.97)
        self.never = zeroed(nn.Linear(5, 5), 0.9)

    def forward(self, x):
        return self.fc(torch.relu(self.b(torch.relu(self.a(x)))).flatten(2))


def test_convert_says_what_it_chose_and_changes_nothing_else(kernels):
    torch.manual_seed(0)
    net, x = Net().eval(), torch.randn(4, 16, 16, 16)
    before = copy.deepcopy(net.state_dict())
    found = convert(net, (x,), rounds=5)
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items()) and isinstance(net.fc, nn.Linear)
    assert [c.layer for c in found.choices] == ["a", "fc"]  # the dense one is not looked at, and what never ran cannot be timed
    with torch.no_grad():
        torch.testing.assert_close(found.model(x), net(x), rtol=1e-3, atol=1e-4)
    for choice in found.choices:
        layer = found.model.get_submodule(choice.layer)
        assert isinstance(layer, SparseLayer) == (choice.form != "dense")
        assert choice.form == "dense" or (choice.form == f"{layer.r}x1" and choice.sparse < choice.dense)
    assert found.chosen == {c.layer: c.form for c in found.choices if c.form != "dense"}
    chosen = {"fc": "4x1"}
    again = convert(net, (x,), chosen=chosen).model
    assert isinstance(again.fc, SparseLinear) and again.fc.r == 4 and isinstance(again.a, nn.Conv2d)


def test_a_model_that_is_slower_as_a_whole_is_not_handed_back(kernels, monkeypatch):
    def timed(whole):
        return lambda calls, rounds, seconds=None: [1.0, 0.5 if seconds else whole, *[2.0] * (len(calls) - 2)]

    module = sys.modules["secateur.runtime.convert"]
    net, x = nn.Sequential(zeroed(nn.Linear(64, 64), 0.9)).eval(), torch.randn(2, 64)
    monkeypatch.setattr(module, "in_turns", timed(0.5))
    assert isinstance(convert(net, (x,)).model[0], SparseLinear)
    monkeypatch.setattr(module, "in_turns", timed(1.2))
    found = convert(net, (x,))
    assert isinstance(found.model[0], nn.Linear) and "all layers stay dense" in found.notes[0] and found.choices[0].form == "dense"


def test_one_dimension_and_two_are_told_apart(kernels):
    assert isinstance(sparse(nn.Conv1d(2, 2, 1)), SparseConv1d) and not isinstance(sparse(nn.Conv2d(2, 2, 1)), SparseConv1d)
    assert "density" in repr(SparseConv2d.of(zeroed(nn.Conv2d(4, 4, 3))))


class Normed(nn.Module):
    """Batch norms with and without a rectifier, a depthwise convolution, a shortcut that reads what a rectifier gave, a 1-d tail."""

    def __init__(self):
        super().__init__()
        self.a, self.n1 = zeroed(nn.Conv2d(8, 16, 3, padding=1, bias=False), 0.6), nn.BatchNorm2d(16)
        self.d, self.n2 = nn.Conv2d(16, 16, 3, padding=1, groups=16), nn.BatchNorm2d(16)
        self.b, self.act = zeroed(nn.Conv2d(16, 16, 3, stride=1, padding=1), 0.9), nn.ReLU(inplace=True)
        self.c, self.fc = zeroed(nn.Conv1d(16, 12, 3), 0.5), zeroed(nn.Linear(12, 20), 0.5)
        for norm in (self.n1, self.n2):
            nn.init.uniform_(norm.weight, 0.5, 1.5)
            nn.init.normal_(norm.bias)
            norm.running_mean.normal_()
            norm.running_var.uniform_(0.5, 2)

    def forward(self, x):
        y = self.act(self.n1(self.a(x)))
        y = self.act(y + self.n2(self.d(y)))
        y = y + self.act(self.b(y))
        return self.fc(torch.relu(self.c(y.flatten(2))).mean(-1))


def test_a_folded_graph_is_the_model(kernels):
    torch.manual_seed(0)
    net, x = Normed().eval(), torch.randn(3, 8, 9, 7)
    before = copy.deepcopy(net.state_dict())
    graph = fold(net, (x,))
    with torch.no_grad():
        torch.testing.assert_close(graph(x), net(x), rtol=1e-4, atol=1e-5)
        other = torch.randn_like(x)
        torch.testing.assert_close(graph(other), net(other), rtol=1e-4, atol=1e-5)
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())
    kinds = {n: type(m).__name__ for n, m in graph.named_children()}
    assert kinds == {"a_folded": "Fused", "d_folded": "Fused", "b_folded": "Fused", "c_folded": "Fused", "fc_folded": "Linear"}
    calls = {n.target: len(n.args) for n in graph.graph.nodes if n.op == "call_module"}
    assert calls == {"a_folded": 1, "d_folded": 2, "b_folded": 1, "c_folded": 1, "fc_folded": 1}
    assert not any("batch_norm" in str(n.target) or n.op == "get_attr" for n in graph.graph.nodes)


class Sums(nn.Module):
    """Sums that a convolution may take in, and some that it may not."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c, self.d, self.e, self.f = (zeroed(nn.Conv2d(8, 8, k, padding=k // 2), 0.8) for k in (3, 1, 3, 1, 3, 1))
        self.spread = nn.Parameter(torch.randn(8, 1, 1))

    def forward(self, x):
        y = torch.relu(self.a(x) + self.b(x))  # of two convolutions: one takes the other in
        y = x + self.c(y)  # no rectifier
        z = self.d(y)
        y = z + z  # twice itself
        y = torch.add(self.e(y), y, alpha=2)  # scaled
        return self.f(y) + self.spread


def test_sums_are_folded_where_they_are_plain(kernels, monkeypatch):
    for name in ("GAIN", "SLOWER"):
        monkeypatch.setattr(sys.modules["secateur.runtime.convert"], name, 1e9)
    torch.manual_seed(0)
    net, x = Sums().eval(), torch.randn(2, 8, 9, 11)
    graph = fold(net, (x,))
    calls = {n.target: len(n.args) for n in graph.graph.nodes if n.op == "call_module"}
    assert sorted(calls.values()) == [1, 1, 1, 1, 2, 2] and calls["c_folded"] == 2
    found = convert(net, (x,), rounds=3, fold=True)
    assert len(found.chosen) == 6
    other = torch.randn_like(x)
    with torch.no_grad():
        torch.testing.assert_close(graph(other), net(other), rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(found.model(other), net(other), rtol=1e-4, atol=1e-4)


class Stages(nn.Module):
    """Blocks with shortcuts, as residual networks have them, behind a pooling."""

    def __init__(self):
        super().__init__()
        self.stem, self.pool = nn.Conv2d(3, 16, 3, padding=1), nn.MaxPool2d(3, 2, 1)
        self.one, self.two, self.four = (zeroed(nn.Conv2d(16, 16, 3, padding=1), 0.8) for _ in range(3))
        self.three, self.down = zeroed(nn.Conv2d(16, 24, 3, 2, 1, bias=False), 0.8), zeroed(nn.Conv2d(16, 24, 1, 2), 0.8)
        self.low = nn.MaxPool2d((2, 1))

    def forward(self, x):
        x = self.pool(torch.relu(self.stem(x)))
        x = torch.relu(x + self.two(torch.relu(self.one(x))))
        y = torch.relu(self.four(x))
        return torch.relu(self.three(y) + self.down(x)), self.low(y)


def test_convolutions_that_follow_one_another_are_called_at_once(kernels, monkeypatch):
    for name in ("GAIN", "SLOWER"):
        monkeypatch.setattr(sys.modules["secateur.runtime.convert"], name, 1e9)
    torch.manual_seed(0)
    net, x, other = Stages().eval(), torch.randn(2, 3, 20, 22), torch.randn(2, 3, 20, 22)
    found = convert(net, (x,), rounds=3, fold=True).model
    kinds = {n: type(m).__name__ for n, m in found.named_children()}
    assert kinds == {"stem_folded": "Fused", "chain_0": "Chain"} and len(list(found.chain_0.children())) == 5
    assert sum(getattr(n.target, "__name__", "") == "max_pool" for n in found.graph.nodes) == 2
    wanted = net(other)
    with torch.no_grad():
        for a, b in zip(found(other), wanted, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
        exported = torch.export.export(found, (x,)).module()
        for a, b in zip(exported(other), wanted, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
    trained = copy.deepcopy(found)
    for a, b in zip(trained(other), wanted, strict=True):  # with derivatives, so layer by layer
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
    sum(y.sum() for y in trained(other)).backward()
    assert all(p.grad is not None for p in trained.parameters()) and all(p.grad is None for p in found.parameters())
    torch.testing.assert_close(found.double()(other.double())[0], wanted[0].double(), rtol=1e-4, atol=1e-4)  # no kernels for these


class Writes(nn.Module):
    """Values that are written to between a convolution and the sum behind it, or by the sum."""

    def __init__(self, kind):
        super().__init__()
        self.kind, self.a, self.b = kind, zeroed(nn.Conv2d(4, 4, 3, padding=1), 0.8), zeroed(nn.Conv2d(4, 4, 1), 0.8)
        self.register_buffer("state", torch.zeros(2, 4, 6, 7))

    def forward(self, x):
        if self.kind == "a buffer takes the sum":
            return self.state.add_(self.a(x)) * 1.0
        x = x * 1.0
        y = self.a(x)
        if self.kind == "the source changes":
            x.mul_(0.5)
        if self.kind == "a rectifier in place":
            return y + self.b(torch.relu_(x))
        if self.kind == "into itself":
            y += x
            return torch.relu(y)
        return y + x


@pytest.mark.parametrize("kind", ["a buffer takes the sum", "the source changes", "a rectifier in place", "into itself"])
def test_sums_are_left_where_something_is_written(kernels, kind, monkeypatch):
    for name in ("GAIN", "SLOWER"):
        monkeypatch.setattr(sys.modules["secateur.runtime.convert"], name, 1e9)
    torch.manual_seed(0)
    net, x = Writes(kind).eval(), torch.randn(2, 4, 6, 7)
    graph, whole = fold(copy.deepcopy(net), (x,)), convert(copy.deepcopy(net), (x,), rounds=3, fold=True).model
    folded = kind in ("into itself", "a rectifier in place")  # there the second convolution takes in the first
    assert folded == any(len(n.args) > 1 for n in graph.graph.nodes if n.op == "call_module")
    with torch.no_grad():
        for _ in range(3):  # a state moves with every call
            wanted = net(x)
            torch.testing.assert_close(graph(x), wanted, rtol=1e-4, atol=1e-4)
        whole.state.zero_() if hasattr(whole, "state") else None
        assert torch.isfinite(whole(x)).all()


def test_what_is_added_has_a_derivative(kernels):
    torch.manual_seed(0)
    layer = SparseConv2d.of(zeroed(nn.Conv2d(3, 5, 3, padding=1)), 4, relu=True)
    x, plus = torch.randn(2, 3, 6, 5, requires_grad=True), torch.randn(2, 5, 6, 5, requires_grad=True)
    weight = layer.matrix().detach().view(5, 3, 3, 3)
    wanted = torch.relu(F.conv2d(x, weight, layer.bias, padding=1) + plus)
    seed = torch.randn_like(wanted)
    found = layer(x, plus)
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)
    for a, b in zip(torch.autograd.grad(found, (x, plus), seed), torch.autograd.grad(wanted, (x, plus), seed), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_a_folded_model_is_converted(kernels, monkeypatch):
    monkeypatch.setattr(sys.modules["secateur.runtime.convert"], "GAIN", 1e9)  # whatever is measured
    monkeypatch.setattr(sys.modules["secateur.runtime.convert"], "SLOWER", 1e9)
    torch.manual_seed(0)
    net, x = Normed().eval(), torch.randn(6, 8, 9, 7)
    found = convert(net, (x,), rounds=3, fold=True)
    assert set(found.chosen) == {"a_folded", "b_folded", "c_folded", "fc_folded"}
    assert found.model.a_folded.relu and not found.model.fc_folded.relu
    with torch.no_grad():
        torch.testing.assert_close(found.model(x), net(x), rtol=1e-3, atol=1e-4)


def test_a_wrong_layer_is_not_handed_back(kernels, monkeypatch):
    net, x = nn.Sequential(zeroed(nn.Linear(64, 64), 0.9)).eval(), torch.randn(2, 64)

    monkeypatch.setattr(sys.modules["secateur.runtime.convert"], "formed", lambda layer, form: nn.Linear(64, 64))
    with pytest.raises(ProofError, match="apart"):
        convert(net, (x,), chosen={"0": "1x1"})


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_one_token_and_many_are_the_dense_layer(kernels, dtype):
    torch.manual_seed(0)
    dense = zeroed(nn.Linear(100, 37), 0.7, r=1).to(dtype)
    layer = copy.deepcopy(DecodeLinear.of(dense))
    for tokens in (1, 4, 5, 30):
        x = torch.randn(tokens, 100).to(dtype)
        torch.testing.assert_close(layer(x), dense(x), rtol=0.02, atol=0.02 if dtype == torch.bfloat16 else 1e-4)
    again = DecodeLinear(torch.zeros(37, 100, dtype=dtype), torch.zeros(37, dtype=dtype))
    again.values = torch.zeros_like(layer.values)
    again.load_state_dict(layer.state_dict())
    x = torch.randn(1, 100).to(dtype)
    assert torch.equal(again(x), layer(x)) and not list(layer.parameters())
    assert torch.equal(torch.export.export(layer, (x,)).module()(x), layer(x))


def test_a_model_that_decodes_gets_bits(kernels, monkeypatch):
    monkeypatch.setattr(sys.modules["secateur.runtime.convert"], "GAIN", 1e9)
    monkeypatch.setattr(sys.modules["secateur.runtime.convert"], "SLOWER", 1e9)
    torch.manual_seed(0)
    net = nn.Sequential(zeroed(nn.Linear(64, 128), 0.7, r=1), nn.ReLU(), zeroed(nn.Linear(128, 8), 0.7, r=1)).to(torch.bfloat16).eval()
    found = convert(net, (torch.randn(1, 64).bfloat16(),), rounds=3)
    assert found.chosen == {"0": "bits", "2": "bits"} and isinstance(found.model[0], DecodeLinear)
    assert convert(net, (torch.randn(9, 64).bfloat16(),), rounds=3).chosen == {}  # more tokens than that are not bound by bytes
    with pytest.raises(InputError, match="there are dense"):
        convert(net, (torch.randn(1, 64).bfloat16(),), chosen={"0": "3x1"})


def test_a_timed_conversion_can_be_trained_exported_and_loaded(kernels, taken):
    net, x = nn.Sequential(zeroed(nn.Linear(64, 64)), nn.ReLU(), zeroed(nn.Linear(64, 8))).eval(), torch.randn(8, 64)
    with torch.inference_mode():
        inside = convert(net, (x.clone(),), rounds=3).model
    for made in (convert(net, (x,), rounds=3).model, inside):
        made(x).sum().backward()
        assert made[0].values.grad is not None
        made.load_state_dict(made.state_dict())
        torch.export.export(made, (x,))
        made.bfloat16().float()(x)


class Twice(nn.Module):
    """One layer called with two inputs, by keyword too, and one layer under two names."""

    def __init__(self):
        super().__init__()
        self.fc, self.last = zeroed(nn.Linear(16, 16)), zeroed(nn.Linear(16, 8))
        self.same = self.last

    def forward(self, x):
        a, b = self.fc(x), self.fc(input=x[:5])
        return self.last(a[:5] * b) + self.same(b)


def test_inputs_are_those_of_the_model(kernels, taken):
    net, x = Twice().eval(), torch.randn(9, 16)
    found = convert(net, (x,), rounds=3)
    assert set(found.chosen) == {"fc", "last"} and found.model.last is found.model.same
    torch.testing.assert_close(found.model(x), net(x), rtol=1e-4, atol=1e-5)


def test_layers_that_torch_computes_as_one_stay(kernels, taken):
    net = nn.TransformerEncoderLayer(64, 4, 128, batch_first=True).eval()
    zeroed(net.linear1), zeroed(net.linear2)
    x = torch.randn(2, 5, 64)
    found = convert(net, (x,), rounds=3)
    with torch.no_grad():
        torch.testing.assert_close(found.model(x), net(x))
    assert SparseLinear.of(net.linear1).weight.shape == net.linear1.weight.shape


class Hidden(nn.Module):
    """Infinities, a state that counts, randomness that changes nothing, and an argument that is written into."""

    def __init__(self):
        super().__init__()
        self.fc = zeroed(nn.Linear(16, 16))
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x):
        self.calls += 1
        x.mul_(2)
        y = self.fc(x) + self.calls + torch.rand(16)
        return y.masked_fill(torch.arange(16) < 3, -torch.inf)


def test_a_model_with_a_state_is_compared_from_one_state_and_left_in_it(kernels, taken):
    net, x = Hidden().eval(), torch.randn(5, 16)
    before, state = x.clone(), torch.random.get_rng_state()
    found = convert(net, (x,), rounds=3)
    assert found.chosen and torch.equal(x, before) and torch.equal(torch.random.get_rng_state(), state)
    assert float(found.model.calls) == float(net.calls) == 0


def test_what_hooks_see_is_left(kernels, taken):
    net, x = nn.Sequential(zeroed(nn.Linear(16, 16))).eval(), torch.randn(5, 16)
    net[0].register_forward_hook(lambda m, a, y: y + 100)
    found = convert(net, (x,), rounds=3)
    assert not found.choices and torch.equal(found.model(x), net(x))
    for form in ("4x1", "bits"):  # nor is it dropped where a form is asked for
        with pytest.raises(InputError, match="it has hooks"):
            convert(net, (x,), chosen={"0": form})
    with pytest.raises(InputError, match="no such layer"):
        convert(net, (x,), chosen={"zz": "1x1"})


def test_a_slower_graph_is_not_handed_back(kernels, monkeypatch):
    def slow(calls, rounds, seconds=None):
        return [1.0, 5.0, *[9.0] * (len(calls) - 2)]

    monkeypatch.setattr(sys.modules["secateur.runtime.convert"], "in_turns", slow)
    net, x = Normed().eval(), torch.randn(3, 8, 9, 7)
    assert isinstance(convert(net, (x,), fold=True).model, Normed)


class Colliding(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.conv_2 = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8)), nn.Linear(8, 8)
        self.alone = nn.Parameter(torch.randn(8))

    def forward(self, x):
        return self.conv_2(self.conv(x)) * self.alone


NORMS = {
    "names that collide": (Colliding, (3, 8)),
    "the second dimension of three": (lambda: nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8)), (3, 8, 8)),
    "of other size than the last": (lambda: nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(5)), (3, 5, 8)),
    "of four": (lambda: nn.Sequential(nn.Linear(6, 4), nn.BatchNorm2d(4)), (2, 4, 6, 4)),
    "two dimensions": (lambda: nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8)), (3, 8)),
}  # fmt: skip


@pytest.mark.parametrize("name", NORMS)
def test_what_folds_is_the_same_function(kernels, name):
    torch.manual_seed(0)
    make, shape = NORMS[name]
    shape = (2, 4, 6, 6) if name == "of four" else shape
    net = make().eval()
    for m in net.modules():
        if hasattr(m, "running_mean"):
            m.running_mean.normal_(), m.running_var.uniform_(0.5, 2), nn.init.normal_(m.weight), nn.init.normal_(m.bias)
    x = torch.randn(shape)
    graph = fold(net, (x,))
    with torch.no_grad():
        torch.testing.assert_close(graph(x), net(x), rtol=1e-4, atol=1e-5)
    assert sum(p.numel() for p in graph.parameters()) <= sum(p.numel() for p in net.parameters())


def test_vectors_and_images_by_themselves(kernels):
    dense = zeroed(nn.Linear(20, 12))
    layer, x = SparseLinear.of(dense), torch.randn(20, requires_grad=True)
    layer(x).sum().backward()
    wanted = torch.autograd.grad(dense(y := x.detach().clone().requires_grad_()).sum(), y)[0]
    torch.testing.assert_close(x.grad, wanted)
    for conv, shape in ((nn.Conv2d(8, 8, 3, padding=1), (8, 9, 7)), (nn.Conv1d(8, 8, 3), (8, 9))):
        image = torch.randn(shape)
        torch.testing.assert_close(sparse(zeroed(conv))(image), conv(image), rtol=1e-4, atol=1e-5)
    few = DecodeLinear.of(dense)
    few(z := torch.randn(2, 20, requires_grad=True)).sum().backward()
    assert z.grad is not None and few(torch.randn(9, 20, dtype=torch.float64)).dtype == torch.float64


@pytest.mark.parametrize("layer", [nn.Linear(4, 4).double(), nn.Linear(4, 0), nn.Linear(0, 4)])
def test_weights_without_a_kernel_are_refused(layer):
    with pytest.raises(InputError, match="leave it dense"):
        sparse(layer)
