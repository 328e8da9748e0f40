"""Weights that come back during training, against slow references; resuming bit for bit."""

import copy
import io
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from secateur.errors import InputError, PlanError
from secateur.recover.gradual import Gradual
from secateur.recover.schedule import Schedule
from tests.recover.scheduled import KINDS, OPTIMIZERS, SIZES, Net, backward, made, net, train


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


@pytest.mark.parametrize("kind", KINDS)
def test_a_closure_is_the_same_as_a_backward_before_the_step(kind):
    found = []
    for closed in (False, True):
        model, opt, schedule = made(Gradual(keep=0.2, kind=kind, every=3, begin=0, end=30), 40)

        def closure(step, model=model, opt=opt):
            opt.zero_grad()
            backward(model, step)
            return torch.tensor(float(step))

        for step in range(40):
            if closed:
                assert opt.step(lambda step=step: closure(step)) == step if step % 2 else opt.step(closure=lambda step=step: closure(step)) == step
            else:
                closure(step)
                opt.step()
        found.append((model.state_dict(), schedule.masks))
    assert all(torch.equal(t, found[1][0][n]) for n, t in found[0][0].items()) and all(torch.equal(m, found[1][1][n]) for n, m in found[0][1].items())


@pytest.mark.parametrize("kind", ["cubic", "one_shot", "iterative", "rigl"])
def test_lbfgs_goes_on_after_weights_went(kind):
    torch.manual_seed(0)
    x = torch.randn(64, 8)
    classes = x[:, :4].argmax(1)
    model = nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 4))
    opt = torch.optim.LBFGS(model.parameters(), line_search_fn="strong_wolfe", max_iter=4)
    schedule = Schedule(model, opt, Gradual(keep="20%", kind=kind, begin=3, end=15, every=3), 20)

    def closure():
        opt.zero_grad()
        loss = nn.functional.cross_entropy(model(x), classes)
        loss.backward()
        return loss.detach()

    losses = [float(opt.step(closure)) for _ in range(40)]
    assert losses[-1] < 1e-4 and schedule.sparsity == pytest.approx(0.8, abs=0.01)  # what it remembered from before led nowhere
