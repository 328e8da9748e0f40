"""Units in another order: the same function, and a pattern that loses less."""

import itertools
from fractions import Fraction

import pytest
import torch
from torch import nn

import secateur as sc
from secateur.errors import InputError
from secateur.masks.permute import _exchanges, best_order, kept
from secateur.pattern import legal
from tests.masks.test_sparsify import ARGS, batches

PATTERN = sc.NM(2, of=4)


def drawn(rows, columns, seed=0):
    return torch.rand(rows, columns, generator=torch.Generator().manual_seed(seed)).square().double()


@pytest.mark.parametrize("pattern", [sc.NM(2, of=4), sc.NM(1, of=4), sc.NM(1, of=2), sc.NM(4, of=5)])
def test_the_gain_of_an_exchange_is_what_trying_gives(pattern):
    m = pattern.of
    score = drawn(5, 2 * m)
    gain, which = _exchanges(score[:, None, :m], score[:, None, m:], pattern)
    tried = {}
    for i, j in itertools.product(range(m), range(m)):
        order = list(range(2 * m))
        order[i], order[m + j] = m + j, i
        tried[m * i + j] = float(kept(score[:, order], pattern).sum() - kept(score, pattern).sum())
    assert int(which) == max(tried, key=tried.get)
    assert float(gain) == pytest.approx(max(tried.values()), abs=1e-9)


def test_what_exchanges_keep_of_eight_columns_is_near_the_best_of_all_orders():
    score = drawn(3, 8)
    order = best_order(score, PATTERN)
    assert sorted(order.tolist()) == list(range(8))
    found = float(kept(score[:, order], PATTERN).sum())
    every = [float(kept(score[:, [*g, *(k for k in range(8) if k not in g)]], PATTERN).sum()) for g in itertools.combinations(range(8), 4)]
    assert found >= float(kept(score, PATTERN).sum())
    assert found >= 0.99 * max(every)


def test_an_order_that_was_hidden_is_found_again():
    """Two of four in a row are zero, and the columns are shuffled: nothing need be lost."""
    score = torch.stack([drawn(1, 32, r)[0] for r in range(6)])
    stays = torch.stack([torch.cat([torch.randperm(4, generator=torch.Generator().manual_seed(9 * r + g)) < 2 for g in range(8)]) for r in range(6)])
    shuffled = (score * stays)[:, torch.randperm(32, generator=torch.Generator().manual_seed(1))]
    lost = 1 - float(kept(shuffled, PATTERN).sum() / shuffled.sum())
    left = 1 - float(kept(shuffled[:, best_order(shuffled, PATTERN)], PATTERN).sum() / shuffled.sum())
    assert left < 0.3 * lost


