import copy
from dataclasses import replace

import pytest
import torch
from torch import nn

import secateur as sc
from secateur.errors import DataError
from secateur.repair import batch_norm_statistics
from secateur.repair.batch_norm import Dense
from tests.repair.networks import Sequenced, lively, seen


def test_statistics_are_those_of_what_arrives():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(2, 3, 1), nn.BatchNorm2d(3)).double().eval()
    batches = [torch.randn(8, 2, 4, 4, dtype=torch.float64) + shift for shift in (0.0, 1.0)]
    used = batch_norm_statistics(model, (((batch,), {}) for batch in batches))
    with torch.no_grad():
        arrived = [model[0](batch) for batch in batches]
    mean = sum(x.mean((0, 2, 3)) for x in arrived) / 2
    var = sum(x.transpose(0, 1).flatten(1).var(1) for x in arrived) / 2  # unbiased, as batch norm keeps it
    assert used == 2
    torch.testing.assert_close(model[1].running_mean, mean)
    torch.testing.assert_close(model[1].running_var, var)


def test_a_deep_network_sees_its_own_new_statistics():
    """After re-estimation on one batch, each norm gives mean 0 and variance 1 on that batch."""
    torch.manual_seed(0)
    model = nn.Sequential(*[nn.Sequential(nn.Linear(6, 6), nn.BatchNorm1d(6)) for _ in range(4)]).double().eval()
    x = torch.randn(512, 6, dtype=torch.float64) * 3 + 1
    batch_norm_statistics(model, [((x,), {})])
    with torch.no_grad():
        out = model(x)
    assert out.mean(0).abs().max() < 1e-4
    assert (out.std(0) - 1).abs().max() < 1e-2


def test_weights_and_flags_stay():
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Dropout(0.5)).train()
    before = {n: p.clone() for n, p in model.named_parameters()}
    batch_norm_statistics(model, [((torch.randn(8, 4),), {})])
    assert all(torch.equal(before[n], p) for n, p in model.named_parameters())
    assert all(module.training for module in model.modules())


def test_nothing_changes_when_the_data_is_bad():
    model = nn.Sequential(nn.BatchNorm1d(4))
    before = {n: t.clone() for n, t in model.state_dict().items()}
    with pytest.raises(DataError, match="no batch"):
        batch_norm_statistics(model, [])
    with pytest.raises(DataError, match="finite"):
        batch_norm_statistics(model, [((torch.full((4, 4), float("nan")),), {})])
    assert all(torch.equal(before[n], t) for n, t in model.state_dict().items())


def test_a_batch_of_one_value_has_no_variance_and_is_left_out():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.ReLU(), nn.Linear(4, 3), nn.BatchNorm1d(3)).eval()
    before, x = {n: t.clone() for n, t in model.state_dict().items()}, torch.randn(64, 4)
    with pytest.raises(DataError, match="one value to a channel"):
        batch_norm_statistics(model, [((row[None],), {}) for row in x])
    assert all(torch.equal(before[n], t) for n, t in model.state_dict().items())
    batch_norm_statistics(model, [((x,), {})])
    wanted = {n: t.clone() for n, t in model.state_dict().items()}
    batch_norm_statistics(model, [((x[:1] * 9,), {}), ((x,), {}), ((x[:1],), {})])
    assert all(torch.equal(wanted[n], t) for n, t in model.state_dict().items())


