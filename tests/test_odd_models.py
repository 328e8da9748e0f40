"""Models, data and folders that a hostile but honest user brings: an exact result or a clear refusal, nothing changed."""

import copy
from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import secateur as sc
from secateur.errors import DataError, InputError, ModelError, SecateurError

HALF = sc.MACs(at_most="60%")
X = torch.randn(4, 6, generator=torch.Generator().manual_seed(1))


class Two(nn.Module):
    """Linear, something odd, Linear."""

    def __init__(self, between=torch.relu, width=8):
        super().__init__()
        torch.manual_seed(0)
        self.between = between
        self.a, self.b = nn.Linear(6, width), nn.Linear(width, 3)

    def forward(self, x):
        return self.b(self.between(self.a(x)))


def snapshot(model):
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    simple = {(p, k): v for p, m in model.named_modules() for k, v in vars(m).items() if isinstance(v, (bool, int, float, str))}
    return {n: (id(t), t.detach().clone(), t.requires_grad) for n, t in tensors.items()}, simple


def assert_untouched(model, before):
    tensors, simple = snapshot(model)
    assert tensors.keys() == before[0].keys() and simple == before[1]
    for name, (key, value, grad) in tensors.items():
        was = before[0][name]
        assert key == was[0] and grad == was[2] and torch.equal(value, was[1]), name


def pruned(model, x=X, *targets, **options):
    """`prune`, and the promise that neither the model nor its inputs changed."""
    before, given = snapshot(model), x.clone()
    result = sc.prune(model, (x,), *(targets or (HALF,)), **options)
    assert_untouched(model, before)
    assert torch.equal(x, given)
    assert result.proof.passed
    return result


def kept(result, name, dim):
    index = (result.cut.kept.get(name) or [None, None])[dim]
    size = dict(result.dense.named_parameters())[name].shape[dim]
    return torch.arange(size) if index is None else torch.from_numpy(index)


# ---------------------------------------------------------------- exact, by an independent reference
OVER_KEPT = {
    "softmax": lambda h: h.softmax(-1),
    "standardised": lambda h: (h - h.mean(-1, keepdim=True)) / h.std(-1, keepdim=True),
    "normalize": lambda h: F.normalize(h, dim=-1),
    "layer norm": lambda h: F.layer_norm(h, (h.shape[-1],)),
    "flipped onto itself": lambda h: h + h.flip(-1),
    "outer product": lambda h: (h[:, :, None] * h[:, None, :]).flatten(1),
    "every other": lambda h: h[:, ::2],
    "maxout": lambda h: h.view(4, -1, 2).amax(-1),
    "how many are positive": lambda h: h * (h > 0).sum(-1, keepdim=True),
}


@pytest.mark.parametrize("name", OVER_KEPT)
def test_the_kept_units_alone_give_the_same(name):
    between = OVER_KEPT[name]
    model = Two(between)
    model.b = nn.Linear(between(model.a(X)).shape[1], 3)
    result = pruned(model, X, sc.Params(at_most="75%"), score="random", seed=3)
    h = between(model.a(X)[:, kept(result, "a.weight", 0)])
    wanted = F.linear(h, model.b.weight[:, kept(result, "b.weight", 1)], model.b.bias)
    torch.testing.assert_close(result.model(X), wanted)


def written(h):
    h[:, :4].mul_(2.0)
    return h.relu()


def viewed(h):
    v = h.view(4, 2, 4)
    v[:, 0].add_(1.0)
    return h


FIXED = {
    "writes into a view": written,
    "writes into a view of a view": viewed,
    "a number of the dense width": lambda h: h * h.shape[-1] ** -0.5,
    "a tensor of the dense width": lambda h: F.prelu(h, torch.full((8,), 0.1)),
}


@pytest.mark.parametrize("name", FIXED)
def test_what_the_class_cannot_follow_is_the_dense_model_with_zeros(name):
    model = Two(FIXED[name])
    result = pruned(model)
    gone = torch.ones(8, dtype=torch.bool)
    gone[kept(result, "a.weight", 0)] = False
    h = model.between(model.a(X).detach().clone())
    wanted = F.linear(h.masked_fill(gone, 0.0), model.b.weight, model.b.bias)
    torch.testing.assert_close(result.model(X), wanted)
    assert result.cut.how == "graph" and result.notes


