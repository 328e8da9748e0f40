"""`prune` from end to end on small networks, and everything it must refuse without changing anything."""

import copy

import pytest
import torch
from torch import nn

import secateur as sc
from secateur.budget import MACs, Params
from secateur.errors import CaptureError, DataError, InputError, ModelError, TargetError
from secateur.measure import count
from secateur.prune import prune
from secateur.score import CRITERIA


class Net(nn.Module):
    """Batch norms, a shortcut, and sizes written into forward."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, padding=1)
        self.norm = nn.BatchNorm2d(16)
        self.wide = nn.Conv2d(16, 48, 3, padding=1)
        self.conv = nn.Conv2d(48, 16, 3, padding=1)
        self.again = nn.BatchNorm2d(16)
        self.hidden = nn.Linear(16 * 4, 32)
        self.head = nn.Linear(32, 5)

    def forward(self, x):
        x = self.norm(self.stem(x)).relu()
        x = (x + self.again(self.conv(self.wide(x).relu()))).relu()
        x = nn.functional.adaptive_avg_pool2d(x, 2).view(x.shape[0], 16 * 4)
        return self.head(self.hidden(x).relu())


@pytest.fixture
def net():
    torch.manual_seed(0)
    return Net().eval()


half = MACs(at_most="50%")
X = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(1))


def unchanged(model, before):
    return all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_half_the_macs(net):
    before = copy.deepcopy(net.state_dict())
    result = prune(net, (X,), MACs(at_most="50%"))
    assert unchanged(net, before)
    assert result.before == count(net, (X,))
    assert result.after == count(result.model, (X,)) == result.plan.after
    assert 0.48 * result.before.macs < result.after.macs <= 0.5 * result.before.macs
    assert result.proof.passed
    assert result.proof.max_error < 1e-12
    assert result.model(X).shape == net(X).shape


def test_the_result_trains(net):
    result = prune(net, (X,), Params(at_most="60%"))
    result.model.train()
    result.model(X).square().sum().backward()
    assert all(p.grad is not None for p in result.model.parameters())


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_other_dtypes(net, dtype):
    result = prune(net.to(dtype), (X.to(dtype),), MACs(at_most="50%"))
    assert result.proof.passed
    assert {p.dtype for p in result.model.parameters()} == {dtype}
    assert result.model(X.to(dtype)).dtype == dtype


DATA = [(torch.randn(16, 3, 8, 8, generator=torch.Generator().manual_seed(n)) + 2, torch.zeros(16)) for n in (2, 3)]


def test_batch_norm_statistics_come_from_the_data(net):
    plain = prune(net, (X,), MACs(at_most="50%"))
    fitted = prune(net, (X,), MACs(at_most="50%"), data=DATA, score="l2", repair="batch_norm")
    assert all(torch.equal(fitted.plan.keep[n], mask) for n, mask in plain.plan.keep.items())
    assert fitted.proof.max_error == plain.proof.max_error
    assert not torch.allclose(fitted.model.again.running_mean, plain.model.again.running_mean, rtol=1e-2)
    torch.testing.assert_close(fitted.model.norm.running_mean, plain.model.norm.running_mean)  # nothing was cut before it
    assert fitted.plan.why["repair"] == "batch_norm" and not fitted.repairs


def test_what_auto_becomes(net):
    blind, seeing = prune(net, (X,), half), prune(net, (X,), half, data=DATA)
    assert blind.plan.why["score"] == "l2" and "repair" not in blind.plan.why and blind.study is None
    assert [seeing.plan.why[k] for k in ("score", "allocation", "repair")] == ["obs", "search", "gauss_newton"]
    assert seeing.plan.why["calibration_rows"] == 32 and seeing.repairs
    by_score = prune(net, (X,), half, data=DATA, score="l2")
    assert by_score.plan.why["allocation"] == "global" and by_score.plan.why["repair"] == "gauss_newton"
    card = prune(net, (X,), half, data=DATA, score=CRITERIA["obs"], repair="none")
    assert all(torch.equal(card.plan.keep[n], mask) for n, mask in seeing.plan.keep.items())


def test_a_cut_can_be_mended_later(net):
    """In two steps it is the same as in one, and closer to the dense network than the plain cut."""
    at_once = prune(net, (X,), half, data=DATA)
    later = prune(net, (X,), half, data=DATA, repair="none")
    plain = copy.deepcopy(later.model)
    assert later.repairs == [] and sc.mend(later, DATA) is later
    assert all(torch.equal(a, b) for a, b in zip(at_once.model.state_dict().values(), later.model.state_dict().values(), strict=True))
    other = torch.randn(64, 3, 8, 8, generator=torch.Generator().manual_seed(9)) + 2
    with torch.no_grad():
        far, near = ((m(other) - net(other)).square().mean() for m in (plain, later.model))
    assert near < far


def test_mending_says_what_it_did(net):
    result = prune(net, (X,), half, data=DATA, repair="none")
    assert mended(result, "none").plan.why["repair"] == "none"
    assert mended(result, "batch_norm").plan.why["repair"] == "batch_norm"
    with pytest.raises(InputError, match=r"magic.*\n.*least_squares"):
        sc.mend(result, DATA, "magic")
    linear = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
    rows = torch.randn(32, 4)
    result = prune(linear, (rows[:2],), half, data=[rows], repair="batch_norm")
    assert result.plan.why["repair"] == "none", "there is no BatchNorm to re-estimate"


def mended(result, how):
    return sc.mend(result, DATA, how)


@pytest.mark.parametrize("optimizer", [lambda p: torch.optim.SGD(p, 0.1, momentum=0.9), torch.optim.AdamW])
def test_the_optimizer_follows(net, optimizer):
    """One step of the dense model, cut, is where the migrated optimizer stands."""
    used = optimizer(net.parameters())
    net(X).square().sum().backward()
    used.step()
    net.zero_grad()
    result = prune(net, (X,), MACs(at_most="50%"))
    moved = result.migrate(used)
    names = {n: p for n, p in net.named_parameters()}
    for name, small in result.model.named_parameters():
        kept, state = result.cut.kept.get(name), moved.state[small]
        for key, value in used.state[names[name]].items():
            for dim, index in enumerate(kept or []):
                if index is not None and value.dim():
                    value = value.index_select(dim, torch.from_numpy(index))
            assert torch.equal(state[key], value), (name, key)
    result.model(X).square().sum().backward()
    moved.step()


def test_ignore_is_obeyed(net):
    free = prune(net, (X,), MACs(at_most="40%")).model
    assert len(free.stem.weight) < len(net.stem.weight) and len(free.hidden.weight) < len(net.hidden.weight)
    result = prune(net, (X,), MACs(at_most="40%"), ignore=["head", "stem.*"])
    assert result.model.head.weight.shape == net.head.weight.shape
    assert result.model.stem.weight.shape == net.stem.weight.shape
    assert len(result.model.wide.weight) < len(net.wide.weight)
    with pytest.raises(InputError, match="matches no"):
        prune(net, (X,), MACs(at_most="50%"), ignore=["nothing*"])


def test_then_is_one_cut(net):
    first = prune(net, (X,), MACs(at_most="70%"))
    second = prune(first.model, (X,), MACs(at_most="70%"))
    from secateur.surgery import cut

    both = first.plan.then(second.plan)
    at_once = cut(net, first.graph, both).model
    assert both.after == count(at_once, (X,)) == second.after
    assert all(torch.equal(a, b) for a, b in zip(at_once.parameters(), second.model.parameters(), strict=True))


def test_the_seed_decides_random(net):
    keeps = [prune(net, (X,), MACs(at_most="50%"), score="random", seed=seed).plan.keep for seed in (1, 1, 2)]
    same = [all(torch.equal(keeps[0][n], other[n]) for n in keeps[0]) for other in keeps[1:]]
    assert same == [True, False]


class Branching(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(3, 3)

    def forward(self, x):
        if self.layer(x).sum() > 0:  # depends on data
            return self.layer(x)
        return x


def with_nan(model):
    with torch.no_grad():
        model.conv.weight.view(-1)[3] = float("nan")
    return model


REFUSED = {
    "wrong shape": (lambda net: prune(net, (torch.zeros(2, 4, 8, 8),), half), InputError, "4, 8, 8"),
    "args is no tuple": (lambda net: prune(net, X, half), InputError, "tuple"),
    "another dtype": (lambda net: prune(net, (X.double(),), half), InputError, "float64"),
    "the meta device": (lambda net: prune(net.to("meta"), (X.to("meta"),), half), ModelError, "meta"),
    "inputs elsewhere": (lambda net: prune(net, (X.to("meta"),), half), InputError, "meta"),
    "nan weights": (lambda net: prune(with_nan(net), (X,), half), ModelError, "conv.weight"),
    "no target": (lambda net: prune(net, (X,)), InputError, "target"),
    "nothing left": (lambda net: prune(net, (X,), MACs(at_most="0%")), InputError, "0 %"),
    "nothing to do": (lambda net: prune(net, (X,), MACs(at_most="100%")), InputError, "100 %"),
    "out of reach": (lambda net: prune(net, (X,), MACs(at_most=7)), TargetError, "nearest"),
    "unknown criterion": (lambda net: prune(net, (X,), half, score="l7"), InputError, "l2"),
    "unknown allocation": (lambda net: prune(net, (X,), half, allocation="even"), InputError, "uniform"),
    "unknown repair": (lambda net: prune(net, (X,), half, repair="magic"), InputError, "least_squares"),
    "repair without data": (lambda net: prune(net, (X,), half, repair="least_squares"), InputError, "Pass data="),
    "obs without data": (lambda net: prune(net, (X,), half, score="obs"), InputError, "Pass data="),
    "curves without obs": (lambda net: prune(net, (X,), half, score="l2", allocation="curves"), InputError, "score='obs'"),
    "no target with data": (lambda net: prune(net, (X,), data=DATA), InputError, "target"),
    "labels missing": (lambda net: prune(net, (X,), half, data=[X], score="taylor"), DataError, "labels"),
    "empty data": (lambda net: prune(net, (X,), half, data=[]), DataError, "batch"),
    "senseless data": (lambda net: prune(net, (X,), half, data=[7]), DataError, "int"),
    "no parameters": (lambda net: prune(nn.ReLU(), (X,), half), ModelError, "no parameters"),
    "not a module": (lambda net: prune(len, (X,), half), InputError, "Module"),
    "control flow": (lambda net: prune(Branching(), (torch.ones(2, 3),), half), CaptureError, "test_prune.py"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused_with_a_reason_and_nothing_changed(net, name):
    call, error, says = REFUSED[name]
    state, training = copy.deepcopy(net.state_dict()), [module.training for module in net.modules()]
    with pytest.raises(error) as refused:
        call(net)
    assert says in str(refused.value)
    assert [module.training for module in net.modules()] == training
    if name not in ("nan weights", "the meta device"):
        assert unchanged(net, state)
