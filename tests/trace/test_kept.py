"""A look at a model leaves nothing in it, whatever its forward remembers."""

import pytest
import torch
from torch import nn

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
            self.spare = nn.Identity()
            self.late = "here"
            self.ready = True
        self.calls = self.calls + 1
        self.seen.add_(1)
        self.shown = x.detach() * 2
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