def test_a_number_of_another_meaning_is_left_alone():
    """`max_len` equals the width, and the example inputs are too short to show what it does."""

    class Limited(Two):
        def __init__(self):
            super().__init__()
            self.width = self.max_len = 8

        def forward(self, x):
            return self.b(self.a(x[:, : self.max_len]).reshape(len(x), -1, self.width).relu())

    model = Limited()
    result = pruned(model, torch.randn(2, 4, 6))
    longer = torch.randn(2, 12, 6)
    h = model.a(longer[:, :8])[..., kept(result, "a.weight", 0)].relu()
    torch.testing.assert_close(result.model(longer), F.linear(h, model.b.weight[:, kept(result, "b.weight", 1)], model.b.bias))


# ---------------------------------------------------------------- what a model remembers, and how it is made
class Counting(Two):
    """Counts its calls in a buffer and in an attribute, and averages what passes, written in place and assigned."""

    def __init__(self):
        super().__init__()
        self.calls = 0
        self.register_buffer("seen", torch.zeros(()))
        self.register_buffer("average", torch.zeros(8))

    def forward(self, x):
        h = self.a(x)
        self.calls += 1
        self.seen += 1
        self.average = 0.9 * self.average + 0.1 * h.detach().mean(0)
        return self.b(h - self.average)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_what_a_model_counts_is_not_advanced(dtype):
    model = Counting().to(dtype)
    result = pruned(model, X.to(dtype))
    assert result.model.calls == 0 and result.model.seen == 0
    before = snapshot(model)
    sc.measure(model, (X.to(dtype),), rounds=2)
    assert_untouched(model, before)


def test_statistics_of_a_batch_norm_that_always_trains_stay():
    class Always(Two):
        def __init__(self):
            super().__init__()
            self.register_buffer("mean", torch.zeros(8))
            self.register_buffer("var", torch.ones(8))

        def forward(self, x):
            return self.b(F.batch_norm(self.a(x), self.mean, self.var, training=True))

    model = Always()
    before = snapshot(model)
    sc.measure(model, (X,), rounds=2)
    assert_untouched(model, before)


def test_measuring_a_model_that_writes_into_its_input():
    x = X.clone()
    sc.measure(Two(lambda h: h), (x,), rounds=2)
    sc.measure(nn.Sequential(nn.ReLU(inplace=True), nn.Linear(6, 3)), (x,), rounds=2)
    assert torch.equal(x, X)


def test_a_model_that_returns_itself_as_its_copy_is_not_cut_in_place():
    class Single(Two):
        def __deepcopy__(self, memo):
            return self

    model = Single()
    result = pruned(model)
    assert result.cut.how == "graph"
    torch.testing.assert_close(result.model(X), model_of_rows(model, result)(X))


def model_of_rows(model, result):
    small = nn.Sequential(nn.Linear(6, len(kept(result, "a.weight", 0))), nn.ReLU(), nn.Linear(len(kept(result, "b.weight", 1)), 3))
    rows, columns = kept(result, "a.weight", 0), kept(result, "b.weight", 1)
    state = {"0.weight": model.a.weight[rows], "0.bias": model.a.bias[rows], "2.weight": model.b.weight[:, columns], "2.bias": model.b.bias}
    small.load_state_dict(state)
    return small


def hooked(model):
    scale = torch.linspace(0.5, 2.0, 8)
    model.a.register_forward_hook(lambda module, inputs, out: out * scale)


def pruned_by_torch(model):
    import torch.nn.utils.prune as by_torch

    by_torch.l1_unstructured(model.a, "weight", 0.5)


MADE = {
    "hook with a tensor of its own": hooked,
    "weight norm": lambda m: nn.utils.parametrizations.weight_norm(m.a),
    "spectral norm": lambda m: nn.utils.parametrizations.spectral_norm(m.a),
    "old weight norm": lambda m: nn.utils.weight_norm(m.a),
    "masks of torch.nn.utils.prune": pruned_by_torch,
    "frozen weight with a gradient elsewhere": lambda m: m.a.weight.requires_grad_(False),
    "compiled in place": lambda m: m.compile(backend="eager"),
}


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("name", MADE)
def test_odd_ways_to_make_a_layer(name):
    model = Two()
    MADE[name](model)
    result = pruned(model.eval())
    assert result.after.macs <= 0.6 * result.before.macs
    assert {n: p.requires_grad for n, p in result.model.named_parameters()} == {n: p.requires_grad for n, p in model.named_parameters()}


# ---------------------------------------------------------------- refused, and nothing changed
def raising():
    yield torch.randn(4, 6)
    raise OSError("the disk is gone")