class Blocks(nn.Module):
    """A residual stream that three layers read, batch norm, and linear layers."""

    def __init__(self):
        super().__init__()
        self.first = nn.Conv2d(3, 16, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(16)
        self.one, self.two = nn.Conv2d(16, 24, 3, padding=1), nn.Conv2d(24, 16, 1)
        self.fc, self.head = nn.Linear(16, 32), nn.Linear(32, 7, bias=False)

    def forward(self, x):
        x = torch.relu(self.norm(self.first(x)))
        x = x + self.two(torch.relu(self.one(x)))
        return self.head(torch.relu(self.fc(x.mean((2, 3)))))


@pytest.fixture(scope="module")
def net():
    torch.manual_seed(0)
    model = Blocks().eval()
    with torch.no_grad():
        model.norm.running_mean.uniform_(-0.2, 0.2)
        model.norm.running_var.uniform_(0.5, 2.0)
        for p in model.parameters():  # inputs of unlike weight
            p.mul_(torch.exp(torch.randn(p.shape[1], *[1] * (p.dim() - 2)))) if p.dim() > 1 else None
    return model


def run(net, **settings):
    return sc.sparsify(net, ARGS, sc.Sparse(None, pattern=PATTERN, refit=False, corrected=False, **settings), batches())


@pytest.mark.parametrize("by", ["magnitude", "sparsegpt"])
def test_the_reordered_model_is_the_same_function_and_loses_less(net, by):
    before = {n: t.clone() for n, t in net.state_dict().items()}
    plain, moved = run(net, by=by), run(net, by=by, permute=True)
    assert any("reordered, which leaves the model the same function" in note for note in moved.notes)
    assert all(torch.equal(t, before[n]) for n, t in net.state_dict().items())
    for name in ("first", "one", "two", "fc", "head"):
        old, new = (m.get_submodule(name).weight for m in (net, moved.dense))
        assert not torch.equal(old, new) and torch.equal(old.flatten().sort().values, new.flatten().sort().values)
    with torch.no_grad():
        x = torch.cat(batches())
        wanted = net(x)
        torch.testing.assert_close(moved.dense(x), wanted, rtol=1e-4, atol=1e-5)
        plain_error, moved_error = (float((r.model(x) - wanted).square().mean()) for r in (plain, moved))
    for name, stays in moved.plan.weights.items():
        if name in ("fc.weight", "head.weight"):
            assert legal(PATTERN, stays) and Fraction(int(stays.sum()), stays.numel()) == Fraction(1, 2)
        assert torch.equal(moved.model.state_dict()[name] != 0, stays)
    assert moved_error < plain_error


def test_only_patterns_with_an_order_can_be_permuted(net):
    with pytest.raises(InputError, match="permute=True beside the pattern free"):
        sc.sparsify(net, ARGS, sc.Sparse("50%", permute=True), batches())


class Gathered(nn.Module):
    """One reader takes the units in an order that lies in a buffer; behind it a pair that has nothing to do with that."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = nn.Linear(8, 16), nn.Linear(16, 8), nn.Linear(16, 8)
        self.f, self.g = nn.Linear(8, 32), nn.Linear(32, 4)
        self.register_buffer("i", torch.randperm(16))

    def forward(self, x):
        y = torch.relu(self.a(x))
        return self.g(torch.relu(self.f(self.b(y) + self.c(y[:, self.i]))))


class Constant(nn.Module):
    """Units that meet a constant of forward(), a buffer that no file keeps, and a literal."""

    def __init__(self, kind):
        super().__init__()
        self.a, self.b, self.kind = nn.Linear(8, 16), nn.Linear(16, 4), kind
        self.plain = torch.rand(16) + 0.5
        self.register_buffer("unsaved", torch.rand(16) + 0.5, persistent=False)

    def forward(self, x):
        y = torch.relu(self.a(x))
        by = {"plain": self.plain, "unsaved": self.unsaved, "literal": torch.tensor([0.5, 1.0] * 8)}[self.kind]
        return self.b(y * by)


def permuted_of(model, data, example=None):
    how = sc.Sparse(None, pattern=PATTERN, by="sparsegpt", refit=False, corrected=False, permute=True)
    return sc.sparsify(model.eval(), (torch.zeros(2, 8) if example is None else example,), how, data)


def test_units_in_an_index_stay_and_others_move_though_the_example_is_all_zero():
    torch.manual_seed(0)
    model, x = Gathered(), torch.randn(64, 8)
    result = permuted_of(model, [x])
    with torch.no_grad():
        torch.testing.assert_close(result.dense(x), model(x), rtol=1e-4, atol=1e-5)
    assert torch.equal(result.dense.a.weight, model.a.weight) and not torch.equal(result.dense.f.weight, model.f.weight)


@pytest.mark.parametrize("kind", ["plain", "unsaved", "literal"])
def test_units_that_meet_a_constant_stay(kind):
    torch.manual_seed(0)
    model, x = Constant(kind), torch.randn(64, 8)
    result = permuted_of(model, [x])
    assert torch.equal(result.dense.a.weight, model.a.weight)
    assert any("no inputs were reordered" in note for note in result.notes)


def test_an_order_that_changes_the_function_is_left_out(net, monkeypatch):
    """Whatever is moved wrongly: the outputs decide."""
    from secateur.masks import permute as module

    right = module.reordered

    def wrong(graph, state, found):
        new = right(graph, state, found)
        return {n: t for n, t in new.items() if n != "head.weight"}  # what reads fc keeps its order

    monkeypatch.setattr(module, "reordered", wrong)
    moved = run(net, by="magnitude", permute=True)
    with torch.no_grad():
        torch.testing.assert_close(moved.dense(torch.cat(batches())), net(torch.cat(batches())), rtol=1e-4, atol=1e-5)
    assert torch.equal(moved.dense.fc.bias, net.fc.bias) and not torch.equal(moved.dense.one.weight, net.one.weight)


def test_what_an_order_is_said_to_keep_is_what_masks_keep(net):
    """Without data: the share of w^2, averaged over the layers that read the group; 3 x 3 windows count place by place."""
    from secateur.masks.permute import orders
    from secateur.masks.select import select

    graph = sc.trace(net, ARGS)
    chosen, state = select(graph, net.state_dict(), PATTERN), net.state_dict()
    found = {one.group: one for one in orders(graph, chosen, state, {}, PATTERN, 0)}
    plain = sc.sparsify(net, ARGS, sc.Sparse(None, "magnitude", PATTERN))
    moved = sc.sparsify(net, ARGS, sc.Sparse(None, "magnitude", PATTERN, permute=True))
    for group, readers in {"one:out": ["two.weight"], "first:out": ["one.weight", "fc.weight"], "fc:out": ["head.weight"]}.items():
        for result, said in ((plain, found[group].before), (moved, found[group].after)):
            weights, kept_of = result.dense.state_dict(), result.model.state_dict()
            shares = [float(kept_of[n].square().sum() / weights[n].square().sum()) for n in readers]
            assert sum(shares) / len(shares) == pytest.approx(said, abs=1e-4), (group, shares)


def test_data_is_read_once_and_a_plan_says_what_it_is_for(net):
    how = sc.Sparse(None, pattern=PATTERN, by="sparsegpt", permute=True)
    result = sc.sparsify(net, ARGS, how, (b for b in batches()))
    again = sc.mask(result.dense, ARGS, result.plan)
    assert any("permute=True" in note for note in again.notes) and again.plan.why["permuted"]


class Flagged(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b, self.c = nn.Linear(16, 24), nn.Linear(24, 24), nn.Linear(24, 8)

    def forward(self, x, more=None, scale=False):
        x = self.c(torch.relu(self.b(torch.relu(self.a(x if more is None else x + more)))))
        return 2 * x if scale else x


X, MORE = drawn(64, 16).float(), drawn(64, 16, seed=1).float()
MIXED = {
    "a flag by name": ((X,), {"scale": True}, [X, X]),
    "a flag by place": ((X, None, True), {}, [(X, None, True), X]),
    "tensors by place and by name": ((X,), {"more": MORE, "scale": True}, [X, X]),
    "all by name": ((), {"x": X, "more": MORE, "scale": True}, [{"x": X, "more": MORE}] * 2),
}


@pytest.mark.parametrize("name", MIXED)
def test_the_copy_is_looked_at_with_the_inputs_of_the_model(name):
    args, kwargs, data = MIXED[name]
    plain, moved = (sc.sparsify(Flagged(), args, sc.Sparse(None, pattern=PATTERN, permute=p), data, kwargs=kwargs) for p in (False, True))
    assert any("reordered" in note for note in moved.notes) and set(moved.plan.weights) == set(plain.plan.weights)
    assert moved.masks[0].rows == plain.masks[0].rows > 64
