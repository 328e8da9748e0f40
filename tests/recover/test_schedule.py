"""Weights that go during training: the formula at every step, zeros that are zero, bad options."""

import copy
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import secateur as sc
from secateur.errors import InputError
from secateur.pattern import NM, Block, Free, Kernels, legal
from secateur.recover.gradual import Gradual
from secateur.recover.schedule import Schedule
from tests.recover.scheduled import KINDS, NESTED, OPTIMIZERS, SIZES, X, made, net, train


# ------------------------------------------------------------------ how much is zero when
def curve(kind, t, begin, end, every, keep):
    """The share of all zeros to come, held between changes: written down from the papers, once more."""
    if t < begin:
        return 0.0
    if kind == "one_shot":
        return 1.0
    changes = list(range(begin, end + 1, every))
    if kind == "iterative":
        k = sum(c <= t for c in changes)
        return (1 - math.exp(math.log(keep) * k / len(changes))) / (1 - keep)
    last = max(c for c in [*changes, end] if c <= t)
    u = 1.0 if begin == end else (last - begin) / (end - begin)
    if kind == "cubic":
        return 3 * u - 3 * u**2 + u**3
    return (1 + math.e ** (-14 + 5)) / (1 + math.e ** (-14 * u + 5))


@settings(max_examples=60, deadline=None)
@given(kind=st.sampled_from(NESTED), begin=st.integers(0, 30), way=st.integers(0, 60), every=st.integers(1, 20), percent=st.integers(1, 99))
def test_the_curve_is_the_formula_at_every_step(kind, begin, way, every, percent):
    time = Gradual(keep=f"{percent}%", kind=kind, begin=begin, end=begin + way, every=every).over(100)
    before = 0.0
    for t in range(101):
        done = float(time.done(t))
        assert done == pytest.approx(curve(kind, t, begin, begin + way, every, percent / 100), abs=1e-12)
        assert done == before or time.changes(t)  # what is not asked for anew does not change
        before = done
    assert time.done(100) == 1  # exactly


@pytest.mark.parametrize("kind", NESTED)
@pytest.mark.parametrize("keep", ["99.9999999999999999%", "0.00000000000000001%", 1e-300])
def test_shares_that_are_one_or_nothing_as_a_float(kind, keep):
    time = Gradual(keep=keep, kind=kind, begin=0, end=60, every=10).over(100)
    done = [float(time.done(t)) for t in range(101)]
    assert done == sorted(done) and done[0] >= 0 and done[100] == 1
    if kind == "iterative" and keep == "99.9999999999999999%":
        assert done[25] == pytest.approx(3 / 7)  # so little goes that every round takes as much


@pytest.mark.parametrize("budget", ["uniform", "erk", "lamp", {"conv.weight": 0.5, "grouped.weight": "10%", "fc.weight": 1, "head.weight": 0.3}])
@pytest.mark.parametrize("kind", NESTED)
def test_every_layer_has_the_zeros_of_the_formula_after_every_step(kind, budget):
    begin, end, every, steps, keep = 3, 17, 4, 20, 0.2
    model, opt, schedule = made(Gradual(keep=keep, budget=budget, kind=kind, begin=begin, end=end, every=every), steps)
    seen, masks, shares = [], [], dict(schedule.shares)

    def look(t):
        seen.append(t)
        if t == begin:
            assert (schedule.shares != shares) == (budget == "lamp")  # which is of the weights of then
            shares.update(schedule.shares)
        assert schedule.shares == shares
        if t == begin - 1:
            model.fc.weight.data[0] *= 50
        share = curve(kind, t, begin, end, every, keep)
        for name, stays in schedule.masks.items():
            groups = 2 if name == "grouped.weight" else 1  # each has a mask of its own
            wanted = SIZES[name] * (1 - (1 - float(schedule.shares[name])) * share)
            assert wanted - groups - 1e-6 <= int(stays.sum()) <= wanted + 1e-6
            if t >= begin:
                assert torch.equal(model.get_parameter(name) != 0, stays)
        final = 1 - sum(SIZES[n] * float(s) for n, s in schedule.shares.items()) / 720
        assert final * share - 1e-9 <= schedule.sparsity <= final * share + 5 / 720
        if masks:
            assert not any(bool((now & ~masks[-1][n]).any()) for n, now in schedule.masks.items())  # nothing comes back
        masks.append({n: m.clone() for n, m in schedule.masks.items()})

    train(model, opt, range(steps), look)
    assert seen == list(range(1, steps + 1))
    if not isinstance(budget, dict):
        assert 0.8 <= schedule.sparsity <= 0.8 + 5 / 720
    if budget == "erk":  # density in proportion to the sum of a weight's dimensions over their product
        kept = {n: float(s) * SIZES[n] for n, s in schedule.shares.items()}
        assert kept["fc.weight"] / kept["head.weight"] == pytest.approx((8 + 12) / (12 + 4), rel=0.1)
        assert kept["conv.weight"] / kept["grouped.weight"] == pytest.approx((8 + 4 + 3 + 3) / (8 + 4 + 3 + 3), rel=0.01)