NORMED = lambda: nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Linear(8, 3))  # noqa: E731  # one line, many uses
WRONG = {
    "data of another shape": (dict(data=[torch.randn(4, 6), torch.randn(4, 5)]), DataError, r"batch 2 of data, \(4, 5\)"),
    "data of another dtype": (dict(data=[torch.randn(4, 6).double()]), DataError, "float64"),
    "data elsewhere": (dict(data=[torch.randn(4, 6, device="meta")]), DataError, "batch 1"),
    "data that breaks off": (dict(data=raising()), DataError, "after 1 batches with OSError: the disk is gone"),
    "a batch without rows": (dict(data=[torch.randn(0, 6)]), DataError, "no rows"),
    "unknown keywords": (dict(data=[{"z": torch.randn(4, 6)}]), DataError, "'z'"),
    "scores of another type": (dict(score=lambda g, m, seed: None), InputError, "NoneType"),
    "scores that are words": (dict(score=lambda g, m, seed: {n: "high" for n in g.groups}), InputError, "not numbers"),
    "scores of no group": (dict(score={"0:out": torch.ones(8), "bogus": torch.ones(3)}), InputError, "'bogus'"),
    "a seed of 70 bits": (dict(score="random", seed=2**70), InputError, "64 bits"),
}


@pytest.mark.parametrize("name", WRONG)
def test_refused_with_the_model_as_it_was(name):
    options, error, says = WRONG[name]
    model = NORMED()
    before = snapshot(model)
    with pytest.raises(error, match=says):
        sc.prune(model, (X,), HALF, **options)
    assert_untouched(model, before)


def test_scores_may_be_lists_and_narrow_floats():
    for made in (lambda n: list(range(n)), lambda n: torch.arange(n).bfloat16(), lambda n: torch.randn(n, requires_grad=True)):
        assert pruned(Two(), score=lambda g, m, seed, made=made: {n: made(q.size) for n, q in g.groups.items()})


def test_a_last_batch_of_two_rows_counts_for_two_rows():
    model, x = NORMED(), torch.randn(66, 6)
    result = sc.prune(model, (X,), sc.MACs(at_most="90%"), repair="none")
    fitted = sc.mend(replace(result, dense=None), [x[:64], x[64:]], "batch_norm").model  # by the data alone
    torch.testing.assert_close(fitted[1].running_mean, fitted[0](x).mean(0))
    assert (fitted[1].running_var / fitted[0](x).var(0) - 1).abs().max() < 0.15


def test_nan_in_one_of_two_outputs_is_noticed():
    class Pair(Two):
        def forward(self, x):
            return super().forward(x), self.b.bias * 1.0

    model = Pair()
    graph = sc.trace(model, (X,))
    broken = copy.deepcopy(model)
    with torch.no_grad():
        broken.b.bias[:] = float("nan")
    plan = sc.plan(graph, sc.score.l2(graph, model), sc.MACs(at_most="99%"))
    assert not sc.prove(model, graph, plan.keep, sc.cut(broken, graph, plan).model).passed


def test_a_forward_with_a_fixed_dtype_cannot_be_proven():
    class Fixed(Two):
        def forward(self, x):
            return self.b(self.a(x).relu() @ torch.frombuffer(bytearray(torch.eye(8).numpy().tobytes()), dtype=torch.float32).view(8, 8))

    with pytest.raises(SecateurError):
        sc.prune(Fixed(), (X,), HALF)


@pytest.mark.parametrize("given", [dict(threads=0), dict(threads=10**9), dict(threads="2"), dict(rounds=1)])
def test_measure_refuses_what_cannot_be_timed(given):
    with pytest.raises(InputError, match="spread needs 2 rounds" if "rounds" in given else "1 to 1024 threads"):
        sc.measure(Two(), (X,), **given)


def test_torchscript_and_nan_inputs_are_named():
    net = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3)).eval()
    with pytest.raises(ModelError, match="TorchScript"):
        sc.prune(torch.jit.trace(net, torch.ones(2, 6)), (torch.ones(2, 6),), sc.MACs(at_most="50%"))
    with pytest.raises(SecateurError, match="'1' is TorchScript"):
        sc.prune(nn.Sequential(nn.Linear(6, 6), torch.jit.script(net)), (torch.ones(2, 6),), sc.MACs(at_most="50%"))
    with pytest.raises(InputError, match="holds NaN"):
        sc.prune(net, (torch.full((2, 6), float("nan")),), sc.MACs(at_most="50%"))
