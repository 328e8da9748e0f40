"""Weights that go during training: the formula at every step, zeros that are zero, regrowth against a slow reference, resuming bit for bit."""

import copy
import io
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import secateur as sc
from secateur.errors import InputError, PlanError
from secateur.pattern import NM, Block, Free, Kernels, legal
from secateur.recover.gradual import DEFAULTS, Gradual
from secateur.recover.schedule import Schedule

KINDS = list(DEFAULTS)
NESTED = ["one_shot", "iterative", "cubic", "one_cycle"]
OPTIMIZERS = {
    "sgd": lambda p: torch.optim.SGD(p, 0.05, momentum=0.9, weight_decay=0.1),
    "adam, foreach off": lambda p: torch.optim.Adam(p, 0.01, weight_decay=0.1, foreach=False),
    "adamw": lambda p: torch.optim.AdamW(p, 0.01, amsgrad=True),
}
X = torch.randn(32, 4, 5, 5, generator=torch.Generator().manual_seed(0))


class Net(nn.Module):
    """A convolution, a grouped one, a batch norm and two linear layers."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(4, 8, 3, padding=1)
        self.norm = nn.BatchNorm2d(8)
        self.grouped = nn.Conv2d(8, 8, 3, groups=2, bias=False)
        self.fc = nn.Linear(8, 12)
        self.head = nn.Linear(12, 4)

    def forward(self, x):
        x = torch.relu(self.grouped(torch.relu(self.norm(self.conv(x)))))
        return self.head(torch.relu(self.fc(x.mean((2, 3)))))


SIZES = {"conv.weight": 288, "grouped.weight": 288, "fc.weight": 96, "head.weight": 48}


def net():
    torch.manual_seed(0)
    return Net().train()


def target(x):
    return x[:, :, 2, 2].sin()


def backward(model, step, parts=1):
    """Gradients of the batch of a step, in so many parts."""
    rows = torch.randint(0, 32, (8,), generator=torch.Generator().manual_seed(step))
    for part in rows.chunk(parts):
        (nn.functional.mse_loss(model(X[part]), target(X[part])) / parts).backward()


def train(model, optimizer, steps, look=lambda step: None, parts=1):
    for step in steps:
        backward(model, step, parts)
        optimizer.step()
        look(step + 1)
        optimizer.zero_grad()


def made(how, steps, optimizer="sgd"):
    model = net()
    opt = OPTIMIZERS[optimizer](model.parameters())
    return model, opt, Schedule(model, opt, how, steps)


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


# ------------------------------------------------------------------ regrowth
def reference(weight, active, score, count):
    """Drop and grow with lists: the smallest go (of equal ones the last), then the highest of what did not stay come (of equal ones the first)."""
    weight, active, score = weight.flatten().tolist(), active.flatten().tolist(), score.flatten().tolist()
    alive = sorted((i for i, a in enumerate(active) if a), key=lambda i: (-abs(weight[i]), i))
    stays = set(alive[: len(alive) - count])
    comes = sorted((i for i in range(len(weight)) if i not in stays), key=lambda i: (-score[i], i))[:count]
    return torch.tensor([i in stays or i in comes for i in range(len(weight))])


@pytest.mark.parametrize("parts", [1, 2])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("start", ["random", "magnitude"])
def test_rigl_grows_the_largest_dense_gradients(start, optimizer, parts):
    model = net()
    opt = OPTIMIZERS[optimizer](model.parameters())
    after = {}
    opt.register_step_post_hook(lambda *_: after.update({n: model.get_parameter(n).detach().clone() for n in SIZES}))
    schedule = Schedule(model, opt, Gradual(keep=0.2, kind="rigl", every=3, end=15, start=start), 20)
    active = {n: int(m.sum()) for n, m in schedule.masks.items()}
    assert active == {n: math.floor(SIZES[n] * s) for n, s in schedule.shares.items()}
    for name, stays in schedule.masks.items():
        size = net().get_parameter(name).abs().detach()
        assert (size[stays].min() >= size[~stays].max()) == (start == "magnitude") or name == "grouped.weight"  # of two masks
    changed = 0
    for t in range(20):
        before = {n: m.clone() for n, m in schedule.masks.items()}
        twin = copy.deepcopy(model)  # has no hooks: its gradients are dense
        backward(twin, t, parts)
        dense = {n: twin.get_parameter(n).grad for n in SIZES}
        backward(model, t, parts)
        update = t + 1 in (3, 6, 9, 12)
        assert all(torch.equal(model.get_parameter(n).grad, dense[n] if update else dense[n] * before[n]) for n in SIZES)
        opt.step()
        for name, new in schedule.masks.items():
            old, p = before[name], model.get_parameter(name)
            assert int(new.sum()) == active[name]
            if not update:
                assert torch.equal(old, new)
                continue
            share = 0.15 * (1 + math.cos(math.pi * (t + 1) / 15))
            assert torch.equal(new.flatten(), reference(after[name], old, dense[name].abs(), int(share * active[name])))
            grown = new & ~old
            changed += int(grown.sum())
            assert not p[grown].any() and torch.equal(p[new & old], after[name][new & old])
            for value in opt.state[p].values():
                assert value is None or value.shape != p.shape or (not value[grown].any() and bool(value[new & old].any()))
        opt.zero_grad()
    assert changed > 20


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 10**6), size=st.integers(1, 150), levels=st.integers(1, 6), share=st.floats(0, 1))
def test_moved_is_the_slow_reference_with_ties(seed, size, levels, share):
    from secateur.recover.regrow import moved

    random = torch.Generator().manual_seed(seed)
    weight = torch.randint(-levels, levels + 1, (size,), generator=random).float()
    score = torch.randint(0, levels + 1, (size,), generator=random).float()
    active = torch.rand(size, generator=random) < 0.5
    count = int(share * int(active.sum()))
    assert torch.equal(moved(weight, active, score, count), reference(weight, active, score, count))


def test_set_grows_by_chance_and_not_by_gradients():
    found = []
    for seed, scale in ((0, 1.0), (0, -1.0), (1, 1.0)):
        model, opt, schedule = made(Gradual(keep=0.2, kind="set", every=2, seed=seed, start="magnitude"), 12)
        first = {n: m.clone() for n, m in schedule.masks.items()}
        assert all(torch.equal(m, (model.get_parameter(n) != 0)) for n, m in first.items())
        for t in range(2):  # gradients of another sign: no weight moves, as the learning rate is 0
            opt.param_groups[0]["lr"] = 0.0
            backward(model, t)
            for p in model.parameters():
                p.grad.mul_(scale).add_(torch.rand(p.shape) * scale)
            opt.step()
            opt.zero_grad()
        new = {n: m.clone() for n, m in schedule.masks.items()}
        assert all(int(new[n].sum()) == int(first[n].sum()) for n in SIZES)
        assert any(not torch.equal(new[n], first[n]) for n in SIZES)
        found.append(new)
    assert all(torch.equal(found[0][n], found[1][n]) for n in SIZES)
    assert any(not torch.equal(found[0][n], found[2][n]) for n in SIZES)


def test_static_is_one_random_mask():
    model, opt, schedule = made(Gradual(keep=0.2, kind="static", seed=3), 8)
    first = {n: m.clone() for n, m in schedule.masks.items()}
    train(model, opt, range(8), lambda t: [pytest.fail("moved") for n, m in schedule.masks.items() if not torch.equal(m, first[n])])
    other = net()
    with torch.no_grad():
        for p in other.parameters():
            p.copy_(torch.rand_like(p))
    same = Schedule(other, OPTIMIZERS["sgd"](other.parameters()), Gradual(keep=0.2, kind="static", seed=3), 8)
    assert all(torch.equal(m, first[n]) for n, m in same.masks.items())  # the weights have no say
    _, _, third = made(Gradual(keep=0.2, kind="static", seed=4), 8)
    assert any(not torch.equal(m, first[n]) for n, m in third.masks.items())
    assert 0.8 <= schedule.sparsity <= 0.8 + 5 / 720


def test_ac_dc_alternates_and_ends_compressed():
    model = net()
    opt = OPTIMIZERS["sgd"](model.parameters())
    after = {}
    opt.register_step_post_hook(lambda *_: after.update({n: model.get_parameter(n).detach().clone() for n in SIZES}))
    schedule = Schedule(model, opt, Gradual(keep=0.25, budget="uniform", kind="ac_dc", begin=2, every=3, end=14), 20)
    seen, masks = [schedule.sparsity > 0], []

    def look(t):
        still = [not opt.state[p]["momentum_buffer"].any() for p in model.parameters()]
        assert all(still) if t in (2, 5, 8, 11, 14) else not any(still[::2])
        seen.append(schedule.sparsity > 0)
        if not seen[-1]:
            with pytest.raises(PlanError, match=f"after {t} of 20"):
                schedule.plan()
        if t in (2, 8, 14):  # the mask is made anew, of the weights of then
            masks.append(schedule.masks["fc.weight"].clone())
            ranked = after["fc.weight"].flatten().abs().argsort(descending=True, stable=True)
            assert set(ranked[:24].tolist()) == set(masks[-1].flatten().nonzero()[:, 0].tolist())
        if t in (7, 13):
            assert (model.conv.weight != 0).all()  # all are trained again
            model.fc.weight.data.copy_(torch.rand(12, 8, generator=torch.Generator().manual_seed(t)))

    train(model, opt, range(20), look)
    assert "".join("-#"[s] for s in seen) == "--" + "###" + "---" + "###" + "---" + "#######"
    assert schedule.sparsity == 0.75 and not torch.equal(masks[0], masks[1]) and not torch.equal(masks[1], masks[2])


# ------------------------------------------------------------------ going on
def through_a_file(state):
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


@pytest.mark.parametrize("order", ["schedule first", "schedule last"])
@pytest.mark.parametrize(("kind", "optimizer"), [(k, o) for i, k in enumerate(KINDS) for o in [list(OPTIMIZERS)[i % 3], "sgd"]])
def test_a_resumed_run_is_the_uninterrupted_one_bit_for_bit(kind, optimizer, order):
    how = Gradual(keep=0.2, budget="lamp" if kind == "cubic" else "erk", kind=kind, every=2, begin=0, end=14)
    model, opt, schedule = made(how, 16, optimizer)
    saved = {}

    def look(t):
        if t in (4, 7):
            saved[t] = through_a_file({"model": model.state_dict(), "opt": opt.state_dict(), "schedule": schedule.state_dict()})

    train(model, opt, range(16), look)
    for t, state in saved.items():
        again = Net().train()
        other = OPTIMIZERS[optimizer](again.parameters())
        if order == "schedule first":
            resumed = Schedule(again, other, how, 16)
        again.load_state_dict(state["model"])
        other.load_state_dict(state["opt"])
        if order == "schedule last":
            resumed = Schedule(again, other, how, 16)
        resumed.load_state_dict(state["schedule"])
        assert resumed.step == t and all(torch.equal(v, state["model"][n]) for n, v in again.state_dict().items())
        train(again, other, range(t, 16))
        assert all(torch.equal(v, model.state_dict()[n]) for n, v in again.state_dict().items())
        assert all(torch.equal(m, schedule.masks[n]) for n, m in resumed.masks.items())
        assert resumed.plan() == schedule.plan()


def test_states_of_others_are_refused_and_change_nothing():
    how = Gradual(keep=0.2, kind="rigl", every=2)
    model, opt, schedule = made(how, 16)
    train(model, opt, range(5))
    state = schedule.state_dict()
    _, _, same = made(Gradual(keep="20%", kind="rigl", every=2), 16)  # written in another way
    same.load_state_dict(state)
    for other, says in ((Gradual(keep=0.2, kind="set", every=2), "kind=rigl"), (Gradual(keep=0.3, kind="rigl", every=2), "keep=1/5")):
        target, _, refusing = made(other, 16)
        before = copy.deepcopy(target.state_dict())
        with pytest.raises(InputError, match=says):
            refusing.load_state_dict(state)
        assert all(torch.equal(v, before[n]) for n, v in target.state_dict().items()) and refusing.step == 0
    with pytest.raises(InputError, match="steps=16"):
        made(how, 17)[2].load_state_dict(state)
    with pytest.raises(InputError, match="no 'masks'"):
        schedule.load_state_dict({k: v for k, v in state.items() if k != "masks"})
    cut = {**state, "masks": {**state["masks"], "fc.weight": state["masks"]["fc.weight"][:3]}}
    with pytest.raises(InputError, match=r"fc\.weight.*\(3, 8\).*\(12, 8\)"):
        schedule.load_state_dict(cut)
    assert schedule.step == 5


# ------------------------------------------------------------------ with everything else
class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(11, 8)
        self.mid = nn.Linear(8, 8)
        self.one = nn.Linear(8, 8)
        self.two = nn.Linear(8, 8)
        self.two.weight = self.one.weight
        self.out = nn.Linear(8, 11, bias=False)
        self.out.weight = self.embed.weight

    def forward(self, x):
        return self.out(self.two(torch.relu(self.one(torch.relu(self.mid(self.embed(x)))))))


def test_tied_weights_stay_dense_as_in_sparsify():
    torch.manual_seed(0)
    model = Tied()
    opt = OPTIMIZERS["adamw"](model.parameters())
    schedule = Schedule(model, opt, Gradual(keep=0.2, kind="one_shot"), 5)
    assert set(schedule.masks) == {"mid.weight"} and {"one", "out"} <= set(schedule.left)
    x = torch.arange(11)
    for _ in range(3):
        nn.functional.cross_entropy(model(x), x).backward()
        opt.step()
        opt.zero_grad()
    assert torch.equal(model.mid.weight != 0, schedule.masks["mid.weight"])
    assert (model.embed.weight != 0).all() and (model.one.weight != 0).all()
    assert set(sc.sparsify(model.eval(), (x,), sc.Sparse(keep=0.2)).plan.weights) == set(schedule.masks)


def test_attention_and_conv1d_of_transformers():
    class Conv1D(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight, self.bias = nn.Parameter(torch.randn(8, 12)), nn.Parameter(torch.zeros(12))

        def forward(self, x):
            return torch.addmm(self.bias, x.flatten(0, 1), self.weight)

    class Both(nn.Module):
        def __init__(self):
            super().__init__()
            self.attn, self.c_fc = nn.MultiheadAttention(8, 2, batch_first=True), Conv1D()

        def forward(self, x):
            return self.c_fc(self.attn(x, x, x, need_weights=False)[0])

    torch.manual_seed(0)
    model, x = Both(), torch.randn(2, 3, 8)
    schedule = Schedule(model, OPTIMIZERS["sgd"](model.parameters()), Gradual(pattern=NM(2, of=4), kind="one_shot"), 5)
    assert set(schedule.masks) == {"attn.in_proj_weight", "attn.out_proj.weight", "c_fc.weight"}
    assert (schedule.masks["c_fc.weight"].t().reshape(-1, 4).sum(1) == 2).all()  # inputs are its rows
    plan = schedule.plan()
    assert plan.patterns["c_fc.weight"] == "2:4 transposed"
    sparse = sc.sparsify(model.eval(), (x,), sc.Sparse(pattern=NM(2, of=4), by="magnitude"))
    assert set(sparse.plan.weights) == set(plan.weights)
    sc.mask(model, (x,), plan)


@pytest.mark.parametrize("kind", ["cubic", "rigl"])
def test_a_compiled_model_is_trained_alike(kind):
    how = Gradual(keep=0.2, kind=kind, every=2)
    model, opt, schedule = made(how, 8)
    train(model, opt, range(8))
    twin = net()
    compiled = torch.compile(twin, backend="aot_eager")
    other = OPTIMIZERS["sgd"](compiled.parameters())
    alike = Schedule(compiled, other, how, 8)
    train(compiled, other, range(8))
    assert alike.masks.keys() == schedule.masks.keys()
    for name, mask in alike.masks.items():
        assert torch.equal(twin.get_parameter(name) != 0, mask)
        assert torch.allclose(twin.get_parameter(name), model.get_parameter(name), atol=1e-5)
    assert alike.plan() == schedule.plan()


def test_the_plan_is_held_masked_and_nothing_is_left_in_the_model():
    model, opt, schedule = made(Gradual(keep=0.2, kind="cubic", every=2), 10)
    keys = list(net().state_dict())
    train(model, opt, range(10))
    assert list(model.state_dict()) == keys
    plan = schedule.plan()
    assert plan.why["step"] == 10 and sc.Plan.from_json(plan.to_json()) == plan
    assert all(torch.equal(model.get_parameter(n) != 0, m) for n, m in plan.weights.items())
    result = sc.mask(model.eval(), (X[:2],), plan)
    assert torch.equal(result.model(X), model(X))
    schedule.remove()
    sc.hold(model.train(), plan, opt)
    train(model, opt, range(10, 14))
    assert all(torch.equal(model.get_parameter(n) != 0, m) for n, m in plan.weights.items())


def test_a_step_that_never_came_counts_nothing_and_unused_layers_stay():
    model, opt, schedule = made(Gradual(keep=0.2, kind="rigl", every=1, end=4), 4)
    backward(model, 0)
    opt.zero_grad()  # as a gradient scaler does that found infinity
    assert schedule.step == 0
    first = schedule.masks["conv.weight"].clone()
    model.head(torch.relu(model.fc(X.mean((2, 3)).repeat(1, 2)))).sum().backward()
    opt.step()
    assert schedule.step == 1 and torch.equal(schedule.masks["conv.weight"], first)  # without a gradient nothing moves


@pytest.mark.parametrize("kind", ["cubic", "rigl"])
@pytest.mark.parametrize("fused", [False, True])
def test_a_step_that_a_gradient_scaler_skips_counts_nothing(kind, fused):
    """It calls a fused optimizer all the same, which then does nothing."""
    model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 2))
    opt, scaler = torch.optim.AdamW(model.parameters(), 0.01, fused=fused), torch.amp.GradScaler("cpu", init_scale=2.0)
    schedule = Schedule(model, opt, Gradual(keep=0.25, kind=kind, every=1, end=4), 6)
    x = torch.randn(32, 8, generator=torch.Generator().manual_seed(0))
    for number, factor in enumerate((1.0, float("inf"), 1.0, float("inf"), 1.0)):
        before, masks = [p.detach().clone() for p in model.parameters()], {n: m.clone() for n, m in schedule.masks.items()}
        scaler.scale(model(x).square().mean() * factor).backward()
        scaler.step(opt)
        scaler.update()
        opt.zero_grad()
        assert schedule.step == (1, 1, 2, 2, 3)[number]
        if factor != 1.0:
            assert all(torch.equal(a, p) for a, p in zip(before, model.parameters(), strict=True))
            assert all(torch.equal(m, schedule.masks[n]) for n, m in masks.items())


def test_half_precision_and_moves_to_another_dtype():
    model, opt, schedule = made(Gradual(keep=0.2, kind="cubic", every=1, end=6), 8)
    train(model, opt, range(3))
    model.double().float()
    train(model, opt, range(3, 8))
    assert all(torch.equal(model.get_parameter(n) != 0, m) for n, m in schedule.masks.items())
    half = nn.Linear(16, 16).bfloat16()
    tiny = Schedule(half, torch.optim.SGD(half.parameters(), 0.1), Gradual(keep=0.25, kind="one_shot"), 4)
    assert int((half.weight != 0).sum()) == 64 and tiny.sparsity == 0.75


def test_diverged_weights_are_named():
    model, opt, schedule = made(Gradual(keep=0.2, kind="rigl", every=1), 8)
    backward(model, 0)
    model.fc.weight.grad.fill_(torch.nan)
    with pytest.raises(PlanError, match="NaN"):
        opt.step()


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