@pytest.mark.parametrize("kind", NESTED)
def test_the_smallest_of_those_left_go(kind):
    model = net()
    opt = OPTIMIZERS["sgd"](model.parameters())
    moved = {}
    opt.register_step_post_hook(lambda *_: moved.update({n: model.get_parameter(n).detach().clone() for n in SIZES}))  # before the schedule's
    schedule = Schedule(model, opt, Gradual(keep=0.1, kind=kind, begin=2, end=8, every=3), 10)
    before, gone = dict(schedule.masks), 0

    def look(t):
        nonlocal before, gone
        for name in ("conv.weight", "fc.weight", "head.weight"):
            old, new, size = before[name], schedule.masks[name], moved[name].abs()
            if bool((old & ~new).any()):
                gone += 1
                assert size[old & ~new].max() <= size[new].min()
        before = dict(schedule.masks)

    train(model, opt, range(10), look)
    assert gone >= 3


def test_nothing_comes_back_among_zeros():
    """Weights that are 0 without having gone are ranked after none of those that have."""
    model, opt, schedule = made(Gradual(keep=0.1, kind="iterative", every=1, end=6), 8)
    with torch.no_grad():
        model.head.weight.zero_()
    for _ in range(6):
        before = schedule.masks["head.weight"].clone()
        opt.zero_grad()
        opt.step()
        assert not (schedule.masks["head.weight"] & ~before).any()
        share = 1 - (1 - schedule.shares["head.weight"]) * schedule.time.done(schedule.step)
        assert int(schedule.masks["head.weight"].sum()) == int(48 * share)


def test_layers_that_are_asked_for_nothing_and_other_names():
    model, _, schedule = made(Gradual(keep="50%", kind="one_shot", ignore=["fc", "head.*"]), 5)
    assert set(schedule.masks) == {"conv.weight", "grouped.weight"}
    assert (model.fc.weight != 0).all() and not (model.conv.weight != 0).all()
    part = net()
    some = Schedule(part, torch.optim.SGD([part.fc.weight, part.head.bias], 0.1), Gradual(keep="50%", kind="one_shot"), 5)
    assert set(some.masks) == {"fc.weight"} and some.left["conv"] == "its weight is not the optimizer's"


# ------------------------------------------------------------------ zeros are zeros
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("kind", KINDS)
def test_outside_the_mask_all_is_exactly_zero_after_every_step(kind, optimizer):
    model, opt, schedule = made(Gradual(keep=0.3, kind=kind, every=3, begin=0, end=12), 16, optimizer)
    zeros = 0

    def look(t):
        nonlocal zeros
        for name, stays in schedule.masks.items():
            p = model.get_parameter(name)
            kept = [p.detach(), p.grad, *(v for v in opt.state[p].values() if v is not None and v.shape == p.shape)]
            assert len(kept) > 2
            for value in kept:
                assert not value[~stays].any() and not torch.signbit(value[~stays]).any()
            zeros += int((~stays).sum())
        assert schedule.sparsity == 1 - sum(int(m.sum()) for m in schedule.masks.values()) / 720

    train(model, opt, range(16), look)
    assert zeros > 500 and schedule.sparsity >= 0.7
    assert all(bool((model.get_parameter(n)[m] != 0).any()) for n, m in schedule.masks.items())
    schedule.remove()
    left = {n: model.get_parameter(n).detach().clone() for n in SIZES}
    train(model, opt, range(16, 20))
    assert schedule.step == 16
    assert any(bool((model.get_parameter(n)[left[n] == 0] != 0).any()) for n in SIZES)


@pytest.mark.parametrize("kind", ["one_shot", "static", "rigl"])
def test_momentum_from_before_the_schedule_moves_nothing(kind):
    model = net()
    opt = OPTIMIZERS["sgd"](model.parameters())
    train(model, opt, range(3))
    schedule = Schedule(model, opt, Gradual(keep=0.3, kind=kind), 10)
    gone = ~schedule.masks["fc.weight"]
    assert not model.fc.weight[gone].any()
    train(model, opt, range(3, 4))
    assert not opt.state[model.fc.weight]["momentum_buffer"][gone].any()


@pytest.mark.parametrize("pattern", [NM(2, of=4), NM(1, of=4), Block(4, 1), Block(2, 2, "row"), Kernels(), Free("row")], ids=str)
@pytest.mark.parametrize("kind", ["one_shot", "iterative", "cubic", "one_cycle", "static", "ac_dc"])
def test_patterns_are_obeyed_all_the_way(kind, pattern):
    keep = None if isinstance(pattern, NM) else 0.4
    model, opt, schedule = made(Gradual(keep=keep, pattern=pattern, budget="uniform", kind=kind, end=9, every=2), 12)
    counts = []

    def look(t):
        counts.append(schedule.sparsity)
        for name, stays in schedule.masks.items():
            rows = matrix(stays, pattern)
            if isinstance(pattern, NM):
                most = rows.reshape(-1, 4).sum(1)
                assert most.min() == most.max() >= pattern.n  # all groups alike
                if counts[-1]:
                    assert schedule.plan().patterns[name].split(" ")[0] == f"{int(most[0])}:4"
            else:
                assert legal(pattern if name.split(".")[0] in ("conv", "grouped") else of_linear(pattern), rows)

    train(model, opt, range(12), look)
    if isinstance(pattern, NM):
        assert counts[-1] == 1 - pattern.n / 4
        if kind == "cubic":
            assert len(set(counts)) == 5 - pattern.n and counts == sorted(counts)  # 4, 3, ... of 4
    else:
        assert 0.6 <= counts[-1] <= 0.75
    plan = schedule.plan()
    assert {p.split(" ")[0].split("/")[0] for p in plan.patterns.values()} == {sc.pattern.written(pattern).split("/")[0]}
    assert plan.patterns.get("grouped.weight", " groups 2").endswith(" groups 2")
    sc.mask(model, (X[:2],), plan)


