"""A sparse layer does what the layer did that it stands for, wherever a model or torch asks: or it refuses as that one would."""

import pytest
import torch
from torch import nn
from torch.autograd import forward_ad

from secateur.errors import ProofError
from secateur.measure import count
from secateur.measure.energy import Counters, energy
from secateur.runtime import DecodeLinear, convert, sparse
from secateur.runtime.chain import Chain, max_pool
from tests.runtime.test_layers import zeroed


@pytest.mark.parametrize("channels", [1, 2, 4, 8])
def test_another_number_of_channels_is_refused(kernels, channels):
    dense = zeroed(nn.Conv2d(3, 8, 3, padding=1))
    with torch.no_grad():
        dense.weight[:, 1:] = 0  # so that fewer channels than there are would do
    layer, x = sparse(dense), torch.randn(2, channels, 8, 8)
    chain = Chain({"a": layer, "b": sparse(nn.Conv2d(8, 4, 1))}, [(0, -1), (1, -1)], [2])
    said = f"to have 3 channels, but it has {channels}"
    for call in (layer, chain, sparse(nn.Conv2d(3, 8, 1)), lambda x: torch.export.export(layer, (x,))):
        with pytest.raises(RuntimeError, match=said), torch.no_grad():
            call(x)
    with pytest.raises(RuntimeError, match=said):
        sparse(nn.Conv1d(3, 8, 3))(torch.randn(2, channels, 9))
    with pytest.raises(RuntimeError, match="columns"):
        torch.export.export(sparse(nn.Linear(3, 8)), (torch.randn(2, channels),))


def conv():
    return zeroed(nn.Conv2d(3, 8, 3, padding=1))


def made_two():
    """A convolution and a pooling as they are in a folded graph, and as torch has them."""
    dense = conv()
    chain = Chain({"a": sparse(dense)}, [(0, -1)], [1])
    return lambda x: max_pool(chain(x)[0], (2, 2, 2, 2, 0, 0, 1, 1)), nn.Sequential(dense, nn.MaxPool2d(2))


def made(form, dense):
    return form(dense), dense


FORMS = {
    "linear": (lambda: made(sparse, zeroed(nn.Linear(20, 12))), (2, 20)),
    "bits": (lambda: made(DecodeLinear.of, zeroed(nn.Linear(20, 12))), (2, 20)),
    "convolution": (lambda: made(sparse, conv()), (2, 3, 6, 5)),
    "chain and pooling": (made_two, (2, 3, 6, 5)),
}  # fmt: skip


@pytest.mark.parametrize("name", FORMS)
def test_forward_mode_derivatives_and_transforms_are_those_of_the_dense_layer(kernels, name):
    torch.manual_seed(0)
    make, shape = FORMS[name]
    (layer, dense), x, along = make(), torch.randn(shape), torch.randn(shape)

    def tangent(f):
        with torch.no_grad(), forward_ad.dual_level():
            return forward_ad.unpack_dual(f(forward_ad.make_dual(x, along))).tangent

    asked = {
        "jvp": lambda f: torch.func.jvp(f, (x,), (along,))[1], "a dual number": tangent, "jacfwd": lambda f: torch.func.jacfwd(f)(x),
        "jacrev": lambda f: torch.func.jacrev(f)(x), "grad": lambda f: torch.func.grad(lambda z: f(z).square().sum())(x),
        "vmap": lambda f: torch.func.vmap(f)(x.unsqueeze(1)),
    }  # fmt: skip
    for what, ask in asked.items():
        wanted = ask(dense)
        assert wanted.abs().max() > 0
        torch.testing.assert_close(ask(layer), wanted, rtol=1e-4, atol=1e-5, msg=what)
    if name in ("linear", "convolution"):  # along the values too, in which the layer is linear
        values = layer.values.detach()
        found = torch.func.jvp(lambda v: torch.func.functional_call(layer, {"values": v}, (x,)), (values,), (values,))[1]
        torch.testing.assert_close(found, dense(x) - dense(torch.zeros_like(x)), rtol=1e-4, atol=1e-5)


