"""The repair as a whole, on tiny networks whose units stand in for one another."""

import copy
import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import secateur as sc
from secateur.errors import DataError, InputError
from secateur.repair.least_squares import Repair, Settings
from secateur.trace import trace
from tests.repair.networks import Sequenced, linear, lively


def conv_norm(i, o, k=3, **more):
    return nn.Sequential(nn.Conv2d(i, o, k, padding=k // 2, bias=False, **more), nn.BatchNorm2d(o))


def _residual(m, x):
    x = F.relu(m.stem(x))
    x = F.relu(x + m.two(F.relu(m.one(x))))
    x = F.relu(m.short(x) + m.four(F.relu(m.three(x))))
    return m.head(x.mean((2, 3)))


def residual():
    blocks = dict(stem=conv_norm(3, 8), one=conv_norm(8, 12), two=conv_norm(12, 8), three=conv_norm(8, 16, stride=2), four=conv_norm(16, 12))
    return Sequenced(_residual, **blocks, short=conv_norm(8, 12, 1, stride=2), head=linear(12, 5))


def perceptron():
    return nn.Sequential(linear(10, 24), nn.ReLU(), linear(24, 20), nn.GELU(), linear(20, 6))


def depthwise():
    return nn.Sequential(
        conv_norm(3, 12), nn.ReLU6(), conv_norm(12, 12, groups=12), nn.ReLU6(), conv_norm(12, 10, 1), nn.ReLU(inplace=True),
        nn.Conv2d(10, 6, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), linear(6, 4),
    )  # fmt: skip


def gated():
    return Sequenced(lambda m, x: m.down(F.silu(m.gate(x)) * m.up(x)), gate=linear(10, 24), up=linear(10, 24), down=linear(24, 8))


def _attend(m, x):
    x = m.embed(x)
    q, k, v = (layer(m.norm1(x)).unflatten(-1, (4, 4)).transpose(1, 2) for layer in (m.q, m.k, m.v))
    x = x + m.o(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
    x = x + m.down(F.gelu(m.up(m.norm2(x))))
    return m.head(x.mean(1))


def attention():
    inner = dict(q=linear(12, 16), k=linear(12, 16), v=linear(12, 16), o=linear(16, 12), up=linear(12, 30), down=linear(30, 12))
    return Sequenced(_attend, embed=linear(10, 12), norm1=nn.LayerNorm(12), norm2=nn.LayerNorm(12), **inner, head=linear(12, 5))


NETWORKS = {
    "residual": (residual, (3, 8, 8)),
    "perceptron": (perceptron, (10,)),
    "depthwise": (depthwise, (3, 8, 8)),
    "gated": (gated, (10,)),
    "attention": (attention, (6, 10)),
}


def made(name, seed=0):
    build, shape = NETWORKS[name]
    torch.manual_seed(seed)
    return lively(build(), seed), shape


def rows_of(shape, rows, seed):
    """Smooth inputs: a few directions say most, as in pictures and words."""
    basis = torch.randn(4, math.prod(shape), generator=torch.Generator().manual_seed(99))
    random = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, 4, generator=random) @ basis / 2 + 0.3 * torch.randn(rows, math.prod(shape), generator=random)
    return x.reshape(rows, *shape)


def pruned(name, data=None, share=60, seed=0, model=None, **how):
    own, shape = made(name)
    data = list(rows_of(shape, 512, 1).split(64)) if data is None else data
    return sc.prune(model or own, (rows_of(shape, 2, 5),), sc.MACs(at_most=f"{share}%"), data=data, seed=seed, **how)


def error(model, dense, shape, seed=7):
    x = rows_of(shape, 400, seed)
    with torch.no_grad():
        want = dense(x)
        return float(((model(x) - want) ** 2).mean() / want.var())


@pytest.mark.parametrize("name", NETWORKS)
def test_the_repaired_network_is_closer_to_the_dense_one_on_fresh_data(name):
    dense, shape = made(name)
    plain, better = pruned(name, repair="none"), pruned(name)
    assert plain.plan.keep.keys() == better.plan.keep.keys()
    assert all(torch.equal(mask, better.plan.keep[n]) for n, mask in plain.plan.keep.items())
    assert plain.plan.removed
    assert error(better.model, dense, shape) < 0.7 * error(plain.model, dense, shape)
    assert better.proof.passed


@pytest.mark.parametrize("how", ["bias", "batch_norm"])
@pytest.mark.parametrize("name", ["residual", "depthwise"])
def test_lesser_repairs_lie_in_between(name, how):
    dense, shape = made(name)
    with torch.no_grad():  # its norms were trained on such data
        for module in dense.modules():
            module.momentum = None
        dense.train()(rows_of(shape, 512, 2))
        dense.eval()
    errors = [error(pruned(name, share=50, repair=r, model=dense).model, dense, shape) for r in ("none", how, "least_squares")]
    assert errors[0] > errors[1] > errors[2]


@pytest.mark.parametrize("name", NETWORKS)
def test_what_became_of_every_layer_is_told(name):
    result = pruned(name)
    assert result.repairs
    for row in result.repairs:
        assert row.used in ("plain", "bias", "least squares", "rectified", "gauss-newton")
        assert all(math.isfinite(v) and v >= 0 for v in (row.plain, row.bias, row.repaired))
        assert bool(row.why) == (row.used in ("plain", "bias") or ("(branch" in row.layer and row.used == "least squares"))
        if row.used not in ("plain", "bias"):
            assert row.repaired <= min(row.plain, row.bias)
        assert row.rows >= 448
        assert set(row.to_json()) >= {"layer", "rows", "plain", "repaired", "used", "why"}
    assert len({row.layer for row in result.repairs}) == len(result.repairs)


@pytest.mark.parametrize("name", NETWORKS)
def test_cutting_nothing_changes_nothing(name):
    model, shape = made(name)
    x = rows_of(shape, 64, 1)
    graph = trace(model, (x,))
    state = {n: t.detach() for n, t in model.state_dict().items()}
    for keep in ({}, {n: torch.ones(g.size, dtype=torch.bool) for n, g in graph.groups.items()}):
        repair = Repair(graph, keep, state, [((x,), {})] * 3)
        assert repair.run() == []
        assert all(repair.state[n] is t for n, t in state.items())


def everything(model):
    return {
        "values": {n: t.clone() for n, t in model.state_dict(keep_vars=True).items()},
        "objects": {n: id(t) for n, t in model.state_dict(keep_vars=True).items()},
        "flags": [(n, m.training) for n, m in model.named_modules()],
        "gradients": [(n, p.requires_grad, p.grad) for n, p in model.named_parameters()],
        "hooks": [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()],
    }


class Counting(nn.Module):
    """Counts its calls in a buffer, and writes into its input."""

    def __init__(self):
        super().__init__()
        self.inner = perceptron()
        self.register_buffer("calls", torch.zeros(1))

    def forward(self, x):
        self.calls += 1
        return self.inner(x.add_(0.5))


@pytest.mark.parametrize("allocation", ["curves", "sensitivity", "search"])
@pytest.mark.parametrize("name", ["residual", "counting"])
def test_the_dense_model_the_data_and_the_random_numbers_are_left_alone(name, allocation):
    if name == "counting":
        torch.manual_seed(0)
        (model, shape), name = (Counting().eval(), (10,)), "perceptron"
    else:
        model, shape = made(name)
    model.train()
    next(model.children()).eval()  # flags need not be alike
    data = list(rows_of(shape, 256, 1).split(64))
    before, copies, random = everything(model), [x.clone() for x in data], torch.get_rng_state()
    result = pruned(name, data, model=model, allocation=allocation)
    after = everything(model)
    assert result.repairs and result.model is not model
    assert all(torch.equal(t, after["values"][n]) for n, t in before["values"].items())
    assert all(before[k] == after[k] for k in ("objects", "flags", "gradients", "hooks"))
    assert all(torch.equal(a, b) for a, b in zip(copies, data, strict=True))
    assert torch.equal(random, torch.get_rng_state())


@pytest.mark.parametrize("name", ["residual", "attention"])
def test_the_same_seed_gives_the_same_network(name):
    one, two = pruned(name, seed=3), pruned(name, seed=3)
    assert one.plan == two.plan and one.repairs == two.repairs
    assert all(torch.equal(a, b) for a, b in zip(one.model.state_dict().values(), two.model.state_dict().values(), strict=True))


def test_the_repaired_model_is_an_ordinary_one():
    result = pruned("residual")
    assert all(p.requires_grad for p in result.model.parameters())
    assert all(p.dtype == torch.float32 and p.isfinite().all() for p in result.model.state_dict().values() if p.is_floating_point())
    model = copy.deepcopy(result.model).train()
    model(rows_of((3, 8, 8), 8, 3)).sum().backward()
    assert all(p.grad is not None for p in model.parameters())


# ---------------------------------------------------------------- what can be recovered exactly
def test_inputs_that_are_there_twice_are_not_missed():
    """Every hidden channel is a copy of another: with one of each pair gone nothing is lost."""
    torch.manual_seed(0)
    model = lively(nn.Sequential(nn.Conv2d(3, 12, 3, padding=1), nn.BatchNorm2d(12), nn.ReLU(), nn.Conv2d(12, 5, 3), nn.BatchNorm2d(5)))
    with torch.no_grad():
        for t in (model[0].weight, model[0].bias, model[1].weight, model[1].bias, model[1].running_mean, model[1].running_var):
            t[6:] = t[:6]
    data = torch.randn(64, 3, 8, 8)
    graph = trace(model, (data[:16],))
    (group,) = [n for n in graph.groups if n.startswith("0")]
    keep = {group: torch.tensor([True] * 3 + [False] * 6 + [True] * 3)}  # three of each half, none twice
    state = {n: t.detach() for n, t in model.state_dict().items()}
    repair = Repair(graph, keep, state, [((x,), {}) for x in data.split(16)], Settings(ridge=1e-9))
    (row,) = repair.run()
    assert row.used in ("least squares", "rectified") and row.plain > 0.05 and row.repaired < 1e-6
    fixed = copy.deepcopy(model)
    fixed.load_state_dict(repair.state)
    fresh = torch.randn(8, 3, 8, 8)
    with torch.no_grad():
        torch.testing.assert_close(fixed(fresh), model(fresh), rtol=1e-3, atol=1e-4)


def test_prune_finds_what_is_there_twice():
    torch.manual_seed(0)
    model = nn.Sequential(linear(10, 24), nn.ReLU(), linear(24, 6)).eval()
    with torch.no_grad():
        for t in (model[0].weight, model[0].bias):
            t[12:] = t[:12]
    result = sc.prune(model, (torch.randn(2, 10),), sc.MACs(at_most="50%"), data=list(torch.randn(512, 10).split(64)))
    x = torch.randn(64, 10)
    with torch.no_grad():
        assert ((result.model(x) - model(x)) ** 2).mean() < 1e-5 * model(x).var()


# ---------------------------------------------------------------- data of all kinds
def test_data_may_come_as_a_generator():
    shape = NETWORKS["residual"][1]
    data = list(rows_of(shape, 256, 1).split(64))
    one, two = pruned("residual", data), pruned("residual", (x for x in data))
    assert one.plan == two.plan and one.repairs == two.repairs


def test_batches_of_one_are_those_of_many():
    x = rows_of((10,), 256, 1)
    many, single = pruned("perceptron", [x]), pruned("perceptron", list(x.split(1)))
    assert many.plan == single.plan and many.repairs == single.repairs


def test_labels_make_no_difference():
    x = rows_of((10,), 256, 1)
    plain = pruned("perceptron", list(x.split(64)))
    labelled = pruned("perceptron", [(b, torch.zeros(len(b), dtype=torch.long)) for b in x.split(64)])
    assert plain.plan == labelled.plan and plain.repairs == labelled.repairs


def test_batches_by_name():
    class Named(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = linear(10, 20), linear(20, 5)

        def forward(self, values=None, scale=None):
            return self.b(self.a(values).relu() * scale)

    torch.manual_seed(0)
    model = Named().eval()
    data = [{"values": b, "scale": torch.ones(len(b), 1), "labels": torch.zeros(len(b))} for b in rows_of((10,), 256, 1).split(64)]
    example = {k: v[:2] for k, v in data[0].items() if k != "labels"}
    result = sc.prune(model, (), sc.MACs(at_most="60%"), data=data, kwargs=example)
    assert [(r.layer, r.used) for r in result.repairs] == [("b", "least squares"), ("b (branch of 2 layers)", "gauss-newton")]


def test_pictures_of_another_size_than_the_example():
    dense, _ = made("residual")
    x = rows_of((3, 12, 12), 256, 1)
    plain, better = (pruned("residual", list(x.split(64)), repair=r) for r in ("none", "least_squares"))
    fresh = rows_of((3, 12, 12), 128, 9)
    with torch.no_grad():
        errors = [float(((r.model(fresh) - dense(fresh)) ** 2).mean()) for r in (plain, better)]
    assert better.repairs and errors[1] < 0.7 * errors[0]


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("rows", [2, 5])
def test_next_to_no_data_does_no_harm(name, rows):
    """Too little to fit to: the cut stays, and it is said; or what is fitted is no worse on fresh data."""
    dense, shape = made(name)
    data = [rows_of(shape, rows, 1)]
    plain, thin = (pruned(name, data, repair=r, share=75) for r in ("none", "least_squares"))
    assert all(r.why for r in thin.repairs if r.used in ("plain", "bias"))
    assert error(thin.model, dense, shape) < 1.5 * error(plain.model, dense, shape)


def test_bad_data_is_named_and_the_model_is_whole():
    model, shape = made("perceptron")
    before = {n: t.clone() for n, t in model.state_dict().items()}
    cases = {
        "batch 2 of data.*NaN": [rows_of(shape, 64, 1), torch.full((64, 10), float("nan"))],
        "no row": [],
        "does not run": [torch.randn(64, 11)],
        "layer '2'.*not finite": [torch.full((64, 10), float("inf"))] * 4,
    }
    for said, data in cases.items():
        with pytest.raises(DataError, match=said):
            pruned("perceptron", data, model=model)
    with pytest.raises(InputError, match="needs calibration data"):
        sc.prune(model, (rows_of(shape, 2, 5),), sc.MACs(at_most="60%"), repair="least_squares")
    assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items())


def test_a_model_that_cannot_be_followed_is_handed_back_as_it_was_cut():
    """Writes through a view: no least squares, and that is said."""

    def does(m, x):
        y = m.a(x)
        y[:, :3].relu_()
        return m.b(y)

    torch.manual_seed(0)
    model = Sequenced(does, a=linear(10, 12), b=linear(12, 5)).eval()
    result = sc.prune(model, (torch.randn(2, 10),), sc.MACs(at_most="60%"), data=[torch.randn(64, 10)] * 2, score="l2")
    assert result.repairs == [] and result.proof.passed
    assert any("not repaired by least squares" in note for note in result.notes)


@pytest.mark.parametrize("which", ["first", "last"])
def test_a_removed_block_is_left_out_of_the_repair(which):
    def does(m, x):
        x = m.a(x)
        x = x + m.c(m.b(x).relu())
        x = x + m.e(m.d(x).relu())
        return m.f(x)

    torch.manual_seed(0)
    model = Sequenced(does, a=linear(10, 8), b=linear(8, 12), c=linear(12, 8), d=linear(8, 12), e=linear(12, 8), f=linear(8, 5)).eval()
    data = rows_of((10,), 256, 1).split(32)
    graph = trace(model, (data[0],))
    block, inside, before = {"first": ("c:block", "bc", ""), "last": ("e:block", "de", "bc")}[which]
    keep = {n: torch.ones(g.size, dtype=torch.bool) for n, g in graph.groups.items()} | {block: torch.tensor([False])}
    state = {n: t.detach() for n, t in model.state_dict().items()}
    repair = Repair(graph, keep, state, [((x,), {}) for x in data])
    rows = repair.run()
    assert [r.layer for r in rows] == [x for x in "bcdef" if x not in inside + before]
    assert all(torch.equal(repair.state[f"{x}.weight"], state[f"{x}.weight"]) for x in inside + before)

    def without(state):
        small = copy.deepcopy(model)
        small.load_state_dict(state)
        getattr(small, inside[1]).weight.data.zero_(), getattr(small, inside[1]).bias.data.zero_()
        return error(small, model, (10,))

    assert without(repair.state) < 0.9 * without(state)