def test_an_instance_norm_is_no_batch_norm():
    """It normalises with copies of its own statistics, so what is behind it sees the same as in the model itself."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.InstanceNorm2d(4, track_running_stats=True), nn.Conv2d(4, 2, 1), nn.BatchNorm2d(2)).eval()
    x = torch.randn(16, 3, 5, 5) + 3
    assert batch_norm_statistics(model[:2], [((x,), {})]) == 0
    assert batch_norm_statistics(model, [((x,), {})]) == 1
    with torch.no_grad():
        arrives = model[:3](x)
    torch.testing.assert_close(model[3].running_mean, arrives.mean((0, 2, 3)))


def network() -> nn.Module:
    """Norms one behind another, one of them called three times."""
    torch.manual_seed(0)
    layers = {"a": nn.Conv2d(2, 6, 3, padding=1), "n": nn.BatchNorm2d(6), "b": nn.Conv2d(6, 6, 3, padding=1),
              "last": nn.Conv2d(6, 5, 1), "m": nn.BatchNorm2d(5)}  # fmt: skip

    def does(net, x):
        for layer in (net.a, net.b, net.b):
            x = net.n(layer(x)).relu()
        return net.m(net.last(x))

    return lively(Sequenced(does, **layers)).double()


def test_beside_itself_a_model_keeps_its_statistics():
    """Whatever the data: it may be other images than those of training."""
    net, batches = network(), [((torch.randn(n, 2, 5, 5, dtype=torch.float64) * 3 + 1,), {}) for n in (7, 4)]
    again = copy.deepcopy(net)
    assert batch_norm_statistics(again, batches, dense=Dense(net, lambda name, values: values)) == 2
    for name, wanted in net.state_dict().items():
        torch.testing.assert_close(again.state_dict()[name], wanted, rtol=1e-12, atol=1e-12)
    batch_norm_statistics(again, batches)
    assert not torch.allclose(again.n.running_mean, net.n.running_mean, atol=0.1), "alone it has those of the data"


def test_after_a_cut_norms_give_the_mean_and_variance_of_the_dense_model():
    torch.manual_seed(0)
    layers = {"a": nn.Conv2d(2, 8, 3), "n": nn.BatchNorm2d(8), "b": nn.Conv2d(8, 8, 3), "m": nn.BatchNorm2d(8, eps=0.1), "out": nn.Linear(8, 3)}
    net = lively(Sequenced(lambda net, x: net.out(net.m(net.b(net.n(net.a(x)).relu())).relu().mean((2, 3))), **layers)).double()
    x = torch.randn(32, 2, 8, 8, dtype=torch.float64) * 2 + 1
    small = sc.prune(net, (x[:2],), sc.MACs("50%"), data=[x], score="l2", repair="batch_norm").model
    for name in ("n", "m"):
        stayed = [int((net.get_submodule(name).weight == w).nonzero()) for w in small.get_submodule(name).weight]
        assert 0 < len(stayed) < 8
        wanted, found = (seen(model, name, x)[1] for model in (net, small))
        torch.testing.assert_close(found.mean((0, 2, 3)), wanted.mean((0, 2, 3))[stayed])
        torch.testing.assert_close(found.var((0, 2, 3)), wanted.var((0, 2, 3))[stayed])


def test_a_channel_that_does_not_move_in_the_dense_model():
    """It gives the same number after its inputs have changed."""
    net = lively(nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))).double()
    with torch.no_grad():
        net[0].weight[1] = 0
    other, x = copy.deepcopy(net), torch.randn(50, 3, dtype=torch.float64)
    with torch.no_grad():
        other[0].weight[2] = 0  # moved, and does not any more
        other[0].bias += 1
    batch_norm_statistics(other, [((x,), {})], dense=Dense(net, lambda name, values: values))
    with torch.no_grad():
        found, wanted = other(x), net(x)
    torch.testing.assert_close(found[:, [0, 1, 3]], wanted[:, [0, 1, 3]])
    torch.testing.assert_close(found[:, 2], wanted[:, 2].mean().expand(50))


def test_several_batches_count_as_a_whole():
    """Rows sorted by class: most of the variance is between batches."""
    torch.manual_seed(0)
    net = lively(nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6))).double()
    other, batches = copy.deepcopy(net), [torch.randn(n, 4, dtype=torch.float64) + 2 * k for k, n in enumerate((40, 60, 20))]
    with torch.no_grad():
        other[0].weight[:, :2] = 0
    batch_norm_statistics(other, [((b,), {}) for b in batches], dense=Dense(net, lambda name, values: values))
    with torch.no_grad():
        found, wanted = other(torch.cat(batches)), net(torch.cat(batches))
    torch.testing.assert_close(found.mean(0), wanted.mean(0))
    torch.testing.assert_close(found.var(0), wanted.var(0), rtol=0.05, atol=0)  # of a batch n - 1 count, of all but one


def chain() -> tuple[nn.Module, nn.Module, torch.Tensor]:
    """Four norms one behind another, the same network after a cut, and rows sorted by what they are."""
    torch.manual_seed(0)
    net = lively(nn.Sequential(*[nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8), nn.ReLU()) for _ in range(4)])).double()
    x = torch.randn(512, 8, dtype=torch.float64) + torch.arange(512)[:, None] / 256
    batch_norm_statistics(net, [((x + 0.3,), {})])
    other = copy.deepcopy(net)
    with torch.no_grad():
        for part in other:
            part[0].weight[:, 0] = 0
    return net, other, x


@pytest.mark.parametrize("rows", [8, 64])
def test_norms_behind_others_come_close_with_small_batches(rows):
    net, other, x = chain()
    batch_norm_statistics(other, (((b,), {}) for b in x.split(rows)), dense=Dense(net, lambda name, values: values))
    wanted, found = (seen(model, "3.1", x)[1] for model in (net, other))
    assert (found.mean(0) - wanted.mean(0)).abs().max() < 0.1
    assert (found.var(0) / wanted.var(0) - 1).abs().max() < 0.15


def test_the_order_of_batches_does_not_matter():
    net, other, x = chain()
    again, batches = copy.deepcopy(other), [((b,), {}) for b in x.split(48)]
    for model, given in ((other, batches), (again, batches[::-1])):
        batch_norm_statistics(model, given, dense=Dense(net, lambda name, values: values))
    for a, b in zip(other.buffers(), again.buffers(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16])
def test_a_channel_that_stopped_moving_gives_the_dense_mean(dtype):
    """Also where nothing is added to its variance."""
    torch.manual_seed(0)
    net = lively(nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8, eps=0.0 if dtype is torch.float64 else 1e-5))).to(dtype)
    other, x = copy.deepcopy(net), torch.randn(64, 6).to(dtype)
    with torch.no_grad():
        other[0].weight[:4] = 0
    batch_norm_statistics(other, [((x,), {})], dense=Dense(net, lambda name, values: values))
    with torch.no_grad():
        found, wanted = other(x).double(), net(x).double()
    assert (found.mean(0) - wanted.mean(0)).abs().max() < 0.02


class Sometimes(nn.Module):
    """A norm for large inputs alone."""

    def __init__(self):
        super().__init__()
        self.a, self.n, self.m = nn.Conv2d(2, 3, 1), nn.BatchNorm2d(3), nn.BatchNorm2d(3)

    def forward(self, x):
        x = self.n(self.a(x))
        return self.m(x) if x.shape[-1] > 4 else x


@pytest.mark.parametrize("beside", [False, True])
def test_a_norm_that_the_first_batch_does_not_run(beside):
    torch.manual_seed(0)
    net, x = lively(Sometimes()), [torch.randn(4, 2, n, n) for n in (4, 6)]
    other = copy.deepcopy(net)
    with torch.no_grad():
        other.a.weight[:, 0] = 0
    dense = Dense(net, lambda name, values: values) if beside else None
    assert batch_norm_statistics(other, [((b,), {}) for b in x], dense=dense) == 2
    assert not torch.equal(other.m.running_mean, net.m.running_mean)


def test_a_model_of_several_dtypes_takes_what_it_took():
    torch.manual_seed(0)
    net = lively(nn.ModuleDict({"head": nn.Linear(3, 2).half(), "a": nn.Linear(4, 3), "n": nn.BatchNorm1d(3)}))
    net.forward = lambda x: net["head"](net["n"](net["a"](x)).half())
    again, x = copy.deepcopy(net), torch.randn(32, 4)
    again.forward = lambda x: again["head"](again["n"](again["a"](x)).half())
    batch_norm_statistics(again, [((x,), {})], dense=Dense(net, lambda name, values: values))
    torch.testing.assert_close(again["n"].running_mean, net["n"].running_mean)


class Shared(nn.Module):
    """Three residual blocks with one norm; the first gives hardly anything."""

    def __init__(self):
        super().__init__()
        self.norm, self.out = nn.BatchNorm2d(6), nn.Linear(6, 3)
        self.blocks = nn.ModuleList(nn.Conv2d(6, 6, 3, padding=1) for _ in range(3))

    def forward(self, x):
        for block in self.blocks:
            x = x + block(self.norm(x).relu())
        return self.out(x.mean((2, 3)))


def test_a_norm_that_is_called_less_often_keeps_what_it_has():
    torch.manual_seed(0)
    net = lively(Shared()).double()
    with torch.no_grad():
        net.blocks[0].weight.mul_(1e-3)
        net.blocks[0].bias.zero_()
    other, x = copy.deepcopy(net), torch.randn(64, 6, 5, 5, dtype=torch.float64) * 3
    del other.blocks[0]
    assert batch_norm_statistics(other, [((x,), {})], dense=(dense := Dense(net, lambda name, values: values))) == 0
    assert dense.kept == ["norm.running_mean"]
    assert torch.equal(other.norm.running_mean, net.norm.running_mean) and torch.equal(other.norm.running_var, net.norm.running_var)


def test_a_norm_over_positions_that_were_cut_keeps_what_it_has():
    torch.manual_seed(0)
    net = lively(nn.Sequential(nn.Linear(12, 24), nn.BatchNorm1d(4), nn.ReLU(), nn.Linear(24, 6))).double()
    x = torch.randn(64, 4, 12, dtype=torch.float64) + 1
    result = sc.prune(net, (x[:2],), sc.MACs("60%"), data=[x], score="l2", repair="batch_norm")
    assert result.plan.why["repair"] == "none" and result.model[0].out_features < 24
    assert [note for note in result.notes if note.startswith("batch norms that keep") and note.endswith(": 1")]
    assert torch.equal(result.model[1].running_mean, net[1].running_mean)


def test_a_norm_of_the_dense_model_alone_throws_no_data_away():
    torch.manual_seed(0)

    def does(net, x):
        x = net.n(net.a(x)).relu()
        return net.m(x.mean((2, 3))) if hasattr(net, "m") else x.mean((2, 3))

    net = lively(Sequenced(does, a=nn.Conv2d(2, 4, 3), n=nn.BatchNorm2d(4), m=nn.BatchNorm1d(4))).double()
    other, rows = copy.deepcopy(net), torch.randn(4, 1, 2, 6, 6, dtype=torch.float64)  # one image a batch has no variance for m
    del other.m
    assert batch_norm_statistics(other, [((row,), {}) for row in rows], dense=Dense(net, lambda name, values: values)) == 4


def test_the_cut_model_may_have_another_dtype_than_the_dense_one():
    net, x = network().float(), torch.randn(16, 2, 5, 5)
    result = sc.prune(net, (x[:2],), sc.MACs("60%"), repair="none")
    wanted = sc.mend(replace(result, model=copy.deepcopy(result.model)), [x], "batch_norm").model
    result.model.double()
    sc.mend(result, [x.double()], "batch_norm")
    for a, b in zip(result.model.buffers(), wanted.buffers(), strict=True):
        torch.testing.assert_close(a, b, check_dtype=False, rtol=1e-3, atol=1e-5)


def test_statistics_that_the_buffers_cannot_hold_are_refused():
    net = lively(nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4)))
    other, x = copy.deepcopy(net), torch.randn(50, 3) * 1e3
    other.half()
    with torch.no_grad():
        other[0].weight.mul_(30)
    before = [b.clone() for b in other.buffers()]
    with pytest.raises(DataError, match="not finite"):
        batch_norm_statistics(other, [((x.half(),), {})])
    assert all(torch.equal(a, b) for a, b in zip(before, other.buffers(), strict=True))


def test_without_the_dense_model_statistics_are_those_of_the_data():
    net, x = network(), torch.randn(16, 2, 5, 5, dtype=torch.float64)
    result = sc.prune(net, (x[:2],), sc.MACs("60%"), repair="none")
    alone = copy.deepcopy(result.model)
    batch_norm_statistics(alone, [((x,), {})])
    mended = sc.mend(replace(result, dense=None), [x], "batch_norm")
    assert any("the dense model is not known" in note for note in mended.notes)
    assert all(torch.equal(a, b) for a, b in zip(alone.state_dict().values(), result.model.state_dict().values(), strict=True))