def test_what_is_compiled_knows_a_transform_too(kernels):
    dense = zeroed(nn.Linear(20, 12))
    layer, x, along = torch.compile(sparse(dense), backend="aot_eager"), torch.randn(2, 20), torch.randn(2, 20)
    with torch.no_grad():
        torch.testing.assert_close(layer(x), dense(x), rtol=1e-4, atol=1e-5)
        with forward_ad.dual_level():
            found = forward_ad.unpack_dual(layer(forward_ad.make_dual(x, along))).tangent
        torch.testing.assert_close(found, along @ dense.weight.T, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(layer(x), dense(x), rtol=1e-4, atol=1e-5)


ASKED = {
    nn.Linear: ("in_features", "out_features"),
    nn.Conv1d: (convs := ("in_channels", "out_channels", "kernel_size", "stride", "padding", "dilation", "groups", "padding_mode", "transposed")),
    nn.Conv2d: convs,
}  # fmt: skip


@pytest.mark.parametrize("dense", [nn.Linear(5, 7), nn.Conv1d(2, 3, 4, 2, 1, 3), nn.Conv2d(2, 3, (4, 1), (2, 1), (0, 1), (1, 3))], ids=str)
def test_what_code_asks_of_a_layer_is_answered(dense):
    layers = [sparse(zeroed(dense)), *([DecodeLinear.of(dense)] if type(dense) is nn.Linear else [])]
    for layer in layers:
        assert {k: getattr(layer, k) for k in ASKED[type(dense)]} == {k: getattr(dense, k) for k in ASKED[type(dense)]}
        assert torch.equal(layer.weight, dense.weight)


class Asks(nn.Module):
    """Reads what a layer answers, as Whisper and T5 do, and of another what no sparse layer has."""

    def __init__(self):
        super().__init__()
        self.conv, self.wo, self.own = zeroed(nn.Conv1d(4, 8, 3, 2, 1)), zeroed(nn.Linear(32, 16)), zeroed(nn.Linear(16, 16))

    def forward(self, x):
        x = self.conv(x).flatten(1)[:, : 16 * self.conv.stride[0]].to(self.wo.weight.dtype)
        return self.own(self.wo(x)) * self.own._parameters["weight"].norm()


@pytest.mark.parametrize("fold", [False, True])
def test_a_model_that_reads_its_layers_is_converted_where_that_goes(kernels, taken, fold):
    torch.manual_seed(0)
    net, x = Asks().eval(), torch.randn(2, 4, 16)
    found = convert(net, (x,), rounds=3, fold=fold)
    with torch.no_grad():
        torch.testing.assert_close(found.model(x), net(x), rtol=1e-4, atol=1e-4)
    if not fold:
        assert set(found.chosen) == {"conv", "wo"} and isinstance(found.model.own, nn.Linear)
        assert {c.layer: c.why for c in found.choices} == {"conv": "", "wo": "", "own": "with it the model raises KeyError: 'weight'"}


@pytest.mark.parametrize("form", ["4x1", "bits"])
def test_a_chosen_layer_that_the_model_cannot_do_without_is_said(kernels, form):
    net, x = Asks().eval(), torch.randn(1, 4, 16)
    assert convert(net, (x,), chosen={"wo": form}).chosen == {}
    with pytest.raises(ProofError, match=r"raises KeyError: 'weight'\.\n.*out of `chosen`"):
        convert(net, (x,), chosen={"own": form})


class Joined(nn.Module):
    """Two convolutions that become a chain, one with another stride, and a linear layer."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.fc = zeroed(nn.Conv2d(3, 8, 3, padding=1)), zeroed(nn.Conv2d(8, 4, (3, 1), 2)), zeroed(nn.Linear(4, 20))

    def forward(self, x):
        return self.fc(torch.relu(self.b(torch.relu(self.a(x)))).mean((2, 3)))


MADE = {
    "layers": ({"a": "1x1", "b": "4x1", "fc": "8x1"}, False), "bits": ({"fc": "bits"}, False),
    "a chain": ({"a_folded": "1x1", "b_folded": "4x1", "fc_folded": "1x1"}, True),
}  # fmt: skip


@pytest.mark.parametrize("name", MADE)
def test_a_sparse_model_counts_as_the_one_it_was_made_of(kernels, name):
    chosen, fold = MADE[name]
    net, x = Joined().eval(), torch.randn(2, 3, 9, 10)
    made = convert(net, (x,), chosen=chosen, fold=fold).model
    assert any(type(m).__name__ == "Chain" for m in made.modules()) == fold
    wanted = 2 * (9 * 10 * 8 * 27 + 4 * 5 * 4 * 24 + 4 * 20)
    assert count(net, (x,)).macs == count(made, (x,)).macs == wanted
    assert energy(made, (x,), counters=Counters((), "none")).joules_macs == energy(net, (x,), counters=Counters((), "none")).joules_macs > 0


class Written(nn.Module):
    """What a layer gives is written into what another gave, which asks for one dtype."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(16, 16), zeroed(nn.Linear(16, 16))

    def forward(self, x):
        y = self.a(x)
        y[torch.arange(2)] = self.b(self.b(x))[:2]
        return y


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", FORMS)
def test_under_autocast_outputs_have_its_dtype(kernels, name, dtype):
    torch.manual_seed(0)
    make, shape = FORMS[name]
    (layer, dense), x = make(), torch.randn(shape)
    with torch.autocast("cpu", dtype):
        for given in (x, x.to(dtype), x.to(dtype).requires_grad_()):
            found, wanted = layer(given), dense(given)
            assert found.dtype == wanted.dtype == dtype
            torch.testing.assert_close(found, wanted, rtol=0.05, atol=0.05)
        assert layer(x.double()).dtype == torch.float64 if name != "chain and pooling" else True
    torch.testing.assert_close(layer(x), dense(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("form", ["4x1", "bits"])
def test_a_model_that_writes_by_index_runs_under_autocast(kernels, form):
    net, x = Written().eval(), torch.randn(4, 16)
    made = convert(net, (x,), chosen={"b": form}).model
    compiled = torch.compile(made, backend="aot_eager", fullgraph=True)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        for model in (made, compiled):
            torch.testing.assert_close(model(x), net(x), rtol=0.05, atol=0.05)


def test_under_autocast_kernels_go_on_after_a_layer_in_half_precision(kernels, monkeypatch):
    layer, x, plus = sparse(conv(), relu=True), torch.randn(1, 3, 5, 5).bfloat16(), torch.randn(1, 8, 5, 5)
    monkeypatch.setattr(type(layer), "matrix", lambda self: 1 / 0)
    with torch.autocast("cpu", torch.bfloat16):
        assert layer(x, plus).dtype == layer(x.float(), plus.bfloat16()).dtype == torch.bfloat16


def test_a_sum_has_the_dtype_of_the_layer(kernels):
    layer, x = sparse(conv()), torch.randn(1, 3, 5, 5)
    assert layer(x, torch.randn(1, 8, 5, 5, dtype=torch.float64)).dtype == torch.float32
