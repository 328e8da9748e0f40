"""A look at a model leaves nothing in it, whatever its forward remembers."""

import pytest
import torch
from torch import nn
from torch.nn.utils import prune as torch_prune

import secateur as sc
from secateur.measure.run import at_rest
from secateur.trace import parts, trace
from secateur.trace.capture import evaluating


def told(module, args, output):
    return output


class Remembering(nn.Module):
    """The first call prepares what later ones use: half of that would be worse than all or nothing."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.last = nn.Linear(6, 12), nn.Linear(12, 3)
        self.ready, self.calls, self.steps, self.table, self.names = False, 0, [], {}, set()
        self.register_buffer("seen", torch.zeros(()))

    def forward(self, x):
        if not self.ready:
            self.steps.append(2.0)
            self.table["factor"] = self.steps[0]
            self.names.add("ready")
            self.first.register_forward_hook(told)
            self.late = "here"
            self.ready = True
        self.calls = self.calls + 1
        self.seen.add_(1)
        return self.last(torch.relu(self.first(x)) * self.table["factor"])


def all_of(model):
    held = {}
    for name, module in model.named_modules():
        for key, value in vars(module).items():
            contents = [*value.items()] if isinstance(value, dict) else sorted(value) if isinstance(value, (set, list)) else ()
            held[f"{name}.{key}"] = (id(value), [(k, id(v)) for k, v in contents] if isinstance(value, dict) else contents)
    return held, {k: v.clone() for k, v in model.state_dict().items()}


X = torch.randn(8, 6, generator=torch.Generator().manual_seed(0))
LOOKS = {
    "trace": lambda m: trace(m, (X,)),
    "parts": lambda m: parts(m, (X,)),
    "measure": lambda m: sc.measure(m, (X,), rounds=2),
    "prune": lambda m: sc.prune(m, (X,), sc.Params("60%"), data=[X]),
    "sparsify": lambda m: sc.sparsify(m, (X,), sc.Sparse(keep="50%"), data=[X]),
    "a plain call at rest": lambda m: called(at_rest, m),
    "a plain call while evaluating": lambda m: called(evaluating, m),
}


def called(around, model):
    with around(model), torch.no_grad():
        model(X)
        assert model.ready and model.steps == [2.0]


@pytest.mark.parametrize("name", LOOKS)
@pytest.mark.parametrize("warm", [False, True])
def test_nothing_of_a_look_stays(name, warm):
    model = Remembering()
    if warm:
        model(X)
    before, values = all_of(model)
    LOOKS[name](model)
    after, now = all_of(model)
    assert after == before
    assert all(torch.equal(v, now[k]) for k, v in values.items())
    wanted = Remembering()(X)
    assert torch.equal(model(X), wanted)


def test_it_is_as_before_also_where_the_look_fails():
    model = Remembering()
    before, _ = all_of(model)
    for around in (at_rest, evaluating):
        with pytest.raises(RuntimeError), around(model):
            model(X[:, :3])
        assert all_of(model)[0] == before


def test_layers_that_keep_their_weight_beside_the_parameters_are_still_cut_as_what_they_are():
    """Old-style weight norm and torch's own pruning leave a tensor among the attributes at every call; one that has a history cannot be copied."""
    for name, around in {"norm": nn.utils.weight_norm, "mask": lambda m: torch_prune.l1_unstructured(m, "weight", 0.2)}.items():
        for warm in (False, True):
            torch.manual_seed(0)
            model = nn.Sequential(around(nn.Linear(6, 16)), nn.ReLU(), nn.Linear(16, 3)).eval()
            if warm:
                model(X)
            for data in (None, [X, X]):
                result = sc.prune(model, (X,), sc.Params("60%"), data=data)
                assert result.cut.how == "attributes" and result.proof.passed, (name, warm)


def test_containers_that_take_no_change_are_left_alone():
    class Fixed(dict):
        def update(self, *args, **kwargs):
            raise RuntimeError("not here")

    model = Remembering()
    model.fixed = Fixed(a=1)
    model.register_forward_hook(lambda module, args, output: module.fixed.__setitem__("b", 2))
    for around in (at_rest, evaluating):
        called(around, model)
        assert model.training and not model.ready and model.steps == []


class Stateful(nn.Module):
    """A state in a tuple, a cache of a class of its own, and a layer that is made at the first call."""

    class Cache(dict):
        pass

    def __init__(self):
        super().__init__()
        self.first, self.state, self.cache, self.late = nn.Linear(6, 3), (0, None), self.Cache(), None

    def forward(self, x):
        if self.late is None:
            torch.manual_seed(1)
            self.late = nn.Linear(3, 3)
        x = self.first(x)
        self.state = (1, x.detach())
        self.cache["x"] = x
        return self.late(x)


@pytest.mark.parametrize("around", [at_rest, evaluating])
def test_states_in_tuples_and_caches_of_a_class_of_their_own_are_put_back(around):
    model = Stateful()
    model(X)
    model.state, model.cache = (0, None), Stateful.Cache(a=1)
    state, cache = model.state, model.cache
    with around(model):
        model(X)
    assert model.state is state and model.cache is cache and cache == {"a": 1}
    trace(model, (X,))
    assert model.state is state and model.cache is cache and cache == {"a": 1}


def test_a_layer_that_a_look_makes_is_not_hidden_by_the_none_it_was():
    model = Stateful()
    with at_rest(model):
        model(X)
    made = model.late
    assert isinstance(made, nn.Linear) and "late" not in vars(model)
    with at_rest(model):
        model(X)
    assert model.late is made
    model = Stateful()
    with evaluating(model):
        model(X)
    assert model.late is None and "late" not in model._modules


def test_a_layer_put_in_while_looking_stays():
    model = Remembering()
    with at_rest(model):
        model.last = nn.Identity()
    assert isinstance(model.last, nn.Identity)