def matrix(stays, pattern):
    """Outputs x inputs in a row: of a kernel's places one after the other, where the pattern goes along input channels."""
    if stays.dim() == 4 and (isinstance(pattern, NM) or (isinstance(pattern, Block) and pattern.cols > 1)):
        stays = stays.permute(0, 2, 3, 1)
    return stays.reshape(len(stays), -1)


def of_linear(pattern):
    return Free(pattern.per) if isinstance(pattern, Kernels) else pattern


def test_whole_kernels_go():
    _, _, schedule = made(Gradual(keep=0.4, pattern=Kernels(), kind="one_shot"), 5)
    per = schedule.masks["conv.weight"].sum((2, 3))
    assert set(per.flatten().tolist()) == {0, 9}


# ------------------------------------------------------------------ refusals
BAD = {
    "kind": (dict(kind="linear"), "kind='linear' is unknown"),
    "no share": (dict(keep=None), "does not say how much stays"),
    "all": (dict(keep="100%"), "100 %"),
    "no pattern": (dict(pattern="free"), "is no pattern"),
    "share beside N:M": (dict(keep="10%", pattern=NM(2, of=4)), "Leave keep out"),
    "regrowth in blocks": (dict(kind="rigl", pattern=Block(4, 1)), "'rigl'.*4x1"),
    "regrowth in N:M": (dict(keep=None, kind="set", pattern=NM(2, of=4)), "'set'.*2:4"),
    "regrowth by row": (dict(kind="rigl", pattern=Free("row")), "free per row"),
    "budget": (dict(budget="global"), "budget='global' is unknown"),
    "data": (dict(budget="owl"), "needs calibration data"),
    "search": (dict(budget="search"), "needs calibration data"),
    "layers": (dict(budget={"conv.weight": 0.1}), "says nothing of"),
    "share of a layer": (dict(budget=dict.fromkeys(SIZES, 2)), "200 %"),
    "begin": (dict(begin=-1), "begin=-1"),
    "end": (dict(begin=5, end=3), "begin=5 and end=3 of 20"),
    "after": (dict(end=21), "end=21 of 20"),
    "every": (dict(every=0), "every=0"),
    "whole": (dict(every=1.5), "every=1.5"),
    "start": (dict(start="ones"), "start='ones'"),
    "fraction": (dict(fraction=1.5), "fraction=1.5"),
    "ignore": (dict(ignore="fc"), "letter by letter"),
    "ignore nothing": (dict(ignore=["decoder"]), "'decoder'"),
    "ignore all": (dict(ignore=["*"]), "no layer of Net"),
    "misfit": (dict(keep=None, pattern=NM(9, of=100)), "no layer of Net.*9:100"),
}


@pytest.mark.parametrize("what", BAD)
def test_bad_options_are_refused_before_anything_changes(what):
    options, says = BAD[what]
    model = net()
    opt = OPTIMIZERS["sgd"](model.parameters())
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(InputError, match=says) as refused:
        Schedule(model, opt, Gradual(**{"keep": "10%", "kind": "one_shot", **options}), 20)
    assert str(refused.value).count("\n  ") == 1  # facts, then the way out
    assert all(torch.equal(v, before[n]) for n, v in model.state_dict().items())
    assert not opt._optimizer_step_pre_hooks and not opt._optimizer_step_post_hooks
    assert not any(p._post_accumulate_grad_hooks for p in model.parameters())


def test_wrong_things_are_refused():
    model, how = net(), Gradual(keep="10%", kind="one_shot")
    opt = OPTIMIZERS["sgd"](model.parameters())
    for arguments, says in (
        ((model, "sgd", how, 20), "optimizer is a str"),
        ((model, opt, sc.Sparse(keep="10%"), 20), "how is a Sparse"),
        ((model, opt, how, 0), "steps=0"),
        ((model, opt, how, True), "steps=True"),
        ((copy.deepcopy(model), opt, how, 20), "the optimizer has none of the 4 weights"),
        (("model", opt, how, 20), "model is a str"),
        ((nn.Sequential(nn.Embedding(3, 4)), opt, how, 20), "no layer of Sequential"),
    ):
        with pytest.raises(InputError, match=says):
            Schedule(*arguments)
    assert (model.conv.weight != 0).all()
